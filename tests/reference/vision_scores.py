"""transformers' scores of prompts with images, without a module of this program.

    python vision_scores.py FOLDER FILE

prints the score of a model on the records of a file.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image


def load_seeing(folder: Path) -> tuple[Any, Any]:
    """(model, processor) as transformers loads them from a folder, with all tensors that the model has."""
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder)


def _inputs(processor: Any, prompt: str, images: Sequence[Path]) -> dict[str, Any]:
    opened = [Image.open(file).convert("RGB") for file in images]
    return dict(processor(text=[prompt], images=opened or None, return_tensors="pt"))


def seeing_logprobs(model: Any, processor: Any, prompt: str, images: Sequence[Path], target: str) -> np.ndarray:
    """float64[len(target)]: the log-probability of each token of a target of words after a prompt with images
    and a space."""
    inputs, wanted = _inputs(processor, prompt, images), processor.tokenizer(f" {target}")["input_ids"]
    ids = torch.cat([inputs["input_ids"], torch.tensor([wanted])], dim=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for kind in ("token_type_ids", "mm_token_type_ids"):
        if kind in inputs:
            inputs[kind] = torch.cat([inputs[kind], torch.zeros(1, len(wanted), dtype=int)], dim=1)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -len(wanted) - 1 : -1]
    return torch.log_softmax(logits.double(), -1)[range(len(wanted)), wanted].numpy()


def seeing_text(model: Any, processor: Any, prompt: str, images: Sequence[Path], new: int) -> str:
    """The greedy continuation of a prompt with images, as a text."""
    inputs = _inputs(processor, prompt, images)
    # That of the text before, which transformers would take for a text without images.
    model.model.rope_deltas = None
    with torch.no_grad():
        whole = model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=2, pad_token_id=0)
    generated = whole[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(generated, skip_special_tokens=True))


def records_score(folder: Path, file: Path) -> float:
    """The mean log-probability of a token, over the records of a file with images beside it."""
    (model, processor), means = load_seeing(folder), []
    for line in file.read_text().splitlines():
        record = json.loads(line)
        named = record.get("images", record.get("image", []))
        images = [file.parent / name for name in ([named] if isinstance(named, str) else named)]
        means.append(seeing_logprobs(model, processor, record["prompt"], images, record["target"]).mean())
    return float(np.mean(means))


if __name__ == "__main__":
    print(records_score(Path(sys.argv[1]), Path(sys.argv[2])))
