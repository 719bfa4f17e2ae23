"""Evolutionary model merging as one program on the accelerator.

Importing this package imports neither JAX nor transformers; its rooms do, where they need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evojax_merge.errors import Failed, InputError
from evojax_merge.system.without_torch import drop_in_our_imports
from evojax_merge.version import __version__

if TYPE_CHECKING:
    from evojax_merge import tasks
    from evojax_merge.api import strategies
    from evojax_merge.api.models import (
        Evaluator,
        evaluate,
        evolve,
        extract_lora,
        load_bank,
        merge,
        moe,
        register_architecture,
        register_backend,
        register_method,
        register_strategy,
        register_task,
        transplant_tokenizer,
    )
    from evojax_merge.api.spaces import LayerPathSpace, MergeSpace, MixtureSpace, Models, PoolSpace, load_models
    from evojax_merge.api.study import Study, host_callback
    from evojax_merge.api.trials import Run, Trial, open_run
    from evojax_merge.backends.function.opening import FunctionFactory
    from evojax_merge.evaluation.scores import Scores
    from evojax_merge.search.recording import Generation
    from evojax_merge.search.strategies.evosax import EvosaxStrategy
    from evojax_merge.search.strategies.registry import StrategySettings
    from evojax_merge.tasks.arrays import ArrayTask

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
    "MixtureSpace",
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
    "extract_lora",
    "host_callback",
    "load_bank",
    "load_models",
    "merge",
    "moe",
    "open_run",
    "register_architecture",
    "register_backend",
    "register_method",
    "register_strategy",
    "register_task",
    "strategies",
    "tasks",
    "transplant_tokenizer",
]

# Where the names that need more than this file come from, when they are first asked for.
_NAMES = {
    "api.models": "Evaluator evaluate evolve extract_lora load_bank merge moe register_architecture register_backend "
    "register_method register_strategy register_task transplant_tokenizer",
    "api.spaces": "LayerPathSpace MergeSpace MixtureSpace Models PoolSpace load_models",
    "api.study": "Study host_callback",
    "api.trials": "Run Trial open_run",
    "backends.function.opening": "FunctionFactory",
    "evaluation.scores": "Scores",
    "search.recording": "Generation",
    "search.strategies.evosax": "EvosaxStrategy",
    "search.strategies.registry": "StrategySettings",
    "tasks.arrays": "ArrayTask",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
# Modules that are part of the public API.
_MODULES = {"strategies": "api.strategies", "tasks": "tasks"}

drop_in_our_imports()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{_MODULES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
