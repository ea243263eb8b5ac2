"""Singular values and vectors: factors of a spectral layer, samples of triplets, ranks from spectra."""
