"""The images of a task, as arguments of the passes over its rows and prompts."""

from dataclasses import dataclass

import numpy as np

from evojax_merge.models.images import ImageInputs, ImageTable
from evojax_merge.tasks.batches import PromptBatch, ScoringBatch


@dataclass(frozen=True)
class TaskImages:
    """The images that a task's passes take: None, each, for a task of texts. before: int32[H], the tokens of the prefix
    that all rows share."""

    table: ImageTable | None

    def of_prefix(self, before: np.ndarray) -> ImageInputs | None:
        positions = np.arange(len(before), dtype=np.int32)[None]
        return self._inputs(before[None], positions, np.zeros_like(positions), before[:0])

    def of_rows(self, before: np.ndarray, batch: ScoringBatch) -> ImageInputs | None:
        return self._inputs(batch.tokens, batch.positions, batch.segment_ids, before)

    def of_prompts(self, before: np.ndarray, tokens: np.ndarray, left_pad: np.ndarray) -> ImageInputs | None:
        """tokens: int32[B, T], of a group of prompts; left_pad: int32[B]."""
        offsets = np.arange(tokens.shape[1]) - left_pad[:, None]
        return self._inputs(tokens, len(before) + np.maximum(offsets, 0), np.minimum(offsets, 0), before)

    def shift(self, before: np.ndarray, batch: PromptBatch) -> np.ndarray | None:
        """The shift of the positions behind a batch of prompts (see `decoder.decode_step`)."""
        if self.table is None or self.table.positions is None:
            return None
        return self.table.positions.shift(batch.tokens) + self.table.positions.shift(before)

    def _inputs(
        self, tokens: np.ndarray, positions: np.ndarray, segment_ids: np.ndarray, before: np.ndarray
    ) -> ImageInputs | None:
        return None if self.table is None else self.table.inputs(tokens, positions, segment_ids, before)
