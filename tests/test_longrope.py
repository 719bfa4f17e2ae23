"""LongRoPE of Phi-3: short factors up to the length of the first training, long ones beyond, by the sequence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.decoders import greedy_tokens, load_decoder, logits
from helpers.files import examples_in, write_lines
from helpers.models import load_torch, random_model, save, word_tokenizer, words
from reference.torch_models import torch_logits, torch_logprobs

from evojax_merge.errors import InputError
from evojax_merge.evaluation.batched_tasks import batch_tasks
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.tasks.text import TextTask

# Where the factors change.
SWITCH = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    config = transformers.Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=160, original_max_position_embeddings=SWITCH, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, partial_rotary_factor=0.75,
        rope_scaling={
            # The earlier name, as older files have it.
            "type": "su", "original_max_position_embeddings": SWITCH,
            "short_factor": rng.uniform(1, 2, 6).tolist(), "long_factor": rng.uniform(3, 9, 6).tolist(),
        },
    )  # fmt: skip
    config._attn_implementation = "eager"
    return save(random_model(config, std=0.3), tmp_path_factory.mktemp("phi3"))


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 64, shape).astype(np.int32)


@pytest.mark.parametrize("length", [SWITCH, SWITCH + 1])
def test_the_length_of_a_sequence_says_which_factors(length: int, folder: Path) -> None:
    config, model = load_decoder(folder)
    tokens = random_tokens(length, 2, length)
    found = logits(config, model, tokens)
    np.testing.assert_allclose(found, torch_logits(load_torch(folder), tokens), atol=1e-4)


def test_a_long_prompt_is_continued_with_the_long_factors(folder: Path) -> None:
    (config, model), length = load_decoder(folder), SWITCH + 5
    prompt = random_tokens(length, 1, length)
    with torch.no_grad():
        whole = load_torch(folder).generate(
            torch.tensor(prompt).long(), attention_mask=torch.ones(1, length, dtype=torch.long), max_new_tokens=8,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    assert greedy_tokens(config, model, prompt, [0], 8, (), window=3).tolist() == whole[:, length:].tolist()


def texts(lengths: list[int]) -> list[dict[str, Any]]:
    """Examples of so many words before choices of two, all behind one header."""
    rng, header = np.random.default_rng(1), [f"w{i}" for i in range(5, 39)]

    def some(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(4, 64, count))

    return [
        {
            "prompt": " ".join([*header, some(length - len(header))]), "choices": [some(2) for _ in range(3)],
            "answer": 1, "target": some(2),
        }
        for length in lengths
    ]  # fmt: skip


def task(file: Path, kind: Any, metric: str) -> TextTask:
    return TextTask(kind, kind, metric, 1.0, str(file), tuple(examples_in(file, kind)), max_new_tokens=4, stop=())


def test_rows_on_both_sides_share_nothing(folder: Path, tmp_path: Path) -> None:
    config, model = load_decoder(folder)
    tokenizer = word_tokenizer(words(64))
    ids = {word: i for i, word in enumerate(words(64))}
    tasks = [task(write_lines(tmp_path / "texts.jsonl", texts([36, 39, 40, 60])), "multiple_choice", "margin")]
    batched = batch_tasks([tasks], tokenizer, 256, 160, (2,), 64, config.position_switch)[0]
    margins = Evaluator(config, tokenizer, batched).score_stored(model).matrices["multiple_choice"]["margin"][0]
    model, expected = load_torch(folder), []
    for example in tasks[0].examples:
        totals = []
        for target in example.targets:
            prompt, own = ([ids[word] for word in text.split()] for text in (example.prompt, target))
            totals.append(torch_logprobs(model, prompt, own).sum())
        expected.append(totals[1] - max(totals[0], totals[2]))
    np.testing.assert_allclose(margins, expected, atol=2e-4)


def test_a_generation_does_not_cross(folder: Path, tmp_path: Path) -> None:
    config, _ = load_decoder(folder)
    for lengths, crosses in (([36, 45], False), ([36, 38], True)):
        tasks = [task(write_lines(tmp_path / "texts.jsonl", texts(lengths)), "exact_match", "accuracy")]
        if not crosses:
            batch_tasks([tasks], word_tokenizer(words(64)), 256, 160, (2,), 64, config.position_switch)
            continue
        with pytest.raises(InputError, match="38 tokens and 4 new ones: the model's positions change at 40"):
            batch_tasks([tasks], word_tokenizer(words(64)), 256, 160, (2,), 64, config.position_switch)
