"""The config of a search."""
