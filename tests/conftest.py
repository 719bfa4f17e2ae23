"""What every test shares: a CPU unless told otherwise, a cache folder of the suite's own, no network."""

import os
from pathlib import Path

# Before anything imports JAX or transformers. A user's own JAX_PLATFORMS is kept.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What the program caches (compiled programs, the demo family) stays out of the user's own cache.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "xdg")

import pytest
from helpers import Family, build_family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base and two light fine-tunes of it, float32, tied, with one tokenizer and a task file. Read only."""
    return build_family(tmp_path_factory.mktemp("family"))
