"""The merge methods, a file per family. Each file registers its methods; listings have them in the order below."""

from merge_kernels.methods import interpolation  # isort: skip
from merge_kernels.methods import task_vectors  # isort: skip
from merge_kernels.methods import sce, nearswap, arcee_fusion, ram, passthrough  # isort: skip
from merge_kernels.methods import singular, interference  # isort: skip
from merge_kernels.methods import activations  # isort: skip
from merge_kernels.methods import diffusion  # isort: skip

__all__ = [
    "activations",
    "arcee_fusion",
    "diffusion",
    "interference",
    "interpolation",
    "nearswap",
    "passthrough",
    "ram",
    "sce",
    "singular",
    "task_vectors",
]
