"""Evolutionary model merging as one program on the accelerator.

Importing this package imports neither JAX nor transformers; its rooms do, where they need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evojax_merge.errors import Failed, InputError
from evojax_merge.torch_note import drop_in_our_imports
from evojax_merge.version import __version__

if TYPE_CHECKING:
    from evojax_merge import strategies, tasks
    from evojax_merge.api import (
        Evaluator,
        evaluate,
        evolve,
        load_bank,
        merge,
        register_architecture,
        register_backend,
        register_method,
        register_strategy,
        register_task,
    )
    from evojax_merge.backends.function.opening import FunctionFactory
    from evojax_merge.evaluation.scores import Scores
    from evojax_merge.pytrees import host_callback, search_pytrees
    from evojax_merge.search.loop import Generation
    from evojax_merge.search.strategies.evosax import EvosaxStrategy
    from evojax_merge.search.strategies.registry import StrategySettings
    from evojax_merge.study import LayerPathSpace, MergeSpace, Models, PoolSpace, Study, load_models
    from evojax_merge.tasks.arrays import ArrayTask
    from evojax_merge.trials import Run, Trial, open_run

__all__ = [
    "ArrayTask",
    "Evaluator",
    "EvosaxStrategy",
    "Failed",
    "FunctionFactory",
    "Generation",
    "InputError",
    "LayerPathSpace",
    "MergeSpace",
    "Models",
    "PoolSpace",
    "Run",
    "Scores",
    "StrategySettings",
    "Study",
    "Trial",
    "__version__",
    "evaluate",
    "evolve",
    "host_callback",
    "load_bank",
    "load_models",
    "merge",
    "open_run",
    "register_architecture",
    "register_backend",
    "register_method",
    "register_strategy",
    "register_task",
    "search_pytrees",
    "strategies",
    "tasks",
]

# Where the names that need more than this file come from, when they are first asked for.
_HOMES = {
    "Evaluator": "api",
    "evaluate": "api",
    "evolve": "api",
    "load_bank": "api",
    "merge": "api",
    "register_architecture": "api",
    "register_backend": "api",
    "register_method": "api",
    "register_strategy": "api",
    "register_task": "api",
    "host_callback": "pytrees",
    "search_pytrees": "pytrees",
    "Generation": "search.loop",
    "Scores": "evaluation.scores",
    "EvosaxStrategy": "search.strategies.evosax",
    "StrategySettings": "search.strategies.registry",
    "Run": "trials",
    "ArrayTask": "tasks.arrays",
    "FunctionFactory": "backends.function.opening",
    "open_run": "trials",
    "Trial": "trials",
    "LayerPathSpace": "study",
    "MergeSpace": "study",
    "Models": "study",
    "PoolSpace": "study",
    "Study": "study",
    "load_models": "study",
}
# Modules that are part of the public API.
_MODULES = ("strategies", "tasks")

drop_in_our_imports()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
