"""A merged model in FP8, as compressed-tensors keeps it and vLLM runs it: the matrices of its layers are
`float8_e4m3[out, in]` with a scale for each output; inputs are quantised when the model runs, by token."""

import json
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from evojax_merge.checkpoints.compressed_tensors import SCALE
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.checkpoints.quantised import FP8
from evojax_merge.checkpoints.writer import ShardWriter, TensorSpec
from evojax_merge.errors import InputError
from evojax_merge.mergekit.execute import MergePlan, Progress, merged_tensors, write_small_files
from evojax_merge.models.architecture import ROUTER

FP8_DTYPE = "float8_e4m3"
LARGEST = float(ml_dtypes.finfo(FP8).max)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NUMBERS = {"num_bits": 8, "type": "float", "symmetric": True}
_GROUP = {
    "targets": ["Linear"], "weights": {**_NUMBERS, "strategy": "channel", "dynamic": False},
    "input_activations": {**_NUMBERS, "strategy": "token", "dynamic": True},
}  # fmt: skip


@dataclass(frozen=True)
class Fp8Merge:
    """A planned merge whose layers are written in FP8."""

    plan: MergePlan

    def write(self, folder: Path, progress: Progress, max_shard_bytes: int) -> None:
        """Merge into an empty folder. Raises InputError for an architecture whose linear modules are not known."""
        plan, specs, others = self.plan, dict[str, TensorSpec](), set[str]()
        leader, architecture = plan.leader, plan.leader.architecture
        if architecture is None or any(leaf.transposed for leaf in architecture.leaves):
            raise InputError("--dtype", f"{FP8_DTYPE}: {leader.path} has no linear modules that are known")
        for name, spec in plan.specs.items():
            leaf = None if name in plan.copied else architecture.leaf_of(leader.names.of_architecture(name))
            in_layer = leaf is not None and leaf.stack is not None and leaf.component != ROUTER
            if in_layer and len(spec.shape) == 2 and name.endswith(".weight"):
                specs[name] = TensorSpec(spec.shape, FP8)
                specs[name.removesuffix(".weight") + SCALE] = TensorSpec((spec.shape[0], 1), BFLOAT16)
                continue
            specs[name] = spec
            if len(spec.shape) == 2 and name.endswith(".weight"):
                others.add(name.removesuffix(".weight"))
        with ShardWriter(folder, specs, max_shard_bytes) as writer:
            names = [name for name in writer.order if name in plan.specs]
            for name, values in zip(names, merged_tensors(plan, names), strict=True):
                if specs[name].dtype == FP8:
                    values, scale = scaled_to_fp8(values)
                    writer.write(name, values)
                    writer.write(name.removesuffix(".weight") + SCALE, scale)
                else:
                    writer.write(name, values)
                progress(plan.specs[name].nbytes)
        write_small_files(plan, folder)
        file = folder / "config.json"
        quantisation = {
            "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": _GROUP}, "ignore": sorted(others),
        }  # fmt: skip
        config = read_json_object(file, missing={}) | {"quantization_config": quantisation}
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def scaled_to_fp8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix as `float8_e4m3[out, in]`, and the scales `bfloat16[out, 1]` that it is multiplied by."""
    wide = values.astype(np.float32)
    scale = (np.abs(wide).max(axis=1, keepdims=True) / LARGEST).astype(BFLOAT16)
    scale[scale == 0] = 1
    return np.clip(wide / scale.astype(np.float32), -LARGEST, LARGEST).astype(FP8), scale
