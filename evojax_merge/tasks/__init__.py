"""Data files -> token batches, and a model's responses to them -> per-example scores. Imports no model and no
search."""
