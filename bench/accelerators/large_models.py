"""Searches over large models on cards that they outgrow, priced (8 minutes).

    python -m bench large-models
    python -m bench large-models --shapes 9B-delta 3B-mamba
    python -m bench large-models --compile v5e-1     # with the reports of this target's compiler, where it is installed
    python -m bench large-models --compile v5p-16 --shapes 70B --use generation --share 2 8

Models of Mistral-7B's and Llama-3-70B's shapes, of Qwen3.5-9B's (9B-delta) and Granite 4 Micro's (3B-mamba), whose
layers are mostly recurrent, in bfloat16, a base and three parents: headers alone, no weights. A
generation is of 16 candidates merged by TIES, or 4 that follow gradients, on 128 examples of 350 tokens, of which the
last 100 are scored, or written. Seconds are those of the roofline: of the arithmetic and the memory's traffic, and of
the exchanges between devices that share a candidate; and those of the link that a streamed bank comes over, beside
them: the larger of the two is the bound.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from evojax_merge.benchmarks.header_models import MISTRAL_7B, problem_for, write_examples, write_models
from evojax_merge.evaluation.compilers import CompilerMissing, TargetCompiler, target_compiler
from evojax_merge.evaluation.targets import find_target
from evojax_merge.report.plan import PassPlan, Plan, shown_bytes, shown_seconds
from evojax_merge.steps.planning import make_plan

LLAMA_70B = MISTRAL_7B | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
QWEN3_5_9B = {
    "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "hidden_size": 4096,
    "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 256, "full_attention_interval": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "vocab_size": 248320, "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GRANITE_4_MICRO = {
    "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid", "hidden_size": 2048,
    "intermediate_size": 8192, "shared_intermediate_size": 8192, "num_hidden_layers": 40,
    "layer_types": (["mamba"] * 9 + ["attention"]) * 4, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_heads": 64, "mamba_d_head": 64, "mamba_n_groups": 1,
    "mamba_d_state": 128, "position_embedding_type": "nope", "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "vocab_size": 100352,
    "max_position_embeddings": 131072, "tie_word_embeddings": True, "dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SHAPES = {"7B": MISTRAL_7B, "70B": LLAMA_70B, "9B-delta": QWEN3_5_9B, "3B-mamba": GRANITE_4_MICRO}
EXAMPLES, POPULATION, STARTS = 128, 16, 4
PASSES = (
    "| devices to a candidate | pass | runs | held | temporaries | compiler says | collectives of a run "
    "| sent, planned | sent, counted |\n| ---: | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |"
)


@dataclass(frozen=True)
class Case:
    """A search: models, target, the devices that share a candidate, and the use of a generation."""

    shape: str
    target: str
    model: int
    use: str


SEVEN = [Case("7B", target, 1, use) for target in ("rtx4090", "h100", "8xh100")
         for use in ("likelihood", "generation", "gradient")]  # fmt: skip
SEVENTY = [Case("70B", *pair, "likelihood") for pair in (("h100", 1), ("8xh100", 1), ("8xh100", 8), ("2x8xh100", 8))]
SEVENTY += [Case("70B", *pair, "generation") for pair in (("8xh100", 8), ("2x8xh100", 8), ("2x8xh100", 16))]
RECURRENT = [Case(shape, target, 1, use) for shape in ("9B-delta", "3B-mamba")
             for target in ("rtx4090", "h100", "v5e-1") for use in ("likelihood", "generation")]  # fmt: skip
CASES = [*SEVEN, *SEVENTY, *RECURRENT]
HEADER = (
    "| models | target | devices to a candidate | generation by | bank | of a device | of the host | a generation | "
    "its link | |\n| --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | --- |"
)


def plan_of(folder: Path, case: Case, compiler: TargetCompiler | None = None) -> Plan:
    target = find_target("--targets", case.target)
    mode = "generation" if case.use == "generation" else "likelihood"
    strategy, population = ("gradient", STARTS) if case.use == "gradient" else ("cma_es", POPULATION)
    problem = problem_for(
        folder, 3, "ties", mode, target, case.model, bank="auto", strategy=strategy, population=population
    )
    return make_plan(problem, problem.prepare(), compiler=compiler)


def row(case: Case, plan: Plan) -> str:
    place = "host" if plan.generation.link_seconds else "device"
    link = shown_seconds(plan.generation.link_seconds) if plan.generation.link_seconds else ""
    time = shown_seconds(plan.generation.seconds) if plan.fits else ""
    verdict = "fits" if plan.fits else "does not fit"
    return (
        f"| {case.shape} | {case.target} | {case.model} | {case.use} | {place} | "
        f"{shown_bytes(plan.bank_bytes + plan.pass_bytes)} of {shown_bytes(plan.target.memory)} | "
        f"{shown_bytes(plan.host_bytes)} | {time} | {link} | {verdict} |"
    )


def pass_row(case: Case, planned: PassPlan) -> str:
    """A pass as it is planned and as the compiler reports it: temporaries, and the bytes that a device sends to those
    that share the candidate, in a ring, for one candidate in all runs. Collectives are those of one run, or of one
    decode step."""
    reported = "" if planned.reported_bytes is None else shown_bytes(planned.reported_bytes)
    collectives = planned.collectives or {}
    summed = sum(nbytes for _, nbytes in collectives.values()) * planned.steps * planned.runs / planned.chunk
    sent = 2 * (case.model - 1) / case.model * summed
    kinds = ", ".join(f"{count} {kind}" for kind, (count, _) in collectives.items()) or "none"
    return (
        f"| {case.model} | {planned.name} | {planned.runs} | {shown_bytes(planned.held_bytes)} "
        f"| {shown_bytes(planned.temporary_bytes)} | {reported} | {kinds} | {shown_bytes(planned.sent_bytes)} "
        f"| {shown_bytes(sent)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", metavar="TARGET", help="ask the compiler of a TPU target about a search")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--use", choices=("likelihood", "generation", "gradient"), default="likelihood")
    parser.add_argument("--share", nargs="+", type=int, default=[1], help="devices to a candidate, of --compile")
    options = parser.parse_args()
    cases = [case for case in CASES if case.shape in options.shapes]
    if options.compile:
        cases = [Case(options.shapes[0], options.compile, model, options.use) for model in options.share]
    with tempfile.TemporaryDirectory() as root:
        for name in options.shapes:
            (Path(root) / name).mkdir()
            write_models(Path(root) / name, SHAPES[name], 3)
            write_examples(Path(root) / name, EXAMPLES)
        print(HEADER)
        passes = []
        for case in cases:
            compiler = None
            if options.compile:
                try:
                    compiler = target_compiler(find_target("--compile", options.compile), case.model)
                except CompilerMissing as error:
                    sys.exit(str(error))
            plan = plan_of(Path(root) / case.shape, case, compiler)
            print(row(case, plan), flush=True)
            passes += [pass_row(case, planned) for planned in plan.passes]
        if options.compile:
            print(f"\n{PASSES}")
            print("\n".join(passes))


if __name__ == "__main__":
    main()
