"""The kinds of candidates over language models, a module each: it holds all code that depends on the kind. Beside its
class of `kind.Candidates` a module has

- `methods_of(where, config)`: the merge methods that it needs (none: it takes layers as they are, of models of any
  depth), and `open_candidates(opened)`; both raise InputError for a config that cannot be searched;
- `TAKES_BASE`: whether its candidates have weights of the base though it needs no method; all models have one depth
  then;
- `MERGES_RECIPES`: whether `evojax-merge merge` or `moe` makes its candidates of their recipes; otherwise `export`
  writes them by `Candidates.export`;
- `resolved(config, base, parents)`: its key of the config as a run folder keeps it, with the models by their absolute
  paths, the parents in their order;
- `named_space(where, config, decoder)`: the space of a config whose genes have names (`named_values`), for tables of a
  run; the constant None where genes have none.

`Config.kinds` says by which key a config asks for a kind.
"""

from importlib import import_module
from typing import Any

from evojax_merge.config.search_config import Config


def kind_module(kind: str) -> Any:
    """The module of a kind of candidates."""
    return import_module(f"{__name__}.{kind}")


def kind_of(config: Config) -> Any:
    """The module of the kind of candidates that a config asks for."""
    return kind_module(config.kind)
