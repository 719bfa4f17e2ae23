"""Candidates whose models are on the devices, on the host, or in files."""

from typing import Any

from evojax_merge.backends.decoder.bank_place import BankPlace
from evojax_merge.backends.decoder.kinds.kind import Candidates
from evojax_merge.backends.decoder.kinds.layer_path import PathCandidates, StreamedPaths
from evojax_merge.backends.decoder.kinds.member import PoolCandidates, StreamedPool
from evojax_merge.backends.decoder.kinds.merge import MergeCandidates, StreamedMerges

# The candidates whose models stay elsewhere than on the devices, by the kind of those whose models are there.
_STREAMED: dict[type, Any] = {
    MergeCandidates: StreamedMerges, PathCandidates: StreamedPaths, PoolCandidates: StreamedPool
}  # fmt: skip


def placed_at(candidates: Candidates, place: BankPlace) -> Candidates:
    """Candidates whose models are on the devices, with these at another place."""
    if place == "device":
        return candidates
    streamed: Candidates = _STREAMED[type(candidates)](**vars(candidates), place=place)
    return streamed


def is_on_devices(candidates: Candidates) -> bool:
    """Return whether the models of candidates are on the devices."""
    return type(candidates) in _STREAMED
