"""Every architecture that comes with the program, against transformers: a likelihood pass of a stored model.

    python bench/families.py

A model of random weights for each family, made by transformers in the sizes below (33 million parameters in a dense
one, 90 million in a mixture of eight experts, of which each token has two), float32. Both sides score the second half
of the same 8 rows of 192 random tokens: ours in the compiled pass of a search, the peer in one batch. Their scores must
agree. They take turns, on a machine whose speed drifts; the first pass of either is not counted.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import jax
import numpy as np
from machine import describe
from torch_peer import score_rows
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.evaluation import passes
from evojax_merge.evaluation.evaluator import arrays_of
from evojax_merge.evaluation.passes import SharedModel
from evojax_merge.models.architecture import model_types
from evojax_merge.tasks.batches import scoring_batches
from evojax_merge.tasks.task import Row

ROWS, WIDTH = 8, 192
COMMON = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 768, "norm_topk_prob": True}
# What a family has besides, or in place of the common sizes.
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 768},
    "qwen2_moe": EXPERTS | {"num_experts": 8, "shared_expert_intermediate_size": 768},
    "qwen3_moe": EXPERTS | {"num_experts": 8},
}


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compared(kind: str, rounds: int, folder: Path) -> tuple[int, float, float]:
    """How many parameters the model has, and the median seconds of a pass, ours and the peer's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(COMMON | OWN.get(kind, {}))))
    model = model.float().eval()
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, COMMON["vocab_size"], (ROWS, WIDTH))
    rows = [Row(tuple(map(int, row)), WIDTH // 2, f"row {i}", i) for i, row in enumerate(tokens)]
    sources, config = open_sources([folder])
    stored = load_stored(sources, config)
    (scoring,) = scoring_batches([rows], ROWS * WIDTH, pack=False)
    (batch,) = scoring.batches
    arrays = jax.device_put(arrays_of(batch))

    def ours() -> np.ndarray:
        found, _ = passes.score(config, SharedModel(), None, None, stored, np.zeros(1), None, arrays)
        return np.asarray(found)[0]

    def theirs() -> np.ndarray:
        return score_rows(model, rows, ROWS * WIDTH)

    found, real = np.zeros(ROWS), batch.rows >= 0
    found[batch.rows[real]] = ours()[real]
    np.testing.assert_allclose(found, theirs(), rtol=1e-4)
    mine, peer = np.median([(seconds_of(ours), seconds_of(theirs)) for _ in range(rounds)], axis=0)
    return sum(values.numel() for values in model.parameters()), float(mine), float(peer)


def main() -> None:
    parser = argparse.ArgumentParser(description="A likelihood pass of every family, against transformers.")
    # The text decoders of larger models are no models by themselves.
    families = [kind for kind in model_types() if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    parser.add_argument("--families", nargs="+", choices=families, default=families)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{ROWS} x {WIDTH} tokens; {describe()}\n")
    print("| family | parameters | ours, s | transformers, s | ratio |\n| --- | ---: | ---: | ---: | ---: |")
    for kind in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            parameters, ours, theirs = compared(kind, arguments.rounds, Path(folder))
        print(f"| {kind} | {parameters / 1e6:.0f} M | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
