"""The spectra of trained models: singular values, intruders, pruning curves, their history in a run."""
