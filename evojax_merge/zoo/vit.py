"""Two image classifiers of one base: vision transformers (transformers' ViTForImageClassification) that read digits.

The `base` sees scikit-learn's handwritten digits for a moment. One copy is then fine-tuned on the digits 0 to 4, `low`,
another on 5 to 9, `high`, and each forgets the other five. `high` is trained for longer and at a higher rate, as
fine-tunes of different people are, so that it drowns `low` where both count alike. The task of a merge is all ten. It
is the setting of adaptive merging (Yang et al., arXiv 2310.02575) at the size of a toy.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.zoo import FILES, Family, save_records
from evojax_merge.zoo.digit_images import HIGH, LOW, DigitImages, load_digit_images
from evojax_merge.zoo.tiny_llama import Progress
from evojax_merge.zoo.torch_training import seeded_torch, train_experts

EXPERTS = {"low": LOW, "high": HIGH}
MODELS = ("base", *EXPERTS)
# The steps of training of each model, and their rates.
STEPS, RATES = (25, 100, 200), (1e-3, 5e-4, 1e-3)
BATCH, SIDE = 64, 8
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": SIDE,
    "patch_size": 4, "num_labels": 10, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": SIDE, "width": SIDE},
    "do_rescale": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


def grey(images: np.ndarray) -> np.ndarray:
    """uint8[N, 8, 8]: the images as files hold them."""
    return np.round(images * (255 / 16)).astype(np.uint8)


def pixel_values(images: np.ndarray) -> np.ndarray:
    """float32[N, 3, 8, 8]: the images as the image processor prepares them."""
    pixels = grey(images).astype(np.float32) / 127.5 - 1
    return np.repeat(pixels[:, None], 3, axis=1)


def save_images(folder: Path, file: str, digits: DigitImages) -> None:
    """Write images below `folder`/images, and `folder`/`file` with their paths and labels."""
    import PIL.Image

    name = file.removesuffix(".jsonl")
    (folder / "images" / name).mkdir(parents=True)
    images = [f"images/{name}/{number:03}.png" for number in range(len(digits))]
    for image, pixels in zip(images, grey(digits.images), strict=True):
        PIL.Image.fromarray(pixels).save(folder / image)
    records = zip(images, digits.labels.tolist(), strict=True)
    save_records(folder / file, [{"image": image, "label": label} for image, label in records])


def make_family(
    folder: Path,
    seed: int,
    progress: Progress = lambda name, steps, loss: None,
    steps: Sequence[int] = STEPS,
    rates: Sequence[float] = RATES,
    experts: Mapping[str, Sequence[int]] = EXPERTS,
) -> None:
    """Train a family into an empty folder. steps, rates: of the base and of each expert; experts: their digits."""
    training, *splits = load_digit_images("zoo:vit", seed)
    for file, split in zip(FILES, splits, strict=True):
        save_images(folder, file, split)
    with seeded_torch("zoo:vit", seed) as torch:
        import transformers

        def batches(rng: np.random.Generator, digits: DigitImages) -> Callable[[], dict[str, Any]]:
            pixels, labels = torch.tensor(pixel_values(digits.images)), torch.tensor(digits.labels)

            def draw() -> dict[str, Any]:
                rows = torch.tensor(rng.integers(0, len(digits), BATCH))
                return {"pixel_values": pixels[rows], "labels": labels[rows]}

            return draw

        def save(module: Any, name: str) -> None:
            module.save_pretrained(folder / name)
            (folder / name / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR), encoding="utf-8")

        fresh = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES))
        parts = (training, *(training[np.isin(training.labels, digits)] for digits in experts.values()))
        train_experts(("base", *experts), fresh, parts, steps, rates, (seed, 2), batches, save, progress)


FAMILY = Family("vit", "vit-v2", MODELS, make_family, sum(STEPS))
