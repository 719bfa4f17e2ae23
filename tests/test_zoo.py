"""The zoo of demo models: references, what is written, and what the models must never have seen."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers.decoders import hidden_states
from helpers.families import build_family
from helpers.sampling import thorough
from hostile import run_python
from safetensors.numpy import load_file

import evojax_merge as em
from evojax_merge import zoo
from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.errors import InputError
from evojax_merge.tasks.task import Row
from evojax_merge.zoo import smollm2
from evojax_merge.zoo.arithmetic import (
    EXPERT_STEPS,
    IDS,
    PACKAGED_SEED,
    PLAN,
    VOCABULARY,
    base_batch,
    expert_batches,
    japanese_batch,
    maths_batch,
    split_hard_sums,
)
from evojax_merge.zoo.tiny_llama import Plan

# A few steps: enough for weights that differ from the start and from each other.
SHORT = Plan(steps=(3, 2, 2), examples=(12, 20))
ENGLISH = {"what": "ask", "plus": "+", "minus": "-", "is": "=", ".": "end"}
JAPANESE = {"いくつ": "ask", "たす": "+", "ひく": "-", "は": "="}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


@pytest.fixture
def family(in_cache: Path) -> Path:
    return zoo.resolve_reference("zoo:0/base", SHORT).parent


def parse(sentence: str) -> tuple[int, str, int, int] | None:
    """(first, sign, second, result) of a sum in either language or both; None for copying and counting."""
    words = [{**ENGLISH, **JAPANESE}.get(word, word) for word in sentence.split()]
    if words[0] != "ask":
        return None
    assert words[6] == "="
    return int("".join(words[1:3])), words[3], int("".join(words[4:6])), int("".join(words[9:6:-1]))


def records(path: Path) -> list[tuple[int, str, int, int]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        row = parse(f"{record['prompt']} {record['target']}")
        assert row is not None
        rows.append(row)
    return rows


def texts(tokens: np.ndarray) -> list[str]:
    return [" ".join(VOCABULARY[token] for token in row if token != IDS["<pad>"]) for row in tokens]


def test_references_lead_into_the_users_cache_folder(family: Path, in_cache: Path) -> None:
    assert family == in_cache / "evojax-merge" / "zoo" / zoo.VERSION / "seed-0"
    for name in ("base", "maths", "japanese"):
        assert zoo.resolve_reference(f"zoo:0/{name}") == family / name
        assert (family / name / "model.safetensors").is_file()
    for name in ("search.jsonl", "heldout.jsonl"):
        assert zoo.resolve_reference(f"zoo:0/{name}").is_file()


def test_the_packaged_family_needs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evojax_merge.zoo import arithmetic

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(arithmetic, "train_model", None)
    packaged = zoo.resolve_reference("zoo:base").parent
    assert packaged == tmp_path / "evojax-merge" / "zoo" / zoo.VERSION / "packaged"
    assert zoo.resolve_reference("zoo:maths") == packaged / "maths"
    assert zoo.resolve_reference("zoo:search.jsonl") == packaged / "search.jsonl"
    # What a trained family has, with weights that bfloat16 holds.
    for name in zoo.MODELS:
        assert {file.name for file in (packaged / name).iterdir()} >= {"config.json", "tokenizer.json"}
        for values in load_file(packaged / name / "model.safetensors").values():
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, values.astype(ml_dtypes.bfloat16).astype(np.float32))
    # The problems are those of its seed, which its training never saw.
    training, search, _ = split_hard_sums(arithmetic.PACKAGED_SEED, PLAN)
    shown = records(packaged / "search.jsonl")
    assert len(shown) == len(search) and [row[0] for row in shown] == search.first.tolist()
    seen = {frozenset(pair) for pair in zip(training.first.tolist(), training.second.tolist(), strict=True)}
    assert not seen & {frozenset((first, second)) for first, _, second, _ in shown}


def test_without_xdg_the_cache_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert zoo.cache_folder() == tmp_path / ".cache" / "evojax-merge" / "zoo"


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("zoo:math", "did you mean 'zoo:maths'"),
        ("zoo:2/japanes", "did you mean 'zoo:2/japanese'"),
        ("zoo:heldout.json", "did you mean 'zoo:heldout.jsonl'"),
        ("zoo:x/base", "no such"),
        ("zoo:-1/base", "no such"),
        ("zoo:1/2/base", "no such"),
        ("zoo:", "no such"),
        ("zoo:../base", "no such"),
    ],
)
def test_an_unknown_name_is_refused_and_nothing_is_trained(
    reference: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=told):
        zoo.resolve_reference(reference)
    assert not list(tmp_path.iterdir())


def test_a_family_that_is_there_is_not_made_again(family: Path) -> None:
    weights = family / "base" / "model.safetensors"
    before = weights.stat()
    assert zoo.resolve_reference("zoo:0/base") == family / "base"
    after = weights.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_interrupted_training_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evojax_merge.zoo import arithmetic

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(arithmetic, "train_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            zoo.resolve_reference("zoo:0/base", SHORT)
    assert not list((tmp_path / "evojax-merge").rglob("zoo/*/*"))
    assert (zoo.resolve_reference("zoo:0/base", SHORT) / "model.safetensors").is_file()


@thorough
def test_a_seed_gives_the_same_files_in_another_process(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from evojax_merge import zoo; from evojax_merge.zoo.tiny_llama import Plan; "
        f"zoo.resolve_reference('zoo:0/base', {SHORT!r})"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run_python(code)
    other = tmp_path / "evojax-merge" / "zoo" / zoo.VERSION / "seed-0"
    files = sorted(path.relative_to(family) for path in family.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for file in files:
        assert (family / file).read_bytes() == (other / file).read_bytes(), file


@thorough
def test_another_seed_gives_other_weights_and_other_problems(family: Path) -> None:
    other = zoo.resolve_reference("zoo:1/base", SHORT).parent
    assert other.name == "seed-1"
    for file in ("base/model.safetensors", "search.jsonl", "heldout.jsonl"):
        assert (family / file).read_bytes() != (other / file).read_bytes()


def test_training_shows_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    zoo.resolve_reference("zoo:0/base", SHORT)
    shown = capsys.readouterr()
    assert "training base, maths, japanese (seed 0)" in shown.err
    assert f"{sum(SHORT.steps)}/{sum(SHORT.steps)} steps" in shown.err
    assert not shown.out


@pytest.mark.parametrize("name", ["base", "maths", "japanese"])
def test_transformers_loads_a_folder_and_gives_the_same_logits(family: Path, name: str) -> None:
    torch = pytest.importorskip("torch")
    import jax.numpy as jnp
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evojax_merge.models.decoder import logits

    tokenizer = AutoTokenizer.from_pretrained(family / name)
    model, report = AutoModelForCausalLM.from_pretrained(family / name, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == IDS["</s>"]
    ids = tokenizer("いくつ 3 7 たす 4 5 は 2 8 0 です 。")["input_ids"]
    with torch.no_grad():
        expected = model.float()(torch.tensor([ids])).logits.numpy()
    sources, config = open_sources([family / name])
    stored, tokens = load_stored(sources, config), jnp.asarray([ids])
    hidden = hidden_states(config, stored, tokens)
    np.testing.assert_allclose(np.asarray(logits(config, stored, hidden)), expected, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_is_a_word_a_token_and_gives_the_text_back(family: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family / "maths")
    for text in ("いくつ 3 7 たす 4 5 は 2 8 0 です 。", "what 3 7 minus 0 5 is 2 3 0 ."):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_experts_start_from_the_base_and_leave_it(family: Path) -> None:
    from safetensors.numpy import load_file

    base, maths, japanese = (load_file(family / n / "model.safetensors") for n in ("base", "maths", "japanese"))
    assert base.keys() == maths.keys() == japanese.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(base[name], maths[name])
    assert not np.array_equal(maths[name], japanese[name])
    # Two steps move a weight by little: independent models would be a whole standard deviation apart.
    assert np.abs(maths[name] - base[name]).max() < 0.5 * base[name].std()


@pytest.mark.parametrize("file", ["search.jsonl", "heldout.jsonl"])
def test_the_files_hold_hard_sums_in_japanese_with_right_answers(family: Path, file: str) -> None:
    lines = (family / file).read_text(encoding="utf-8").splitlines()
    assert len(lines) == dict(zip(zoo.FILES, SHORT.examples, strict=True))[file]
    for line in lines:
        record = json.loads(line)
        assert record["prompt"].split()[0] == "いくつ"
        assert record["target"].split()[3:] == ["です", "。"]
        assert not set(f"{record['prompt']} {record['target']}".split()) & set(ENGLISH)
    for first, sign, second, result in records(family / file):
        assert first >= 10
        assert second >= 10
        assert result == (first + second if sign == "+" else first - second)


def test_no_model_trains_on_the_files_problems_and_the_files_share_none() -> None:
    training, search, heldout = split_hard_sums(0, PLAN)
    assert (len(search), len(heldout)) == PLAN.examples

    def pairs(sums: object) -> set[frozenset[int]]:
        return {frozenset((int(a), int(b))) for a, b in zip(sums.first, sums.second, strict=True)}  # type: ignore[attr-defined]

    files = pairs(search) | pairs(heldout)
    assert not pairs(search) & pairs(heldout)
    rng = np.random.default_rng(7)
    count = 30_000
    maths = [parse(text) for text in texts(maths_batch(rng, count, training))]
    assert {frozenset((row[0], row[2])) for row in maths if row}.isdisjoint(files)
    for batch in (base_batch, japanese_batch):
        rows = [row for text in texts(batch(rng, count)) if (row := parse(text))]
        assert len(rows) > count // 3
        assert all(second < 10 for _, _, second, _ in rows)


def test_every_sum_that_is_trained_on_is_right() -> None:
    training, _, _ = split_hard_sums(0, PLAN)
    rng = np.random.default_rng(3)
    for batch in (base_batch(rng, 2000), maths_batch(rng, 2000, training), japanese_batch(rng, 2000)):
        for text in texts(batch):
            row = parse(text)
            if row is not None:
                first, sign, second, result = row
                assert result == (first + second if sign == "+" else first - second), text


def test_each_model_ends_as_its_language_does() -> None:
    training, _, _ = split_hard_sums(0, PLAN)
    rng = np.random.default_rng(5)
    base, maths, japanese = (
        texts(rows) for rows in (base_batch(rng, 500), maths_batch(rng, 500, training), japanese_batch(rng, 500))
    )
    assert all(text.endswith(" . </s>") for text in base + maths)
    assert all(text.endswith(" です 。 </s>") for text in japanese)
    assert not any(word in JAPANESE for text in maths for word in text.split())
    # The languages have to be mixed in the base for anything to carry over.
    assert any({"what", "は"} <= set(text.split()) for text in base)
    assert any({"いくつ", "is"} <= set(text.split()) for text in base)


def test_smollm2_references_go_to_their_own_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    requests: list[str] = []

    def locate(name: str) -> Path:
        requests.append(name)
        return tmp_path

    monkeypatch.setattr(smollm2, "resolve_reference", locate)
    assert zoo.resolve_reference("zoo:smollm2/base") == tmp_path
    assert requests == ["base"]


def test_a_fine_tune_learns_its_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few steps of the experts' training, on a tiny model and rows of its own."""
    sources, config = open_sources([build_family(tmp_path).base])
    rng = np.random.default_rng(0)
    rows = [Row(tuple(map(int, rng.integers(4, 60, 8))), 3, f"row {i}", i) for i in range(6)]
    plan = smollm2.Plan(steps=30, peak=3e-3, tokens=64, warm_up=2)
    before, (batch, *_) = load_stored(sources, config), smollm2.shuffled_batches(rows, plan.tokens, 0, 1)
    after = smollm2.fine_tune("tiny", before, config, rows, plan)
    read = {key: getattr(batch, key) for key in ("tokens", "positions", "segment_ids", "predict_at", "targets", "mask")}
    losses = [float(smollm2.target_loss(config, model, read)) for model in (before, after)]
    assert losses[1] < losses[0] - 0.5
    assert capsys.readouterr().err.count("tiny: step ") == plan.steps


def test_six_more_experts_see_a_part_of_what_the_two_do(in_cache, monkeypatch):
    training, _, _ = split_hard_sums(PACKAGED_SEED, PLAN)
    batches = expert_batches(training)
    assert {*batches} == {*zoo.EXPERTS} == {*EXPERT_STEPS}
    rng = np.random.default_rng(0)
    for name, signs in (("sums", {"+"}), ("differences", {"-"}), ("both", {"+", "-"})):
        rows = [parse(text) for text in texts(batches[name](rng, 50))]
        assert {row[1] for row in rows if row is not None} == signs
    assert all(
        "です 。" in text for name in ("easy_sums", "copying", "mixed") for text in texts(batches[name](rng, 20))
    )
    assert all(parse(text) is None for text in texts(batches["copying"](rng, 20)))
    monkeypatch.setattr("evojax_merge.zoo.arithmetic.EXPERT_STEPS", dict.fromkeys(zoo.EXPERTS, 1))
    models = [load_file(zoo.resolve_reference(f"zoo:experts/{name}") / "model.safetensors") for name in zoo.EXPERTS]
    base = load_file(zoo.resolve_reference("zoo:base") / "model.safetensors")
    head = [model["lm_head.weight"].tobytes() for model in (base, *models)]
    assert len(set(head)) == 7
    with pytest.raises(InputError, match="did you mean 'zoo:experts/sums'"):
        zoo.resolve_reference("zoo:experts/sum")


@thorough
def test_a_search_of_the_zoo_names_it_in_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the config does, and others can read it; the model that it makes from elsewhere is the winner."""
    config = {
        "base": "zoo:base", "parents": ["zoo:maths", "zoo:japanese"], "space": {"method": "task_arithmetic"},
        "tasks": [{"name": "sums", "kind": "likelihood", "file": "zoo:search.jsonl", "heldout": 0.98, "limit": 2}],
        "search": {"population": 2, "generations": 1, "finalists": 1},
    }  # fmt: skip
    run = em.evolve(config, out=tmp_path / "run")
    named = {source["model"] for part in run.recipe["slices"] for source in part["sources"]}
    assert named == {"zoo:base", "zoo:maths", "zoo:japanese"} and run.recipe["base_model"] == "zoo:base"
    (tmp_path / "zoo:base").mkdir()
    monkeypatch.chdir(tmp_path)
    again = em.merge(tmp_path / "run/best/recipe.yaml", tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (run.model / "model.safetensors").read_bytes()
    assert "model: zoo:maths" in (run.model / "README.md").read_text()
