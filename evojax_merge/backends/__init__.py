"""Backends: the models of a search, how candidates made of them answer, and what is exported."""
