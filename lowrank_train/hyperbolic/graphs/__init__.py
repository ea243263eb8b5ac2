"""Graph networks: data, splits, layers, tasks, and their training."""
