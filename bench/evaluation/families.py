"""A likelihood pass of a stored model of every architecture, against transformers (10 minutes).

    python -m bench families
    python -m bench families --families qwen3_next lfm2 --rows 1 --width 4096

A model of random weights for each family, made by transformers in the sizes below (about 100 million parameters; of a
mixture's eight experts each token has two), float32. Both sides score the second half of the same rows of random
tokens, 8 of 192 by default: ours in the compiled pass of a search, the peer in one batch, by the fastest of its ways
that needs no other package. Their scores must agree. They take turns, on a machine whose speed drifts; the first pass
of either is not counted. Shown besides: what share of the machine's best matrix product each reaches, by the products
with weights alone, and the bytes of temporary arrays of our pass.
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

COMMON: dict[str, Any] = {
    "vocab_size": 16384, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MIXTURE: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN_MIXTURE = MIXTURE | {"num_experts": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 6, "linear_num_value_heads": 6, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
MAMBA: dict[str, Any] = {"mamba_n_heads": 24, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128}
GROUPED_MIXTURE = MIXTURE | {
    "n_routed_experts": 8, "moe_intermediate_size": 768, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
LATENT_MIXTURE = GROUPED_MIXTURE | {
    "num_key_value_heads": 8, "q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
    "v_head_dim": 64, "head_dim": 32,
}  # fmt: skip
# The settings of a family besides, or in place of, the common sizes.
OWN: dict[str, dict[str, Any]] = {
    "mixtral": MIXTURE | {"num_local_experts": 8, "intermediate_size": 768},
    "qwen2_moe": QWEN_MIXTURE | {"shared_expert_intermediate_size": 768},
    "qwen3_moe": QWEN_MIXTURE,
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_moe_text"), QWEN_MIXTURE | DELTA | {"shared_expert_intermediate_size": 768}
    ),
    "qwen3_5_text": DELTA,
    "granitemoehybrid": MAMBA | {
        "num_local_experts": 0, "shared_intermediate_size": 2048, "layer_types": (["mamba"] * 3 + ["attention"]) * 3,
    },
    "falcon_h1": MAMBA | {"mamba_d_ssm": 1536},
    "nemotron_h": {
        "layers_block_type": ["mamba", "mlp", "attention", "mlp"] * 3, "mamba_num_heads": 24, "mamba_head_dim": 64,
        "n_groups": 1, "ssm_state_size": 128, "num_hidden_layers": None,
    },
    "lfm2": {"layer_types": (["conv"] * 2 + ["full_attention"]) * 4, "block_auto_adjust_ff_dim": False},
    "deepseek_v2": LATENT_MIXTURE,
    "deepseek_v3": LATENT_MIXTURE,
    "ernie4_5_moe": MIXTURE | {"moe_num_experts": 8, "moe_intermediate_size": 768, "moe_num_shared_experts": 1},
    "glm4_moe": GROUPED_MIXTURE,
    "gpt_oss": MIXTURE | {"num_local_experts": 8, "intermediate_size": 768},
    "lfm2_moe": MIXTURE
    | {"num_experts": 8, "moe_intermediate_size": 768, "layer_types": ["conv", "full_attention"] * 4},
    "olmoe": MIXTURE | {"num_experts": 8, "intermediate_size": 768},
}  # fmt: skip


def work(model: Any, config: Any, rows: int, width: int) -> float:
    """FLOP of a pass's products with weights: each token meets the layers once, of a mixture's experts its own, and
    each scored token the head."""
    layers = 0.0
    for name, values in model.named_parameters():
        if ".layers." in name or ".h." in name:
            # The experts of a layer are one array of three axes, as a short convolution is.
            used = config.num_experts_per_tok / values.shape[0] if "experts" in name and values.ndim == 3 else 1.0
            layers += used * values.numel() if values.ndim > 1 else 0
    scored = rows * (width - width // 2)
    return 2.0 * layers * rows * width + 2.0 * config.vocab_size * config.hidden_size * scored


def compared(kind: str, shape: tuple[int, int], rounds: int, folder: Path) -> tuple[int, float, float, float, int]:
    """The model's number of parameters, the FLOP of a pass over rows of a `shape`, its median seconds, ours and the
    peer's, and the bytes of our temporary arrays."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(COMMON | OWN.get(kind, {}))))
    model = model.float().eval()
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    count, width = shape
    tokens = rng.integers(3, MIXTURE["vocab_size"], shape)
    rows = [Row(tuple(map(int, row)), width // 2, f"row {i}", i) for i, row in enumerate(tokens)]
    sources, config = open_sources([folder])
    stored = load_stored(sources, config)
    (scoring,) = scoring_batches([rows], count * width, pack=False)
    (batch,) = scoring.batches
    arrays = jax.device_put(arrays_of(batch))

    spec, inputs = (
        passes.ScoreSpec(config, SharedModel(tuple(config.parts)), None),
        ((stored, arrays), (np.zeros(1), None)),
    )
    memory = passes.score.lower(spec, *inputs).compile().memory_analysis()
    assert memory is not None

    def ours() -> np.ndarray:
        totals, _ = passes.score(spec, *inputs)
        return np.asarray(totals)[0]

    def theirs() -> np.ndarray:
        return score_rows(model, rows, count * width)

    totals, real = np.zeros(count), batch.rows >= 0
    totals[batch.rows[real]] = ours()[real]
    np.testing.assert_allclose(totals, theirs(), rtol=1e-4)
    mine, peer = np.median([(seconds_of(ours), seconds_of(theirs)) for _ in range(rounds)], axis=0)
    parameters = sum(values.numel() for values in model.parameters())
    flop = work(model, model.config, count, width)
    return parameters, flop, float(mine), float(peer), memory.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description="A likelihood pass of every family, against transformers.")
    # The text decoders of larger models are no models by themselves.
    families = [kind for kind in model_types() if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    parser.add_argument("--families", nargs="+", choices=families, default=families)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    shape, peak = (arguments.rows, arguments.width), matrix_peak()
    print(f"{shape[0]} x {shape[1]} tokens; {describe()}; its best matrix product: {peak / 1e9:.0f} GFLOP/s\n")
    print(
        "| family | parameters | GFLOP | ours, s | transformers, s | ratio | ours, of the best product "
        "| transformers, of it | temporaries, MB |\n| --- |" + " ---: |" * 8
    )
    for kind in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            parameters, done, ours, theirs, temporaries = compared(kind, shape, arguments.rounds, Path(folder))
        print(
            f"| {kind} | {parameters / 1e6:.0f} M | {done / 1e9:.0f} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f} "
            f"| {done / ours / peak:.0%} | {done / theirs / peak:.0%} | {temporaries / 1e6:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
