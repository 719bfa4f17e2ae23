"""Hostile tokenizers: code that they bring along, chat templates, damaged files, and tokens that models do not have."""

import json
import os
from collections.abc import Callable
from typing import Any

from hostile import MERGE, SEARCH, Case, World, changing, config, everywhere, instead, recipe

MODELS = ("base", "one", "two")
EVALUATE = ("evaluate", "base", "--tasks", "config.yaml")
MARK = "code-ran"
CODE = f"""
Path({MARK!r}).touch()
from transformers import PreTrainedTokenizerFast
class MyTokenizer(PreTrainedTokenizerFast):
    pass
"""


@changing
def custom_code(world: World, /, keep: bool, **settings: Any) -> None:
    """Tokenizers that want a class of their own, with its file. keep: they have a tokenizer.json as well."""
    for model in MODELS:
        world.edit(f"{model}/tokenizer_config.json", **settings)
        world.write(f"{model}/my_tokenizer.py", CODE)
        if not keep:
            (world / f"{model}/tokenizer.json").rename(world / f"{model}/vocab.json")


@changing
def all_files(world: World, name: str, content: bytes) -> None:
    for model in MODELS:
        world.write(f"{model}/{name}", content)


@changing
def settings(world: World, /, **changes: Any) -> None:
    for model in MODELS:
        world.edit(f"{model}/tokenizer_config.json", **changes)


@changing
def tokenizer(world: World, edit: Callable[[dict[str, Any]], Any]) -> None:
    """All models' tokenizer.json, edited in place."""
    for model in MODELS:
        document = json.loads((world / f"{model}/tokenizer.json").read_text())
        edit(document)
        world.write(f"{model}/tokenizer.json", json.dumps(document))


@changing
def template(world: World, text: str) -> None:
    """A search whose prompts go through this chat template."""
    settings(chat_template=text)(world)
    records = [{"question": f"w{i} w{i + 1}", "answer": f"w5 #### {i}"} for i in range(8)]
    world.write("problems.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    task = {
        "name": "chat", "kind": "gsm", "source": "problems.jsonl", "apply_chat_template": True,
        "max_new_tokens": 4,
    }  # fmt: skip
    world.write("config.yaml", config(tasks=[task]))


def merged_template(text: str) -> Callable[[World], None]:
    return lambda world: world.write("recipe.yaml", recipe(chat_template=text)) and None


def beyond(document: dict[str, Any]) -> None:
    """The examples' words, numbered from beyond the embedding."""
    vocabulary = document["model"]["vocab"]
    for token, number in vocabulary.items():
        if token.startswith("w"):
            vocabulary[token] = number + 1000


@changing
def added(document: dict[str, Any], count: int, content: str = "<extra_{}>") -> None:
    """Tokens that a trainer added without a row for them."""
    first = len(document["model"]["vocab"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    document["added_tokens"] += [
        {"id": first + i, "content": content.format(i), **flags} for i in range(count)
    ]  # fmt: skip


def without_unknown(document: dict[str, Any]) -> None:
    """No token for unknown words, and examples of words that it does not know."""
    document["model"]["unk_token"] = "<nothing>"
    for number in range(10, 64):
        document["model"]["vocab"].pop(f"w{number}")


def unknown_words(world: World) -> None:
    record = {"prompt": "colourless green ideas", "target": "sleep"}
    world.write("tasks.jsonl", "".join(json.dumps(record) + "\n" for _ in range(8)))


def no_tokenizer(world: World) -> None:
    for model in MODELS:
        for file in (world / model).glob("*token*"):
            file.unlink()


def sentencepiece(world: World) -> None:
    no_tokenizer(world)
    all_files("tokenizer.model", b"\0" * 99)(world)


def pickled(world: World) -> None:
    """A pickle that makes a file when it is read."""
    no_tokenizer(world)
    for model in MODELS:
        content = f"cpathlib\nPath\n(S'{MARK}'\ntRp0\n0cbuiltins\ngetattr\n(g0\nS'touch'\ntR(tR."
        world.write(f"{model}/vocab.txt", content)
        world.write(f"{model}/tokenizer_config.json", '{"tokenizer_class": "TransfoXLTokenizer"}')


def code_and_template(world: World) -> None:
    """The tokenizer would have to be written anew."""
    custom_code(False, **MINE)(world)
    world.write("recipe.yaml", recipe(chat_template="chatml"))


MINE = {"auto_map": {"AutoTokenizer": ["my_tokenizer.MyTokenizer", None]}, "tokenizer_class": "MyTokenizer"}
THEIRS = {"auto_map": {"AutoTokenizer": [None, "somebody/repo--my_tokenizer.MyTokenizer"]}, "tokenizer_class": "Mine"}
CODE_NAMED = ("tokenizer_config.json: ", "auto_map", "my_tokenizer.MyTokenizer", "custom code")
RUN = ("run",)

CUSTOM_CODE = [
    Case("code, with a yes on standard input", custom_code(False, **MINE), CODE_NAMED, stdin="y\ny\ny\n"),
    Case("code, evaluated", custom_code(False, **MINE), CODE_NAMED, EVALUATE, stdin="y\n" * 9),
    Case("code, merged", custom_code(False, **MINE), (), MERGE, status=0, leaves=("out",), lines=0),
    Case("code, merged with a template", code_and_template, CODE_NAMED, MERGE),
    Case("code of another repository", custom_code(False, **THEIRS), CODE_NAMED, stdin="y\ny\ny\n"),
    Case("code in the old form", custom_code(False, auto_map=["my_tokenizer.MyTokenizer", None]), CODE_NAMED),
    Case("code that is not needed", custom_code(True, **MINE), (), EVALUATE, 0, lines=0, stdin="y\n" * 9),
    Case("auto_map that is a number", custom_code(True, auto_map=7), (), EVALUATE, 0, lines=0),
    Case("auto_map that is a text", custom_code(False, auto_map="my_tokenizer.MyTokenizer"), CODE_NAMED),
    Case("a pickle for a vocabulary", pickled, ("tokenizer cannot be loaded",)),
]

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
IN_RECIPE = ("recipe.yaml: chat_template", "Jinja")
FAILED = ("task chat: ", "chat template failed")
TEMPLATES = [
    Case("a template of a gigabyte", template("{{ 'a' * 10**9 }}"), FAILED),
    Case("a template of twenty megabytes", template("{{ 'a' * (2 * 10**7) }}"), (*FAILED, "20,000,000 characters")),
    Case("a template of ten gigabytes by a format", template("{{ '{:>10000000000}'.format(1) }}"), FAILED),
    Case("a template that loops", template(LOOP), (*FAILED, "more than 2 s")),
    Case("a template that loops and writes", template(LOOP.replace("{% endfor", "x{% endfor", 1)), FAILED),
    Case("a template that loops for some", template("{% if 'w7' in messages[0].content %}" + LOOP + "{% endif %}"),
         FAILED),
    Case("a template of a long range", template("{% for i in range(10**9) %}{% endfor %}"), FAILED),
    Case("a template that counts", template("{{ (9 ** (9 ** 9)) % 7 }}"), FAILED),
    Case("a template that calls itself", template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), FAILED),
    Case("a template that looks inside", template("{{ messages.__class__.__mro__[1].__subclasses__() }}"), FAILED),
    Case("a template that looks inside, by a filter", template("{{ (messages | attr('__class__')).mro() }}"), FAILED),
    Case("a template with an error", template("{% if %}"), FAILED),
    Case("a template that is cut", template("{% for m in messages %}{{ m.content"), FAILED),
    Case("a template of unknown names", template("{{ conversation.turns[0].text }}"), (*FAILED, "conversation")),
    Case("a template that refuses", template("{{ raise_exception('no\n\x1b[31muser') }}"), (*FAILED, "no ?[31muser")),
    Case("a template that includes", template("{% include '/etc/passwd' %}"), FAILED),
    Case("a template that nests deep", template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"), FAILED),
    Case("a template that is a list", settings(chat_template=[7]), ("tokenizer",)),
    Case("a recipe's template with an error", merged_template("{% if %}"), IN_RECIPE, MERGE),
    Case("a recipe's template that is cut", merged_template("{{ messages"), IN_RECIPE, MERGE),
    Case("a recipe's template of other tags", merged_template("{% run x %}"), IN_RECIPE, MERGE),
]  # fmt: skip

NOT_LOADED = ("its tokenizer cannot be loaded",)
FILES = [
    Case("garbage", all_files("tokenizer.json", b"\0\1garbage" * 99), NOT_LOADED),
    Case("garbage in one", lambda world: world.write("one/tokenizer.json", b"\0garbage") and None, NOT_LOADED, MERGE),
    Case("a list", all_files("tokenizer.json", b"[]"), NOT_LOADED),
    Case("null", all_files("tokenizer.json", b"null"), NOT_LOADED),
    Case("an empty object", all_files("tokenizer.json", b"{}"), NOT_LOADED),
    Case("an empty file", all_files("tokenizer.json", b""), NOT_LOADED),
    Case("a cut file", all_files("tokenizer.json", b'{"version": "1.0", "model": {"type": "Wor'), NOT_LOADED),
    Case("a file that nests deep", all_files("tokenizer.json", b"[" * 10**6), NOT_LOADED),
    *(
        Case(f"a pipe{what}", instead("one/tokenizer.json", os.mkfifo), ("one/tokenizer.json: ", "is no regular file"),
             command)
        for what, command in (("", SEARCH), (", merged", MERGE))
    ),
    Case("no tokenizer", no_tokenizer, ("has no tokenizer",)),
    Case("a sentencepiece model of garbage", sentencepiece, NOT_LOADED),
    Case("an unknown model", tokenizer(lambda document: document["model"].update(type="Magic")), NOT_LOADED),
    Case("numbers that are texts", tokenizer(lambda document: document["model"]["vocab"].update(w5="5")), NOT_LOADED),
    Case("negative numbers", tokenizer(lambda document: document["model"]["vocab"].update(w5=-5)), NOT_LOADED),
    Case("settings that are a list", all_files("tokenizer_config.json", b"[]"), ("tokenizer_config.json: ",)),
    Case("settings of garbage", all_files("tokenizer_config.json", b"garbage"), ("tokenizer_config.json: ",)),
    Case("settings that are null", all_files("tokenizer_config.json", b"null"), ("tokenizer_config.json: ",)),
    Case("settings that nest deep", all_files("tokenizer_config.json", b"[" * 10**6), ("tokenizer_config.json: ",)),
    Case("a class that is a number", settings(tokenizer_class=7), ("tokenizer",)),
    Case("an eos that is a number", settings(eos_token=7), ("tokenizer",)),
    Case("special tokens that are a list", all_files("special_tokens_map.json", b"[]"), ("special_tokens_map.json: ",)),
    Case("added tokens that are a text", all_files("added_tokens.json", b'"x"'), ("added_tokens.json: ",)),
    Case("no token for unknown words", tokenizer(without_unknown), ("its tokenizer fails on",)),
    Case("no token for unknown words, evaluated", tokenizer(without_unknown), ("its tokenizer fails on",), EVALUATE),
]  # fmt: skip

DOUBLED = {"type": "Replace", "pattern": {"String": "w"}, "content": "ww"}
FORTY = {
    "normalizer": {"type": "Sequence", "normalizers": [DOUBLED] * 40},
    "decoder": {"type": "Sequence", "decoders": [DOUBLED | {"pattern": {"Regex": "w"}}] * 40},
}
GROWING = [
    Case(f"a {part} that doubles forty times{what}", tokenizer(lambda document, part=part: document.update(
        {part: FORTY[part]})), ("its tokenizer may make a text 1.1e+12 times as long",), command)
    for part in FORTY for what, command in (("", SEARCH), (", evaluated", EVALUATE))
]  # fmt: skip


@changing
def united(world: World) -> None:
    """The recipe of a union of tokens, of which one of `two` has a number that no row has."""
    document = json.loads((world / "two/tokenizer.json").read_text())
    document["model"]["vocab"]["w5"] = 4 * 10**9
    world.write("two/tokenizer.json", json.dumps(document))
    world.edit("recipe.yaml", tokenizer_source="union")


TOKENS = [
    Case("a key of the config that its class cannot set", everywhere(use_return_dict=True), NOT_LOADED, EVALUATE),
    Case("a number of 4,000,000,000, united", united(), ("/two: ", "'w5'", "4,000,000,000"), MERGE),
    Case("tokens beyond the embedding", tokenizer(beyond), ("tasks.jsonl:1: ", "embedding 64 rows")),
    Case("tokens beyond the embedding, evaluated", tokenizer(beyond), ("tasks.jsonl:1: ", "64 rows"), EVALUATE),
    Case("a number of 2^32 - 1", tokenizer(lambda document: document["model"]["vocab"].update(w5=2**32 - 1)), ("w5",)),
    Case("tokens beyond that no text holds", tokenizer(added(3)), ("3 tokens (such as '<extra_0>')",), EVALUATE, 0),
    Case("an eos beyond", settings(eos_token="<the end>"), ("1 tokens (such as '<the end>')",), EVALUATE, 0),
    Case("a name with colours", tokenizer(added(1, "a\n\x1b[31m\0b")), (r"'a\n\x1b[31m\x00b'",), EVALUATE, 0),
    Case("unknown words", unknown_words, ("100% of", "'<unk>'", "tasks.jsonl:1"), EVALUATE, 0),
]  # fmt: skip
CASES = CUSTOM_CODE + TEMPLATES + FILES + GROWING + TOKENS
