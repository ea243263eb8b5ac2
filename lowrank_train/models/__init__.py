"""Models: built on meta, filled, sharded, evaluated, and written as plain Hugging Face folders."""
