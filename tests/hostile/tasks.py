"""Hostile tasks: data files, templates, patterns, fitness functions, and what `evaluate` is told to do with them."""

import gzip
import json
import os
from collections.abc import Callable
from typing import Any

import yaml

from hostile import Case, World, changing, config, instead, link, together

LIKELIHOOD = {"name": "text", "kind": "likelihood", "file": "tasks.jsonl"}
EXACT = {"name": "text", "kind": "exact_match", "file": "tasks.jsonl", "max_new_tokens": 8}
GSM = {"name": "text", "kind": "gsm", "source": "tasks.jsonl", "max_new_tokens": 8}
FUNCTION = {
    "name": "text", "kind": "function", "function": "own.py:score", "inputs": "log_probabilities",
    "file": "tasks.jsonl",
}  # fmt: skip
GOOD = [{"prompt": f"w4 w{i}", "target": f"w{i + 1}"} for i in range(5, 11)]

Change = Callable[[World], Any]


def lines(*texts: str, behind: int = 2) -> Change:
    """A data file that ends with these lines."""
    begun = [json.dumps(record) for record in GOOD[:behind]]
    return lambda world: world.write("tasks.jsonl", "\n".join([*begun, *texts]) + "\n") and None


def data(content: bytes) -> Change:
    return lambda world: world.write("tasks.jsonl", content) and None


def task(given: dict[str, Any], **changes: Any) -> Change:
    return lambda world: world.write("config.yaml", config(tasks=[given | changes])) and None


def function(source: str, **changes: Any) -> Change:
    return together(task(FUNCTION, **changes), lambda world: world.write("own.py", source))


def body(text: str, **changes: Any) -> Change:
    """A fitness function of these lines."""
    inner = "".join(f"    {line}\n" for line in text.splitlines())
    return function(f"import os, signal, sys\n\n\ndef score(records, values):\n{inner}", **changes)


DEEP = '{"prompt": ' + "[" * 5000 + "]" * 5000 + ', "target": "w5"}'

FILES = [
    Case("no line at all", data(b""), ("tasks.jsonl", "no example")),
    Case("line feeds alone", data(b"\n" * 9), ("tasks.jsonl", "no example")),
    Case("a mark of UTF-8 alone", data(b"\xef\xbb\xbf"), ("tasks.jsonl", "no example")),
    Case("bytes of a picture", data(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9), ("tasks.jsonl", "UTF-8")),
    Case("UTF-16", data("\n".join(map(json.dumps, GOOD)).encode("utf-16")), ("tasks.jsonl", "UTF-8")),
    Case("half of a gzip file", data(gzip.compress(os.urandom(999))[:500]), ("tasks.jsonl", "gzip")),
    Case("a gzip file of more than any task", data(gzip.compress(bytes(2**20)) * 513), ("tasks.jsonl", "at most")),
    Case("zeros", data(bytes(4096)), ("tasks.jsonl:1", "JSON")),
    Case("a folder", instead("tasks.jsonl", os.mkdir), ("tasks.jsonl", "folder")),
    Case("a pipe that nobody writes to", instead("tasks.jsonl", os.mkfifo), ("tasks.jsonl", "regular file")),
    Case("a device without an end", instead("tasks.jsonl", link("/dev/zero")), ("zero", "regular file")),
    Case("a link to nowhere", instead("tasks.jsonl", link("nothing")), ("tasks.jsonl", "no such file")),
    Case("a name that no file can have", task(LIKELIHOOD, file="x" * 300), ("tasks[0].file", "255 bytes")),
    Case("a list of all records", data(json.dumps(GOOD).encode()), ("tasks.jsonl", "JSON array", "ends in .json")),
    Case("a document over several lines", data(json.dumps(GOOD[0], indent=1).encode()), ("tasks.jsonl:1", "JSON")),
    Case("a parquet file that is none", together(
        task(GSM, source="tasks.parquet"), lambda world: world.write("tasks.parquet", b"PAR1" + bytes(99) + b"PAR1"),
    ), ("tasks.parquet", "parquet")),
    Case("a pipe for parquet", together(
        task(GSM, source="tasks.parquet"), lambda world: os.mkfifo(world / "tasks.parquet"),
    ), ("tasks.parquet", "regular file")),
]  # fmt: skip


def third(name: str, line: str, *says: str) -> Case:
    """A third record that is wrong."""
    return Case(name, lines(line), ("tasks.jsonl:3", *says))


def first(name: str, given: Change, line: str, *says: str) -> Case:
    """A first record that is wrong, of a task."""
    return Case(name, together(given, lines(line, behind=0)), ("tasks.jsonl:1", *says))


CHOICE = task(LIKELIHOOD, kind="multiple_choice")
RECORDS = [
    third("a record nested too deep", DEEP, "nested"),
    third("a record nested half as deep", '{"prompt": "w4", "target": "w5", "more": ' + "[" * 500 + "]" * 500 + "}",
          "nested"),
    third("an integer of 5,000 digits", '{"prompt": "w4", "target": ' + "9" * 5000 + "}", "digits"),
    third("not a number as target", '{"prompt": "w4", "target": NaN}', "target", "nan"),
    third("infinity as target", '{"prompt": "w4", "target": 1e999}', "target", "inf"),
    third("a key twice", '{"prompt": "w4", "target": "w5", "target": "w6"}', "'target'", "twice"),
    third("half a surrogate pair in the prompt", r'{"prompt": "w4 \ud800", "target": "w5"}', "surrogate"),
    third("half a surrogate pair in the target", r'{"prompt": "w4", "target": "\udfff w5"}', "surrogate"),
    third("half a surrogate pair in a key", r'{"prompt": "w4", "target": "w5", "\udc00": 1}', "surrogate"),
    third("null as target", '{"prompt": "w4", "target": null}', "target", "null"),
    third("null as prompt", '{"prompt": null, "target": "w5"}', "prompt", "null"),
    third("a list as target", '{"prompt": "w4", "target": ["w5"]}', "target", "list"),
    third("an object as prompt", '{"prompt": {"a": "w4"}, "target": "w5"}', "prompt", "dict"),
    third("a raw line tabulation in a text", '{"prompt": "w4 \x0b w5", "target": "w5"}', "control character"),
    Case("U+2028 before a broken line", lines('{"prompt": "w4 \u2028 w5", "target": "w5"}', "{", behind=0),
         ("tasks.jsonl:2", "JSON")),
    third("a text of 20 MB", json.dumps({"prompt": "w4 " * 7_000_000, "target": "w5"}), "prompt", "characters"),
    first("choices that are a text", CHOICE, '{"prompt": "w4", "choices": "w5 w6", "answer": 0}', "choices", "list"),
    first("an answer far beyond the choices", CHOICE,
          '{"prompt": "w4", "choices": ["w5", "w6"], "answer": ' + "9" * 4000 + "}", "answer"),
    first("choices of nothing", CHOICE, '{"prompt": "w4", "choices": ["", "w6"], "answer": 0}', "choices"),
    Case("a white answer", together(task(EXACT), lines('{"prompt": "w4", "target": " "}')),
         ("tasks.jsonl:3", "target")),
    first("a problem whose number is null", task(GSM), '{"question": "w4", "answer": null, "answer_number": null}',
          "answer"),
    first("a problem whose number is a list", task(GSM), '{"question": "w4", "answer_number": [4]}', "answer_number"),
]  # fmt: skip

TEMPLATES = [
    Case(f"the template {template}", task(LIKELIHOOD, prompt=template), ("config.yaml: tasks[0].prompt", "field"))
    for template in (
        "{prompt:>1000000000}", "{prompt.__class__}", "{prompt.__class__.__mro__}", "{0}", "{}", "{prompt!r}",
        "{prompt!s:>9}", "{prompt:{target}}", "{prompt", "prompt}", "{prompt}}", "{[prompt]}", "{prompt[}",
    )
] + [
    Case("a letter of a text", task(LIKELIHOOD, prompt="{prompt[0]}"), ("tasks.jsonl:1", "prompt[0]")),
    Case("a template of a target", task(LIKELIHOOD, target="{target:>99999999999}"), ("tasks[0].target", "field")),
    Case("half a character in a template", lambda world: world.write("config.yaml", yaml.safe_dump(
        config(tasks=[LIKELIHOOD | {"prompt": "HALF {prompt}"}])).replace("HALF", r'"\uD800"').replace('""', '"'),
    ) and None, ("config.yaml",)),
    Case("a template of a fitness function", function("def score(records, values): ...", prompt="{prompt.x}"),
         ("tasks[0].prompt", "field")),
]  # fmt: skip

SLOW = r"(.*?w){25}P"
PATTERNS = [
    Case("a pattern that backtracks for ever", task(EXACT, pattern=SLOW, max_new_tokens=64),
         ("config.yaml: tasks[0]: pattern", repr(SLOW), "more than")),
    Case("a pattern of a problem that backtracks for ever", together(
        task(GSM, pattern=SLOW, max_new_tokens=64),
        lambda world: world.write("tasks.jsonl", "".join(
            json.dumps({"question": "w5 w6 " * 20 + f"w{i}", "answer": f"w4 #### {i}"}) + "\n" for i in range(4, 9)
        )) and None,
    ), ("config.yaml: tasks[0]: pattern", repr(SLOW), "more than")),
    Case("a pattern that is slow on outputs alone", together(
        task(EXACT, pattern=SLOW, max_new_tokens=200),
        lines(*(json.dumps({"prompt": "w5", "target": str(i)}) for i in range(8)), behind=0),
    ), ("task text: pattern", repr(SLOW), "more than"), leaves=("run",), seconds=60, lines=2),
    Case("an empty pattern", task(EXACT, pattern=""), ("tasks[0]", "pattern", "empty")),
    Case("a pattern of 3,000 groups", task(EXACT, pattern="(" * 3000 + ")" * 3000), ("tasks[0]", "pattern", "deep")),
    Case("a pattern that is written out to a billion", task(EXACT, pattern="(((w{1000}){1000}){1000})"),
         ("tasks[0]", "pattern", "repeats")),
    Case("a pattern that repeats too often", task(EXACT, pattern="w{99999999999}"), ("tasks[0]", "pattern", "large")),
    Case("a pattern of a million letters", task(EXACT, pattern="w" * 10**6), ("tasks[0]", "pattern", "characters")),
    Case("markup that is no pattern", task(EXACT, pattern="[/INST"), ("tasks[0]", "pattern", "'[/INST'")),
    Case("a text of no length that ends outputs", task(EXACT, stop=["w5", ""]), ("tasks[0].stop[1]", "empty")),
    Case("an empty stop text of a problem", together(
        task(GSM, stop=[""]), lines('{"question": "w4", "answer": "w5 #### 4"}', behind=0),
    ), ("tasks[0].stop[0]", "empty")),
    Case("an empty stop text of a fitness function",
         function("def score(records, values): ...", inputs="texts", stop=[""]), ("tasks[0].stop[0]", "empty")),
    Case("answers without a number and no pattern", together(
        task(EXACT), lines('{"prompt": "w4", "target": "yes"}', '{"prompt": "w5", "target": "no"}', behind=0),
    ), ("tasks[0].pattern", "number")),
]  # fmt: skip

LEAVES = ("__pycache__",)


@changing
def scored_by(world: World, change: Change) -> tuple[str, ...]:
    """One model is evaluated with the task of the config."""
    change(world)
    tasks = yaml.safe_load((world / "config.yaml").read_text())["tasks"]
    world.write("eval.yaml", {"tasks": tasks})
    return ("evaluate", "one", "--tasks", "eval.yaml")


RETURN = "return [0.5] * len(records)"
FUNCTIONS = [
    Case(f"a fitness that does {text!r}", scored_by(body(f"{text}\n{RETURN}")),
         ("Traceback", f"own.py\", line 5, in score\n    {text}", "own.py:score", said),
         status=1, leaves=LEAVES, seconds=30)
    for text, said in (
        ("sys.exit(0)", "SystemExit: 0"), ("os._exit(0)", "os._exit(0)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    )
] + [
    Case(f"a fitness of logits that does {text!r}", function(
        f"import os, sys\n\n\ndef score(logits, targets, mask):\n    {text}\n", inputs="logits",
    ), ("Traceback", "own.py:score", text), status=1, leaves=LEAVES, seconds=30)
    for text in ("sys.exit(0)", "os._exit(0)")
] + [
    Case(f"a module that does {text!r}", function(f"import os, sys\n\n{text}\n\n\ndef score(records, values): ...\n"),
         ("config.yaml: tasks[0].function", "line 3", said), leaves=LEAVES)
    for text, said in (
        ("sys.exit(0)", "SystemExit: 0"), ("os._exit(0)", "os._exit(0)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("exit()", "SystemExit"), ("os.execlp('true', 'true')", "os.execv"),
    )
] + [
    Case("a fitness that ends a search", body("os._exit(0)"), ("Traceback", "own.py", "os._exit(0)"), status=1,
         leaves=("run", *LEAVES), seconds=30),
    Case("a fitness that is interrupted", scored_by(body("os.kill(os.getpid(), signal.SIGINT)\n" + RETURN)),
         ("interrupted",), status=130, leaves=LEAVES, seconds=30),
]  # fmt: skip


@changing
def evaluation(
    world: World, *arguments: str, tasks: Any = None, change: Change = lambda world: None
) -> tuple[str, ...]:
    world.write("eval.yaml", {"tasks": [LIKELIHOOD] if tasks is None else tasks})
    change(world)
    return ("evaluate", *arguments, "--tasks", "eval.yaml")


def cut(world: World) -> None:
    path = world / "two" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


EVALUATIONS = [
    Case("scores into a folder that is not there", evaluation("one", "--json", "no/where.json"),
         ("no/where.json", "--json", "No such file")),
    Case("scores in a folder's place", evaluation("one", "--json", "two"), ("two", "--json")),
    Case("scores in a model's place", evaluation("one", "--json", "one/config.json"), ("one/config.json", "--json")),
    Case("scores in the tasks' place", evaluation("one", "--json", "eval.yaml"), ("eval.yaml", "--json")),
    Case("samples in a model's place", evaluation("one", "--samples", "one/config.json"),
         ("one/config.json", "--samples")),
    Case("samples in the tasks' place", evaluation("one", "--samples", "eval.yaml"), ("eval.yaml", "--samples")),
    Case("samples in the scores' place", evaluation("one", "--json", "x.json", "--samples", "./x.json"),
         ("x.json", "--samples", "--json")),
    Case("scores below a file", evaluation("one", "--json", "eval.yaml/scores"), ("--json", "Not a directory")),
    Case("scores of a name too long", evaluation("one", "--json", "x" * 255), ("--json", "too long")),
    Case("a second model that is cut", evaluation("one", "two", change=cut), ("two", "truncated")),
    Case("a third model that is not there", evaluation("one", "two", "./three"), ("three", "no such folder")),
    Case("a second model without a tokenizer", evaluation("one", "two", change=lambda world: [
        path.unlink() for path in (world / "two").glob("tokenizer*")]), ("two", "tokenizer"), seconds=30),
    Case("a second model whose context is too short", evaluation("one", "two", change=lambda world: world.edit(
        "two/config.json", max_position_embeddings=4)), ("tasks.jsonl", "context"), seconds=30),
    Case("two tasks of one name", evaluation("one", tasks=[LIKELIHOOD, LIKELIHOOD | {"delimiter": "\n"}]),
         ("eval.yaml", "names", "'text'")),
    Case("a bank over seven devices", lambda world: world.write(
        "config.yaml", config(evaluation={"model": 7})) and None, ("config.yaml", "evaluation.model", "7")),
]  # fmt: skip

DATA = [
    Case("held-out examples that are those of the search", task(LIKELIHOOD, heldout="tasks.jsonl"),
         ("warning: config.yaml: tasks[0].heldout: 12 of the 12",), status=0, leaves=("run",), seconds=60),
    Case("examples that stand more than once", evaluation("one", change=lines(*[json.dumps(GOOD[0])] * 3)),
         ("warning: eval.yaml: tasks[0]: 3 of 5 examples repeat", "tasks.jsonl:3"), status=0, seconds=30),
    Case("names that look like markup", evaluation(
        "[bold]one", tasks=[LIKELIHOOD | {"name": "[/INST] [red] |"}],
        change=lambda world: (world / "one").rename(world / "[bold]one"),
    ), status=0, seconds=30),
    Case("names that look like formulas and markup", together(
        lambda world: (world / "[").mkdir(), lambda world: (world / "one").rename(world / "[" / "INST] $_{ ^$"),
        lambda world: world.edit("config.yaml", parents=["[/INST] $_{ ^$", "two"]),
    ), status=0, leaves=("run",), seconds=60),
    Case("a pattern that looks like markup and is never found",
         scored_by(task(EXACT, pattern=r"\[/INST\](?:.*)[/bold]")), status=0, leaves=("eval.yaml",), seconds=30),
]  # fmt: skip

CASES: list[Case] = [*FILES, *RECORDS, *TEMPLATES, *PATTERNS, *FUNCTIONS, *EVALUATIONS, *DATA]
