"""Memory of a training step: predicted term by term, measured, and what fits a budget."""
