"""The weights of bred members of a pool: in the host's memory, or in files of their own.

A file's metadata hold a hash of the member's lineage, so that a run that goes on takes the members that it wrote, and
no others.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from evojax_merge.checkpoints.folder import Folder, open_folder, read_metadata
from evojax_merge.checkpoints.streamed import FileStates
from evojax_merge.checkpoints.writer import ShardWriter, TensorSpec, check_ours, write_marker
from evojax_merge.errors import InputError
from evojax_merge.schema.genealogy import Member
from evojax_merge.system.file_system import atomic_folder, flush, is_real_folder, remove_folder, remove_leftovers

# The key of the hash in a file's metadata.
LINEAGE = "evojax_merge_lineage"
_MEMBER = re.compile("member-[1-9][0-9]*")
# A tensor by its name in a file.
Tensors = Iterable[tuple[str, np.ndarray]]


class MemberStore:
    """Keeps the tensors of bred members, in the dtype that they are exported in, in the host's memory."""

    def __init__(self) -> None:
        self._members: dict[Member, dict[str, np.ndarray]] = {}

    def __contains__(self, member: Member) -> bool:
        return member in self._members

    def write(self, member: Member, tensors: Tensors) -> None:
        """Keep a member."""
        self._members[member] = dict(tensors)

    def read(self, member: Member, name: str) -> np.ndarray:
        """A tensor of a member that is kept, not to be written to."""
        return self._members[member][name]

    def drop(self, member: Member) -> None:
        """Remove a member that is kept."""
        del self._members[member]

    def check(self) -> None:
        """Raises Failed where a member is no longer as it was kept: nothing else has arrays in memory."""


@dataclass(frozen=True)
class MembersInFiles(MemberStore):
    """Members in model folders below a folder, each of them complete or not there.

    specs: a member's tensors, in the order in which `write` takes them; drawn_from: what else than its lineage a
    member depends on. Members that are there already are taken where they are the same.
    """

    folder: Path
    specs: Mapping[str, TensorSpec]
    drawn_from: str
    _opened: dict[Member, tuple[Folder, FileStates]] = field(default_factory=dict)
    _hashes: dict[Member, str] = field(default_factory=dict)

    def __contains__(self, member: Member) -> bool:
        place = self._place(member)
        if member not in self._opened and place.exists():
            try:
                check_ours(place)
                folder = open_folder(place)
                if read_metadata(folder.files[0]).get(LINEAGE) != self._lineage(member):
                    return False
            except InputError:
                return False
            self._opened[member] = folder, FileStates.of([folder])
        return member in self._opened

    def write(self, member: Member, tensors: Tensors) -> None:
        # Nobody has asked for what a run before this one left: it may be of another lineage.
        places = {self._place(opened) for opened in self._opened}
        for place in sorted(set(member_folders(self.folder)) - places):
            remove_folder(place)
        remove_leftovers(self.folder)
        place = self._place(member)
        with atomic_folder(place, overwrite=True, check=lambda: check_ours(place) if place.exists() else None) as work:
            with ShardWriter(work, dict(self.specs), metadata={LINEAGE: self._lineage(member)}) as writer:
                for name, values in tensors:
                    writer.write(name, values)
            write_marker(work)
            flush(work)
        folder = open_folder(place)
        self._opened[member] = folder, FileStates.of([folder])

    def read(self, member: Member, name: str) -> np.ndarray:
        return self._opened[member][0].entries[name].load()

    def drop(self, member: Member) -> None:
        folder, _ = self._opened.pop(member)
        folder.close()
        remove_folder(folder.path)

    def check(self) -> None:
        for _, states in self._opened.values():
            states.check()

    def _place(self, member: Member) -> Path:
        return self.folder / f"member-{member.number}"

    def _lineage(self, member: Member) -> str:
        """A hash of how the member was bred, and its ancestors."""
        for relative in member.lineage():
            if relative not in self._hashes:
                births = [relative.number, relative.method, relative.split, self.drawn_from]
                births += [(name, np.asarray(values).tolist()) for name, values in sorted(relative.parameters.items())]
                parents = [self._hashes.get(parent, parent.number) for parent in relative.parents]
                self._hashes[relative] = hashlib.sha256(repr([births, parents]).encode()).hexdigest()
        return self._hashes[member]


def member_folders(folder: Path) -> list[Path]:
    """The folders of members below a folder, but for those that hold anything else."""

    def is_ours(path: Path) -> bool:
        try:
            check_ours(path)
        except InputError:
            return False
        return True

    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if _MEMBER.fullmatch(path.name) and is_real_folder(path) and is_ours(path))
