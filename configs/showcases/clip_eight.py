"""Writes the models, the pictures and the config of a search over CLIP and its eight experts into a folder.

    pip install 'evojax-merge[torch]' datasets
    python configs/showcases/clip_eight.py clip8
    evojax-merge plan clip8/search.yaml --target h100
    evojax-merge search clip8/search.yaml --out runs/clip8

The experts are vision encoders of openai/clip-vit-base-patch32, each fine-tuned on one data set; they are written as
whole CLIPs, with the base's text encoder. Wanted is a merge that knows all eight data sets. The page
docs/showcases/clip-eight.md has the published figures and room for yours.

versions.json in the folder holds the commits of all models and data sets: with `--versions clip8/versions.json` another
folder is made of the same.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

BASE, EXPERT = "openai/clip-vit-base-patch32", "tanganke/clip-vit-base-patch32_{}"


class DataSet(NamedTuple):
    """A data set of the hub, its splits for training and test, and CLIP's text for a class of it."""

    data: str
    prompt: str
    config: str | None = None
    field: str = "label"


DATA_SETS = {
    "sun397": DataSet("tanganke/sun397", "a photo of a {label}."),
    "stanford-cars": DataSet("tanganke/stanford_cars", "a photo of a {label}."),
    "resisc45": DataSet("tanganke/resisc45", "satellite imagery of {label}."),
    "eurosat": DataSet("tanganke/eurosat", "a centered satellite photo of {label}."),
    "svhn": DataSet("ufldl-stanford/svhn", 'a photo of the number: "{label}".', "cropped_digits"),
    "gtsrb": DataSet("tanganke/gtsrb", 'a zoomed in photo of a "{label}" traffic sign.'),
    "mnist": DataSet("ylecun/mnist", 'a photo of the number: "{label}".'),
    "dtd": DataSet("tanganke/dtd", "a photo of a {label} texture."),
}


def document(classes: Mapping[str, Sequence[str]], by_labels: bool = False) -> dict[str, Any]:
    """The search's config. classes: the names of each data set's classes; by_labels: the fitness is the log-probability
    of the right class, in place of minus the entropy over the classes."""
    tasks: list[dict[str, Any]] = []
    for name, labels in classes.items():
        prompt = DATA_SETS[name].prompt
        files = {"file": f"pictures/{name}/search.jsonl", "heldout": f"pictures/{name}/heldout.jsonl"}
        by_class = {"kind": "classification", "prompts": [prompt], "classes": list(labels)}
        fitness = {"kind": "entropy", "choices": [prompt.replace("{label}", label) for label in labels]}
        if by_labels:
            fitness = by_class | {"metric": "log_probability"}
        # The share of right answers has weight 0: it is only shown in the held-out table.
        tasks += [{"name": name} | files | fitness, {"name": f"{name}_right", "weight": 0} | files | by_class]
    return {
        "backend": "torch",
        "base": "base",
        "parents": list(classes),
        # A weight of each expert for each layer, which begins at that of task arithmetic, as in AdaMerging.
        "space": {
            "method": "task_arithmetic", "layers_per_group": 1,
            "parameters": {"weight": {"low": 0.0, "high": 1.0, "start": 0.3}},
        },
        "tasks": tasks,
        "search": {"strategy": "gradient", "generations": 100, "gradient": {"learning_rate": 0.05, "minibatches": 4}},
        "seed": 0,
    }  # fmt: skip


def commits() -> dict[str, str]:
    """The newest commit of each model and data set on the hub."""
    from huggingface_hub import HfApi

    models = {name: HfApi().model_info(name).sha for name in (BASE, *map(EXPERT.format, DATA_SETS))}
    return models | {source.data: HfApi().dataset_info(source.data).sha for source in DATA_SETS.values()}


def write_models(folder: Path, versions: Mapping[str, str]) -> None:
    """The base, and each expert as a whole CLIP."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPVisionModel

    model = CLIPModel.from_pretrained(BASE, revision=versions[BASE])
    beside = [kind.from_pretrained(BASE, revision=versions[BASE]) for kind in (AutoTokenizer, AutoImageProcessor)]
    for name in ("base", *DATA_SETS):
        if name != "base":
            expert = EXPERT.format(name)
            tensors = CLIPVisionModel.from_pretrained(expert, revision=versions[expert]).state_dict()
            # An encoder's tensors have the whole model's names, or begin behind `vision_model.`.
            tensors = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in tensors.items()}
            model.load_state_dict(model.state_dict() | tensors)
        model.save_pretrained(folder / name)
        for saved in beside:
            saved.save_pretrained(folder / name)


def write_pictures(
    folder: Path, rows: Iterable[Mapping[str, Any]], names: Sequence[str], file: str, field: str
) -> None:
    """Rows with an `image` and the number of a label as pictures, and a file of JSON lines with their names."""
    pictures = folder / Path(file).stem
    pictures.mkdir(parents=True)
    lines = []
    for number, row in enumerate(rows):
        picture = pictures / f"{number:05}.png"
        row["image"].convert("RGB").save(picture)
        lines.append(json.dumps({"image": f"{pictures.name}/{picture.name}", "label": names[row[field]]}) + "\n")
    (folder / file).write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="does not exist yet")
    parser.add_argument("--search", type=int, default=256, help="images of each data set that the search sees")
    parser.add_argument("--heldout", type=int, default=1000, help="images of each data set's test that it does not see")
    parser.add_argument("--labels", action="store_true", help="search by right answers; default: by entropy")
    parser.add_argument("--versions", type=Path, help="the commits of models and data sets; default: the newest")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists; remove it, or name another folder")
    from datasets import load_dataset  # type: ignore[import-not-found]

    arguments.folder.mkdir(parents=True)
    versions = commits() if arguments.versions is None else json.loads(arguments.versions.read_text())
    (arguments.folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    write_models(arguments.folder, versions)
    classes = {}
    for name, source in DATA_SETS.items():
        for file, split, count in (("search", "train", arguments.search), ("heldout", "test", arguments.heldout)):
            rows = load_dataset(source.data, source.config, split=split, revision=versions[source.data])
            rows = rows.shuffle(seed=0)
            names = classes[name] = [label.replace("_", " ") for label in rows.features[source.field].names]
            rows = rows.select(range(min(count, len(rows))))
            write_pictures(arguments.folder / "pictures" / name, rows, names, f"{file}.jsonl", source.field)
            print(f"{name}: {len(rows)} images of {source.data}, {split}", flush=True)
    (arguments.folder / "search.yaml").write_text(
        yaml.safe_dump(document(classes, arguments.labels), sort_keys=False, allow_unicode=True)
    )


if __name__ == "__main__":
    main()
