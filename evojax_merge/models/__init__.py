"""The decoder and where its weights come from."""
