"""Layer paths: what a path computes, what its trie shares, which paths a genome means, and what is written of them."""

import re
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import jax
import numpy as np
import pytest
import torch
from helpers.commands import assert_refused, run_here
from helpers.decoders import greedy_tokens, hidden_states
from helpers.families import build_family
from helpers.files import examples_in, read_json, read_recipe, write_lines, write_yaml
from helpers.mergekit import assert_same_tensors, merge_by_mergekit
from helpers.models import (
    even_records,
    finetune,
    load_torch,
    random_model,
    save,
    state,
    tiny_config,
    word_tokenizer,
    words,
)
from helpers.sampling import sample, thorough
from helpers.searches import search_config
from hostile import start_command
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.layer_paths import torch_path_logits

from evojax_merge.checkpoints.bank import load_path_bank, load_stored
from evojax_merge.checkpoints.parents import open_decoders, open_sources
from evojax_merge.errors import Failed
from evojax_merge.evaluation import paths as path_evaluation
from evojax_merge.evaluation.batched_tasks import batch_tasks
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.evaluation.paths import PathEvaluator, build_trie, segments
from evojax_merge.mergekit.execute import merge_to, prepare
from evojax_merge.mergekit.write import dump_yaml, path_document
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import logits
from evojax_merge.models.paths import LayerPath, PathBank, PathSpec
from evojax_merge.models.sources import StackedWeights
from evojax_merge.spaces.layer_path import IndicatorSpace, LayerEdit, MoveSpace, ScaleBounds
from evojax_merge.tasks.text import TextTask

# Every family with what it has that a path could get wrong: biases, norms of queries and keys, windows by layer.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
}
TOKENS = np.random.default_rng(0).integers(4, 64, (2, 12)).astype(np.int32)
BOUNDS = ScaleBounds(0.5, 2.0)


def make_parents(root: File, kind: str, depths: Sequence[int] = (3, 4)) -> list[File]:
    """Parents of unlike depth, without a common ancestor."""
    return [
        save(random_model(tiny_config(kind, num_hidden_layers=depth, **FAMILIES[kind]), seed=k), root / f"parent{k}")
        for k, depth in enumerate(depths)
    ]


def open_paths(folders: Sequence[File], dtype: str = "float32") -> tuple[PathBank, PathSpec]:
    sources, configs = open_decoders(folders)
    spec = PathSpec(tuple(configs), dtype)
    return load_path_bank(sources, spec), spec


def stored_logits(config: DecoderConfig, model: StackedWeights) -> np.ndarray:
    return np.asarray(logits(config, model, hidden_states(config, model, TOKENS)))


def random_path(rng: np.random.Generator, layers: int, steps: int, ends: int = 0) -> LayerPath:
    scales = np.exp(rng.uniform(np.log(0.6), np.log(1.6), steps))
    return LayerPath(tuple(map(int, rng.integers(0, layers, steps))), tuple(map(float, scales)), ends)


@pytest.fixture(scope="module", params=sample(FAMILIES, 2))
def parents(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[File]:
    return make_parents(tmp_path_factory.mktemp(request.param), request.param)


# ---------------------------------------------------------------------------------------------------------------
# What a path computes


def test_a_parents_own_layers_give_its_logits_bit_for_bit(parents: list[File]) -> None:
    bank, spec = open_paths(parents)
    for parent, first in ((0, 0), (1, 3)):
        depth = spec.configs[parent].layers
        path = LayerPath(tuple(range(first, first + depth)), (1.0,) * depth, parent)
        sources, config = open_sources([parents[parent]])
        model, path_config = bank.materialise(path, spec.configs[0])
        np.testing.assert_array_equal(
            stored_logits(path_config, model), stored_logits(config, load_stored(sources, config))
        )


def test_random_paths_are_a_plain_loop_over_layers(parents: list[File], record_property: Any) -> None:
    bank, spec = open_paths(parents)
    models = [load_torch(folder) for folder in parents]
    rng = np.random.default_rng(1)
    for ends in (0, 1):
        path = random_path(rng, len(spec.origins), 6, ends)
        model, config = bank.materialise(path, spec.configs[0])
        found = stored_logits(config, model)
        np.testing.assert_allclose(found, torch_path_logits(models, TOKENS, path, spec.origins, True), atol=1e-4)
        # The paper's form differs by the norms' epsilon alone.
        apart = np.abs(found - torch_path_logits(models, TOKENS, path, spec.origins, False)).max()
        record_property("folded against the paper's form", float(apart))
        assert apart < 1e-2


def test_written_paths_are_the_candidates(parents: list[File], tmp_path: File) -> None:
    """A plain folder: in transformers it gives the candidate's logits, and its greedy tokens."""
    bank, spec = open_paths(parents, "float32")
    for number, ends in enumerate((0, 1)):
        path = random_path(np.random.default_rng(number), len(spec.origins), 5, ends)
        out = write_path(path, spec, parents, tmp_path / f"out{number}")
        model, config = bank.materialise(path, spec.configs[0])
        theirs = load_torch(out)
        assert theirs.config.num_hidden_layers == 5
        if getattr(theirs.config, "layer_types", None) is not None:
            assert len(theirs.config.layer_types) == 5
        with torch.no_grad():
            np.testing.assert_allclose(
                stored_logits(config, model), theirs(torch.tensor(TOKENS).long()).logits.numpy(), atol=1e-4
            )
        again, own = open_sources([out])
        assert own.windows == config.windows
        np.testing.assert_array_equal(stored_logits(own, load_stored(again, own)), stored_logits(config, model))
        prompt = torch.tensor(TOKENS[:1]).long()
        expected = theirs.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, prompt.shape[1] :]
        assert greedy(config, model, 4) == expected.tolist()


def greedy(config: DecoderConfig, model: StackedWeights, new: int) -> list[int]:
    return greedy_tokens(config, model, TOKENS[:1], [0], new, ())[0].tolist()


def write_path(path: LayerPath, spec: PathSpec, folders: Sequence[File], out: File) -> File:
    recipe = out.with_suffix(".yaml")
    recipe.write_text(dump_yaml(path_document(path, spec, [str(folder) for folder in folders])))
    merge_to(prepare(read_recipe(recipe)), out, card="")
    return out


def test_recipes_of_paths_merge_the_same_in_mergekit(tmp_path: File) -> None:
    """Scales and all, where embedding and head are those of the first and last layer's parent."""
    folders = make_parents(tmp_path, "mistral")
    _, spec = open_paths(folders)
    path = LayerPath((0, 1, 4, 5, 1, 2), (1.0, 1.0, 1.25, 0.8, 1.0, 1.0))
    document = path_document(path, spec, [str(folder) for folder in folders])
    assert "ends" not in document
    ours = state(write_path(path, spec, folders, tmp_path / "ours"))
    assert_same_tensors(ours, state(merge_by_mergekit(document, tmp_path / "theirs")), rtol=1e-6)


def test_models_that_are_merged_and_walked_may_be_bfloat16(tmp_path: File) -> None:
    """Rounded once, before it is scored: the folded weights are those that are written."""
    folders = make_parents(tmp_path, "llama")
    bank, spec = open_paths(folders, "bfloat16")
    path = random_path(np.random.default_rng(3), len(spec.origins), 4)
    model, _ = bank.materialise(path, spec.configs[0])
    written = state(write_path(path, spec, folders, tmp_path / "out"))
    for i in range(4):
        found = np.asarray(model.stacks["layers"]["down"][i], np.float32)
        np.testing.assert_array_equal(found, written[f"model.layers.{i}.mlp.down_proj.weight"])


# ---------------------------------------------------------------------------------------------------------------
# What candidates share


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=8))
@settings(max_examples=60)
def test_segments_walk_every_sequence_once(rows: list[list[int]]) -> None:
    """Following the walk gives each distinct sequence, and takes each shared beginning once."""
    sequences = list(dict.fromkeys(tuple((layer, 1.0) for layer in row) for row in rows))
    states: list[tuple] = [()]
    found, steps_taken = {}, 0
    for depth, steps, ended in segments(build_trie(sequences)):
        del states[depth + 1 :]
        states.append((*states[depth], *steps))
        steps_taken += len(steps)
        if ended is not None:
            found[ended] = states[-1]
    assert [found[i] for i in range(len(sequences))] == sequences
    assert steps_taken == len({row[: i + 1] for row in sequences for i in range(len(row))})


class Setting:
    """Two parents, their paths' bank, and a likelihood and a generation task, behind a header of so many words."""

    def __init__(self, root: File, header: int) -> None:
        self.folders = make_parents(root, "qwen2")
        self.bank, self.spec = open_paths(self.folders)
        file = write_lines(root / "tasks.jsonl", even_records(6))
        before = "".join(f"w{4 + i % 50} " for i in range(header))
        kinds: list[tuple[Any, str]] = [("likelihood", "log_probability"), ("exact_match", "accuracy")]
        self.tasks = [
            TextTask(kind, kind, metric, 1.0, str(file), tuple(examples), max_new_tokens=3)
            for kind, metric in kinds
            for examples in (examples_in(file, kind, prompt=before + "{prompt}"),)
        ]

    def evaluator(self, config: DecoderConfig | None = None) -> Evaluator:
        tokenizer = word_tokenizer(words())
        batched_tasks = batch_tasks([self.tasks], tokenizer, 64, 256, (2,))[0]
        return Evaluator(config or self.spec.configs[0], tokenizer, batched_tasks)

    def paths(self) -> PathEvaluator:
        return PathEvaluator(self.evaluator(), self.bank, 12)


@pytest.fixture(scope="module", params=sample([0, 40], 1))
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("setting"), request.param)


@thorough
def test_too_large_a_pass_is_halved(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where half of the largest batch fits, scores are those of larger batches."""
    rng = np.random.default_rng(3)
    # As long as those of other tests: each length is a program to compile.
    paths = [random_path(rng, 7, steps, 0) for steps in (3, 4)]
    whole, begin, said = setting.paths().evaluate(paths), path_evaluation.embed_batch, []

    def small(config: DecoderConfig, source: Any, tokens: np.ndarray, *rest: Any) -> Any:
        if tokens.size > largest // 2:
            raise jax.errors.JaxRuntimeError("INTERNAL: YNNPACK operation failed")
        return begin(config, source, tokens, *rest)

    monkeypatch.setattr(path_evaluation, "embed_batch", small)
    (batched_tasks,) = batch_tasks([setting.tasks], word_tokenizer(words()), 256, 256, (2,))
    scoring = batched_tasks[0].scoring
    assert scoring is not None
    largest = max(batch.tokens.size for batch in scoring.batches)
    evaluator = Evaluator(setting.spec.configs[0], word_tokenizer(words()), batched_tasks, log=said.append)
    found = PathEvaluator(evaluator, setting.bank, 12).evaluate(paths)
    assert said and all(text.startswith("likelihood: out of memory; going on with batches of ") for text in said)
    for name, metrics in whole.matrices.items():
        for metric, matrix in metrics.items():
            np.testing.assert_allclose(found.matrices[name][metric], matrix, rtol=0, atol=1e-5)
    monkeypatch.setattr(path_evaluation, "embed_batch", lambda config, *rest: small(config, None, np.zeros((9, 9))))
    with pytest.raises(Failed, match="out of memory with one candidate and one row a pass"):
        setting.paths().evaluate(paths)


def test_scores_are_those_of_the_stored_models(setting: Setting) -> None:
    rng = np.random.default_rng(0)
    paths = [random_path(rng, 7, steps, steps % 2) for steps in sample((1, 3, 5, 8), 2)]
    found = setting.paths().evaluate(paths)
    for p, path in enumerate(paths):
        model, config = setting.bank.materialise(path, setting.spec.configs[0])
        expected = setting.evaluator(config).score_stored(model)
        for task in setting.tasks:
            for metric, row in expected.matrices[task.name].items():
                np.testing.assert_allclose(found.matrices[task.name][metric][p], row[0], atol=1e-5)
        assert found.outputs["exact_match"][p] == expected.outputs["exact_match"][0]


def test_company_changes_no_score(setting: Setting) -> None:
    """Alone, with others that share its beginning, or met before: the same bits."""
    shared = tuple((m, 1.0) for m in (0, 1, 2))
    paths = [
        LayerPath(tuple(m for m, _ in shared) + tail, (1.0,) * (3 + len(tail))) for tail in ((), (4,), (4, 5), (6,))
    ]
    together = setting.paths()
    scores = together.evaluate(paths).matrices["likelihood"]["log_probability"]
    for p, path in enumerate(paths):
        alone = setting.paths().evaluate([path]).matrices["likelihood"]["log_probability"][0]
        np.testing.assert_array_equal(scores[p], alone)
    # 3 shared steps, then 4, 5 after it, and 6: six instead of fifteen, in each batch.
    scored, written = setting.evaluator().batched_tasks
    likelihood = together.work.steps_run - sum(len(path.layers) for path in paths) * written.batches
    assert likelihood == 6 * scored.batches


def test_paths_that_come_again_cost_nothing(setting: Setting) -> None:
    evaluator = setting.paths()
    path, other = LayerPath((0, 4, 1), (1.0, 1.1, 1.0)), LayerPath((2,), (1.0,))
    first = evaluator.evaluate([path, path, None, other])
    assert len(evaluator.score_cache) == 2
    done = evaluator.work.steps_run
    again = evaluator.evaluate([other, path])
    assert evaluator.work.steps_run == done
    matrix, second = (scores.matrices["likelihood"]["log_probability"] for scores in (first, again))
    np.testing.assert_array_equal(matrix[0], matrix[1])
    np.testing.assert_array_equal(second, matrix[[3, 0]])
    # A candidate without a path has the worst score there is.
    assert np.isnan(matrix[2]).all()
    assert np.isnan(first.matrices["exact_match"]["accuracy"][2]).all()


# ---------------------------------------------------------------------------------------------------------------
# Which path a genome means


def moves_space(**changes: Any) -> MoveSpace:
    space = MoveSpace((6, 6, 3), 3, 3, BOUNDS, True, 12, 0)
    return replace(space, **changes)


def test_spaces_start_from_the_first_parent() -> None:
    for space in (
        moves_space(), moves_space(scaled=False),
        *(IndicatorSpace((6, 4), 2, scales, BOUNDS, 20, 0) for scales in ("matrix", "none")),
    ):  # fmt: skip
        (path,) = space.decode(space.start[None])
        assert path is not None
        assert path.layers == (0, 1, 2, 3, 4, 5)
        np.testing.assert_allclose(path.residual_scales(), 1.0, rtol=1e-6)
        assert space.start.shape == (space.dims,)


@pytest.mark.parametrize(
    ("moves", "layers", "folds"),
    [
        ([LayerEdit("skip", 2, 2)], [0, 1, 4, 5], [1] * 4),
        ([LayerEdit("repeat", 1, 2)], [0, 1, 2, 1, 2, 3, 4, 5], [1] * 8),
        ([LayerEdit("scale", 1, 3, 0.8)], [0, 1, 2, 3, 4, 5], [1, 1.25, 1.25, 1.25, 1, 1]),
        ([LayerEdit("scale", 1, 2, 0.8), LayerEdit("scale", 2, 1, 2.0)], [0, 1, 2, 3, 4, 5], [1, 1.25, 0.625, 1, 1, 1]),
        ([LayerEdit("repeat", 1, 2, 2.0)], [0, 1, 2, 1, 2, 3, 4, 5], [1, 1, 1, 0.5, 0.5, 1, 1, 1]),
        ([LayerEdit("splice", 3, 2, 0.5, 1)], [0, 1, 2, 9, 10, 5], [1, 1, 1, 2, 2, 1]),
        # The third parent is half as deep: its one layer stands for two.
        ([LayerEdit("splice", 2, 2, 1.0, 2)], [0, 1, 13, 4, 5], [1] * 5),
        ([LayerEdit("skip", 0, 3), LayerEdit("skip", 3, 3)], None, None),
        ([LayerEdit("skip", 0, 3), LayerEdit("repeat", 0, 2), LayerEdit("repeat", 5, 1)], [3, 4, 5, 5], [1] * 4),
        ([LayerEdit("repeat", 0, 3), LayerEdit("repeat", 3, 3), LayerEdit("repeat", 0, 2)], None, None),
    ],
    ids=str,
)  # fmt: skip
def test_moves_edit_the_first_parent(
    moves: list[LayerEdit], layers: list[int] | None, folds: list[float] | None
) -> None:
    space = moves_space()
    path = space.path(moves)
    if layers is None:
        assert path is None
        return
    assert path is not None
    assert list(path.layers) == layers
    np.testing.assert_allclose(path.residual_scales(), folds, rtol=1e-6)
    # Genome and back.
    assert [replace(move, scale=round(move.scale, 4)) for move in space.moves(space.genome(moves))] == moves
    (again,) = space.decode(space.genome(moves)[None])
    assert again is not None
    assert again.layers == path.layers


@given(st.integers(0, 2**31))
@settings(max_examples=40)
def test_any_genome_is_a_path_or_none(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for space in (moves_space(), IndicatorSpace((3, 4), 2, "network", BOUNDS, 9, 1)):
        (path,) = space.decode(rng.normal(0.5, 0.6, (1, space.dims)).astype(np.float32))
        if path is None:
            continue
        assert 0 < len(path.layers) <= space.max_steps
        assert len(path.layers) <= space.max_length
        assert all(0 <= layer < sum(space.depths) for layer in path.layers)
        assert all(scale > 0 for scale in path.scales)
        assert path.embedding_parent == space.embedding_parent


def test_indicator_genomes_are_the_papers_arrays() -> None:
    """On where the indicator is, in the order of the repeated series; scaled by W[i, j] from i to j."""
    space = IndicatorSpace((2, 2), 2, "matrix", BOUNDS, 8, 0)
    assert space.dims == 8 + 16
    on = np.array([1, 0, 0, 1, 1, 1, 0, 0], bool)
    matrix = np.exp(np.random.default_rng(0).uniform(np.log(0.5), np.log(2), (4, 4)))
    (path,) = space.decode(space.genome(on, matrix)[None])
    assert path is not None
    assert path.layers == (0, 3, 0, 1)
    np.testing.assert_allclose(path.scales, [1, matrix[0, 3], matrix[3, 0], matrix[0, 1]], rtol=1e-5)
    assert space.decode(space.genome(np.zeros(8, bool))[None]) == [None]
    assert IndicatorSpace((32, 32), 3, "matrix", BOUNDS, 192, 0).dims == 4288


def test_network_scales_are_within_bounds_and_one_in_the_middle() -> None:
    space = IndicatorSpace((3, 3), 2, "network", BOUNDS, 12, 0)
    on = np.ones(12, bool)
    (path,) = space.decode(space.genome(on)[None])
    assert path is not None
    np.testing.assert_allclose(path.scales, 1.0)
    genome = space.genome(on)
    genome[12:] = np.random.default_rng(0).random(space.scale_dims)
    (path,) = space.decode(genome[None])
    assert path is not None
    assert min(path.scales) >= 0.5 and max(path.scales) <= 2
    assert np.ptp(path.scales) > 0.1


# ---------------------------------------------------------------------------------------------------------------
# As a user runs it


TASKS = [
    {"name": "text", "kind": "likelihood", "file": "tasks.jsonl", "heldout": 0.25},
    {"name": "words", "kind": "exact_match", "file": "tasks.jsonl", "max_new_tokens": 2, "weight": 0},
]


def write_config(root: File, **changes: Any) -> File:
    document = search_config(None, 3, 6, tasks=TASKS, seed=1, base=None, space=None)
    return write_yaml(root / "config.yaml", document | changes)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[File, File]:
    """A config of two stages, and its finished run."""
    root = tmp_path_factory.mktemp("chain")
    build_family(root)
    stages = [
        {"space": {"method": "linear", "parameters": {"weight": {}}}, "search": {"generations": 2, "population": 4}},
        {
            "data_flow": {"moves": 2, "window": 1},
            "search": {"strategy": "path_ga", "generations": 4, "population": 6},
        },
    ]
    document = {"parents": ["parent0", "parent1"], "base": "base", "stages": stages, "tasks": TASKS, "seed": 1}
    write_yaml(root / "config.yaml", document)
    run_here("search", root / "config.yaml", "--out", root / "run")
    return root / "config.yaml", root / "run"


def contents(out: File) -> dict[str, bytes]:
    files = ["history.jsonl", "result.json", "config.yaml", "best/recipe.yaml", "best/model/model.safetensors"]
    files += ["stages/stage-1/history.jsonl", "stages/stage-1/best/model/model.safetensors"]
    return {name: (out / name).read_bytes() for name in files}


def test_stages_follow_each_other(chain: tuple[File, File]) -> None:
    _, out = chain
    table = read_json(out / "result.json")["table"]
    # The merge that the first stage found is the first parent of the second.
    assert [row["name"] for row in table] == ["base", "stage-1", "parent0", "parent1", "evolved path"]
    assert read_json(out / "stages/stage-1/result.json")["table"][-1]["name"] == "evolved linear"
    assert (out / "report.html").exists()
    card = (out / "best/model/README.md").read_text()
    assert "## Layers" in card and "A = stage-1" in card
    assert re.search(r"the first parent stage-1 -?[\d.]+\.", card)
    assert len((out / "history.jsonl").read_text().splitlines()) == 4


@thorough
def test_a_chain_that_is_killed_and_resumed_ends_in_the_same_bytes(chain: tuple[File, File], tmp_path: File) -> None:
    config, finished = chain
    out = tmp_path / "run"
    for wanted in (out / "stages/stage-1/history.jsonl", out / "history.jsonl"):
        arguments = ["--resume"] if out.exists() else []
        process = start_command("search", config, "--out", out, *arguments)
        deadline = time.monotonic() + 240
        while process.poll() is None and not (wanted.exists() and wanted.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run_here("search", config, "--out", out, "--resume")
    # The run is in another folder, which is all that may differ.
    for name, content in contents(finished).items():
        assert contents(out)[name].replace(str(out).encode(), str(finished).encode()) == content, name


def test_winner_of_a_path_search_is_a_plain_model(chain: tuple[File, File]) -> None:
    _, out = chain
    found = read_json(out / "result.json")["path"]
    theirs = load_torch(out / "best/model")
    assert theirs.config.num_hidden_layers == len(found["layers"])
    folders = [out / "stages/stage-1/best/model", out.parent / "parent0", out.parent / "parent1"]
    bank, spec = open_paths(folders)
    model, config = bank.materialise(LayerPath(tuple(found["layers"]), tuple(found["scales"])), spec.configs[0])
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(stored_logits(config, model), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    sample(
        [
            ({"data_flow": {"embedding_parent": 2}}, ("embedding_parent", "parent 2")),
            ({"data_flow": {"scale_low": -1.0}}, ("scale_low",)),
            ({"data_flow": {"scale_low": 3.0}}, ("scale_low",)),
            ({"data_flow": {"scales": "matrix"}}, ("scales", "block")),
            ({"data_flow": {"max_layers": 2}}, ("max_layers", "3 layers")),
            ({"data_flow": {"movs": 2}}, ("data_flow.movs", "moves")),
            ({"data_flow": {}, "space": {"method": "linear"}}, ("data_flow", "stages")),
            ({}, ("space", "data_flow")),
            ({"stages": [{"search": {}}]}, ("stages[0]", "data_flow")),
            ({"stages": []}, ("stages",)),
        ],
        4,
    ),
    ids=str,
)
def test_wrong_configs_are_refused_in_one_line(changes: dict[str, Any], named: tuple[str, ...], tmp_path: File) -> None:
    build_family(tmp_path)
    assert_refused(named, "search", write_config(tmp_path, **changes), "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("different", "named"),
    [
        ({"hidden_size": 64}, ("[64, 64]", "[64, 48]")),
        ({"vocab_size": 70}, ("[70, 48]", "[64, 48]")),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, ("rope", "500000", "10000")),
    ],
    ids=str,
)
def test_unlike_parents_are_refused(different: dict[str, Any], named: tuple[str, ...], tmp_path: File) -> None:
    build_family(tmp_path)
    save(random_model(tiny_config(**different)), tmp_path / "other")
    config = write_config(tmp_path, data_flow={}, parents=["parent0", "other"])
    assert_refused(named, "search", config, "--out", tmp_path / "run")


def test_the_papers_dimensions_take_a_separable_strategy_and_say_so(tmp_path: File) -> None:
    model = random_model(tiny_config(num_hidden_layers=12))
    save(model, tmp_path / "parent0")
    save(finetune(model, 1), tmp_path / "parent1")
    write_lines(tmp_path / "tasks.jsonl", even_records(6))
    flow = {"form": "indicator", "repetitions": 2, "max_layers": 16}
    config = write_config(tmp_path, data_flow=flow, search={"generations": 1, "population": 4}, tasks=TASKS[:1])
    done = run_here("search", config, "--out", tmp_path / "run")
    assert "sep_cma_es: 624 dimensions" in done.stdout
