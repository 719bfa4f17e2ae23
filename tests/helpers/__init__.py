"""Builders of checkpoints, tasks and configs, and commands."""
