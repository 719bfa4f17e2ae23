"""The config.yaml of a run folder can be run again: for every kind of task, every backend and every space it is read
from any folder, means the same, and is written again as it is."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.commands import run_here
from helpers.families import build_family
from helpers.files import write_json, write_lines, write_yaml
from helpers.models import even_records, randomised
from helpers.sampling import thorough
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_model
from scipy.io import wavfile
from test_backend_seam import TOY, network, register_toy
from test_exported_networks import OWN, PREPROCESSOR
from tiny_generators import make_ddpm
from toy_backend import save as save_toy
from transformers import ViTConfig, ViTForImageClassification

from evojax_merge.backends import registry
from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import Config, TaskFile
from evojax_merge.errors import InputError
from evojax_merge.problem import build_problem, read_config, resolved_document
from evojax_merge.schema.section import _path
from evojax_merge.search.run_folder import INPUTS
from evojax_merge.tasks import kinds
from evojax_merge.tasks.opening import open_task, resolved_config
from evojax_merge.zoo.references import resolve_file

# A folder's name may have all that means something in references, patterns, URLs or a shell.
NAME = "a folder, [1] + é@x #2"
FUNCTIONS = """
def score(records, values):
    return [0.0] * len(records)


def logits(logits, targets, mask):
    return logits.sum()


def margins(model, rows):
    return (rows["x"] @ model["first"]["w"])[:, 0]


def better(record, left, right):
    return "tie"
"""
TEXTS = {"file": "tasks.jsonl", "heldout": "other.jsonl", "images": "pictures"}
SHOWN = TEXTS | {"num_fewshot": 1, "fewshot_source": "shown.jsonl"}
WRITING = {"max_new_tokens": 2}
# A section for each kind of task, and for each form of its files; every key that may name a file is in one of them.
SECTIONS: dict[str, dict[str, Any]] = {
    "likelihood": {"kind": "likelihood", "file": "tasks.jsonl", "images": "pictures"},
    "multiple choice": {"kind": "multiple_choice", **TEXTS},
    "entropy": {"kind": "entropy", **SHOWN},
    "entropy of choices": {"kind": "entropy", "choices": "choices", **TEXTS},
    "entropy of a folder": {"kind": "entropy", "file": "pictures", "heldout": "other_pictures"},
    "entropy of records": {"kind": "entropy", "file": "pictures.jsonl", "images": "."},
    "agreement": {"kind": "agreement", **SHOWN, **WRITING},
    "agreement of choices": {"kind": "agreement", "choices": "choices", **TEXTS},
    "exact match, shown examples": {"kind": "exact_match", **SHOWN, **WRITING},
    "generation": {"kind": "generation", "metric": "exact_match", **SHOWN, **WRITING},
    "gsm": {"kind": "gsm", "source": "sums.jsonl", "heldout": "other_sums.jsonl", "num_fewshot": 1,
            "fewshot_source": "shown_sums.jsonl"},
    "function": {"kind": "function", "function": "world_functions.py:score", **SHOWN, **WRITING},
    "function of a module": {"kind": "function", "function": "world_functions:logits", "inputs": "logits", **TEXTS},
    "lm-eval": {"lm_eval": "mine", "include_path": "harness", "heldout": "other", "images": "pictures"},
    "human": {"kind": "human", "judge": "world_functions.py:better", **SHOWN, **WRITING},
    "human without a function": {"kind": "human", **TEXTS, **WRITING},
    "rubric": {"kind": "rubric", "judge": "one", "rubric": "{prompt} {response}", "good": "w5", "bad": "w6", **SHOWN,
               **WRITING},
    "classification of a folder": {"kind": "classification", "file": "pictures"},
    "classification of two folders": {"kind": "classification", "file": "pictures", "heldout": "other_pictures"},
    "classification of records": {"kind": "classification", "file": "pictures.jsonl", "heldout": "pictures",
                                  "images": "."},
    "classification of arrays": {"kind": "classification", "file": "arrays.npz"},
    "regression": {"kind": "regression", "file": "pictures.jsonl", "images": "."},
    "text to text": {"kind": "text_to_text", "file": "tasks.jsonl", "text": "prompt", "heldout": "other.jsonl",
                     "images": "."},
    "transcription": {"kind": "transcription", "file": "sounds.jsonl", "images": "."},
    "similarity": {"kind": "similarity", "file": "pairs.jsonl", "heldout": "other_pairs.jsonl"},
    "retrieval": {"kind": "retrieval", "file": "queries.jsonl", "corpus": "corpus.jsonl"},
    "network": {"kind": "network", "file": "arrays.npz", "function": "world_functions.py:score"},
    "network of a folder": {"kind": "network", "file": "pictures.jsonl", "images": ".",
                            "function": "world_functions:score"},
    "pictures of prompts": {"kind": "image_generation", "file": "prompts.jsonl",
                            "function": "world_functions.py:score"},
    "pictures": {"kind": "image_generation", "images": 4, "steps": 2, "function": "world_functions:score"},
    "pictures that are compared": {"kind": "human_images", "file": "prompts.jsonl",
                                   "judge": "world_functions.py:better"},
    "arrays": {"kind": "arrays", "file": "arrays.npz", "function": "world_functions.py:margins", "heldout": "more.npz"},
    "pytrees alone": {"kind": "arrays", "function": "world_functions:margins_alone"},
}  # fmt: skip
FUNCTIONS += "\n\ndef margins_alone(model):\n    return model['first']['w'].sum()\n"


def write_pictures(folder: Path, name: str) -> list[dict[str, Any]]:
    rng, records = np.random.default_rng(len(name)), []
    for label, shape in enumerate(("circle", "square")):
        for number in range(4):
            file = folder / name / shape / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(file)
            records.append({"image": str(file.relative_to(folder)), "label": label})
    return records


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and files of all kinds. Read only."""
    # A worker may make the folder again, and would have the modules of the one before.
    for name in [name for name in sys.modules if name.startswith("world_")]:
        del sys.modules[name]
    folder = tmp_path_factory.mktemp("world") / NAME
    build_family(folder)
    for old, new in (("parent0", "one"), ("parent1", "two")):
        (folder / old).rename(folder / new)
    (folder / "other.jsonl").write_bytes((folder / "tasks.jsonl").read_bytes())
    (folder / "shown.jsonl").write_bytes((folder / "tasks.jsonl").read_bytes())
    (folder / "world_functions.py").write_text(FUNCTIONS)
    for name in ("sums", "other_sums", "shown_sums"):
        sums = [{"question": f"{name}: 2 and {i}?", "answer": f"2 + {i} #### {2 + i}"} for i in range(4)]
        write_lines(folder / f"{name}.jsonl", sums)
    (folder / "harness").mkdir()
    for name in ("mine", "other"):
        # lm-eval takes a [ in the path of data for a pattern.
        data = write_lines(folder.parent / f"{name}.jsonl", even_records(8))
        write_yaml(folder / "harness" / f"{name}.yaml", {
            "task": name, "output_type": "loglikelihood", "doc_to_text": "{{prompt}}", "doc_to_target": "{{target}}",
            "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        })  # fmt: skip
    write_lines(folder / "pictures.jsonl", write_pictures(folder, "pictures"))
    write_pictures(folder, "other_pictures")
    wavfile.write(folder / "1.wav", 16_000, np.zeros(800, np.int16))
    write_lines(folder / "sounds.jsonl", [{"audio": "1.wav", "text": f"w{i}"} for i in range(4)])
    for name in ("pairs", "other_pairs"):
        pairs = [{"sentence1": f"w{i}", "sentence2": "w9", "score": i} for i in range(5, 9)]
        write_lines(folder / f"{name}.jsonl", pairs)
    write_lines(folder / "queries.jsonl", [{"query": f"w{i}", "document": f"w{i + 1}"} for i in range(5, 9)])
    write_lines(folder / "corpus.jsonl", [{"document": "w20"}])
    write_lines(folder / "prompts.jsonl", [{"prompt": f"w{i}"} for i in range(4)])
    rng = np.random.default_rng(0)
    for name in ("arrays", "more"):
        rows = rng.normal(size=(8, 16)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=rows, label=np.arange(8) % 2)
    np.savez(folder / "own.npz", input=rows, label=np.arange(8) % 2)
    for name in ("network1", "network2"):
        (folder / name).mkdir()
        save_toy(network(rng), folder / name)
    make_ddpm(folder / "draws1", 1)
    make_ddpm(folder / "draws2", 2)
    for name in ("tree", "first", "second"):
        save_file({"first.w": rng.normal(size=(16, 2)).astype(np.float32)}, folder / f"{name}.safetensors")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        id2label={0: "circle", 1: "square"}, label2id={"circle": 0, "square": 1},
    )  # fmt: skip
    for seed, name in enumerate(("shapes", "round", "edgy")):
        randomised(ViTForImageClassification(config), seed).save_pretrained(folder / name)
        write_json(folder / name / "preprocessor_config.json", PREPROCESSOR | {"size": {"height": 8, "width": 8}})
    (folder / "world_own.py").write_text(OWN)
    namespace: dict[str, Any] = {}
    exec(OWN, namespace)
    for seed in (1, 2):
        save_model(randomised(namespace["make"](), seed), str(folder / f"own{seed}.safetensors"))
    (folder / "world_factory.py").write_text("import evojax_merge as em\n\nFACTORY = em.FunctionFactory()\n")
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder that is far from the world, and a working directory that is neither."""
    (tmp_path / "run").mkdir()
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "run"


def location_keys(schema: Any) -> set[str]:
    """The keys of a section that name files or models."""

    def names_files(part: Any) -> bool:
        checked = (getattr(one, "func", None) for one in getattr(part, "__metadata__", getattr(part, "metadata", ())))
        return _path in checked or any(map(names_files, getattr(part, "__args__", ())))

    return {name for name, field in schema.model_fields.items() if names_files(field) or names_files(field.annotation)}


def test_every_kind_of_task_and_every_key_of_files_has_a_section() -> None:
    keys_written: dict[Any, set[str]] = {}
    for section in SECTIONS.values():
        kind = kinds.find_kind(section)
        assert kind is not None
        keys_written.setdefault(kind, set()).update(section)
    for kind in kinds.BUILT_IN:
        assert kind in keys_written, kind.names or kind.key
        expected = location_keys(kind.config) | ({"heldout"} if kind.source is not None else set())
        assert expected - {"heldout"} <= keys_written[kind], (kind.names, expected - keys_written[kind])
    assert set(location_keys(kinds.networks.RetrievalConfig)) >= {"file", "corpus"}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_of_a_run_opens_the_same_task_from_any_folder(name: str, world: Path, elsewhere: Path) -> None:
    def opened(path: Path) -> tuple[dict[str, Any], Any]:
        (config,) = parse(path, yaml.safe_load(path.read_text()), TaskFile).tasks
        splits = open_task("tasks[0]", config, path.parent, 7, resolve_file)
        return resolved_config(config, *splits), [(split.size, split.contents()) for split in splits]

    first = write_yaml(world / f"{name}.yaml", {"tasks": [{"name": name} | SECTIONS[name]]})
    section, contents = opened(first)
    for key in location_keys(kinds.find_kind(section).config) | {"heldout"}:  # type: ignore[union-attr]
        value = section.get(key)
        assert not isinstance(value, str) or os.path.isabs(value) or "lm_eval" in section, key
    again = write_yaml(elsewhere / "config.yaml", {"tasks": [section]})
    assert opened(again) == (section, contents)


# ---------------------------------------------------------------------------------------------------------------
# Whole configs

DECODERS: dict[str, Any] = {"base": "base", "parents": ["one", "two"], "tasks": ["likelihood"]}
TIES = {"method": "ties", "parameters": {"weight": {"low": 0.0, "high": 1.0}}}
SMALL = {"population": 3, "generations": 1}
LINEAR = {"space": {"method": "linear"}}
TREES: dict[str, Any] = {"backend": "function", "parents": ["first.safetensors", "second.safetensors"],
                         "tasks": ["arrays"], **LINEAR}  # fmt: skip
SHAPES: dict[str, Any] = {"backend": "torch", "base": "shapes", "parents": ["round", "edgy"],
                          "space": {"method": "task_arithmetic"}, "tasks": ["classification of a folder"]}  # fmt: skip
OWN_MODULES: dict[str, Any] = {"backend": "world_own.py:make", "parents": ["own1.safetensors", "own2.safetensors"],
                               "tasks": ["own arrays"], **LINEAR}  # fmt: skip
SECTIONS["own arrays"] = {"kind": "classification", "file": "own.npz"}
# A config for each backend and space, with the names of its tasks' sections.
CONFIGS: dict[str, dict[str, Any]] = {
    "decoder, space": DECODERS | {"space": TIES},
    "groups of parents": DECODERS | {"space": TIES | {"parent_groups": {"both": ["one", "t*"]}}},
    "a parent's tokenizer": DECODERS | {"space": TIES, "tokenizer_source": "one"},
    "path": DECODERS | {"base": None, "data_flow": {}, "tasks": ["likelihood", "multiple choice"]},
    "path of indicators": DECODERS | {"base": None, "data_flow": {"form": "indicator", "max_layers": 4}},
    "pool": DECODERS | {"base": None, "pool": {"methods": ["slerp", "linear"]}},
    "mixture": DECODERS | {
        "mixture": {"experts": ["two", "base"], "positive_prompts": {"two": ["w5"], "base": ["w9"]}},
    },
    "stages": DECODERS | {"stages": [{"space": TIES, "search": SMALL}, {"data_flow": {}, "search": SMALL}],
                          "search": ...},
    "auto": DECODERS | {"space": TIES, "search": {"strategy": "auto", "generations": 8, "population": 4}},
    "budget": DECODERS | {"space": TIES, "search": {"budget": "40 passes", "population": 4}},
    "gradients": DECODERS | {"space": TIES, "search": SMALL | {"strategy": "gradient", "gradient": {"starts": 1}}},
    "rungs, validation, stop": DECODERS | {
        "space": TIES, "search": SMALL | {"rungs": 2, "validation": 0.3, "stop": {"target": 0.0}, "seeds": ["parents"]},
        "evaluation": {"chunk": 1, "compute_dtype": "float32"}, "export_dtype": "bfloat16", "log": ["csv"],
    },
    "guard and scale": DECODERS | {"space": TIES, "scale": "parents",
                                   "tasks": ["likelihood", ("multiple choice", {"guard": True, "tolerance": 0.1})]},
    "judged": DECODERS | {"space": TIES, "tasks": ["human"]},
    "plugin": TREES | {"backend": "network", "plugins": [str(TOY)], "parents": ["network1", "network2"],
                       "tasks": [{"name": "blobs", "kind": "blobs", "angle": 0.5}]},
    "pytrees": TREES,
    "pytrees and a base": TREES | {"base": "tree.safetensors", "space": {"method": "task_arithmetic"}},
    "factory of a file": TREES | {"backend": "world_factory.py:FACTORY"},
    "factory of a module": TREES | {"backend": "world_factory:FACTORY"},
    "networks": SHAPES,
    "networks of two folders": SHAPES | {"tasks": ["classification of two folders"]},
    "own modules": OWN_MODULES,
    "own modules by a module": OWN_MODULES | {"backend": "world_own:make"},
    "generators": SHAPES | {"base": None, "parents": ["draws1", "draws2"], "components": {"scheduler": "draws2"},
                            "tasks": ["pictures"], **LINEAR},
}  # fmt: skip


def write_config(name: str, world: Path) -> Path:
    document = {"search": SMALL} | CONFIGS[name]
    named = [(task, {}) if isinstance(task, str) else task for task in document["tasks"]]
    tasks = [
        task if isinstance(task, dict) else {"name": task[0], **SECTIONS[task[0]], **task[1]} for task in named
    ]  # fmt: skip
    document = {key: value for key, value in document.items() if value is not ...} | {"tasks": tasks}
    return write_yaml(world / f"{name}.config.yaml", document)


def test_every_backend_and_every_space_has_a_config() -> None:
    backends = {document.get("backend", "decoder") for document in CONFIGS.values()}
    assert {*registry._BUILT_IN} <= backends
    (spaces,) = re.findall("exactly one of the keys (.*)", explained({"parents": ["one"], "tasks": [LIKELIHOOD]}))
    assert set(spaces.split(", ")) <= {key for document in CONFIGS.values() for key in document}


LIKELIHOOD = {"name": "text", "kind": "likelihood", "file": "tasks.jsonl"}


def explained(document: dict[str, Any]) -> str:
    """The message about a document that is no config."""
    with pytest.raises(InputError) as caught:
        parse(Path("config.yaml"), document, Config)
    return str(caught.value)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "stages" not in name])
def test_a_resolved_config_is_resolved_to_itself(
    name: str, world: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_toy(monkeypatch)

    def resolved(path: Path) -> dict[str, Any]:
        config = read_config(path, [], None)
        return resolved_document(config, build_problem(path, config))

    document = resolved(write_config(name, world))
    again = elsewhere / "config.yaml"
    again.write_text(yaml.safe_dump(document, sort_keys=False))
    assert resolved(again) == document
    assert all(os.path.isabs(file) for file in document[INPUTS])


RUNS = ["networks", "pytrees"]
MORE_RUNS = ["own modules by a module", "decoder, space", "stages", "path", "pool", "judged", "generators"]


@pytest.mark.parametrize("name", [*RUNS, *(pytest.param(name, marks=thorough) for name in MORE_RUNS)])
def test_a_run_is_searched_exported_evaluated_and_reproduced_by_its_config(
    name: str, world: Path, elsewhere: Path
) -> None:
    def run(*arguments: object) -> None:
        run_here(*arguments)

    again, config = elsewhere.with_name("again"), elsewhere / "config.yaml"
    elsewhere.rmdir()
    run("search", write_config(name, world), "--out", elsewhere)
    run("search", config, "--out", again)
    assert yaml.safe_load((again / "config.yaml").read_text()) == yaml.safe_load(config.read_text())
    assert (again / "history.jsonl").read_bytes() == (elsewhere / "history.jsonl").read_bytes()
    run("export", elsewhere, "exported")
    run("reproduce", elsewhere)
    # `evaluate` refuses pytrees, and tasks that people judge.
    if name not in ("pytrees", "judged"):
        run("evaluate", elsewhere, "--tasks", config)
