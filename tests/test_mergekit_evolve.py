"""mergekit-evolve's YAML: a point is the merge that mergekit's own genome makes of it, and what is refused."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers.families import Family, build_family
from helpers.files import read_json, read_recipe, write_lines, write_yaml
from helpers.mergekit import assert_same_tensors
from helpers.models import state, tiny_config
from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from evojax_merge.commands import search as search_command
from evojax_merge.errors import InputError
from evojax_merge.mergekit.evolve_config import filter_components
from evojax_merge.mergekit.execute import merge_to, prepare
from evojax_merge.problem import SearchProblem, build_problem, read_config
from evojax_merge.spaces.parameter import ParameterSpace
from evojax_merge.tasks.harness import HarnessConfig

LAYERS = 4


@pytest.fixture(scope="module")
def family4(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Of four layers, with a head of its own, so that every kind of tensor is there."""
    return build_family(
        tmp_path_factory.mktemp("family4"), tiny_config(num_hidden_layers=LAYERS, tie_word_embeddings=False)
    )


def write_task(folder: Path) -> None:
    """A multiple-choice task of the harness whose right choice is always the word w5."""
    rng = np.random.default_rng(0)
    records = [{"q": " ".join(f"w{i}" for i in rng.integers(4, 64, 4)), "c": ["w5", "w6"], "a": 0} for _ in range(10)]
    task = {
        "task": "own_task", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(write_lines(folder / "data.jsonl", records))}},
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "c", "doc_to_target": "a",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    write_yaml(folder / "own_task.yaml", task)


def write_config(folder: Path, family: Family, genome: dict[str, Any], **others: Any) -> Path:
    write_task(folder)
    document: dict[str, Any] = {
        "genome": {"models": [str(parent) for parent in family.parents], "base_model": str(family.base)} | genome,
        "tasks": [{"name": "own_task", "weight": 1.0, "metric": "acc,none", "include_path": "."}],
        "apply_chat_template": False,
    }
    return write_yaml(folder / "evolve.yaml", document | others)


def open_problem(path: Path, *overrides: str) -> SearchProblem:
    return build_problem(path, read_config(path, list(overrides), None))


# Which of their parameter sets (filters, then the rest) our groups of every group of layers are, and our other groups.
GENOMES: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "linear": ({"merge_method": "linear", "base_model": None, "layer_granularity": 2}, [0], []),
    "one group": ({"merge_method": "task_arithmetic", "normalize": True}, [0], []),
    "filters": ({"merge_method": "ties", "layer_granularity": 1, "filters": ["self_attn", "mlp"]}, [0, 1, 2], []),
    "apart": ({"merge_method": "ties", "layer_granularity": 2, "filters": ["lm_head", "layernorm"]}, [1, 2], [0]),
    "everything": ({"merge_method": "ties", "layer_granularity": 2, "filters": ["mlp", "*"]}, [0, 1], []),
    "negative": (
        {"merge_method": "ties", "layer_granularity": 2, "allow_negative_weights": True, "normalize": False}, [0], [],
    ),
    "smooth": (
        {"merge_method": "ties", "layer_granularity": 2, "smooth": True, "filters": ["self_attn"]}, [0, 1], [],
    ),
    "by layer": ({"merge_method": "task_arithmetic", "layer_granularity": 1, "smooth": True}, [0], []),
    "dare": ({"merge_method": "dare_ties", "layer_granularity": 2}, [0], []),
}  # fmt: skip


@pytest.mark.parametrize("name", GENOMES)
def test_a_point_is_the_merge_that_mergekit_makes_of_it(name: str, family4: Family, tmp_path: Path) -> None:
    genome, layered, alone = GENOMES[name]
    path = write_config(tmp_path, family4, genome)
    problem = open_problem(path, "export_dtype=float32")
    space = problem.space
    assert isinstance(space, ParameterSpace)
    theirs = ModelGenome(ModelGenomeDefinition.model_validate(yaml.safe_load(path.read_text())["genome"]))
    # Layer groups, models, parameter sets, parameters.
    point = theirs.initial_genotype().numpy()
    start = space.values(jnp.asarray(space.start))
    rng = np.random.default_rng(5)
    for i, parameter in enumerate(start):
        np.testing.assert_allclose(start[parameter], point[0, 0, 0, i], rtol=1e-6)
        low = -1.0 if "allow_negative_weights" in genome else 0.05
        point[..., i] = rng.uniform(low, 1.0, point.shape[:3])
        if parameter == "density":
            # On our grid, also at a third of the way. Which entries DARE drops is another random choice; here none.
            drawn = rng.integers(67, 333, point.shape[:3]) * 3 / 1000
            point[..., i] = 1.0 if genome["merge_method"] == "dare_ties" else drawn
    config = theirs.genotype_merge_config(point).model_copy(update={"dtype": "float32"})
    run_merge(config, str(tmp_path / "theirs"), MergeOptions(quiet=True))
    values = {}
    for i, parameter in enumerate(start):
        by_set = np.moveaxis(point[..., i], 1, 2)
        rows = [by_set[:, layered].reshape(-1, point.shape[1]), by_set[-1, alone].reshape(-1, point.shape[1])]
        values[parameter] = np.concatenate(rows)
    (tmp_path / "recipe.yaml").write_text(problem.backend.describe(space.genome(values)).recipe)
    merge_to(prepare(read_recipe(tmp_path / "recipe.yaml")), tmp_path / "ours", card="")
    assert_same_tensors(state(tmp_path / "ours"), state(tmp_path / "theirs"), rtol=1e-7, atol=2e-5)


def test_slerp_reaches_the_merges_that_mergekit_does(family4: Family, tmp_path: Path) -> None:
    """There a weight per model, of which the softmax says how far to go from the heavier one; here `t` itself."""
    genome = {"merge_method": "slerp", "base_model": None, "layer_granularity": 2}
    path = write_config(tmp_path, family4, genome)
    problem = open_problem(path, "export_dtype=float32")
    theirs = ModelGenome(ModelGenomeDefinition.model_validate(yaml.safe_load(path.read_text())["genome"]))
    point = theirs.initial_genotype().numpy()
    point[:, :, 0, 0] = [[0.9, 0.2], [-0.3, 0.4]]
    config = theirs.genotype_merge_config(point).model_copy(update={"dtype": "float32"})
    run_merge(config, str(tmp_path / "theirs"), MergeOptions(quiet=True))
    space = problem.space
    assert isinstance(space, ParameterSpace)
    t = 1 / (1 + np.exp(point[:, 0, 0, 0] - point[:, 1, 0, 0]))
    (tmp_path / "recipe.yaml").write_text(problem.backend.describe(space.genome({"t": t[:, None]})).recipe)
    merge_to(prepare(read_recipe(tmp_path / "recipe.yaml")), tmp_path / "ours", card="")
    ours, wanted = state(tmp_path / "ours"), state(tmp_path / "theirs")
    for tensor, array in wanted.items():
        np.testing.assert_allclose(ours[tensor], array, atol=2e-5, err_msg=tensor)


def test_the_base_among_the_models_counts_in_the_starting_weight_only(family4: Family, tmp_path: Path) -> None:
    models = [str(family4.base), *(str(parent) for parent in family4.parents)]
    path = write_config(tmp_path, family4, {"merge_method": "ties", "models": models})
    problem = open_problem(path)
    assert problem.parents == family4.parents
    assert isinstance(problem.space, ParameterSpace)
    start = problem.space.values(jnp.asarray(problem.space.start))
    np.testing.assert_allclose(start["weight"], np.full((1, 2), 1 / 3), rtol=1e-6)


def test_tasks_and_limits_are_those_of_the_file(family4: Family, tmp_path: Path) -> None:
    own = {"name": "own_task", "include_path": "."}
    tasks = [own | {"weight": 2.0}, own | {"metric": "acc", "limit": 3}]
    path = write_config(
        tmp_path, family4, {"merge_method": "linear", "base_model": None}, tasks=tasks, limit=6, num_fewshot=2,
        fewshot_as_multiturn=False, random_seed=7, search={"generations": 3}, model_name="mine-1.0",
    )  # fmt: skip
    problem = open_problem(path, "search.population=4")
    assert [(task.name, task.metric, task.weight) for task in problem.splits.search] == [
        ("own_task/acc,none", "acc,none", 2.0), ("own_task/acc", "acc,none", 1.0),
    ]  # fmt: skip
    # Six examples to search with, or three, and a fifth of all held out.
    sizes = [(full.size, held.size) for full, held in zip(problem.splits.search, problem.splits.heldout, strict=True)]
    assert sizes == [(6, 2), (3, 1)]
    assert problem.backend.config.out == "runs/mine-1.0"
    assert (problem.seed, problem.search.generations, problem.search.population) == (7, 3, 4)
    assert problem.search.sigma == pytest.approx(1 / 6)
    assert problem.backend.candidates.export_dtype == "bfloat16"
    first = problem.backend.config.tasks[0]
    assert isinstance(first, HarnessConfig)
    assert (first.num_fewshot, first.apply_chat_template, first.fewshot_as_multiturn) == (2, False, False)


def test_a_benchmark_is_searched_by_what_the_refusal_advises(
    family4: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"name": "gsm8k_mine", "include_path": "."}
    path = write_config(tmp_path, family4, {"merge_method": "ties"}, tasks=[task])
    definition = yaml.safe_load((tmp_path / "own_task.yaml").read_text())
    definition |= {"task": "gsm8k_mine", "training_split": "test"}
    write_yaml(tmp_path / "gsm8k_mine.yaml", definition)
    advice = r"take split: train or a task of your own \(include_path\), or say on_test_set: true$"
    with pytest.raises(InputError, match=advice):
        open_problem(path)
    for key, value in {"split": "train", "on_test_set": True}.items():
        path = write_config(tmp_path, family4, {"merge_method": "ties"}, tasks=[task | {key: value}])
        [opened] = open_problem(path).splits.search
        assert opened.size == 8
    assert capsys.readouterr().err.count("is a benchmark") == 1


def test_filters_are_groups_of_components() -> None:
    path = Path("evolve.yaml")
    assert filter_components(path, []) == ["norm+attention+mlp+embed+final_norm+head"]
    assert filter_components(path, ["self_attn", "mlp"]) == ["attention", "mlp", "norm+embed+final_norm+head"]
    assert filter_components(path, ["embed_tokens", "layers."]) == ["embed", "norm+attention+mlp", "final_norm+head"]
    assert filter_components(path, ["mlp", "*"]) == ["mlp", "norm+attention+embed+final_norm+head"]


@pytest.mark.parametrize(
    ("genome", "others", "message"),
    [
        ({"merge_method": "della"}, {}, "genome.merge_method"),
        ({"layer_granularty": 2}, {}, r"genome.layer_granularty: unknown key \(did you mean 'layer_granularity'\?\)"),
        ({"base_model": None}, {}, "genome.base_model: missing; ties takes task vectors"),
        ({"merge_method": "linear"}, {}, "genome.base_model: linear has no base"),
        ({"merge_method": "slerp", "base_model": None, "smooth": True}, {}, "genome.smooth: not with slerp"),
        ({"tokenizer_source": "union"}, {}, "genome.tokenizer_source: union; expected base or model:"),
        ({"filters": ["q_proj"]}, {}, r"genome.filters: 'q_proj' parts model.layers.0.self_attn.\w+_proj"),
        ({"filters": ["layers.1."]}, {}, r"genome.filters: 'layers.1.' parts model.layers.1."),
        ({"filters": ["mlp", "expert"]}, {}, "genome.filters: 'expert' takes no tensor"),
        ({}, {"shuffle": True}, "shuffle: not supported"),
        ({}, {"random_init": True}, "random_init: not supported"),
        ({}, {"tasks": []}, "tasks: "),
        ({}, {"tasks": [{"name": "own_task", "wieght": 1}]}, r"tasks\[0\].wieght: unknown key \(did you mean 'weight'"),
        ({}, {"tasks": [{"name": "own_task", "weight": -1}]}, r"tasks\[0\].weight: -1; higher is better"),
        ({}, {"tasks": ["gsm8k"]}, r"tasks\[0\]: on_test_set: gsm8k is a benchmark"),
        ({}, {"space": {}}, "space: unknown key"),
    ],
)
def test_what_has_no_meaning_here_is_refused_by_name(
    genome: dict[str, Any], others: dict[str, Any], message: str, family4: Family, tmp_path: Path
) -> None:
    path = write_config(tmp_path, family4, {"merge_method": "ties"} | genome, **others)
    with pytest.raises(InputError, match=message):
        open_problem(path)


def test_a_search_runs_from_the_file_as_it_is(family4: Family, tmp_path: Path) -> None:
    genome = {"merge_method": "dare_ties", "layer_granularity": 2, "filters": ["self_attn", "mlp"], "smooth": True}
    path = write_config(tmp_path, family4, genome, limit=8)
    run = tmp_path / "run"
    search_command.search(path, run, False, False, 3, ["search.generations=2", "search.population=4"])
    assert len((run / "history.jsonl").read_text().splitlines()) == 2
    result = read_json(run / "result.json")
    assert {row["role"] for row in result["table"]} == {"base", "parent", "uniform", "winner"}
    assert all("own_task/acc,none" in row["heldout_scores"] for row in result["table"])
    # Two knots of two weights and densities for each of three parameter sets.
    assert len(result["genome"]) == 2 * 3 * 2 * 2
    # What was exported is what its recipe says, layer by layer.
    merge_to(prepare(read_recipe(run / "best" / "recipe.yaml")), tmp_path / "again", card="")
    again, model = state(tmp_path / "again"), state(run / "best" / "model")
    for tensor, array in model.items():
        np.testing.assert_array_equal(again[tensor], array)
