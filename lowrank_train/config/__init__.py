"""Configurations: a schema, YAML files, overrides, and training methods by name."""
