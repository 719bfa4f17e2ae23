"""Tasks without labels: `kind: entropy`, how sure a model is of its answers.

The score is minus the entropy of a model's distribution over the answers to a prompt: over the next token, over a list
of choices, or over the classes of a network of torch. Yang et al. (https://arxiv.org/abs/2310.02575) descend the mean
entropy over unlabelled examples along a weight for each layer and parent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from evojax_merge.errors import InputError
from evojax_merge.schema.section import Form, Name, Text, Whole
from evojax_merge.tasks.choices import listed_choices
from evojax_merge.tasks.networks import (
    IMAGE_FIELD,
    NEGATIVE_ENTROPY,
    TEXT_FIELD,
    ClassificationConfig,
    NetworkTask,
    open_network,
)
from evojax_merge.tasks.prompts import Example, PromptConfig, joined
from evojax_merge.tasks.records import is_file_name
from evojax_merge.tasks.task import Derivative, Opening, Responses, TaskKind, TaskRequests
from evojax_merge.tasks.templates import named_fields
from evojax_merge.tasks.text import (
    P,
    PromptedTask,
    check_texts,
    likelihood_rows,
    open_prompted,
    prompt_rows,
)

Choices = Annotated[
    Name | Annotated[list[Text], Field(min_length=2, max_length=1000)],
    Form("a list of two or more texts, or the name of a field", "texts, or a field"),
]


# The logarithm that stands for those of smaller probabilities, which add nothing to an entropy.
LEAST_LOG = -1e9


class EntropyConfig(PromptConfig):
    """A task without labels: minus the entropy of a model's distribution over the answers to a prompt."""

    optional: ClassVar = (*PromptConfig.optional, "choices", "positions", "image", "text")
    # The keys of other tasks of prompts.
    max_new_tokens: ClassVar[int] = 0
    stop: ClassVar[tuple[str, ...]] = ()

    kind: Literal["entropy"] = Field(description="the kind of task")
    choices: Choices | None = Field(
        None, description="the answers, or the field that lists them; default: any next token, or a network's classes"
    )
    positions: Whole = Field(
        1, ge=1, le=100_000, description="without choices: behind how many last tokens of a prompt entropies are taken"
    )
    target: Text = Field("{target}", description="of shown examples: a template over a record's fields")
    image: Name = Field("image", description=IMAGE_FIELD)
    text: Name = Field("text", description=TEXT_FIELD)

    @model_validator(mode="after")
    def _has_one_distribution(self) -> "EntropyConfig":
        if self.choices is not None and self.positions > 1:
            raise ValueError("positions: has no meaning beside choices, which follow the whole prompt")
        if isinstance(self.choices, list) and (len(set(self.choices)) < len(self.choices) or "" in self.choices):
            raise ValueError("choices: expected texts that differ, none of them empty")
        return self


def negative_entropies(logits: Any) -> jax.Array:
    """float32[…]: minus the entropies, in nats, of the distributions that logits `float[…, V]` give."""
    logs = jnp.maximum(jax.nn.log_softmax(jnp.asarray(logits).astype(jnp.float32)), LEAST_LOG)
    return (jnp.exp(logs) * logs).sum(-1)


def mean_negative_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of `negative_entropies` where `mask: bool[Q]`, a row's score by its logits `float32[Q, V]`."""
    # A padded row has no position.
    return jnp.where(mask, negative_entropies(logits), 0.0).sum() / jnp.maximum(mask.sum(), 1)


@dataclass(frozen=True)
class EntropyTask(PromptedTask):
    """A task (tasks.task) of prompts whose answers a model should be sure of. Its `kind` is multiple_choice where the
    examples have choices. `positions`: the number of the prompt's last tokens that a distribution follows."""

    units: ClassVar[Mapping[str, str]] = {NEGATIVE_ENTROPY: "minus nats"}

    positions: int = 1

    def requests(self, tokenizer: Any, context: int) -> TaskRequests:
        if self.kind == "multiple_choice":
            return TaskRequests(tuple(likelihood_rows(self, tokenizer)))
        rows = []
        for row in prompt_rows(self, tokenizer):
            # The last position of a row is scored by a token behind it, whichever it is.
            behind = next((token for token in reversed(row.tokens) if token >= 0), 0)
            first_text = max((place + 1 for place, token in enumerate(row.tokens) if token < 0), default=1)
            start = max(len(row.tokens) + 1 - self.positions, first_text)
            rows.append(replace(row, tokens=(*row.tokens, behind), start=start))
        return TaskRequests(tuple(rows), logits_fn=mean_negative_entropy)

    def score(self, responses: Responses) -> dict[str, np.ndarray]:
        if self.kind != "multiple_choice":
            return {NEGATIVE_ENTROPY: responses.totals.astype(np.float32)}
        values = [(p * logs).sum(-1) for _, p, logs in self._distributions(responses)]
        return {NEGATIVE_ENTROPY: np.stack(values, axis=1).astype(np.float32)}

    @property
    def derivative(self) -> Derivative:
        return "nonlinear" if self.kind == "multiple_choice" else "linear"

    def score_gradient(self, responses: Responses) -> np.ndarray:
        if self.kind != "multiple_choice":
            return np.ones(responses.totals.shape, np.float32)
        gradient = np.zeros(responses.totals.shape, np.float32)
        for rows, p, logs in self._distributions(responses):
            gradient[:, rows] = p * (logs - (p * logs).sum(-1, keepdims=True))
        return gradient

    def _distributions(self, responses: Responses) -> list[tuple[slice, np.ndarray, np.ndarray]]:
        """For each example its rows, the probabilities float64[P, C] of its choices, and their logarithms."""
        ends = np.cumsum([len(example.targets) for example in self.examples])
        distributions = []
        for example, end in zip(self.examples, ends.tolist(), strict=True):
            rows = slice(end - len(example.targets), end)
            totals = responses.totals[:, rows].astype(np.float64)
            logs = np.maximum(totals - np.logaddexp.reduce(totals, axis=-1, keepdims=True), LEAST_LOG)
            distributions.append((rows, np.exp(logs), logs))
        return distributions

    def target(self, example: int) -> None:
        return None


def open_entropy(config: EntropyConfig, opening: Opening) -> EntropyTask | NetworkTask:
    """The task on the records of one file: prompts for a language model, or the inputs of a network of torch where the
    records lack the fields that `prompt` names. Raises InputError for a file or config that does not fit."""
    if _is_for_network(config, opening):
        if isinstance(config.choices, str) or config.positions > 1:
            key = "choices" if isinstance(config.choices, str) else "positions"
            what = f"{getattr(config, key)}; a record without {', '.join(named_fields(config.prompt)) or 'a prompt'}"
            raise InputError(f"{opening.where}.{key}", f"{what} is for a network, which has one list of classes")
        keys: dict[str, Any] = {
            "kind": "classification", "metric": NEGATIVE_ENTROPY, "target": None, "prompts": ["{label}"],
            "classes": config.choices if isinstance(config.choices, list) else [],
            **{key: getattr(config, key) for key in ("name", "file", "weight", "images", "image", "text")},
        }  # fmt: skip
        return open_network(ClassificationConfig.model_construct(**keys), opening)
    check_texts(opening.where, config, {"prompt": True})
    task = open_prompted(
        EntropyTask, config, opening, "exact_match", NEGATIVE_ENTROPY, has_targets=False, positions=config.positions
    )
    return replace(task, kind="likelihood") if config.choices is None else with_choices(task, config.choices)


def with_choices(task: P, named: str | Sequence[str]) -> P:
    """The task with each example's choices as its targets. named: the choices, or the field that lists them."""
    examples = []
    for example, record in zip(task.examples, task.records, strict=True):
        choices: Sequence[str] = [] if isinstance(named, str) else named
        if isinstance(named, str):
            choices, _ = listed_choices(task.where(example), named, record.get(named))
        examples.append(replace(example, targets=_answers(task, example, choices)))
    return replace(task, kind="multiple_choice", examples=tuple(examples))


def _answers(task: PromptedTask, example: Example, choices: Sequence[str]) -> tuple[str, ...]:
    """The choices, joined to the text that stands before them. A chat template ends where an answer begins."""
    prompts = task.prompts
    if prompts.template and not prompts.prefix:
        return tuple(choices)
    return tuple(joined(prompts.prefix or example.prompt, prompts.delimiter, choice) for choice in choices)


def _is_for_network(config: EntropyConfig, opening: Opening) -> bool:
    key, reference = opening.source("file", config.file)
    if is_file_name(reference):
        file = opening.file(key, reference)
        if file.is_dir() or file.suffix == ".npz":
            return True
    fields = opening.read(key, reference).records[0].fields
    if config.messages is not None or {*named_fields(config.prompt)} <= {*fields}:
        return False
    return config.image in fields or config.text in fields


KIND = TaskKind(EntropyConfig, open_entropy, source="file")
