"""Pretraining of LLaMA and OPT on top of ``optim``: configuration, models, data, sharding, checkpoints, reports."""
