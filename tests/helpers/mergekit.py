"""Merges by mergekit, and models that are to be the same."""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from helpers.models import state


def merge_by_mergekit(document: dict[str, Any], out: Path, folder: Path | None = None, **options: Any) -> Path:
    """mergekit's merge of a recipe, whose relative names start in `folder`; options are those of `MergeOptions`."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    # Layers that are repeated are only written twice where tensors are cloned. The card would ask the hub for names.
    settings = MergeOptions(**{"quiet": True, "clone_tensors": True, "write_model_card": False} | options)
    with contextlib.chdir(folder or Path.cwd()), contextlib.redirect_stderr(io.StringIO()):
        # What it keeps open goes by names that other tests have as well.
        LoaderCache.loaders.clear()
        run_merge(MergeConfiguration.model_validate(document), str(out), settings)
        LoaderCache.loaders.clear()
    return out


def merge_files_by_mergekit(document: dict[str, Any], out: Path) -> Path:
    """Merge like mergekit-pytorch does: tensors by name, of no architecture."""
    from mergekit.graph import Executor
    from mergekit.options import MergeOptions
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge

    config = RawPyTorchMergeConfig.model_validate(document)
    tasks = plan_flat_merge(config, str(out), False, False, MergeOptions(quiet=True))
    Executor(tasks, math_device="cpu", storage_device="cpu").execute()
    return out


def assert_same_tensors(
    found: Mapping[str, Any], expected: Mapping[str, Any], rtol: float = 0.0, atol: float = 0.0, scaled: float = 0.0
) -> None:
    """The same names, and values equal to within `rtol`, `atol` and a share `scaled` of each tensor's largest value."""
    assert set(found) == set(expected)
    for name, values in expected.items():
        within = atol + scaled * float(np.abs(values).max(initial=0.0)) if scaled else atol
        assert np.shape(found[name]) == np.shape(values), name
        np.testing.assert_allclose(found[name], values, rtol=rtol, atol=within, err_msg=name)


def assert_same_weights(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """The same tensors in two folders, to within a share of each tensor's largest value."""
    assert_same_tensors(state(found), state(expected), rtol=tolerance, scaled=tolerance)
