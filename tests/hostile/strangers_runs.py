"""Run folders of strangers: files of a run that no search wrote, read by the commands that take a run that is not
one's own."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evojax_merge.search.checkpoints import digest_of
from evojax_merge.search.run_parts import CHECKPOINT_MARK
from hostile import SEARCH, Case, World, changing, edited, instead
from hostile.runs import put_run

Change = Callable[[Path], Any]

SHOW, REPORT, RUNS = ("show", "run"), ("report", "run"), ("runs", ".")
COMPARE = ("compare", "run", "other", "--out", "compare.html")
EXPORT, FRONT = ("export", "run", "out"), ("export", "run", "out", "--member", "1")
REPRODUCE, RESUME = ("reproduce", "run"), (*SEARCH, "--resume")
BEST_SO_FAR = ("export", "run", "out", "--best-so-far")
EVALUATE, PUBLISH = ("evaluate", "run", "--tasks", "tasks.yaml"), ("publish", "run", "--repo", "one/two")
NAN, INFINITY = float("nan"), float("inf")
ZEROS = np.zeros((5, 77), np.float32)
# Larger than any file of a search; sparse.
HUGE = 10 * 2**30
# Deeper than a parser of Python goes.
DEEP = 100_000
BRED = {"name": "member-7", "method": "slerp", "parents": ["one", "two"], "parameters": {"t": 0.5}, "split": 1}
MEMBER = {
    "member": 1, "fitness": 0.5, "scores": {"a/x": 0.1, "b/x": 0.2}, "heldout_fitness": 0.5,
    "heldout_scores": {"a/x": 0.1, "b/x": 0.2}, "genome": [0.5],
}  # fmt: skip
PASSTHROUGH: dict[str, Any] = {"merge_method": "passthrough", "dtype": "float32"}


@changing
def a_run(world: World, change: Change, command: tuple[str, ...]) -> None:
    """A finished run that is changed, and what the command needs beside it."""
    run = put_run(world)
    if "other" in command:
        shutil.copytree(run, world / "other")
    if "tasks.yaml" in command:
        world.write("tasks.yaml", {"tasks": [{"name": "text", "kind": "likelihood", "file": "tasks.jsonl"}]})
    change(run)


def write(name: str, content: str | bytes) -> Change:
    return lambda run: (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def with_plugin(run: Path) -> None:
    """The run's config names a plugin that leaves a mark where it is imported."""
    (run / "plugin.py").write_text("open('code_was_run', 'w')\n")
    config(plugins=["plugin.py"])(run)


def deep(opening: str, closing: str, around: str = "{}") -> str:
    return around.replace("{}", opening * DEEP + closing * DEEP)


@changing
def sparse(run: Path, name: str, size: int = HUGE) -> None:
    """A file of zeros, none of which is on the disk."""
    (run / name).parent.mkdir(exist_ok=True)
    with (run / name).open("wb") as handle:
        handle.truncate(size)


def result(**changes: Any) -> Change:
    """Other keys in result.json; `...` removes one."""
    return edited("result.json", **changes)


@changing
def line(run: Path, /, number: int, **changes: Any) -> None:
    """Other keys in a line of the history."""
    for name in ("history.jsonl", "history.backup.jsonl"):
        lines = (run / name).read_text().splitlines()
        lines[number] = json.dumps(json.loads(lines[number]) | changes)
        (run / name).write_text("".join(f"{text}\n" for text in lines))


def config(**changes: Any) -> Change:
    """Other keys in config.yaml; `...` removes one."""
    return edited("config.yaml", **changes)


@changing
def recipe(run: Path, *documents: Any, name: str = "best/recipe.yaml") -> None:
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(yaml.safe_dump_all(documents))


def path_result(run: Path, scales: list[float], *documents: Any) -> None:
    """The winner's layer path."""
    result(path={"layers": [0, 1], "scales": scales})(run)
    recipe(*documents)(run)


def layers(*ranges: Any, **keys: Any) -> dict[str, Any]:
    """A recipe of slices of one model."""
    slices = [{"sources": [{"model": "/gone/one", "layer_range": layer_range}]} for layer_range in ranges]
    return PASSTHROUGH | {"slices": slices} | keys


def drawn(scales: list[float], *documents: Any) -> Change:
    return lambda run: path_result(run, scales, *documents)


@changing
def saved_as(run: Path, /, **changes: Any) -> None:
    """Other arrays in every checkpoint, with a digest that is right; `...` removes one. The run was broken off."""
    from orbax.checkpoint import v1 as ocp

    for step in (run / "checkpoints").resolve().iterdir():
        loaded = {name: np.asarray(leaf) for name, leaf in ocp.load(step).items() if name != "digest"}
        arrays = {name: array for name, array in (loaded | changes).items() if array is not ...}
        shutil.rmtree(step)
        ocp.save(step, arrays | {"digest": digest_of(arrays)}, custom_metadata=CHECKPOINT_MARK)
    (run / "result.json").unlink()


@changing
def resized(run: Path, name: str, size: int) -> None:
    """An array of every checkpoint that claims `size` rows, none of which is on the disk."""
    import tensorstore

    for step in (run / "checkpoints").resolve().iterdir():
        store = {"driver": "ocdbt", "base": f"file://{step}/state", "path": f"{name}/"}
        array = tensorstore.open({"driver": "zarr3", "kvstore": store}).result()
        array.resize(exclusive_max=[size, *array.shape[1:]]).result()
    (run / "result.json").unlink()


def refused(name: str, change: Change, command: tuple[str, ...], *says: str) -> Case:
    return Case(name, a_run(change, command), says, command)


def read(name: str, change: Change, *prints: str, command: tuple[str, ...] = SHOW) -> Case:
    """A run that is shown with what can be read of it."""
    page = ("run/report.html",) if command == REPORT else ("compare.html",) if command == COMPARE else ()
    return Case(name, a_run(change, command), (), command, 0, leaves=page, rewrites=page, prints=prints)


def noted(name: str, change: Change, file: str, *texts: str) -> Case:
    """A run with a file that cannot be read, which is said."""
    return read(name, change, f"{file} cannot be read: {texts[0] if texts else ''}", *texts[1:])


CASES: list[Case] = [
    # result.json
    noted("a result that is a list", write("result.json", "[1]"), "result.json"),
    noted("a result that is a text", write("result.json", '"x"'), "result.json"),
    noted("a result of a million levels", write("result.json", deep("[", "]")), "result.json", "is not JSON"),
    noted("a result of many objects", write("result.json", deep('{"a":', "}", "{}1")), "result.json", "is not JSON"),
    noted("a result that is no UTF-8", write("result.json", bytes(range(256))), "result.json", "is not JSON"),
    refused("a result of 10 GB", sparse("result.json"), SHOW, "run/result.json", "bytes; expected"),
    read("a pipe in the place of the result", instead("result.json", os.mkfifo), "run: stopped"),
    read("a result of a billion generations", result(generations=10**9), "run: finished", "3 generations"),
    noted("a result of minus one generations", result(generations=-1), "result.json", "generations"),
    noted("a result whose generations are a text", result(generations="3"), "result.json", "generations"),
    noted("a table of numbers", result(table=[1, 2]), "result.json", "table.0"),
    noted("a held-out score that is a text", result(table=[{"role": "winner", "name": "x", "heldout_fitness": "1"}]),
          "result.json", "table.0.heldout_fitness"),
    read("a held-out score that is infinite",
         result(table=[{"role": "winner", "name": "x", "heldout_fitness": INFINITY}]), "winner", command=SHOW),
    read("held-out scores that are not numbers, on the page",
         result(table=[{"role": role, "name": role, "heldout_fitness": NAN} for role in ("winner", "base")]),
         command=REPORT),
    noted("an interval of three numbers",
          result(table=[{"role": "base", "name": "x", "heldout_fitness": 1.0, "interval": [1, 2, 3]}]),
          "result.json", "table.0.interval"),
    noted("rivals that are a list", result(better_than=[1]), "result.json", "better_than"),
    noted("another split", result(chosen_on="train"), "result.json", "chosen_on"),
    noted("sentences that are numbers", result(verdicts=[1]), "result.json", "verdicts.0"),
    noted("a genome of texts", result(genome=["a"]), "result.json", "genome.0"),
    noted("a gene that float32 does not hold", result(genome=[1e39]), "result.json", "genome.0"),
    read("a parent with a name of control characters",
         result(table=[{"role": "parent", "name": "\x1b[2J<b>\u202e", "heldout_fitness": 1.0},
                       {"role": "winner", "name": "evolved", "heldout_fitness": 1.0}]), "\\x1b[2J<b>\\u202e"),
    noted("a lineage in a circle",
          result(lineage=[BRED | {"parents": ["member-9", "one"]}, BRED | {"name": "member-9", "parents": ["member-7",
                 "one"]}]), "result.json", "document: lineage: member-7"),
    noted("a member that is its own parent", result(lineage=[BRED | {"parents": ["member-7", "one"]}]), "result.json",
          "document: lineage: member-7"),
    noted("two members of one name", result(lineage=[BRED, BRED]), "result.json", "document: lineage"),
    noted("a member of three parents", result(lineage=[BRED | {"parents": ["one", "two", "three"]}]), "result.json",
          "lineage.0.parents"),
    noted("a member without parents", result(lineage=[BRED | {"parents": []}]), "result.json", "lineage.0.parents"),
    noted("a member with a value too many", result(lineage=[BRED | {"parameters": {"t": [1.0, 2.0, 3.0]}}]),
          "result.json", "lineage.0.parameters"),
    noted("models of a billion layers", result(lineage=[BRED], layers=10**9), "result.json", "layers"),
    noted("a split beyond all layers", result(lineage=[BRED | {"split": 10**9}]), "result.json", "lineage.0.split"),
    read("a lineage with HTML in its names", result(lineage=[BRED | {"method": "</svg><script>"}], layers=2),
         command=REPORT),
    noted("fronts of unlike tasks", result(members=[MEMBER, MEMBER | {"scores": {"a/x": 0.1}}]), "result.json",
          "document: members"),
    noted("ragged parameters", result(groups=["a", "b"], parameters={"weight": [[1.0], [1.0, 2.0]]}), "result.json",
          "document: parameters.weight"),
    noted("parameters without a row for each group", result(groups=["a", "b"], parameters={"weight": [[1.0]]}),
          "result.json", "document: parameters.weight"),
    # The winner's layer path, which the page draws
    noted("a scale of 0", drawn([0.0, 1.0], layers([0, 2])), "result.json", "path: scales"),
    noted("scales whose product vanishes", drawn([1e-200, 1e-200], layers([0, 2])), "result.json", "path: scales"),
    noted("a scale that is not finite", drawn([NAN, 1.0], layers([0, 2])), "result.json", "path.scales.0"),
    *(
        read(f"a path whose recipe {what}", drawn([1.0, 0.5], *documents), command=REPORT)
        for what, documents in {
            "has a billion layers": [layers([0, 10**9])],
            "has as many layers as slices may have": [layers(*[[0, 100_000]] * 2000)],
            "is a list": [[1, 2]],
            "is empty": [],
            "has slices without sources": [PASSTHROUGH | {"slices": [{}]}],
            "has sources that are a number": [PASSTHROUGH | {"slices": [{"sources": 3}]}],
            "has no slices": [PASSTHROUGH],
            "has a layer range of texts": [layers(["a", "b"])],
            "ends before it begins": [layers([2, 0])],
            "needs its own result": [layers([0, 2], name="a") | {"base_model": "a"}],
            "has an unknown method": [layers([0, 2], merge_method="nothing")],
            "names a model by a number": [PASSTHROUGH | {"slices": [{"sources": [{"model": 3}]}]}],
        }.items()
    ),
    # history.jsonl
    noted("a line that is a list", lambda run: (run / "history.jsonl").write_text("[1]\n"), "history.jsonl"),
    noted("a line of a million levels", write("history.jsonl", deep("[", "]", '{"generation": {}}\n')),
          "history.jsonl", "is not JSON"),
    noted("genomes of several lengths", line(1, genomes=[[1.0], [1.0, 2.0], [1.0], [1.0]]), "history.jsonl",
          "document: genomes of several lengths"),
    noted("genomes of another length than before", line(2, genomes=[[1.0]] * 4), "history.jsonl",
          "genomes of several lengths"),
    noted("fewer genomes than candidates", line(2, genomes=[]), "history.jsonl", "document: lists of 4 candidates"),
    noted("more examples than candidates", line(0, examples=[1] * 9), "history.jsonl", "document: lists of 4"),
    noted("a fitness that is not a number", line(0, fitness=[NAN] * 4), "history.jsonl", "fitness.0"),
    noted("a fitness that is infinite", line(0, fitness=[INFINITY] * 4), "history.jsonl", "fitness.0"),
    noted("a fitness that is a truth value", line(0, fitness=[True] * 4), "history.jsonl", "fitness.0"),
    noted("a best fitness of 1e301", line(2, best_so_far=1e301), "history.jsonl", "best_so_far"),
    noted("a generation before the first", line(0, generation=-5), "history.jsonl", "generation"),
    noted("minus one example", line(0, examples=[-1] * 4), "history.jsonl", "examples.0"),
    noted("task scores that are a list", line(0, task_scores=[1]), "history.jsonl", "task_scores"),
    noted("a look at the validation split that is a text", line(0, validation={"best_so_far": "1"}), "history.jsonl",
          "validation.best_so_far"),
    noted("a metric of lists", line(0, sigma=[[[1]]]), "history.jsonl", "sigma"),
    *(
        noted(f"a metric of {str(value)[:5]}", line(0, sigma=value), "history.jsonl", "sigma")
        for value in (10**400, -(10**400), NAN, INFINITY, 1e308)
    ),
    read("a metric of 400 digits, on the page", line(0, sigma=10**400), command=REPORT),
    read("a history of nothing but failures", line(2, fitness=[None] * 4), command=REPORT),
    read("generations that go back, on the page", line(2, generation=1), command=REPORT),
    noted("a line without an end", sparse("history.jsonl", 2**27), "history.jsonl"),
    refused("a history of 10 GB", sparse("history.jsonl"), REPORT, "run/history.jsonl", "10,737,418,240 bytes"),
    refused("a history of two million lines", write("history.jsonl", b"\n" * 2_000_000), SHOW, "run/history.jsonl",
            "more than 1,000,000 lines"),
    refused("a history of 10 GB, exported", sparse("history.jsonl"), EXPORT, "run/history.jsonl"),
    refused("a history of 10 GB, reproduced", sparse("history.jsonl"), REPRODUCE, "run/history.jsonl"),
    refused("a history of 10 GB, resumed", sparse("history.jsonl"), RESUME, "run/history.jsonl"),
    refused("a history of 10 GB, compared", sparse("history.jsonl"), COMPARE, "run/history.jsonl"),
    Case("a history of 10 GB among other runs", a_run(sparse("history.jsonl"), COMPARE),
         ("warning", "run/history.jsonl"), RUNS, 0, prints=("other",)),
    # timing.jsonl
    noted("seconds below 0", write("timing.jsonl", '{"generation": 1, "seconds": -3}\n'), "timing.jsonl", "seconds"),
    noted("seconds that are not a number", write("timing.jsonl", '{"generation": 1, "seconds": NaN}\n'),
          "timing.jsonl", "seconds"),
    noted("seconds that are a text", write("timing.jsonl", '{"generation": 1, "seconds": "3"}\n'), "timing.jsonl",
          "seconds"),
    read("a clock of many years", write("timing.jsonl", '{"generation": 1, "seconds": 1e300}\n' * 9), command=REPORT),
    refused("a clock of 10 GB", sparse("timing.jsonl"), SHOW, "run/timing.jsonl"),
    # environment.json
    noted("an environment that is a list", write("environment.json", "[1]"), "environment.json"),
    noted("sessions that are a mapping", write("environment.json", '{"sessions": {}}'), "environment.json", "sessions"),
    noted("sessions of numbers", write("environment.json", '{"sessions": [1]}'), "environment.json", "sessions.0"),
    noted("an environment of a million levels", write("environment.json", deep("[", "]", '{"sessions": {}}')),
          "environment.json", "is not JSON"),
    noted("versions of versions", write("environment.json", '{"sessions": [{"versions": {"a": {"b": 1}}}]}'),
          "environment.json", "sessions.0.versions"),
    refused("an environment of 10 GB", sparse("environment.json"), REPORT, "run/environment.json"),
    *(
        read(f"a session of {value} seconds, by {command[0]}",
             write("environment.json", f'{{"sessions": [{{"seconds": {value}}}]}}'), command=command)
        for value in ("Infinity", "NaN", "-Infinity", "1" + "0" * 400) for command in (COMPARE, REPORT)
    ),
    # config.yaml
    *(
        noted(f"a config whose {key} is {value!r}", config(**{key: value}), "config.yaml", key)
        for key, value in {
            "seed": [1], "search": "x", "stages": [], "parents": 3, "tasks": {"a": 1}, "plugins": "x", "backend": [1],
            "space": "x", "pool": "x", "data_flow": 3, "base": 1,
        }.items()
    ),
    noted("a config of a trillion generations", config(search={"generations": 10**12}), "config.yaml",
          "search.generations"),
    noted("inputs that are numbers", config(inputs={"a": 1}), "config.yaml", "inputs.a"),
    read("keys that are numbers", config(**{"space": {1: {2: 3}}, "note": {4: 5}}), command=REPORT),
    read("a config with a date", write("config.yaml", "inputs: {}\nnote: 2020-01-01\n"), command=COMPARE),
    read("a config without tasks, compared", config(tasks=...), "tasks of the runs differ", command=COMPARE),
    refused("a config of many levels", write("config.yaml", "inputs: " + "[" * 200 + "]" * 200), SHOW,
            "run/config.yaml", "nested"),
    refused("a config of 10 GB", sparse("config.yaml"), SHOW, "run/config.yaml", "bytes"),
    refused("stages without a search, exported", config(stages=[{}]), EXPORT, "run/config.yaml", "stages.0.search"),
    refused("a backend that is a list, exported", config(backend=[1]), EXPORT, "run/config.yaml", "backend"),
    refused("plugins that are a text, exported", config(plugins="x"), EXPORT, "run/config.yaml", "plugins"),
    refused("a search that is a list, reproduced", config(search=[1]), REPRODUCE, "run/config.yaml", "search"),
    refused("a budget that is none, reproduced", config(search={"budget": "x"}), REPRODUCE, "run/config.yaml",
            "budget"),
    refused("a seed that is a list, resumed", config(seed=[1]), RESUME, "run/config.yaml", "seed"),
    # The winner's recipe and model
    *(
        refused(f"a recipe that {what}, exported", recipe(*documents), EXPORT, "run/best/recipe.yaml", *says)
        for what, documents, says in (
            ("is a list", [[1]], ("mapping",)),
            ("has no sources", [PASSTHROUGH | {"slices": [{}]}], ("sources",)),
            ("has a billion layers", [layers([0, 10**9])], ("layer_range",)),
            ("needs its own result", [layers([0, 2], name="a") | {"base_model": "a"}], ("its own result",)),
        )
    ),
    refused("a recipe of 10 GB", sparse("best/recipe.yaml"), EXPORT, "run/best/recipe.yaml", "bytes"),
    refused("a recipe of 10 GB, on the page", sparse("best/recipe.yaml"), REPORT, "run/best/recipe.yaml", "bytes"),
    read("a list of a model's files that is a list of numbers, published",
         write("best/model/evojax_merge.json", '{"files": [1]}'), command=PUBLISH),
    refused("a pipe for the list of a model's files, published", instead("best/model/evojax_merge.json", os.mkfifo),
            PUBLISH, "evojax_merge.json", "no regular file"),
    refused("inputs that are a number, published", config(inputs=5), PUBLISH, "run/config.yaml: inputs"),
    refused("a model card of 10 GB", sparse("best/model/README.md"), EXPORT, "run/best/model/README.md", "bytes"),
    refused("a front's member that is a list", recipe([1], name="best/front/member-1.yaml"), FRONT,
            "front/member-1.yaml"),
    refused("a model's config of many levels", write("best/model/config.json", deep("[", "]", '{"a": {}}')), EVALUATE,
            "best/model/config.json"),
    refused("a result and no model", lambda run: shutil.rmtree(run / "best/model"), PUBLISH, "no winner to publish"),
    # Code
    *(
        read(f"a plugin that writes a file, by {command[0]}", with_plugin, command=command)
        for command in (SHOW, REPORT, COMPARE, RUNS)
    ),
    # Checkpoints
    *(
        Case(f"a checkpoint {what}, {command[0]}", a_run(change, command), tuple(says), command,
             rewrites=("run/environment.json", "run/run.log"))
        for command in (RESUME, BEST_SO_FAR)
        for what, change, *says in (
            ("with a history of two lengths", saved_as(**{"history.length": np.arange(2)}), "version"),
            ("with a history of length 0.5", saved_as(**{"history.length": np.array(0.5)}), "version"),
            ("without a history", saved_as(**{"history.digest": ...}), "version"),
            ("without genomes", saved_as(**{"state.genomes": ...}), "version"),
            ("without fitness", saved_as(**{"state.fitness": ...}), "version"),
            ("of a single genome", saved_as(**{"state.genomes": ZEROS[0]}), "version"),
            ("of genomes of many genes", saved_as(**{"state.genomes": ZEROS}), "version"),
            ("of one fitness", saved_as(**{"state.fitness": np.array(0.5)}), "version"),
            ("of a trillion genomes", resized("state.genomes", 10**12), "run/checkpoints/", "unpack to"),
            ("of a trillion bytes of history", resized("history.digest", 10**12), "run/checkpoints/", "unpack to"),
        )
    ),
    refused("a checkpoint of genomes that are not numbers",
            saved_as(**{"state.genomes": np.full((5, 40), NAN, np.float32)}), BEST_SO_FAR, "version"),
    # Other files
    read("a log of zeros", sparse("run.log", 2**27), command=REPORT),
    read("a log of 10 GB", sparse("run.log"), command=REPORT),
    read("answers of other models", write("heldout_answers.jsonl", '{"model": "x", "task": "y"}\n'), command=REPORT),
    read("answers of a million levels", write("heldout_answers.jsonl", deep("[", "]") + "\n"), command=REPORT),
    read("answers that are no UTF-8", write("heldout_answers.jsonl", bytes(range(256))), command=REPORT),
    refused("answers of 10 GB", sparse("heldout_answers.jsonl"), REPORT, "run/heldout_answers.jsonl"),
    read("a lock of 10 GB", sparse("lock"), "run: finished"),
    refused("a page of 10 GB that is none", sparse("report.html"), REPORT, "run/report.html", "no page"),
    refused("a folder in the place of the history",
            lambda run: ((run / "history.jsonl").unlink(), (run / "history.jsonl").mkdir()), RESUME,
            "run/history.jsonl"),
]  # fmt: skip
