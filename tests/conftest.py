"""What every test shares: a CPU unless told otherwise, a cache folder of the suite's own, no network."""

import gc
import os
import resource
from collections import Counter
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# The many processes that tests start would each compile the package's source.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Before anything imports JAX or transformers. A user's own JAX_PLATFORMS is kept.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A worker of the suite runs on each core: threads of their own, which wait by turning, would take it from each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What the program caches (compiled programs, the demo family) stays out of the user's own cache.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "xdg")
# Nothing is compiled twice, not even what takes a moment: neither by commands nor by the tests' own process, nor in the
# next run of the suite.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(os.environ["XDG_CACHE_HOME"]) / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Else each operation of a program that is compiled names up to a hundred frames of the stack, most of them pytest's.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import hostile
import hypothesis
import jax
import pytest
from helpers.families import Family, build_family
from helpers.sampling import ALL
from hypothesis.internal.conjecture import providers as hypothesis_providers
from jax._src import compiler as xla_compiler

from evojax_merge.judge import server
from evojax_merge.search import checkpoints

# Where a file stands in the place of their folder no scores of models are kept: a test would not compute what it tests.
SCORES = Path(os.environ["XDG_CACHE_HOME"]) / "evojax-merge" / "scores"
SCORES.parent.mkdir(parents=True, exist_ok=True)
SCORES.touch()

# Nobody waits for the end of a search that a test judges, but where a test says so.
server.FAREWELL = 0.0

# Property tests draw the same examples in every run of one commit; `make test-all` draws others each time, and prints
# what repeats a failure.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("random", deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("random" if ALL else "fixed")
if not ALL:
    # Hypothesis also tries constants from the source of all local modules imported so far. Which modules these are
    # depends on the tests that ran before on the same worker.
    hypothesis_providers.is_local_module_file = lambda path: False
DEFAULT_COMPILE_OPTIONS = xla_compiler.get_compile_options

# They compile many programs that run for a moment, and take a third less time without the compiler's slow passes. All
# others, of kernels and of real models, run what users run; JAX_DISABLE_MOST_OPTIMIZATIONS=0 has these do it as well.
QUICKLY_COMPILED = {
    f"test_{name}"
    for name in (
        "account", "adapters", "advice", "agreement", "api", "api_misuse", "architecture_seam", "architectures", "auto",
        "backend_seam", "bad_input", "bench", "calibration", "cards", "chat", "controls", "data_flow", "data_versions",
        "defaults", "devices", "diffusion", "docs", "embeddings", "entropy", "evaluator", "example_choice",
        "exported_networks", "extract_lora", "families", "fp4", "frames", "fronts", "full_disks", "function",
        "generate", "gguf_out", "goals", "gradients", "gsm", "harness", "host_memory", "hostile", "hybrid_configs",
        "hybrid_searches", "init", "inspect", "judge", "launching", "long_rows", "longrope", "loops", "m2n2_bench",
        "mergekit_evolve", "mergekit_suite", "method_seam", "mixture_space", "mixtures", "moe", "monitor", "networks",
        "notebook", "page", "parent_groups", "path_ga", "path_gradients", "plugin_files", "plugins", "pool",
        "projector", "publish", "pytrees", "qwen_vl", "racing", "recurrence", "remote", "reproduce", "reproducible",
        "resolved_configs", "run_folder", "sampling", "search", "secrets", "shared_hosts", "showcases", "spaces",
        "spectra", "stopping", "strategies", "strategies_bench", "strategy_seam", "streaming", "study", "study_spaces",
        "task_seam", "terminal", "text_decoders", "time", "tokens", "torch_backend", "torture", "transplants",
        "validation", "vision", "vision_harness", "votes", "zoo",
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


# By module, of `--cpu-seconds`: processor time of its tests, and how many they are.
CPU_SECONDS: Counter[str] = Counter()
TESTS: Counter[str] = Counter()
BEGAN = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-seconds", action="store_true", help="print each module's processor time, its processes' included"
    )


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: some tests wait for processes, browsers and clocks."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[BEGAN] = cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "teardown":
        report.user_properties.append(("cpu seconds", cpu_seconds() - item.stash[BEGAN]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        module = Path(report.nodeid.partition("::")[0]).stem
        CPU_SECONDS[module] += dict(report.user_properties)["cpu seconds"]
        TESTS[module] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("cpu_seconds"):
        terminalreporter.write_line("\n| module | tests | CPU seconds |\n| --- | ---: | ---: |")
        for module, seconds in CPU_SECONDS.most_common():
            terminalreporter.write_line(f"| {module} | {TESTS[module]:,} | {seconds:,.1f} |")
        terminalreporter.write_line(f"| all | {TESTS.total():,} | {sum(CPU_SECONDS.values()):,.1f} |")


def cpu_seconds() -> float:
    """Processor time of this process, of those that it has started, and of the server that forks commands."""
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in own) + hostile.server_seconds()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that are compiled alike come one after the other: what one has compiled serves the next."""
    items.sort(key=lambda item: item.path.stem not in QUICKLY_COMPILED)


def pytest_collection_finish(session: pytest.Session) -> None:
    """All that was imported stays: it is not looked through for garbage again, of which tracing makes little."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


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


@pytest.fixture(scope="module")
def every_generation_is_saved() -> Iterator[None]:
    """Searches of tests take milliseconds a generation, of which a search leaves out most checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "SAVING_SHARE", 1.0)
        yield


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base and two light fine-tunes of it, float32, tied, with one tokenizer and a task file. Read only."""
    return build_family(tmp_path_factory.mktemp("family"))
