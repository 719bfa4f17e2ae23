"""mergekit-evolve's YAML: the same point is the same merge as mergekit's own genome makes of it, and what is refused."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import Family, build_family, state, tiny_config, write_lines
from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from evojax_merge.checkpoints.merge import merge_to, prepare
from evojax_merge.checkpoints.recipes import read_recipe
from evojax_merge.errors import InputError
from evojax_merge.search.mergekit_evolve import filter_components
from evojax_merge.search.setup import Problem, build_problem, read_config
from evojax_merge.search.winner import write_recipe
from evojax_merge.spaces.parameter import ParameterSpace

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
    (folder / "own_task.yaml").write_text(yaml.safe_dump(task))


def write_config(folder: Path, family: Family, genome: dict[str, Any], **others: Any) -> Path:
    write_task(folder)
    document: dict[str, Any] = {
        "genome": {"models": [str(parent) for parent in family.parents], "base_model": str(family.base)} | genome,
        "tasks": [{"name": "own_task", "weight": 1.0, "metric": "acc,none", "include_path": "."}],
        "apply_chat_template": False,
    }
    path = folder / "evolve.yaml"
    path.write_text(yaml.safe_dump(document | others))
    return path


def open_problem(path: Path, *overrides: str) -> Problem:
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
    write_recipe(problem, space.genome(values), tmp_path / "recipe.yaml")
    merge_to(prepare(read_recipe(tmp_path / "recipe.yaml")), tmp_path / "ours", card="")
    ours, wanted = state(tmp_path / "ours"), state(tmp_path / "theirs")
    assert ours.keys() == wanted.keys()
    for tensor, array in wanted.items():
        np.testing.assert_allclose(ours[tensor], array, atol=2e-5, err_msg=tensor)
