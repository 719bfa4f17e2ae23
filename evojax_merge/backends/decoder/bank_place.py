"""The place of a search's models: on the devices, in the host's memory, or in their files."""

from dataclasses import dataclass
from typing import Literal

from evojax_merge.errors import InputError
from evojax_merge.evaluation.memory import available_memory, format_bytes
from evojax_merge.evaluation.targets import Target, live_target

BankPlace = Literal["device", "host", "disk"]
# The share of the memory that the models and one candidate may take together where they are on the devices.
DEVICE_SHARE, HOST_SHARE = 0.9, 0.9


@dataclass(frozen=True)
class Room:
    """The bytes that a search needs. on_device: of the models and one candidate, which must have room beside them to
    generate, where they are on the devices; beside: of what is in the host's memory then; on_host: where they are in
    the host's memory."""

    on_device: int
    beside: int
    on_host: int


def bank_place(where: str, setting: BankPlace | Literal["auto"], target: Target, room: Room, shards: int) -> BankPlace:
    """The place that a config's `evaluation.bank` means. shards: the number of devices that share the models. Raises
    InputError where they are to be in the memory of a host that is too small."""
    is_here, host = target == live_target(), available_memory()
    needed = {"device": room.beside, "host": room.on_host}.get(setting, 0)
    if is_here and needed > host:
        raise InputError(
            f"{where}: evaluation.bank", f"{setting}: the models take {format_bytes(needed)} of the host's memory, and "
            f"{format_bytes(host)} are available; take disk, which leaves them in files",
        )  # fmt: skip
    if setting != "auto":
        return setting
    # A CPU's devices hold their copies in the same memory.
    copies = 1 if target.is_accelerator else target.devices_per_host
    beside = 0 if target.is_accelerator else room.beside
    has_room = not is_here or room.beside <= HOST_SHARE * host
    if has_room and room.on_device * copies + beside <= DEVICE_SHARE * target.memory * shards:
        return "device"
    if target.is_accelerator and (not is_here or room.on_host <= HOST_SHARE * host):
        return "host"
    return "disk"
