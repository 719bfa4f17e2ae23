"""Makes trained models of the zoo the ones that come with the package.

python -m bench.shared.packaged_weights    # the demo family, of the seed that the package has
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from safetensors.numpy import load_file, save_file

from evojax_merge.zoo import MODELS, resolve_reference
from evojax_merge.zoo.arithmetic import PACKAGED, PACKAGED_SEED


def pack_weights(folder: Path, models: Sequence[str], packaged: Path, dtype: Any) -> None:
    """Write the weights of the models below `folder` as files of the package, in a narrower dtype."""
    for name in models:
        tensors = load_file(folder / name / "model.safetensors")
        narrow = {tensor: values.astype(dtype) for tensor, values in tensors.items()}
        save_file(narrow, packaged / f"{name}.safetensors")


if __name__ == "__main__":
    pack_weights(resolve_reference(f"zoo:{PACKAGED_SEED}/base").parent, MODELS, PACKAGED, jnp.bfloat16)
