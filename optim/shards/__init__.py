"""How tensors lie on a mesh of ranks, and everything that is communicated. All of torch.distributed is here."""
