"""Scores of a network's folder by its own library, in a process that cannot import this package.

    python network_scores.py FOLDER EXAMPLES.json

The file holds a `kind`, the records of its `examples`, with the absolute paths of files, and, for a module of the
user's own, `make`, the file of its function. Prints the mean score.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

PROMPTS = ("w9 {label}", "w10 w11 {label} w12")
Examples = Sequence[dict[str, Any]]


def targets(examples: Examples) -> Any:
    return torch.tensor([example["label"] for example in examples])


def log_probabilities(logits: Any, target: Any) -> float:
    return float(logits.log_softmax(-1).gather(-1, target[..., None]).mean())


def images(folder: Path, examples: Examples) -> Any:
    from PIL import Image

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return processor([Image.open(example["image"]).convert("RGB") for example in examples], return_tensors="pt")


def tokens(folder: Path, texts: list[str]) -> dict[str, Any]:
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def image_classifier(folder: Path, examples: Examples) -> float:
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    return log_probabilities(model(**images(folder, examples)).logits, targets(examples))


def text_classifier(folder: Path, examples: Examples) -> float:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = tokens(folder, [example["text"] for example in examples])
    return log_probabilities(model(**inputs).logits, targets(examples))


def sentence_transformer(folder: Path, examples: Examples) -> float:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    first, second = (model.encode([one[name] for one in examples]) for name in ("sentence1", "sentence2"))
    cosines = (first * second).sum(-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)
    return float(np.corrcoef(cosines, [one["score"] for one in examples])[0, 1])


def clip(folder: Path, examples: Examples) -> float:
    model, unit = transformers.CLIPModel.from_pretrained(folder).eval(), torch.nn.functional.normalize
    names = sorted({one["label"] for one in examples})
    seen = unit(model.get_image_features(**images(folder, examples)).pooler_output)
    means = []
    for name in names:
        texts = tokens(folder, [prompt.replace("{label}", name) for prompt in PROMPTS])
        means.append(unit(unit(model.get_text_features(**texts).pooler_output).mean(0), dim=0))
    target = torch.tensor([names.index(one["label"]) for one in examples])
    return log_probabilities(model.logit_scale.exp() * seen @ torch.stack(means).T, target)


def _text_scores(model: Any, folder: Path, texts: list[str], **inputs: Any) -> float:
    """The mean over examples of the mean log-probability of a text's tokens."""
    encoded = tokens(folder, texts)
    labels = torch.where(encoded["attention_mask"] > 0, encoded["input_ids"], -100)
    logits = model(**inputs, labels=labels).logits
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    counts = labels >= 0
    return float((torch.where(counts, chosen, 0.0).sum(-1) / counts.sum(-1)).mean())


def encoder_decoder(folder: Path, examples: Examples) -> float:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    inputs = tokens(folder, [one["text"] for one in examples])
    return _text_scores(model, folder, [one["target"] for one in examples], **inputs)


def speech(folder: Path, examples: Examples) -> float:
    from scipy.io import wavfile

    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    waves = [wavfile.read(one["audio"])[1].astype(np.float32) / 32767 for one in examples]
    heard = extractor(waves, sampling_rate=16_000, return_tensors="pt")
    return _text_scores(model, folder, [one["target"] for one in examples], input_features=heard["input_features"])


def own_module(folder: Path, examples: Examples) -> float:
    from safetensors.torch import load_model

    namespace: dict[str, Any] = {}
    exec(Path(examples[0]["make"]).read_text(), namespace)
    model = namespace["make"]().eval()
    load_model(model, folder / "model.safetensors")
    return log_probabilities(model(torch.tensor([one["pixels"] for one in examples])), targets(examples))


SCORES: dict[str, Callable[[Path, Examples], float]] = {
    "ViT": image_classifier,
    "ConvNeXt": image_classifier,
    "ResNet": image_classifier,
    "BERT": text_classifier,
    "DeBERTa": text_classifier,
    "sentence transformer": sentence_transformer,
    "CLIP": clip,
    "T5": encoder_decoder,
    "Whisper": speech,
    "own module": own_module,
}


def main() -> None:
    document = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    with torch.no_grad():
        print(SCORES[document["kind"]](Path(sys.argv[1]), document["examples"]))


if __name__ == "__main__":
    # Their import fails from here on, also by a library's own plugins.
    sys.modules["evojax_merge"] = sys.modules["merge_kernels"] = None  # type: ignore[assignment]
    main()
