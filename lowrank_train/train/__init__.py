"""The training of a language model: one run, one loop, its checkpoints, metrics and report."""
