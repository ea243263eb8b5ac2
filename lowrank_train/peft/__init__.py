"""Adapters of peft in a run: which there are, how they are built, trained and exported."""
