"""What several test files share: builders of checkpoints, tasks and configs, and commands."""
