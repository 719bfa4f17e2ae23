"""The merge methods, a file per family. Each file registers its methods; listings have them in the order below."""

from merge_kernels.methods import interpolation  # isort: skip
from merge_kernels.methods import task_vectors  # isort: skip
from merge_kernels.methods import sce, nearswap, arcee_fusion, ram, passthrough  # isort: skip
from merge_kernels.methods import diffusion  # isort: skip

__all__ = ["arcee_fusion", "diffusion", "interpolation", "nearswap", "passthrough", "ram", "sce", "task_vectors"]
