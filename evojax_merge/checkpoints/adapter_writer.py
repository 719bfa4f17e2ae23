"""LoRA adapters in PEFT's format, written tensor by tensor."""

import json
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from evojax_merge.checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_FILE, PREFIX
from evojax_merge.checkpoints.writer import GrowingFile


class AdapterWriter:
    """Writes an adapter as PEFT does, with a scale of 1, tensor by tensor; the names are transformers'.

    base: the reference to the adapter's base model. embeddings: the names of the weights in which tokens and positions
    look up rows; fan_in_fan_out: whether the base stores the weights of linear modules as `[in, out]`; tied: the names
    of an embedding that is saved whole, and of the head that it stays; most: more tensors are not written, nor longer
    names.
    """

    def __init__(
        self, folder: Path, base: str, embeddings: Collection[str] = (), fan_in_fan_out: bool = False,
        tied: tuple[str, str] | None = None, most: tuple[int, int] = (1024, 256),
    ) -> None:  # fmt: skip
        self._folder, self._embeddings = folder, embeddings
        self._config: dict[str, Any] = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
            "lora_dropout": 0.0, "fan_in_fan_out": fan_in_fan_out,
        }  # fmt: skip
        self._config |= {} if tied is None else {"ensure_weight_tying": True}
        self._tied = tied
        self._file = GrowingFile(folder / ADAPTER_FILE, 2 * most[0], len(PREFIX) + most[1] + len("lora_embedding_A"))
        self._ranks: dict[str, int] = {}
        self._saved: set[str] = set()
        self._biased = False

    def __enter__(self) -> "AdapterWriter":
        self._file.__enter__()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._file.__exit__(kind, value, trace)
        if kind is not None:
            return
        rank = max(self._ranks.values(), default=1)
        # The alpha of a module is its rank.
        others = {module: other for module, other in sorted(self._ranks.items()) if other != rank}
        config = self._config | {
            "r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others,
            "bias": "all" if self._biased else "none", "target_modules": sorted(self._ranks),
            "modules_to_save": sorted(self._saved) or None,
        }  # fmt: skip
        (self._folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def add_factors(self, name: str, a: np.ndarray, b: np.ndarray) -> None:
        """Write the factors `A [rank, in]` and `B [out, rank]` of a weight's difference."""
        module = name.removesuffix(".weight")
        self._ranks[module] = len(a)
        # PEFT stores the factors of an embedding's weight [rows, hidden] transposed.
        embedded = {"lora_embedding_A": b.T, "lora_embedding_B": a.T}
        parts = embedded if name in self._embeddings else {"lora_A.weight": a, "lora_B.weight": b}
        for part, values in parts.items():
            self._file.write(f"{PREFIX}{module}.{part}", values)

    def add_whole(self, name: str, values: np.ndarray) -> None:
        """Write a tensor that replaces the base's. A bias comes after the factors of its module: PEFT then loads it
        into the module that it wraps. (Its `lora_bias` refuses embeddings, and cannot be merged into a model of which
        an adapted module has no bias.)"""
        module, _, kind = name.rpartition(".")
        if kind == "bias" and module in self._ranks:
            self._biased, name = True, f"{module}.base_layer.bias"
        else:
            self._saved.add(module)
        # Where weights are tied, PEFT wants them twice, though it saves one module.
        for written in self._tied if self._tied is not None and name == self._tied[0] else (name,):
            self._file.write(f"{PREFIX}{written}", values)
