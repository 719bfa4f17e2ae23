"""Merge kernels: the array mathematics of model merging. Imports JAX and NumPy, nothing else.

A kernel knows no model, no file and no search. Every method is one `Method` in `METHODS` and works in two steps:

1. *measure*, once per tensor, on the host: whatever does not depend on the recipe (`measure`, `measure_grid`);
2. *combine*, once per candidate, on the device: elementwise, no sort and no reduction (`look_up`, `combine`).

`sources` is a tuple of arrays of one shape: the base first where `method.needs_base`, then the K parents. It is
unrolled in Python (K is small and static) because a reduction over a stacked axis is many times slower on a CPU.
"""

from merge_kernels.methods import (
    DENSITY_STEPS,
    METHODS,
    Method,
    Options,
    Parameter,
    Rescale,
    combine,
    draw_scores,
    grid_index,
    look_up,
    measure,
    measure_grid,
)

__all__ = [
    "DENSITY_STEPS",
    "METHODS",
    "Method",
    "Options",
    "Parameter",
    "Rescale",
    "combine",
    "draw_scores",
    "grid_index",
    "look_up",
    "measure",
    "measure_grid",
]
