"""Tasks of chats that cannot be had: templates that fail, fields that hold no conversation, examples that are missing,
and files of examples in other formats."""

import json
from collections.abc import Callable
from typing import Any

from hostile import Case, World, changing, config, together

LIKELIHOOD = {"name": "text", "kind": "likelihood", "file": "tasks.jsonl", "apply_chat_template": True}
TALK = LIKELIHOOD | {"messages": "talk"}
EXACT = {"name": "text", "kind": "exact_match", "file": "tasks.jsonl", "max_new_tokens": 8}
GENERATION = EXACT | {"kind": "generation"}
TEMPLATE = "{% for m in messages %}w{{ 10 + m.role | length }} {{ m.content }} {% endfor %}"
MODELS = ("base", "one", "two")
KEY = "config.yaml: tasks[0].apply_chat_template"

Change = Callable[[World], Any]


@changing
def chat(
    world: World, /, task: dict[str, Any], template: str = TEMPLATE, models: tuple[str, ...] = MODELS, **changes: Any
) -> None:
    """A search with the task; these models have the chat template."""
    world.write("config.yaml", config(tasks=[task | changes]))
    for model in models:
        world.write(f"{model}/chat_template.jinja", template)


def records(*records: Any, name: str = "tasks.jsonl") -> Change:
    return lambda world: world.write(name, "".join(json.dumps(record) + "\n" for record in records)) and None


def talk(*turns: Any) -> Change:
    """Two records of conversations, of which the first has these turns."""
    good = [{"role": "user", "content": "w5"}]
    return records({"talk": list(turns), "target": "w6"}, {"talk": good, "target": "w7"})


@changing
def evaluation(world: World, task: dict[str, Any], template: str) -> tuple[str, ...]:
    world.write("one/chat_template.jinja", template)
    world.write("eval.yaml", {"tasks": [task]})
    return ("evaluate", "one", "--tasks", "eval.yaml")


SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE
TEMPLATES = [
    Case("a template that refuses the first record", chat(LIKELIHOOD, "{{ raise_exception('users only') }}"),
         ("tasks.jsonl:", KEY, "base failed (users only)")),
    Case("a template that is none", chat(LIKELIHOOD, "{% for %}"), ("tasks.jsonl:", KEY, "failed")),
    Case("a template that calls what is not there", chat(LIKELIHOOD, "{{ cycle(messages) }}"),
         ("tasks.jsonl:", KEY, "'cycle' is undefined")),
    Case("a template that opens a file", chat(LIKELIHOOD, "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
         ("tasks.jsonl:", KEY, "failed")),
    Case("a template without an end", chat(
        LIKELIHOOD, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ), ("tasks.jsonl:", KEY, "more than 2 s"), seconds=20),
    Case("a template that writes nothing", chat(EXACT, "", apply_chat_template=True), (KEY, "no chat template")),
    Case("a template that writes white space", chat(EXACT, "{{ ' ' }}", apply_chat_template=True, pattern=".+"),
         ("tasks.jsonl:", "prompt: has no token")),
    Case("a template of no model", chat(LIKELIHOOD, models=()), (KEY, "/base has no chat template; leave the key out")),
    Case("a template of one parent", chat(LIKELIHOOD, models=("two",)),
         (KEY, "/base has no chat template", "tokenizer_source", "/two)")),
    Case("a template of a name that is not there", chat(LIKELIHOOD, apply_chat_template="thinking"),
         (KEY, "no chat template 'thinking'; expected one of default")),
    Case("a number as a template's name", chat(LIKELIHOOD, apply_chat_template=[1]),
         ("tasks[0].apply_chat_template", "true, false, or the name of a chat template")),
    Case("a system turn that the template refuses", chat(LIKELIHOOD, SYSTEM, system_instruction="w5"),
         ("config.yaml: tasks[0].system_instruction", "refuses a system turn (no system here)")),
    Case("a system turn that the template leaves out", chat(
        LIKELIHOOD, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        system_instruction="w5 w5",
    ), ("config.yaml: tasks[0].system_instruction", "leaves a system turn out")),
    Case("a record's system turn that the template refuses", together(
        chat(TALK, SYSTEM), talk({"role": "system", "content": "w5"}, {"role": "user", "content": "w6"}),
    ), ("tasks.jsonl:1", "refuses a system turn (no system here)")),
    Case("a template that an evaluated model lacks", evaluation(LIKELIHOOD, ""),
         ("eval.yaml: tasks[0].apply_chat_template", "/one has no chat template")),
    Case("variables that the program sets", chat(LIKELIHOOD, chat_template_kwargs={"add_generation_prompt": False}),
         ("tasks[0]", "chat_template_kwargs", "add_generation_prompt")),
    Case("variables that are a text", chat(LIKELIHOOD, chat_template_kwargs="enable_thinking"),
         ("tasks[0].chat_template_kwargs", "mapping")),
    Case("a variable that breaks the template", chat(
        LIKELIHOOD, "{{ messages[0].content * times }}", chat_template_kwargs={"times": {"a": 1}},
    ), ("tasks.jsonl:", KEY, "TypeError")),
]  # fmt: skip

MESSAGES = [
    Case("a field of turns that is not there", chat(TALK), ("tasks.jsonl:1", "'talk'", "tasks[0].messages")),
    *(
        Case(f"turns that are {value!r}", together(chat(TALK), records({"talk": value, "target": "w5"})),
             ("tasks.jsonl:1", "talk", "expected a list of turns"))
        for value in (None, "w5", [], {"role": "user", "content": "w5"}, 3)
    ),
    *(
        Case(f"a turn that is {value!r}", together(chat(TALK), talk(value)),
             ("tasks.jsonl:1", "talk[0]", "expected a list of turns"))
        for value in ("w5", {}, {"role": "user"}, {"role": 1, "content": "w5"}, {"role": "user", "content": ["w5"]})
    ),
    Case("a conversation of the assistant alone", together(chat(TALK), talk({"role": "assistant", "content": "w5"})),
         ("tasks.jsonl:1", "assistant's turn alone")),
    Case("an answer of choices", together(
        chat(TALK, kind="multiple_choice"),
        talk({"role": "user", "content": "w5"}, {"role": "assistant", "content": "w5"}),
    ), ("tasks.jsonl:1", "the choices answer")),
    Case("turns without a template", chat(TALK, apply_chat_template=False), ("tasks[0]", "messages", "chat")),
    Case("a system's turn without a template",
         chat(LIKELIHOOD, apply_chat_template=False, system_instruction="w5"), ("tasks[0]", "system_instruction")),
    Case("two system turns", together(
        chat(TALK, system_instruction="w5"),
        talk({"role": "system", "content": "w5"}, {"role": "user", "content": "w6"}),
    ), ("tasks.jsonl:1", "tasks[0].system_instruction", "of its own")),
]  # fmt: skip

SHOWN = [
    Case("more shown examples than there are", chat(LIKELIHOOD, num_fewshot=13),
         ("tasks[0].num_fewshot", "13", "has only 12")),
    Case("all examples shown", chat(LIKELIHOOD, num_fewshot=12), ("tasks[0].num_fewshot", "leaves no example")),
    Case("fewer examples than are asked for", together(
        chat(LIKELIHOOD, num_fewshot=2, fewshot_source="shown.jsonl"),
        records({"prompt": "w4", "target": "w5"}, name="shown.jsonl"),
    ), ("tasks[0].num_fewshot", "2", "shown.jsonl has only 1")),
    Case("a shown example that does not fit", together(
        chat(LIKELIHOOD, num_fewshot=1, fewshot_source="shown.jsonl"), records({"prompt": "w4"}, name="shown.jsonl"),
    ), ("shown.jsonl:1", "target")),
    Case("a file of shown examples that is not there", chat(LIKELIHOOD, num_fewshot=1, fewshot_source="shown.jsonl"),
         ("tasks[0].fewshot_source", "no such file")),
    Case("a source of examples that nobody is shown", chat(LIKELIHOOD, fewshot_source="tasks.jsonl"),
         ("tasks[0]", "fewshot_source", "num_fewshot")),
    Case("a negative number of shown examples", chat(LIKELIHOOD, num_fewshot=-1), ("tasks[0].num_fewshot", "0")),
]  # fmt: skip

TARGETS = [
    Case("a pattern that cuts the targets", together(
        chat(EXACT, pattern=r"^ ?(\w+)\."),
        records({"prompt": "w4", "target": "w5."}, {"prompt": "w5", "target": "w6."}),
    ), ("config.yaml: tasks[0].pattern", r"(\\w+)", "tasks.jsonl:1", "'w5'", "'w5.'")),
    Case("a pattern that cuts a compared text", together(
        chat(GENERATION, pattern=r"w\d"), records({"prompt": "w4", "target": "w15"}, {"prompt": "w5", "target": "w6"}),
    ), ("config.yaml: tasks[0].pattern", "tasks.jsonl:1", "'w1'", "'w15'")),
    Case("a target that is no expression", together(
        chat(GENERATION, metric="regex"), records({"prompt": "w4", "target": "w5"}, {"prompt": "w5", "target": "(w6"}),
    ), ("tasks.jsonl:2", "'(w6'", "regular expression")),
    Case("a target that is no JSON", together(
        chat(GENERATION, metric="json"),
        records({"prompt": "w4", "target": {"a": 1}}, {"prompt": "w5", "target": "w6"}),
    ), ("tasks.jsonl:2", "not valid JSON")),
    Case("a metric of no name", chat(GENERATION, metric="rouge"), ("tasks[0].metric", "rouge_l")),
    Case("a metric of another kind", chat(EXACT, metric="acc_norm"), ("tasks[0]", "metric", "accuracy")),
]  # fmt: skip


def table(name: str, content: bytes | str) -> Change:
    return together(chat(LIKELIHOOD, file=name), lambda world: world.write(name, content) and None)


FILES = [
    Case("a list of a number", table("tasks.json", '[{"prompt": "w4", "target": "w5"}, 3]'),
         ("tasks.json[1]", "object", "int")),
    Case("a list without an end", table("tasks.json", '[{"prompt": "w4",\n "target": "w5"},\n'),
         ("tasks.json", "line", "list of objects")),
    Case("a list that is nested too deep", table("tasks.json", "[" * 5000 + "]" * 5000), ("tasks.json", "nested")),
    Case("an empty list", table("tasks.json", "[]"), ("tasks.json", "no example")),
    Case("a table of nothing", table("tasks.csv", ""), ("tasks.csv", "no example")),
    Case("a table of one line", table("tasks.csv", "prompt,target\n"), ("tasks.csv", "no example")),
    Case("a table with a column too many", table("tasks.csv", "prompt,target\nw4,w5,w6\n"),
         ("tasks.csv:2", "3 values", "2 fields")),
    Case("a table with a name twice", table("tasks.csv", "prompt,prompt\nw4,w5\n"), ("tasks.csv:1", "'prompt'")),
    Case("a table with a quote that is open", table("tasks.csv", 'prompt,target\nw4,"w5\n'), ("tasks.csv", "CSV")),
    Case("a table with a NUL", table("tasks.csv", b"prompt,target\nw4,\0w5\n"), ("tasks.csv",), status=2),
    Case("a table in Latin-1", table("tasks.csv", "prompt,target\nw4,é\n".encode("latin-1")), ("tasks.csv", "UTF-8")),
    Case("a table that is none", table("tasks.parquet", b"PAR1" + bytes(99) + b"PAR1"), ("tasks.parquet", "parquet")),
]  # fmt: skip

CASES: list[Case] = [*TEMPLATES, *MESSAGES, *SHOWN, *TARGETS, *FILES]
