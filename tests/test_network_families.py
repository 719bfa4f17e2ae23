"""The zoo's families of networks: what their files hold, and when they are trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

from evojax_merge import zoo
from evojax_merge.errors import InputError
from evojax_merge.zoo import vit
from evojax_merge.zoo.digit_images import load_digit_images


def test_the_image_classifiers_are_folders_of_transformers_with_images_and_labels(tmp_path: Path) -> None:
    vit.make_family(tmp_path, seed=7, steps=(10, 10, 10))
    weights = [
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path / name).classifier.weight.detach()
        for name in vit.MODELS
    ]
    assert all(not np.allclose(a, b) for a, b in zip(weights, [*weights[1:], weights[0]], strict=True))
    training, search, heldout = load_digit_images("digits", 7)
    seen = {image.tobytes() for image in training.images}
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "base")
    for file, part, count in (("search", search, 500), ("heldout", heldout, 497)):
        records = [json.loads(line) for line in (tmp_path / f"{file}.jsonl").read_text().splitlines()]
        assert [record["label"] for record in records] == part.labels.tolist() and len(records) == count
        assert np.mean([image.tobytes() in seen for image in part.images]) < 0.01
        # The models are trained on what the processor makes of the files.
        pixels = processor(Image.open(tmp_path / records[3]["image"]).convert("RGB"), return_tensors="np")
        np.testing.assert_allclose(pixels["pixel_values"][0], vit.pixel_values(part.images)[3], atol=1e-6)


def test_a_family_is_trained_once_for_each_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[int] = []

    def make(folder: Path, seed: int, progress: object) -> None:
        made.append(seed)
        (folder / "base").mkdir()

    monkeypatch.setattr(vit, "FAMILY", zoo.TrainedFamily("vit", "vit-v0", vit.MODELS, 1, make))
    resolve = zoo.resolve_reference
    assert resolve("zoo:vit/base") == resolve("zoo:vit/0/base") != resolve("zoo:vit/3/base")
    assert made == [0, 3]
    with pytest.raises(InputError, match="did you mean"):
        resolve("zoo:vit/bse")
