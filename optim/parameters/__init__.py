"""A parameter as an optimizer sees it: its role, its state, its matrices, and whether the model still has it."""
