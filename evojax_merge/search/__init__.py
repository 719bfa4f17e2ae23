"""Strategies, the generation loop, the run folder."""
