"""The low-rank engine: Adam on a few directions of every matrix, put together from a basis and a residual."""
