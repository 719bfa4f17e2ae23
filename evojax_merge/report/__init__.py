"""Tables, plots and model cards of a run."""
