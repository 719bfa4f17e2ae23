"""Hostile configs of a search: numbers without bounds, names that no table can show, documents of other shapes."""

from pathlib import Path
from typing import Any

from hostile import SEARCH, Case, World, changing, config, instead


def changed(**changes: Any) -> Any:
    """A config with other top-level keys."""
    return lambda world: world.write("config.yaml", config(**changes))


def searching(**changes: Any) -> Any:
    return changed(search={"generations": 1, "population": 4} | changes)


def asking(**changes: Any) -> Any:
    return changed(tasks=[config()["tasks"][0] | changes])


def within(**changes: Any) -> Any:
    return changed(space=config()["space"] | changes)


@changing
def along(world: World, /, **changes: Any) -> None:
    """A config that searches over layer paths."""
    document = config(data_flow=changes)
    del document["space"]
    world.write("config.yaml", document)


def text(document: str) -> Any:
    return lambda world: world.write("config.yaml", document)


def arguments(*more: str) -> Any:
    return lambda world: (*SEARCH, *more)


def evolving(**changes: Any) -> Any:
    """A mergekit-evolve file with other top-level keys."""
    genome = {"models": ["one", "two"], "merge_method": "ties", "base_model": "base"}
    return lambda world: world.write("config.yaml", {"genome": genome, "tasks": [{"name": "arc_easy"}]} | changes)


REST = "space: {method: linear, parameters: {weight: {}}}\ntasks: [{name: a, kind: likelihood, file: tasks.jsonl}]\n"


def failing(world: World) -> None:
    """A function of which no candidate gets a number."""
    world.write("own.py", "def score(records, log_probabilities):\n    return [float('nan')] * len(records)\n")
    task = {"name": "mine", "kind": "function", "function": "own.py:score", "inputs": "log_probabilities"}
    world.write("config.yaml", config(tasks=[task | {"file": "tasks.jsonl"}]))


NAMES = "1 to 200 characters"


def target(name: str, given: str, *says: str) -> Case:
    return Case(f"a target {name}", lambda w: ("plan", "config.yaml", "--target", given), ("there is no target", *says))


CASES: list[Case] = [
    # Numbers.
    Case("a truth value for a number", searching(generations=True), ("config.yaml", "search.generations", "true")),
    Case("a truth value for a share", asking(heldout=True), ("tasks[0].heldout", "a share between 0 and 1, or a file")),
    Case("10^12 generations", searching(generations=10**12), ("search.generations", "1,000,000")),
    Case("a number of 400 digits", searching(generations=10**400), ("search.generations", "40 digits")),
    Case("a sigma that is infinite", searching(sigma=float("inf")), ("search.sigma", "10", "inf")),
    Case("a sigma that is no number", searching(sigma=float("nan")), ("search.sigma", "nan")),
    Case("a sigma that float32 takes for 0", searching(sigma=1e-60), ("search.sigma", "1e-06")),
    Case("a billion finalists", searching(finalists=1e9), ("search.finalists", "10,000")),
    Case("a strategy nobody knows", searching(strategy="cma-es"), ("search.strategy", "did you mean 'cma_es'")),
    Case("a strategy that is a list", searching(strategy=["cma_es"]), ("search.strategy", "a text")),
    Case("a population of ten million", searching(population=10_000_000), ("search.population", "100,000")),
    Case("a seed of 2^63", changed(seed=2**63), ("seed", "9,223,372,036,854,775,807")),
    Case("a seed beyond 64 bits", changed(seed=2**70), ("seed", "9,223,372,036,854,775,807")),
    Case("a negative seed", changed(seed=-1), ("seed", "-1")),
    Case("a seed beyond 64 bits as an option", arguments("--seed", str(2**64)), ("--seed", "9223372036854775807")),
    Case("a negative seed as an option", arguments("--seed", "-1"), ("--seed", "-1")),
    Case("a merge's seed of 2^63", lambda w: ("merge", "recipe.yaml", "out", "--seed", str(2**63)), ("--seed",)),
    Case("mergekit-evolve's seed of 2^63", evolving(random_seed=2**63), ("random_seed", "9,223,372,036,854,775,807")),
    Case("mergekit-evolve's weight that is infinite",
         evolving(tasks=[{"name": "arc_easy", "weight": float("inf")}]), ("tasks[0].weight", "inf")),
    Case("mergekit-evolve's granularity that is absurd", evolving(
        genome={"models": ["one"], "merge_method": "linear", "layer_granularity": 10**30}), ("layer_granularity",)),
    Case("a task's weight that is infinite", asking(weight=float("inf")), ("tasks[0].weight", "inf")),
    Case("a task's weight that is no number", asking(weight=float("nan")), ("tasks[0].weight", "nan")),
    Case("a held-out share that is no number", asking(heldout=float("nan")), ("tasks[0].heldout", "nan")),
    Case("too many new tokens", asking(kind="exact_match", max_new_tokens=10**9),
         ("tasks[0].max_new_tokens", "1,000,000")),
    Case("too many shown examples", changed(tasks=[{"name": "g", "kind": "gsm", "source": "tasks.jsonl",
         "num_fewshot": 10**9}]), ("tasks[0].num_fewshot", "10,000")),
    Case("a bound that is infinite", within(parameters={"weight": {"high": float("inf")}}),
         ("space.parameters.weight.high", "inf")),
    Case("a bound that is no number", within(parameters={"weight": {"low": float("nan")}}),
         ("space.parameters.weight.low", "nan")),
    Case("a bound beyond float32", within(parameters={"weight": {"high": 1e39}}),
         ("space.parameters.weight.high", "float32", "1e+39")),
    Case("bounds further apart than float32 holds", within(parameters={"weight": {"low": -3e38, "high": 3e38}}),
         ("parameters.weight", "float32")),
    Case("bounds that are one in float32", within(parameters={"weight": {"low": 1.0, "high": 1.0 + 1e-12}}),
         ("parameters.weight", "not below")),
    Case("a start beyond float32", within(parameters={"weight": {"start": [0.5, 1e300]}}),
         ("space.parameters.weight.start", "float32")),
    Case("a fixed number beyond float32", within(parameters={"weight": {}}, fixed={"lambda": 1e39}),
         ("space.fixed.lambda", "float32")),
    Case("a fixed truth value", within(parameters={"weight": {}}, fixed={"lambda": True}),
         ("space.fixed.lambda", "number", "true")),
    Case("a scale that is infinite", along(scale_high=float("inf")), ("data_flow.scale_high", "1e+06", "inf")),
    Case("a scale that is no number", along(scale_low=float("nan")), ("data_flow.scale_low", "nan")),
    Case("a million repetitions", along(form="indicator", repetitions=1_000_000), ("data_flow.repetitions", "1,000")),
    Case("ten million moves", along(moves=10_000_000), ("data_flow.moves", "1,000")),
    Case("a path of a million layers", along(max_layers=1_000_000), ("data_flow.max_layers", "10,000")),
    Case("a window that is absurd", along(window=10**20), ("data_flow.window", "10,000")),
    Case("an end beyond all parents", along(embedding_parent=10**30), ("embedding_parent", "no parent")),
    Case("a chunk that is absurd", changed(evaluation={"chunk": 10**12}), ("evaluation.chunk", "100,000")),
    Case("batches that are absurd", changed(evaluation={"tokens_per_batch": 10**15}),
         ("evaluation.tokens_per_batch", "10,000,000")),
    Case("10,000 stages", changed(space=None, stages=[{"data_flow": {}}] * 10_000), ("stages", "1 to 100", "10,000")),
    Case("20,000 components", within(components=["mlp"] * 20_000), ("space.components", "100", "20,000")),
    # Searches of which nothing comes: one line, and status 1.
    Case("a function that gives nobody a number", failing, ("error: generation 1: all 4 candidates failed", "mine",
         "nothing is saved", "what the function"), status=1, leaves=("run", "__pycache__"), seconds=60),
    Case("a path of which every candidate is too long", along(form="indicator", repetitions=100, scales="none",
         max_layers=3), ("error: generation 1: all 4 candidates failed", "max_layers"), status=1, leaves=("run",),
         seconds=60),
    # Names.
    Case("a name of 300 characters", asking(name="x" * 300), ("tasks[0].name", NAMES)),
    Case("no name", asking(name=""), ("tasks[0].name", NAMES)),
    Case("NUL in a name", text('parents: [one]\nspace: {method: linear, parameters: {weight: {}}}\n'
         'tasks: [{name: "a\\0b", kind: likelihood, file: tasks.jsonl}]\n'), ("tasks[0].name", "'a\\x00b'")),
    Case("a line feed in a name", asking(name="a\nb"), ("tasks[0].name", "'a\\nb'")),
    Case("an escape sequence in a name", asking(name="\x1b[2Ja"), ("tasks[0].name", "\\x1b[2J")),
    Case("half a character in a name", text(
         'parents: [one]\nspace: {method: linear, parameters: {weight: {}}}\n'
         'tasks: [{name: "a\\ud83d", kind: likelihood, file: tasks.jsonl}]\n'), ("config.yaml:3", "Unicode")),
    Case("NUL in a path", text('parents: ["a\\0b"]\nspace: {method: linear, parameters: {weight: {}}}\n'
         'tasks: [{name: a, kind: likelihood, file: tasks.jsonl}]\n'), ("parents[0]", "'a\\x00b'")),
    Case("a parent's name too long for the file system", changed(parents=["one", "x" * 300]), ("parents[1]",)),
    Case("a task file's name too long for the file system", asking(file="x" * 300), ("tasks[0].file",)),
    Case("a run folder's name too long for the file system", lambda w: (*SEARCH[:-1], "x" * 300), ("xxx", "name")),
    Case("a run folder's name too long, from the config",
         lambda w: (w.write("config.yaml", config(out="y" * 300)), SEARCH[:2])[1], ("yyy", "name")),
    # Shapes.
    Case("a config of comments", text("# nothing\n# else\n"), ("config.yaml", "mapping")),
    Case("two documents", text("parents: [one]\n---\nparents: [two]\n"), ("config.yaml", "document")),
    Case("a folder for a config", instead("config.yaml", Path.mkdir), ("config.yaml",), leaves=("config.yaml",)),
    Case("tasks as a mapping", changed(tasks={"text": config()["tasks"][0]}), ("tasks", "list", "a mapping")),
    Case("parents as a text", changed(parents="one"), ("parents", "list", "'one'")),
    Case("a parent that is nothing", changed(parents=["one", None]), ("parents[1]", "nothing")),
    Case("a task that is nothing", changed(tasks=[None]), ("tasks[0]", "mapping", "nothing")),
    Case("a section that is nothing", changed(search=None), ("search", "mapping", "nothing")),
    Case("a key that is a number", changed(**{"space": config()["space"] | {1: 2}}), ("space.1", "unknown key")),
    Case("a parameter that is a number", within(parameters={1: {}}), ("space.parameters.1",)),
    Case("a date for a number", text("parents: [one]\nseed: 2020-01-01\n" + REST), ("seed", "date")),
    Case("parents within themselves", text("parents: &a [one, *a]\n" + REST), ("config.yaml:1", "*a")),
    # --set.
    Case("an empty part of a key", arguments("--set", "search..sigma=1"), ("--set", "key.path=value")),
    Case("no key", arguments("--set", "=1"), ("--set", "key.path=value")),
    Case("an item counted from the end", arguments("--set", "tasks.-1.name=x"), ("--set", "tasks.-1.name")),
    Case("a section that becomes a number", arguments("--set", "search=5"), ("search", "mapping", "5")),
    Case("a value that is no YAML", arguments("--set", "tasks=[1"), ("--set tasks", "not valid YAML")),
    Case("a value of 5,000 digits", arguments("--set", "seed=" + "9" * 5000), ("--set seed", "1,000 digits")),
    Case("a value nested 5,000 deep", arguments("--set", "seed=" + "[" * 5000 + "]" * 5000), ("seed",)),
    Case("a key of 5,000 parts", arguments("--set", "a." * 5000 + "b=1"), ("a", "unknown key")),
    # Digits of other scripts, and sizes that are none.
    target("of full-width digits", "２xh100", "did you mean '8xh100'?"),
    target("of Arabic digits", "٢x٨xh100"),
    target("in superscript", "²xh100"),
    target("of a TPU in full-width digits", "v5e-８", "v5e-8"),
    Case("a budget of full-width digits", lambda w: (w.write("config.yaml", config(search={"budget": "５０ passes"})),
         SEARCH)[1], ("search.budget", "passes or a time")),
    Case("a family of a full-width number", changed(parents=["zoo:３/maths", "one"]),
         ("zoo:３/maths", "no such model")),
    Case("an unknown key in other letters", arguments("--set", "größe=1"), ("größe", "unknown key")),
]  # fmt: skip
