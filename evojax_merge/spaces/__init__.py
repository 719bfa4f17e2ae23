"""Spaces: genome -> recipe, with bounds. May import models.bank and merge_kernels; knows no file and no task."""
