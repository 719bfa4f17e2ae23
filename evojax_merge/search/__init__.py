"""Strategies, the generation loop, the run folder. May import every room but report and cli."""
