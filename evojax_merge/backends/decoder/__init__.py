"""Native language models as a backend."""
