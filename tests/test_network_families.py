"""The zoo's families of networks: what their files hold, and when they are trained."""

from pathlib import Path

import numpy as np
import pytest
import transformers
from helpers.files import read_lines
from PIL import Image

from evojax_merge import zoo
from evojax_merge.errors import InputError
from evojax_merge.zoo import ddpm, t5, vit
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
        records = read_lines(tmp_path / f"{file}.jsonl")
        assert [record["label"] for record in records] == part.labels.tolist() and len(records) == count
        assert np.mean([image.tobytes() in seen for image in part.images]) < 0.01
        # The models are trained on what the processor makes of the files.
        pixels = processor(Image.open(tmp_path / records[3]["image"]).convert("RGB"), return_tensors="np")
        np.testing.assert_allclose(pixels["pixel_values"][0], vit.pixel_values(part.images)[3], atol=1e-6)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (97, ("ninety seven", "quatre vingt dix sept", "sieben und neunzig")),
        (471, ("four hundred seventy one", "quatre cent soixante onze", "vier hundert ein und siebzig")),
        (300, ("three hundred", "trois cent", "drei hundert")),
        (116, ("one hundred sixteen", "cent seize", "ein hundert sechzehn")),
        (80, ("eighty", "quatre vingt", "achtzig")),
        (77, ("seventy seven", "soixante dix sept", "sieben und siebzig")),
    ],
)
def test_numbers_in_words(number: int, words: tuple[str, str, str]) -> None:
    assert tuple(" ".join(language(number)) for language in (t5.english, t5.french, t5.german)) == words


def test_no_two_numbers_have_the_same_words() -> None:
    for language in (t5.english, t5.french, t5.german):
        assert len({tuple(language(number)) for number in range(1, t5.END)}) == t5.END - 1


def test_the_translators_are_folders_of_transformers_with_numbers_that_none_was_trained_on(tmp_path: Path) -> None:
    t5.make_family(tmp_path, seed=7, steps=(1, 1, 1))
    training, *splits = t5.split_numbers(7)
    assert len(np.unique(np.concatenate([training, *splits]))) == t5.END - 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "french")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "german")
    for file, numbers in zip(zoo.FILES, splits, strict=True):
        records = read_lines(tmp_path / file)
        assert records == t5.records(numbers) and len(records) == 2 * len(numbers)
        # The models are trained on what the tokenizer makes of the files.
        inputs = tokenizer([record["text"] for record in records[::2]], padding=True, return_tensors="np")
        np.testing.assert_array_equal(inputs["input_ids"], t5.tokens(numbers, [t5.french]))
    assert model.config.vocab_size == len(tokenizer)


def test_the_image_generators_are_folders_of_diffusers_that_draw_digits_pictures(tmp_path: Path) -> None:
    from diffusers import DDIMPipeline

    ddpm.make_family(tmp_path, seed=7, plan=ddpm.Training(steps=(2, 2, 2)))
    weights = []
    for name in ddpm.MODELS:
        pipeline = DDIMPipeline.from_pretrained(tmp_path / name)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline(batch_size=2, num_inference_steps=1, output_type="np").images.shape == (2, 8, 8, 1)
        weights.append(pipeline.unet.conv_in.weight.detach())
    assert all(not np.allclose(a, b) for a, b in zip(weights, [*weights[1:], weights[0]], strict=True))
    training, _, _ = load_digit_images("digits", 7)
    assert ddpm.pixels(training.images).min() == -1 and ddpm.pixels(training.images).max() == 1


def test_a_family_is_trained_once_for_each_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[int] = []

    def make(folder: Path, seed: int, progress: object) -> None:
        made.append(seed)
        (folder / "base").mkdir()

    monkeypatch.setattr(vit, "FAMILY", zoo.Family("vit", "vit-v0", vit.MODELS, make, 1))
    resolve = zoo.resolve_reference
    assert resolve("zoo:vit/base") == resolve("zoo:vit/0/base") != resolve("zoo:vit/3/base")
    assert made == [0, 3]
    with pytest.raises(InputError, match="did you mean"):
        resolve("zoo:vit/bse")
