"""The generation kind: outputs against targets by each metric."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from helpers.files import write_lines
from helpers.models import word_tokenizer, words
from rouge_score.rouge_scorer import RougeScorer

from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import TaskFile
from evojax_merge.errors import InputError
from evojax_merge.tasks.generation import GenerationTask
from evojax_merge.tasks.opening import open_whole_task
from evojax_merge.tasks.task import Responses

OUTPUTS = ("The cat sat on the mat.", "the cat", "", "A cat sat on that mat", "The cat sat on the mat. Well.")


def open_generation(folder: Path, targets: list[Any], **keys: Any) -> GenerationTask:
    write_lines(folder / "data.jsonl", [{"prompt": f"p{i}", "target": target} for i, target in enumerate(targets)])
    section = {"name": "text", "kind": "generation", "file": "data.jsonl", **keys}
    (config,) = parse(folder / "tasks.yaml", {"tasks": [section]}, TaskFile).tasks
    task = open_whole_task("tasks.yaml: tasks[0]", config, folder)
    assert isinstance(task, GenerationTask)
    return task


def score(task: GenerationTask, *candidates: list[str]) -> np.ndarray:
    (values,) = task.score(Responses(np.zeros((0, 0)), np.zeros(0, int), np.zeros((0, 0)), list(candidates))).values()
    return values


@pytest.mark.parametrize(
    ("metric", "target", "scores"),
    [
        ("exact_match", " The cat sat on the mat.\n", [1, 0, 0, 0, 0]),
        ("contains", "cat sat", [1, 0, 0, 1, 1]),
        ("regex", r"(?i)^(a|the) cat\b.*mat\.?$", [1, 0, 0, 1, 0]),
    ],
)
def test_outputs_are_right_or_wrong(metric: str, target: str, scores: list[float], tmp_path: Path) -> None:
    task = open_generation(tmp_path, [target] * len(OUTPUTS), metric=metric)
    assert task.metric == metric
    assert score(task, list(OUTPUTS), list(OUTPUTS)).tolist() == [scores, scores]
    assert score(task.subset([3]), [OUTPUTS[3]]).tolist() == [[scores[3]]]


def test_overlaps_are_those_of_the_packages_between_0_and_1(tmp_path: Path) -> None:
    target = "The cats sat on the mat."
    wanted = {
        "rouge_l": [RougeScorer(["rougeL"]).score(target, output)["rougeL"].fmeasure for output in OUTPUTS],
        "chrf": [sacrebleu.sentence_chrf(output, [target]).score / 100 for output in OUTPUTS],
        "bleu": [sacrebleu.sentence_bleu(output, [target]).score / 100 for output in OUTPUTS],
    }
    for metric, expected in wanted.items():
        task = open_generation(tmp_path, [target] * len(OUTPUTS), metric=metric)
        np.testing.assert_allclose(score(task, list(OUTPUTS))[0], expected, rtol=1e-6)
        assert score(task.subset([0]), [target]).item() == 1.0


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ('{"city": "Rome", "people": 3}', True),
        ('{"people": 3.0, "city": "Rome", "more": null}', True),
        ('```json\n{"city": "Rome", "people": 3}\n```', True),
        ('{"city": "Rome", "people": true}', False),
        ('{"city": "Rome"}', False),
        ('{"city": "Rome", "people": 3', False),
        ('The answer: {"city": "Rome", "people": 3}', False),
        ("[" * 100_000, False),
        ("9" * 10_000, False),
        ("", False),
    ],
)
@pytest.mark.parametrize("as_object", [True, False])
def test_json_has_the_fields_of_the_target(output: str, right: bool, as_object: bool, tmp_path: Path) -> None:
    target = {"city": "Rome", "people": 3}
    task = open_generation(tmp_path, [target if as_object else json.dumps(target)] * 2, metric="json")
    assert score(task, [output, output]).tolist() == [[right, right]]


def test_true_is_not_1_in_lists_and_deeper(tmp_path: Path) -> None:
    task = open_generation(tmp_path, [{"a": [1, {"b": 1}]}] * 2, metric="json")
    assert score(task, ['{"a": [1, {"b": 1}]}', '{"a": [1, {"b": true}]}']).tolist() == [[1, 0]]


def test_a_pattern_finds_what_is_compared(tmp_path: Path) -> None:
    keys = {"metric": "exact_match", "pattern": r"<answer>(.*?)</answer>"}
    task = open_generation(tmp_path, ["Rome", "3"], **keys)
    texts = ["so <answer>Paris</answer>, no, <answer> Rome </answer>", "3"]
    assert score(task, texts).tolist() == [[1, 0]]
    assert [task.extracted(i, [text]) for i, text in enumerate(texts)] == ["Rome", None]
    assert task.extraction_failure(["3"]) == f"the pattern {keys['pattern']!r}"
    assert task.extraction_failure(texts) is None
    companion = task.companion()
    assert companion is not None and companion.metric == "log_probability"


@pytest.mark.parametrize(
    ("targets", "keys", "message"),
    [
        (["Rome."], {"pattern": r"^ ?(\w+)\."}, r"tasks\[0\].pattern: .* finds 'Rome' in the target of .*data.jsonl:1, "
                                               r"which is compared with 'Rome.'"),
        (["a", "("], {"metric": "regex"}, r"data.jsonl:2: target, .*'\(' is not a regular expression"),
        (["{}", "{"], {"metric": "json"}, r"data.jsonl:2: target: '{' is not valid JSON"),
        (["a"], {"pattern": "["}, "pattern: '\\[' is not a regular expression"),
        (["a"], {"prompt": "Say it."}, r"tasks\[0\].prompt: names no field"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(
    targets: list[str], keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        open_generation(tmp_path, targets, **keys)


@pytest.mark.parametrize(
    ("metric", "further", "is_refused"),
    [
        ("exact_match", (), True),
        ("contains", ("w7 </s>",), True),
        ("exact_match", ("w6",), False),
        ("json", (), False),
        ("regex", (), False),
        ("length", (), False),
    ],
)
def test_a_target_that_no_output_can_equal_is_refused(
    tmp_path: Path, metric: str, further: tuple[str, ...], is_refused: bool
) -> None:
    """Where another answer is right as well, or the metric compares more than the text, there is something to find."""
    tokenizer = word_tokenizer([*words(), '"w6', 'w7"'])
    task = replace(open_generation(tmp_path, ['"w6 </s> w7"'] * 2, metric=metric), accepted=(further,) * 2)
    if is_refused:
        with pytest.raises(InputError, match=r"data.jsonl:1: task text: no output can be right: .*'</s>', a special"):
            task.requests(tokenizer, 100)
    else:
        assert len(task.requests(tokenizer, 100).prompts) == 2


@pytest.mark.parametrize(
    ("metric", "package"), [("rouge_l", "rouge-score"), ("chrf", "sacrebleu"), ("anls", "rapidfuzz")]
)
def test_a_missing_package_names_its_extra(
    metric: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(InputError, match=rf"tasks\[0\].metric: {metric} needs .* {package}; .*\[text-metrics\]"):
        open_generation(tmp_path, ["a"], metric=metric)


def test_rouge_by_mecabs_words(tmp_path: Path) -> None:
    for package in ("fugashi", "unidic_lite", "neologdn", "emoji"):
        pytest.importorskip(package)
    # 赤い バス が 走っ て いる: two of six words; emoji, and how wide a character is, do not count.
    outputs = ["赤いバス", "赤いﾊﾞｽ🚌", "赤いバスが走っている", "青い車"]
    task = open_generation(tmp_path, ["赤いバスが走っている"] * len(outputs), metric="rouge_l_mecab")
    assert score(task, outputs)[0] == pytest.approx([0.5, 0.5, 1, 0])


def _edits(first: str, second: str) -> int:
    """Levenshtein's distance, by the recurrence."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        row, before = [i], row
        for j, b in enumerate(second, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def test_anls_is_one_less_the_share_of_edits(tmp_path: Path) -> None:
    target, outputs = "Red Bus", ["red bus", "red buses", "bus", "a red bus", "", "yellow car"]
    shares = [_edits(output, target.lower()) / max(len(output), len(target)) for output in outputs]
    expected = [0.0 if share >= 0.5 else 1 - share for share in shares]
    assert expected[0] == 1 and 0 < expected[1] < 1 and expected[-1] == 0
    task = open_generation(tmp_path, [target] * len(outputs), metric="anls")
    assert score(task, outputs)[0] == pytest.approx(expected)


def test_the_best_of_several_right_answers_counts(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "data.jsonl",
        [
            {"prompt": "p", "target": "bus", "others": ["a bus", "coach"]},
            {"prompt": "q", "target": "car", "others": []},
        ],
    )
    section = {"name": "text", "kind": "generation", "file": "data.jsonl", "accept": "others"}
    (config,) = parse(tmp_path / "tasks.yaml", {"tasks": [section]}, TaskFile).tasks
    task = open_whole_task("tasks.yaml: tasks[0]", config, tmp_path)
    assert isinstance(task, GenerationTask)
    assert score(task, ["coach", "coach"], ["bus", "car"], ["a bus", "cars"]).tolist() == [[1, 0], [1, 1], [1, 0]]
    assert score(task.subset([1]), ["car"]).tolist() == [[1]]
    nested = {"target": "bus", "others": {"list": ["coach"]}}
    write_lines(tmp_path / "data.jsonl", [{"prompt": "p"} | nested, {"prompt": "q"} | nested])
    further = open_whole_task("tasks", config.model_copy(update={"accept": "others[list]"}), tmp_path)
    assert score(further, ["coach", "bus"]).tolist() == [[1, 1]]
    for others, what in ((None, "others: missing"), ("bus", "no list of texts"), (["bus", 3], "no list of texts")):
        record = {"prompt": "p", "target": "bus"} | ({} if others is None else {"others": others})
        write_lines(tmp_path / "data.jsonl", [record])
        with pytest.raises(InputError, match=what) as error:
            open_whole_task("tasks.yaml: tasks[0]", config, tmp_path)
        assert "data.jsonl:1" in str(error.value)


ANSWERS = ["two", "2", "2.", "Two", "three", "3", "a 3", "the 3!", "four", "red-brown"]


def open_vqa(folder: Path, answers: Any, **section: Any) -> GenerationTask:
    write_lines(folder / "data.jsonl", [{"prompt": "p", "target": "2", "answers": answers}])
    section = {"name": "text", "kind": "generation", "file": "data.jsonl", "accept": "answers"} | section
    document = {"tasks": [section | {"metric": "vqa_accuracy"}]}
    (config,) = parse(folder / "tasks.yaml", document, TaskFile).tasks
    task = open_whole_task("tasks.yaml: tasks[0]", config, folder)
    assert isinstance(task, GenerationTask)
    return task


def test_vqa_accuracy_is_by_how_many_people_answered_so(tmp_path: Path) -> None:
    task = open_vqa(tmp_path, [{"answer": answer, "answer_id": i} for i, answer in enumerate(ANSWERS)])
    # The mean over the ten sets of nine people of how many of three answered the same.
    for output, same in {"2": 4, "Two.": 4, "the three": 4, "four,": 1, "red brown": 1, "red": 0, "": 0}.items():
        sets = [same - 1] * same + [same] * (10 - same)
        expected = sum(min(agreeing / 3, 1) for agreeing in sets) / 10
        assert score(task, [output])[0] == pytest.approx([expected]), output
    assert score(open_vqa(tmp_path, ["1,000 m"] * 4), ["1000 m"], ["1 000 m"]).tolist() == [[1], [0]]
    assert score(open_vqa(tmp_path, ["don't, 3.5"] * 4), ["Dont 3.5"], ["dont 35"]).tolist() == [[1], [0]]
    with pytest.raises(InputError, match=r"data.jsonl:1: answers: has 3; vqa_accuracy is for more than 3 people's"):
        open_vqa(tmp_path, ANSWERS[:3])
    with pytest.raises(InputError, match=r"answers: .* is no list of texts"):
        open_vqa(tmp_path, [{"text": "2"}] * 4)
    with pytest.raises(InputError, match=r"tasks\[0\].accept: missing"):
        open_vqa(tmp_path, ANSWERS, accept=None)


def test_an_answer_in_another_language_scores_0(tmp_path: Path) -> None:
    target = "赤いバスが道路を走っています"
    outputs = [target, "A red bus is driving down the road, past the old houses", "赤い"]
    task = open_generation(tmp_path, [target] * 3, metric="rouge_l", language="ja")
    scores = score(task, outputs)[0]
    # ROUGE by characters: two of 14 are there in order, all of the output's.
    assert scores.tolist() == pytest.approx([1, 0, 2 * (2 / 14) / (2 / 14 + 1)])
    # A target that is itself in another language asks for an answer in that one.
    english = "A red bus is driving down the road, past the old houses"
    assert score(open_generation(tmp_path, [english], language="ja"), [english]).tolist() == [[1]]
    with pytest.raises(InputError, match="unknown language 'jp'"):
        open_generation(tmp_path, [target], language="jp")
