"""A merge method of one's own: define it, register it, use it in a recipe.

    python configs/own_method.py            # merges the demo family, which comes with the package
    evojax-merge merge configs/own_method.yaml runs/own_method --plugin configs/own_method.py

A search takes it as well, where its config says `plugins: [own_method.py]` and `space: {method: agreement}`;
kernels/README.md says more, and docs/guides/plugins.md how a package registers it for the commands.
"""

from pathlib import Path

import jax.numpy as jnp
from merge_kernels import Method, Options, Parameter

import evojax_merge as em


def combine(options, inputs):
    """b + lambda * sum_k w_k d_k where all the deltas d_k = x_k - b have one sign, and b elsewhere.

    inputs.sources: the base and the K parents, arrays of one shape; inputs.parameters: weight float32[K], lambda
    float32[]. JAX traces the function; the result is float32.
    """
    base, *parents = (x.astype(jnp.float32) for x in inputs.sources)
    parameters = inputs.parameters
    deltas = [x - base for x in parents]
    agree = jnp.abs(sum(jnp.sign(delta) for delta in deltas)) == len(deltas)
    weighted = sum(weight * delta for weight, delta in zip(parameters["weight"], deltas, strict=True))
    return base + jnp.where(agree, parameters["lambda"] * weighted, 0.0)


AGREEMENT = Method(
    "agreement",
    (
        # default None: required in a recipe; a search starts at 1/K. low and high: the bounds of a search by default.
        Parameter("weight", per_parent=True, default=None, low=0.0, high=1.0),
        Parameter("lambda", per_parent=False, default=1.0, low=0.0, high=2.0),
    ),
    base="required",
    combine=combine,
    options=Options(has_base=True),
)

em.register_method(AGREEMENT)

if __name__ == "__main__":
    out = em.merge(Path(__file__).with_suffix(".yaml"), "runs/own_method", overwrite=True)
    print(f"wrote {out}")
