"""A kind of task from outside of the package, without a file: the prompt's last word is to be written again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evojax_merge.schema.section import Whole
from evojax_merge.tasks.task import Opening, Responses, Row, TaskConfig, TaskDefaults, TaskKind, TaskRequests


class CopyConfig(TaskConfig):
    """`count` prompts of `length` words, drawn by the search's seed."""

    kind: Literal["copy"]
    count: Whole = 8
    length: Whole = 3


@dataclass(frozen=True)
class CopyTask(TaskDefaults):
    name: str
    weight: float
    prompts: tuple[tuple[str, ...], ...]
    metric: str = "copied"
    files: tuple[Path, ...] = ()

    @property
    def size(self) -> int:
        return len(self.prompts)

    def subset(self, examples: Sequence[int]) -> "CopyTask":
        return replace(self, prompts=tuple(self.prompts[i] for i in examples))

    def requests(self, tokenizer: Any, context: int) -> TaskRequests:
        texts = [" ".join((*words, words[-1])) for words in self.prompts]
        rows = [tuple(tokenizer(text)["input_ids"]) for text in texts]
        return TaskRequests(tuple(Row(row, len(row) - 1, f"copy {n}", n) for n, row in enumerate(rows)))

    def score(self, responses: Responses) -> dict[str, np.ndarray]:
        return {self.metric: np.exp(responses.totals), "exactly": responses.greedy.astype(np.float32)}

    def contents(self) -> list[tuple[tuple[str, ...], tuple[str, int]]]:
        return [(words, ("copy", n)) for n, words in enumerate(self.prompts)]


def open_copy(config: CopyConfig, opening: Opening) -> CopyTask:
    words = np.random.default_rng(opening.seed).integers(4, 64, (config.count, config.length))
    return CopyTask(config.name, config.weight, tuple(tuple(f"w{word}" for word in row) for row in words))


KIND = TaskKind(CopyConfig, open_copy)
