"""Tasks of the lm-eval harness that show images: our outputs and scores against its own `hf-multimodal` model."""

from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import yaml
from helpers.files import write_lines, write_yaml
from lm_eval.tasks import TaskManager
from reference.vision_models import load_seeing, save_seeing, seeing_logprobs, seeing_model, write_images

from evojax_merge.backends.decoder import vision
from evojax_merge.config.search_config import TaskFile
from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.steps.stored_models import open_tasks, score_models

NEW = 6
# Each document's images by their numbers, and its text: two images, one, and one whose text begins the sequence.
DOCUMENTS: list[tuple[list[int], str]] = [
    ([1, 2], "w9 <image> w8 <image> w5"), ([0], "<image> w5 w6 w7"), ([3], "<s> w11 <image>"),
]  # fmt: skip
CHAT = (
    "{{ bos_token }} {% for m in messages %}{{ 'w4 ' if m['role'] == 'user' else 'w8 ' }}{% for p in m['content'] %}"
    "{{ '<image> ' if p['type'] == 'image' else p['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{{ 'w9 ' if add_generation_prompt else '' }}"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task YAMLs, their data with a column of images, and a model."""
    folder = tmp_path_factory.mktemp("harness")
    save_seeing(seeing_model("llava"), folder / "model", 0, 0.05)
    (folder / "model/chat_template.jinja").write_text(CHAT)
    files = write_images(folder)
    features = datasets.Features({
        "images": [datasets.Image()], "question": datasets.Value("string"), "answer": datasets.Value("string"),
        "choices": [datasets.Value("string")], "gold": datasets.Value("int64"),
    })  # fmt: skip
    rows = [
        {"images": [str(files[i]) for i in numbers], "question": text, "answer": "w6", "choices": ["w7", "w40 w41"],
         "gold": 0}
        for numbers, text in DOCUMENTS
    ]  # fmt: skip
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "test.parquet")
    data = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": str(folder / "test.parquet")}}}
    mean = {"aggregation": "mean", "higher_is_better": True}
    shared = {**data, "test_split": "test", "doc_to_image": "images", "doc_to_text": "{{question}}"}
    tasks: dict[str, dict[str, Any]] = {
        "written": {
            **shared, "output_type": "generate_until", "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["w9"], "max_gen_toks": NEW},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        "chosen": {
            **shared, "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "rolling": {**shared, "output_type": "loglikelihood_rolling", "doc_to_target": "{{answer}}",
                    "metric_list": [{"metric": "word_perplexity"}]},
        "heard": {**shared, "doc_to_audio": "images", "output_type": "generate_until",
                  "doc_to_target": "{{answer}}", "metric_list": [{"metric": "exact_match", **mean}]},
    }  # fmt: skip
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}, sort_keys=False))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(vision, "cache_folder", lambda: folder)


def score(root: Path, *tasks: dict[str, Any], model: str = "model") -> TaskScores:
    scored: list[TaskScores] = []
    sections = [{"include_path": str(root), **task} for task in tasks]
    task_set = open_tasks("tasks.yaml", TaskFile(tasks=sections), root)  # type: ignore[arg-type]
    lines: list[str] = []
    # The scores are the last argument of what writes the rows of answers.
    write = lines.append
    score_models([str(root / model)], task_set, write, write, lambda _, rows: scored.append(rows.args[-1]))
    return scored[0]


def test_generations_are_those_of_the_hf_multimodal_model(root: Path) -> None:
    from lm_eval.models.hf_vlms import HFMultimodalLM

    model = HFMultimodalLM(pretrained=str(root / "model"), batch_size=1, device="cpu", dtype="float32")
    manager = TaskManager(include_path=str(root), include_defaults=False)
    scores = score(root, {"lm_eval": "written"}, {"lm_eval": "written", "name": "chat", "apply_chat_template": True})
    for name, chat in (("written", False), ("chat", True)):
        model.chat_applied = False
        theirs = lm_eval.simple_evaluate(
            model=model, tasks=["written"], task_manager=manager, bootstrap_iters=0, apply_chat_template=chat
        )
        samples = sorted(theirs["samples"]["written"], key=lambda sample: sample["doc_id"])
        assert scores.outputs[name] == [[sample["resps"][0][0] for sample in samples]]
        assert len(set(scores.outputs[name][0])) > 2
        assert scores.matrices[name]["exact_match,none"][0].tolist() == [sample["exact_match"] for sample in samples]


def test_choices_about_images(root: Path) -> None:
    """lm-eval's model refuses them; transformers scores them."""
    scores = score(root, {"lm_eval": "chosen"})
    model, processor = load_seeing(root / "model")
    expected = []
    for numbers, text in DOCUMENTS:
        images = [root / f"{number}.png" for number in numbers]
        sums = [seeing_logprobs(model, processor, text, images, choice).sum() for choice in ("w7", "w40 w41")]
        expected.append(float(sums[0] > sums[1]))
    assert scores.matrices["chosen"]["acc,none"][0].tolist() == expected


def test_what_is_refused(root: Path, tmp_path: Path) -> None:
    for name, message in (("rolling", "shows images and asks for no answer"), ("heard", "plays sounds")):
        with pytest.raises(InputError, match=message):
            score(root, {"lm_eval": name})
    with pytest.raises(InputError, match=r"example 0: its prompt has 3 places for 2 images"):
        score(changed(root, tmp_path, doc_to_text="<image>{{question}}"), {"lm_eval": "written"})
    long = {"generation_kwargs": {"until": ["w9"], "max_gen_toks": 250}}
    with pytest.raises(InputError, match=r"example 0: needs 2\d\d tokens with its images; .* context is 256"):
        score(changed(root, tmp_path, **long), {"lm_eval": "written"})
    files = write_lines(tmp_path / "test.jsonl", [{"images": ["none.png"], "question": "<image>", "answer": "w6"}] * 2)
    named = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(files)}}}
    with pytest.raises(InputError, match=r"example 0: doc_to_image\[0\]: none.png: no such file"):
        score(changed(root, tmp_path, **named), {"lm_eval": "written"})


def changed(root: Path, folder: Path, **keys: Any) -> Path:
    """A folder with the task `written` whose YAML has other values, and the model."""
    task = yaml.safe_load((root / "written.yaml").read_text()) | keys
    write_yaml(folder / "written.yaml", task)
    (folder / "model").exists() or (folder / "model").symlink_to(root / "model")
    return folder
