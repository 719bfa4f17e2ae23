"""One merge, no search: a recipe -> a model folder, tensor by tensor. May import merge_kernels and this room.

The same kernels as in a search, with each tensor measured exactly for the one recipe. At most one tensor of each
source and the merged one are in memory.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import Method, Options, combine, draw_scores, measure

from evojax_merge.checkpoints.architectures import MODEL_TYPES
from evojax_merge.checkpoints.folder import FLOAT_DTYPES, HEAD, Folder, is_float, open_folder, resolve
from evojax_merge.checkpoints.parents import Sources, open_sources, tensor_shapes
from evojax_merge.checkpoints.recipes import LAYER_NAME, RecipeFile, TensorMerge, output_layers, plan
from evojax_merge.checkpoints.tokens import TOKENIZER_FILES, check_same_vocabulary
from evojax_merge.checkpoints.writer import ShardWriter, TensorSpec, atomic_folder
from evojax_merge.errors import InputError

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """A recipe matched with opened folders: everything is checked, nothing is computed.

    `origins`: for each output layer the layer of `leader` that it stands for.
    """

    recipe: RecipeFile
    sources: Sources
    rows: tuple[TensorMerge, ...]
    specs: dict[str, TensorSpec]
    leader: Folder
    tokenizer: Path
    tied: bool
    origins: list[int]
    vocab: int | None
    allow_nonfinite: bool

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


def prepare(
    recipe: RecipeFile, dtype: str | None = None, seed: int | None = None, allow_nonfinite: bool = False
) -> Job:
    """Open every model of the recipe and plan the output. `dtype` and `seed` override the recipe's."""
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    references = recipe.models
    paths = [resolve(reference, recipe.path.parent) for reference in references]
    whose = recipe.tokenizer_source
    if whose == "base":
        if recipe.base is None:
            raise InputError(recipe.path, "tokenizer_source: base, but there is no base_model")
        whose = recipe.base
    if whose is not None and whose not in references:
        raise InputError(recipe.path, f"tokenizer_source: {whose!r} is not a model of the recipe")
    tokenizer = None if whose is None else paths[references.index(whose)]
    kinds = {open_folder(path).config.get("model_type") for path in paths}
    vocab = None
    if kinds <= set(MODEL_TYPES):
        sources, config = open_sources(paths, tokenizer)
        names, layers, tied = list(tensor_shapes(config)), config.layers, config.head_is_embedding
        vocab = config.vocab
    else:
        sources, names, layers = _open_any(paths)
        tied = HEAD not in names
    rows = plan(recipe, names, layers)
    wanted = FLOAT_DTYPES.get(dtype or recipe.out_dtype or recipe.dtype or "")
    specs = {}
    for row in rows:
        source, tensor = row.inputs[0]
        own = sources.entry(source, tensor).dtype
        specs[row.name] = TensorSpec(
            sources.shape(source, tensor), wanted if wanted is not None and is_float(own) else own
        )
    leader = sources.folders[0]
    return Job(
        recipe, sources, tuple(rows), specs, leader, tokenizer or leader.path, tied,
        output_layers(recipe, layers), vocab, allow_nonfinite,
    )  # fmt: skip


def _open_any(paths: list[Path]) -> tuple[Sources, list[str], int]:
    """Models of any architecture, as long as their tensors match."""
    folders = tuple(open_folder(path) for path in paths)
    first = folders[0]
    for folder in folders[1:]:
        kind, expected = (one.config.get("model_type") for one in (folder, first))
        if kind != expected:
            raise InputError(
                folder.path / "config.json",
                f"model_type is {kind!r}, but {first.path} is {expected!r}; expected one architecture",
            )
        differing = sorted(set(folder.entries) ^ set(first.entries))
        if differing:
            listed = ", ".join(differing[:10])
            raise InputError(folder.path, f"does not hold the same tensors as {first.path}: {listed}")
        for name, entry in first.entries.items():
            if folder.entries[name].shape != entry.shape:
                raise InputError(
                    folder.path,
                    f"{name} has shape {list(folder.entries[name].shape)}, but {list(entry.shape)} in {first.path}",
                )
    check_same_vocabulary(paths)
    layers = [int(match["index"]) for name in first.entries if (match := LAYER_NAME.match(name))]
    return Sources(folders), list(first.entries), max(layers, default=-1) + 1


@partial(jax.jit, static_argnums=(0, 1, 6))
def _combine(
    method: Method, options: Options, sources: Any, scores: Any, statistics: Any, parameters: Any, dtype: Any
) -> jax.Array:
    return combine(method, options, sources, scores, statistics, parameters).astype(dtype)


def merge_tensor(job: Job, row: TensorMerge) -> np.ndarray:
    """One output tensor, measured, merged in float32 and cast to the dtype it is written in."""
    method, sources = job.recipe.method, job.sources
    tensors = [sources.read(s, name) for s, name in row.inputs]
    if not is_float(tensors[0].dtype):
        return np.array(tensors[0])
    if not job.allow_nonfinite:
        for (s, name), values in zip(row.inputs, tensors, strict=True):
            if not np.isfinite(values).all():
                raise InputError(sources.folders[s].path, f"{name} holds NaN or Inf; pass --allow-nonfinite to go on")
    scores: list[np.ndarray] | None = None
    if method.sparsifier is not None and method.sparsifier.random:
        digests = [sources.digest(s, name) for s, name in row.inputs[1:]]
        scores = list(np.asarray(draw_scores(job.recipe.seed, digests, tensors[0].shape)))
    densities = [float(density) for density in row.parameters.get("density", ())]
    statistics = measure(method, tensors, scores, densities)
    dtype = job.specs[row.name].dtype
    merged = _combine(
        method, row.options, tuple(jnp.asarray(np.ascontiguousarray(x)) for x in tensors),
        None if scores is None else tuple(scores), statistics, row.parameters, dtype,
    )  # fmt: skip
    return np.asarray(merged)


def merge_to(
    job: Job, target: Path, *, card: str, overwrite: bool = False, progress: Progress = lambda done: None
) -> None:
    """Write the merged model as a Hugging Face folder that appears complete or not at all."""
    with atomic_folder(target, overwrite=overwrite) as folder:
        by_name = {row.name: row for row in job.rows}
        with ShardWriter(folder, job.specs) as writer:
            for name in writer.order:
                writer.write(name, merge_tensor(job, by_name[name]))
                progress(job.specs[name].nbytes)
        dtypes = {str(spec.dtype) for spec in job.specs.values() if is_float(spec.dtype)}
        _write_config(job, folder, dtypes.pop() if len(dtypes) == 1 else None)
        for name in TOKENIZER_FILES:
            if (job.tokenizer / name).exists():
                shutil.copyfile(job.tokenizer / name, folder / name)
        if (job.leader.path / "generation_config.json").exists():
            shutil.copyfile(job.leader.path / "generation_config.json", folder / "generation_config.json")
        (folder / "README.md").write_text(card, encoding="utf-8")


def _write_config(job: Job, folder: Path, dtype: str | None) -> None:
    config = dict(job.leader.config)
    if not config:
        return
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if "tie_word_embeddings" in config or not job.tied:
        config["tie_word_embeddings"] = job.tied
    layers = config.get("num_hidden_layers")
    if layers is not None and job.origins != list(range(layers)):
        config["num_hidden_layers"] = len(job.origins)
        for key, value in config.items():
            # What is said once per layer, such as layer_types.
            if isinstance(value, list) and len(value) == layers:
                config[key] = [value[i] for i in job.origins]
    if job.vocab is not None:
        config["vocab_size"] = job.vocab
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
