"""Results of transformers with torch: logits, log-probabilities and scores, one text at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from helpers.models import words

from evojax_merge.tasks.text import TextTask


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return the logits float32 `[R, T, vocab]` of rows int `[R, T]` without padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens).long()).logits.numpy()


def torch_logprobs(model: Any, prompt: Sequence[int], target: Sequence[int]) -> np.ndarray:
    """Return the log-probability of each token of `target` after `prompt`: float64 `[len(target)]`.

    The model reads all but the last token, which nothing depends on.
    """
    logits = torch_logits(model, np.array([[*prompt, *target][:-1]]))[0, len(prompt) - 1 :]
    rows = torch.log_softmax(torch.tensor(logits).double(), -1)
    return rows[range(len(target)), list(target)].numpy()


def torch_tokens(model: Any, prompt: Sequence[int], new: int, eos: int | None = None) -> list[int]:
    """Return the greedy continuation of one prompt: `new` token ids, fewer where `eos` ends it."""
    ids = torch.tensor(np.asarray(prompt)).long()[None]
    with torch.no_grad():
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=eos,
            pad_token_id=0,
        )  # fmt: skip
    return whole[0, len(prompt) :].tolist()


def text_logprobs(model: Any, prompt: str, target: str) -> np.ndarray:
    """`torch_logprobs` of texts whose words are "w4", "w5" and so on, by the ids of `helpers.word_tokenizer`."""
    return torch_logprobs(model, *([int(word[1:]) for word in text.split()] for text in (prompt, target)))


def torch_scores(model: Any, tasks: Sequence[TextTask]) -> dict[str, dict[str, np.ndarray]]:
    """Return the scores `[N]` of tasks of texts, of choices and of generated words, by the name and the metric."""
    text, choice, generated = tasks
    margins = []
    for example in choice.examples:
        totals = np.array([text_logprobs(model, example.prompt, target).sum() for target in example.targets])
        margins.append(totals[example.answer] - np.delete(totals, example.answer).max())
    right = []
    for example in generated.examples:
        prompt = [int(word[1:]) for word in example.prompt.split()]
        texts = [words()[i] for i in torch_tokens(model, prompt, generated.max_new_tokens, eos=2)]
        answers = [word for word in texts if word.startswith("w")]
        right.append(bool(answers) and answers[-1] == str(example.answer).strip())
    return {
        "text": {
            "log_probability": np.array([text_logprobs(model, e.prompt, e.targets[0]).mean() for e in text.examples])
        },
        "choice": {"accuracy": np.array(margins) > 0, "margin": np.array(margins)},
        "words": {"accuracy": np.array(right)},
    }
