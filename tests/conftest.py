"""What every test shares: a CPU unless told otherwise, a cache folder of the suite's own, no network."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports JAX or transformers. A user's own JAX_PLATFORMS is kept.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What the program caches (compiled programs, the demo family) stays out of the user's own cache.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "xdg")

import jax
import pytest
from helpers import Family, build_family

# They compile many programs that run for a moment, and take a third less time without the compiler's slow passes. All
# others, of kernels and of real models, run what users run; JAX_DISABLE_MOST_OPTIMIZATIONS=0 has these do it as well.
QUICKLY_COMPILED = {
    f"test_{name}"
    for name in (
        "architecture_seam", "architectures", "bad_input", "data_flow", "devices", "evaluator", "function", "generate",
        "harness", "hostile", "host_memory", "mergekit_evolve", "racing", "reproducible", "run_folder", "search",
        "strategy_seam", "task_seam",
        "torture",
    )
}  # fmt: skip
SWITCH = "JAX_DISABLE_MOST_OPTIMIZATIONS"
GIVEN = os.environ.get(SWITCH)


@pytest.fixture(scope="module", autouse=True)
def compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """How this module's programs are compiled, here and in the processes that it starts."""
    quickly = GIVEN or str(int(request.module.__name__ in QUICKLY_COMPILED))
    if jax.config.read("jax_disable_most_optimizations") != (quickly == "1"):
        jax.config.update("jax_disable_most_optimizations", quickly == "1")
        # Else what another module compiled would be taken.
        jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, quickly)
        yield


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base and two light fine-tunes of it, float32, tied, with one tokenizer and a task file. Read only."""
    return build_family(tmp_path_factory.mktemp("family"))
