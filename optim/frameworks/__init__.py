"""The optimizers in other frameworks: Hugging Face Trainer, axolotl, torchtitan."""
