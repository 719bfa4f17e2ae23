"""A stored language model that judges texts while others are searched (see `tasks.rubric`)."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.backends.decoder.backend import stored_dtype
from evojax_merge.backends.decoder.opening import context_length, stop_tokens
from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import Sources, open_sources
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.evaluation.batched_tasks import batch_tasks, suitable_tokens
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.evaluation.targets import live_target
from evojax_merge.models.config import DecoderConfig
from evojax_merge.tasks.text import TextTask


@dataclass(frozen=True)
class JudgeModel:
    """A model by its headers, whose weights are loaded when it is first asked."""

    folder: Path
    sources: Sources
    decoder: DecoderConfig

    def margins(self, task: TextTask) -> np.ndarray:
        """float[N]: each example's margin of a task of multiple choice, all in one evaluation."""
        tokenizer, target = self._tokenizer, live_target()
        (batched_tasks,) = batch_tasks(
            [[task]], tokenizer, suitable_tokens(target), context_length(self.sources.folders, self.decoder.positions),
            stop_tokens(self.folder, tokenizer), self.decoder.vocab, self.decoder.position_switch,
        )  # fmt: skip
        evaluator = Evaluator(self.decoder, tokenizer, batched_tasks, self._dtype)
        margins: np.ndarray = evaluator.score_stored(self._stored).matrices[task.name]["margin"][0]
        return margins

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    @cached_property
    def _dtype(self) -> str:
        return live_target().compute_dtype("auto", [stored_dtype(self.sources, 0)])

    @cached_property
    def _stored(self) -> Any:
        return load_stored(self.sources, self.decoder, 0, self._dtype)


# The splits of a task share their judge.
@lru_cache(maxsize=2)
def open_judge_model(folder: Path) -> JudgeModel:
    """The model of a folder. Raises InputError for one that is not native."""
    return JudgeModel(folder, *open_sources([folder]))
