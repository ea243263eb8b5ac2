"""Numbers kept in fewer bits: state in 8 and 4 bits, weights in int8, stochastic rounding."""
