"""The merge methods, a file per family. Each file registers its methods; listings have them in the order below."""

from importlib import import_module

for family in (
    "interpolation", "task_vectors", "sce", "nearswap", "arcee_fusion", "ram", "passthrough", "singular",
    "interference", "activations", "diffusion",
):  # fmt: skip
    import_module(f"{__name__}.{family}")
