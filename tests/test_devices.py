"""All devices of a run: meshes of virtual devices, and processes that share a search."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.families import Family, build_family
from helpers.files import read_json, read_lines, write_lines, write_yaml
from helpers.models import even_records, tiny_config
from helpers.sampling import sample, thorough
from helpers.searches import search_config, task_section
from hostile import run_command, run_python, start_command

MESHES = ((1, 1), *sample(((8, 1), (4, 2), (2, 4), (1, 8)), 1))
# Candidates a pass; on more than one device the first of them.
CHUNKS = sample((1, 2, 6), 1)

# Scores of a population of merges, however they are spread, in a process with eight devices.
MESH_PROGRAM = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from jax.sharding import AxisType, Mesh
from evojax_merge.evaluation.devices import Devices
from evojax_merge.steps.selection import open_evaluator
from evojax_merge.problem import build_problem, read_config
from pathlib import Path

path, meshes, chunks, out = Path(sys.argv[1]), *map(json.loads, sys.argv[2:4]), sys.argv[4]
problem = build_problem(path, read_config(path, [], None))
batched = problem.prepare().shards[0]
genomes = np.random.default_rng(0).random((6, problem.space.dims)).astype(np.float32)
found = {}
def keep(name, scores):
    for task, metrics in scores.matrices.items():
        for metric, matrix in metrics.items():
            found[f"{name}/{task}/{metric}"] = matrix
    for task, texts in scores.outputs.items():
        found[f"{name}/{task}/texts"] = np.array(texts)
for population, model in meshes:
    grid = np.array(jax.devices()[: population * model]).reshape(population, model)
    mesh = Mesh(grid, ("population", "model"), axis_types=(AxisType.Auto,) * 2) if population * model > 1 else None
    scorer = open_evaluator(problem, batched, Devices(mesh))
    for chunk in chunks if population * model == 1 else chunks[:1]:
        scorer.evaluator.evaluator.chunk = chunk
        scorer.evaluator.evaluator.chunk_sizes.clear()
        keep(f"{population}x{model}/{chunk}", scorer.score(genomes))
    if population * model == 1:
        rows = [scorer.score(genome[None]) for genome in genomes]
        for task, metrics in rows[0].matrices.items():
            for metric in metrics:
                found[f"alone/{task}/{metric}"] = np.concatenate([row.matrices[task][metric] for row in rows])
        for task in rows[0].outputs:
            found[f"alone/{task}/texts"] = np.array([row.outputs[task][0] for row in rows])
np.savez(out, **found)
"""


# The collectives of the passes of a search on an accelerator's mesh, by the CPU's compiler, in a process with eight
# devices.
COLLECTIVES_PROGRAM = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from pathlib import Path
from evojax_merge.evaluation.compilers import TargetCompiler, collectives
from evojax_merge.evaluation.devices import Devices, mesh_of
from evojax_merge.evaluation.targets import cpu_target, find_target
from evojax_merge.steps.planning import make_plan
from evojax_merge.problem import build_problem, read_config

path, model = Path(sys.argv[1]), int(sys.argv[2])
problem = build_problem(path, read_config(path, [f"evaluation.model={model}"], None), target=find_target("t", "v5e-8"))
compiler = TargetCompiler(cpu_target(), Devices(mesh_of(jax.devices(), model)), jax.devices()[0])
make_plan(problem, problem.prepare(), compiler=compiler)
names = {}
for program in compiler.programs():
    name = program.as_text().split(",")[0].removeprefix("HloModule jit_")
    names.setdefault(name, []).append(collectives(program))
print(json.dumps(names))
"""

# Merges and their gradients, by one device and by two groups of two, of matrices that are cut by rows and by columns
# and are of one shape.
MERGE_PROGRAM = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
from dataclasses import replace
from merge_kernels import METHODS, draw_row_keys, tabulate
from evojax_merge.evaluation.devices import Devices, mesh_of, shard_population
from evojax_merge.models.bank import Bank, Factors, LeafBank, MergeSpec, Recipe
from evojax_merge.models.sources import DifferentiableMerge, LazyMerge

L, K, P, SHAPE, RANK = 2, 2, 4, (16, 16), 3
AXES = {"norm": None, "rows": -2, "columns": -1, "final_norm": None, "embed": -2}
rng = np.random.default_rng(0)

def tensor(method, options, constants, low_rank, shape):
    # The bank of one tensor, on the host.
    count = K + int(options.has_base)
    sources = rng.normal(size=(count, *shape)).astype(np.float32)
    factors = None
    if low_rank and len(shape) > 1:
        shapes = (RANK, shape[1]), (shape[0], RANK)
        factors = Factors(*(rng.normal(size=(K, *one)).astype(np.float32) for one in shapes))
        sources[1:] = sources[0] + factors.b @ factors.a
    prepared = tabulate(method, options, list(sources), constants, lambda k: draw_row_keys(3, bytes([k] * 8), shape))
    keys = np.stack(prepared.mask_keys) if prepared.mask_keys else None
    return LeafBank(sources if factors is None else sources[:1], factors, keys, prepared.statistics)

def bank_of(method, options, constants, low_rank, put):
    bank = Bank({"layers": {}}, {})
    for name, axis in AXES.items():
        shape = SHAPE[1:] if axis is None else SHAPE
        layers = [tensor(method, options, constants, low_rank, shape) for _ in range(L)]
        in_stack = name in ("norm", "rows", "columns")
        leaf = jax.tree.map(lambda *each: np.stack(each), *layers) if in_stack else layers[0]
        leaf = replace(jax.tree.map(put, leaf), sources=put(leaf.sources, axis))
        into = bank.stacks["layers"] if in_stack else bank.shared
        into[name] = replace(leaf, group=int(name == "norm"), shard_axis=axis)
    return bank

def recipes_of(method, constants):
    def values(parameter, *shape):
        shape = (P, *shape, *[K] * parameter.per_parent)
        if parameter.name in constants:
            return np.broadcast_to(np.float32(constants[parameter.name]), shape)
        drawn = rng.uniform(0.3, 0.9, size=shape)
        return (np.round(drawn, 3) if parameter.quantised else drawn).astype(np.float32)
    return Recipe({"layers": {p.name: values(p, L, 2) for p in method.parameters}},
                  {name: {p.name: values(p) for p in method.parameters} for name in ("final_norm", "embed")})

for name, changes, low_rank in json.loads(sys.argv[1]):
    method = METHODS[name]
    options = replace(method.options, **changes)
    constants = {p.name: np.full([K] * p.per_parent, p.default) for p in method.parameters if not p.searched}
    spec = MergeSpec(name, options, 3, "float32")
    found = []
    for mesh in (None, mesh_of(jax.devices(), 2)):
        rng = np.random.default_rng(0)
        bank, recipes = bank_of(method, options, constants, low_rank, Devices(mesh).put), recipes_of(method, constants)

        def local(bank, recipes):
            def total(recipe):
                merged = DifferentiableMerge.of(bank, recipe, spec).materialise()
                return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(merged))
            merged = jax.vmap(lambda recipe: LazyMerge.of(bank, recipe, spec).materialise())(recipes)
            return merged, jax.vmap(jax.grad(total))(recipes)

        found.append(jax.device_get(jax.jit(lambda *both: shard_population(mesh, local, *both))(bank, recipes)))
    (one, one_gradient), (two, two_gradient) = found
    assert all(np.abs(leaf).max() > 1 for leaf in jax.tree.leaves(one)), name
    # A density's derivative is a difference of sums.
    for pair, atol in (((one, two), 1e-6), ((one_gradient, two_gradient), 1e-3)):
        for whole, shared in zip(*map(jax.tree.leaves, pair), strict=True):
            assert np.isfinite(whole).all(), name
            np.testing.assert_allclose(shared, whole, rtol=1e-5, atol=atol, err_msg=f"{name} {changes}")
"""
# Methods whose numbers lie in all the ways that there are: of tensors, of rows, of columns, of entries; and parents
# that are low-rank changes of their base.
MERGES: list[tuple[str, dict[str, Any], bool]] = [
    ("ties", {}, False), ("dare_ties", {}, False), ("nuslerp", {"axis": -1}, False), ("della", {}, False),
    ("nuslerp", {"axis": 0, "has_base": True}, False), ("dare_linear", {}, True),
    ("multislerp", {"has_base": True}, False),
]  # fmt: skip


CHOICE = {"name": "choice", "kind": "multiple_choice", "file": "tasks.jsonl", "metric": "margin"}


def write_config(root: Path, **changes: Any) -> Path:
    """A search over a tiny family: choices that share their question, and a few words that are written."""
    records = even_records(10)
    header = "w5 w6 w7 w8 " * 10
    for record in records:
        record["prompt"] = header + record["prompt"]
    write_lines(root / "tasks.jsonl", records)
    space = {"method": "ties", "parameters": {"weight": {"high": 1.5}, "density": {"low": 0.1}}}
    words = task_section(name="words", kind="exact_match", pattern=r"w\d+ w\d+", max_new_tokens=5)
    document = search_config(None, 3, 6, space=space, tasks=[CHOICE, words], seed=3)
    return write_yaml(root / "config.yaml", document | changes)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build_family(tmp_path_factory.mktemp("devices"))


def test_every_mesh_and_chunk_gives_what_one_candidate_after_the_other_does(family: Family, tmp_path: Path) -> None:
    # What random masks are made of is spread as the weights are.
    space = {"method": "dare_ties", "parameters": {"weight": {"high": 1.5}, "density": {"low": 0.1}}}
    config, out = write_config(family.root, space=space), tmp_path / "found.npz"
    run_python(MESH_PROGRAM, config, json.dumps(MESHES), json.dumps(CHUNKS), out, seconds=800)
    found = dict(np.load(out))
    ways = {name.rsplit("/", 2)[0] for name in found}
    assert len(ways) == 1 + len(CHUNKS) + len(MESHES) - 1
    for name, values in found.items():
        way, task, metric = name.rsplit("/", 2)
        expected = found[f"alone/{task}/{metric}"]
        if metric == "texts":
            assert (values == expected).all(), way
        else:
            np.testing.assert_allclose(values, expected, atol=1e-5, err_msg=name)
    assert np.ptp(found["alone/choice/margin"], axis=0).min() > 1e-3


def test_devices_merge_their_own_parts() -> None:
    run_python(MERGE_PROGRAM, json.dumps(sample(MERGES, 1)), seconds=300)


@pytest.mark.parametrize("model", sample((8, 4, 2, 1), 1))
@thorough
def test_devices_that_share_a_model_exchange_activations_alone(model: int, tmp_path: Path) -> None:
    """Two sums of the residual stream in each layer, the embedding's rows, and what makes one likelihood, or one token,
    of the shards of a head: no weights and no caches, and nothing goes from every device to every other."""
    hidden, layers = 64, 2
    sizes = {"hidden_size": hidden, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 96}
    family = build_family(tmp_path, tiny_config(**sizes, num_hidden_layers=layers))
    config = write_config(family.root)
    # Of one length, for as few programs as there can be.
    records = [{"prompt": "w5 w6 w7 w8 " * 10 + f"w{i} " * 5, "choices": ["w8", "w9"], "answer": 0, "target": "w8"}
               for i in range(10, 18)]  # fmt: skip
    write_lines(family.root / "tasks.jsonl", records)
    done = run_python(COLLECTIVES_PROGRAM, config, model)
    programs = json.loads(done.stdout.splitlines()[-1])
    # Of decoding one step counts, as how many there are the program does not say.
    each = 2 * layers
    most = {"materialise": 0, "prefill_prefix": each + 1, "score": each + 3, "init_decode": 0, "prefill": each + 2}
    most["decode"] = each + 2
    assert most.keys() == programs.keys()
    for name, found in programs.items():
        for kinds in found:
            assert kinds.keys() <= {"all-reduce", "all-gather"}, name
            count, _ = kinds.get("all-reduce", (0, 0))
            assert count <= most[name] and bool(count) == (model > 1 and most[name] > 0), name
            # Each device's best token, not its logits; a quarter of a matrix is more.
            _, gathered = kinds.get("all-gather", (0, 0))
            assert gathered < hidden * hidden, name


# ---------------------------------------------------------------------------------------------------------------
# Processes


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


class FreshProcess(subprocess.Popen[bytes]):
    """A command in an interpreter of its own, where JAX reads how much it is to say when it is imported."""

    def __init__(self, *arguments: object, environment: Sequence[tuple[str, str]]) -> None:
        self._streams = Path(tempfile.mkdtemp())
        command = [sys.executable, "-m", "evojax_merge", *map(str, arguments)]
        with open(self._streams / "stdout", "wb") as stdout, open(self._streams / "stderr", "wb") as stderr:
            super().__init__(command, stdout=stdout, stderr=stderr, env=os.environ | dict(environment))

    def read(self, name: str) -> str:
        """The text that it has written to `stdout` or `stderr`."""
        return (self._streams / name).read_text(errors="replace")


def start(
    config: Path | list[Path], out: Path | list[Path], processes: int, *options: str,
    more: tuple[tuple[str, str], ...] = (), of_last: tuple[str, ...] = (),
    begin: Callable[..., Any] = start_command,
) -> list[Any]:  # fmt: skip
    """Start processes that share a search. config, out: of all, or of each; more: variables of their environment beside
    those of the cluster; of_last: options of the last process alone; begin: starts one."""
    port = free_port()
    started = []
    for number in range(processes):
        environment = (
            ("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{port}"),
            ("JAX_NUM_PROCESSES", str(processes)),
            ("JAX_PROCESS_ID", str(number)),
            # As a user's processes have it: JAX's own words are not shown.
            ("TF_CPP_MIN_LOG_LEVEL", "4"),
            *more,
        )
        file = config[number] if isinstance(config, list) else config
        folder = out[number] if isinstance(out, list) else out
        own_options = [*options, *(of_last if number == processes - 1 else ())]
        command = ("search", file, "--out", folder, "--distributed", *own_options)
        started.append(begin(*command, environment=environment))
    return started


def finish(processes: list[Any]) -> list[tuple[int, str, str]]:
    return [(process.wait(), process.read("stdout"), process.read("stderr")) for process in processes]


def history(out: Path) -> list[dict[str, Any]]:
    return read_lines(out / "history.jsonl")


@thorough
def test_two_processes_find_what_one_finds(family: Family, tmp_path: Path) -> None:
    """A winner that is chosen on a validation split, and an end before the last generation, among the rest."""
    config = write_config(family.root, tasks=[CHOICE])
    stop = "{evaluations: 20, seconds: 1000}"
    options = [f"search.{key}" for key in ("generations=9", "validation=0.4", "validate_every=2", f"stop={stop}")]
    options = [part for option in options for part in ("--set", option)]
    ended = finish(start(config, tmp_path / "two", 2, *options, begin=FreshProcess))
    assert [code for code, _, _ in ended] == [0, 0], ended
    run_command("search", config, "--out", tmp_path / "one", *options)
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert len(one) == len(two) == 3
    for row, other in zip(one, two, strict=True):
        np.testing.assert_allclose(row["fitness"], other["fitness"], atol=1e-5)
    checks = [rows[1]["validation"]["best_so_far"] for rows in (one, two)]
    assert checks[0] == pytest.approx(checks[1], abs=1e-5)
    results = [read_json(tmp_path / name / "result.json") for name in ("one", "two")]
    np.testing.assert_allclose(results[0]["genome"], results[1]["genome"], atol=1e-4)
    assert [(result["stopped_by"], result["chosen_on"]) for result in results] == [("evaluations", "validation")] * 2
    # One of them writes, and speaks; where the machine is slow, all say what takes long.
    assert "winner:" in ended[0][1] and "Gloo" not in ended[0][1]
    assert all(line.endswith(" so far") for line in ended[1][1].splitlines()), ended[1][1]


@thorough
def test_a_process_that_dies_ends_the_run_and_one_alone_resumes_it(family: Family, tmp_path: Path) -> None:
    config, out = (
        write_config(family.root, tasks=[CHOICE], search={"population": 6, "generations": 400}),
        tmp_path / "run",
    )
    processes = start(config, out, 2, begin=FreshProcess)
    deadline = time.monotonic() + 240
    while not (out / "history.jsonl").exists() or len(history(out)) < 2:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGKILL)
    (code, _, errors), _ = finish(processes)
    assert code == 1 and "another process of this run has gone" in errors and "--resume" in errors, (code, errors)
    # Where JAX misses it first, in a thread of its own, the hint is in the same line.
    assert len([line for line in errors.splitlines() if not line.startswith("warning")]) <= 2, errors
    saved = len(history(out))
    assert saved >= 2
    config = write_config(family.root, tasks=[CHOICE], search={"population": 6, "generations": saved + 2})
    run_command("search", config, "--out", out, "--resume")
    assert [row["generation"] for row in history(out)] == list(range(1, saved + 3))


def test_distributed_without_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    done = run_command("search", "none.yaml", "--distributed", status=2)
    assert done.stderr.count("\n") == 1 and "JAX_NUM_PROCESSES" in done.stderr
