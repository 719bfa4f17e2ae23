"""The schema of a search's YAML: whatever is wrong is said by its key in the file, in plain words, in one line."""

import math
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from evojax_merge.config.documents import apply_overrides, attribute_errors_to_overrides, parse
from evojax_merge.config.search_config import Config, TaskFile
from evojax_merge.errors import InputError
from evojax_merge.mergekit.evolve_config import EvolveConfig
from evojax_merge.schema.yaml_reader import parse_yaml
from evojax_merge.tasks.kinds import find_kind

FILE = Path("config.yaml")
TASKS: dict[str, dict[str, Any]] = {
    "text": {"name": "a", "kind": "likelihood", "file": "a.jsonl"},
    "gsm": {"name": "b", "kind": "gsm", "source": "b.jsonl"},
    "lm_eval": {"lm_eval": "c"},
    "function": {"name": "d", "kind": "function", "file": "d.jsonl", "function": "f.py:score"},
}
SPACE = {"method": "ties", "parameters": {"weight": {"start": [0.5, 0.5]}}, "fixed": {"density": [0.5, 0.5]}}
DOCUMENTS: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "space": (Config, {"parents": ["one", "two"], "space": SPACE, "tasks": list(TASKS.values())}),
    "data_flow": (Config, {"parents": ["one"], "data_flow": {}, "tasks": [TASKS["text"]]}),
    "pool": (Config, {"parents": ["one", "two"], "pool": {}, "tasks": [TASKS["text"]]}),
    "stages": (Config, {"parents": ["one"], "stages": [{"space": SPACE}, {"data_flow": {}}], "tasks": [TASKS["text"]]}),
    "tasks": (TaskFile, {"tasks": list(TASKS.values()), "evaluation": {}}),
    "mergekit-evolve": (EvolveConfig, {
        "genome": {"models": ["one", "two"], "merge_method": "ties", "base_model": "base", "filters": ["mlp"]},
        "tasks": [{"name": "arc_easy"}],
    }),
}  # fmt: skip
WRONG: list[Any] = [
    None, [], ["x", None], [None], {}, {"a": 1}, {1: 2}, "", "text", "a\nb", "a\0b", "\ud800", "x" * 5000, True, -1,
    0, 1.5, 10**12, 10**400, math.nan, math.inf, -math.inf, 1e300, "nan", "1e400", [math.nan],
    yaml.safe_load("2020-01-01"),
]  # fmt: skip
JARGON = re.compile(
    r"Input should|valid (string|number|integer|list|dictionary)|instance of|constrained|function-|\[key\]|literal\[|"
    r"\.(str|float|int|bool|text|gsm)\b|Section|NoneType|pydantic|Error",
)


def places(schema: type[BaseModel], document: Any, key: str = "", at: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Every key that a document may have, as it is named in messages and as a path into the document; those of
    mappings and lists in it too."""
    for name, field in schema.model_fields.items():
        here, path = f"{key}.{name}".lstrip("."), (*at, name)
        yield here, path
        value = document.get(name) if isinstance(document, dict) else None
        inner = next((one for one in models_of(field.annotation)), None)
        if isinstance(value, list):
            for i, item in enumerate(value):
                yield f"{here}[{i}]", (*path, i)
                if isinstance(item, dict):
                    kind = find_kind(item) if item in TASKS.values() else None
                    own = kind.config if kind is not None else inner
                    assert own is not None
                    yield from places(own, item, f"{here}[{i}]", (*path, i))
        elif isinstance(value, dict) and inner is not None and name in ("parameters",):
            for own, item in value.items():
                yield f"{here}.{own}", (*path, own)
                yield from places(inner, item, f"{here}.{own}", (*path, own))
        elif isinstance(value, dict) and inner is None:
            for own in value:
                yield f"{here}.{own}", (*path, own)
        elif inner is not None and (value or not any(one.is_required() for one in inner.model_fields.values())):
            yield from places(inner, value or {}, here, path)


def models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation) if get_origin(annotation) is not None or get_args(annotation) else ():
        yield from models_of(part)


def with_value(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = deepcopy(document)
    target: Any = changed
    for part in path[:-1]:
        target = target[part] if isinstance(target, list) else target.setdefault(part, {})
    target[path[-1]] = value
    return changed


@pytest.mark.parametrize("name", DOCUMENTS)
def test_wrong_values_are_said_by_their_key_and_in_plain_words(name: str) -> None:
    schema, good = DOCUMENTS[name]
    parse(FILE, good, schema)
    refused = 0
    for key, path in places(schema, good):
        for value in WRONG:
            try:
                parse(FILE, with_value(good, path, value), schema)
            except InputError as error:
                refused += 1
                line = str(error)
                assert line.isprintable(), (key, value, line)
                assert not JARGON.search(line), (key, value, line)
                assert len(line) < 500, (key, value, line)
                named = error.what.partition(": ")[0]
                # A key that depends on another (all weights 0, a space and stages) is named with it.
                assert named.startswith(key) or key.startswith(named) or "exactly one of" in line, (key, value, line)
    assert refused > 300


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("generations", True, "search.generations: expected a whole number from 1 to 1,000,000, found true"),
        ("sigma", math.inf, "search.sigma: expected a number from 1e-06 to 10, found inf"),
        ("sigma", "wide", "search.sigma: expected a number from 1e-06 to 10, found 'wide'"),
        ("population", 10**7, "search.population: expected a whole number from 1 to 100,000, found 10000000"),
        ("validation", math.nan, "search.validation: expected a share from 0 to below 1, found nan"),
        ("validation", -0.1, "search.validation: expected a share from 0 to below 1, found -0.1"),
        ("validate_every", 0, "search.validate_every: expected a whole number from 1 to 1,000,000, found 0"),
        ("stop", {"seconds": 0}, "search.stop.seconds: expected a number from 0.001 to 1e+09, found 0"),
        ("stop", {"target": math.inf}, "search.stop.target: expected a number that float32 holds, found inf"),
        (
            "stop",
            {"evaluations": -5},
            "search.stop.evaluations: expected a whole number from 1 to 1,000,000,000,000, found -5",
        ),
        ("generations", None, "search.generations: expected a whole number from 1 to 1,000,000, found nothing"),
    ],
)
def test_messages_say_key_bounds_and_value(key: str, value: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(FILE, DOCUMENTS["space"][1] | {"search": {key: value}}, Config)
    assert caught.value.what == says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "name: on",
            "tasks[0].name: expected a text of 1 to 200 characters, in one line, found true; put it in quotes",
        ),
        ("name: 12", "found 12; put it in quotes"),
        (
            "prompt: {question}",
            "(of no NUL and no half characters), found a mapping; put it in quotes",
        ),
        (
            "prompt: {question} A",
            "expected key); check the indentation; put a text with more behind a brace",
        ),
        (
            "prompt: Q: {question}",
            "are not allowed in this context); put a text that holds ': ' in quotes",
        ),
        (
            "prompt: @user",
            "indent with spaces, no tabs; put a text that begins with @ or ` in",
        ),
        ("images:\n\ta: b", "cannot start any token); indent with spaces, no tabs"),
        ("prompt: 'a", "found unexpected end of stream); close the quotes"),
        ("prompt: *a", "found undefined alias); put a text that begins with * in quotes"),
        ("stop: [a", "did not find expected ',' or ']'); close the bracket"),
    ],
)
def test_a_text_that_yaml_reads_as_another_thing_gets_the_remedy(text: str, says: str) -> None:
    good = DOCUMENTS["space"][1]

    def read() -> None:
        document = parse_yaml(FILE, f"kind: likelihood\nfile: a.jsonl\n{text}\n")
        parse(FILE, good | {"tasks": [{"name": "a"} | document]}, Config)

    with pytest.raises(InputError, match=re.escape(says)):
        read()


def test_a_held_out_split_is_a_share_or_a_file() -> None:
    for value in (None, 1.5, True, [0.2], math.nan):
        task = TASKS["text"] | {"heldout": value}
        with pytest.raises(
            InputError, match=r"tasks\[0\]\.heldout: expected a share between 0 and 1, or a file, found"
        ):
            parse(FILE, DOCUMENTS["space"][1] | {"tasks": [task]}, Config)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("sigma", "1", 1.0),
        ("sigma", "1e-3", 1e-3),
        ("sigma", ".5", 0.5),
        ("generations", "7", 7),
        ("generations", "7.0", 7),
    ],
)
def test_numbers_may_be_written_as_yaml_and_people_do(key: str, text: str, value: Any) -> None:
    """YAML reads 1e-3 as a text."""
    document = yaml.safe_load(f"search: {{{key}: {text}}}")
    assert getattr(parse(FILE, DOCUMENTS["space"][1] | document, Config).search, key) == value


def test_the_largest_seed() -> None:
    assert parse(FILE, DOCUMENTS["space"][1] | {"seed": 2**63 - 1}, Config).seed == 2**63 - 1
    with pytest.raises(InputError, match="seed: expected a whole number from 0 to 9,223,372,036,854,775,807"):
        parse(FILE, DOCUMENTS["space"][1] | {"seed": 2**63}, Config)


@pytest.mark.parametrize(
    "override",
    ["a..b=1", "=1", ".=1", "seed.=1", "tasks.-1.name=x", "tasks.+0.name=x", "tasks.٠.name=x", "tasks.9.name=x",
     "seed", "", "parents.one=1", "seed=[1", "seed=" + "9" * 5000, "seed=" + "[" * 5000, "seed=!!python/object:os.x {}",
     "tasks." + "9" * 50 + ".name=x"],
)  # fmt: skip
def test_odd_overrides_are_refused_in_a_line(override: str) -> None:
    with pytest.raises(InputError) as caught:
        apply_overrides(FILE, deepcopy(DOCUMENTS["space"][1]), [override])
    line = str(caught.value)
    assert line.startswith(("--set: ", "--set seed:")) and line.isprintable() and len(line) < 500


@pytest.mark.parametrize(
    ("key", "meant"), [("generations", "search.generations"), ("chunk", "evaluation.chunk"), ("sead", "seed")]
)
def test_a_key_of_a_section_is_told_with_the_section(key: str, meant: str) -> None:
    for document in (DOCUMENTS["space"][1] | {key: 5}, apply_overrides(FILE, DOCUMENTS["space"][1] | {}, [f"{key}=5"])):
        with pytest.raises(InputError) as caught:
            parse(FILE, document, Config)
        assert str(caught.value) == f"{FILE}: {key}: unknown key (did you mean '{meant}'?)"


def test_a_misspelt_key_is_named_before_a_missing_one() -> None:
    for document, says in (
        ({"serach": {}}, "serach: unknown key (did you mean 'search'?)"),
        ({"search": {"genrations": 5}}, "search.genrations: unknown key (did you mean 'generations'?)"),
        ({"search": {"seed": 5}}, "search.seed: unknown key (did you mean 'seed', outside of search?)"),
        ({"serach": {}, "taks": []}, "taks: unknown key (did you mean 'tasks'?)"),
        ({"nothing_like_it": 1}, "tasks: missing"),
    ):
        changed = {key: value for key, value in DOCUMENTS["space"][1].items() if key != "tasks"} | document
        with pytest.raises(InputError) as caught:
            parse(FILE, changed, Config)
        assert str(caught.value) == f"{FILE}: {says}"


def test_of_two_overrides_of_a_key_the_last_counts() -> None:
    changed = apply_overrides(FILE, deepcopy(DOCUMENTS["space"][1]), ["seed=1", "tasks.0.name=über", "seed=2"])
    assert changed["seed"] == 2 and changed["tasks"][0]["name"] == "über"


@pytest.mark.parametrize(
    ("error", "overrides", "line"),
    [
        (("search.sigma", "expected less"), ["search.sigma=9"], "--set search.sigma=9: expected less"),
        # Of a key that is set twice the last value counts, and an item is a number to both.
        (("tasks[0].file", "none"), ["tasks.0.file=a", "tasks.0.file=b"], "--set tasks.0.file=b: none"),
        # A part of what was set, and what the set key is a part of.
        (("search", "sigma: expected less"), ["search={sigma: 9}"], "--set search={sigma: 9}: sigma: expected less"),
        (("space", "low 3 is not below 2"), ["space.low=3"], "--set space.low=3: space: low 3 is not below 2"),
        (("space", "low: 3 is above 2"), ["space.low=3"], "--set space.low=3: 3 is above 2"),
        (("search.rungs", "2; leave it out"), ["search.rungs=2"], "--set search.rungs=2: leave it out"),
        (("serch", "unknown key"), ["serch.sigma=1"], "--set serch.sigma=1: serch: unknown key"),
        (("seed", "x" * 900), ["seed=" + "9" * 100], f"--set seed={'9' * 55} […]: {'x' * 900}"),
        # The file's own mistakes stay its own.
        (("tasks[0]", "metric: 'x'"), ["tasks.0.limit=5"], None),
        (("tasks[1].file", "none"), ["tasks.0.file=a"], None),
        (("search.sigma", "expected less"), ["search.sigma2=1", "sigma=1"], None),
        (("", "expected exactly one of space, data_flow"), ["seed=1"], None),
    ],
)
def test_mistakes_of_an_override_are_not_the_files(
    error: tuple[str, str], overrides: list[str], line: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("space: {high: 2}\nsearch: {sigma: 1}\ntasks: [{}, {}]\n")
    key, what = error
    for raised in (InputError(path, f"{key}: {what}".removeprefix(": ")), InputError(f"{path}: {key}", what)):
        with pytest.raises(InputError) as caught, attribute_errors_to_overrides(path, overrides):
            raise raised
        assert str(caught.value) == (str(raised) if line is None else str(line))


def test_keys_are_taken_by_their_earlier_names() -> None:
    task = {"name": "mine", "kind": "function", "function": "own.py:score"}
    document = {
        "parents": ["a", "b"], "data_flow": {"ends": 1}, "tasks": [task | {"file": "a.jsonl", "gets": "logits"}],
    }  # fmt: skip
    config = parse(FILE, document, Config)
    assert config.data_flow.embedding_parent == 1 and config.tasks[0].inputs == "logits"
    with pytest.raises(InputError, match="ends: unknown key"):
        parse(FILE, document | {"data_flow": {"ends": 1, "embedding_parent": 1}}, Config)


def test_a_list_item_is_set_by_either_way_of_naming_it() -> None:
    for key in ("tasks.1.metric", "tasks[1].metric"):
        document = apply_overrides(FILE, {"tasks": [{}, {}]}, [f"{key}=margin"])
        assert document["tasks"] == [{}, {"metric": "margin"}]
