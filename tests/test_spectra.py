"""Merges by spectra of the task matrices: their laws, bad input, and searches from a config to a model."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.commands import assert_refused, run_here
from helpers.families import Family, build_family
from helpers.files import read_json, write_yaml
from helpers.models import finetune, random_model, save, state, tiny_config, words
from helpers.sampling import sample, thorough
from helpers.searches import search_config
from merge_kernels import METHODS, CombineInputs, combine, prepare
from merge_kernels.purified import gram_spectrum, orthogonalise, thin_svd
from reference.spectral import SPECTRAL, spectral
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_info, threadpool_limits

from evojax_merge.checkpoints import kept_vectors
from evojax_merge.system.blas import one_blas_thread

SMALL_SHAPES = [(1, 6), (6, 1), (1, 1), (2, 5), (5,), (), (3, 4, 5), (3, 4, 1), (2, 3, 2, 2)]
BASE = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
WEIGHTED = [name for name in SPECTRAL if METHODS[name].parameters[0].name == "weight"]


def numbers_of(name: str, parents: int, **changes: Any) -> dict[str, Any]:
    """A method's parameters at the authors' setting."""
    defaults = {p.name: np.full(parents, p.default) if p.per_parent else p.default for p in METHODS[name].parameters}
    return defaults | {"lambda": 1.0} | changes


def added(name: str, deltas: np.ndarray, base: np.ndarray | None = None, **changes: Any) -> np.ndarray:
    """The change that a merge adds to the base: float64 of deltas `[K, ...]`."""
    base = np.zeros_like(deltas[0], np.float32) if base is None else base
    method, numbers = METHODS[name], numbers_of(name, len(deltas), **changes)
    sources = [base, *(np.float32(base + delta) for delta in deltas)]
    prepared = prepare(method, method.options, sources, numbers, lambda k: np.zeros((0, 2), np.uint32))
    inputs = CombineInputs(sources, prepared.mask_keys, prepared.statistics, numbers)
    return np.asarray(combine(method, method.options, inputs), np.float64) - base


def deltas_of(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)], ids=str)
@pytest.mark.parametrize("name", SPECTRAL)
def test_what_is_added_turns_with_the_spaces_and_grows_with_the_deltas(name: str, shape: tuple[int, int]) -> None:
    """No rule depends on the axes of a layer's inputs and outputs: entries are elected in bases that turn along."""
    deltas = deltas_of(3, *shape)
    left, right = (np.linalg.qr(deltas_of(n, n, seed=n))[0] for n in shape)
    whole = added(name, deltas)
    np.testing.assert_allclose(added(name, left @ deltas @ right), left @ whole @ right, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(added(name, 4 * deltas), 4 * whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPECTRAL)
def test_the_order_of_the_parents_is_none(name: str) -> None:
    deltas, order = deltas_of(4, 12, 8), [2, 0, 3, 1]
    weight = np.array([0.5, 1.0, 0.8, 0.2])
    changes = [{"weight": weight}, {"weight": weight[order]}] if name in WEIGHTED else [{}, {}]
    first, second = added(name, deltas, **changes[0]), added(name, deltas[order], **changes[1])
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SPECTRAL if not name.startswith("iso")])
def test_one_parent_and_equal_parents(name: str) -> None:
    """A parent alone is kept but for what is cut off, and several of it are one."""
    [delta] = deltas = deltas_of(1, 12, 8)
    alone = added(name, deltas)
    if name == "dc_merge":
        # The parent with its singular values at their mean.
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        np.testing.assert_allclose(alone, s.mean() * u @ vt, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_allclose(alone, delta, rtol=1e-4, atol=1e-4)
    if name in ("wudi", "actmat", "svc"):
        np.testing.assert_allclose(added(name, np.stack([delta] * 3)), delta, rtol=1e-4, atol=1e-4)


def test_isotropy() -> None:
    deltas = deltas_of(3, 12, 8)
    singular = np.linalg.svd(deltas.sum(axis=0))[1]
    np.testing.assert_allclose(np.linalg.svd(added("iso_c", deltas))[1], singular.mean(), rtol=1e-5)
    spread = np.linalg.svd(added("iso_cts", deltas))[1]
    np.testing.assert_allclose(spread, spread.mean(), rtol=1e-5)


def test_an_unfinished_descent_leads_from_task_arithmetic_to_wudi() -> None:
    deltas = deltas_of(3, 12, 8)
    everything = {"rank_share": 1.0}
    near = added("swudi", deltas, **everything, steps=1e-6)
    np.testing.assert_allclose(near, deltas.sum(axis=0), rtol=1e-4, atol=1e-4)
    far = added("swudi", deltas, **everything, steps=1e9)
    np.testing.assert_allclose(far, added("wudi", deltas), rtol=1e-4, atol=1e-4)
    half = (added("swudi", deltas) + deltas.sum(axis=0)) / 2
    np.testing.assert_allclose(added("swudi_filter", deltas, filter=0.5), half, rtol=1e-4, atol=1e-4)


def test_wudi_has_the_least_interference() -> None:
    deltas = deltas_of(3, 12, 8).astype(np.float64)

    def interference(merged: np.ndarray) -> float:
        return float(sum(np.square((merged - d) @ d.T).sum() / np.square(d).sum() for d in deltas))

    best = added("wudi", deltas)
    for step in 1e-2 * deltas_of(8, 12, 8, seed=9):
        assert interference(best) < interference(best + step)


@pytest.mark.parametrize("parents", [1, 2, 20])
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
@pytest.mark.parametrize("name", SPECTRAL)
def test_small_sides_and_more_parents_than_rows(name: str, shape: tuple[int, ...], parents: int) -> None:
    deltas = deltas_of(parents, *shape)
    expected = spectral(name, [np.zeros(shape), *deltas.astype(np.float64)], numbers_of(name, parents))
    np.testing.assert_allclose(added(name, deltas), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPECTRAL)
def test_zero_task_vectors_add_nothing(name: str) -> None:
    np.testing.assert_array_equal(added(name, np.zeros((3, 12, 8), np.float32), BASE), 0)
    deltas = deltas_of(3, 12, 8)
    deltas[1] = 0
    assert np.isfinite(added(name, deltas, BASE)).all()


def test_directions_that_no_parent_has_stay_out() -> None:
    """A merge of two adapters of rank 2 has rank 4 at most."""
    deltas = deltas_of(2, 12, 2) @ deltas_of(2, 2, 8, seed=3)
    for name in SPECTRAL:
        assert np.linalg.matrix_rank(added(name, deltas), tol=1e-3) <= 4, name


def test_thin_decompositions() -> None:
    x = deltas_of(9, 4).astype(np.float64) @ deltas_of(4, 7, seed=2)
    for matrix in (x, x.T):
        u, s, v = thin_svd(matrix)
        assert len(s) == 4 and (np.diff(s) < 0).all()
        np.testing.assert_allclose(u * s @ v.T, matrix, atol=1e-5)
        np.testing.assert_allclose(gram_spectrum(matrix)[0], s**2, rtol=1e-4)
        isometry = orthogonalise(u * np.arange(1, 5))
        np.testing.assert_allclose(isometry, u, atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"rank_share": 0.0}, "rank_share: 0.0; expected a number in [0.001, 1]"),
        ({"rank_share": 1.5}, "rank_share: 1.5; expected a number in [0.001, 1]"),
    ],
)
def test_numbers_without_a_meaning_are_refused(
    family: Family, tmp_path: Path, parameters: dict[str, float], says: str
) -> None:
    recipe = recipe_of(family, "tsv_m") | {"parameters": parameters}
    assert_refused([says], "merge", write_yaml(tmp_path / "recipe.yaml", recipe), tmp_path / "out")
    space = {"method": "tsv_m", "fixed": parameters}
    config = write_yaml(tmp_path / "config.yaml", search_config(family, space=space))
    assert_refused([says], "search", config, "--out", tmp_path / "run")


def test_linear_algebra_of_any_thread_runs_on_one() -> None:
    """A limit that one thread has set does not keep those of other threads from counting."""

    def counts() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    def inside() -> list[int]:
        with one_blas_thread():
            return counts()

    with threadpool_limits(2, user_api="blas"), ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        before = counts()
        assert 2 in before
        for thread in (one, other, one, other):
            assert thread.submit(inside).result() == [1] * len(before)
            assert counts() == before


def test_what_is_prepared_is_not_searched(family: Family, tmp_path: Path) -> None:
    space = {"method": "swudi", "parameters": {"rank_share": {}}}
    config = write_yaml(tmp_path / "config.yaml", search_config(family, space=space))
    assert_refused(["parameters.rank_share", "give it under fixed"], "search", config, "--out", tmp_path / "run")
    seeds = search_config(family, space={"method": "swudi"}, search={"seeds": ["parents"]})
    config = write_yaml(tmp_path / "config.yaml", seeds)
    assert_refused(["seeds", "swudi changes every task vector"], "search", config, "--out", tmp_path / "run")


def recipe_of(family: Family, method: str) -> dict[str, Any]:
    models = [{"model": str(parent)} for parent in family.parents]
    return {"merge_method": method, "base_model": str(family.base), "models": models, "dtype": "float32"}


def test_a_tensor_with_nan_is_named_and_others_are_merged_where_it_is_allowed(family: Family, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for file in family.parents[0].iterdir():
        (spoilt / file.name).write_bytes(file.read_bytes())
    tensors = load_file(spoilt / "model.safetensors")
    tensors[name][1, 2] = torch.nan
    save_file(tensors, spoilt / "model.safetensors", {"format": "pt"})
    recipe = recipe_of(family, "wudi")
    recipe["models"][0]["model"] = str(spoilt)
    path = write_yaml(tmp_path / "recipe.yaml", recipe)
    assert_refused([name, "holds NaN or Inf"], "merge", path, tmp_path / "out")
    run_here("merge", path, tmp_path / "out", "--allow-nonfinite")
    merged = state(tmp_path / "out")
    assert np.isnan(merged[name]).sum() == 1 and all(np.isfinite(x).all() for n, x in merged.items() if n != name)
    config = search_config(family, space={"method": "wudi"}, parents=[str(spoilt), str(family.parents[1])])
    path = write_yaml(tmp_path / "config.yaml", config)
    assert_refused([name], "search", path, "--out", tmp_path / "run")


@pytest.fixture(scope="module")
def bfloat16_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build_family(tmp_path_factory.mktemp("narrow"), tiny_config("qwen3_moe"), 3, torch.bfloat16)


@pytest.mark.parametrize("name", SPECTRAL)
def test_merges_of_models_equal_the_formulas(family: Family, tmp_path: Path, name: str) -> None:
    run_here("merge", write_yaml(tmp_path / "recipe.yaml", recipe_of(family, name)), tmp_path / "out")
    models = [state(model) for model in (family.base, *family.parents)]
    numbers = numbers_of(name, len(family.parents)) | {"lambda": METHODS[name].parameter("lambda").default}
    for tensor, values in state(tmp_path / "out").items():
        expected = spectral(name, [model[tensor] for model in models], numbers)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6, err_msg=tensor)


SPACES = {
    "tsv_m": {"parameters": {"weight": {}, "lambda": {}}, "fixed": {"rank_share": 0.7}},
    "swudi_filter": {"parameters": {"weight": {}, "filter": {}}, "components": ["attention", "mlp+norm+router"]},
    "iso_c": {"parameters": {"lambda": {}}},
}


@pytest.mark.parametrize("place", sample(["device", "host", "disk"], 1))
@pytest.mark.parametrize("name", sample(["tsv_m", "swudi_filter"], 1))
def test_what_a_search_scores_is_what_merge_writes(
    bfloat16_family: Family, tmp_path: Path, name: str, place: str
) -> None:
    """From a config to the winner, wherever the models are, of experts with a tensor each and in bfloat16."""
    space = {"method": name} | SPACES[name]
    config = search_config(bfloat16_family, space=space, heldout=0.25, evaluation={"bank": place})
    run_here("search", write_yaml(tmp_path / "config.yaml", config), "--out", tmp_path / "run")
    run_here("merge", tmp_path / "run/best/recipe.yaml", tmp_path / "again")
    winner, again = (tmp_path / x / "model.safetensors" for x in ("run/best/model", "again"))
    assert winner.read_bytes() == again.read_bytes()
    # The winner on disk has the score that the search gave it, from vectors in memory.
    winner_row = read_json(tmp_path / "run/result.json")["table"][-1]
    tasks = write_yaml(tmp_path / "tasks.yaml", {"tasks": config["tasks"]})
    arguments = ("--tasks", tasks, "--split", "heldout", "--json", tmp_path / "scores.json")
    run_here("evaluate", tmp_path / "run/best/model", *arguments)
    [row] = read_json(tmp_path / "scores.json")
    assert winner_row["role"] == "winner"
    assert winner_row["heldout_fitness"] == pytest.approx(row["fitness"], abs=1e-6)


@thorough
def test_gradients_search_what_is_smooth(family: Family, tmp_path: Path) -> None:
    space = {"method": "swudi_filter", "parameters": {"weight": {}, "lambda": {}, "filter": {}}}
    config = search_config(family, 3, 2, space=space, search={"strategy": "gradient"})
    run_here("search", write_yaml(tmp_path / "config.yaml", config), "--out", tmp_path / "run")
    run_here("merge", tmp_path / "run/best/recipe.yaml", tmp_path / "again")
    assert state(tmp_path / "again").keys() == state(tmp_path / "run/best/model").keys()
    for tensor, values in state(tmp_path / "run/best/model").items():
        np.testing.assert_array_equal(values, state(tmp_path / "again")[tensor])


def test_vectors_take_no_more_bits_than_the_models() -> None:
    for dtype, kept in ((np.float32, np.float32), (np.float16, ml_dtypes.bfloat16)):
        sources = [BASE.astype(dtype), (BASE + deltas_of(12, 8)).astype(dtype)]
        numbers = numbers_of("wudi", 1)
        prepared = prepare(METHODS["wudi"], METHODS["wudi"].options, sources, numbers, lambda k: np.zeros(0))
        assert [x.dtype for x in prepared.mask_keys] == [kept]


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of kept vectors, empty; every tensor's are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_vectors, "MIN_ENTRIES", 0)
    return tmp_path / "cache/evojax-merge/vectors"


def weights_of(family: Family, folder: Path, **parameters: float) -> bytes:
    recipe = recipe_of(family, "swudi") | {"parameters": parameters}
    run_here("merge", write_yaml(folder / "recipe.yaml", recipe), folder / "out", "--overwrite")
    return (folder / "out/model.safetensors").read_bytes()


def test_vectors_are_kept_by_content_and_made_again_where_they_are_damaged(
    family: Family, tmp_path: Path, vectors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = weights_of(family, tmp_path)
    names = {file.name for file in vectors.iterdir()}
    assert len(names) == len(state(family.base))
    with monkeypatch.context() as patched:
        # Nothing is decomposed again, for other weights either.
        patched.setattr(np.linalg, "eigh", None)
        assert weights_of(family, tmp_path) == first
        weights_of(family, tmp_path, **{"lambda": 0.5})
    assert {file.name for file in vectors.iterdir()} == names
    weights_of(family, tmp_path, rank_share=0.5)
    others = {file.name for file in vectors.iterdir()}
    assert names < others and len(others) == 2 * len(names)
    for number, file in enumerate(sorted(vectors.iterdir())):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content[: -(number % 2) or None])
    assert weights_of(family, tmp_path) == first


def test_rows_of_tokens_in_another_order_have_vectors_of_their_own(tmp_path: Path, vectors: Path) -> None:
    """Models whose tokens differ in order are aligned to either tokenizer; the merges have the same rows by token."""
    model, tokens = random_model(tiny_config(tie_word_embeddings=True)), words()
    swapped = [*tokens[:8], tokens[9], tokens[8], *tokens[10:]]
    save(model, tmp_path / "base", tokens)
    save(finetune(model, 1), tmp_path / "one", tokens)
    save(finetune(model, 2), tmp_path / "two", swapped)
    name, rows = "model.embed_tokens.weight", []
    for owner in ("one", "two"):
        recipe = {
            "merge_method": "swudi", "base_model": str(tmp_path / "base"), "dtype": "float32",
            "models": [{"model": str(tmp_path / "one")}, {"model": str(tmp_path / "two")}],
            "tokenizer_source": str(tmp_path / owner),
        }  # fmt: skip
        run_here("merge", write_yaml(tmp_path / "recipe.yaml", recipe), tmp_path / f"by-{owner}")
        rows.append(state(tmp_path / f"by-{owner}")[name])
    order = np.arange(len(tokens))
    order[[8, 9]] = 9, 8
    np.testing.assert_allclose(rows[1][: len(tokens)], rows[0][order], rtol=1e-4, atol=1e-5)


def test_the_oldest_vectors_make_room(
    family: Family, tmp_path: Path, vectors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_vectors, "MAX_BYTES", 30_000)
    first = weights_of(family, tmp_path)
    assert sum(file.stat().st_size for file in vectors.iterdir()) <= 30_000
    monkeypatch.setattr(kept_vectors, "FREE_SHARE", 1.0)
    for file in vectors.iterdir():
        file.unlink()
    assert weights_of(family, tmp_path) == first and not list(vectors.iterdir())


def test_a_bank_in_files_is_prepared_once(
    family: Family, tmp_path: Path, vectors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decompositions, eigh = [], np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda x: decompositions.append(len(x)) or eigh(x))
    config = search_config(family, space={"method": "iso_c"}, evaluation={"bank": "disk"})
    run_here("search", write_yaml(tmp_path / "config.yaml", config), "--out", tmp_path / "run")
    matrices = [x for x in state(family.base).values() if x.ndim == 2]
    # Plans take matrices of other sides apart.
    of_models = [side for side in decompositions if side in {min(x.shape) for x in matrices}]
    assert vectors.exists() and len(of_models) == len(matrices)


def test_a_plan_says_what_the_preparation_takes(family: Family, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "config.yaml", search_config(family, space={"method": "wudi"}))
    text = " ".join(run_here("plan", config).stdout.split())
    assert "wudi: matrices are taken apart on this machine's processor before the search, about" in text
    assert "calibration:" not in text
    config = write_yaml(tmp_path / "config.yaml", search_config(family))
    assert "taken apart" not in run_here("plan", config).stdout
