"""The optimizers: one published method in each file, and the table of their names."""
