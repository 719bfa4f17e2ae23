"""The decoder and the sources of its weights."""
