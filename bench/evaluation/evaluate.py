"""The evaluator on SmolLM2-135M, against the machine's peak and transformers (15 minutes).

    python -m bench evaluate

SmolLM2-135M-Instruct and its two fine-tunes (made on the first run), populations of merges of them. Four parts:

- peak: what share of the machine's best matrix product a likelihood pass reaches, of a stored model and of merges that
  are computed inside it. Counted are 2 x parameters of the layers x tokens, and 2 x the head for scored tokens.
- scores: seconds per candidate of likelihood rows, of 8-shot prompts, and of multiple choice, where our side computes
  what prompts share once. The peer scores whole rows, as they are, in batches of as many tokens.
- building: the same where the peer has to make its candidate first, with mergekit, as today's loop does.
- writing: tokens per second of greedy generation after word problems, no stop; the peer has all of them in one batch.

Both sides score the same rows; their scores must agree. The first pass of either (compilation, caches) is not counted.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import yaml

from bench.shared.machine import describe
from bench.shared.torch_peer import score_rows
from evojax_merge.benchmarks.references import matrix_peak, median_seconds, seconds_of
from evojax_merge.benchmarks.scored_rows import of_rows, work
from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.evaluation.batched_tasks import BatchedTask, shared_and_padding
from evojax_merge.evaluation.evaluator import PopulationEvaluator
from evojax_merge.problem import SearchProblem, build_problem, read_config
from evojax_merge.schema.yaml_reader import load_yaml
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import INIT_KEY, generation_key
from evojax_merge.steps.selection import open_evaluator
from evojax_merge.tasks.records import read_symbolic
from evojax_merge.tasks.task import Row
from evojax_merge.zoo.references import resolve_reference

MODELS = {"base": "zoo:smollm2/base", "one": "zoo:smollm2/maths", "two": "zoo:smollm2/japanese"}
# Passes that a share of the peak is measured over, one after the other but for what overlaps, and the tokens of each.
PASSES, TOKENS = 4, 8 * 192
# How often each side writes.
ROUNDS = 3
PARTS = ("peak", "scores", "building", "writing")


@dataclass(frozen=True)
class Sizes:
    """The work of a benchmark of one length: problems that are scored, tokens that are written, candidates."""

    problems: int
    new: int
    candidates: int
    peers: int


def problem_for(folder: Path, task: dict[str, Any], method: str, population: int) -> SearchProblem:
    """A search over the real model with one task, whose examples are all scored in every generation."""
    parameters: dict[str, Any] = {"weight": {"low": 0.0, "high": 1.2}}
    if method == "ties":
        parameters["density"] = {"low": 0.1}
    document = {
        "base": MODELS["base"],
        "parents": [MODELS["one"], MODELS["two"]],
        "space": {
            "method": method, "layers_per_group": 10, "components": ["attention+mlp+norm"],
            "parameters": parameters,
        },
        "tasks": [{"name": "task", **task}],
        "search": {"population": population},
        "export_dtype": "float32",
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return build_problem(path, read_config(path, [], None))


def opened(problem: SearchProblem) -> tuple[SpaceEvaluator[PopulationEvaluator], BatchedTask]:
    batched_tasks = problem.prepare().shards[0]
    scorer = open_evaluator(problem, batched_tasks)
    return scorer, batched_tasks[0]


def genomes_for(problem: SearchProblem, count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, (count, problem.space.dims)).astype(np.float32)


def torch_model(scorer: SpaceEvaluator[PopulationEvaluator], problem: SearchProblem, genome: np.ndarray) -> Any:
    """The candidate as transformers has it, put together in memory."""
    from transformers import AutoModelForCausalLM

    from evojax_merge.checkpoints.bank import stored_tensors
    from evojax_merge.evaluation.passes import LazyMergeFactory, materialise
    from evojax_merge.models.bank import take_candidate

    build = LazyMergeFactory(problem.backend.candidates.spec, "float32")
    stored = take_candidate(materialise(build, None, scorer.evaluator.bank, scorer.space.decode(genome[None])), 0)
    model = AutoModelForCausalLM.from_pretrained(problem.backend.models.sources.folders[0].path, dtype="float32").eval()
    import torch

    tensors = {
        name: torch.from_numpy(values.copy()) for name, values in stored_tensors(stored, problem.backend.models.decoder)
    }
    model.load_state_dict(tensors, strict=False)
    return model


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------------------------------


def peak_part(folder: Path, sizes: Sizes) -> None:
    """Rows of one length, so that nothing is padding, every second token scored."""
    from transformers import AutoModelForCausalLM

    before = matrix_peak()
    words = " ".join(problem.fields["question"] for problem in read_symbolic("eng").records)
    problem = problem_for(folder, {"kind": "likelihood", **text_files(folder, [("x", "y")] * 4)}, "ties", 2)
    ids = problem.backend.models.tokenizer(words)["input_ids"]
    rows = [Row(tuple(ids[i * 192 : (i + 1) * 192]), 97, f"row {i}", i) for i in range(8)]
    model = AutoModelForCausalLM.from_pretrained(problem.backend.models.sources.folders[0].path, dtype="float32").eval()
    seconds = {"transformers, stored model": median_seconds(partial(score_rows, model, rows), 3)}
    # As many passes of a stored model as of candidates, each of which has one.
    scorer, batched_task = opened(problem)
    evaluator = replace(
        scorer.evaluator.evaluator, batched_tasks=[of_rows(batched_task, rows * PASSES, TOKENS)], chunk_sizes={}
    )
    stored = load_stored(*open_sources([problem.backend.models.sources.folders[0].path]))
    seconds["stored model"] = median_seconds(partial(evaluator.score_stored, stored), 5) / PASSES
    for name, method in (("task arithmetic", "task_arithmetic"), ("TIES", "ties")):
        problem = problem_for(folder, {"kind": "likelihood", **text_files(folder, [("x", "y")] * 4)}, method, 2)
        scorer, batched_task = opened(problem)
        evaluator = replace(
            scorer.evaluator.evaluator, batched_tasks=[of_rows(batched_task, rows, TOKENS)], chunk_sizes={}
        )
        bank, spec = scorer.evaluator.bank, problem.backend.candidates.spec
        run = partial(evaluator.score, evaluator.merges(bank, spec, scorer.space.decode(genomes_for(problem, PASSES))))
        seconds[f"{name}, merged inside the pass"] = median_seconds(run, 5) / PASSES
    evaluator = replace(evaluator, batched_tasks=[of_rows(batched_task, rows * PASSES, TOKENS)], chunk_sizes={})
    run = partial(evaluator.score, evaluator.merges(bank, spec, scorer.space.decode(genomes_for(problem, 2))))
    seconds[f"{name}, put together for {PASSES} passes"] = median_seconds(run, 5) / PASSES / 2
    # The machine's speed drifts: the best of both ends counts.
    peak, done = max(before, matrix_peak()), sum(work(problem.backend.models.decoder, rows))
    print(f"\nmatrix product: {peak / 1e9:.0f} GFLOP/s\n\n| pass over 8 x 192 tokens | GFLOP/s | share of the peak |")
    print("| --- | ---: | ---: |")
    for name, taken in seconds.items():
        print(f"| {name} | {done / taken / 1e9:.0f} | {done / taken / peak:.0%} |", flush=True)


def text_files(folder: Path, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    records = [{"prompt": prompt, "target": target} for prompt, target in pairs]
    return {"file": write_jsonl(folder / "text.jsonl", records), "heldout": str(folder / "text.jsonl")}


def tasks_for(folder: Path, problems: int) -> dict[str, dict[str, Any]]:
    """Likelihood of worked answers, the same behind eight worked examples, and the right number of four."""
    records = read_symbolic("eng").records
    requests = [record.fields for record in records[8 : 8 + problems]]
    fewshot_examples = "".join(f"Q: {r.fields['question']}\nA: {r.fields['answer']}\n\n" for r in records[:8])
    pairs = [(f"Q: {fields['question']}\nA:", " " + fields["answer"]) for fields in requests]
    choices = []
    for fields in requests:
        number = fields["answer"].rpartition("####")[2].strip()
        choices.append(
            {
                "prompt": f"Q: {fields['question']}\nA:",
                "choices": [f" {number}{end}" for end in ("", "0", "1", "5")],
                "answer": 0,
            }
        )
    few = [{"prompt": fewshot_examples + prompt, "target": target} for prompt, target in pairs]
    plain = [{"prompt": prompt, "target": target} for prompt, target in pairs]
    files = {
        name: write_jsonl(folder / f"{name}.jsonl", rows)
        for name, rows in (("plain", plain), ("few", few), ("choices", choices))
    }
    return {
        "likelihood": {"kind": "likelihood", "file": files["plain"], "heldout": files["plain"]},
        "8-shot likelihood": {"kind": "likelihood", "file": files["few"], "heldout": files["few"]},
        "multiple choice": {
            "kind": "multiple_choice", "metric": "margin", "file": files["choices"], "heldout": files["choices"],
        },
    }  # fmt: skip


def scores_part(folder: Path, sizes: Sizes) -> None:
    print(
        "\n| task | rows | tokens | shared, padding | ours, s/candidate | transformers, s/candidate | ratio |\n"
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |"
    )
    for name, task in tasks_for(folder, sizes.problems).items():
        problem = problem_for(folder, task, "task_arithmetic", sizes.candidates)
        scorer, batched_task = opened(problem)
        genomes, rows = genomes_for(problem, sizes.candidates), batched_task.requests.scored
        ours = median_seconds(partial(scorer.score, genomes), 3) / sizes.candidates
        model = torch_model(scorer, problem, genomes[0])
        score_rows(model, rows[:2])
        start = time.perf_counter()
        totals = score_rows(model, rows)
        theirs = time.perf_counter() - start
        agree(scorer, batched_task, genomes[:1], totals)
        shared, padding = shared_and_padding([batched_task])
        tokens = sum(len(row.tokens) for row in rows)
        print(
            f"| {name} | {len(rows)} | {tokens:,} | {shared:.0%} shared, {padding:.0%} padding | {ours:.3f} "
            f"| {theirs:.3f} | {theirs / ours:.1f} |",
            flush=True,
        )


def agree(
    scorer: SpaceEvaluator[PopulationEvaluator], batched_task: BatchedTask, genomes: np.ndarray, totals: np.ndarray
) -> None:
    """Both sides' scores of one candidate must be the same."""
    from evojax_merge.tasks.task import Responses

    counts = np.array([len(row.tokens) - row.start for row in batched_task.requests.scored])
    answers = Responses(totals[None].astype(np.float32), counts, np.zeros((1, len(totals)), bool), [[]])
    for metric, expected in batched_task.task.score(answers).items():
        found = scorer.score(genomes).matrices[batched_task.task.name][metric]
        if metric != "accuracy":
            np.testing.assert_allclose(found, expected, atol=5e-3)


def building_part(folder: Path, sizes: Sizes) -> None:
    """About 2,000 tokens a candidate, TIES; the peer merges with mergekit, loads and scores."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from transformers import AutoModelForCausalLM

    problem = problem_for(folder, tasks_for(folder, 11)["likelihood"], "ties", sizes.candidates)
    scorer, batched_task = opened(problem)
    genomes, rows = genomes_for(problem, sizes.candidates), batched_task.requests.scored
    ours = median_seconds(partial(scorer.score, genomes), 1) / sizes.candidates
    seconds = []
    for genome in genomes[: sizes.peers]:
        (folder / "recipe.yaml").write_text(problem.backend.describe(genome).recipe)
        document = load_yaml(folder / "recipe.yaml")
        start = time.perf_counter()
        options = MergeOptions(quiet=True, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(document), str(folder / "merged"), options)
        merged = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype="float32").eval()
        totals = score_rows(model, rows)
        seconds.append((merged - start, time.perf_counter() - merged))
    agree(scorer, batched_task, genomes[len(seconds) - 1 : len(seconds)], totals)
    merge, score = np.median(seconds, axis=0)
    tokens = sum(len(row.tokens) for row in rows)
    print(
        "\n| tokens a candidate | ours, s/candidate | peer, s/candidate | ratio | peer: merge + load and score |\n"
        "| ---: | ---: | ---: | ---: | --- |\n"
        f"| {tokens:,} | {ours:.2f} | {merge + score:.2f} | {(merge + score) / ours:.1f} | {merge:.2f} + {score:.2f} |",
        flush=True,
    )


def writing_part(folder: Path, sizes: Sizes) -> None:
    """Greedy, to the last token. A search's first two generations, the widest; the first, which compiles and has
    nothing to guess from, is not counted. transformers continues the same prompts in one batch."""
    import torch

    print(
        "\n| prompts | new tokens | ours, tokens/s | transformers, tokens/s | ratio |\n"
        "| ---: | ---: | ---: | ---: | ---: |"
    )
    records = read_symbolic("eng").records
    for prompts in (1, 8, 32):
        pairs = [(f"Q: {record.fields['question']}\nA:", "1") for record in records[:prompts]]
        task = {"kind": "exact_match", "max_new_tokens": sizes.new, **text_files(folder, pairs)}
        # No token ends a text, so that both sides write as many.
        problem = problem_for(folder, task, "task_arithmetic", sizes.candidates)
        backend = replace(problem.backend, models=replace(problem.backend.models, stop=()))
        problem = replace(problem, backend=backend)
        scorer, batched_task = opened(problem)
        state = problem.strategy.init(generation_key(0, INIT_KEY), problem.space.start[None])
        warm, genomes = (np.asarray(problem.strategy.ask(generation_key(0, i), state)[0]) for i in (0, 1))
        model = torch_model(scorer, problem, genomes[0])
        assert batched_task.prompts is not None
        batches = [(torch.tensor(batch.tokens).long(), batch.left_pad) for batch in batched_task.prompts.batches]
        for batch in batches:
            written_by(model, *batch, 1)
        rounds = []
        # In turn, on a machine whose speed drifts.
        for _ in range(ROUNDS):
            scorer.score(warm)
            ours = seconds_of(partial(scorer.score, genomes)) / sizes.candidates
            theirs = sum(seconds_of(partial(written_by, model, *batch, sizes.new)) for batch in batches)
            rounds.append((ours, theirs))
        ours, theirs = np.median(rounds, axis=0)
        made = prompts * sizes.new
        print(
            f"| {prompts} | {sizes.new} | {made / ours:.0f} | {made / theirs:.0f} | {theirs / ours:.2f} |", flush=True
        )


def written_by(model: Any, tokens: Any, first: np.ndarray, new: int) -> Any:
    """transformers' greedy continuations of prompts that are padded at the left."""
    import torch

    mask = (torch.arange(tokens.shape[1])[None] >= torch.tensor(first)[:, None]).long()
    with torch.inference_mode():
        return model.generate(
            tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="The evaluator on SmolLM2-135M, against the peak and transformers.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--new", type=int, default=64, help="tokens that are written")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--peers", type=int, default=2, help="candidates that the peer builds")
    arguments = parser.parse_args()
    for reference in MODELS.values():
        resolve_reference("bench", reference, Path.cwd())
    sizes = Sizes(arguments.problems, arguments.new, arguments.candidates, arguments.peers)
    run = {"peak": peak_part, "scores": scores_part, "building": building_part, "writing": writing_part}
    print(f"SmolLM2-135M-Instruct; {describe()}")
    for part in arguments.parts:
        with tempfile.TemporaryDirectory() as work_folder:
            run[part](Path(work_folder), sizes)


if __name__ == "__main__":
    main()
