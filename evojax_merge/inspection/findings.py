"""The meaning of an inspection's figures for a merge, a sentence each."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from merge_kernels import METHODS

from evojax_merge.inspection.models import Model, place_of
from evojax_merge.inspection.ways import DATA, FILES, OPTIONS
from evojax_merge.inspection.weights import Comparison

# The cosine of matrices below which two related models are far apart.
FAR_APART = 0.7
# The ratio of two task vectors' norms above which the larger one drowns the other.
UNEVEN = 3.0
# The cosines of task vectors above which they share a direction, and below which they are nearly orthogonal.
ALIKE, ORTHOGONAL = 0.5, 0.2
# The highest bound of a weight that is advised, and the bound where task vectors add up: best weights are near 1 then.
HIGHEST, ADDING_UP = 4, 1.5
# The multiple of the share by chance above which signs conflict more often than those of independent changes.
PULLING_APART = 1.1


@dataclass(frozen=True)
class Finding:
    """One sentence. kind: its subject, the same in every run: `base`, `unrelated`, `tokenizer` and so forth."""

    kind: str
    text: str


@dataclass(frozen=True)
class Advice:
    """The settings of a first search that an inspection's sentences advise. base: the number of the base's model, None:
    it is unclear; method: None: none is better than others; high: a bound of `weight`; alike: the numbers of parents
    that had better share their parameters; unchanged: the components in which no parent differs from the base."""

    base: int | None = None
    method: str | None = None
    high: float | None = None
    alike: tuple[int, int] | None = None
    unchanged: tuple[str, ...] = ()


def advise(comparison: Comparison) -> Advice:
    """The advice of a comparison, by the same limits as its sentences."""
    vectors, changes = comparison.vectors, comparison.changes
    if comparison.verdict.base is None or not comparison.verdict.is_clear or changes is None:
        return Advice()
    pulls = changes.contested and changes.share > PULLING_APART * changes.by_chance
    norms = [vector.norm for vector in vectors if vector.norm > 0] or [1.0]
    uneven, alike = max(norms) / min(norms), _most_alike(comparison.cosines)
    high = ADDING_UP if not pulls and _are_orthogonal(comparison.cosines) else None
    changed = {component for vector in vectors for (_, component), norm in vector.by_place.items() if norm}
    return Advice(
        base=comparison.reference,
        method="ties" if pulls else "task_arithmetic",
        high=min(math.ceil(uneven), HIGHEST) if uneven > UNEVEN else high,
        # Two parents that share all parameters leave nothing to choose between them.
        alike=None if alike is None or len(vectors) < 3 else (vectors[alike[0]].parent, vectors[alike[1]].parent),
        unchanged=tuple(
            dict.fromkeys(name for vector in vectors for _, name in vector.by_place if name not in changed)
        ),
    )


def _most_alike(cosines: np.ndarray) -> tuple[int, int] | None:
    """The two task vectors that point most the same way, by their numbers; None where no two do."""
    pairs = [(j, i) for i in range(len(cosines)) for j in range(i) if cosines[i, j] > ALIKE]
    return max(pairs, key=lambda pair: cosines[pair]) if pairs else None


def _are_orthogonal(cosines: np.ndarray) -> bool:
    """Return whether there are several task vectors, and any two of them are nearly orthogonal."""
    pairs = cosines[np.tril_indices(len(cosines), -1)]
    pairs = pairs[np.isfinite(pairs)]
    return bool(pairs.size and (np.abs(pairs) < ORTHOGONAL).all())


def findings(models: Sequence[Model], names: Sequence[str], comparison: Comparison) -> list[Finding]:
    """All findings about the models, by their names in the report: whether they fit together, then whose base is whose,
    then what their task vectors mean for the methods."""
    fitting = [*_about_shapes(models, names), *_about_files(models, names)]
    weights = [*_about_relations(models, names, comparison), *_about_task_vectors(names, comparison)]
    return [*fitting, *weights, *_about_a_search(models, comparison)]


def _about_a_search(models: Sequence[Model], comparison: Comparison) -> Iterator[Finding]:
    """The command that a search of the first family begins with."""
    family = comparison.families[0]
    way, base = models[family[0]].way, advise(comparison).base
    parents = [number for number in family if number != base]
    alone = len(family) == 1 and (len(models) > 1 or models[family[0]].unsearchable is None)
    kinds = {(models[number].way, models[number].architecture) for number in family}
    if way is None or alone or len(kinds) > 1:
        return
    flags = "" if base is None else f" --base {shlex.quote(models[base].reference)}"
    named = shlex.join(models[number].reference for number in parents) + (" MODEL" if len(family) == 1 else "")
    options = OPTIONS.get(way.task, "")
    yield Finding(
        "begin", f"A search begins with: evojax-merge init{flags} --parents {named} --data DATA{options}, where DATA "
        f"is {DATA[way.task]}; init takes this report's advice.",
    )  # fmt: skip


def _about_shapes(models: Sequence[Model], names: Sequence[str]) -> Iterator[Finding]:
    kinds = [model.architecture for model in models]
    if len(set(kinds)) > 1:
        each = ", ".join(f"{name} is {kind or 'without a config'}" for name, kind in zip(names, kinds, strict=True))
        yield Finding(
            "architecture", f"The architectures differ ({each}): no search takes these models together, neither for a "
            "merge of weights nor for a layer path.",
        )  # fmt: skip
        return
    differing = differing_shapes(models)
    rows = differing_in_rows_alone(models, differing)
    widths = [name for name in differing if name not in rows]
    depths = [model.layers for model in models]
    if len(set(depths)) > 1:
        each = ", ".join(f"{name} has {depth}" for name, depth in zip(names, depths, strict=True))
        yield Finding(
            "depth", f"The numbers of layers differ ({each}): weights cannot be merged"
            f"{'' if widths else '; a layer path (data_flow) or passthrough recipe can take layers from all of them'}.",
        )  # fmt: skip
    if rows:
        yield Finding(
            "rows", f"The embeddings have different numbers of rows ({rows[0]}): say tokenizer_source in the config or "
            "the recipe, so that rows are aligned by token.",
        )  # fmt: skip
    if widths:
        yield Finding(
            "shapes", f"{len(widths)} tensors differ in shape (such as {widths[0]}): models of different widths cannot "
            "be merged.",
        )  # fmt: skip
    partial = partly_held(models) if len(set(depths)) == 1 else []
    beside = [name for name in partial if any(name in model.folder.vision_tensors for model in models)]
    for missing, what, follows in (
        ([name for name in partial if name not in beside], "tensors", "a merge refuses models of different tensors, "
         "but for the head of a tied model"),
        (beside, "tensors beside the decoder", "a search keeps them as they are there, merge refuses such models"),
    ):  # fmt: skip
        if missing:
            holders = [name for name, model in zip(names, models, strict=True) if missing[0] in model.tensors]
            yield Finding(
                "tensors", f"{len(missing)} {what} are in some models alone (such as {missing[0]}, in "
                f"{', '.join(holders)}): {follows}.",
            )  # fmt: skip


def differing_shapes(models: Sequence[Model]) -> list[str]:
    """The tensors that several models hold in different shapes."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for model in models:
        for name, entry in model.tensors.items():
            shapes.setdefault(name, set()).add(entry.shape)
    return [name for name, forms in shapes.items() if len(forms) > 1]


def differing_in_rows_alone(models: Sequence[Model], names: Sequence[str]) -> list[str]:
    """The tensors outside of the layers, among those of different shapes, that have a row for each token: matrices with
    the same columns in all models, and vectors that are as long as such a matrix, for example the bias of a head."""
    shapes = {name: [model.tensors[name].shape for model in models if name in model.tensors] for name in names}
    registered = models[0].folder.architecture
    outside = [
        name for name in names
        if place_of(registered, name)[0] is None and len({shape[1:] for shape in shapes[name]}) == 1
    ]  # fmt: skip
    lengths = {name: [shape[:1] for shape in shapes[name]] for name in outside}
    matrices = [lengths[name] for name in outside if len(shapes[name][0]) > 1]
    return [name for name in outside if lengths[name] in matrices]


def partly_held(models: Sequence[Model]) -> list[str]:
    """The tensors that some of the models have and others lack."""
    names = dict.fromkeys(name for model in models for name in model.tensors)
    return [name for name in names if not all(name in model.tensors for model in models)]


def _about_files(models: Sequence[Model], names: Sequence[str]) -> Iterator[Finding]:
    for model, name in zip(models, names, strict=True):
        if model.unsearchable is not None and model.way is None:
            yield Finding("search", f"{name} can be merged by a recipe, but not be searched: {model.unsearchable}.")
    for way in dict.fromkeys(model.way for model in models if model.unsearchable is not None and model.way):
        these = ", ".join([name for name, model in zip(names, models, strict=True) if model.way == way])
        backend = "torch, or of pytrees with backend: function" if way.backend == FILES else way.backend
        task = "" if way.backend == FILES else f", kind: {way.task}"
        yield Finding(
            "search", f"{these}: {way.model}, and no language model that is searched; a search takes it with backend: "
            f"{backend}{task}.",
        )  # fmt: skip
    if len({tuple(model.dtypes) for model in models}) > 1:
        yield Finding(
            "dtype", "The stored dtypes differ: merges are computed in float32 and rounded to export_dtype, by default "
            "that of the first model.",
        )  # fmt: skip
    if len({model.tied for model in models}) > 1:
        tied = [name for model, name in zip(models, names, strict=True) if model.tied]
        yield Finding(
            "tied", f"The head of {', '.join(tied)} is the embedding, that of the others is not: a merge of them has a "
            "head of its own.",
        )  # fmt: skip
    other = [
        f"{model.differing_tokens:,} of {name}" for model, name in zip(models, names, strict=True)
        if model.differing_tokens
    ]  # fmt: skip
    if other:
        yield Finding(
            "tokenizer", f"The tokenizers differ (rows with other tokens than in the first: {', '.join(other)}): say "
            "tokenizer_source: base, or one of the models, so that rows are aligned by token; the distances in this "
            "report compare rows by their number.",
        )  # fmt: skip
    without = [name for model, name in zip(models, names, strict=True) if not model.tokenizer]
    if without and len(without) < len(models):
        lacking = ", ".join(without)
        yield Finding("tokenizer", f"{lacking} has no tokenizer: its rows are taken for those of the others.")
    templates = [model.chat_template for model in models]
    if len(set(templates)) > 1:
        having = [name for name, template in zip(names, templates, strict=True) if template is not None]
        what = "differ" if len(having) == len(models) else f"are not everywhere: {', '.join(having)} alone"
        has = "" if len(having) == len(models) else " has one" if len(having) == 1 else " have one"
        yield Finding(
            "chat_template", f"The chat templates {what}{has}. Candidates and the winner take that of "
            "tokenizer_source, else of the base, else of the first parent; a task in the form of a chat needs one.",
        )  # fmt: skip


def _about_relations(models: Sequence[Model], names: Sequence[str], comparison: Comparison) -> Iterator[Finding]:
    for number, name in enumerate(names):
        bad = [tensor for tensor in comparison.measured if tensor.nonfinite[number]]
        if bad:
            count = sum(int(tensor.nonfinite[number]) for tensor in bad)
            yield Finding(
                "nonfinite", f"{name} holds {count:,} numbers that are NaN or infinite (in {bad[0].name}"
                f"{f' and {len(bad) - 1} more tensors' if len(bad) > 1 else ''}): a search refuses it; the figures of "
                "this report leave them out.",
            )  # fmt: skip
    groups = comparison.families
    compared = {model for pair in comparison.pairs for model in (pair.first, pair.second)}
    related = {(first, second) for group in groups for first in group for second in group}
    unrelated = [pair for pair in comparison.pairs if (pair.first, pair.second) not in related]
    if unrelated:
        parts = " | ".join(", ".join([names[model] for model in group]) for group in groups if compared & {*group})
        farthest = min(unrelated, key=lambda pair: pair.cosine or 0.0)
        yield Finding(
            "unrelated", f"These models are unrelated: {parts} (cosine of matrices {farthest.cosine:.2f}, distance "
            f"{farthest.relative_distance:.2f} times their norm; independent initialisations have 0 and 1.41). No "
            "merge of unrelated weights makes sense: linear, slerp and every method of task vectors give noise.",
        )  # fmt: skip
    distant = [
        pair for pair in comparison.pairs
        if pair not in unrelated and pair.cosine is not None and pair.cosine < FAR_APART
    ]  # fmt: skip
    if distant:
        pair = min(distant, key=lambda pair: pair.cosine or 0.0)
        path = ", or search a layer path" if models[pair.first].unsearchable is None else ""
        yield Finding(
            "far_apart", f"{names[pair.first]} and {names[pair.second]} are far apart (cosine of matrices "
            f"{pair.cosine:.2f}): interpolating between them may cross a barrier; start from one of them (seeds: "
            f"[parents]){path}.",
        )  # fmt: skip
    for pair in comparison.pairs:
        if pair.relative_distance == 0:
            both = f"{names[pair.first]} and {names[pair.second]}"
            one, other = (models[number].tensors.keys() for number in (pair.first, pair.second))
            yield Finding(
                "equal", f"{both} have the same weights, to the bit: one of them adds nothing."
                if one == other
                else f"{both} are equal, to the bit, in the {pair.tensors} tensors that both have.",
            )  # fmt: skip
    yield from _about_base(names, comparison)


def _about_base(names: Sequence[str], comparison: Comparison) -> Iterator[Finding]:
    verdict, family = comparison.verdict, comparison.families[0]
    if comparison.reference is None:
        return
    needing = ", ".join(_methods_of(len(family) - 1, needs_base=True))
    if verdict.base is None:
        free = ", ".join(_methods_of(len(family), needs_base=False))
        yield Finding(
            "two_models", f"Distances cannot tell which of {names[family[0]]} and {names[family[1]]} is the base of "
            f"the other: name it (--base), or add a model of the family. Methods without a base: {free}.",
        )  # fmt: skip
        return
    base, rival = (names[family[place or 0]] for place in (verdict.base, verdict.rival))
    if verdict.given:
        text = f"{base} is the base, {verdict.given}. Methods that take task vectors from it: {needing}."
        yield Finding("base", text)
    elif verdict.is_clear:
        yield Finding(
            "base", f"{base} is the base of the others: it is nearest to all of them (margin {verdict.margin:.2f}, "
            f"least for {rival}; 1 for unrelated task vectors). Methods that take task vectors from it: {needing}.",
        )  # fmt: skip
    else:
        yield Finding(
            "unsure_base", f"The base is unclear: {base} is nearest to the others, but {rival} nearly as much (margin "
            f"{verdict.margin:.2f}; 1 for unrelated task vectors). Name the base (--base) if you know it.",
        )  # fmt: skip


def _methods_of(parents: int, *, needs_base: bool) -> list[str]:
    """The methods that merge so many parents, with a base or without one."""
    return [
        method.name for method in METHODS.values()
        if (method.base == "required") == needs_base
        and method.min_parents <= parents <= (method.max_parents or parents)
    ]  # fmt: skip


def _about_task_vectors(names: Sequence[str], comparison: Comparison) -> Iterator[Finding]:
    vectors, changes = comparison.vectors, comparison.changes
    if comparison.verdict.base is None or changes is None:
        return
    moved = [vector for vector in vectors if vector.norm > 0]
    for vector, rank in zip(vectors, changes.ranks, strict=True):
        name, places = names[vector.parent], vector.by_place
        if rank is not None and vector in moved:
            yield Finding(
                "low_rank", f"{name} is a change of rank {rank} at most in every matrix, as LoRA makes it: density "
                "trims the product, not the factors, and a winner can be exported as an adapter (export --as adapter).",
            )  # fmt: skip
        if vector.unchanged > 0.5 and vector in moved:
            changed = {component for (_, component), norm in places.items() if norm != 0}
            still = sorted({component for _, component in places} - changed)
            where = f"; {', '.join(still)} as in the base, where its parameters change nothing" if still else ""
            yield Finding("unchanged", f"{name} leaves {vector.unchanged:.0%} of the base's numbers unchanged{where}.")
    if len(moved) < 2:
        return
    largest, least = max(moved, key=lambda v: v.norm), min(moved, key=lambda v: v.norm)
    ratio = largest.norm / least.norm
    if ratio > UNEVEN:
        yield Finding(
            "scale", f"The task vector of {names[largest.parent]} is {ratio:.1f} times that of {names[least.parent]}: "
            "at equal weights it decides the merge. Give `weight` a bound above 1 (space.parameters.weight.high), so "
            "that the smaller can count, or keep the larger's below 1.",
        )  # fmt: skip
    cosines = comparison.cosines
    alike = _most_alike(cosines)
    if alike is not None:
        j, i = alike
        yield Finding(
            "alike", f"The task vectors of {names[vectors[j].parent]} and {names[vectors[i].parent]} point the same "
            f"way (cosine {cosines[i, j]:.2f}): they have learnt the same, and adding both overshoots; let them share "
            "a weight (space.parent_groups), or keep the sum of their weights near 1.",
        )  # fmt: skip
    if _are_orthogonal(cosines):
        yield Finding(
            "orthogonal", "The task vectors are nearly orthogonal: each can be added to the base without taking from "
            "the others (task_arithmetic with weights near 1; linear and slerp shrink each).",
        )  # fmt: skip
    if changes.contested:
        what = "the parents agree more often than by chance, and plain sums (task_arithmetic, linear) are fine."
        if changes.share > PULLING_APART * changes.by_chance:
            what = "the parents pull against each other, and sums cancel; ties, dare_ties and della elect a sign."
        elif changes.share > changes.by_chance / 2:
            how = "fewer than" if changes.share * PULLING_APART < changes.by_chance else "about as many as"
            what = (
                f"{how} by chance; plain sums (task_arithmetic) and methods that elect a sign (ties, dare_ties, della) "
                "are both worth a search, and a density below 1 leaves fewer conflicts."
            )
        yield Finding(
            "conflicts", f"In {changes.share:.0%} of the entries that several parents change, their changes have "
            f"opposite signs (independent signs: {changes.by_chance:.0%}): {what}",
        )  # fmt: skip
