"""Draws docs/images/evovlm.svg: held-out questions about pictures, and what the parents and the winner of a run answer.

python docs/evovlm_figure.py runs/evovlm    # a run of configs/evovlm_tabletop.yaml
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

matplotlib.use("svg")
from matplotlib import pyplot

PICTURE = Path(__file__).resolve().parent / "images" / "evovlm.svg"
# As heldout_answers.jsonl names the models whose answers it has.
PARENT, WINNER = "japanese", "evolved task_arithmetic"
QUESTIONS = 6
RIGHT, WRONG, INK = "#2a7f3f", "#b03030", "#333333"


def main(run: Path) -> None:
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    for line in (run / "heldout_answers.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["task"] == "japanese":
            answers.setdefault(row["example"], {})[row["model"]] = row
    folder = Path(next(iter(answers)).rpartition(":")[0]).parent
    vision, processor = (
        kind.from_pretrained(folder / "vision") for kind in (AutoModelForImageTextToText, AutoProcessor)
    )

    def answer(question: str, image: Image.Image) -> str:
        inputs = processor(text=f"<image> {question}", images=image, return_tensors="pt").to(vision.dtype)
        inputs.pop("token_type_ids", None)
        written = vision.generate(**inputs, max_new_tokens=9, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return str(processor.tokenizer.decode(written, skip_special_tokens=True))

    # The letters stay letters in the file, in whatever font the reader's machine has for them.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "evovlm", "font.family": "sans-serif"})
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    figure, rows = pyplot.subplots(QUESTIONS, figsize=(10, 0.9 * QUESTIONS))
    columns = (0.95, 3.3, 4.9, 6.5)
    for axes, (example, by_model) in zip(rows, answers.items(), strict=False):
        record = json.loads((folder / "heldout.jsonl").read_text().splitlines()[int(example.rpartition(":")[2]) - 1])
        image = Image.open(folder / record["image"]).convert("RGB")
        axes.imshow(image, extent=(0, 0.8, 0, 0.8))
        axes.text(columns[0], 0.5, record["question"], color=INK, va="center", size=8)
        axes.text(columns[0], 0.25, f"({record['english_question']})", color=INK, va="center", size=7)
        stored = [by_model[model]["outputs"][0] for model in (PARENT, WINNER)]
        for left, text in zip(columns[1:], [answer(record["question"], image), *stored], strict=True):
            color = RIGHT if text == record["answer"] else WRONG
            axes.text(left, 0.4, text or "(nothing)", color=color, va="center", size=8)
        axes.set(xlim=(0, columns[-1] + 1.4), ylim=(0, 0.8), aspect="equal")
        axes.axis("off")
    for left, title in zip(columns, ("question", "vision", "japanese", "evolved merge"), strict=True):
        rows[0].text(left, 0.95, title, color=INK, size=9, weight="bold")
    figure.savefig(PICTURE, metadata={"Date": None}, bbox_inches="tight")
    print(f"wrote {PICTURE} ({PICTURE.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
