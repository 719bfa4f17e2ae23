"""Merge kernels: the array mathematics of model merging.

A kernel knows no model, no file and no search. Every method is one `Method` in `METHODS` (`register` adds your own) and
works in two steps:

1. *prepare*, once per tensor, on the host: everything that does not depend on the recipe (`prepare`, `tabulate`);
2. *combine*, once per candidate, on the device: elementwise, no sort and no reduction (`look_up`, `combine`; with
   derivatives: `look_up_differentiable`, `combine_differentiable`).

`sources` are arrays of one shape, separate or stacked: the base first where `options.has_base`, then the K parents.
Sums over few parents are written out, because a reduction over a stacked axis is many times slower on a CPU; over many
they are a loop (`sum_over`), so that programs do not grow with the parents.

A file in `methods/` holds a family of methods: its mathematics, parameters and attributes.
"""

from merge_kernels import methods as methods
from merge_kernels.apply import DENSITY_STEPS, combine, grid_index, look_up, prepare, tabulate
from merge_kernels.gradients import combine_differentiable, look_up_differentiable, on_grid
from merge_kernels.low_rank import add_low_rank
from merge_kernels.method import CombineInputs, Method, Options, Parameter, Prepared, PrepareInputs, Rescale, widest
from merge_kernels.noise import SCHEME, device_uniform, draw_row_keys, host_uniform, keys_from_column
from merge_kernels.registry import METHODS, register
from merge_kernels.sums import is_looped, sum_over
from merge_kernels.tensors import combine_tensor, merge_tensor

__all__ = [
    "DENSITY_STEPS",
    "METHODS",
    "SCHEME",
    "CombineInputs",
    "Method",
    "Options",
    "Parameter",
    "PrepareInputs",
    "Prepared",
    "Rescale",
    "add_low_rank",
    "combine",
    "combine_differentiable",
    "combine_tensor",
    "device_uniform",
    "draw_row_keys",
    "grid_index",
    "host_uniform",
    "is_looped",
    "keys_from_column",
    "look_up",
    "look_up_differentiable",
    "merge_tensor",
    "on_grid",
    "prepare",
    "register",
    "sum_over",
    "tabulate",
    "widest",
]
