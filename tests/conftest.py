"""What every test shares: a CPU unless told otherwise, a cache folder of the suite's own, no network."""

import os
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

# Before anything imports JAX or transformers. A user's own JAX_PLATFORMS is kept.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What the program caches (compiled programs, the demo family) stays out of the user's own cache.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "xdg")
# Commands that are run again and again compile nothing twice, not even what takes a moment.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest
from helpers import Family, build_family
from jax._src import compiler as xla_compiler

# Each day other kills (test_torture.py). The workers of a run take it over.
SEED = os.environ.setdefault("EVOJAX_TEST_SEED", str(date.today().toordinal()))
DEFAULT_COMPILE_OPTIONS = xla_compiler.get_compile_options

# They compile many programs that run for a moment, and take a third less time without the compiler's slow passes. All
# others, of kernels and of real models, run what users run; JAX_DISABLE_MOST_OPTIMIZATIONS=0 has these do it as well.
QUICKLY_COMPILED = {
    f"test_{name}"
    for name in (
        "adapters", "api", "architecture_seam", "architectures", "bad_input", "cards", "data_flow", "devices",
        "evaluator", "families", "fronts", "function", "generate", "gradients", "harness", "host_memory", "hostile",
        "loops", "mergekit_evolve", "mergekit_suite", "method_seam", "parent_groups", "plugins", "pool", "racing",
        "reproducible", "run_folder", "search", "stopping", "strategies", "strategy_seam", "task_seam", "tokens",
        "torture", "validation", "zoo",
    )
}  # fmt: skip
SWITCH = "JAX_DISABLE_MOST_OPTIMIZATIONS"
GIVEN = os.environ.get(SWITCH)
# Every compiled program holds some memory maps, of which Linux allows a process 65,530 by default. A test module adds
# up to 30,000.
MANY_MAPS = 20_000
# A program in one piece instead of up to 32 that are compiled side by side: the same machine code for two thirds of the
# processor time, which counts where a worker of the suite runs on each core.
PLAIN_OPTIONS = {"xla_cpu_parallel_codegen_split_count": 1}
PLAIN_FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
# XLA's older code generator for CPUs: programs compile three times as fast, and run slower than anybody would want.
# JAX takes options of the compiler for one function only, and XLA reads its flags once in a process: so what JAX asks
# for with every program is replaced.
QUICK_OPTIONS = PLAIN_OPTIONS | {"xla_cpu_use_fusion_emitters": False}
QUICK_FLAGS = f"{PLAIN_FLAGS} --xla_cpu_use_fusion_emitters=false"
FLAGS = os.environ.get("XLA_FLAGS", "")


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        session.config.get_terminal_writer().line(f"EVOJAX_TEST_SEED={SEED} repeats what is drawn at random today")


@pytest.fixture(scope="session")
def has_quick_options() -> bool:
    """Whether this XLA knows the options; where it does not, programs compile as they otherwise would."""
    try:
        jax.jit(lambda x: x + 1).lower(0.0).compile(compiler_options=QUICK_OPTIONS)
    except jax.errors.JaxRuntimeError:
        return False
    return hasattr(xla_compiler, "get_compile_options")


@pytest.fixture(scope="module", autouse=True)
def compiler(request: pytest.FixtureRequest, has_quick_options: bool) -> Iterator[None]:
    """How this module's programs are compiled, here and in the processes that it starts."""
    quickly = GIVEN or str(int(request.module.__name__ in QUICKLY_COMPILED))
    if jax.config.read("jax_disable_most_optimizations") != (quickly == "1"):
        jax.config.update("jax_disable_most_optimizations", quickly == "1")
        # Else what another module compiled would be taken.
        jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, quickly)
        if has_quick_options:
            quick = quickly == "1"
            patch.setenv("XLA_FLAGS", f"{FLAGS} {QUICK_FLAGS if quick else PLAIN_FLAGS}".strip())
            patch.setattr(
                xla_compiler, "get_compile_options", partial(compile_options, QUICK_OPTIONS if quick else PLAIN_OPTIONS)
            )
        yield
    if memory_maps() > MANY_MAPS:
        jax.clear_caches()


def memory_maps() -> int:
    """How many memory maps this process has; 0 where that is not told."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def compile_options(
    options: dict[str, Any], *arguments: Any, env_options_overrides: dict[str, Any] | None = None, **named: Any
) -> Any:
    """`jax._src.compiler.get_compile_options` with `options`, unless the program says otherwise."""
    overrides = options | (env_options_overrides or {})
    return DEFAULT_COMPILE_OPTIONS(*arguments, env_options_overrides=overrides, **named)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base and two light fine-tunes of it, float32, tied, with one tokenizer and a task file. Read only."""
    return build_family(tmp_path_factory.mktemp("family"))
