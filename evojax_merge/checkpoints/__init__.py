"""Hugging Face folders in and out: the only room that knows tensor names and files."""
