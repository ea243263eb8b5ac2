"""Layers that stand for a matrix: spectral, low-rank, LoRA, and the choice of layers that they replace."""
