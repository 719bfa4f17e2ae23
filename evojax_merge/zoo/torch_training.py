"""Training of small modules of torch, for families of the zoo."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.zoo.tiny_llama import Progress

# The share of the steps in which the learning rate rises.
WARMUP = 0.2


@contextmanager
def seeded_torch(where: object, seed: int) -> Iterator[Any]:
    """torch, whose random numbers are those of a seed inside, and go on as before outside. Raises InputError without
    torch; where: who asks, in messages."""
    try:
        import torch
    except ImportError:
        raise InputError(where, "needs PyTorch: pip install 'evojax-merge[torch]'") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield torch


def one_cycle(weights: list[Any], steps: int, rate: float) -> tuple[Any, Any]:
    """AdamW, whose rate rises to `rate` and falls to 0."""
    import torch

    optimizer = torch.optim.AdamW(weights, lr=rate)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=WARMUP)


def loss_of_outputs(module: Any, **inputs: Any) -> Any:
    """The loss that modules of transformers compute."""
    return module(**inputs).loss


def train(
    module: Any,
    batch: Callable[[], dict[str, Any]],
    steps: int,
    rate: float,
    report: Callable[[int, float], None],
    loss: Callable[..., Any] = loss_of_outputs,
    optimiser: Callable[[list[Any], int, float], tuple[Any, Any]] = one_cycle,
) -> Any:
    """A trained copy of a module, whose parameters that require no gradient stay as they are.

    batch: the inputs of a step; loss: (module, **inputs) -> the mean loss; report: receives the steps since the last
    call, and the loss; optimiser: (parameters, steps, rate) -> the optimiser and its schedule.
    """
    module = copy.deepcopy(module).train()
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer, schedule = optimiser(weights, steps, rate)
    for _ in range(steps):
        value = loss(module, **batch())
        value.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report(1, float(value.detach()))
    return module.eval()


def train_experts(
    models: Sequence[str], fresh: Any, parts: Sequence[Any], steps: Sequence[int], rates: Sequence[float],
    seed: Sequence[int], batches: Callable[[np.random.Generator, Any], Callable[[], dict[str, Any]]],
    save: Callable[[Any, str], None], progress: Progress, loss: Callable[..., Any] = loss_of_outputs,
) -> None:  # fmt: skip
    """Train a base, the first of the models, from `fresh` weights on the first part of the data, and each other model
    from the base on a part of its own. batches: (random numbers, part) -> the function that draws a step's inputs;
    save: (module, the model's name) writes a trained model."""
    start = fresh
    for number, (name, part, count, rate) in enumerate(zip(models, parts, steps, rates, strict=True)):
        draw = batches(np.random.default_rng([*seed, *name.encode()]), part)
        module = train(start, draw, count, rate, partial(progress, name), loss)
        save(module, name)
        start = module if number == 0 else start
