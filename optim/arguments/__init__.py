"""What users write: names, hyperparameters and the flags of torch, checked; warnings that point at their line."""
