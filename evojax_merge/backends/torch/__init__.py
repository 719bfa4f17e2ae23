"""Any network that transformers opens, as a backend."""
