"""Notices and warnings that a command prints beside its results."""

from collections.abc import Callable, Iterable, Sequence

import jax

from evojax_merge.checkpoints.config_file import unread_keys
from evojax_merge.checkpoints.folder import Folder
from evojax_merge.checkpoints.json_files import shown
from evojax_merge.errors import print_warning
from evojax_merge.models.architecture import known_architecture
from evojax_merge.system.console import say

Log = Callable[[str], None]


def print_warnings(lines: Iterable[str]) -> None:
    """Print each line as a warning on stderr, once for all processes of a run."""
    if jax.process_index() == 0:
        for line in lines:
            print_warning(line)


def log_unused_config_keys(folders: Sequence[Folder], log: Log = say) -> None:
    """Log one line that names the keys of configs that no forward pass reads, if there are any."""
    keys = sorted(
        {
            key
            for folder in folders
            if known_architecture(folder.config.get("model_type"))
            for key in unread_keys(folder.config)
        }
    )
    if keys:
        more = f" and {len(keys) - 20} more" if len(keys) > 20 else ""
        code = "; custom code is never run" if "auto_map" in keys else ""
        named = ", ".join(key if key.isprintable() and len(key) < 80 else shown(key) for key in keys[:20])
        log(f"config.json: not read by a {folders[0].config['model_type']}, kept for the export: {named}{more}{code}")
