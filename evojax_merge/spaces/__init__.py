"""Spaces: genome -> recipe, with bounds."""
