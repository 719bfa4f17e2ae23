"""The looped family of the zoo: what its chains come to, what is trained, and that nothing asked for was seen."""

from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from helpers.decoders import hidden_states
from helpers.files import read_lines
from helpers.sampling import thorough

from evojax_merge import zoo
from evojax_merge.checkpoints.bank import load_path_bank, load_stored
from evojax_merge.checkpoints.parents import open_decoders, open_sources
from evojax_merge.errors import InputError
from evojax_merge.models.decoder import logits
from evojax_merge.models.paths import LayerPath, PathSpec
from evojax_merge.zoo import loops
from evojax_merge.zoo.tiny_llama import Plan

SHORT = Plan(steps=(1, 1, 1), examples=(12, 20))
OPERATIONS = {"max": max, "min": min, "plus": lambda a, b: (a + b) % 10, "times": lambda a, b: a * b % 10}


def test_each_answer_is_what_the_last_numbers_come_to() -> None:
    examples = loops.training_batch(np.random.default_rng(0), 300, list(OPERATIONS))
    met = set()
    for example in examples:
        operation, *words = [loops.VOCABULARY[token] for token in example[0]]
        numbers = [int(word) for word in words]
        met.add(operation)
        for runs in range(1, 5):
            for place in range(5):
                expected = reduce(OPERATIONS[operation], numbers[max(0, place - runs) : place + 1])
                assert loops.VOCABULARY[example[runs, 1 + place]] == str(expected)
    assert met == set(OPERATIONS)


def test_training_meets_nothing_that_is_asked_for() -> None:
    search, heldout = loops.split_sums(3, loops.PLAN)
    chains = {*search, *heldout}
    assert (len(search), len(heldout), len(chains)) == (128, 256, 384) and {len(chain) for chain in heldout} == {
        3,
        4,
        5,
    }
    unseen = np.concatenate([loops.codes(np.array([chain])) for chain in chains])
    assert len(np.unique(unseen)) == 384

    def met(**options: np.ndarray) -> set[tuple[int, ...]]:
        tokens = loops.training_batch(np.random.default_rng(0), 5_000, ("plus",), **options)[:, 0, 1:]
        numbers = (tokens - loops.IDS["0"]).tolist()
        return {tuple(row[:length]) for row in numbers for length in (3, 4, 5)} & chains

    assert met() and not met(unseen=unseen)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return loops.family(SHORT).resolve_reference("7/plus").parent


@thorough
def test_what_is_trained_in_loops_is_a_path_of_the_written_model(family: Path) -> None:
    folder = family / "plus"
    sources, configs = open_decoders([folder])
    bank = load_path_bank(sources, PathSpec(tuple(configs), "float32"))
    config = open_sources([folder])[1]
    model = load_stored(sources, config)
    tokens = loops.training_batch(np.random.default_rng(0), 6, ("plus",))[:, 0]
    for count in (1, 4):
        layers = (0, *(1, 2) * count, 3)
        path, expected_config = bank.materialise(LayerPath(layers, (1.0,) * len(layers)), config)
        deep_config, deep = loops.with_loops(config, model, count)
        assert deep_config == expected_config
        found, expected = (
            np.asarray(logits(deep_config, one, hidden_states(deep_config, one, tokens))) for one in (deep, path)
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)


@thorough
def test_a_family_is_files_of_the_zoo(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(family.parents[3]))
    assert zoo.resolve_reference("zoo:loops/7/base") == family / "base"
    weights = [(family / name / "model.safetensors").read_bytes() for name in loops.MODELS]
    assert len(set(weights)) == 3
    records = read_lines(family / "heldout.jsonl")
    assert len(records) == 20
    for record in records:
        operation, *numbers = record["prompt"].split()
        assert operation == "plus" and int(record["target"]) == sum(map(int, numbers)) % 10


@pytest.mark.parametrize(
    ("reference", "told"),
    [("zoo:loops/plsu", "did you mean 'zoo:loops/plus'"), ("zoo:loops/1/2/plus", "no such"), ("zoo:loops/", "no such")],
)
def test_an_unknown_name_is_refused(reference: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        zoo.resolve_reference(reference)
