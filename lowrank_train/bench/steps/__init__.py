"""One step of an optimizer, or of a training: its kernels and bytes, counted; its time, measured."""
