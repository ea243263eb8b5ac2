"""What an optimizer costs: bytes of state, bytes sent, time of a step."""
