"""Tasks: from a file of examples to tokens in batches, and from outputs to scores."""

import csv
import gzip
import json
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from helpers.files import examples_in, write_lines
from helpers.models import word_tokenizer, words
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from evojax_merge.config.search_config import TaskFile
from evojax_merge.errors import InputError
from evojax_merge.evaluation.batched_tasks import BatchedTask, TaskShapes, batch_tasks, token_warnings
from evojax_merge.evaluation.diagnostics import warnings
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.steps.stored_models import open_tasks
from evojax_merge.tasks import patterns
from evojax_merge.tasks.answers import extract_answer, same_answer
from evojax_merge.tasks.batches import (
    BUCKETS,
    MAX_BEHIND_IMAGE,
    MIN_SHARED_PREFIX,
    PAD,
    ScoringBatch,
    bucket_widths,
    fill_prompt_batches,
    fill_scoring_batches,
    prompt_shapes,
    scoring_batches,
    scoring_shapes,
)
from evojax_merge.tasks.opening import data_warnings, open_task, open_whole_task
from evojax_merge.tasks.patterns import check_pattern, find_all
from evojax_merge.tasks.prompts import encode_pair
from evojax_merge.tasks.records import read_file
from evojax_merge.tasks.sampling import Sampling
from evojax_merge.tasks.splits import Splits
from evojax_merge.tasks.task import Responses, Row, TaskRequests
from evojax_merge.tasks.templates import check_template, fill, fill_prompt
from evojax_merge.tasks.text import (
    Example,
    TextConfig,
    TextTask,
    likelihood_rows,
    prompt_rows,
    score_likelihood,
)


def task_of(kind: Any, examples: list[Example], **changes: Any) -> TextTask:
    return TextTask("task", kind, "accuracy", 1.0, "file.jsonl", tuple(examples), **changes)


# ---------------------------------------------------------------------------------------------------------------
# Files


def test_templates_are_filled_from_the_record(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "task.jsonl",
        [{"question": "2+2?", "answer": {"text": "4"}, "tags": ["easy"]}, {"question": "質問", "answer": {"text": 5}}],
    )
    found = examples_in(path, "likelihood", prompt="Q: {question}\nA:", target="{answer[text]}")
    assert [(e.prompt, e.targets, e.line) for e in found] == [
        ("Q: 2+2?\nA:", (" 4",), 1),
        ("Q: 質問\nA:", (" 5",), 2),
    ]


def test_blank_lines_count_but_hold_nothing(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('\n{"prompt": "a", "target": "b"}\n   \n{"prompt": "c", "target": "d"}\n')
    assert [(e.prompt, e.line) for e in examples_in(path, "likelihood")] == [("a", 2), ("c", 4)]


def test_a_line_ends_with_a_line_feed_alone(tmp_path: Path) -> None:
    """What else Unicode calls the end of a line may stand in a text, as it is or escaped."""
    texts = ["a\u2028b", "a\u2029b", "a\x85b", "a\x0bb", "a\x0cb", "a\x1cb", "a\r\nb"]
    raw = [json.dumps({"prompt": text, "target": "t"}, ensure_ascii=False) for text in texts]
    path = tmp_path / "task.jsonl"
    path.write_bytes(("\ufeff" + "\r\n".join(raw)).encode())
    found = examples_in(path, "likelihood")
    assert [(e.prompt, e.line) for e in found] == [(text, i) for i, text in enumerate(texts, start=1)]


def test_numbers_and_whole_characters_of_records_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    digits = "9" * 4000
    path.write_text(
        f'{{"prompt": {digits}, "target": 0.5, "other": [NaN, null, true]}}\n'
        '{"prompt": "\\ud83d\\ude00", "target": true}\n'
    )
    found = examples_in(path, "likelihood")
    assert [(e.prompt, e.targets) for e in found] == [(digits, (" 0.5",)), ("😀", (" True",))]


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{{{a}}} {{}}", "{x} {}"), ("{a} {a}", "x x"), ("{b[c]}{b[d][1]}", "y7"), ("{an odd-name}", "z"),
        ("plain", "plain"), ("", ""),
    ],
)  # fmt: skip
def test_templates_name_fields(template: str, filled: str) -> None:
    record = {"a": "x", "b": {"c": "y", "d": ["6", "7"]}, "an odd-name": "z"}
    check_template("config", template)
    assert fill("file:1", "prompt", template, record) == filled


@pytest.mark.parametrize(
    ("template", "record", "filled"),
    [
        ("{a}\n{b}", {"a": "x", "b": None}, "x"), ("{a}\n{b}", {"a": "x"}, "x"), ("{b}\n{a}", {"a": "x", "b": ""}, "x"),
        ("{a}\n{b}", {"a": "x\n", "b": "y\n"}, "x\n\ny\n"), ("{a}\n{b}:", {"a": "x"}, "x\n:"), ("", {"a": "x"}, ""),
    ],
)  # fmt: skip
def test_a_prompts_empty_fields_leave_no_line(template: str, record: dict[str, Any], filled: str) -> None:
    assert fill_prompt("file:1", "prompt", template, record, ["b"]) == filled


def test_a_field_that_other_records_have_is_empty_in_prompts_alone(tmp_path: Path) -> None:
    full = {"prompt": "a", "input": "b", "target": "c", "reason": "d"}
    for left_out, changes, message in (
        ("input", {"prompt": "{prompt}\n{input}"}, None),
        ("input", {"prompt": "{input}"}, "no field 'input'"),
        ("input", {"prompt": "{prompt}\n{inptu}"}, "no field 'inptu'"),
        ("reason", {"target": "{reason} {target}"}, "no field 'reason'"),
    ):
        some = {name: value for name, value in full.items() if name != left_out}
        path = write_lines(tmp_path / "task.jsonl", [full, some])
        if message is None:
            assert [example.prompt for example in examples_in(path, "likelihood", **changes)] == ["a\nb", "a"]
        else:
            with pytest.raises(InputError, match=message):
                examples_in(path, "likelihood", **changes)


@pytest.mark.parametrize("template", ["{a.b}", "{a!s}", "{a:>9}", "{a:{b}}", "{}", "{0}", "{", "}", "{a[}", "{[a]}"])
def test_templates_do_nothing_else(template: str) -> None:
    with pytest.raises(InputError, match=r"config: .*expected the names of fields in braces"):
        check_template("config", template)


def test_delimiter_joins_where_there_is_no_white_space(tmp_path: Path) -> None:
    records = [{"prompt": p, "target": t} for p, t in (("a", "b"), ("a ", "b"), ("a", " b"), ("a\n", "b"), ("", "b"))]
    path = write_lines(tmp_path / "task.jsonl", records)

    def targets(delimiter: str) -> list[str]:
        return [e.targets[0] for e in examples_in(path, "likelihood", delimiter=delimiter)]

    assert targets(" ")[:4] == [" b", "b", " b", "b"]
    assert targets("")[:4] == ["b", "b", " b", "b"]


RECORDS = [{"prompt": 'a, "b"\nc', "target": "1"}, {"prompt": "é", "target": " two"}]


def test_records_are_the_same_in_every_format(tmp_path: Path) -> None:
    write_lines(tmp_path / "lines.jsonl", RECORDS)
    write_lines(tmp_path / "lines.json", RECORDS)
    (tmp_path / "list.json").write_text(json.dumps(RECORDS, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "table.parquet")
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "target"])
        writer.writeheader()
        writer.writerows(RECORDS)
    for name in ("lines.jsonl", "table.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for name, delimiter in (("table.tsv", "\t"), ("semicolons.csv", ";")):
        with (tmp_path / name).open("w", newline="") as file:
            rows = csv.writer(file, delimiter=delimiter)
            rows.writerows([["prompt", "target"], *(record.values() for record in RECORDS)])
    places = {
        "lines.jsonl.gz": [":1", ":2"], "table.csv.gz": [":2", ":4"], "table.tsv": [":2", ":4"],
        "semicolons.csv": [":2", ":4"], "lines.jsonl": [":1", ":2"], "lines.json": [":1", ":2"],
        "list.json": ["[0]", "[1]"],
        "table.parquet": [", row 0", ", row 1"], "table.csv": [":2", ":4"],
    }  # fmt: skip
    for name, expected in places.items():
        assert [record.fields for record in read_file(tmp_path / name)] == RECORDS, name
        config = TextConfig(name="n", kind="likelihood", file=name, heldout=0.5)
        task: Any = open_whole_task("tasks", config, tmp_path)
        assert [task.where(example) for example in task.examples] == [f"{tmp_path / name}{at}" for at in expected]
        rows = task.requests(byte_tokenizer(bos=True), 100).scored
        assert [row.where for row in rows] == [f"{tmp_path / name}{at}" for at in expected]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"prompt": "a"}, 3]', r"a.json\[1\]: expected a JSON object, found int"),
        ("a.json", '[{"prompt": "a"},\n 3', "a.json: not valid JSON .* in line 2.*a list of objects"),
        ("a.json", "[]", "a.json: holds no example; expected a list of objects"),
        (
            "a.jsonl",
            '[\n{"prompt": "a"}\n]',
            "a.jsonl: is a JSON array; expected one object a line, or a name that ends in",
        ),
        ("a.csv", "", "a.csv: holds no example; expected a line of names and rows"),
        ("a.csv", "prompt,target\n", "a.csv: holds no example"),
        ("a.csv", "prompt,prompt\na,b\n", "a.csv:1: the field 'prompt' stands twice"),
        ("a.csv", 'prompt,target\n"a\nb",c\n\nd\n', "a.csv:5: has 1 values; the first line names 2 fields"),
        ("a.csv", 'prompt,target\n"a', "a.csv:2: not valid CSV"),
    ],
)
def test_files_that_hold_no_records_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_file(tmp_path / name)


def test_a_folder_of_datasets_is_refused_with_its_way_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(InputError, match=r"is a folder of datasets' save_to_disk; expected a file: .*to_parquet"):
        read_file(tmp_path)


def test_long_values_of_csv_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"prompt\n{'w' * 200_000}\n")
    assert len(read_file(tmp_path / "a.csv")[0].fields["prompt"]) == 200_000


@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        *((answer, ("options", "label")) for answer in (2, "green", "2", "C", [0, 0, 1])),
        (2, ("mc1[options]", "mc1[label]")), (0, ("mc1[options]", "mc1[options][2]")), (1, ("options", "of[label]")),
    ],
)  # fmt: skip
def test_multiple_choice_answers_by_number_or_text(
    answer: Any, fields: tuple[str, str], tmp_path: Path
) -> None:  # fmt: skip
    record: dict[str, Any] = {"options": ["red", "blue", "green"], "label": answer}
    path = write_lines(tmp_path / "task.jsonl", [{"prompt": "grass is", "mc1": record, "of[label]": "C"} | record])
    (example,) = examples_in(path, "multiple_choice", choices=fields[0], answer=fields[1])
    assert example.targets == (" red", " blue", " green")
    assert example.answer == 2


@pytest.mark.parametrize(
    ("choices", "record", "texts", "right"),
    [
        (["{a}", "{b}"], {"answer": 1}, ("red", "blue"), 1),
        (["{a}", "{b}"], {"answer": "red"}, ("red", "blue"), 0),
        ({1: "{a}", 2: "{b}"}, {"answer": "2"}, ("red", "blue"), 1),
        ({1: "{a}", 2: "{b}"}, {"answer": 1}, ("red", "blue"), 0),
        # Tables have empty cells, or none, where a question has fewer choices.
        ({"A": "{a}", "B": "{b}", "C": "{c}", "D": "{d}"}, {"answer": "B", "c": ""}, ("red", "blue"), 1),
        ({False: "no", True: "yes"}, {"answer": True}, ("no", "yes"), 1),
        ({"false": "no", "true": "yes"}, {"answer": False}, ("no", "yes"), 0),
        ({0: "entailment", 1: "neutral"}, {"answer": 1}, ("entailment", "neutral"), 1),
    ],
)
def test_multiple_choice_by_templates(
    choices: Any, record: dict[str, Any], texts: tuple[str, ...], right: int, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "task.jsonl", [{"prompt": "sky", "a": "red", "b": "blue"} | record])
    (example,) = examples_in(path, "multiple_choice", choices=choices)
    assert (example.targets, example.answer) == (tuple(f" {text}" for text in texts), right)


@pytest.mark.parametrize(
    ("choices", "answer", "message"),
    [
        (["{a}", "{z}"], 0, r"choices: no field 'z'|no field 'z'"),
        ({1: "{a}", 2: "{b}"}, 0, "expected one of 1, 2 or a choice"),
        (["{a}", "{a}"], 0, "is there twice"),
    ],
)  # fmt: skip
def test_wrong_templates_of_choices_are_named(choices: Any, answer: Any, message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "task.jsonl", [{"prompt": "sky", "a": "red", "b": "blue", "answer": answer}] * 2)
    with pytest.raises(InputError, match=message):
        examples_in(path, "multiple_choice", choices=choices)


@pytest.mark.parametrize("labels", [["A", "B", "C"], ["1", "2", "3"]])
@pytest.mark.parametrize("is_mapping", [False, True])
def test_multiple_choice_answers_by_the_labels_of_its_choices(
    labels: list[str], is_mapping: bool, tmp_path: Path
) -> None:
    """As in ARC, OpenBookQA and CommonsenseQA."""
    texts = ["red", "blue", "green"]
    choices = dict(zip(labels, texts, strict=True)) | {"E": None} if is_mapping else {"text": texts, "label": labels}
    path = write_lines(tmp_path / "task.jsonl", [{"prompt": "grass is", "choices": choices, "answerKey": labels[2]}])
    (example,) = examples_in(path, "multiple_choice", answer="answerKey")
    assert (example.targets, example.answer) == ((" red", " blue", " green"), 2)


WRONG: list[tuple[Any, str, str]] = [
    ("likelihood", '{"prompt": "a"}', "target"),
    ("likelihood", '{"prompt": "a", "target": ""}', "empty"),
    ("likelihood", '{"prompt": "a", "target": "b"', "JSON"),
    ("likelihood", '["a", "b"]', "list"),
    ("multiple_choice", '{"prompt": "a", "choices": ["b"], "answer": 0}', "choices"),
    ("multiple_choice", '{"prompt": "a", "choices": ["b", 3], "answer": 0}', "choices"),
    ("multiple_choice", '{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer"),
    ("multiple_choice", '{"prompt": "a", "choices": ["b", "c"], "answer": true}', "answer"),
    ("multiple_choice", '{"prompt": "a", "choices": ["b", "c"], "answer": "d"}', "answer"),
    ("multiple_choice", '{"prompt": "a", "choices": ["b", "c"], "answer": [1, 1]}', "answer"),
    ("multiple_choice", '{"prompt": "a", "choices": ["b", "c"], "answer": "C"}', "an index below 2, its letter"),
    ("multiple_choice", '{"prompt": "a", "answer": 0}', r"no field 'choices', which .*it has prompt, answer"),
    ("multiple_choice", '{"prompt": "a", "choices": ["b", "c"]}', "no field 'answer'"),
    (
        "multiple_choice",
        '{"prompt": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answer": "C"}',
        "one of A, B or a choice",
    ),
    (
        "multiple_choice",
        '{"prompt": "a", "choices": {"text": ["b", "c"], "label": ["A"]}, "answer": "A"}',
        "of 2 texts; expected one of its own for each",
    ),
    (
        "multiple_choice",
        '{"prompt": "a", "choices": {"text": ["b", "c"], "label": ["A", "A", "B"]}, "answer": "B"}',
        "of 2 texts; expected one of its own for each",
    ),
]


@pytest.mark.parametrize(("kind", "line", "named"), WRONG)
def test_records_that_do_not_fit_are_named_by_their_line(kind: Any, line: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps({"prompt": "a", "target": "b", "choices": ["b", "c"], "answer": 0}) + "\n" + line + "\n")
    with pytest.raises(InputError, match=named) as raised:
        examples_in(path, kind)
    assert raised.value.where == f"{path}:2"


def test_a_misspelt_field_is_told_with_the_key_that_names_it(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "sums.jsonl", [{"question": {"text": "1 + 1"}, "answer": "2", "talk": [{}]}])
    for changes, told in (
        ({"prompt": "{qestion}"}, "'qestion', which config.yaml: tasks[0].prompt names (did you mean 'question'? it "),
        ({"prompt": "{question[txt]}"}, "'question[txt]', which config.yaml: tasks[0].prompt names (did you mean 'te"),
        (
            {"prompt": "{talk[1][content]}"},
            "'talk[1]', which config.yaml: tasks[0].prompt names (it has 1; of a "
            "conversation, messages: talk and apply_chat_template: true read any number)",
        ),
        ({"prompt": "{answer}", "target": "{x}"}, "'x', which config.yaml: tasks[0].target names (it has question, a"),
    ):
        config = TextConfig(name="n", kind="likelihood", file="sums.jsonl", **changes)
        with pytest.raises(InputError) as refused:
            open_task("config.yaml: tasks[0]", config, tmp_path, seed=0)
        assert str(refused.value).startswith(f"{path}:1: the record has no field {told}")


@pytest.mark.parametrize("heldout", [0.25, 0.01, 0.99])
def test_a_held_out_share_is_a_fixed_partition(heldout: float, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "task.jsonl", [{"prompt": f"p{i}", "target": "t"} for i in range(20)])
    config = TextConfig(name="n", kind="likelihood", file=path.name, heldout=heldout)
    searched, held = open_task("config", config, tmp_path, 0)
    lines = [{e.line for e in split.examples} for split in (searched, held)]
    assert lines[0] | lines[1] == set(range(1, 21))
    assert not lines[0] & lines[1]
    assert len(lines[1]) == {0.25: 5, 0.01: 1, 0.99: 19}[heldout]
    again = open_task("config", config, tmp_path, 0)
    assert again == (searched, held)
    assert open_task("config", config, tmp_path, 1)[1] != held or heldout == 0.01


def test_an_evaluation_takes_the_split_that_a_search_has(tmp_path: Path) -> None:
    write_lines(tmp_path / "task.jsonl", [{"prompt": f"p{i}", "target": "t"} for i in range(20)])
    config = TextConfig(name="n", kind="likelihood", file="task.jsonl", heldout=0.25)
    file = TaskFile(tasks=[config])

    def lines(split: Any, validation: float = 0.2) -> set[int]:
        (task,) = open_tasks("tasks", file, tmp_path, split, 3, validation).tasks
        assert isinstance(task, TextTask)
        return {example.line for example in task.examples}

    whole = [open_task("tasks", config, tmp_path, 3)[i] for i in range(2)]
    search, heldout = ({example.line for example in split.examples} for split in whole)
    assert (lines("all"), lines("heldout")) == (search | heldout, heldout)
    assert lines("search") | lines("validation") == search and len(lines("validation")) == 3
    assert not lines("search") & lines("validation") and lines("search", 0.0) == search
    with pytest.raises(InputError, match=r"tasks: has no validation split \(search.validation\)"):
        lines("validation", 0.0)


@pytest.mark.parametrize(
    ("heldout", "repeats", "shared"), [("search.jsonl", 0, 4), ("held.jsonl", 1, 2), (0.5, 0, 0)]
)  # fmt: skip
def test_examples_that_are_searched_on_and_held_out_are_counted(
    heldout: Any, repeats: int, shared: int, tmp_path: Path
) -> None:
    records = [{"prompt": f"p{i}", "target": "t"} for i in range(7)]
    write_lines(tmp_path / "search.jsonl", records[:4])
    write_lines(tmp_path / "held.jsonl", [*records[2:6], {"target": "t", "prompt": "p5"}])
    # Another target is another example.
    write_lines(tmp_path / "other.jsonl", [records[6], records[0] | {"target": "u"}])
    configs = [
        TextConfig(name="n", kind="likelihood", file="search.jsonl", heldout=heldout),
        TextConfig(name="o", kind="likelihood", file="other.jsonl", heldout=0.5),
    ]
    full, held = zip(*(open_task("config", config, tmp_path, 0) for config in configs), strict=True)
    lines = data_warnings("config", configs, Splits([list(full)], list(full), None, list(held)))
    few = [line for line in lines if " to search on; " in line]
    assert [line.partition(";")[0] for line in few] == [
        *(["config: tasks[0]: 2 examples to search on"] if heldout == 0.5 else []),
        "config: tasks[1]: 1 example to search on",
    ]
    lines = [line for line in lines if line not in few]
    assert [int(line.split()[2]) for line in lines if " repeat " in line] == [repeats] * bool(repeats)
    assert [int(line.split()[2]) for line in lines if "searched" in line] == [shared] * bool(shared)
    assert all(line.startswith("config: tasks[0].heldout: ") for line in lines)


# ---------------------------------------------------------------------------------------------------------------
# Tokens


def byte_tokenizer(*, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which ` yes` and other words with their space before them are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["the answer is yes and the question is no"] * 50, trainer)
    if bos or eos:
        single = "<s> " * bos + "$A" + " </s>" * eos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            special_tokens=[("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize(
    ("prompt", "target"), [("the answer is", " yes"), ("the answer is ", "yes"), ("no\n", "yes and")]
)
def test_prompt_and_target_are_encoded_in_one_piece(bos: bool, eos: bool, prompt: str, target: str) -> None:
    tokenizer = byte_tokenizer(bos=bos, eos=eos)
    tokens, start = encode_pair(tokenizer, prompt, target)
    # The tokens are the text's own, begun as the tokenizer begins texts, and not closed.
    assert tokens == tokenizer(prompt + target)["input_ids"][: len(tokens)]
    assert tokens[-1] != tokenizer.eos_token_id
    assert (tokens[0] == tokenizer.bos_token_id) == bos
    assert tokenizer.decode(tokens, skip_special_tokens=True) == prompt + target
    # What is scored is the target with its leading space: the token a model would write.
    kept = prompt.rstrip(" ")
    assert tokenizer.decode(tokens[start:]) == (prompt + target)[len(kept) :]
    assert tokenizer.decode(tokens[:start], skip_special_tokens=True) == kept


def test_space_at_the_end_of_a_prompt_makes_no_difference() -> None:
    tokenizer = byte_tokenizer()
    assert encode_pair(tokenizer, "the answer is ", "yes") == encode_pair(tokenizer, "the answer is", " yes")


def test_at_least_one_token_of_the_target_is_scored() -> None:
    """A target that merges into the prompt's last token is scored with that token."""
    tokenizer = byte_tokenizer()
    tokens, start = encode_pair(tokenizer, "the answer i", "s")
    assert 0 < start < len(tokens)
    assert tokenizer.decode(tokens) == "the answer is"


def test_rows_of_examples_name_their_line() -> None:
    tokenizer = word_tokenizer(words())
    examples = [Example("w4 w5", (" w6 w7",), "w6 w7", 3), Example("w8", (" w9",), "w9", 7)]
    assert likelihood_rows(task_of("likelihood", examples), tokenizer) == [
        Row((4, 5, 6, 7), 2, "file.jsonl:3", 0),
        Row((8, 9), 1, "file.jsonl:7", 1),
    ]
    assert prompt_rows(task_of("exact_match", examples), tokenizer) == [
        Row((4, 5), 2, "file.jsonl:3", 0),
        Row((8,), 1, "file.jsonl:7", 1),
    ]
    choices = [Example("w4", (" w5", " w6 w7"), 1, 1), Example("w8", (" w9", " w10"), 0, 2)]
    found = likelihood_rows(task_of("multiple_choice", choices), tokenizer)
    assert [row.tokens for row in found] == [(4, 5), (4, 6, 7), (8, 9), (8, 10)]


def test_rows_without_a_token_are_refused() -> None:
    tokenizer = word_tokenizer(words())
    for prompt, target in (("", "w4"), ("", " ")):
        with pytest.raises(InputError, match=r"file\.jsonl:9"):
            likelihood_rows(task_of("likelihood", [Example(prompt, (target,), target, 9)]), tokenizer)
    with pytest.raises(InputError, match=r"file\.jsonl:9"):
        prompt_rows(task_of("exact_match", [Example("", ("w4",), "w4", 9)]), tokenizer)


def test_examples_beyond_the_context_are_refused() -> None:
    tokenizer = word_tokenizer(words())
    task = task_of("likelihood", [Example("w4 w5 w6", (" w7",), "w7", 1), Example("w4 " * 9, ("w7",), "w7", 2)])
    batch_tasks([[task]], tokenizer, 64, 9, ())
    with pytest.raises(InputError, match=r"file\.jsonl:2: 10 tokens .* 8"):
        batch_tasks([[task]], tokenizer, 64, 8, ())
    generated = task_of("exact_match", list(task.examples), max_new_tokens=4)
    batch_tasks([[generated]], tokenizer, 64, 13, ())
    with pytest.raises(InputError, match=r"file\.jsonl:2: 9 tokens and 4 new ones"):
        batch_tasks([[generated]], tokenizer, 64, 12, ())


def test_tokens_beyond_the_embedding_are_refused_where_an_example_holds_one() -> None:
    tokenizer = word_tokenizer(words(16))
    task = task_of("likelihood", [Example("w4 w5", (" w6",), "w6", 1), Example("w4", (" w9",), "w9", 2)])
    with pytest.raises(InputError, match=r"file\.jsonl:2: token 'w9' has the number 9, .* 9 rows"):
        batch_tasks([[task]], tokenizer, 64, 9, (), 9)
    (batched_tasks,) = batch_tasks([[task]], tokenizer, 64, 9, (), 10)
    (line,) = token_warnings(batched_tasks, tokenizer, 10)
    assert "6 tokens (such as 'w10')" in line
    # Rows that no token has are padding.
    assert token_warnings(batched_tasks, tokenizer, 16) == token_warnings(batched_tasks, tokenizer, 64) == []


@pytest.mark.parametrize(("unknown", "warned"), [(1, False), (3, True)])
def test_unknown_words_are_warned_of_where_they_are_many(unknown: int, warned: bool) -> None:
    tokenizer = word_tokenizer(words(16))
    # 40 tokens, of which 1 (2.5 %) or 3 (7.5 %) are unknown; the first on line 2.
    lines = ["w4 " * 9, *(["x " + "w4 " * 8] * unknown), *(["w4 " * 9] * (3 - unknown))]
    task = task_of("likelihood", [Example(text, ("w5",), "w5", n + 1) for n, text in enumerate(lines)])
    (batched_tasks,) = batch_tasks([[task]], tokenizer, 64, 9, (), 16)
    found = token_warnings(batched_tasks, tokenizer, 16)
    assert len(found) == warned
    assert not warned or ("8% of" in found[0] and "'<unk>'" in found[0] and "file.jsonl:2" in found[0])
    # GPT-2's is its end of text, and stands for nothing unknown.
    tokenizer.eos_token = "<unk>"
    assert token_warnings(batched_tasks, tokenizer, 16) == []


def test_a_text_that_a_tokenizer_fails_on_is_named() -> None:
    tokenizer = word_tokenizer(words(16))
    tokenizer.backend_tokenizer.model.unk_token = "<nothing>"
    with pytest.raises(InputError, match="its tokenizer fails on 'w4 colourless w5'"):
        likelihood_rows(task_of("likelihood", [Example("w4 colourless", (" w5",), "w5", 9)]), tokenizer)


# ---------------------------------------------------------------------------------------------------------------
# Batches


def cells(lengths: list[int], widths: tuple[int, ...]) -> float:
    return sum(min((w for w in widths if w >= length), default=np.inf) for length in lengths)


@settings(max_examples=150)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=25), st.integers(1, 4), st.sampled_from([1, 8]))
def test_bucket_widths_have_the_least_padding(lengths: list[int], buckets: int, step: int) -> None:
    widths = bucket_widths(np.array(lengths), buckets, step)
    assert widths == sorted(set(widths))
    assert 1 <= len(widths) <= buckets
    assert all(width % step == 0 for width in widths)
    possible = sorted({-(-length // step) * step for length in lengths})
    best = min(
        cells(lengths, chosen)
        for count in range(1, min(buckets, len(possible)) + 1)
        for chosen in combinations(possible, count)
    )
    assert cells(lengths, tuple(widths)) == best


@pytest.mark.parametrize("count", [30, 100, 500, 2000])
def test_padding_of_texts_is_below_15_percent(count: int) -> None:
    """Lengths as texts have them: log-normal, some three times as long as others."""
    lengths = np.random.default_rng(0).lognormal(4.5, 0.4, count).astype(int)
    rows = [Row((1,) * int(length), int(length) // 2, "f", i) for i, length in enumerate(lengths)]
    prompts = fill_prompt_batches(rows, prompt_shapes([rows], 4096, 16384, 64))
    for batches in (*scoring_batches([rows], 4096), prompts):
        assert batches.padding / batches.computed < 0.15


Size = tuple[int, int, int]
# Length, scored tokens, and which example.
rows_strategy = st.lists(
    st.tuples(st.integers(2, 60), st.integers(1, 20), st.integers(0, 2)).map(
        lambda p: (p[0], min(p[1], p[0] - 1), p[2])
    ),
    min_size=1,
    max_size=30,
)


def make_rows(sizes: list[Size], seed: int = 0, header: int = 0) -> list[Row]:
    """Rows of random tokens behind one header; rows of one example follow each other and begin alike."""
    rng = np.random.default_rng(seed)
    begun = rng.integers(1, 99, 100).tolist()
    rows, example, shared = [], -1, []
    for i, (length, scored, new) in enumerate(sizes):
        if new or not rows:
            example, shared = example + 1, rng.integers(1, 99, 60).tolist()
        start = length - scored
        tokens = [*begun[:header], *shared[:start], *rng.integers(1, 99, scored).tolist()]
        rows.append(Row(tuple(tokens), header + start, f"f:{i}", example))
    return rows


def read_back(batch: ScoringBatch, header: np.ndarray) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """What each row of a batch sees of its tokens, and its targets; each is predicted at the position before it."""
    found = {}
    slots = len(batch.rows) // len(batch.tokens)
    flat = batch.positions.reshape(-1)
    for i, number in enumerate(batch.rows):
        own = batch.target_index[i][batch.target_index[i] < len(batch.targets)]
        if number == PAD:
            assert not own.size
            continue
        b, branch = divmod(i, slots)
        columns = np.flatnonzero((batch.segment_ids[b] == 0) | (batch.segment_ids[b] == branch + 1))
        assert batch.positions[b, columns].tolist() == list(range(len(header), len(header) + len(columns)))
        assert batch.mask[own].all()
        at = batch.predict_at[own]
        assert np.isin(at, b * batch.tokens.shape[1] + columns).all()
        first = len(header) + len(columns) - len(own)
        assert flat[at].tolist() == list(range(first, first + len(own)))
        found[int(number)] = (*header.tolist(), *batch.tokens[b, columns].tolist()), tuple(batch.targets[own].tolist())
    return found


@settings(max_examples=100)
@given(
    rows_strategy, st.integers(1, 300), st.sampled_from([0, 10, MIN_SHARED_PREFIX, 50]), st.booleans(),
    st.sampled_from([0, 100]),
)  # fmt: skip
def test_scoring_batches_hold_every_row_once(
    sizes: list[Size], tokens_per_batch: int, header: int, pack: bool, merge_tokens: int
) -> None:
    rows = make_rows(sizes, header=header)
    (batches,) = scoring_batches([rows], tokens_per_batch, pack, merge_tokens=merge_tokens)
    found: dict[int, Any] = {}
    for batch in batches.batches:
        assert batch.tokens.size <= tokens_per_batch or len(batch.tokens) == 1
        assert pack or len(batch.rows) == len(batch.tokens)
        part = read_back(batch, batches.shared_prefix)
        assert not part.keys() & found.keys()
        found |= part
    assert found == {i: (row.tokens[:-1], row.tokens[row.start :]) for i, row in enumerate(rows)}
    if len(rows) > 1 and header >= MIN_SHARED_PREFIX:
        assert len(batches.shared_prefix) >= header - 1
    assert batches.tokens == sum(len(row.tokens) - 1 for row in rows)
    assert len({batch.tokens.shape for batch in batches.batches}) <= BUCKETS[1]


@pytest.mark.parametrize("count", [40, 63, 200])
def test_batches_that_merge_are_few_and_full(count: int) -> None:
    """Where each costs as much as some tokens, more padding is worth less merging."""
    lengths = np.random.default_rng(0).integers(200, 400, count)
    rows = [Row(tuple(range(length)), 1, "f", i) for i, length in enumerate(lengths)]

    def cost(merge_tokens: int) -> int:
        (batches,) = scoring_batches([rows], 8192, merge_tokens=merge_tokens)
        return sum(batch.tokens.size + 1770 for batch in batches.batches)

    least = int(lengths.sum()) * (1 + 1770 / 8192)
    assert least <= cost(1770) <= min(cost(0), 1.2 * least)


def test_choices_share_their_question() -> None:
    question, choices = tuple(range(1, 31)), [(40,), (41, 42), (43, 44, 45)]
    rows = [Row((*question, *choice), 30, "f", 0) for choice in choices]
    (batches,) = scoring_batches([rows], 1000)
    (batch,) = batches.batches
    assert int((batch.segment_ids >= 0).sum()) == 30 + 0 + 1 + 2
    (alone,) = scoring_batches([rows], 1000, pack=False)
    assert sum(int((batch.segment_ids >= 0).sum()) for batch in alone.batches) == 30 + 31 + 32


def questions(images: int, each: int, places: int = 40) -> list[Row]:
    """Rows of questions about images in turn, each an example of its own."""
    rng, rows = np.random.default_rng(0), []
    for number in range(images * each):
        first = number % images * places
        words = rng.integers(10, 20, rng.integers(2, 9)).tolist()
        tokens = (1, *(~row for row in range(first, first + places)), *words, 30, 31)
        rows.append(Row(tokens, len(tokens) - 2, f"line {number}", number))
    return rows


def test_questions_about_one_image_share_it() -> None:
    rows = questions(images=3, each=5)
    (batches,) = scoring_batches([rows], 1000)
    found: dict[int, Any] = {}
    for batch in batches.batches:
        found |= read_back(batch, batches.shared_prefix)
        assert ((batch.tokens < 0).sum(axis=1) <= 40).all()
    assert found == {i: (row.tokens[:-1], row.tokens[row.start :]) for i, row in enumerate(rows)}
    assert sum(int((batch.tokens < 0).sum()) for batch in batches.batches) == 3 * 40
    # Very many questions are several rows.
    (batches,) = scoring_batches([questions(images=2, each=100)], 2048)
    assert all(batch.tokens.shape[1] <= 41 + MAX_BEHIND_IMAGE for batch in batches.batches)
    assert sum(int((batch.tokens < 0).sum()) for batch in batches.batches) < 20 * 40


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(20, 500), st.data())
def test_some_questions_about_images_fit_the_shapes_of_all(
    each: int, images: int, tokens_per_batch: int, data: st.DataObject
) -> None:
    rows = questions(images, each)
    shapes = scoring_shapes([rows], tokens_per_batch).for_any(rows)
    requests = TaskRequests(scored=tuple(rows))
    scoring = fill_scoring_batches(rows, shapes)
    whole = BatchedTask(task_of("likelihood", [Example("a", ("b",), "b", 1)] * len(rows)), requests,
                        TaskShapes(shapes, None), scoring, None, (), tokens_per_batch)  # fmt: skip
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1))))
    part = whole.subset(chosen)
    assert part.scoring is not None
    found: dict[int, Any] = {}
    for batch in part.scoring.batches:
        found |= read_back(batch, part.scoring.shared_prefix)
        size, width = batch.tokens.shape
        ((spans, scored, longest),) = [limits for s, limits in shapes.limits.items() if s.width == width]
        assert batch.target_index.shape == (size * spans, longest) and batch.targets.shape == (scored,)
    assert found == {i: (rows[n].tokens[:-1], rows[n].tokens[rows[n].start :]) for i, n in enumerate(chosen)}


@settings(max_examples=60)
@given(rows_strategy, st.integers(1, 300), st.integers(1, 900), st.sampled_from([0, MIN_SHARED_PREFIX + 1]))
def test_prompt_batches_end_every_prompt_in_the_last_column(
    sizes: list[Size], tokens_per_part: int, tokens_per_batch: int, header: int
) -> None:
    rows = [Row(row.tokens, len(row.tokens), row.where, row.example) for row in make_rows(sizes, header=header)]
    batches = fill_prompt_batches(rows, prompt_shapes([rows], tokens_per_part, tokens_per_batch, 5))
    numbers = np.concatenate([batch.rows for batch in batches.batches])
    assert sorted(numbers[numbers >= 0].tolist()) == list(range(len(rows)))
    for batch in batches.batches:
        for b, r in enumerate(batch.rows):
            assert 0 <= batch.left_pad[b] < batch.tokens.shape[1]
            if r >= 0:
                assert (*batches.shared_prefix.tolist(), *batch.tokens[b, batch.left_pad[b] :].tolist()) == rows[
                    r
                ].tokens
        # What is read in parts is the whole, and no more than is wanted at once.
        read = {}
        for part in batch.prefill_groups:
            tokens, first = batch.prefill_group(part)
            assert tokens.size <= max(tokens_per_part, part.width)
            for b, own in enumerate(tokens):
                read[part.begin + b] = own[first[b] :].tolist()
        for b in np.flatnonzero(batch.rows >= 0):
            assert read[b] == batch.tokens[b, batch.left_pad[b] :].tolist()
        assert batch.rows.size * (batch.tokens.shape[1] + 5) <= max(tokens_per_batch, batch.tokens.shape[1] + 5)
    if len(rows) > 1 and header:
        assert len(batches.shared_prefix) >= header


@settings(max_examples=40)
@given(rows_strategy, rows_strategy, st.integers(20, 300))
def test_another_split_needs_no_other_shapes(first: list[Size], second: list[Size], tokens_per_batch: int) -> None:
    splits = make_rows(first), make_rows(second, seed=1)
    shapes: dict[int, set[Any]] = {}
    for rows, batches in zip(splits, scoring_batches(splits, tokens_per_batch), strict=True):
        for batch in batches.batches:
            width = batch.tokens.shape[1]
            shapes.setdefault(width, set()).add(tuple(array.shape for array in vars(batch).values()))
        numbers = Counter(int(r) for batch in batches.batches for r in batch.rows if r >= 0)
        assert numbers == Counter(range(len(rows)))
    assert all(len(of_width) == 1 for of_width in shapes.values())


# ---------------------------------------------------------------------------------------------------------------
# Scores


def test_likelihood_is_the_mean_over_the_targets_tokens() -> None:
    task = task_of("likelihood", [Example("a", ("b",), "b", 1)] * 3)
    sums = np.array([[-2.0, -6.0, -1.0], [-4.0, -3.0, -8.0]], np.float32)
    found = score_likelihood(task, sums, np.array([1, 3, 2]))["log_probability"]
    np.testing.assert_allclose(found, [[-2, -2, -0.5], [-4, -1, -4]])


def test_multiple_choice_counts_right_choices_and_their_margin() -> None:
    examples = [Example("a", ("b", "c", "d"), 2, 1), Example("a", ("b", "c"), 0, 2)]
    sums = np.array([[-3.0, -2.0, -1.5, -4.0, -9.0], [-1.0, -2.0, -1.5, -4.0, -3.0], [-1, -1, -1, np.nan, -3]])
    found = score_likelihood(task_of("multiple_choice", examples), sums.astype(np.float32), np.ones(5))
    np.testing.assert_array_equal(found["accuracy"], [[1, 1], [0, 0], [0, np.nan]])
    np.testing.assert_array_equal(found["margin"], [[0.5, 5], [-0.5, -1], [0, np.nan]])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42.", "42"),
        ("3 apples and 4 pears make 7", "7"),
        ("12 + 30 = 42 #### 42", "42"),
        ("#### 1,234 or so", "1234"),
        ("so 7 in all. #### -15", "-15"),
        ("it costs $3.50", "3.50"),
        ("1,234,567.89 in total", "1234567.89"),
        ("#### 7\nQ: what is 2 #### 9", "9"),
        ("first #### 5 then", "5"),
        ("8 is what I say ####", "8"),
        ("答えは 12 です。", "12"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_last_number_is_extracted(text: str, answer: str | None) -> None:
    assert extract_answer(text, None) == answer


@pytest.mark.parametrize(
    ("pattern", "target", "answer"),
    [
        (r"^ ?(\w+)\.", "Rome.", "'Rome'"),
        (r"#### (.*)", "4 #### 4", "'4'"),
        (r"\d+", "3 apples", "'3'"),
        (r"^ ?(\w+)\.", "Rome", None),
        (r"#### (.*)", "4", None),
        (r"^(.+)$", " two words ", None),
        (r"[A-D]", "B", None),
    ],
)
def test_a_pattern_that_cuts_the_targets_is_refused(
    pattern: str, target: str, answer: str | None, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "task.jsonl", [{"prompt": "p", "target": "?"}, {"prompt": "q", "target": target}])
    config = TextConfig(name="n", kind="exact_match", file=path.name, pattern=pattern)
    if answer is None:
        assert open_task("tasks[0]", config, tmp_path, 0)
        return
    with pytest.raises(InputError) as refused:
        open_task("tasks[0]", config, tmp_path, 0)
    assert str(refused.value).startswith(
        f"tasks[0].pattern: {pattern!r} finds {answer} in the target of {path}:2, which is compared with {target!r}; "
    )


@pytest.mark.parametrize(
    ("targets", "warned"), [(("#### 5", "7", "seven", "eight"), False), (("7", "seven", "eight"), True)]
)
def test_targets_that_mostly_hold_no_number_are_warned_of(
    targets: tuple[str, ...], warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "task.jsonl", [{"prompt": "p", "target": target} for target in targets])
    config = TextConfig(name="n", kind="exact_match", file=path.name)
    open_task("tasks[0]", config, tmp_path, 0)
    error = capsys.readouterr().err
    assert error.startswith(f"warning: tasks[0].pattern: missing; 2 of 3 targets of {path}") == warned
    assert error.count("\n") == warned
    open_task("tasks[0]", config.model_copy(update={"pattern": ".+"}), tmp_path, 0)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "keys", "warned"),
    [
        ("{a} {b} 1 です 。", {}, True),
        ("{b} is what is left of {a}", {"heldout": 0.5}, True),
        ("{a} {b}", {"pattern": "^(.+)$"}, False),
        ("{a} {b}", {"metric": "brevity"}, False),
        ("{a} + {b} = 9 #### 9", {}, False),
        ("1,{a}0{b}", {}, False),
    ],
)
def test_targets_of_several_numbers_without_a_pattern_are_warned_of_once(
    target: str, keys: dict[str, Any], warned: bool, tmp_path: Path
) -> None:
    for name in ("search", "heldout"):
        records = [{"q": f"{name} {i}", "t": target.format(a=i, b=i + 1)} for i in range(6)]
        write_lines(tmp_path / f"{name}.jsonl", [*records, {"q": name, "t": "7"}])
    section = {"name": "n", "file": "search.jsonl", "prompt": "{q}", "target": "{t}", "heldout": "heldout.jsonl"}
    config = TextConfig(kind="exact_match", **section | keys)
    search, heldout = open_task("config: tasks[0]", config, tmp_path, 0)
    lines = data_warnings("config", [config], Splits([search], [search], None, [heldout]))
    count, total = (12, 14) if config.heldout_source else (6, 7)
    beginning = f"config: tasks[0].pattern: missing; {count} of {total} targets hold more than one number ("
    lines = [line for line in lines if " to search on; " not in line]
    assert [line.startswith(beginning) for line in lines] == [True] * warned


@pytest.mark.parametrize(
    ("changes", "target", "reason"),
    [
        ({"pattern": "^(.+)$"}, "yes </s>", "contains '</s>', a special token, which outputs never contain"),
        ({"pattern": "^(.+)$", "sampling": Sampling(reduction="majority")}, "</s>yes", "'</s>', a special token"),
        ({"pattern": "(?s)^(.+)$", "stop": ("\n",)}, "yes\nno", "a text of stop, before which outputs end"),
        # White space around an answer is not compared, and of a target without a pattern its number alone.
        ({"pattern": "^(.+)$", "stop": ("\n",)}, "yes\n", None),
        ({}, "it is 42 </s>", None),
        ({"metric": "brevity", "pattern": "^(.+)$"}, "yes </s>", None),
        # Decoding keeps added tokens that are not special, and texts that only resemble a token.
        ({"pattern": "^(.+)$"}, "<think> yes", None),
        ({"pattern": "^(.+)$"}, "yes </ s>", None),
    ],
)
def test_a_target_that_no_output_can_equal_is_refused_before_the_search(
    changes: dict[str, Any], target: str, reason: str | None
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    examples = [Example("the question", ("no",), "no 1", 1), Example("is", (f" {target}",), target, 2)]
    task = replace(task_of("exact_match", examples, max_new_tokens=3), **changes)
    decoded = tokenizer.decode(tokenizer(target)["input_ids"], skip_special_tokens=True)
    cut = TaskRequests(stop=task.stop).cut(decoded)
    equal = task.score(Responses(np.zeros((1, 0)), np.zeros(0, int), np.zeros((1, 0), bool), [[cut, cut]]))["accuracy"][
        0, 1
    ]
    if reason is None:
        task.requests(tokenizer, 100)
        assert equal or task.metric == "brevity"
        return
    assert not equal
    with pytest.raises(InputError) as refused:
        task.requests(tokenizer, 100)
    line = str(refused.value)
    assert line.startswith("file.jsonl:2: task task: no output can be right: the target ") and reason in line
    assert "(so do 1 of 2 targets)" in line and "leave it out of" in line
    # Its likelihood can be scored.
    task.likelihood_of_targets().requests(tokenizer, 100)


def test_targets_that_are_all_longer_than_an_output_are_refused() -> None:
    examples = [Example("p", ("one",), "one", 1), Example("q", ("twelve",), "twelve", 2)]
    task = replace(task_of("exact_match", examples, max_new_tokens=2), pattern="^(.+)$")
    with pytest.raises(
        InputError,
        match=r"file.jsonl:1: task task: no output can be right: max_new_tokens is 2, and the "
        "shortest target has 3 tokens; expected max_new_tokens of more than that",
    ):
        task.requests(byte_tokenizer(), 100)
    # One of them fits; a number that is compared may stand in any text.
    replace(task, max_new_tokens=3).requests(byte_tokenizer(), 100)
    replace(task, pattern=None).requests(byte_tokenizer(), 100)


def test_samples_hold_the_wanted_answer_and_the_one_that_was_found() -> None:
    task = task_of("exact_match", [Example("p", ("t",), "#### 5", 1), Example("q", ("u",), "7", 2)])
    assert [task.target(n) for n in range(2)] == ["#### 5", "7"]
    assert [task.extracted(n, [text]) for n, text in enumerate(["it is 1,005.", "none"])] == ["1005", None]
    choices = task_of("multiple_choice", [Example("p", (" red", " green"), 1, 1)])
    assert choices.target(0) == "green" and choices.extracted(0, []) is None


@pytest.mark.parametrize(
    ("pattern", "outputs", "words"),
    [
        (r"is (\w+)", ["it is w7.", "is w8"], " (the first target is 'w5', the first candidate's answer 'w7')"),
        (
            r"is (\w+)",
            ["w7\nand more", "is w8"],
            " (the first target is 'w5', the first candidate's output 'w7\\nand more')",
        ),
        (None, [], ""),
    ],
)
def test_the_warning_of_no_signal_shows_a_target_beside_an_answer(
    pattern: str | None, outputs: list[str], words: str
) -> None:
    task = task_of("exact_match", [Example("p", ("w5",), "w5", 1), Example("q", ("w6",), "w6", 2)], pattern=pattern)
    scores = TaskScores(
        {"task": {"accuracy": np.zeros((3, 2), np.float32)}}, {"task": [outputs] * 3} if outputs else {}
    )
    (line,) = warnings([task], scores)
    assert line == f"warning: task task: all 3 candidates score 0; it gives no signal{words}"


def test_pattern_s_last_match_is_extracted() -> None:
    assert extract_answer("A then (B) then (C) end", r"\(([A-D])\)") == "C"
    assert extract_answer("w1 w22 w3", r"w\d+") == "w3"
    assert extract_answer("answer:  yes ", r"answer:(.*)") == "yes"
    assert extract_answer("nothing", r"\(([A-D])\)") is None


def test_the_first_group_that_took_part_is_the_answer() -> None:
    either = r"#### (\d+)|answer is (\w+)"
    assert extract_answer("the answer is yes", either) == "yes"
    assert extract_answer("the answer is yes #### 5", either) == "5"
    assert extract_answer("b", r"(a)?b") is None
    # A match of nothing, such as the one at the end of every text, is none.
    assert extract_answer("w12 w", r"\d*") == "12"


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:answer|Answer)(?: is|:)\s*\(?([A-D])", r"\\boxed\{(.*?)\}", r"x{e}", r"[[:alpha:]]", r"\w{2,3}?",
        r"(?i)W1\b", r"[/INST]", r"(a)|(1)", r"(?m)^w\d$", r"\d*", "[]a]+", r"(?P<n>\d)(?P=n)",
    ],
)  # fmt: skip
def test_patterns_match_as_in_re(pattern: str) -> None:
    texts = [
        "The answer is (B), Answer: C",
        r"\boxed{w1} \boxed{}",
        "x{e} xx",
        "[:alpha:]] a] w1\nw2\nW1",
        "1122 a",
        "",
    ]
    check_pattern("config", pattern, 64, texts)
    for text in texts:
        found = [(match.span(), match.groups()) for match in find_all("task", pattern, text)]
        assert found == [(match.span(), match.groups()) for match in re.finditer(pattern, text)]


def test_a_pattern_without_an_end_is_given_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    pattern, slow = r"(.*?,){25}P", [",".join(map(str, range(40 + i))) for i in range(3)]
    check_pattern("config", pattern, 64, ["1, 2"])
    for _ in range(2):
        assert extract_answer(slow[0], pattern, "task t") is None
    assert extract_answer("1," * 25 + "P", pattern) == "1,"
    assert extract_answer(slow[1], pattern, "task t") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: task t: pattern: {pattern!r} takes more than ")
    with pytest.raises(InputError, match=r"task t: pattern: .* 3 outputs"):
        extract_answer(slow[2], pattern, "task t")
    with pytest.raises(InputError, match=r"config: pattern: .* takes more than"):
        check_pattern("config", pattern, 64, slow)


@pytest.mark.parametrize(
    ("found", "wanted", "pattern", "same"),
    [
        ("42", "42", None, True),
        ("42.0", "42", None, True),
        ("42", "worked out #### 42", None, True),
        ("1234", "1,234", None, True),
        ("-3", "3", None, False),
        ("43", "42", None, False),
        ("9007199254740993", "9007199254740992", None, False),
        ("9" * 5000, "9" * 5000, None, True),
        ("9" * 5000, "8" * 5000, None, False),
        (None, "42", None, False),
        ("42", "no number", None, False),
        ("B", "B", r"[A-D]", True),
        ("B", " B\n", r"[A-D]", True),
        ("042", "42", r"\d+", False),
    ],
)
def test_answers_compare_as_numbers_or_text(found: str | None, wanted: str, pattern: str | None, same: bool) -> None:
    assert same_answer(found, wanted, pattern) is same


def test_text_ends_at_the_first_stop() -> None:
    assert TaskRequests(stop=("###", "\nQ:")).cut("5 \nQ: 6 ### 7") == "5 "
    assert TaskRequests(stop=("###",)).cut("5 6") == "5 6"
    assert TaskRequests().cut("5 6") == "5 6"


def test_outputs_are_scored_per_candidate_and_example() -> None:
    examples = [Example("q", ("4",), "4", 1), Example("q", ("1,000",), "1,000", 2)]
    task = task_of("exact_match", examples)
    texts = [["it is 4", "1000.0"], ["it is 9", "10"], ["", "#### 1,000"]]
    found = task.score(Responses(np.zeros((3, 0)), np.zeros(0), np.zeros((3, 0)), texts))["accuracy"]
    np.testing.assert_array_equal(found, [[1, 1], [0, 0], [0, 1]])
    assert found.dtype == np.float32
