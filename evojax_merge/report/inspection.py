"""An inspection of models as tables on the terminal, as plain data, and as a picture."""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from evojax_merge.inspection.findings import Finding, differing_shapes, partly_held
from evojax_merge.inspection.models import Model
from evojax_merge.inspection.ways import FILES
from evojax_merge.inspection.weights import Comparison, TaskVector
from evojax_merge.report.tables import Table, TerminalTable

# By the endings of pictures, what this program's hold and no others: a chunk of text behind a PNG's header, and a
# comment.
PICTURE_MARKS = {".png": b"tEXtSoftware\0evojax-merge", ".svg": b"<!-- drawn by evojax-merge -->"}
# Keys by which an output of `inspect --json` is recognised.
KEYS = ("models", "pairs", "findings")
# The bytes of a PNG's signature and header.
PNG_HEADER = 33
# The components that come first, in a layer and outside of the layers.
ORDER = ("attention", "mlp", "norm", "router", "embed", "final_norm", "head")


# ---------------------------------------------------------------------------------------------------------------
# Tables


def tables(models: Sequence[Model], names: Sequence[str], comparison: Comparison) -> Iterator[TerminalTable]:
    """The tables of an inspection: the models' headers, their distances, and their task vectors."""
    templates = list(dict.fromkeys(model.chat_template for model in models if model.chat_template is not None))
    facts = {
        "architecture": [model.architecture or "unknown (no config.json)" for model in models],
        "parameters": [f"{model.parameters:,}" for model in models],
        "layers": [str(model.layers) for model in models],
        "stored dtype": [
            " + ".join(model.dtypes) + ("" if model.stored_as is None else f" (from {model.stored_as})")
            for model in models
        ],
        "adapter": list(map(_adapter, models)),
        "vocabulary": ["unknown" if model.vocabulary is None else f"{model.vocabulary:,}" for model in models],
        "tokenizer": [_tokenizer(model, models) for model in models],
        "chat template": [
            "none" if model.chat_template is None else chr(ord("A") + templates.index(model.chat_template) % 26)
            for model in models
        ],
        "language head": ["the embedding" if model.tied else "its own" for model in models],
        "searched by": [
            "nothing"
            if model.way is None
            else f"backend: {'torch or function' if model.way.backend == FILES else model.way.backend}"
            for model in models
        ],
    }
    # The rows that some models alone have.
    is_shown = {
        "adapter": any(facts["adapter"]),
        "vocabulary": any(model.vocabulary is not None for model in models),
        "tokenizer": any(model.tokenizer for model in models),
        "chat template": bool(templates),
        "language head": any(model.vocabulary is not None for model in models),
    }
    shown = [(label, *values) for label, values in facts.items() if is_shown.get(label, True)]
    yield Table(["", *names], shown, folded=range(1, len(names) + 1)).terminal("Models")
    pairs = comparison.pairs
    if pairs:
        headings = ["models", "cosine of matrices", "relative distance", "equal numbers", "tensors in common"]
        columns = [
            [f"{names[pair.first]} – {names[pair.second]}" for pair in pairs],
            distinct([pair.cosine for pair in pairs], ".4f"),
            distinct([pair.relative_distance for pair in pairs], ".4g"),
            distinct([pair.equal_share for pair in pairs], ".1%"), [f"{pair.tensors:,}" for pair in pairs],
        ]  # fmt: skip
        rows = list(zip(*columns, strict=True))
        yield Table(headings, rows, range(1, len(headings))).terminal("Distances of the weights")
    if comparison.reference is not None:
        yield _vectors_table(names, comparison)
        yield from _places_tables(names, comparison)


def _adapter(model: Model) -> str:
    """The rank of a model's adapter, and the base that its files name."""
    if model.adapter is None or not model.adapter.ranks:
        return ""
    ranks, base = model.adapter.ranks, model.adapter.trained_on
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"rank {span}" + ("" if base is None else f", trained on {base}")


def distinct(values: Sequence[float | None], form: str) -> list[str]:
    """The numbers of a table as texts, `none` for None and NaN, in as many digits as tell unequal ones apart. form: a
    format with the least number of digits, such as .4g; 0 and 1 count as numbers of the table."""
    finite = [None if value is None or np.isnan(value) else float(value) for value in values]
    numbers = {*(value for value in finite if value is not None), 0.0, 1.0}
    for digits in range(int(form[1:-1]), 18):
        texts = {number: f"{number:.{digits}{form[-1]}}" for number in numbers}
        if len({*texts.values()}) == len(numbers):
            break
    return ["none" if value is None else texts[value] for value in finite]


def _tokenizer(model: Model, models: Sequence[Model]) -> str:
    if not model.tokenizer:
        return "none"
    if model is next(other for other in models if other.tokenizer):
        return "A"
    if model.differing_tokens is None:
        return "custom code, other files"
    return "the tokens of A" if model.differing_tokens == 0 else f"{model.differing_tokens:,} rows unlike A"


def _vectors_table(names: Sequence[str], comparison: Comparison) -> TerminalTable:
    assert comparison.reference is not None and comparison.changes is not None
    kind = "Task vectors" if comparison.verdict.base is not None else "Differences"
    vectors = comparison.vectors
    others = [names[vector.parent] for vector in vectors]
    columns = [
        others, distinct([vector.norm for vector in vectors], ".4g"),
        distinct([vector.relative_norm for vector in vectors], ".4g"),
        distinct([vector.unchanged for vector in vectors], ".1%"),
        ["full" if rank is None else f"≤ {rank}" for rank in comparison.changes.ranks],
    ]  # fmt: skip
    headings = ["model", "norm", "relative norm", "unchanged", "rank"]
    if len(others) > 1:
        headings += [f"cosine with {name}" for name in others]
        cosines = distinct(list(comparison.cosines.flat), ".3f")
        columns += [cosines[k :: len(others)] for k in range(len(others))]
    title = f"{kind} from {names[comparison.reference]}"
    return Table(headings, list(zip(*columns, strict=True)), range(1, len(headings))).terminal(title)


def _places_tables(names: Sequence[str], comparison: Comparison) -> Iterator[TerminalTable]:
    """The relative norms of the task vectors by layer and component, and those outside of the layers."""
    layers, components = _axes(comparison)
    inner = [component for component in components if any(layer is not None for layer in layers[component])]
    outer = [component for component in components if None in layers[component]]
    vectors = [(i, names[vector.parent]) for i, vector in enumerate(comparison.vectors)]
    norms = {
        (i, *place): norm for i, vector in enumerate(comparison.vectors) for place, norm in vector.by_place.items()
    }
    texts = dict(zip(norms, distinct(list(norms.values()), ".4g"), strict=True))
    if inner:
        columns = ["layer", *(f"{name}: {component}" for _, name in vectors for component in inner)]
        numbers = sorted({layer for component in inner for layer in layers[component] if layer is not None})
        rows = [(n, *(texts.get((i, n, part), "") for i, _ in vectors for part in inner)) for n in numbers]
        yield Table(columns, rows, range(len(columns))).terminal("Relative norm by layer")
    if outer:
        rows = [(name, *(texts[i, None, part] for part in outer)) for i, name in vectors]
        yield Table(["model", *outer], rows, range(1, len(outer) + 1)).terminal("Outside of the layers")


def _axes(comparison: Comparison) -> tuple[dict[str, list[int | None]], list[str]]:
    """The layers in which each component stands (None: outside of the layers), and the components in order."""
    layers: dict[str, list[int | None]] = {}
    for layer, component in comparison.vectors[0].by_place:
        layers.setdefault(component, []).append(layer)
    order = {name: place for place, name in enumerate(ORDER)}
    return layers, sorted(layers, key=lambda name: (order.get(name, len(order)), name))


# ---------------------------------------------------------------------------------------------------------------
# Plain data


def as_json(
    models: Sequence[Model], names: Sequence[str], comparison: Comparison, sentences: Sequence[Finding]
) -> dict[str, Any]:
    """The inspection as plain data, with models by the names of the report."""
    verdict, family = comparison.verdict, comparison.families[0]
    ranks = () if comparison.changes is None else comparison.changes.ranks
    changes = comparison.changes if len(ranks) > 1 else None
    return {
        "models": [
            {
                "name": name, "reference": model.reference, "architecture": model.architecture, "layers": model.layers,
                "parameters": model.parameters, "dtypes": dict(model.dtypes), "stored_as": model.stored_as,
                "vocabulary": model.vocabulary, "tied_head": model.tied, "tokenizer": model.tokenizer,
                "differing_tokens": model.differing_tokens, "chat_template": model.chat_template,
                "unsearchable": model.unsearchable, "backend": None if model.way is None else model.way.backend,
                "adapter": model.adapter and {"ranks": model.adapter.ranks, "base": model.adapter.trained_on},
            }
            for model, name in zip(models, names, strict=True)
        ],
        "families": [[names[model] for model in group] for group in comparison.families],
        "pairs": [
            {
                "models": [names[pair.first], names[pair.second]], "cosine": pair.cosine,
                "relative_distance": pair.relative_distance, "equal_share": pair.equal_share, "tensors": pair.tensors,
            }
            for pair in comparison.pairs
        ],
        "base": None if verdict.base is None else names[family[verdict.base]],
        "base_is_clear": verdict.is_clear,
        "base_margin": verdict.margin,
        "compared_with": None if comparison.reference is None else names[comparison.reference],
        "task_vectors": [
            {
                "model": names[vector.parent], "norm": vector.norm, "relative_norm": vector.relative_norm,
                "unchanged": vector.unchanged, "rank": rank,
                "by_layer": [
                    {"layer": layer, "component": component, "relative_norm": value}
                    for (layer, component), value in vector.by_place.items()
                ],
                "cosines": {
                    names[other.parent]: float(cosine) if np.isfinite(cosine) else None
                    for other, cosine in zip(comparison.vectors, row, strict=True)
                },
            }
            for vector, row, rank in zip(comparison.vectors, comparison.cosines, ranks, strict=True)
        ],
        "sign_conflicts": None if changes is None else {
            "size": changes.size, "contested": changes.contested, "conflicts": changes.conflicts,
            "share": changes.share, "by_chance": changes.by_chance,
        },
        "tensors": {"in_some_models_alone": partly_held(models), "of_different_shapes": differing_shapes(models)},
        "findings": [{"kind": finding.kind, "text": finding.text} for finding in sentences],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# The picture


def picture(names: Sequence[str], comparison: Comparison, ending: str) -> bytes:
    """A picture, `.png` or `.svg`, of the distances of all pairs, and where there are task vectors of their norms by
    layer and component and of their cosines."""
    import altair as alt

    distances = np.full((len(names), len(names)), np.nan)
    np.fill_diagonal(distances, 0.0)
    for pair in comparison.pairs:
        distances[[pair.first, pair.second], [pair.second, pair.first]] = pair.relative_distance
    vectors = comparison.vectors
    panels = [_matrix(distances, names, "relative distance", alt.Scale(scheme="viridis", domainMin=0))]
    panels += [_norms(vector, names, comparison) for vector in vectors]
    if len(vectors) > 1:
        parents = [names[vector.parent] for vector in vectors]
        scale = alt.Scale(scheme="redblue", domain=[1, -1])
        panels.append(_matrix(comparison.cosines, parents, "cosines of task vectors", scale))
    chart = alt.hconcat(*panels).resolve_scale(color="independent")
    mark = PICTURE_MARKS[ending]
    if ending == ".svg":
        drawing = io.StringIO()
        chart.save(drawing, format="svg")
        return drawing.getvalue().encode() + mark
    drawn = io.BytesIO()
    chart.save(drawn, format="png", scale_factor=2)
    chunk = struct.pack(">I", len(mark) - 4) + mark + struct.pack(">I", zlib.crc32(mark))
    return drawn.getvalue()[:PNG_HEADER] + chunk + drawn.getvalue()[PNG_HEADER:]


def _norms(vector: TaskVector, names: Sequence[str], comparison: Comparison) -> Any:
    """The relative norms of a task vector by layer and component; those outside of the layers as rules."""
    import altair as alt

    layers, components = _axes(comparison)
    rows = [
        {"component": component, "layer": layer, "norm": vector.by_place[layer, component]}
        for component in components
        for layer in layers[component]
    ]
    title = f"{names[vector.parent]} – {names[comparison.reference or 0]}"
    colour = alt.Color("component:N", title=None, sort=list(components))
    height = alt.Y("norm:Q", title="relative norm", scale=alt.Scale(domainMin=0))
    base = alt.Chart(alt.InlineData(values=rows)).encode(y=height, color=colour)
    numbers = sorted({layer for component in components for layer in layers[component] if layer is not None})
    # Few numbers would stand between the layers as well.
    axis = alt.Axis(format="d", values=numbers if len(numbers) <= 12 else alt.Undefined)
    layer_axis = alt.X("layer:Q", axis=axis)
    inside = base.mark_line(point=True).encode(x=layer_axis).transform_filter("isValid(datum.layer)")
    outside = base.mark_rule(strokeDash=[2, 3]).transform_filter("!isValid(datum.layer)")
    return (inside + outside).properties(title=title, width=280, height=280)


def _matrix(values: np.ndarray, names: Sequence[str], title: str, scale: Any) -> Any:
    """A square of figures, one for each pair of models."""
    import altair as alt

    texts = distinct(list(values.flat), ".2f")
    rows = [
        {"row": names[i], "column": names[j], "value": float(value), "text": text}
        for ((i, j), value), text in zip(np.ndenumerate(values), texts, strict=True)
        if np.isfinite(value)
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("column:N", sort=list(names), title=None, axis=alt.Axis(labelAngle=-45)),
        y=alt.Y("row:N", sort=list(names), title=None),
    )
    squares = base.mark_rect().encode(color=alt.Color("value:Q", scale=scale, legend=None))
    figures = base.mark_text(fill="black", stroke="white", strokeWidth=3).encode(text="text:N")
    plain = base.mark_text(fill="black").encode(text="text:N")
    return (squares + figures + plain).properties(title=title, width=280, height=280)
