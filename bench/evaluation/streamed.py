"""A bank in files, against the device: seconds of SmolLM2's merges; or a search over three models of 7B shapes.

    python -m bench streamed                              # SmolLM2-135M and two fine-tunes: 10 minutes
    python -m bench streamed --set space=null --set 'pool={methods: [slerp, dare_ties]}'
    python -m bench streamed --large FOLDER               # three models of 14.5 GB, written to FOLDER: 60 GB of disk

The first scores one population with the bank on the device, in the host's memory and in the models' files, in turn, and
compares every score; then it searches for two generations with each, and compares the whole histories. The second does
so with a pool, and scores children of the two fine-tunes. The third searches for two generations in a process of its
own, whose largest resident set (mapped files included) and bytes read from files are counted at every evaluation of a
population.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import yaml

from bench.shared.machine import describe
from evojax_merge.schema.genealogy import FIRST, METHOD, NUMBER, SECOND
from evojax_merge.spaces.breeding import BreedingSpace

CONFIG = Path("configs/smollm2.yaml")
PLACES = ("device", "host", "disk")
# The examples of the searches whose histories are compared.
EXAMPLES = 6
# The shapes of Mistral 7B.
SHAPES = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = ("base", "first", "second")


@dataclass(frozen=True)
class Timed:
    """Seconds of the clock and of the processor."""

    clock: float
    processor: float


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def random_genomes(space: Any, population: int) -> np.ndarray:
    """Genomes of merges; of a pool those of children of the first two founders, by each of the methods in turn."""
    rng = np.random.default_rng(0)
    if not isinstance(space, BreedingSpace):
        return rng.normal(size=(population, space.dims)).astype(np.float32)
    genomes = rng.random((population, space.dims)).astype(np.float32)
    genomes[:, NUMBER] = len(space.genealogy.founders) + np.arange(population)
    genomes[:, [FIRST, SECOND]] = 0, 1
    genomes[:, METHOD] = np.arange(population) % len(space.methods)
    return genomes


def pairs(population: int, rounds: int, overrides: list[str]) -> str:
    """A table of seconds per candidate in each place. The first round compiles and is not counted."""
    from evojax_merge.problem import build_problem, read_config
    from evojax_merge.steps.selection import open_evaluator

    scorers = {}
    for place in PLACES:
        problem = build_problem(CONFIG, read_config(CONFIG, [f"evaluation.bank={place}", *overrides], None))
        scorers[place] = open_evaluator(problem, problem.prepare().shards[0])
    genomes = random_genomes(problem.space, population)
    times: dict[str, list[Timed]] = {place: [] for place in PLACES}
    expected: np.ndarray | None = None
    for number in range(rounds + 1):
        for place, scorer in scorers.items():
            clock, processor = time.perf_counter(), processor_seconds()
            scores = next(iter(scorer.score(genomes).log_probabilities.values()))
            spent = Timed((time.perf_counter() - clock) / population, (processor_seconds() - processor) / population)
            expected = scores if expected is None else expected
            if not np.array_equal(scores, expected):
                raise SystemExit(f"{place}: the scores differ by up to {np.abs(scores - expected).max():.2e}")
            if number:
                times[place].append(spent)
    medians = {
        place: Timed(np.median([t.clock for t in each]), np.median([t.processor for t in each]))
        for place, each in times.items()
    }
    whole = medians["device"]
    rows = [
        f"| {place} | {median.clock:.2f} | {median.processor:.2f} | {median.clock / whole.clock:.2f} | "
        f"{median.processor / whole.processor:.2f} |"
        for place, median in medians.items()
    ]
    header = "| bank | s a candidate | of the processor | to the device | of the processor |\n|---|---:|---:|---:|---:|"
    return "\n".join([f"{population} candidates, {rounds} rounds; all scores are equal to the bit", "", header, *rows])


def histories(population: int, overrides: list[str]) -> str:
    """A line on the histories of one search with the bank in each place: two generations by the shortest examples, with
    the held-out table and the winner's export."""
    from evojax_merge.problem import build_problem, read_config

    problem = build_problem(CONFIG, read_config(CONFIG, [], None))
    (file,) = problem.splits.search[0].paths().values()
    records = sorted(Path(file).read_text(encoding="utf-8").splitlines(), key=len)[:EXAMPLES]
    contents: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as root:
        examples = Path(root) / "shortest.jsonl"
        examples.write_text("\n".join(records), encoding="utf-8")
        settings = [
            *overrides, f"tasks.0.file={examples}", "tasks.0.heldout=0.34", "tasks.0.limit=null",
            f"search.population={population}", "search.generations=2", "search.finalists=1",
        ]  # fmt: skip
        for place in PLACES:
            out = Path(root) / place
            command = [sys.executable, "-m", "evojax_merge", "search", str(CONFIG), "--out", str(out)]
            for setting in [*settings, f"evaluation.bank={place}"]:
                command += ["--set", setting]
            subprocess.run(command, check=True, stdout=sys.stderr)
            contents[place] = (out / "history.jsonl").read_bytes()
    whole = contents["device"]
    different = [place for place in PLACES if contents[place] != whole]
    if different:
        raise SystemExit(f"history.jsonl differs from that of device: {', '.join(different)}")
    lines = whole.count(b"\n")
    return (
        f"histories equal: yes ({', '.join(PLACES)}: {lines} generations of {population}, {len(whole):,} bytes each, "
        f"sha256 {hashlib.sha256(whole).hexdigest()[:16]})"
    )


def write_models(folder: Path) -> None:
    """Write random models of the shapes, with a tokenizer of a thousand words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from evojax_merge.checkpoints.config_file import read_decoder_config
    from evojax_merge.checkpoints.parents import tensor_shapes
    from evojax_merge.checkpoints.writer import ShardWriter, TensorSpec

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(1000))]
    split = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    rng, dtype = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)
    noise = (0.02 * rng.standard_normal(2**25, np.float32)).astype(dtype)
    for number, name in enumerate(MODELS):
        model = folder / name
        if (model / "model.safetensors.index.json").exists():
            continue
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(SHAPES))
        tokenizer.save_pretrained(model)
        specs = {
            tensor: TensorSpec(shape, dtype)
            for tensor, shape in tensor_shapes(read_decoder_config(model, SHAPES)).items()
        }
        with ShardWriter(model, specs) as writer:
            for i, tensor in enumerate(writer.order):
                shape = specs[tensor].shape
                start = (104729 * (i + 7 * number)) % 2**24
                values = np.resize(noise[start:], int(np.prod(shape))).reshape(shape)
                writer.write(tensor, np.ones(shape, dtype) if len(shape) == 1 else values)
        print(f"wrote {model}", flush=True)


def write_search(folder: Path) -> Path:
    """A search for two generations of four candidates, by the likelihood of a few short texts."""
    rng = np.random.default_rng(1)

    def text(size: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, 1000, size))

    records = [{"prompt": text(6), "target": text(6)} for _ in range(6)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    document = {
        "base": "base", "parents": ["first", "second"],
        "space": {"method": "task_arithmetic", "layers_per_group": 8, "components": ["attention+mlp+norm"],
                  "parameters": {"weight": {"low": 0.0, "high": 1.5}}},
        "tasks": [{"name": "texts", "kind": "likelihood", "file": "texts.jsonl"}],
        "search": {"strategy": "cma_es", "population": 4, "generations": 2, "finalists": 1},
        "evaluation": {"bank": "disk"}, "seed": 0,
    }  # fmt: skip
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def search(path: Path, out: Path) -> None:
    """Run a search in this process, and print a line of JSON behind each evaluation of a population."""
    from evojax_merge.checkpoints.folder import MappedFile
    from evojax_merge.cli import cli
    from evojax_merge.evaluation.evaluator import PopulationEvaluator

    nbytes, copy, evaluate = 0, MappedFile.copy, PopulationEvaluator.evaluate

    def counted_copy(self: MappedFile, start: int, into: np.ndarray) -> None:
        nonlocal nbytes
        copy(self, start, into)
        nbytes += into.nbytes

    def counted_evaluate(self: PopulationEvaluator, candidates: Any, progress: Any = lambda done: None) -> Any:
        before, clock, processor = nbytes, time.perf_counter(), processor_seconds()
        scores = evaluate(self, candidates, progress)
        row = {
            "candidates": next(iter(next(iter(scores.matrices.values())).values())).shape[0],
            "read": nbytes - before,
            "seconds": time.perf_counter() - clock,
            "processor": processor_seconds() - processor,
            "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
        print("EVALUATED " + json.dumps(row), flush=True)
        return scores

    MappedFile.copy, PopulationEvaluator.evaluate = counted_copy, counted_evaluate  # type: ignore[method-assign]
    run_command: Any = cli.main
    run_command(["search", str(path), "--out", str(out), "--overwrite"], standalone_mode=False)
    print("MEMORY " + str(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss), flush=True)


def large(folder: Path) -> str:
    """A table of a search over models that are written to a folder, unless they are there."""
    from evojax_merge.checkpoints.bank import bank_bytes
    from evojax_merge.checkpoints.parents import open_sources

    write_models(folder)
    path, out = write_search(folder), folder / "run"
    began = time.perf_counter()
    command = [sys.executable, "-m", "bench", "streamed", "--search", str(path), str(out)]
    rows, memory = [], 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("EVALUATED "):
                rows.append(json.loads(line.removeprefix("EVALUATED ")))
            memory = int(line.split()[1]) if line.startswith("MEMORY ") else memory
    if process.returncode:
        raise SystemExit(process.returncode)
    sources, config = open_sources([folder / name for name in MODELS])
    bank = bank_bytes(sources, config)
    lines = [
        f"Models: {bank / 1e9:.1f} GB in {len(MODELS)} folders; search with export {time.perf_counter() - began:,.0f} "
        f"s; largest resident set {memory / 1e9:.2f} GB, mapped files included",
        "",
        "| evaluation | candidates | read, GB | to the models | s | s of the processor | resident so far, GB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for number, row in enumerate(rows, 1):
        lines.append(
            f"| {number} | {row['candidates']} | {row['read'] / 1e9:.2f} | {row['read'] / bank:.3f} | "
            f"{row['seconds']:,.0f} | {row['processor']:,.0f} | {row['memory'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--population", type=int, default=8, help="candidates of a population (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds behind the first (default: 3)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes the search's config")
    parser.add_argument("--large", type=Path, metavar="FOLDER", help="search over three models of 7B shapes in FOLDER")
    parser.add_argument("--search", nargs=2, type=Path, metavar=("CONFIG", "OUT"), help="the process of --large")
    options = parser.parse_args()
    if options.search:
        search(*options.search)
        return
    if options.large:
        report = large(options.large)
    else:
        report = pairs(options.population, options.rounds, options.set)
        report += "\n\n" + histories(options.population, options.set)
    print(describe())
    print(report)


if __name__ == "__main__":
    main()
