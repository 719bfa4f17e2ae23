"""Search strategies for `Study`, by their names: `strategies.cma_es(population=16)`.

Each function takes the keys of a config's `search` that belong to a strategy, and returns that section. It raises
InputError for an option that does not exist, and for a value that does not fit its option.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evojax_merge import plugins
from evojax_merge.api.python_calls import plain_data
from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import SearchConfig
from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.search.strategies.registry import find_strategy, strategy_names

OPTIONS = ("population", "sigma", "seeds", "gradient")


def __getattr__(name: str) -> Callable[..., dict[str, Any]]:
    if name.startswith("__"):
        raise AttributeError(name)
    plugins.load()
    if name not in strategy_names():
        raise AttributeError(f"there is no strategy {name!r}{did_you_mean(name, strategy_names())}")

    def strategy(**options: Any) -> dict[str, Any]:
        unknown = sorted(options.keys() - set(OPTIONS))
        if unknown:
            expected = f"expected one of {', '.join(OPTIONS)}"
            raise InputError(f"strategies.{name}", f"there is no option {unknown[0]!r}; {expected}")
        section = {"strategy": name} | {key: value for key, value in options.items() if value is not None}
        where = f"strategies.{name}"
        parse(Path(where), plain_data(where, section), SearchConfig)
        return section

    strategy.__name__ = strategy.__qualname__ = name
    strategy.__doc__ = find_strategy("strategies", name).__doc__
    keywords = [inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=None) for option in OPTIONS]
    strategy.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return strategy


def __dir__() -> list[str]:
    return sorted(strategy_names())
