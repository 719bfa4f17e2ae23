"""The charts of a run's page, as Vega-Lite specifications made with Altair.

A colour is the name of a variable of the page's style, which the page replaces by its value, in light and in dark.
Data are CSV texts, which are a third of the size of a list of objects. Imports Altair.
"""

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from evojax_merge.report.comparison import final, label_of, titled
from evojax_merge.report.parameters import Frames, Map, Sampled
from evojax_merge.report.run_data import Generation, Result, RunData, lead_over, spread
from evojax_merge.schema.genealogy import NUMBER

INK, SOFT, LINE, ACCENT, FAINT, OTHER, PAPER, BAND = (
    f"var(--{name})" for name in ("ink", "soft", "line", "accent", "faint", "other", "paper", "band")
)
SERIES = [f"var(--series-{k})" for k in range(1, 9)]
Spec = dict[str, Any]
# The columns of the fitness over generations that a tooltip shows, and their titles.
TOOLTIPS = {
    "so_far": "best so far", "best": "best", "part": "best on its minibatch", "high": "90th percentile",
    "median": "median", "low": "10th percentile", "validation": "validation",
}  # fmt: skip
# Pixels of the fitness over generations, and of a line of text in it.
FITNESS_HEIGHT, LABEL_HEIGHT = 340, 15
# The points of a curve in small charts.
MOST_POINTS = 250
# The charts of one kind that a page shows.
MOST_CHARTS = 12
# The members of a pool that are drawn.
MOST_MEMBERS = 1500


def _data(**columns: Sequence[Any]) -> alt.InlineData:
    """Columns as CSV; numbers as Python writes them, so that none is rounded, and nothing for None and NaN."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*([_text(value) for value in column] for column in columns.values()), strict=True))
    # Types are declared: the page would guess them, and take a model that is called 007 for a number.
    kinds: dict[str, Any] = {
        name: "string" if any(isinstance(value, str) for value in column) else "number"
        for name, column in columns.items()
    }
    return alt.InlineData(values=text.getvalue(), format=alt.CsvDataFormat(type="csv", parse=kinds))


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return repr(float(value)) if isinstance(value, float | np.floating) else str(value)


def _rows(columns: str, rows: Sequence[Sequence[Any]]) -> alt.InlineData:
    """Rows as CSV; columns: their names."""
    return _data(**{name: [row[k] for row in rows] for k, name in enumerate(columns.split())})


def _tip(field: str, form: str = ".4f", **options: Any) -> alt.Tooltip:
    return alt.Tooltip(f"{field}:Q", format=form, **options)


def _line_legend(width: int, **options: Any) -> alt.Legend:
    return alt.Legend(orient="top", symbolType="stroke", symbolStrokeWidth=width, **options)


def _gradient_legend(form: str) -> alt.Legend:
    return alt.Legend(orient="bottom", gradientLength=120, titleOrient="left", format=form)


def _if(condition: str, value: Any, other: Any) -> Any:
    return alt.condition(f"datum.{condition}", alt.value(value), alt.value(other))


def _named(field: str, names: Sequence[str], limit: int, **columns: Sequence[Any]) -> Any:
    """A chart with a row for each name; limit: that of a name's width."""
    y = alt.Y(f"{field}:N", sort=list(names), title=None, axis=alt.Axis(labelLimit=limit))
    return alt.Chart(_data(**{field: list(names)}, **columns)).encode(y=y)


def _spec(chart: Any, height: int) -> Spec:
    spec: Spec = chart.properties(width="container", height=height).to_dict(validate=False)
    del spec["$schema"], spec["config"]
    return spec


def _generations(numbers: Sequence[int]) -> Any:
    # Few numbers would stand between the generations as well.
    few = sorted(set(numbers))
    ticks: dict[str, Any] = {"values": few, "tickCount": len(few)} if len(few) <= 6 else {}
    axis = alt.Axis(format="d", tickMinStep=1, grid=False, **ticks)
    return alt.X("generation:Q", title="generation", axis=axis, scale=alt.Scale(nice=False, zero=False, padding=8))


def _scale(values: Sequence[float | None]) -> Any:
    """The scale of an axis that need not begin at 0; with some room where all values are one, which has no ticks
    else."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if finite and min(finite) == max(finite):
        margin = abs(finite[0]) / 10 or 1.0
        return alt.Scale(domain=[finite[0] - margin, finite[0] + margin], nice=True, zero=False)
    return alt.Scale(zero=False, nice=True)


def fitness_chart(run: RunData) -> Spec:
    """Fitness over generations: the best so far, each generation's best, median and spread, validation, and rules for
    what needs no search. A series without a value has no place in the legend."""
    rows = run.fitness_rows
    has_spread = any(len(g.row.fitness) > 1 for g in rows)
    columns: dict[str, Sequence[Any]] = {
        "generation": [g.number for g in rows],
        "best": [g.row.best for g in rows],
        "part": [g.row.best_of_part for g in rows],
        "median": [g.median if has_spread else None for g in rows],
        "low": [g.low if has_spread else None for g in rows],
        "high": [g.high if has_spread else None for g in rows],
        "so_far": [g.row.best_so_far for g in rows],
        "validation": [g.row.validation_fitness for g in rows],
    }
    measured = {name for name, values in columns.items() if any(value is not None for value in values)}
    rules = shown_rules(run)
    low, high, margin = _range(rows)
    shown = [value for _, value, _ in rules]
    domain = [min([low, *shown]) - margin, max([high, *shown]) + margin]
    y: dict[str, Any] = {
        # Names are as far apart as this domain puts them.
        "scale": alt.Scale(domain=domain, nice=False, zero=False),
        "title": titled("fitness", run.outcome.units) + ", search split",
    }  # fmt: skip
    base = alt.Chart(_data(**columns)).encode(x=_generations(columns["generation"]))
    # A line of one point is none.
    few = alt.OverlayMarkDef(size=24) if len(rows) <= 10 else False
    looks = base.transform_filter("isValid(datum.validation)")
    drawn = {
        "10th to 90th percentile": ("low", BAND, base.mark_area(clip=True).encode(y2="high:Q")),
        "median": ("median", SOFT, base.mark_line(strokeWidth=1.5, clip=True, point=few)),
        "best on its minibatch": (
            "part", FAINT if "so_far" in measured else ACCENT, base.mark_line(strokeWidth=1.5, clip=True, point=few)
        ),
        "best of the generation": ("best", FAINT, base.mark_circle(size=16, opacity=1, clip=True)),
        "best so far": (
            "so_far", ACCENT, base.mark_line(strokeWidth=2.5, interpolate="step-after", clip=True, point=few)
        ),
        "validation": (
            "validation", OTHER, looks.mark_line(point=alt.OverlayMarkDef(size=26), strokeWidth=1.5, clip=True)
        ),
    }  # fmt: skip
    drawn = {name: series for name, series in drawn.items() if series[0] in measured}
    # The legend begins with the best.
    names = [name for name in reversed(drawn) if name != "validation"] + ["validation"] * ("validation" in drawn)
    colour = alt.Color(
        "series:N", title=None, scale=alt.Scale(domain=names, range=[drawn[name][1] for name in names]),
        legend=_line_legend(4, symbolOpacity=1),
    )  # fmt: skip
    layers = [
        mark.transform_calculate(series=f"'{name}'").encode(y=alt.Y(f"{field}:Q", **y), color=colour)
        for name, (field, _, mark) in drawn.items()
    ]
    if rules:
        labels, values, _ = zip(*rules, strict=True)
        places = label_places(rules, domain)
        lines = alt.Chart(_data(name=labels, value=values, place=places))
        layers.append(
            lines.mark_rule(strokeDash=[4, 4], color=SOFT, clip=True).encode(
                y=alt.Y("value:Q", **y),
                tooltip=[alt.Tooltip("name:N", title=" "), _tip("value")],
            )
        )
        names = lines.mark_text(align="right", baseline="middle", dx=-4, color=SOFT, limit=260)
        layers.append(names.encode(y=alt.Y("place:Q", **y), x=alt.value("width"), text="name:N"))
    tips = [_tip("generation", "d", title="generation")]
    tips += [_tip(name, title=title) for name, title in TOOLTIPS.items() if name in measured]
    points = base.mark_point(size=260, opacity=0, clip=True)
    layers += [points.encode(y=alt.Y(f"{name}:Q", **y), tooltip=tips) for name in ("best", "part") if name in measured]
    return _spec(alt.layer(*layers), FITNESS_HEIGHT)


def label_places(rules: Sequence[tuple[str, float, str]], domain: Sequence[float]) -> list[float]:
    """The middles of the rules' names, in the units of the fitness: above the rule for a score on the search split,
    below it for others, in the rules' order and so far apart that no two stand on each other. domain: the lowest and
    the highest value of the axis."""
    line = LABEL_HEIGHT * (domain[1] - domain[0]) / FITNESS_HEIGHT
    wanted = [value + line * (0.6 if split == "search split" else -0.6) for _, value, split in rules]
    order = sorted(range(len(rules)), key=lambda number: -wanted[number])
    places = list(wanted)
    for upper, lower in itertools.pairwise(order):
        places[lower] = min(places[lower], places[upper] - line)
    # Names that were moved below the axis push the others up.
    least = domain[0] + line / 2
    for number in reversed(order):
        places[number] = max(places[number], least)
        least = places[number] + line
    return places


def shown_rules(run: RunData) -> list[tuple[str, float, str]]:
    """Scores that need no search and lie near the curves, by name, with their splits: the baseline's on the search
    split, the rivals' held out."""
    # The names of equal scores would stand on each other.
    names: dict[tuple[float, str], list[str]] = {}
    for name, value in run.outcome.search_fitness.items():
        names.setdefault((value, "search split"), []).extend([name] if name != "winner" else [])
    # Judges' votes are strengths in a search, and shares of prompts on the held-out split: they share no axis.
    for rival in () if run.outcome.is_judged else run.outcome.rivals:
        label = f"best parent {rival.name}" if rival.role == "parent" else label_of(rival.role, rival.name)
        names.setdefault((rival.heldout_fitness, final(run.outcome.held_out)), []).append(label)
    rules = [(f"{' and '.join(same)}, {split}", value, split) for (value, split), same in names.items() if same]
    low, high, margin = _range(run.fitness_rows)
    return [rule for rule in rules if low - 10 * margin <= rule[1] <= high + 10 * margin]


def _range(rows: Sequence[Generation]) -> tuple[float, float, float]:
    """The lowest and the highest fitness of the curves, without the first generations' worst, and a margin around
    both."""
    curves = [x for g in rows for x in (g.row.best_so_far, g.median, g.row.validation_fitness) if x is not None]
    low = [g.low for g in rows if g.low is not None]
    if not curves or not low:
        return 0.0, 1.0, 0.0
    high, bottom = max(curves), min(float(np.quantile(low, 0.1)), float(np.quantile(curves, 0.02)))
    return bottom, high, 0.06 * (high - bottom) or 0.5


def curve_chart(numbers: Sequence[int], series: Mapping[str, Sequence[float | None]], title: str) -> Spec:
    """A small chart of one or two series over generations; the first in the accent."""
    places = spread(len(numbers), MOST_POINTS)
    rows = [
        (numbers[place], name, values[place])
        for name, values in series.items()
        for place in places
        if values[place] is not None
    ]
    names = list(series)
    chart = (
        alt.Chart(_rows("generation series value", rows))
        .mark_line(strokeWidth=1.8, point=alt.OverlayMarkDef(size=12) if len(places) <= 30 else False)
        .encode(
            x=_generations(numbers),
            y=alt.Y("value:Q", title=None, scale=_scale([row[2] for row in rows])),
            color=alt.Color(
                "series:N", title=None, scale=alt.Scale(domain=names, range=[ACCENT, SOFT]),
                legend=_line_legend(3) if len(names) > 1 else None,
            ),
            tooltip=[_tip("generation", "d"), alt.Tooltip("series:N", title=" "), _tip("value", ".6g", title="value")],
        )
    )  # fmt: skip
    return _spec(chart.properties(title=title), 150)


def task_charts(run: RunData) -> list[Spec]:
    """For each task the score of the generation's best candidate, and the candidates' mean."""
    rows = run.fitness_rows
    numbers = [g.number for g in rows]
    charts = []
    for score in list(dict.fromkeys(name for g in rows for name in g.row.scores_of_best))[:MOST_CHARTS]:
        task = score.rpartition("/")[0]
        means = []
        for g in rows:
            values = [value for value in g.row.task_scores.get(task, []) if value is not None]
            means.append(float(np.mean(values)) if values else None)
        series = {"best": [g.row.scores_of_best.get(score) for g in rows], "mean of all": means}
        if all(value is None for value in means):
            del series["mean of all"]
        charts.append(curve_chart(numbers, series, titled(score, run.outcome.units)))
    return charts


def metric_charts(run: RunData) -> list[Spec]:
    """The strategy's metrics, and failed candidates where there are any."""
    numbers = [g.number for g in run.generations]
    metrics = [g.metrics for g in run.generations]
    names = list(dict.fromkeys(name for each in metrics for name in each))[:MOST_CHARTS]
    series = {name: [each.get(name) for each in metrics] for name in names}
    if any(g.row.failed for g in run.generations):
        series["failed candidates"] = [g.row.failed for g in run.generations]
    return [curve_chart(numbers, {name: values}, name.replace("_", " ")) for name, values in series.items()]


def heat_map(map_: Map, number: int) -> Spec:
    """A heat map that is centred on zero. The page fills `cells` with rows of row, column and value."""
    rows, columns = map_.rows, map_.columns
    finite = np.abs(map_.values[np.isfinite(map_.values)])
    most = float(finite.max(initial=0.0)) or 1.0
    axis = alt.Axis(orient="top", labelAngle=-30 if len(columns) > 3 else 0, labelLimit=150)
    x = alt.X("column:N", sort=columns, title=None, axis=axis)
    y = alt.Y("row:N", sort=rows, title=None, axis=alt.Axis(labelLimit=150, labelOverlap=True))
    base = alt.Chart(alt.NamedData(name=f"cells{number}")).encode(x=x, y=y)
    cells = base.mark_rect(stroke=PAPER, strokeWidth=1, cornerRadius=2).encode(
        color=alt.Color(
            "value:Q", title=map_.parameter,
            scale=alt.Scale(
                domain=[-most, 0, most], range=["var(--negative)", "var(--zero)", "var(--positive)"], interpolate="lab"
            ),
            legend=_gradient_legend(".2~f"),
        ),
        tooltip=[alt.Tooltip("row:N", title="group"), alt.Tooltip("column:N", title="parent"),
                 _tip("value", ".6g", title=map_.parameter)],
    )  # fmt: skip
    layers = [cells]
    if len(columns) <= 6 and len(rows) <= 60:
        strong = alt.condition(f"abs(datum.value) > {0.7 * most}", alt.value(PAPER), alt.value(INK))
        texts = base.transform_filter("isValid(datum.value)").mark_text(fontSize=11)
        layers.append(texts.encode(text=alt.Text("value:Q", format=".2f"), color=strong))
    return _spec(alt.layer(*layers).properties(title=map_.parameter), max(60, min(22 * len(rows), 1400)))


def frame_values(frames: Frames) -> dict[str, Any]:
    """The slider's labels and the heat maps' cells, row by row, for each frame, with six digits."""
    return {
        "labels": frames.labels,
        "maps": [
            {
                "rows": map_.rows,
                "columns": map_.columns,
                "values": [
                    [float(f"{x:.6g}") if np.isfinite(x) else None for x in frame.ravel().tolist()]
                    for frame in map_.values
                ],
            }
            for map_ in frames.maps
        ],
    }


def importance_chart(importance: Mapping[str, float]) -> Spec:
    """The first 20 parameters with their rank correlations."""
    shown = dict(list(importance.items())[:20])
    base = _named("parameter", list(shown), 170, correlation=list(shown.values()))
    bars = base.mark_bar(height=9, cornerRadius=2).encode(
        x=alt.X("correlation:Q", title="rank correlation", scale=alt.Scale(domain=[-1, 1])),
        color=_if("correlation < 0", "var(--negative)", "var(--positive)"),
        tooltip=["parameter:N", _tip("correlation")],
    )
    return _spec(bars, max(60, 20 * len(shown)))


def parallel_chart(sampled: Sampled, names: Sequence[str]) -> Spec:
    """Candidates as lines from top to bottom, at each parameter between its lowest and its highest value."""
    columns: dict[str, np.ndarray] = {**{name: sampled.values[name] for name in names}, "fitness": sampled.fitness}
    rows = []
    for place, (name, values) in enumerate(columns.items()):
        low, width = values.min(), np.ptp(values) or 1.0
        rows += [
            (k, name, place, float(f"{(value - low) / width:.4g}"), float(f"{value:.6g}"), float(f"{fitness:.6g}"))
            for k, (value, fitness) in enumerate(zip(values.tolist(), sampled.fitness.tolist(), strict=True))
        ]
    # The best lines are drawn last, over the others.
    rows.sort(key=lambda row: row[-1])
    low, high = np.quantile(sampled.fitness, [0.2, 1.0])
    lines = (
        alt.Chart(_rows("candidate axis place share value fitness", rows))
        .mark_line(strokeWidth=1.2, opacity=0.55)
        .encode(
            y=alt.Y("axis:N", sort=list(columns), title=None, axis=alt.Axis(labelLimit=170, grid=True, domain=False)),
            x=alt.X("share:Q", title="lowest to highest value", axis=alt.Axis(labels=False, ticks=False, grid=False)),
            detail="candidate:N",
            order=alt.Order("place:Q"),
            color=alt.Color(
                "fitness:Q",
                scale=alt.Scale(domain=[float(low), float(high)], range=[LINE, ACCENT], clamp=True),
                legend=_gradient_legend(".2f"),
            ),
            tooltip=["axis:N", _tip("value", ".6g"), _tip("fitness")],
        )
    )
    return _spec(lines, 30 * len(columns))


def rung_chart(counts: Mapping[int, int]) -> Spec:
    base = alt.Chart(_data(examples=[str(k) for k in counts], candidates=list(counts.values()))).encode(
        y=alt.Y("examples:N", sort=None, title="examples"),
        x=alt.X("candidates:Q", title="candidates", axis=alt.Axis(format="d", tickMinStep=1)),
    )
    bars = base.mark_bar(height=14, cornerRadius=2, color=ACCENT)
    text = base.mark_text(align="left", dx=5, color=SOFT).encode(text=alt.Text("candidates:Q", format="d"))
    return _spec(bars + text, max(60, 30 * len(counts)))


def heldout_chart(result: Result) -> Spec:
    """Held-out fitness, with the 95% interval of each model's distance from the winner around its score."""
    winner = result.winner
    ours = winner.heldout_fitness if winner is not None else math.nan
    scored = [model for model in result.table if math.isfinite(model.heldout_fitness)]
    intervals = [lead_over(result, model) for model in scored]
    labels = [label_of(model.role, model.name) for model in scored]
    base = _named(
        "model", labels, 180, fitness=[model.heldout_fitness for model in scored],
        low=[None if lead is None else ours - lead.high for lead in intervals],
        high=[None if lead is None else ours - lead.low for lead in intervals],
        role=["winner" if model is winner else "other" for model in scored],
    )  # fmt: skip
    x: dict[str, Any] = {"title": f"{titled('fitness', result.units)}, {final(result.held_out)}"}
    bars = base.mark_bar(height=16, cornerRadius=2).encode(
        x=alt.X("fitness:Q", **x), color=_if("role == 'winner'", ACCENT, "var(--bar)"),
        tooltip=["model:N", _tip("fitness")],
    )  # fmt: skip
    whiskers = base.mark_rule(strokeWidth=2, color=INK).encode(x=alt.X("low:Q", **x), x2="high:Q")
    layers = [bars, whiskers]
    if math.isfinite(ours):
        layers.append(alt.Chart(_data(x=[ours])).mark_rule(color=ACCENT, strokeDash=[4, 4]).encode(x=alt.X("x:Q", **x)))
    return _spec(alt.layer(*layers), max(60, 30 * len(scored)))


def front_chart(result: Result) -> Spec:
    """A front by its first two tasks, on the split that the winner was chosen on and held out."""
    (first, second), last = list(result.members[0].scores)[:2], final(result.held_out)
    rows = [
        (str(member.member), split, scores[first], scores[second],
         "winner" if member.genome == result.genome else "member")
        for member in result.members
        for split, scores in ((f"{result.chosen_on} split", member.scores), (last, member.heldout_scores))
    ]  # fmt: skip
    base = alt.Chart(_rows("member split x y role", rows)).encode(
        x=alt.X("x:Q", title=titled(first, result.units), scale=_scale([row[2] for row in rows])),
        y=alt.Y("y:Q", title=titled(second, result.units), scale=_scale([row[3] for row in rows])),
    )
    points = base.mark_point(filled=True, opacity=1).encode(
        shape=alt.Shape("split:N", title=None, legend=alt.Legend(orient="top")),
        color=_if("role == 'winner'", ACCENT, SOFT),
        size=_if("role == 'winner'", 140, 60),
        tooltip=["member:N", "role:N", "split:N", _tip("x", title=first), _tip("y", title=second)],
    )
    text = base.transform_filter(f"datum.split != '{last}'").mark_text(dx=9, dy=-9, color=SOFT).encode(text="member:N")
    return _spec(points + text, 320)


def pool_chart(run: RunData) -> Spec:
    """The members of a pool at the generation of their birth; the winner's ancestors stand out."""
    ancestors = {member.name for member in run.outcome.lineage}
    born = {
        int(genome[NUMBER]): (g.number, fitness)
        for g in run.fitness_rows
        for genome, fitness in zip(g.row.genomes, g.row.fitness, strict=True)
        if fitness is not None and genome
    }
    numbers = [list(born)[place] for place in spread(len(born), MOST_MEMBERS)]
    numbers += [number for number in born if f"member-{number}" in ancestors and number not in numbers]
    best = np.quantile([fitness for _, fitness in born.values()], [0.05, 1.0])
    margin = 0.1 * float(np.ptp(best)) or 0.5
    rows = [
        (*born[number], str(number), "ancestor" if f"member-{number}" in ancestors else "member") for number in numbers
    ]
    points = (
        alt.Chart(_rows("generation fitness member role", rows))
        .mark_circle(opacity=1, clip=True)
        .encode(
            x=_generations([born[number][0] for number in numbers]),
            y=alt.Y("fitness:Q", scale=alt.Scale(domain=[float(best[0]) - margin, float(best[1]) + margin])),
            color=_if("role == 'ancestor'", ACCENT, "var(--bar)"),
            size=_if("role == 'ancestor'", 70, 24),
            tooltip=["member:N", "role:N", _tip("generation", "d"), _tip("fitness")],
        )
    )
    return _spec(points, 240)


def history_chart(history: Sequence[Mapping[str, Any]]) -> alt.Chart:
    """The fitness over generations as a chart of its own: best so far, best, mean, and that of the best so far on the
    validation split where generations looked at it; for steps on minibatches, the mean. history: rows of
    `history.jsonl`."""
    # A companion of the fitness has another scale.
    rows = [row for row in history if "companion" not in row]
    keys = ("best_so_far", "best", "mean")
    series = {key.replace("_", " "): [(row["generation"], row[key]) for row in rows] for key in keys}
    checks = [(row["generation"], row["validation"].get("best_so_far")) for row in rows if "validation" in row]
    series |= {"validation of best": checks} if checks else {}
    series = {name: points for name, points in series.items() if any(value is not None for _, value in points)}
    points = [
        {"generation": number, "series": name, "fitness": value}
        for name, values in series.items()
        for number, value in values
        if value is not None
    ]
    return (
        alt.Chart(alt.InlineData(values=points))
        .mark_line(point=alt.OverlayMarkDef(size=16))
        .encode(
            x=alt.X("generation:Q", axis=alt.Axis(format="d", tickMinStep=1)),
            y=alt.Y("fitness:Q", title="fitness, search split", scale=alt.Scale(zero=False)),
            color=alt.Color("series:N", title=None, scale=alt.Scale(domain=list(series))),
            tooltip=["series:N", "generation:Q", "fitness:Q"],
        )
        .properties(width=560, height=320)
    )


# A tick of seconds as a duration.
DURATION = (
    "(datum.value < 3600 ? floor(datum.value / 60) : floor(datum.value / 3600) + ':' + "
    "format(floor(datum.value % 3600 / 60), '02')) + ':' + format(floor(datum.value % 60), '02')"
)


def compared_fitness(runs: Mapping[str, RunData], by_time: bool) -> Spec:
    """The best so far of several runs, or of the generations' best on their minibatches where there is none, by passes,
    or by the generations' time. Runs of earlier versions know of no passes: if there is one, evaluations are shown."""
    counted = all(line.passes is not None for run in runs.values() for line in run.timing)
    rows = []
    for name, run in runs.items():
        # A generation that was searched again has its last line.
        spent = {
            line.generation: line.seconds + line.validation_seconds if by_time else line.passes or 0.0
            for line in run.timing
        }
        passed = dict(zip(spent, np.cumsum(list(spent.values())).tolist(), strict=True))
        whole, best, curve = any(g.row.best_so_far is not None for g in run.fitness_rows), -math.inf, []
        for g in run.fitness_rows:
            value = g.row.best_so_far if whole else g.row.best_of_part
            place = passed.get(g.number) if by_time or counted else g.row.evaluations
            if value is not None and place is not None:
                best = max(best, value)
                curve.append((name, place, best))
        rows += [curve[place] for place in spread(len(curve), MOST_POINTS)]
    # A line of one point is none.
    few = any(len(run.fitness_rows) <= 10 for run in runs.values())
    work = "passes" if counted else "evaluations of candidates"
    title = "time of the generations" if by_time else work
    tick = DURATION if by_time else "format(datum.value, ',')"
    legend = _line_legend(3, columns=2, labelLimit=140, values=list(dict.fromkeys(row[0] for row in rows)))
    chart = (
        alt.Chart(_rows("run x fitness", rows))
        .mark_line(strokeWidth=2, interpolate="step-after", point=alt.OverlayMarkDef(size=20) if few else False)
        .encode(
            # From five on, no two ticks are less than one apart.
            x=alt.X(
                "x:Q", title=title, axis=alt.Axis(grid=False, labelExpr=tick),
                scale=alt.Scale(domain=[0, max([5.0, *(row[1] for row in rows)])]),
            ),
            y=alt.Y("fitness:Q", title="best fitness so far", scale=_scale([row[2] for row in rows])),
            color=_run_colour(list(runs), legend),
            tooltip=["run:N", _tip("x", ",.6~r", title=title), _tip("fitness")],
        )
    )  # fmt: skip
    return _spec(chart, 300)


def compared_heldout(runs: Mapping[str, RunData]) -> Spec:
    """The held-out fitness of the winners of several runs."""
    winners = {name: winner for name, run in runs.items() if (winner := run.outcome.winner) is not None}
    scored = {name: x for name, winner in winners.items() if math.isfinite(x := winner.heldout_fitness)}
    base = _named("run", list(scored), 180, fitness=list(scored.values()))
    bars = base.mark_bar(height=16, cornerRadius=2).encode(
        x=alt.X("fitness:Q", title="fitness of the winner, held out"), color=_run_colour(list(runs), None),
        tooltip=["run:N", _tip("fitness")],
    )  # fmt: skip
    return _spec(bars, max(60, 30 * len(scored)))


def _run_colour(names: list[str], legend: Any) -> Any:
    scale = alt.Scale(domain=names, range=[SERIES[k % len(SERIES)] for k in range(len(names))])
    return alt.Color("run:N", title=None, scale=scale, legend=legend)
