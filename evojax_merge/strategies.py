"""Search strategies for `Study`, by their names: `strategies.cma_es(population=16)`.

Each function takes the keys of a config's `search` that belong to a strategy, and returns that section.
"""

from collections.abc import Callable, Mapping
from typing import Any

from evojax_merge import plugins
from evojax_merge.errors import did_you_mean
from evojax_merge.search.strategies.registry import find_strategy, strategy_names


def __getattr__(name: str) -> Callable[..., dict[str, Any]]:
    if name.startswith("__"):
        raise AttributeError(name)
    plugins.load()
    if name not in strategy_names():
        raise AttributeError(f"there is no strategy {name!r}{did_you_mean(name, strategy_names())}")

    def section(
        *,
        population: int | None = None,
        sigma: float | None = None,
        seeds: list[str] | None = None,
        gradient: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        given = {"population": population, "sigma": sigma, "seeds": seeds, "gradient": gradient}
        return {"strategy": name} | {key: value for key, value in given.items() if value is not None}

    # A wrong keyword's message, and `help`, show these.
    section.__name__ = section.__qualname__ = name
    section.__doc__ = find_strategy("strategies", name).__doc__
    return section


def __dir__() -> list[str]:
    return sorted(strategy_names())
