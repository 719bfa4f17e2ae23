"""Checkpoints of AutoRound (Cheng et al. 2023, arXiv:2309.05516), whose tensors are packed like those of another
format."""

from pathlib import Path

from evojax_merge.checkpoints.awq import open_awq
from evojax_merge.checkpoints.folder import Folder
from evojax_merge.checkpoints.gptq import open_gptq
from evojax_merge.checkpoints.quantised import checked_setting, quantisation

PACKINGS = {"auto_round:auto_gptq": open_gptq, "auto_round:auto_awq": open_awq}
# A module of this many bits or more is not quantised.
FLOAT_BITS = 16


def open_auto_round(path: Path, quantised: Path) -> Folder:
    """The dequantised model of an AutoRound folder, as a folder at `path`. Raises InputError for another packing, for
    numbers that are no integers, and for modules of another number of bits."""
    settings = quantisation(quantised)
    packing = checked_setting(quantised, "packing_format", settings.get("packing_format"), tuple(PACKINGS))
    checked_setting(quantised, "data_type", settings.get("data_type") or "int", ("int",))
    modules = settings.get("extra_config")
    for module, module_settings in modules.items() if isinstance(modules, dict) else ():
        bits = module_settings.get("bits", settings.get("bits")) if isinstance(module_settings, dict) else None
        if not isinstance(bits, int) or bits < FLOAT_BITS:
            checked_setting(quantised, f"extra_config.{module}.bits", bits, (settings.get("bits"),))
    return PACKINGS[packing](path, quantised)
