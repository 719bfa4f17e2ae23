"""Population x tasks -> score matrix."""
