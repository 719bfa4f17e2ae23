"""Likely causes in messages on folders that hold no model, or tensors of other names."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

# What DataParallel, torch.compile, FSDP and PEFT put before the names of a module's tensors.
WRAPPERS = re.compile(r"(?:(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|base_model\.model)\.)+")


def wrapper_hint(missing: Collection[str], extra: Iterable[str]) -> str:
    """The end of a message on tensors that a file lacks: it names the wrapper where the tensors that it has in excess
    are those inside of one. Empty for others."""
    for name in extra:
        wrapper = WRAPPERS.search(name)
        if wrapper is not None and WRAPPERS.sub("", name) in missing:
            where = "begin with" if wrapper.start() == 0 else "hold"
            return (
                f"; its names {where} {wrapper[0]!r}, which DataParallel (module.), torch.compile (_orig_mod.), FSDP "
                "(_fsdp_wrapped_module.) and PEFT (base_model.model.) add: save the state dict of the module inside"
            )
    return ""


def inner_folder(path: Path, *files: str) -> Path | None:
    """The folder inside of a folder, or of its snapshots, that holds one of these files: the last of checkpoints. None
    where there is none."""
    folders = [file.parent for place in ("*", "snapshots/*") for name in files for file in path.glob(f"{place}/{name}")]
    return max(folders, key=lambda folder: int(re.sub("[^0-9]", "", folder.name)[:18] or 0), default=None)
