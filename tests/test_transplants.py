"""Other tokenizers: a model's rows for the tokens of a donor, against mergekit-tokensurgeon."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import assert_refused, run_here
from helpers.decoders import stored_logits
from helpers.files import read_json, read_lines, write_lines, write_yaml
from helpers.models import finetune, load_torch, random_model, state, tiny_config, word_tokenizer
from helpers.sampling import sample
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2TokenizerFast, LlamaTokenizerFast

from evojax_merge.checkpoints.approximation import token_bytes, token_keys
from evojax_merge.checkpoints.tokens import load_tokenizer

TEXT = ["the cat sat on the mat and the dog ran after the owner", "more words and numbers 1 2 3 42 in a house"] * 20
JAPANESE = ["今日は天気がいい 今日は天気", "明日は café が いい"] * 20
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def byte_level(size: int, texts: list[str] = TEXT) -> Any:
    """GPT-2's kind: letters for bytes, Ġ for a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|end|>")
    return GPT2TokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", **names)


def sentence_piece(size: int, texts: list[str] = TEXT, with_bytes: bool = False) -> Any:
    """Llama's kind: ▁ for a space, and <0x0A> for bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=with_bytes))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(pieces)
    special, bytes_ = ["<unk>", "<s>", "</s>"], [f"<0x{i:02X}>" for i in range(256)] if with_bytes else []
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=[*special, *bytes_], show_progress=False)
    )
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    return LlamaTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def model_with(tokenizer: Any, folder: Path, seed: int, **changes: Any) -> Path:
    """A tiny Llama with a row for each of a tokenizer's tokens."""
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    random_model(tiny_config(vocab_size=len(tokenizer), **ids, **changes), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a donor of other tokens and another width."""
    folder = tmp_path_factory.mktemp("pair")
    model = model_with(sentence_piece(100), folder / "model", 1)
    return model, model_with(byte_level(330), folder / "donor", 2, hidden_size=32)


def by_mergekit(model: Path, donor: Path, out: Path, *options: str) -> dict[str, np.ndarray]:
    from mergekit.io.tasks import LoaderCache
    from mergekit.scripts.tokensurgeon import main

    with contextlib.redirect_stderr(io.StringIO()):
        LoaderCache.loaders.clear()
        main.main([str(model), str(donor), str(out), *options], standalone_mode=False)
        LoaderCache.loaders.clear()
    return state(out)


def ours(model: Path, donor: Path, out: Path, *options: str) -> dict[str, np.ndarray]:
    run_here("transplant-tokenizer", model, donor, out, *options)
    return state(out)


METHODS = {
    "omp": ("-a", "omp", "-k", "8"),
    "interpolation": ("-a", "common_interpolation", "-k", "6"),
    "interpolation by angles": ("-a", "common_interpolation", "-k", "6", "-c"),
    "barycentric": ("-a", "common_interpolation", "-k", "5", "-w", "barycentric"),
    "least squares": ("-a", "common_interpolation", "-k", "5", "-w", "least_squares"),
    "mean": ("-a", "mean"),
    "zero": ("-a", "zero"),
    "subword": ("-a", "subword"),
    "sum of subwords": ("-a", "subword", "-s", "sum"),
    "first and last subword": ("-a", "subword", "-s", "first_last"),
}


@pytest.mark.parametrize("name", METHODS)
def test_transplants_are_mergekits(name: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Rows from pieces: where the two compare the same text (mergekit takes letters for bytes as letters, and the pad's
    role as its text)."""
    model, donor = pair
    found = ours(model, donor, tmp_path / "ours", *METHODS[name])
    expected = by_mergekit(model, donor, tmp_path / "theirs", *METHODS[name])
    assert set(found) == set(expected)
    rows = slice(None)
    if "subword" in name:
        tokenizer = load_tokenizer(donor)
        names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        rows = np.array([i for i, token in enumerate(names) if token.replace("Ġ", "").isascii() and "<" not in token])
        assert len(rows) > 80
    for tensor, values in expected.items():
        picked = rows if tensor in (EMBED, HEAD) else slice(None)
        np.testing.assert_allclose(found[tensor][picked], values[picked], rtol=2e-4, atol=2e-5, err_msg=tensor)


@pytest.mark.parametrize("tied", [(True, True), (False, True), (True, False)], ids=["both", "the donor", "the model"])
def test_tied_heads_are_transplanted_with_their_embeddings(
    tied: tuple[bool, bool], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """A tied model has no head in its file, and its rows are made by the donor's embedding."""
    folders = [
        model_with(load_tokenizer(folder), tmp_path / name, seed, hidden_size=width, tie_word_embeddings=is_tied)
        for folder, name, seed, width, is_tied in zip(pair, ("model", "donor"), (1, 2), (48, 32), tied, strict=True)
    ]
    rows = ours(*folders, tmp_path / "ours", *METHODS["omp"])
    expected = by_mergekit(*folders, tmp_path / "theirs", *METHODS["omp"])
    assert (HEAD in rows) != tied[0]
    for tensor, values in expected.items():
        np.testing.assert_allclose(rows[tensor], values, rtol=2e-4, atol=2e-5, err_msg=tensor)


def test_a_transplant_loads_and_speaks_the_donors_tokens(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Its config and its settings of generation name the donor's tokens, and its logits are transformers'."""
    model, donor = pair
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 99}))
    ours(model, donor, tmp_path / "out", "-a", "omp", "-k", "8")
    config, tokenizer = read_json(tmp_path / "out" / "config.json"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert config["vocab_size"] == len(tokenizer) == len(AutoTokenizer.from_pretrained(donor))
    assert (config["bos_token_id"], config["pad_token_id"]) == (0, 1)
    assert 99 not in read_json(tmp_path / "out" / "generation_config.json").values()
    tokens = np.array([tokenizer("the cat sat on the mat and the dog")["input_ids"]])
    with torch.no_grad():
        expected = load_torch(tmp_path / "out")(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(stored_logits(tmp_path / "out", tokens), expected, rtol=2e-3, atol=2e-3)


def test_a_model_with_its_own_tokenizer_stays_as_it_is(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = pair
    other = model_with(load_tokenizer(model), tmp_path / "other", 5, hidden_size=32)
    found = ours(model, other, tmp_path / "out", "-a", "omp")
    for name, values in state(model).items():
        np.testing.assert_array_equal(found[name], values)


# ---------------------------------------------------------------------------------------------------------------
# Where it differs on purpose


def test_tokens_are_compared_by_their_bytes(tmp_path: Path) -> None:
    """The two kinds of tokenizers write everything beyond ASCII, and the end of a line, in other letters. mergekit
    compares the letters, so that no Japanese token is found again."""
    left, right = sentence_piece(400, JAPANESE, with_bytes=True), byte_level(330, JAPANESE)
    model, donor = model_with(left, tmp_path / "model", 1), model_with(right, tmp_path / "donor", 2)
    found = ours(model, donor, tmp_path / "out", "-a", "zero")[EMBED]
    theirs = by_mergekit(model, donor, tmp_path / "theirs", "-a", "zero")[EMBED]
    own = state(model)[EMBED]
    rows = {keys[0][1]: row for row, keys in token_keys(load_tokenizer(donor)).items()}
    pairs = {
        token: token.replace("▁", " ").encode() for token in left.get_vocab() if not token.replace("▁", "").isascii()
    }
    pairs = {token: text for token, text in pairs.items() if text in rows} | {"<0x0A>": b"\n"}
    assert len(pairs) > 5
    for token, text in pairs.items():
        np.testing.assert_array_equal(found[rows[text]], own[left.get_vocab()[token]], err_msg=token)
        assert not theirs[rows[text]].any(), token
    end = right.get_vocab()["<|end|>"]
    np.testing.assert_array_equal(found[end], own[left.bos_token_id])


def test_every_special_token_is_found_by_its_name_or_its_role(tmp_path: Path) -> None:
    """mergekit keeps one token of each role, and the last of the further special tokens alone."""
    left, right = byte_level(300), sentence_piece(100)
    for tokenizer in (left, right):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|user|>"]})
    model, donor = model_with(left, tmp_path / "model", 1), model_with(right, tmp_path / "donor", 2)
    found = ours(model, donor, tmp_path / "out", "-a", "zero")[EMBED]
    own = state(model)[EMBED]
    pairs = {"<s>": "<|end|>", "</s>": "<|end|>", "<unk>": "<|end|>", "<|tool|>": "<|tool|>", "<|user|>": "<|user|>"}
    for token, other in pairs.items():
        np.testing.assert_array_equal(found[right.get_vocab()[token]], own[left.get_vocab()[other]], err_msg=token)


@pytest.mark.parametrize("width", [32, 48])
def test_a_rotation_is_found_again(width: int, tmp_path: Path) -> None:
    """A model whose rows are the donor's, rotated (and with further columns of zeros): the rows of the tokens that it
    lacks are rotated as well. mergekit rotates by the transposed matrix."""
    left, right = sentence_piece(100), byte_level(330)
    model, donor = model_with(left, tmp_path / "model", 1), model_with(right, tmp_path / "donor", 2, hidden_size=32)
    network, rows = load_torch(model), torch.tensor(state(donor)[EMBED])
    turn = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))[0][:32]
    by_key = {key: row for row, keys in token_keys(load_tokenizer(donor)).items() for key in keys}
    shared = {row: by_key[keys[0]] for row, keys in token_keys(load_tokenizer(model)).items() if keys[0] in by_key}
    assert len(shared) > 40
    with torch.no_grad():
        for row, other in shared.items():
            network.model.embed_tokens.weight[row] = rows[other] @ turn
    network.save_pretrained(model)
    # Special tokens are shared by their roles, and were not rotated.
    found = ours(model, donor, tmp_path / "out", "-a", "landmark_pca")[EMBED]
    theirs = by_mergekit(model, donor, tmp_path / "theirs", "-a", "landmark_pca")[EMBED]
    lacking = sorted(set(range(2, len(right))) - set(shared.values()))
    exact = (rows @ turn).numpy()[lacking]
    errors = [np.linalg.norm(values[lacking] - exact) / np.linalg.norm(exact) for values in (found, theirs)]
    assert errors[0] < 0.35 and errors[0] * 2 < errors[1], errors


def test_the_heads_first_piece_and_the_embeddings_last_weigh_most(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """mergekit's comment says so, and its weights are the other way round."""
    model, (_, donor) = model_with(sentence_piece(50), tmp_path / "model", 1), pair
    found = ours(model, donor, tmp_path / "ours", "-a", "subword", "-s", "weighted_mean")
    theirs = by_mergekit(model, donor, tmp_path / "theirs", "-a", "subword", "-s", "weighted_mean")
    own, tokenizer, vocabulary = state(model), load_tokenizer(model), load_tokenizer(donor).get_vocab()
    split = {token: tokenizer(token.replace("Ġ", " "), add_special_tokens=False)["input_ids"] for token in vocabulary}
    words = [token for token in split if token[:1] == "Ġ" and token[1:].isalpha() and len(split[token]) > 1]
    token = next(token for token in words if token.replace("Ġ", "▁") not in tokenizer.get_vocab())
    row, pieces = vocabulary[token], split[token]
    weights = np.arange(1, len(pieces) + 1) / sum(range(1, len(pieces) + 1))
    np.testing.assert_allclose(found[EMBED][row], weights @ own[EMBED][pieces], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[HEAD][row], weights[::-1] @ own[HEAD][pieces], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(theirs[EMBED][row], weights[::-1] @ own[EMBED][pieces], rtol=1e-4, atol=1e-5)


def test_random_rows_are_as_large_as_the_models_own(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """mergekit draws from N(0, 1), some fifty times as long as most models' rows; and anew each time."""
    model, donor = pair
    found, again = (ours(model, donor, tmp_path / name, "-a", "randn")[EMBED] for name in ("one", "two"))
    np.testing.assert_array_equal(found, again)
    own = state(model)[EMBED]
    assert abs(found.std() / own.std() - 1) < 0.1


def test_more_points_than_a_row_has_numbers_give_the_row_itself(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Points that add nothing get no weight; mergekit divides by 1e-8 and gives rows of any size."""
    model, donor = pair
    found = ours(model, donor, tmp_path / "ours", "-a", "omp", "-k", "45")[EMBED]
    assert np.abs(found).max() < 10 * np.abs(state(model)[EMBED]).max()
    theirs = by_mergekit(model, donor, tmp_path / "theirs", "-a", "omp", "-k", "45")[EMBED]
    assert np.abs(theirs).max() > 10 * np.abs(found).max()


# ---------------------------------------------------------------------------------------------------------------
# Bad input


def test_a_donor_without_a_word_in_common_is_refused_with_the_share(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = pair
    foreign = word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *(f"語{i}" for i in range(20))])
    donor = model_with(foreign, tmp_path / "donor", 3)
    says = (str(model), "has 0 of the 20 tokens", "(0.0%)", "omp needs tokens that both have")
    assert_refused(says, "transplant-tokenizer", model, donor, tmp_path / "out")
    run_here("transplant-tokenizer", model, donor, tmp_path / "out", "-a", "mean")


def test_bad_calls_are_refused_in_a_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, donor = pair
    out = tmp_path / "out"
    assert_refused(("approximate: expected omp",), "transplant-tokenizer", model, donor, out, "-a", "magic")
    assert_refused(("k: expected",), "transplant-tokenizer", model, donor, out, "-k", "0")
    assert_refused(("no such folder",), "transplant-tokenizer", model, tmp_path / "nowhere", out)
    assert "which this command reads" in run_here("transplant-tokenizer", model, donor, donor / "out", status=2).stderr
    recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}], "tokenizer_source": {"of": "union"}}
    assert_refused(("of: union; expected base or a model",), "merge", write_yaml(tmp_path / "r.yaml", recipe), out)
    assert not out.exists()


def test_letters_that_are_no_bytes_stay_what_they_are() -> None:
    assert token_bytes("<0xZZ>", None) == b"<0xZZ>" and token_bytes("▁a", None) == b" a"
    assert token_bytes("語", {"a": 97}) == "語".encode()


# ---------------------------------------------------------------------------------------------------------------
# In recipes and searches


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `one` with the first tokenizer, and `two`, a fine-tune with the second."""
    folder = tmp_path_factory.mktemp("unlike")
    left, right = sentence_piece(100), byte_level(330)
    network = random_model(tiny_config(vocab_size=len(left), num_hidden_layers=2))
    for name, model in (("base", network), ("one", finetune(network, 1, 0.1))):
        model.save_pretrained(folder / name)
        left.save_pretrained(folder / name)
    two = random_model(tiny_config(vocab_size=len(right), num_hidden_layers=2), 7)
    own, rest = two.state_dict(), finetune(network, 2, 0.1).state_dict()
    two.load_state_dict({name: own[name] if name in (EMBED, HEAD) else rest[name] for name in own})
    two.save_pretrained(folder / "two")
    right.save_pretrained(folder / "two")
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "mat",
        "and",
        "dog",
        "ran",
        "after",
        "owner",
        "more",
        "words",
        "numbers",
        "house",
    ]
    rng = np.random.default_rng(0)
    records = [{"prompt": " ".join(rng.choice(words, 4)), "target": " " + str(rng.choice(words))} for _ in range(12)]
    write_lines(folder / "tasks.jsonl", records)
    return folder


@pytest.mark.parametrize("of", sample(["two", "base"], 1))
def test_a_search_over_parents_of_unlike_tokenizers(of: str, unlike: Path, tmp_path: Path) -> None:
    """The winner has the tokenizer of one of them, is the merge of its recipe to the byte, and its scores are those
    that transformers gives its folder."""
    config = {
        "base": str(unlike / "base"), "parents": [str(unlike / "one"), str(unlike / "two")],
        "tokenizer_source": {"of": of if of == "base" else str(unlike / of), "approximate": "omp", "k": 6},
        "space": {"method": "task_arithmetic"}, "search": {"generations": 2, "population": 4}, "seed": 1,
        "tasks": [{"name": "text", "kind": "likelihood", "file": str(unlike / "tasks.jsonl"), "heldout": 0.5}],
    }  # fmt: skip
    done = run_here("search", write_yaml(tmp_path / "search.yaml", config), "--out", tmp_path / "run")
    assert "are made by omp" in done.stderr
    best = tmp_path / "run" / "best"
    recipe = yaml.safe_load((best / "recipe.yaml").read_text())
    assert recipe["tokenizer_source"]["approximate"] == "omp" and recipe["tokenizer_source"]["k"] == 6
    run_here("merge", best / "recipe.yaml", tmp_path / "again")
    made, kept = (folder / "model.safetensors" for folder in (tmp_path / "again", best / "model"))
    assert made.read_bytes() == kept.read_bytes()
    tokenizer, network = AutoTokenizer.from_pretrained(best / "model"), load_torch(best / "model")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(unlike / of).get_vocab()
    assert network.config.vocab_size == len(tokenizer)
    run_here("evaluate", best / "model", "--tasks", tmp_path / "search.yaml", "--split", "heldout", "--samples",
             tmp_path / "samples.jsonl")  # fmt: skip
    samples, records = read_lines(tmp_path / "samples.jsonl"), read_lines(unlike / "tasks.jsonl")
    scores = []
    for row in samples:
        record = records[int(row["example"].rpartition(":")[2]) - 1]
        prompt, target = (tokenizer(record[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "target"))
        with torch.no_grad():
            chances = network(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        rows = chances[len(prompt) - 1 : -1].gather(1, torch.tensor(target)[:, None])
        scores.append(float(rows.mean()))
    np.testing.assert_allclose([sample["score"] for sample in samples], scores, atol=1e-4)
    table = {row["role"]: row["heldout_fitness"] for row in read_json(tmp_path / "run" / "result.json")["table"]}
    np.testing.assert_allclose(table["winner"], np.mean(scores), atol=1e-4)


def test_the_python_api_takes_both(unlike: Path, tmp_path: Path) -> None:
    import evojax_merge as em

    models = em.load_models(
        unlike / "base", [unlike / "one", unlike / "two"], tokenizer_source={"of": str(unlike / "two"), "k": 6}
    )
    assert models.document()["tokenizer_source"]["approximate"] == "omp"
    with pytest.warns(UserWarning, match="are made by mean"):
        out = em.transplant_tokenizer(unlike / "one", unlike / "two", tmp_path / "out", approximate="mean")
    assert load_torch(out).config.vocab_size == len(AutoTokenizer.from_pretrained(unlike / "two"))
    expert = {"source_model": str(unlike / "one")}
    recipe = {"base_model": str(unlike / "base"), "experts": [expert, expert], "gate_mode": "random"}
    mixture = em.moe(recipe, tmp_path / "mixture", allow_same=True, dtype="bfloat16")
    assert load_torch(mixture).config.num_local_experts == 2
