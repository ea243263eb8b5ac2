"""Files of runs and of others: checksums, checkpoints, JSON, numbers that are not finite, room on the disk."""
