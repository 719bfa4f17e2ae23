"""Evolutionary model merging as one program on the accelerator.

Importing this package imports neither JAX nor transformers; its rooms do, where they need them.
"""

__version__ = "0.1.0"
