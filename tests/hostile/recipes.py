"""Hostile recipes: YAML that hides a value, that never ends, or that says what no merge can be."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import MERGE, Case, World, instead, recipe


def text(content: str | bytes) -> Callable[[World], Any]:
    return lambda w: w.write("recipe.yaml", content)


def document(**changes: Any) -> Callable[[World], Any]:
    return lambda w: w.write("recipe.yaml", recipe(**changes))


def first_model(**parameters: Any) -> Callable[[World], Any]:
    """The world's recipe with other parameters for its first model."""
    rows = [{"model": "one", "parameters": {"weight": 0.5, "density": 0.5} | parameters}, recipe()["models"][1]]
    return document(models=rows)


def case(name: str, change: Callable[[World], Any], *says: str, **more: Any) -> Case:
    return Case(name, change, ("recipe.yaml", *says), MERGE, **more)


def strict(name: str, change: Callable[[World], Any], *says: str) -> Case:
    """What `merge` passes over or reads as something else, with a warning, where it is not strict."""
    return Case(name, change, ("recipe.yaml", *says), (*MERGE, "--strict"))


def shuffled_merge(weight: str) -> str:
    """A recipe as text, with one weight as it is written."""
    return (
        "merge_method: linear\nmodels:\n"
        f"- {{model: one, parameters: {{weight: {weight}}}}}\n- {{model: two, parameters: {{weight: 1}}}}\n"
    )


def bomb(levels: int) -> str:
    rows = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, levels))
    return f"a0: &a0 [x, x]\n{rows}models: *a{levels - 1}\n"


GOOD = (
    "merge_method: ties\nbase_model: base\nmodels:\n"
    "- {model: one, parameters: {weight: 0.5}}\n- {model: two, parameters: {weight: 0.5}}\n"
)

CASES: list[Case] = [
    case("a list", text("- 1\n"), "expected a mapping"),
    case("empty", text(""), "expected a mapping"),
    case("a folder", instead("recipe.yaml", Path.mkdir), "but a folder"),
    case("a pipe that nobody writes to", instead("recipe.yaml", os.mkfifo), "is no regular file"),
    case("not UTF-8", text(b"merge_method: ties\xff\n"), "UTF-8", "byte 19"),
    case("UTF-16", text(GOOD.encode("utf-16")), "UTF-8"),
    case("NUL", text(GOOD + "dtype: fl\0oat32\n"), "not valid YAML"),
    case("tabs", text("merge_method: ties\nparameters:\n\tlambda: 1\n"), ":3", "not valid YAML"),
    case("a line of 20 MB", text(GOOD + f"dtype: {'x' * 20_000_000}\n"), "bytes; expected a YAML file of at most"),
    case("a method of 12 MB", document(merge_method="ties" * 3_000_000), "unknown method"),
    case("a gradient of ten million", text(GOOD + f"parameters: {{lambda: [{'1,' * 10_000_000}1]}}\n"), "bytes"),
    case("a gradient of a million", text(GOOD + f"parameters: {{lambda: [{'1,' * 1_000_000}1]}}\n"), "000 values"),
    case("a gradient of 10,001", document(parameters={"lambda": [1.0] * 10_001}), "lambda: 10,001 entries"),
    case("a bomb of aliases", text(bomb(30)), "more than 1,000,000 values"),
    case("a small bomb of aliases", text(bomb(4)), "unknown key"),
    case("an alias in itself", text("models: &a [*a]\nmerge_method: ties\n"), ":1", "is inside"),
    case("nested lists", text("models: " + "[" * 500 + "]" * 500), "levels deep"),
    case("nested beyond any stack", text("models: " + "[" * 100_000), "YAML"),
    case("nested mappings", text("models: " + "{a: " * 500 + "}" * 500), "levels deep"),
    strict("a key twice", text(GOOD + "merge_method: linear\n"), ":6", "merge_method: is on line 1"),
    strict("a key twice, once in quotes", text(GOOD + '"base_model": one\n'), ":6", "base_model: is on line 2"),
    strict("a parameter twice", text(GOOD.replace("weight: 0.5", "weight: 1, weight: 2", 1)), ":4", "weight: is on"),
    case("a Python object", text("!!python/object/apply:os.system ['touch gone']\n"), "not valid YAML", "python/"),
    case("a date that there is not", text(GOOD + "dtype: 2024-99-99\n"), "not valid YAML", "month"),
    case("a date for a number", text(shuffled_merge("2024-01-01")), "weight", "expected a number"),
    case("binary for a number", text(shuffled_merge("!!binary aGVsbG8=")), "weight", "expected a number"),
    case("a set for a number", text(shuffled_merge("!!set {a, b}")), "weight"),
    case("two documents", text(GOOD + "---\n" + GOOD), "document 1 and document 2 have no name"),
    case("an unhashable key", text(GOOD + "? [a, b]\n: 1\n"), "not valid YAML"),
    case("a number of 5,000 digits", text(shuffled_merge("9" * 5_000)), "digits"),
    case("a hexadecimal number of 5,000 digits", text(shuffled_merge("0x" + "9" * 5_000)), "digits"),
    case("a number of 500 digits", text(shuffled_merge("9" * 500)), "weight: 999", "3.403e+38"),
    case("a weight beyond float32", text(shuffled_merge("1.0e+39")), "weight: 1e+39", "3.403e+38"),
    case("a weight in quotes beyond float32", text(shuffled_merge("'1e39'")), "weight: '1e39'", "3.40282e+38"),
    case("an infinite weight", text(shuffled_merge(".inf")), "weight: inf"),
    case("a weight that is not a number", text(shuffled_merge(".nan")), "weight: nan"),
    strict("a weight that is a truth value", text(shuffled_merge("true")), "weight: True; expected a number"),
    case("a lambda beyond float32", document(parameters={"lambda": 1e39}), "lambda: 1e+39"),
    case("an infinite density in a gradient", first_model(density=[0.5, float("inf")]), "density: inf"),
    case("an infinity that no tensor uses", first_model(weight=[{"filter": "x", "value": float("inf")}, {"value": 1}]),
         "weight: inf"),
    case("a filter that is not text", first_model(weight=[{"filter": 5, "value": 1}]), "weight: filter: 5"),
    case("a filter that is a list", first_model(weight=[{"filter": ["mlp"], "value": 1}]), "filter: ['mlp']"),
    case("steps without end", text("merge_method: karcher\nmodels: [{model: one}, {model: two}]\n"
         "parameters: {max_iter: 1000000000000, tol: 0}\n"), "max_iter", "10000"),
    case("t beyond float", text("merge_method: slerp\nbase_model: one\nmodels: [{model: two}]\n"
         "parameters: {t: '1e999'}\n"), "t: '1e999'"),
    case("a method that is a list", document(merge_method=["ties"]), "merge_method: ['ties']"),
    case("a dtype that is a mapping", document(dtype={"float32": 1}), "dtype: {'float32': 1}"),
    case("a seed of 2^63", document(random_seed=2**63), "random_seed", str(2**63 - 1)),
    case("a seed that is a truth value", document(random_seed=True), "random_seed: True"),
    Case("a seed of 2^63 in the command", lambda w: (*MERGE, "--seed", str(2**63)), ("--seed", str(2**63 - 1)), MERGE),
    case("padding without end", document(tokenizer={"source": "base", "pad_to_multiple_of": 10**30}),
         "pad_to_multiple_of", "65536"),
    case("a token that is a list", document(tokenizer={"source": "base", "tokens": {"w9": {"source": {
         "kind": "model_token", "model": "one", "token": ["w9"]}}}}), "token: ['w9']"),
    case("the same model twice", document(models=[{"model": "one", "parameters": {"weight": 1}}] * 2), "one twice"),
    case(
        "layers beyond counting",
        text("merge_method: passthrough\nslices: [{sources: [{model: one, layer_range: [0, 1000000000000]}]}]\n"),
        "layer_range", "100,000",
    ),
    case("layers of text", text("merge_method: passthrough\nslices: [{sources: [{model: one, layer_range: '03'}]}]\n"),
         "layer_range: '03'"),
    case("a name of 300 characters", document(base_model="m" * 300), "no such folder"),
    case("a name of 10,000 characters", document(base_model="m" * 10_000), "mmm […] mmm", "no such folder"),
    case("a name with line feeds", document(base_model="a\nerror: well\n"), "a\\nerror: well\\n: no such"),
    case("a name with NUL", document(base_model="ba\0se"), "ba\\x00se: no such folder"),
    case("a name that clears the screen", document(base_model="\x1b[2Jbase"), "\\x1b[2Jbase: no such folder"),
    case("a name that turns writing round", document(base_model="\u202egpj.base"), "\\u202egpj.base"),
    case("a name that is half a character", text(GOOD.replace(": base", ': "\\ud800"')), "recipe.yaml"),
    case("a home that nobody has", document(base_model="~nobody-has-this-name/base"), "no such folder"),
    strict("a key with an escape sequence", document(**{"\x1b]0;gone\x07": 1}), "\\x1b]0;gone\\x07: unknown key"),
    strict("a key of 100,000 characters", document(**{"k" * 100_000: 1}), "unknown key"),
    # Filters.
    case("a filter that is a number", first_model(weight=[{"filter": 3, "value": 1}]), "weight: filter: 3"),
    case("a filter that is a list", first_model(weight=[{"filter": ["mlp"], "value": 1}]), "weight: filter: ['mlp']"),
    case("a filter of a filter that is a number",
         first_model(weight={"filter": "mlp", "value": [{"filter": 1.5, "value": 1}]}), "filter: 1.5"),
    case("a mismatch's filter that is a number", document(on_mismatch=[{"filter": 3, "value": "first"}]),
         "on_mismatch: filter: 3"),
    case("a mismatch's filter that is a truth value", document(on_mismatch={"filter": True, "value": "first"}),
         "on_mismatch: filter: True"),
    case("a mismatch that is a date", text(GOOD + "on_mismatch: 2020-01-01\n"), "on_mismatch"),
    case("a mismatch that is a number", document(on_mismatch=3), "on_mismatch: 3"),
    strict("a filter of a typo", first_model(weight=[{"filter": "self_attnn", "value": 1}, {"value": 0}]),
           "weight: the filter 'self_attnn' means no tensor (did you mean 'self_attn'?)"),
    strict("a filter of 100,000 characters", first_model(weight=[{"filter": "q" * 100_000, "value": 1}, {"value": 0}]),
           "means no tensor"),
    strict("a filter with an escape sequence", first_model(density=[{"filter": "\x1b[2J", "value": 1}, {"value": 0}]),
           "density: the filter '\\x1b[2J' means no tensor"),
    strict("a mismatch's filter of a typo",
           document(on_mismatch=[{"filter": "normm", "value": "first"}, {"value": "refuse"}]), "on_mismatch", "'norm'"),
    strict("9,000 filters of no tensor",
           first_model(weight=[*({"filter": f"x{i}", "value": 1} for i in range(9000)), {"value": 1}]),
           "means no tensor"),
]  # fmt: skip
