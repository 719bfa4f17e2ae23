"""Measured times of this machine's devices: how many times its bound by the roofline a kind of work takes.

`bench` and every finished search add theirs to a file in the user's cache folder; plans estimate by them.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import jax
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from evojax_merge.errors import InputError
from evojax_merge.evaluation.programs import DECODE
from evojax_merge.evaluation.targets import processor_name
from evojax_merge.system.data_packages import cache_folder
from evojax_merge.system.kept_files import write_plain
from evojax_merge.system.regular_file import read_regular

# Scoring rows in one forward pass, writing text token by token, and differentiating the score.
WorkKind = Literal["scoring", "decoding", "gradient"]
# The factor of compiling is over seconds by the programs' size.
TimingKind = Literal["scoring", "decoding", "gradient", "compiling"]
# The most timings that are kept, the latest ones; and the file's size.
MAX_TIMINGS, MAX_BYTES = 200, 2**20


class Timing(BaseModel):
    """A measurement. factor: seconds of the work over its bound by the roofline; nbytes: of the models that were in
    memory, since small models take longer beside their bound; source: the command that measured; date: ISO 8601."""

    model_config = ConfigDict(frozen=True)

    device: str
    kind: TimingKind
    factor: Annotated[float, Field(ge=1e-9, le=1e9)]
    nbytes: Annotated[int, Field(gt=0, le=10**18)]
    source: Literal["bench", "search"]
    date: str


class Factor(BaseModel):
    """Seconds of a search over its bound by the roofline. source: the measurement, in words; None: nothing was
    measured."""

    model_config = ConfigDict(frozen=True)

    value: float
    source: str | None = None


# A guess.
NOT_MEASURED = Factor(value=3.0)
# Another guess.
COMPILING_NOT_MEASURED = 1.0
# The bound of functions that JAX does not trace is a measurement.
CALLED = Factor(value=1.0, source="measured here on some examples: JAX does not trace it")


def kind_of_pass(name: str) -> WorkKind:
    """The kind of work of a program by its name in plans."""
    return "decoding" if name == DECODE else "gradient" if name.endswith("gradient") else "scoring"


def timing(kind: TimingKind, factor: float, nbytes: int, source: Literal["bench", "search"]) -> Timing:
    """A measurement of this machine's devices, made now."""
    return Timing(
        device=_device(), kind=kind, factor=factor, nbytes=nbytes, source=source,
        date=datetime.now(UTC).date().isoformat(),
    )  # fmt: skip


def estimated_factor(seconds: Mapping[WorkKind, float], nbytes: int, timings: Sequence[Timing]) -> Factor:
    """The factor of work that takes `seconds` of each kind by the roofline, on models of `nbytes`: the mean, weighted
    by the seconds, of those measured with the most similar models; a kind that was not measured takes as long as
    scoring."""

    used = {
        kind: _nearest(kind, nbytes, timings) or _nearest("scoring", nbytes, timings)
        for kind, part in seconds.items() if part > 0
    }  # fmt: skip
    measured = {kind: each for kind, each in used.items() if each is not None}
    if not used or len(measured) < len(used):
        return NOT_MEASURED
    total = sum(seconds[kind] for kind in measured)
    value = sum(each.factor * seconds[kind] for kind, each in measured.items()) / total
    latest = max(measured.values(), key=lambda each: each.date)
    by = "bench" if latest.source == "bench" else "a search"
    return Factor(value=value, source=f"as {by} measured here on {latest.date}")


def compiling_factor(nbytes: int, timings: Sequence[Timing]) -> float:
    """The seconds that compiling takes over those by the programs' size, as the search with the most similar models
    took that compiled most of its programs."""
    nearest = _nearest("compiling", nbytes, timings)
    return COMPILING_NOT_MEASURED if nearest is None else nearest.factor


def _nearest(kind: TimingKind, nbytes: int, timings: Sequence[Timing]) -> Timing | None:
    of_kind = [each for each in timings if each.kind == kind]
    # Among equals the latest.
    return min(reversed(of_kind), key=lambda each: abs(math.log(each.nbytes / max(nbytes, 1))), default=None)


def read_timings() -> list[Timing]:
    """The timings of this machine's devices, the latest last; none where the file is missing or damaged."""
    return [each for each in _read() if each.device == _device()]


def record_timings(timings: Sequence[Timing]) -> None:
    """Add timings to the file. A file that cannot be written is left as it is: plans then estimate without."""
    kept = [*_read(), *timings][-MAX_TIMINGS:]
    write_plain(_file(), f"{json.dumps([each.model_dump() for each in kept], indent=1)}\n".encode())


def _read() -> list[Timing]:
    try:
        content = read_regular(_file(), "timings", MAX_BYTES)
        return TypeAdapter(list[Timing]).validate_json(content)
    except (OSError, ValidationError, InputError):
        return []


def _file() -> Path:
    return cache_folder() / "timings.json"


def _device() -> str:
    """The devices that JAX has found, in words; the processor, whose cores all of them share, where they are that."""
    devices, cores = jax.devices(), os.cpu_count()
    if devices[0].platform == "cpu":
        return f"1 x cpu: {processor_name()}, {cores} cores"
    return f"{len(devices)} x {devices[0].platform}: {devices[0].device_kind}, {cores} cores"
