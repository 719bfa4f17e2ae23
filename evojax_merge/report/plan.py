"""The cost of a search, and its tables and lines.

Seconds are a lower bound, by the roofline: every matrix product at the device's peak or at its memory's bandwidth,
whichever takes longer, and merging at the bandwidth, one after the other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from evojax_merge.evaluation.programs import MATERIALISE
from evojax_merge.evaluation.targets import Target
from evojax_merge.evaluation.timings import NOT_MEASURED, Factor, WorkKind
from evojax_merge.report.tables import Table, TerminalTable
from evojax_merge.schema.budget import parse_budget

# The parts of a run, by their names: those around it, and its own.
LOADING, COMPILING, WRITING = "loading the models", "compiling", "writing the winner"
MEASURING, GENERATIONS = "measuring base and parents", "the generations"
# Between the two that end a run come controls of the held-out table, and the winner's polish.
CHOOSING, TUNING, HELDOUT = "choosing the winner", "making controls or polishing", "scoring on held-out examples"
ENDING = (CHOOSING, TUNING, HELDOUT)
# The seconds beside the generations from which on a search names its parts.
NOTABLE = 10.0
# The seconds of a day.
DAY = 24 * 3600
_CANDIDATE, _GRADIENT = "a candidate on all search examples", "a candidate and its gradient, on a minibatch"


@dataclass(frozen=True)
class PassPlan:
    """A compiled pass of a search. chunk: the number of candidates that share it on a device; runs: how often it is run
    for them in a generation that is scored on all search examples; steps: of one run, at most (decode steps). Bytes on
    a device: held, of materialised candidates and caches; temporaries, estimated, and reported by the target's compiler
    (None: it was not asked). collectives: the compiler's report on one run, by kind their number and the bytes of their
    results together. flops, moved_bytes, sent_bytes (those that a device sends to the others that share the candidate)
    and seconds: for one candidate, of all runs."""

    task: str
    name: str
    chunk: int
    runs: int
    steps: int
    held_bytes: int
    temporary_bytes: int
    reported_bytes: int | None
    collectives: Mapping[str, tuple[int, int]] | None
    flops: float
    moved_bytes: float
    sent_bytes: float
    seconds: float

    @property
    def needed_bytes(self) -> int:
        """Bytes on a device, beside the models: by the compiler's report where there is one."""
        return self.held_bytes + (self.temporary_bytes if self.reported_bytes is None else self.reported_bytes)


@dataclass(frozen=True)
class Work:
    """The work of one group of devices that share a candidate: FLOPs and bytes of them all, and seconds by the
    roofline: of everything; of merging, of the matrix products that arithmetic bounds, and of exchanges between the
    devices, which follow each other; of models that come over the host's link, and from files, meanwhile.
    called_seconds: those of functions that are not traced, measured on this machine; they are part of `seconds`."""

    flops: float
    moved_bytes: float
    seconds: float
    merge_seconds: float = 0.0
    compute_seconds: float = 0.0
    called_seconds: float = 0.0
    exchange_seconds: float = 0.0
    link_seconds: float = 0.0
    disk_seconds: float = 0.0

    @property
    def reading_seconds(self) -> float:
        """Seconds of the products that the memory's traffic bounds; 0 where models come too slowly for them."""
        parts = self.merge_seconds + self.compute_seconds + self.called_seconds + self.exchange_seconds
        return 0.0 if self.seconds <= max(self.link_seconds, self.disk_seconds) else self.seconds - parts

    @property
    def bound(self) -> str:
        """The part that takes the most time, in words."""
        meanwhile = {"the host's link": self.link_seconds, "the disk": self.disk_seconds}
        slowest = max(meanwhile, key=lambda part: meanwhile[part])
        if 0 < self.seconds <= meanwhile[slowest]:
            return slowest
        parts = {"arithmetic": self.compute_seconds, "merging": self.merge_seconds,
                 "reading weights": self.reading_seconds, "exchanges between devices": self.exchange_seconds,
                 "the functions that are called, as measured here": self.called_seconds}  # fmt: skip
        return max(parts, key=lambda part: parts[part])


@dataclass(frozen=True)
class Plan:
    """The cost of a search.

    Bytes of the bank and of passes are those of a device; `pass_bytes` of the largest pass: its temporaries and the
    arrays that are held for it. `groups`: groups of `model` devices each that score candidates side by side. candidate:
    one on all search examples; gradient: one with its gradient, on a minibatch (None: no gradient is followed);
    generation, run: the work of each group of devices for them. gradient_generations: the number of generations that
    follow gradients; `generation` is one of those that do not, where there are both. budget: the search's, which the
    generations come from, if it has one. notes: lines on the choice of the strategy, and on what candidates compute
    beside the usual. advice: changes that would make it fit, where it does not. compile_seconds: what the target's
    compiler took here for the passes (None: it was not asked). parts: those of the run, in their order, by name.
    expected_share: the share of the bound that is left where answers end as they are likely to, not at the most tokens;
    factor: the seconds that such a run takes over that; kind: the kind of work that most of a generation is.
    """

    target: Target
    model: int
    groups: int
    bank_bytes: int
    pass_bytes: int
    passes: tuple[PassPlan, ...]
    population: int
    generations: int
    gradient_generations: int
    candidate: Work
    gradient: Work | None
    generation: Work
    run: Work
    host_bytes: int
    disk_bytes: int
    download_bytes: int
    advice: tuple[str, ...]
    budget: str | None = None
    notes: tuple[str, ...] = ()
    compile_seconds: float | None = None
    parts: Mapping[str, Work] = field(default_factory=dict)
    around: Mapping[str, Work] = field(default_factory=dict)
    expected_share: float = 1.0
    factor: Factor = NOT_MEASURED
    kind: WorkKind = "scoring"

    @property
    def run_seconds(self) -> float:
        """About the seconds of the run's parts."""
        return self.seconds_left(0)

    def seconds_left(self, saved: int) -> float:
        """About the seconds of the run's parts where `saved` generations are done."""
        generations = self.parts[GENERATIONS].seconds if GENERATIONS in self.parts else 0.0
        done = generations * min(1.0, saved / max(1, self.generations))
        return max(0.0, self.run.seconds - done) * self.expected_share * self.factor.value

    def part_seconds(self, saved: int = 0) -> dict[str, float]:
        """About the seconds of each of the run's parts where `saved` generations are done."""
        expected, left = self.expected_share * self.factor.value, 1 - min(1.0, saved / max(1, self.generations))
        return {
            name: part.seconds * expected * (left if name == GENERATIONS else 1.0) for name, part in self.parts.items()
        }

    @property
    def around_seconds(self) -> float:
        """About the seconds before and after the run, where nothing is compiled yet."""
        return sum(work.seconds for work in self.around.values())

    @property
    def estimated_seconds(self) -> float:
        """About the seconds from loading the models to the winner's files, where nothing is compiled yet."""
        return self.run_seconds + self.around_seconds

    def ending_seconds(self, generation: float) -> float:
        """About the seconds from the last generation to the winner, where a generation takes `generation` seconds."""
        ending = sum(self.parts[name].seconds for name in self.parts if name in ENDING)
        return generation * ending / self.generation.seconds if self.generation.seconds > 0 else 0.0

    @property
    def fits(self) -> bool:
        return self.bank_bytes + self.pass_bytes <= self.target.memory

    @property
    def merges_alone(self) -> bool:
        """Return whether the arithmetic is that of merges alone, since what scores them is not traced."""
        return bool(self.passes) and all(one.name == MATERIALISE for one in self.passes)

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data; rates that are not known are null, and so are the seconds of what does not fit."""
        target = {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self.target).items()
        }
        data = asdict(self) | {"target": target, "fits": self.fits, "factor": self.factor.model_dump()}
        if not self.fits:
            for work in (
                *(data[name] for name in ("candidate", "gradient", "generation", "run")),
                *data["parts"].values(),
                *data["around"].values(),
            ):
                if work is not None:
                    work |= {key: None for key in work if key.endswith("seconds")}
            for row in data["passes"]:
                row["seconds"] = None
        return data

    def summary(self, saved: int = 0) -> list[str]:
        """Lines on the memory, on the work where `saved` generations are done and, where much of it is no
        generations', on its parts."""
        what, work = _CANDIDATE, self.candidate
        if self.gradient is not None:
            what, work = _GRADIENT, self.gradient
        purpose = "to merge a candidate" if self.merges_alone else f"for {what}"
        around, more = self.around_seconds, ""
        if around >= 1:
            is_first = self.around[COMPILING].seconds > 0
            done = "load, compile and write, the first time" if is_first else "load and write"
            more = f", and about {shown_seconds(around)} more to {done}"
        searched = "what is left of the search" if saved else "the whole search"
        left, beside = self.seconds_left(saved), self.seconds_left(self.generations)
        time = f"; {searched} takes {self._time(left)}{more}" if self.fits else ""
        parts = [f"plan: {self._shares(saved)}"] if self.fits and beside > max(left / 3, NOTABLE) else []
        return [
            f"plan: {shown_bytes(self.bank_bytes)} of models and up to {shown_bytes(self.pass_bytes)} for a pass, of "
            f"{shown_bytes(self.target.memory)} on each device",
            f"plan: {shown_number(work.flops)}FLOP {purpose}{time}",
            *parts,
        ]

    def verdict(self) -> str:
        """Say whether the search fits, with the figures."""
        total, memory = self.bank_bytes + self.pass_bytes, self.target.memory
        return (
            f"{'fits' if self.fits else 'does not fit'}: {shown_bytes(total)} of {shown_bytes(memory)} on each device "
            f"(models {shown_bytes(self.bank_bytes)}, the largest pass {shown_bytes(self.pass_bytes)})"
        )

    def conclusion(self) -> list[str]:
        """The needs of each host, the verdict and, where the search fits, the time of the run: short lines, which stand
        last."""
        download = f", {shown_bytes(self.download_bytes)} to download" if self.download_bytes else ""
        disk = f"the run {shown_bytes(self.disk_bytes)} of disk{download}"
        host = f"each host needs {shown_bytes(self.host_bytes)} of memory, {disk}"
        if not self.fits:
            return [host, self.verdict()]
        about, compiling, once = shown_seconds(self.estimated_seconds), self.around.get(COMPILING), ""
        if compiling is not None and compiling.seconds > self.estimated_seconds / 4:
            once = f" ({shown_seconds(compiling.seconds)} to compile, once)"
        return [host, self.verdict(), f"time: about {about} for {self._length()}{once}, bound by {self.run.bound}"]

    def _time(self, seconds: float) -> str:
        """An estimate of the run, or of a part of it, its source, and its bound."""
        factor, about = self.factor, shown_seconds(seconds)
        if self.run.called_seconds:
            return f"about {about} ({factor.source})"
        source = factor.source or "a guess: `evojax-merge bench` measures it"
        bound = "its bound by the roofline"
        if self.expected_share < 0.995:
            bound += f", of which answers as long as their targets take {self.expected_share:.0%}"
        return f"about {about} ({factor.value:.2g} times {bound}, {source})"

    def lines(self) -> list[str]:
        """The plan as lines, without the passes' table and the conclusion."""
        target = self.target
        rates = (
            f"{shown_bytes(target.memory)}, {shown_number(target.bandwidth)}B/s, {shown_number(target.bfloat16)}FLOP/s "
            f"bfloat16, {shown_number(target.float32)}FLOP/s {target.float32_products}"
        )
        nominal = "" if target.is_accelerator else ", nominal"
        hosts = "" if target.hosts == 1 else f", {target.devices_per_host} to each of {target.hosts} hosts"
        printed = [
            f"target {target.name}: {target.devices} x {target.kind}{hosts} ({rates} each{nominal}), in {self.groups} "
            f"group{'s' if self.groups > 1 else ''} of {self.model}",
        ]
        on_each = "" if self.groups == 1 else f", on each of the {self.groups} groups"
        gradients = "" if self.gradient is None else f" ({self.gradient_generations} with gradients)"
        for name, work in (
            (_CANDIDATE, self.candidate),
            (_GRADIENT, self.gradient),
            (f"a generation of {self.population}{on_each}", self.generation),
            (f"the run of {self._length()}{gradients}, and choosing the winner{on_each}", self.run),
        ):
            if work is None:
                continue
            share = f"{work.merge_seconds / work.seconds:.0%}" if work.seconds > 0 else "unknown share"
            time = f", {shown_seconds(work.seconds)} by the roofline, bound by {work.bound} ({share} merging)"
            printed.append(
                f"{name}: {shown_number(work.flops)}FLOP{' to merge' if self.merges_alone else ''}, "
                f"{shown_number(work.moved_bytes)}B moved"
                f"{time if self.fits else ''}"
            )
        if self.fits:
            printed.append(f"the run takes {self._time(self.run_seconds)}: {self._shares()}")
            times = ", ".join(f"{name} {shown_seconds(work.seconds)}" for name, work in self.around.items())
            printed.append(f"around it, the first time: {times}")
        return [*self.notes, *printed]

    def _shares(self, saved: int = 0) -> str:
        """The parts of the run and their seconds."""
        return ", ".join(f"{name} {shown_seconds(seconds)}" for name, seconds in self.part_seconds(saved).items())

    def _length(self) -> str:
        generations = f"{self.generations} generations"
        if self.budget is None:
            return generations
        budget = parse_budget(self.budget)
        about = "" if budget is None or budget.seconds is None else "about "
        return f"{about}{generations} (search.budget: {self.budget})"

    def what_would_fit(self) -> str:
        """The verdict on a search that does not fit, and changes that would make it fit."""
        return f"{self.verdict()}; {format_advice(self.advice)}"

    def times(self) -> TerminalTable:
        """The parts of the run and their seconds by the roofline, on the devices and between them, over the host's link
        and from its files, and which of these bounds each."""
        before = {name: work for name, work in self.around.items() if name != WRITING}
        parts = before | dict(self.parts) | {name: self.around[name] for name in self.around if name == WRITING}
        rows = [
            (name, shown_seconds(work.seconds), *([""] * 7))
            if name == COMPILING
            else (
                name, *map(shown_seconds, (
                    work.seconds, work.compute_seconds, work.merge_seconds, max(0.0, work.reading_seconds),
                    work.exchange_seconds, work.link_seconds, work.disk_seconds,
                )), work.bound,
            )
            for name, work in parts.items()
        ]  # fmt: skip
        return Table(TIMES, rows, range(1, 8), folded=range(9)).terminal("Seconds, at least")

    def table(self) -> TerminalTable:
        """The passes, each with its cost on all devices that share a candidate; seconds of those alone that fit."""
        count = len(HEADINGS) if self.fits else len(HEADINGS) - 1
        rows = [
            (
                row.task, row.name, f"{row.chunk:,}", f"{row.runs:,}", f"{row.steps:,}",
                shown_bytes(row.held_bytes), shown_bytes(row.temporary_bytes),
                "" if row.reported_bytes is None else shown_bytes(row.reported_bytes), shown_number(row.flops).strip(),
                shown_bytes(row.moved_bytes), shown_bytes(row.sent_bytes), shown_seconds(row.seconds),
            )[:count]
            for row in self.passes
        ]  # fmt: skip
        title = f"Passes: memory on a device; FLOP, traffic{' and seconds' if self.fits else ''} for a candidate"
        return Table(HEADINGS[:count], rows, range(2, count), folded=range(count)).terminal(title)


# Keys by which an output of `plan --json` is recognised.
KEYS = ("target", "fits", "passes")
# The headings of the passes' table; docs/accelerators.md says what each column holds.
HEADINGS = (
    "task", "pass", "candidates", "runs", "steps", "held", "temporaries", "compiler says", "FLOP", "moved", "exchanged",
    "seconds",
)  # fmt: skip
TIMES = ("part", "seconds", "arithmetic", "merging", "weights", "between devices", "link", "disk", "bound by")


def format_advice(advice: Sequence[str]) -> str:
    return f"what would make it fit: {', or '.join(advice)}"


def shown_number(value: float) -> str:
    """A number with three digits and an SI prefix, ready for its unit: `1.23 T`."""
    if math.isnan(value):
        return "unknown "
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def shown_bytes(value: float) -> str:
    return f"{shown_number(value)}B"


def shown_seconds(value: float) -> str:
    if math.isnan(value):
        return "unknown"
    if value < 60:
        return f"{value:.3g} s"
    if value < 3600:
        return f"{value / 60:.1f} minutes"
    return f"{value / 3600:.1f} hours" if value < 3 * DAY else f"{value / DAY:,.1f} days"
