"""Hostile tasks of other people: lm-eval's YAMLs that name code or have no end, templates, data files that unpack to
more than they seem, records that cannot be meant, and tokenizers that change what a task asks."""

import json
import os
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

from hostile import MERGE, SEARCH, Case, World, changing, config

Change = Callable[[World], Any]

EVALUATE = ("evaluate", "one", "--tasks", "eval.yaml")
# What any code of a stranger would leave behind: `check` refuses a file that was not there.
MARK = "open('code_was_run', 'w')"
MEAN = {"aggregation": "mean", "higher_is_better": True}
TASK = {
    "task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "own/data.jsonl"}},
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": "gold",
    "doc_to_choice": "choices", "metric_list": [{"metric": "acc", **MEAN}],
}  # fmt: skip
GENERATION = {key: value for key, value in TASK.items() if key != "doc_to_choice"} | {
    "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["w9"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", **MEAN}],
}  # fmt: skip
DATA = [{"q": f"w4 w{n}", "choices": ["w5", "w6"], "gold": n % 2} for n in range(5, 11)]


def text_of(task: dict[str, Any], functions: dict[str, str]) -> str:
    """A task's YAML; `functions`: keys whose values are `!function`."""
    lines = [f"{key}: !function {name}\n" for key, name in functions.items()]
    return yaml.safe_dump({key: value for key, value in task.items() if key not in functions}) + "".join(lines)


@changing
def harness(
    world: World,
    /,
    task: dict[str, Any] = TASK,
    raw: str = "",
    *,
    functions: dict[str, str] | None = None,
    more: Change = lambda world: None,
    section: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[str, ...]:
    """A folder with a task of lm-eval, evaluated. `raw`: behind its YAML; `more`: what else is in the world."""
    changed = {key: value for key, value in (task | changes).items() if value is not ...}
    world.write("own/own.yaml", text_of(changed, functions or {}) + raw)
    world.write("own/code.py", f"{MARK}\ndef f(*args, **kwargs):\n    {MARK}\n    return 'w5'\n")
    world.write("own/data.jsonl", "".join(json.dumps(record) + "\n" for record in DATA))
    world.write("eval.yaml", {"tasks": [{"lm_eval": "own", "include_path": "own"} | (section or {})]})
    more(world)
    return EVALUATE


def case(name: str, change: Change, *says: str, **others: Any) -> Case:
    # The harness and the packages that it imports take their time.
    return Case(name, change, ("own", *says), **({"seconds": 30.0} | others))


ALLOW = "allow_code: true"
CODE = [
    case("a function as template", harness(functions={"doc_to_text": "code.f"}), "doc_to_text", "code.f", ALLOW),
    case("a function of Python's own", harness(functions={"doc_to_text": "os.system"}), "os.system", ALLOW),
    case("a function that prepares documents", harness(functions={"process_docs": "code.f"}), "process_docs", ALLOW),
    case("a function that scores", harness(functions={"process_results": "code.f"}), "process_results", ALLOW),
    case("a function for a data set", harness(functions={"custom_dataset": "code.f"}), "custom_dataset", ALLOW),
    case("a function in a list", harness(metric_list=..., raw="metric_list: [{metric: !function code.f}]\n"),
         "metric_list[0].metric", ALLOW),
    case("a function that aggregates",
         harness(metric_list=..., raw="metric_list: [{metric: acc, aggregation: !function code.f}]\n"),
         "metric_list[0].aggregation", ALLOW),
    case("a function as filter", harness(raw="filter_list: [{name: f, filter: [{function: !function code.f}]}]\n"),
         "filter_list[0]", ALLOW),
    case("a filter that calls a function", harness(raw="filter_list: [{name: f, filter: [{function: custom, "
         "filter_fn: code.f}]}]\n"), "custom", ALLOW),
    case("a function as key", harness(raw="metadata: {!function code.f : 1}\n"), "metadata", ALLOW),
    case("a class of their own", harness(functions={"class": "code.f"}), "class", ALLOW),
    case("a class by its name", harness(raw="class: code.f\n"), "class", ALLOW),
    case("a function of an included file", harness(doc_to_text=..., include="more.txt", more=lambda world: world.write(
         "own/more.txt", "doc_to_text: !function code.f\n")), "doc_to_text", ALLOW),
    case("a function of a file outside of the folder", harness(
         doc_to_text=..., include="../code.txt", more=lambda world: (world.write(
         "code.txt", "doc_to_text: !function own.code.f\n"))), "include: '../code.txt' lies outside of "),
    case("a Python object", harness(raw="metadata: !!python/object/apply:os.system ['touch code_was_run']\n"),
         "own.yaml", "YAML"),
    case("a Python name", harness(raw="metadata: !!python/name:os.system ''\n"), "own.yaml", "YAML"),
    case("a metric that is a script", harness(metric_list=[{"metric": "own/metric", **MEAN}], more=lambda world: (
         world.write("own/metric/metric.py", f"{MARK}\n"))), "metric_list[0].metric", ALLOW),
    case("a metric of another package", harness(metric_list=[{"metric": "acc", "hf_evaluate": True, **MEAN}]),
         "metric_list[0].metric", ALLOW),
    case("a library of prompts", harness(use_prompt="promptsource:*"), "use_prompt", ALLOW),
    case("a file of prompts", harness(use_prompt="own/prompts.yaml:a"), "use_prompt", ALLOW),
    case("a data set that is a script", harness(dataset_path="own/code.py"), "dataset_path", ALLOW),
    case("a data set that is a folder with a script", harness(dataset_path="own", dataset_kwargs=...,
         more=lambda world: world.write("own/own.py", f"{MARK}\n")), "dataset_path", ALLOW),
    case("a data set whose code is to be trusted", harness(
         dataset_path="owner/set", dataset_kwargs={"trust_remote_code": True}), "trust_remote_code", ALLOW),
    case("a data set of pickles", harness(dataset_path="pandas"), "dataset_path", ALLOW),
    case("a data set in a database", harness(dataset_path="sql", dataset_kwargs={"sql": "x", "con": "sqlite:///a"}),
         "dataset_kwargs", ALLOW),
    case("a cache in another place", harness(dataset_kwargs=TASK["dataset_kwargs"] | {"cache_dir": "cache"}),
         "cache_dir", ALLOW),
    case("code that the model writes", harness(unsafe_code=True), "unsafe_code", "not supported"),
    Case("code that is allowed where there is none", harness(
         more=lambda world: world.write("eval.yaml", {"tasks": [{"lm_eval": "own", "allow_code": True}]})),
         ("tasks[0].allow_code", "include_path")),
]  # fmt: skip


def data_is(content: str) -> Change:
    return harness(more=lambda world: world.write("own/data.jsonl", content))


BROKEN_DATA = [
    case("data that are no JSON", data_is("not json\n"), "JSON parse error"),
    case("data that end in the middle", data_is(json.dumps(DATA[0]) + '\n{"q": '), "JSON parse error"),
    case("data that are one number", data_is("1\n"), "cannot be loaded"),
    case("data that are nothing", data_is(""), "cannot be loaded"),
    case("data of two forms", data_is('{"q": 1}\n{"q": {"a": [1]}}\n'), "cannot be loaded"),
]

TEMPLATES = [
    case(f"the template {name}", harness(doc_to_text=template), *says, seconds=40.0)
    for name, template, *says in (
        ("that reaches the system", "{{ cycler.__init__.__globals__.os.system('touch code_was_run') }}", "unsafe"),
        ("that reaches all classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("that formats its way out", "{{ '{0.__class__.__init__.__globals__}'.format(q) }}", "unsafe"),
        ("that changes its record", "{{ choices.append('w7') }}{{ q }}", "unsafe"),
        ("without an end", "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "2 s"),
        ("of a long range", "{% for a in range(10**12) %}{{ a }}{% endfor %}", "range"),
        ("of a long text", "{{ 'x' * 10**10 }}", "MiB"),
        ("of a wide format", "{{ '%9999999999d' % 1 }}", ""),
        ("that powers", "{{ 10 ** (10 ** 10) }}", "it takes more than"),
        ("that doubles", "{% set n = namespace(t='x') %}{% for a in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
         "MiB"),
        ("that calls itself", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "Recursion"),
        ("of two million letters", "{{ 'w5 ' * 700000 }}", "characters"),
        ("that backtracks", "{{ ('w' * 40) | regex_replace('(w+w+)+!', '') }}", "2 s"),
        ("that includes a file", "{% include '/etc/passwd' %}", "failed"),
        ("of 5,000 brackets", "{{ " + "(" * 5000 + "q" + ")" * 5000 + " }}", "failed"),
        ("that is none", "{{ q", "failed"),
        ("of a field that is not there", "{{ nothing }}", "nothing"),
    )
] + [
    case("an endless choice", harness(doc_to_choice="{% for a in range(99999) %}{{ range(99999) | list | length }}"
         "{% endfor %}"), "2 s", seconds=40.0),
    case("an endless description", harness(description="{{ 'x' * 10**10 }}"), "MiB", seconds=40.0),
    case("an endless target", harness(GENERATION, doc_to_target="{{ 'x' * 10**10 }}"), "MiB", seconds=40.0),
    case("an endless beginning of answers", harness(GENERATION, gen_prefix="{{ 'x' * 10**10 }}"), "MiB", seconds=40.0),
]  # fmt: skip


def parquet(rows: int, **columns: Any) -> bytes:
    """A parquet file of equal rows."""
    arrays = {
        key: pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([value]))
        for key, value in columns.items()
    }
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(arrays), sink, store_schema=False)
    return bytes(sink.getvalue())


@changing
def problems(world: World, content: Callable[[], bytes]) -> None:
    """A search on the problems of a parquet file."""
    world.write("tasks.parquet", content())
    task = {"name": "text", "kind": "gsm", "source": "tasks.parquet", "max_new_tokens": 8}
    world.write("config.yaml", config(tasks=[task]))


def of_lists() -> bytes:
    """Thirty million numbers in three rows."""
    zeros = pyarrow.array([0] * 3 * 10**7, pyarrow.int8())
    lists = pyarrow.ListArray.from_arrays([0, 10**7, 2 * 10**7, 3 * 10**7], zeros)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"question": ["w4"] * 3, "answer": ["4"] * 3, "more": lists}), sink)
    return bytes(sink.getvalue())


def sparse(world: World) -> None:
    """A task file of 100 GB that takes no room, beside the world."""
    with open(world.root.parent / "sparse", "wb") as file:
        file.truncate(100 * 2**30)
    (world / "tasks.jsonl").unlink()
    (world / "tasks.jsonl").symlink_to(world.root.parent / "sparse")


DATA_FILES = [
    Case("ten million equal rows", problems(lambda: parquet(10**7, question="w4", answer="w5 #### 4")),
         ("tasks.parquet", "10,000,000 rows", "1,000,000")),
    Case("a text of 10 MB in a hundred thousand rows",
         problems(lambda: parquet(10**5, question="w4 " * 3_500_000, answer="4")), ("tasks.parquet", "bytes of text")),
    Case("thirty million numbers in three rows", problems(of_lists), ("tasks.parquet", "values")),
    Case("a task file of 100 GB", sparse, ("sparse", "bytes", "at most")),
    Case("two million lines", lambda world: world.write("tasks.jsonl", b"\n" * 2 * 10**6) and None,
         ("tasks.jsonl", "lines", "1,000,000")),
    Case("thirty million values in a line",
         lambda world: world.write("tasks.jsonl", b'{"prompt": [' + b"0," * 3 * 10**7 + b"0]}") and None,
         ("tasks.jsonl", "values")),
    case("data of lm-eval without an end", harness(dataset_kwargs={"data_files": {"test": "/dev/zero"}}), "regular"),
    case("a pipe as data of lm-eval", harness(dataset_kwargs={"data_files": {"test": "own/pipe"}},
         more=lambda world: os.mkfifo(world / "own/pipe")), "regular"),
    case("all files of the machine as data", harness(dataset_kwargs={"data_files": {"test": "/**/*"}}), "data_files"),
    case("data by another protocol", harness(dataset_kwargs={"data_files": {"test": "file:///etc/passwd"}}),
         "data_files"),
    case("data of lm-eval of ten million rows", harness(dataset_path="parquet", dataset_kwargs={
         "data_files": {"test": "own/data.parquet"}}, more=lambda world: world.write(
         "own/data.parquet", parquet(10**7, q="w4", gold="0"))), "10,000,000 rows"),
    case("data of lm-eval that unpack", harness(more=lambda world: world.write(
         "own/data.jsonl", b"\x1f\x8b\x08" + bytes(99))), "unpack"),
]  # fmt: skip

YAMLS = [
    case("a YAML that stands for a billion values", harness(raw="".join(
         f"k{n}: &k{n} [{', '.join([f'*k{n - 1}' if n else '1'] * 10)}]\n" for n in range(10))), "own.yaml", "values"),
    case("a YAML that merges without end", harness(raw="".join(
         f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}\n" if n else "m0: &m0 {a: 1}\n" for n in range(9))),
         "own.yaml", "values"),
    case("a YAML that includes itself", harness(include="own.yaml"), "own.yaml", "includes itself"),
    Case("a YAML that includes a device", harness(include="/dev/zero"), ("/dev/zero", "lies outside")),
    case("a YAML that includes a number", harness(include=7), "include", "7"),
    case("a pipe among the YAMLs", lambda world: (harness()(world), (world / "own/own.yaml").unlink(),
         os.mkfifo(world / "own/own.yaml"))[0], "own.yaml", "regular"),
    case("an expression that is written out to a billion", harness(GENERATION, filter_list=[{"name": "f", "filter": [
         {"function": "regex", "regex_pattern": "(((w{1000}){1000}){1000})"}, {"function": "take_first"}]}]),
         "regex_pattern", "repeats"),
    case("an expression to be left out that backtracks", harness(
         GENERATION, doc_to_target="{{ 'w' * 40 }}",
         metric_list=[{"metric": "exact_match", **MEAN, "regexes_to_ignore": ["(w+w+)+!"]}],
    ), "more than 2 s", seconds=60.0),
    case("an expression to be left out that is none", harness(GENERATION, metric_list=[{
         "metric": "exact_match", **MEAN, "regexes_to_ignore": ["["]}]), "regexes_to_ignore"),
    case("a filter that is not there", harness(filter_list=[{"name": "f", "filter": [{"function": "nothing"}]}]),
         "nothing", "filter"),
    case("filters that are a text", harness(filter_list="nothing"), "filter_list", "list"),
    case("a metric that is a number", harness(metric_list=[{"metric": 7}]), "metric_list[0].metric"),
    case("a billion repeats", harness(GENERATION, repeats=10**9), "repeats"),
    case("new tokens that are no number", harness(GENERATION, generation_kwargs={"until": ["w9"], "max_gen_toks": "x"}),
         "generation_kwargs"),
    case("stop texts that are a number", harness(GENERATION, generation_kwargs={"until": 5}), "until"),
    case("a data set that is a list", harness(dataset_path=["json"]), "dataset_path"),
]  # fmt: skip


@changing
def records(world: World, /, task: dict[str, Any], *lines: dict[str, Any], **changes: Any) -> tuple[str, ...]:
    """One model is evaluated on these records."""
    world.write("tasks.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    world.write("eval.yaml", {"tasks": [{"name": "text", "file": "tasks.jsonl"} | task | changes]})
    return EVALUATE


def one_token(world: World) -> tuple[str, ...]:
    """A tokenizer that cuts every text to its first token: no target would have one."""
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    world.edit("one/tokenizer.json", truncation=cut)
    return records({"kind": "likelihood"}, *SUMS)(world)


SUMS = [{"prompt": f"w4 w{n}", "target": str(n)} for n in range(5, 11)]
RECORDS = [
    Case("a right choice that is there twice", records(
         {"kind": "multiple_choice"}, {"prompt": "w4", "choices": ["w5", "w6", "w5"], "answer": 2}),
         ("tasks.jsonl:1", "choices", "'w5'", "twice")),
    Case("a right choice by its text that is there twice", records(
         {"kind": "multiple_choice"}, {"prompt": "w4", "choices": ["w5", "w5"], "answer": "w5"}),
         ("tasks.jsonl:1", "choices", "twice")),
    Case("a wrong choice that is there twice", records(
         {"kind": "multiple_choice"}, *({"prompt": f"w4 w{n}", "choices": ["w5", "w6", "w6"], "answer": 0}
         for n in range(7, 12))), ("warning: ", "tasks.jsonl:1", "5 of 5", "wrong choice twice"), status=0, seconds=30),
    Case("a question that is the same for all", records(
         {"kind": "exact_match", "max_new_tokens": 4}, *SUMS, prompt="What is the sum?"),
         ("tasks[0].prompt", "names no field", "{question}")),
    Case("braces that are meant as text", records({"kind": "exact_match", "max_new_tokens": 4}, *SUMS,
         prompt="{{prompt}}"), ("tasks[0].prompt", "names no field")),
    Case("a tokenizer that would cut texts, and is not asked to", one_token, status=0, seconds=30),
    Case("a beginning that is the same for all", records({"kind": "likelihood"}, *SUMS, prompt="w4"),
         ("warning: ", "tasks[0].prompt", "names no field"), status=0, seconds=30),
]  # fmt: skip

ENVIRONMENT = [
    Case(f"{name}={value[:40]}", lambda world: None, (name, *says), environment=((name, value),))
    for name, value, *says in (
        ("XLA_FLAGS", "--xla_there_is_no_such_flag=1", "xla_there_is_no_such_flag"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=many", "many"),
        ("XLA_FLAGS", "nonsense", "--"),
        ("XLA_FLAGS", "/dev/zero", "file"),
        ("JAX_PLATFORMS", "nonsense", "cpu"),
        ("JAX_PLATFORMS", "cpu,nonsense", "nonsense"),
    )
] + [
    Case(f"the other processes at {address[:40]}", lambda world: (*SEARCH, "--distributed"),
         ("--distributed", name), environment=(
             ("JAX_COORDINATOR_ADDRESS", address), ("JAX_NUM_PROCESSES", count), ("JAX_PROCESS_ID", process)))
    for address, count, process, name in (
        ("localhost", "2", "0", "JAX_COORDINATOR_ADDRESS"),
        ("localhost:99999999", "2", "0", "host:port"),
        ("localhost:0", "2", "0", "host:port"),
        (":1234", "2", "0", "host:port"),
        ("localhost:port", "2", "0", "host:port"),
        ("a host:1234", "2", "0", "host:port"),
        ("localhost:1234", "2", "2", "JAX_PROCESS_ID"),
        ("localhost:1235", "9" * 5000, "0", "JAX_NUM_PROCESSES"),
    )
]  # fmt: skip


def task_of(**changes: Any) -> Change:
    return lambda world: world.write("config.yaml", config(tasks=[{"name": "text"} | changes])) and None


NOBODY = "~nosuchuser/x"
NAMES = [
    Case("data of a user that there is not", task_of(kind="likelihood", file=NOBODY), ("tasks[0].file", NOBODY)),
    Case("a function of a user that there is not",
         task_of(kind="function", function=f"{NOBODY}.py:score", file="tasks.jsonl"), ("tasks[0].function", NOBODY)),
    Case("tasks of a user that there is not", task_of(lm_eval="own", include_path=NOBODY),
         ("tasks[0].include_path", NOBODY)),
    Case("a model of a user that there is not", lambda world: ("evaluate", NOBODY, "--tasks", "config.yaml"),
         (NOBODY,)),
    Case("a run of a user that there is not", lambda world: ("report", NOBODY), (NOBODY,)),
    Case("a cache of a user that there is not",
         lambda world: ("merge", "recipe.yaml", "out", "--transformers-cache", NOBODY, "--quiet"), status=0,
         leaves=("out",), seconds=60),
    Case("positions that float32 cannot divide", lambda world: [world.edit(
         f"{name}/config.json", rope_parameters={"rope_type": "linear", "factor": 1e-300, "rope_theta": 1e4})
         for name in ("base", "one", "two")] and None, ("config.json", "factor")),
    Case("modules of nothing", lambda world: world.write("recipe.yaml", {
         "merge_method": "linear", "modules": {}}) and MERGE, ("recipe.yaml", "modules")),
]  # fmt: skip

CASES = CODE + BROKEN_DATA + TEMPLATES + DATA_FILES + YAMLS + RECORDS + ENVIRONMENT + NAMES
