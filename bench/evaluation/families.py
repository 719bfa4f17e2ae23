"""A likelihood pass of a stored model of every architecture, against transformers (10 minutes).

    python -m bench families

A model of random weights for each family, made by transformers in the sizes below (about 100 million parameters; of a
mixture's eight experts each token has two), float32. Both sides score the second half of the same 8 rows of 192 random
tokens: ours in the compiled pass of a search, the peer in one batch. Their scores must agree. They take turns, on a
machine whose speed drifts; the first pass of either is not counted. Shown besides: what share of the machine's best
matrix product each reaches, by the products with weights alone.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import jax
import numpy as np
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bench.shared.machine import describe
from bench.shared.torch_peer import score_rows
from evojax_merge.benchmarks.references import matrix_peak, seconds_of
from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.evaluation import passes
from evojax_merge.evaluation.passes import SharedModel
from evojax_merge.evaluation.responses import arrays_of
from evojax_merge.models.architecture import model_types
from evojax_merge.tasks.batches import scoring_batches
from evojax_merge.tasks.task import Row

ROWS, WIDTH = 8, 192
COMMON: dict[str, Any] = {
    "vocab_size": 16384, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MIXTURE: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN_MIXTURE = MIXTURE | {"num_experts": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
# The settings of a family besides, or in place of, the common sizes.
OWN: dict[str, dict[str, Any]] = {
    "mixtral": MIXTURE | {"num_local_experts": 8, "intermediate_size": 768},
    "qwen2_moe": QWEN_MIXTURE | {"shared_expert_intermediate_size": 768},
    "qwen3_moe": QWEN_MIXTURE,
}


def work(model: Any, config: Any) -> float:
    """FLOP of a pass's products with weights: each token meets the layers once, of a mixture's experts its own, and
    each scored token the head."""
    layers = 0.0
    for name, values in model.named_parameters():
        if ".layers." in name or ".h." in name:
            # The experts of a layer are one array of three axes.
            used = config.num_experts_per_tok / values.shape[0] if values.ndim == 3 else 1.0
            layers += used * values.numel() if values.ndim > 1 else 0
    scored = ROWS * (WIDTH - WIDTH // 2)
    return 2.0 * layers * ROWS * WIDTH + 2.0 * config.vocab_size * config.hidden_size * scored


def compared(kind: str, rounds: int, folder: Path) -> tuple[int, float, float, float]:
    """The model's number of parameters, the FLOP of a pass, and its median seconds, ours and the peer's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(COMMON | OWN.get(kind, {}))))
    model = model.float().eval()
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, MIXTURE["vocab_size"], (ROWS, WIDTH))
    rows = [Row(tuple(map(int, row)), WIDTH // 2, f"row {i}", i) for i, row in enumerate(tokens)]
    sources, config = open_sources([folder])
    stored = load_stored(sources, config)
    (scoring,) = scoring_batches([rows], ROWS * WIDTH, pack=False)
    (batch,) = scoring.batches
    arrays = jax.device_put(arrays_of(batch))

    def ours() -> np.ndarray:
        totals, _ = passes.score(passes.ScoreSpec(config, SharedModel(), None), (stored, arrays), (np.zeros(1), None))
        return np.asarray(totals)[0]

    def theirs() -> np.ndarray:
        return score_rows(model, rows, ROWS * WIDTH)

    found, real = np.zeros(ROWS), batch.rows >= 0
    found[batch.rows[real]] = ours()[real]
    np.testing.assert_allclose(found, theirs(), rtol=1e-4)
    mine, peer = np.median([(seconds_of(ours), seconds_of(theirs)) for _ in range(rounds)], axis=0)
    return sum(values.numel() for values in model.parameters()), work(model, model.config), float(mine), float(peer)


def main() -> None:
    parser = argparse.ArgumentParser(description="A likelihood pass of every family, against transformers.")
    # The text decoders of larger models are no models by themselves.
    families = [kind for kind in model_types() if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    parser.add_argument("--families", nargs="+", choices=families, default=families)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    peak = matrix_peak()
    print(f"{ROWS} x {WIDTH} tokens; {describe()}; its best matrix product: {peak / 1e9:.0f} GFLOP/s\n")
    print(
        "| family | parameters | GFLOP | ours, s | transformers, s | ratio | ours, of the best product "
        "| transformers, of it |\n| --- |" + " ---: |" * 7
    )
    for kind in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            parameters, done, ours, theirs = compared(kind, arguments.rounds, Path(folder))
        print(
            f"| {kind} | {parameters / 1e6:.0f} M | {done / 1e9:.0f} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f} "
            f"| {done / ours / peak:.0%} | {done / theirs / peak:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
