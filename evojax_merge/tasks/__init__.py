"""Data files -> token batches, and what a model gave for them -> per-example scores. Knows no model and no search."""
