"""The place of a search's models: on the devices, in the host's memory, or in their files."""

from typing import Literal

from evojax_merge.errors import InputError
from evojax_merge.evaluation.memory import available_memory
from evojax_merge.evaluation.targets import Target, live_target

BankPlace = Literal["device", "host", "disk"]
# The share of the memory that the models and one candidate may take together where they are on the devices.
DEVICE_SHARE, HOST_SHARE = 0.9, 0.9


def bank_place(
    where: str, setting: BankPlace | Literal["auto"], target: Target, bank_bytes: int, model_bytes: int, shards: int
) -> BankPlace:
    """The place that a config's `evaluation.bank` means. bank_bytes: of all models; model_bytes: of one
    candidate, which must have room beside them to generate; shards: the number of devices that share the models. Raises
    InputError where they are to be in the memory of a host that is too small."""
    is_here, host = target == live_target(), available_memory()
    if setting == "host" and is_here and bank_bytes > host:
        raise InputError(
            f"{where}: evaluation.bank", f"host: the models take {bank_bytes / 1e9:,.1f} GB, and {host / 1e9:,.1f} GB "
            "of the host's memory are available; take disk, which reads them from their files",
        )  # fmt: skip
    if setting != "auto":
        return setting
    # A CPU's devices hold their copies in the same memory.
    copies = 1 if target.is_accelerator else target.devices_per_host
    if (bank_bytes + model_bytes) * copies <= DEVICE_SHARE * target.memory * shards:
        return "device"
    if target.is_accelerator and (not is_here or bank_bytes <= HOST_SHARE * host):
        return "host"
    return "disk"
