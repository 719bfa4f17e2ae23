"""The commented text of a first search's config.

As many parameters are searched as the examples carry: one for every `EXAMPLES_PER_PARAMETER` of them, the rule of thumb
of regressions. A merge that has more of them than that is fitted to its examples, and its held-out scores fall behind.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml
from merge_kernels import Method, Parameter

from evojax_merge.errors import escaped, shown
from evojax_merge.inspection.first_task import HELDOUT, Line, TaskSection

# Groups of neighbouring layers that share their parameters at most: enough to tell the ends from the middle.
LAYER_GROUPS = 8
EXAMPLES_PER_PARAMETER = 10
VALIDATION = 0.25
COMMENT_COLUMN = 41
# The first line of a file that `init` wrote.
HEAD = re.compile(rb"# A search for the best merge of \d+ parents; all keys: evojax-merge keys all\n")
# The passes of a first search: so many for each parameter, from the steps of gradients on four minibatches to about 50
# generations of CMA-ES.
PASSES_PER_PARAMETER, LEAST_PASSES, MOST_PASSES = 50, 180, 600
# The examples above which a share is kept back to choose the winner on.
ENOUGH_TO_VALIDATE = 40
MEANINGS = {
    "weight": "how much of each parent; starts at 1/K, the uniform merge",
    "density": "the share of each task vector that is kept",
    "t": "from the first parent, at 0, to the second, at 1",
    "scale": "of the parent",
    "lambda": "of all that is added to the base",
    "filter": "the share of what the method changes in the average, or in the task vectors",
}

# The parameter of methods that lead from another merge to their own.
FILTER = "filter"


@dataclass(frozen=True)
class FirstConfig:
    """The choices of a first config. backend: None: language models. keys: further ones before the space. space: its
    section; dims: the number of its parameters; comments: why its keys have their values. examples: those of the data;
    None: there are none. generations: None: the search has a budget of passes."""

    backend: str | None
    base: str | None
    parents: tuple[str, ...]
    keys: tuple[Line, ...]
    space: Mapping[str, Any]
    dims: int
    comments: Mapping[str, str]
    task: TaskSection
    examples: int | None
    generations: int | None
    out: str | None

    def text(self, commands: Sequence[str], rule: str) -> str:
        """The YAML. commands: the next ones, for its head; rule: the comment of the space."""
        head = [f"A search for the best merge of {len(self.parents)} parents; all keys: evojax-merge keys all", ""]
        head += [f"    {line if line.isprintable() else shown(line)}" for line in commands]
        lines = [f"# {text}".rstrip() for text in head]
        lines.append("")
        if self.backend is not None:
            lines.append(_line("backend", self.backend, "what the models are"))
        if self.base is not None:
            lines.append(_line("base", self.base, "the model that task vectors are taken from"))
        lines.append(_row("parents:", "the models that are merged"))
        lines += [f"  - {_value(parent)}" for parent in self.parents]
        lines += [_line(*line) for line in self.keys]
        lines += ["", *self._space(rule), "", _row("tasks:", "what candidates are scored on")]
        for number, line in enumerate(self.task.lines):
            lines.append(_line(*line, indent="    " if number else "  - "))
        lines += ["", *self._search(), "", _line("seed", 0, "of everything that is drawn at random")]
        if self.out is not None:
            lines.append(_line("out", self.out, "the run folder"))
        return "".join(f"{line}\n" for line in lines)

    def _space(self, rule: str) -> list[str]:
        comments = {
            "method": "any of `evojax-merge methods`", "layers_per_group": "so many neighbours share their parameters",
            "components": "parts with parameters of their own; + joins parts",
            "parent_groups": "parents that share their parameters", "fixed": "what is prepared depends on it",
            "parameters": "searched between these bounds; all others have the method's default", **self.comments,
        }  # fmt: skip
        lines = [_row("space:", rule)]
        for key, value in self.space.items():
            if key != "parameters":
                lines.append(_row(f"  {key}: {_flow(value)}", comments[key]))
        lines.append(_row("  parameters:", comments["parameters"]))
        for name, bounds in self.space["parameters"].items():
            text = f"{{low: {bounds['low']:g}, high: {bounds['high']:g}}}"
            lines.append(_row(f"    {name}: {text}", self.comments.get(name, MEANINGS.get(name, ""))))
        return lines

    def _search(self) -> list[str]:
        strategy = ("auto", "chosen by what has derivatives; any of `evojax-merge strategies`")
        if self.backend not in (None, "function"):
            strategy = ("cma_es", "auto follows gradients, and is refused where torchax cannot trace the network")
        lines = ["search:", _line("strategy", *strategy, indent="  ")]
        if self.generations is not None:
            comment = "of 4 + 3 ln D candidates each, or steps of a gradient"
            lines.append(_line("generations", self.generations, comment, indent="  "))
        else:
            passes = min(max(LEAST_PASSES, PASSES_PER_PARAMETER * self.dims), MOST_PASSES)
            scaled = f"{PASSES_PER_PARAMETER} for each parameter, {LEAST_PASSES} to {MOST_PASSES}"
            comment = f"{scaled}; a pass is one candidate on all examples; or a time, such as 2h"
            lines.append(_row(f"  budget: {passes} passes", comment))
        if self.examples is not None and self.examples >= ENOUGH_TO_VALIDATE:
            comment = "this share of the searched examples is kept back, to choose the winner on"
            lines.append(_line("validation", VALIDATION, comment, indent="  "))
        if self.examples is not None:
            comment = "is it worth more than a fine-tune, or than chance? Each takes as long as the search"
            lines.append(_row("  # controls: [lora, random]", comment))
        return lines


def spaces(
    fixed: Mapping[str, Any], method: Method, layers: int | None, components: Sequence[Sequence[str]],
    high: float | None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The sections `space`, from the finest to the coarsest. fixed: the keys that all have; layers: how many there are
    to group, None: they have no groups; components: the choices of them; high: the highest weight at least."""
    searched = searched_parameters(method)
    most = min(LAYER_GROUPS, layers or 1)
    together = dict.fromkeys(-(-(layers or 1) // number) for number in range(most, 0, -1))
    for count, neighbours, parts in product(range(len(searched), 0, -1), together, components):
        section = {**fixed} | ({} if layers is None else {"layers_per_group": neighbours})
        section |= {"components": list(parts)} if parts else {}
        section["parameters"] = {
            parameter.name: {
                "low": parameter.low,
                "high": max(parameter.high, (high or 0.0) if parameter.name == "weight" else 0.0),
            }
            for parameter in searched[:count]
        }
        yield section


def fitting_space(counted: Sequence[tuple[int, dict[str, Any]]], examples: int | None) -> tuple[int, dict[str, Any]]:
    """(parameters, section) with the most parameters that the examples carry, else with the fewest; the first where a
    model is scored without examples. counted: (parameters, section); examples: those of the data."""
    if examples is None:
        return counted[0]
    searched = examples - max(1, round(HELDOUT * examples))
    searched -= round(VALIDATION * searched) if examples >= ENOUGH_TO_VALIDATE else 0
    fitting = [(size, section) for size, section in counted if size <= searched // EXAMPLES_PER_PARAMETER]
    return (max if fitting else min)(fitting or counted, key=lambda pair: pair[0])


def rule_of_space(dims: int, searched: int) -> str:
    """The number of parameters of a space, and the rule that it follows."""
    few = "at most" if dims <= searched // EXAMPLES_PER_PARAMETER else "the fewest there are, although it should be"
    rule = f"one for every {EXAMPLES_PER_PARAMETER} of the {searched:,} examples that are searched on"
    return f"{dims} parameter{'' if dims == 1 else 's'}: {few} {rule}"


def searched_parameters(method: Method) -> list[Parameter]:
    """The parameters that a first search has: those that every parent has its own of, and a filter, else the method's
    first."""
    searched = [parameter for parameter in method.parameters if parameter.searched]
    return [parameter for parameter in searched if parameter.per_parent or parameter.name == FILTER] or searched[:1]


def calibration_of(task: TaskSection) -> dict[str, Any] | None:
    """The section `calibration` of a task's prompts, with their targets where it has a template of them; None: it has
    no template of prompts."""
    keys = {key: value for key, value, _ in task.lines}
    if not keys.keys() >= {"file", "prompt"}:
        return None
    return {"file": keys["file"], "prompt": " ".join(filter(None, (keys["prompt"], keys.get("target"))))}


def _flow(value: Any) -> str:
    """A value of the space on one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_value(key)}: {_flow(entry)}' for key, entry in value.items())}}}"
    return f"[{', '.join(map(_value, value))}]" if isinstance(value, list) else _value(value)


def _line(key: str, value: Any, comment: str, indent: str = "") -> str:
    return _row(f"{indent}{key}: {_value(value)}", comment)


def _row(content: str, comment: str) -> str:
    return f"{content:<{COMMENT_COLUMN}} # {escaped(comment)}" if comment else content


def _value(value: Any) -> str:
    """A value in YAML, on one line: a text as it is where that reads as the same text, else in double quotes."""
    if not isinstance(value, str):
        return json.dumps(value)
    plain = re.fullmatch(r"[\w./~][\w./+@:~-]*", value, re.ASCII) is not None and not value.endswith(":")
    if plain and yaml.safe_load(value) == value:
        return value
    return str(yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf"))).strip()
