"""Changes that make a search fit that does not. Each is planned before it is named, the cheapest first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import inf
from types import MappingProxyType
from typing import Any

from evojax_merge.backends.backend import Backend
from evojax_merge.config.search_config import Config
from evojax_merge.errors import InputError
from evojax_merge.evaluation.planned_passes import PlanUse
from evojax_merge.evaluation.targets import Target, gpu_memory_fraction, larger_targets
from evojax_merge.problem import SearchProblem
from evojax_merge.report.plan import shown_bytes
from evojax_merge.search.protocols import gradient_generations
from evojax_merge.tasks.splits import Splits

# The most devices of other targets that share a candidate for the sake of its memory.
MOST_SHARDS = 64
# Methods without a stored number for each entry, from the one that is most like those with one.
PLAIN_METHODS = ("dare_ties", "ties")
NOTHING_FITS = "nothing that was planned makes it fit, on no known target: take smaller models or shorter examples"
EMPTY: Mapping[str, Any] = MappingProxyType({})
# Places of the models beside the config's own, and what is said of each.
STREAMED = {"host": " ({} of the host's memory; disk needs none)", "disk": ""}


@dataclass
class Adviser:
    """Plans changes of a search. prepared: its tasks as the backend prepared them."""

    problem: SearchProblem[Backend]
    prepared: Splits[list[Any]]
    # By a platform and settings: the least bytes on a device that were planned. More memory is never used for less.
    _least: dict[str, float] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        assert self.problem.config is not None
        return self.problem.config.model_copy(update={"evaluation": self.problem.facts.settings})

    def fits(self, target: Target, changes: Mapping[str, Any] = EMPTY, **evaluation: Any) -> bool:
        """Return whether the changed search fits a target, by its plan. changes: keys of the config; evaluation: keys
        of its section `evaluation`."""
        settings, reopen = self.config.evaluation.model_copy(update=evaluation), self.problem.reopen
        key = str((target.platform, settings, changes))
        if reopen is None or not target.takes_shards(settings.model) or self._least.get(key, 0) > target.memory:
            return False
        try:
            backend = reopen(self.config.model_copy(update={**changes, "evaluation": settings}), target)
            needed: float = backend.planner().sizes.bank
            if needed <= target.memory:
                is_same = settings.tokens_per_batch == self.config.evaluation.tokens_per_batch
                prepared = self.prepared if is_same else backend.prepare(self.problem.splits)
                needed = smallest_bytes(self.problem, backend, prepared)
        except InputError:
            needed = inf
        if needed > target.memory:
            self._least[key] = needed
        return needed <= target.memory

    def advice(self) -> tuple[str, ...]:
        """The changes, in words: settings on the same devices first, then losses of the search, then other devices."""
        settings = [*self._settings()] or [*self._pairs()]
        return (*settings, *self._losses(), *self._targets(() if settings else self._places()[:1])) or (NOTHING_FITS,)

    def _settings(self) -> Iterator[str]:
        """Single changes of settings, on the same devices."""
        target = self.problem.target
        fraction = 0.95 / gpu_memory_fraction() if target.platform == "gpu" else 0
        if fraction > 1 and self.fits(replace(target, memory=int(fraction * target.memory))):
            yield "the environment variable XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, for more of the GPU's memory"
        smaller = (each for each in self.problem.facts.smaller_passes if self.fits(target, **each))
        for key, value in next(smaller, {}).items():
            yield f"evaluation.{key}: {value}"
        place = next((place for place in self._places() if self.fits(target, bank=place)), None)
        if place is not None:
            yield f"evaluation.bank: {place}{self._room(place)}"
        model = next((model for model in self._shards() if self.fits(target, model=model)), None)
        if model is not None:
            yield f"evaluation.model: {model} (devices that share the models)"

    def _pairs(self) -> Iterator[str]:
        """The first pair of a place and of devices that share the models, where no single change is enough."""
        pairs = product(self._shards(), self._places())
        pair = next((pair for pair in pairs if self.fits(self.problem.target, model=pair[0], bank=pair[1])), None)
        if pair is not None:
            yield f"evaluation.model: {pair[0]} with evaluation.bank: {pair[1]}{self._room(pair[1])}"

    def _losses(self) -> Iterator[str]:
        """Changes of what is searched."""
        loaded, target, config = self.problem.facts.loaded, self.problem.target, self.config
        space, sizes = config.space, self.problem.backend.planner().sizes
        if space is not None and sizes.by_dtype["uint16"]:
            changed = {name: space.model_copy(update={"method": name}) for name in PLAIN_METHODS}
            method = next((name for name in PLAIN_METHODS if self.fits(target, {"space": changed[name]})), None)
            if method is not None:
                yield f"a method that stores no number per entry, such as space.method: {method}"
        for fewer in range(1, len(config.parents)):
            may_fit = sizes.bank * (loaded - fewer) / loaded <= target.memory < sizes.bank
            if may_fit and self.fits(target, {"parents": config.parents[:-fewer]}):
                yield f"{fewer} fewer of the {loaded} models"
                return

    def _targets(self, places: Sequence[str]) -> Iterator[str]:
        """The smallest other targets on which the search fits: one device, and several that share the models. places:
        other places of the models that may be taken with them."""
        now, targets = self.problem.facts.settings, larger_targets(self.problem.target)
        for is_shared in (False, True):
            some = [each for each in targets if (each.devices > 1) is is_shared and each.devices <= MOST_SHARDS]
            cases = ((each, place) for place in (now.bank, *places) for each in some)
            case = next((case for case in cases if self.fits(case[0], model=case[0].devices, bank=case[1])), None)
            if case is not None:
                target, place = case
                keys = [f"evaluation.model: {target.devices}"] * (target.devices != now.model)
                keys += [f"evaluation.bank: {place}"] * (place != now.bank)
                yield f"--target {target.name}" + (f" with {' and '.join(keys)}" if keys else "")

    def _places(self) -> Sequence[str]:
        """Where the models may be instead, so that they come to the devices part by part."""
        return () if self.problem.facts.streamed_bytes is None else tuple(STREAMED)

    def _room(self, place: str) -> str:
        return STREAMED[place].format(shown_bytes(self.problem.facts.streamed_bytes or 0))

    def _shards(self) -> list[int]:
        """The numbers of devices, more than now, that can share a candidate on the search's target."""
        target, model = self.problem.target, self.problem.facts.settings.model
        return [shards for shards in range(2 * model, target.devices + 1, model) if target.takes_shards(shards)]


def smallest_bytes(problem: SearchProblem[Backend], backend: Backend, prepared: Splits[list[Any]]) -> float:
    """Bytes on each device of the models and of the largest of the passes that a plan falls back to: of one candidate
    and one row, where batches become smaller by themselves. Infinity where candidates have no gradient that the search
    follows."""
    rounds, starts = gradient_generations(problem.strategy, problem.search.generations)
    if prepared.minibatches and not backend.facts.gradient_passes:
        return inf
    planner = backend.planner()
    uses: list[tuple[list[Any], int, PlanUse]] = [(tasks, starts, "gradient") for tasks in prepared.minibatches]
    if rounds < problem.search.generations:
        uses += [(tasks, problem.strategy.population, "scores") for tasks in prepared.shards]
    if backend.facts.final_compute_dtype != backend.facts.compute_dtype:
        uses.append((prepared.search, problem.strategy.population, "final"))
    passes = [each for tasks, count, use in uses for each in planner.passes(tasks, count, use, smallest=True)]
    return planner.sizes.bank + planner.jobs * max((each.needed_bytes for each in passes), default=0)
