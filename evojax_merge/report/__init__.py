"""Tables, plots and model cards of a run. May import every room but cli; changes nothing."""
