"""The evaluator: a population in batched passes scores what each candidate scores alone, as a model on disk."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.decoders import score_merges
from helpers.families import Family, build_family
from helpers.files import examples_in, write_lines
from helpers.models import load_torch, tiny_config, word_tokenizer, words
from helpers.sampling import sample, thorough
from merge_kernels import METHODS
from reference.torch_models import text_logprobs, torch_scores

from evojax_merge.checkpoints.bank import load_bank, load_stored, stored_tensors
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.checkpoints.writer import ShardWriter, TensorSpec
from evojax_merge.errors import Failed
from evojax_merge.evaluation import batched_tasks, generation, passes
from evojax_merge.evaluation.batched_tasks import batch_tasks
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.evaluation.responses import arrays_of
from evojax_merge.evaluation.scores import TaskScores, fitness, means
from evojax_merge.evaluation.targets import find_target
from evojax_merge.models import decoder
from evojax_merge.models.architecture import LAYERS, architecture_of, shared_leaves
from evojax_merge.models.bank import Bank, MergeSpec, Recipe, take_candidate
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.layers import SequenceLayout
from evojax_merge.models.sources import LazyMerge
from evojax_merge.spaces.parameter import ParameterSpace, SearchParameter
from evojax_merge.tasks import batches
from evojax_merge.tasks.task import TaskRequests
from evojax_merge.tasks.text import Example, TextTask

POPULATION = 3
# Candidates that share a pass, where more than one do: each size is a program to compile. It does not divide the
# population.
CHUNK = 2
# Words of each example's prompt and target: the first half fits into 8 tokens, the others need 16.
LENGTHS = ((3, 2), (5, 3), (4, 1), (2, 3), (10, 2), (12, 1), (11, 4), (9, 3))

materialise = jax.jit(lambda source: source.materialise())


def make_records() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)

    def text(size: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(4, 64, size))

    return [
        {
            "prompt": text(prompt),
            "target": text(target),
            "choices": [text(1), text(2), text(3)],
            "answer": int(rng.integers(3)),
        }
        for prompt, target in LENGTHS
    ]


class Setting:
    """A bank, a population of recipes over it, and three tasks: two of short examples, one of short and long ones."""

    def __init__(self, family: Family, method: str, export_dtype: str = "float32") -> None:
        self.family = family
        needs_base = METHODS[method].options.has_base
        parents = family.parents[: METHODS[method].max_parents]
        sources, self.config = open_sources([*([family.base] if needs_base else []), *parents])
        self.parents = len(parents)
        self.fixed = tuple((p.name, (float(p.default or 0),)) for p in METHODS[method].parameters if not p.searched)
        self.spec = MergeSpec(method, METHODS[method].options, 3, export_dtype, self.fixed)
        self.bank: Bank = load_bank(sources, self.config, self.spec)
        self.tokenizer = word_tokenizer(words())
        self.recipes = self.random_recipes(POPULATION)
        self.tasks = [
            self.task("text", "likelihood", "log_probability", 8),
            self.task("choice", "multiple_choice", "margin", 4, weight=0.5),
            self.task("words", "exact_match", "accuracy", 4, pattern=r"w\d+", max_new_tokens=4),
        ]

    def task(self, name: str, kind: Any, metric: str, count: int, weight: float = 1.0, **changes: Any) -> TextTask:
        file = write_lines(self.family.root / "records.jsonl", make_records())
        examples = tuple(examples_in(file, kind))[:count]
        return TextTask(name, kind, metric, weight, str(file), examples, **changes)

    @property
    def short(self) -> TextTask:
        """The likelihood task's short examples, which need one shape."""
        return replace(self.tasks[0], examples=self.tasks[0].examples[:4])

    def random_recipes(self, count: int, seed: int = 0) -> Recipe:
        method = self.spec.method
        wide = {
            "weight": (0.0, 1.2), "density": (0.2, 0.8), "lambda": (0.6, 1.4), "t": (0.0, 1.0),
            "select_topk": (0.2, 1.0), "scale": (0.5, 1.5), "r": (0.0, 1.0), "alpha": (0.0, 1.0),
            "filter": (0.0, 1.0), "width": (0.0, 1.0),
        }  # fmt: skip
        components = architecture_of(self.config).components
        space = ParameterSpace(
            method=method, parents=self.parents, layers=self.config.layers, layers_per_group=1, names=components,
            components=tuple((name,) for name in components),
            shared=tuple(leaf.name for leaf in shared_leaves(self.config)),
            search_parameters=tuple(
                SearchParameter(p.name, *wide[p.name], (0.5,)) for p in method.parameters if p.searched
            ),
            constants=self.fixed,
        )  # fmt: skip
        genomes = np.random.default_rng(seed).random((count, space.dims)).astype(np.float32)
        return jax.tree.map(np.asarray, jax.vmap(space.recipe)(jnp.asarray(genomes)))

    def evaluator(
        self, tasks: list[TextTask] | None = None, chunk: int | None = None, per_batch: int = 128
    ) -> Evaluator:
        batched_tasks = batch_tasks([tasks or self.tasks], self.tokenizer, per_batch, 256, (2,))[0]
        return Evaluator(self.config, self.tokenizer, batched_tasks, chunk=chunk)

    def write(self, p: int, folder: Path) -> Any:
        """Candidate p on disk, as torch loads it."""
        model = materialise(LazyMerge.of(self.bank, take_candidate(self.recipes, p), self.spec))
        tensors = dict(stored_tensors(model, self.config))
        specs = {name: TensorSpec(values.shape, values.dtype) for name, values in tensors.items()}
        folder.mkdir()
        with ShardWriter(folder, specs) as writer:
            for name in writer.order:
                writer.write(name, tensors[name])
        (folder / "config.json").write_bytes((self.family.base / "config.json").read_bytes())
        return load_torch(folder)


@pytest.fixture(scope="module")
def ties(family: Family) -> Setting:
    return Setting(family, "ties")


@pytest.fixture(scope="module")
def ties_scores(ties: Setting) -> TaskScores:
    return score_merges(ties.evaluator(chunk=1), ties.bank, ties.spec, ties.recipes)


def test_population_scores_equal_models_on_disk(ties: Setting, ties_scores: TaskScores, tmp_path: Path) -> None:
    """Each candidate written out and scored by transformers, one example after the other."""
    for p in range(POPULATION):
        expected = torch_scores(ties.write(p, tmp_path / str(p)), ties.tasks)
        for name, metrics in expected.items():
            assert set(metrics) == set(ties_scores.matrices[name])
            for metric, row in metrics.items():
                found = ties_scores.matrices[name][metric]
                assert found.dtype == np.float32
                assert found.shape == (POPULATION, len(row))
                np.testing.assert_allclose(found[p], row, atol=1e-4, err_msg=f"{name} {metric}")
    # The candidates differ, so that equality above says something.
    assert np.ptp(ties_scores.matrices["text"]["log_probability"], axis=0).min() > 1e-3


@pytest.mark.parametrize(
    "method",
    # Those that look at activations have prompts, in test_calibration.
    sample(
        [
            name
            for name, one in METHODS.items()
            if name != "ties" and not one.looks_at and any(p.searched for p in one.parameters)
        ],
        2,
    ),
)
def test_other_methods_score_what_they_materialise(method: str, family: Family, tmp_path: Path) -> None:
    setting = Setting(family, method)
    scores = score_merges(setting.evaluator([setting.short]), setting.bank, setting.spec, setting.recipes)
    model = setting.write(1, tmp_path / "model")
    expected = [text_logprobs(model, e.prompt, e.targets[0]).mean() for e in setting.short.examples]
    found = scores.matrices["text"]["log_probability"][1]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@thorough
def test_untied_biased_models_and_bfloat16_export(tmp_path: Path) -> None:
    """What is scored is what would be written: rounded to the export dtype. Layers with biases, a head of its own."""
    family = build_family(tmp_path / "family", tiny_config("qwen2"), dtype=torch.bfloat16)
    setting = Setting(family, "dare_ties", "bfloat16")
    assert "head" in setting.bank.shared
    scores = score_merges(setting.evaluator([setting.short]), setting.bank, setting.spec, setting.recipes)
    model = setting.write(0, tmp_path / "model")
    expected = [text_logprobs(model, e.prompt, e.targets[0]).mean() for e in setting.short.examples]
    found = scores.matrices["text"]["log_probability"][0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert open_sources([tmp_path / "model"])[0].entry(0, "lm_head.weight").dtype == jnp.bfloat16
    # Unrounded it would score otherwise, so that the equality above says something.
    wide = replace(setting.spec, export_dtype="float32")
    unrounded = score_merges(setting.evaluator([setting.short]), setting.bank, wide, setting.recipes)
    assert np.abs(unrounded.matrices["text"]["log_probability"][0] - found).min() > 1e-4


@pytest.mark.parametrize(("chunk", "population"), sample([(CHUNK + 6, CHUNK), (CHUNK, POPULATION)], 1))
def test_scores_do_not_depend_on_the_chunk(chunk: int, population: int, ties: Setting, ties_scores: TaskScores) -> None:
    """Neither where the last chunk is filled up, nor where there are fewer candidates than a chunk takes."""
    recipes = jax.tree.map(lambda leaf: leaf[:population], ties.recipes)
    scores = score_merges(ties.evaluator(chunk=chunk), ties.bank, ties.spec, recipes)
    assert scores.outputs == {name: texts[:population] for name, texts in ties_scores.outputs.items()}
    for name, metrics in ties_scores.matrices.items():
        for metric, expected in metrics.items():
            np.testing.assert_allclose(scores.matrices[name][metric], expected[:population], atol=1e-5)


def test_scores_do_not_depend_on_the_batches(ties: Setting, ties_scores: TaskScores) -> None:
    evaluator = ties.evaluator(ties.tasks[::2], chunk=1, per_batch=4)
    assert all(request.batches >= 4 for request in evaluator.batched_tasks)
    scores = score_merges(evaluator, ties.bank, ties.spec, ties.recipes)
    assert scores.outputs == ties_scores.outputs
    for name, metrics in scores.matrices.items():
        for metric, found in metrics.items():
            np.testing.assert_allclose(found, ties_scores.matrices[name][metric], atol=1e-5)


def test_generation_of_a_population_equals_each_alone(ties: Setting, ties_scores: TaskScores) -> None:
    evaluator = ties.evaluator(ties.tasks[2:])
    outputs = ties_scores.outputs["words"]
    assert len({text for row in outputs for text in row}) > 4
    for p in range(POPULATION):
        alone = jax.tree.map(lambda leaf, p=p: leaf[p : p + 1], ties.recipes)
        assert score_merges(evaluator, ties.bank, ties.spec, alone).outputs["words"] == [outputs[p]]


def test_stored_model_scores_as_torch_does(ties: Setting, family: Family) -> None:
    sources, config = open_sources([family.parents[1]])
    scores = ties.evaluator().score_stored(load_stored(sources, config))
    for name, metrics in torch_scores(load_torch(family.parents[1]), ties.tasks).items():
        for metric, expected in metrics.items():
            np.testing.assert_allclose(scores.matrices[name][metric], expected[None], atol=1e-4)


def test_whole_weight_on_one_parent_scores_as_that_parent(family: Family) -> None:
    setting = Setting(family, "ties")
    stored = setting.evaluator().score_stored(load_stored(*open_sources([family.parents[0]])))
    recipes = setting.random_recipes(1)
    for parameters in (recipes.stacks[LAYERS], *recipes.shared.values()):
        parameters["weight"] = np.broadcast_to(np.float32([1, 0]), parameters["weight"].shape)
        parameters["density"] = np.ones_like(parameters["density"])
        parameters["lambda"] = np.ones_like(parameters["lambda"])
    merged = score_merges(setting.evaluator(), setting.bank, setting.spec, recipes)
    for name, metrics in stored.matrices.items():
        for metric, expected in metrics.items():
            np.testing.assert_allclose(merged.matrices[name][metric], expected, atol=1e-4)


def test_merged_head_in_tiles(ties: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge whose head is walked over in tiles that do not divide the vocabulary."""
    scoring = ties.evaluator(ties.tasks[:1]).batched_tasks[0].scoring
    assert scoring is not None
    arrays = arrays_of(scoring.batches[0])
    source = LazyMerge.of(ties.bank, take_candidate(ties.recipes, 0), ties.spec)

    def totals(tile: int) -> np.ndarray:
        monkeypatch.setattr(decoder, "VOCAB_TILE", tile)

        @jax.jit
        def run(source: Any) -> jax.Array:
            columns = SequenceLayout(jnp.asarray(arrays["positions"]), jnp.asarray(arrays["segment_ids"]))
            hidden, _ = decoder.forward(ties.config, source, jnp.asarray(arrays["tokens"]), columns)
            return passes.logprobs_from_hidden(ties.config, source, hidden, arrays, None)[0]

        return np.asarray(run(source))

    np.testing.assert_allclose(totals(13), totals(8192), atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Fitness


def test_failed_candidate_has_no_fitness_and_harms_no_other(ties: Setting, ties_scores: TaskScores) -> None:
    recipes = jax.tree.map(np.copy, ties.recipes)
    recipes.stacks[LAYERS]["weight"][0, 1] = np.nan
    recipes.stacks[LAYERS]["lambda"][1] = 3e38
    for chunk in (1, CHUNK):
        scores = score_merges(ties.evaluator(chunk=chunk), ties.bank, ties.spec, recipes)
        found, expected = fitness(ties.tasks, scores), fitness(ties.tasks, ties_scores)
        assert np.isfinite(expected).all()
        assert np.isnan(found).tolist() == [True, True, False]
        np.testing.assert_allclose(found[2], expected[2], atol=1e-5)


def matrix_task(name: str, metric: str, weight: float) -> TextTask:
    kind = "likelihood" if metric == "log_probability" else "multiple_choice"
    return TextTask(name, kind, metric, weight, "file", (Example("a", ("b",), "b", 1),))  # type: ignore[arg-type]


def test_fitness_is_the_weighted_mean_of_the_tasks_metrics() -> None:
    one = np.array([[-1.0, -3.0], [-2.0, -2.5]], np.float32)
    two = {"accuracy": np.array([[1, 0], [1, 1]], np.float32), "margin": np.array([[0.5, -1], [3, 4]], np.float32)}
    scores = TaskScores({"one": {"log_probability": one}, "two": two})
    tasks = [matrix_task("one", "log_probability", 3.0), matrix_task("two", "margin", 1.0)]
    np.testing.assert_allclose(fitness(tasks, scores), [(3 * -2 - 0.25) / 4, (3 * -2.25 + 3.5) / 4])
    assert means(tasks, scores) == [
        {"one/log_probability": -2.0, "two/accuracy": 0.5, "two/margin": -0.25},
        {"one/log_probability": -2.25, "two/accuracy": 1.0, "two/margin": 3.5},
    ]
    shown = [replace(tasks[0], weight=0.0), tasks[1]]
    np.testing.assert_allclose(fitness(shown, scores), [-0.25, 3.5])
    one[0, 1] = np.nan
    assert np.isnan(fitness(tasks, scores)).tolist() == [True, False]
    # A task that is only shown cannot fail a candidate.
    np.testing.assert_allclose(fitness(shown, scores), [-0.25, 3.5])


# ---------------------------------------------------------------------------------------------------------------
# Compilation and progress


def test_later_generations_compile_nothing(ties: Setting) -> None:
    evaluator = ties.evaluator(chunk=CHUNK)
    compiled_passes = [passes.score, passes.materialise, passes.prefill, passes.decode]
    score_merges(evaluator, ties.bank, ties.spec, ties.random_recipes(POPULATION, seed=1))
    compiled = [function._cache_size() for function in compiled_passes]
    assert all(compiled)
    for seed in (2, 3):
        score_merges(evaluator, ties.bank, ties.spec, ties.random_recipes(POPULATION, seed=seed))
    # Nor does a population of another size: chunks are filled up.
    score_merges(evaluator, ties.bank, ties.spec, ties.random_recipes(POPULATION + 2, seed=4))
    assert [function._cache_size() for function in compiled_passes] == compiled


def test_other_splits_of_the_tasks_compile_nothing(ties: Setting) -> None:
    full = ties.tasks[::2]
    # Every second example, so that short and long ones are in both halves.
    searched = [replace(task, examples=task.examples[::2]) for task in full]
    heldout = [replace(task, examples=task.examples[1::2]) for task in full]
    splits = batch_tasks([searched, full, heldout], ties.tokenizer, 128, 256, (2,))
    evaluators = [Evaluator(ties.config, ties.tokenizer, batched_tasks, chunk=1) for batched_tasks in splits]
    compiled_passes = [passes.score, passes.prefill, passes.decode]
    scores = [score_merges(evaluators[1], ties.bank, ties.spec, ties.recipes)]
    compiled = [function._cache_size() for function in compiled_passes]
    scores += [score_merges(other, ties.bank, ties.spec, ties.recipes) for other in (evaluators[0], evaluators[2])]
    assert [function._cache_size() for function in compiled_passes] == compiled
    for name, metrics in scores[0].matrices.items():
        for metric, whole in metrics.items():
            for half, part in enumerate(scores[1:]):
                np.testing.assert_allclose(part.matrices[name][metric], whole[:, half::2], atol=1e-5)


def test_progress_is_reported_once_per_candidate_and_batch(ties: Setting) -> None:
    for chunk in (1, CHUNK):
        evaluator, told = ties.evaluator(chunk=chunk), []
        score_merges(evaluator, ties.bank, ties.spec, ties.recipes, told.append)
        assert sum(told) == evaluator.passes(POPULATION)
    evaluator, told = ties.evaluator(), []
    evaluator.score_stored(load_stored(*open_sources([ties.family.base])), told.append)
    assert sum(told) == evaluator.passes(1)


@thorough
def test_chunk_is_chosen_from_the_memory_that_the_compiler_reports(ties: Setting) -> None:
    """On an accelerator: the largest power of two of candidates that fits; on a CPU one."""
    tasks = [ties.short]

    def chosen(budget: int | None) -> set[int]:
        evaluator = ties.evaluator(tasks)
        if budget is not None:
            evaluator = replace(evaluator, target=find_target("test", "h100"), free_memory=lambda: budget)
        scores = score_merges(evaluator, ties.bank, ties.spec, ties.random_recipes(5))
        assert np.isfinite(fitness(tasks, scores)).all()
        (request,) = evaluator.batched_tasks
        assert request.scoring is not None
        # Where not even one candidate fits, its rows go through one by one.
        assert (max(len(batch.tokens) for batch in request.scoring.batches) == 1) == (budget == 1)
        return set(evaluator.chunk_sizes.values())

    assert chosen(None) == {1}
    assert chosen(1) == {1}
    assert chosen(10**12) == {4}


def test_config_of_the_decoder_is_a_constant_of_the_program(ties: Setting) -> None:
    """Equal configs are one key: evaluators of one run share what is compiled."""
    assert isinstance(ties.config, DecoderConfig)
    assert hash(ties.config) == hash(replace(ties.config))
    assert ties.config != replace(ties.config, norm_eps=0.1)


# ---------------------------------------------------------------------------------------------------------------
# What is shared, and what is cut short


def behind_header(task: TextTask, words_before: int) -> TextTask:
    header = " ".join(f"w{4 + i % 50}" for i in range(words_before)) + " "
    examples = tuple(replace(example, prompt=header + example.prompt) for example in task.examples)
    return replace(task, examples=examples)


SHAPES = batched_tasks._task_shapes
FAMILIES: dict[str, Any] = {
    "llama": tiny_config(tie_word_embeddings=True),
    "mistral, window of 7": tiny_config("mistral", sliding_window=7),
    "qwen2": tiny_config("qwen2"),
    "qwen3, yarn": tiny_config(
        "qwen3", rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}, head_dim=16
    ),
    "llama, dynamic": tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
}


@pytest.mark.parametrize("name", sample(FAMILIES, 1))
@thorough
def test_what_is_shared_is_computed_as_if_it_were_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers of 40 words before every row, and choices behind one question, against whole rows one by one."""
    setting = Setting(build_family(tmp_path, FAMILIES[name]), "task_arithmetic")
    tasks = [behind_header(task, 40) for task in setting.tasks]
    shared = setting.evaluator(tasks)
    for request in shared.batched_tasks:
        part = request.scoring or request.prompts
        assert part is not None and len(part.shared_prefix) >= 40
        assert part.computed < 0.7 * part.tokens
    shared_scores = score_merges(shared, setting.bank, setting.spec, setting.recipes)
    monkeypatch.setattr(batches, "MIN_SHARED_PREFIX", 10**6)
    monkeypatch.setattr(batched_tasks, "_task_shapes", unshared)
    plain = setting.evaluator(tasks)
    expected = score_merges(plain, setting.bank, setting.spec, setting.recipes)
    assert shared_scores.outputs == expected.outputs
    for task in tasks:
        for metric, matrix in expected.matrices[task.name].items():
            np.testing.assert_allclose(shared_scores.matrices[task.name][metric], matrix, atol=2e-5, err_msg=metric)


def unshared(splits: Any, tokens: int, share: bool, merge_tokens: int) -> Any:
    """Shapes of batches whose rows share nothing."""
    return SHAPES(splits, tokens, False, merge_tokens)


def test_a_question_is_computed_once_for_its_choices(ties: Setting) -> None:
    task = ties.tasks[1]
    (request,) = ties.evaluator([task]).batched_tasks
    assert request.scoring is not None
    read = sum(int((batch.segment_ids >= 0).sum()) for batch in request.scoring.batches)
    questions = sum(len(example.prompt.split()) for example in task.examples)
    # The choices have 1, 2 and 3 words, of which the last is only predicted.
    assert read == questions + len(task.examples) * (0 + 1 + 2)


def test_a_stop_text_ends_an_output_and_the_generation(ties: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(ties.tasks[2], max_new_tokens=24)
    whole = score_merges(ties.evaluator([task]), ties.bank, ties.spec, ties.recipes).outputs["words"]
    # A word that every output has after at most a few.
    stop = tuple({text.split()[3] for row in whole for text in row})
    monkeypatch.setattr(generation, "STOP_CHECK_INTERVAL", 4)
    rounds = []
    decode = passes.decode
    monkeypatch.setattr(passes, "decode", lambda *given: rounds.append(1) or decode(*given))
    cut = ties.evaluator([replace(task, stop=stop)], chunk=CHUNK)
    texts = score_merges(cut, ties.bank, ties.spec, ties.recipes).outputs["words"]
    assert texts == [[TaskRequests(stop=stop).cut(text) for text in row] for row in whole]
    (request,) = cut.batched_tasks
    assert request.prompts is not None
    assert len(rounds) == -(-POPULATION // CHUNK) * len(request.prompts.batches)


def out_of_memory() -> Exception:
    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")


def test_too_large_a_pass_is_halved(ties: Setting, ties_scores: TaskScores, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which one candidate and two rows fit."""
    score, prefill, said = passes.score, passes.prefill, []

    def small_score(*given: Any) -> Any:
        (_, batch), (members, _) = given[1], given[2]
        if jax.tree.leaves(members)[0].shape[0] > 1 or batch["tokens"].shape[0] > 2:
            raise out_of_memory()
        return score(*given)

    def small_writing(*given: Any) -> Any:
        if jax.tree.leaves(given[2])[0].shape[0] > 1:
            raise out_of_memory()
        return prefill(*given)

    monkeypatch.setattr(passes, "score", small_score)
    monkeypatch.setattr(passes, "prefill", small_writing)
    evaluator, told = ties.evaluator(chunk=CHUNK), []
    expected_passes = evaluator.passes(POPULATION)
    evaluator.log = said.append
    scores = score_merges(evaluator, ties.bank, ties.spec, ties.recipes, told.append)
    for name, metrics in ties_scores.matrices.items():
        for metric, matrix in metrics.items():
            np.testing.assert_allclose(scores.matrices[name][metric], matrix, atol=1e-5)
    assert any("going on with 1" in line for line in said)
    assert any("batches of" in line for line in said)
    assert sum(told) >= expected_passes
    # What was learnt is kept.
    said.clear()
    score_merges(evaluator, ties.bank, ties.spec, ties.recipes)
    assert not said


def test_what_fits_nowhere_fails(ties: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any) -> Any:
        raise out_of_memory()

    monkeypatch.setattr(passes, "score", never)
    with pytest.raises(Failed, match="out of memory with one candidate and one row a pass"):
        score_merges(ties.evaluator(chunk=CHUNK), ties.bank, ties.spec, ties.recipes)
