"""Pages, tables and model cards of a run."""
