"""Two image generators of one base: diffusers pipelines (DDIM) that draw digits of 8 x 8 pixels.

The `base` learns scikit-learn's handwritten digits. One copy is then fine-tuned on the digits 0 to 4, `low`, another on
5 to 9, `high`, for longer and at a higher rate, and each forgets to draw the other five. The task of a merge is to draw
all ten. It is the setting of EvoSDXL-JP, generators of one architecture that draw different things, at the size of a
toy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.zoo import Family
from evojax_merge.zoo.digit_images import HIGH, LOW, DigitImages, load_digit_images
from evojax_merge.zoo.tiny_llama import Progress
from evojax_merge.zoo.torch_training import seeded_torch, train_experts

MODELS = ("base", "low", "high")


@dataclass(frozen=True)
class Training:
    """steps: of each model; rates: their highest learning rates; batch: the images of a step."""

    steps: tuple[int, int, int] = (400, 300, 400)
    rates: tuple[float, float, float] = (4e-3, 2e-3, 2e-3)
    batch: int = 64


SIZES: dict[str, Any] = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4,
    "attention_head_dim": 16,
}  # fmt: skip
SCHEDULE: dict[str, Any] = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}


def pixels(images: np.ndarray) -> np.ndarray:
    """float32[N, 1, 8, 8]: the images as a generator learns them, from -1 to 1."""
    return (images[:, None] / 8 - 1).astype(np.float32)


def make_family(
    folder: Path,
    seed: int,
    progress: Progress = lambda name, steps, loss: None,
    plan: Training = Training(),
) -> None:
    """Train the family into an empty folder."""
    training, _, _ = load_digit_images("zoo:ddpm", seed)
    with seeded_torch("zoo:ddpm", seed) as torch:
        try:
            import diffusers
        except ImportError:
            raise InputError("zoo:ddpm", "needs diffusers: pip install 'evojax-merge[diffusion]'") from None
        schedule = diffusers.DDIMScheduler(**SCHEDULE)

        def loss(module: Any, images: Any, noise: Any, times: Any) -> Any:
            drawn = module(schedule.add_noise(images, noise, times), times).sample
            return (drawn - noise).square().mean()

        def batches(rng: np.random.Generator, digits: DigitImages) -> Callable[[], dict[str, Any]]:
            images = torch.tensor(pixels(digits.images))

            def draw() -> dict[str, Any]:
                chosen = images[torch.tensor(rng.integers(0, len(images), plan.batch))]
                times = torch.tensor(rng.integers(0, SCHEDULE["num_train_timesteps"], plan.batch))
                noise = torch.tensor(rng.standard_normal(chosen.shape, np.float32))
                return {"images": chosen, "noise": noise, "times": times}

            return draw

        def save(module: Any, name: str) -> None:
            diffusers.DDIMPipeline(module, schedule).save_pretrained(folder / name)

        fresh = diffusers.UNet2DModel(**SIZES)
        parts = (training, *(training[np.isin(training.labels, half)] for half in (LOW, HIGH)))
        train_experts(MODELS, fresh, parts, plan.steps, plan.rates, (seed, 3), batches, save, progress, loss)


FAMILY = Family("ddpm", "ddpm-v1", MODELS, make_family, sum(Training.steps), files=())
