"""Addresses of judges, keys, and rubrics that nobody can judge by: refused before any model is loaded, and no key
shown."""

from collections.abc import Callable
from typing import Any

from hostile import Case, World, changing, config

Change = Callable[[World], Any]
KEY = "sk-0123456789abcdef"
ADDRESS = "http://127.0.0.1:9/v1"
EXPECTED = ("judge_address: expected http://", "the key stands in OPENAI_API_KEY")
PLAIN = ("would get the prompts, the answers and the key in plain text", "judge_insecure: true")


def judged(**changes: Any) -> Change:
    task = {"name": "taste", "kind": "human", "file": "tasks.jsonl", "judge_address": ADDRESS, "judge_model": "small"}
    return lambda world: world.write("config.yaml", config(tasks=[task | changes]))


def at(name: str, address: Any, *says: str, **changes: Any) -> Case:
    return Case(f"address: {name}", judged(judge_address=address, **changes), ("config.yaml: tasks[0]", *says))


def keyed(name: str, key: str) -> Case:
    says = ("error: OPENAI_API_KEY: holds white space, or characters that are not ASCII; expected a key",)
    return Case(f"key: {name}", judged(), says, environment=(("OPENAI_API_KEY", key),))


def ruled(name: str, *says: str, **changes: Any) -> Case:
    task = {"name": "polite", "kind": "rubric", "file": "tasks.jsonl", "judge": "one", "rubric": "{prompt} {response}"}
    return Case(f"rubric: {name}", lambda world: world.write("config.yaml", config(tasks=[task | changes])), says)


@changing
def broken_judge(world: World, file: str, content: bytes) -> None:
    """A rubric whose judge, a model of its own, has a broken file."""
    (world / "judge").mkdir()
    for source in (world / "one").iterdir():
        (world / "judge" / source.name).write_bytes(source.read_bytes())
    world.write(f"judge/{file}", content)
    task = {"name": "polite", "kind": "rubric", "file": "tasks.jsonl", "judge": "judge", "rubric": "{response}"}
    world.write("config.yaml", config(tasks=[task]))


CASES = [
    at("a user and a password", "https://ann:word@api.example/v1", *EXPECTED),
    at("a key as user", f"https://{KEY}@api.example/v1", *EXPECTED),
    at("a key in the query", f"https://api.example/v1?key={KEY}", *EXPECTED),
    at("a fragment", "https://api.example/v1#chat", *EXPECTED),
    at("a space in the path", "https://api.example/a b", *EXPECTED),
    at("a space behind the host", "https://api.example /v1", *EXPECTED),
    at("a line feed", "https://api.example/v1\nX: y", *EXPECTED),
    at("a tab", "https://api.example\t/v1", *EXPECTED),
    at("letters beyond ASCII", "https://api.exämple/v1", *EXPECTED),
    at("a turned direction of writing", "https://api.example/\u202ev1", *EXPECTED),
    at("no scheme", "api.example/v1", *EXPECTED),
    at("ftp", "ftp://api.example/v1", *EXPECTED),
    at("a file", "file:///etc/passwd", *EXPECTED),
    at("a data URI", "data:application/json,{}", *EXPECTED),
    at("no host", "https://", *EXPECTED),
    at("a port without a host", "https://:443/v1", *EXPECTED),
    at("an empty text", "", *EXPECTED),
    at("a port of a word", "https://api.example:https/v1", "Port could not be cast"),
    at("a port of a million", "https://api.example:1000000/v1", "Port out of range"),
    at("half an IPv6 address", "https://[::1/v1", "Invalid IPv6 URL"),
    at("a number", 8000, "judge_address: expected a text"),
    at("a list", [ADDRESS], "judge_address: expected a text"),
    at("plain text to another host", "http://api.example/v1", "api.example ", *PLAIN),
    at("plain text to an address in the house", "http://192.168.0.2:8000/v1", "192.168.0.2 ", *PLAIN),
    at("plain text to a name like this machine's", "http://127.0.0.1.example/v1", "127.0.0.1.example ", *PLAIN),
    at("plain text to localhost of another", "http://localhost.example/v1", "localhost.example ", *PLAIN),
    at("plain text to every interface", "http://0.0.0.0:8000/v1", "0.0.0.0 ", *PLAIN),
    at("plain text to this machine in one number", "http://2130706433/v1", "2130706433 ", *PLAIN),
    at("plain text, allowed by a text", "http://api.example/v1", "judge_insecure", judge_insecure="perhaps"),
    at("no model", ADDRESS, "judge_address: goes with judge_model", judge_model=None),
    at("a function beside it", ADDRESS, "judge: a function votes, or the model", judge="own.py:judge"),
    keyed("a line feed and a header", f"{KEY}\nX-Other: {KEY}"),
    keyed("a carriage return", f"{KEY}\r{KEY}"),
    keyed("a space", f"{KEY} {KEY}"),
    keyed("letters of Latin-1", f"{KEY}é"),
    keyed("letters beyond Latin-1", f"{KEY}€"),
    keyed("bytes that are no UTF-8", f"{KEY}\udcff"),
    keyed("a control character", f"{KEY}\x1b[31m"),
    ruled("no response in it", "rubric: does not name {response}", rubric="{prompt}"),
    ruled("a field that no record has", "no field 'question'", rubric="{question} {response}"),
    ruled("half a field", "config.yaml: tasks[0].rubric", rubric="{prompt {response}"),
    ruled("a field of an attribute", "config.yaml: tasks[0]", rubric="{response.__class__}"),
    ruled("a field by number", "config.yaml: tasks[0]", rubric="{0} {response}"),
    ruled("a number as rubric", "rubric: expected a text", rubric=1),
    ruled("equal verdicts", "good, bad: expected two different texts", good=" yes", bad=" yes"),
    ruled("a verdict of spaces", "good, bad: expected two different texts", good=" "),
    ruled("a judge that is nowhere", "tasks[0].judge", judge="./nowhere"),
    ruled("a judge that is a file", "tasks.jsonl", judge="./tasks.jsonl"),
    ruled("a judge above the root", "tasks[0].judge", judge="./../../../../../../nowhere"),
    Case("rubric: a judge whose config is cut", broken_judge("config.json", b'{"model_type"'), ("judge/config.json",)),
    Case("rubric: a judge whose weights are cut", broken_judge("model.safetensors", b"\xff" * 20),
         ("judge/model.safetensors",)),
    Case("rubric: a judge of another kind", broken_judge("config.json", b'{"model_type": "nothing"}'),
         ("judge/config.json",)),
]  # fmt: skip
