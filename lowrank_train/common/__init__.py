"""What every command shares: errors, ranks, progress, signals, provenance of results."""
