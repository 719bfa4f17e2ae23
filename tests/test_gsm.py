"""Worked problems: prompts, answers and scores against the lm-eval harness's own; languages; sources of records."""

import random
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from datasets import Dataset
from helpers.files import write_lines
from helpers.models import SPECIAL, word_tokenizer
from lm_eval.api.task import ConfigurableTask
from tokenizers.processors import TemplateProcessing

from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import TaskFile
from evojax_merge.errors import InputError
from evojax_merge.system.data_packages import PackageUnavailable
from evojax_merge.system.jinja_process import render_chat
from evojax_merge.tasks import records
from evojax_merge.tasks.gsm import MGSM, STYLES, GsmConfig, GsmTask, WordProblem, find_answer, read_problem
from evojax_merge.tasks.language import language_of
from evojax_merge.tasks.opening import open_task, open_whole_task, resolved_config
from evojax_merge.tasks.records import Record, by_split, read_source
from evojax_merge.tasks.task import Responses

Fields = dict[str, Any]

GSM8K: list[Fields] = [
    {"question": f"Tom has {a} pens and buys {b}. How many?", "answer": f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {n}"}
    for a, b, n in ((2, 3, "5"), (10, 8, "18"), (1000, 80, "1,080"), (3, -8, "-5"), (1, 0.5, "1.5"), (700, 0, "700"))
]
NUMBERS = (5, 18, 1080, -5, 15, 700)


def mgsm(language: str, answer: str | None = None) -> list[Fields]:
    """Records as MGSM has them: the training ones with labels of the language."""
    question, label, _ = MGSM[language]
    return [
        {
            "question": f"Q{number}?" if answer is None else f"{question} Q{number}?",
            "answer": None if answer is None else f"{label} {answer} {number}.",
            "answer_number": number,
            "equation_solution": None,
        }
        for number in NUMBERS
    ]


def gsm_task(tmp_path: Path, docs: Sequence[Fields], **keys: Any) -> GsmTask:
    config = GsmConfig(name="gsm", kind="gsm", source=str(write_lines(tmp_path / "docs.jsonl", docs)), **keys)
    task = open_whole_task("tasks[0]", config, tmp_path)
    assert isinstance(task, GsmTask)
    return task


def score(task: GsmTask, texts: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    nothing = np.zeros((len(texts), 0), np.float32)
    return task.score(Responses(nothing, np.zeros(0, int), nothing.astype(bool), [list(row) for row in texts]))


# ---------------------------------------------------------------------------------------------------------------
# Against the harness


def harness_task(path: str, docs: Sequence[Fields], fewshot_examples: Sequence[Fields] = ()) -> ConfigurableTask:
    """One of the harness's own tasks, by its file, on other data and with the first of the shots in order."""

    def read(file: Path) -> Fields:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        include = found.pop("include", None)
        return {**(read(file.parent / include) if include else {}), **found}

    config = read(Path(lm_eval.__file__).parent / "tasks" / path)
    config = {key: value for key, value in config.items() if key not in ("tag", "dataset_path", "fewshot_config")}
    data = {
        config.get("training_split", "train"): Dataset.from_list(list(fewshot_examples or docs)),
        "test": Dataset.from_list(docs),
    }
    config |= {"custom_dataset": lambda **_: data, "num_fewshot": len(fewshot_examples)}
    if fewshot_examples:
        config |= {"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
    return ConfigurableTask(config=config)


def harness_scores(task: ConfigurableTask, texts: Sequence[str]) -> dict[str, list[float]]:
    """Filter -> scores, of one output per document."""
    task.build_all_requests(limit=None, rank=0, world_size=1)
    for instance, text in zip(task.instances, texts, strict=True):
        instance.resps = [text]
    task.apply_filters()
    return {
        name: [
            float(task.process_results(instance.doc, [instance.filtered_resps[name]])["exact_match"])
            for instance in task.instances
        ]
        for name in task.instances[0].filtered_resps
    }


FORMS = (
    "{n}", "${n}", "{n}.", "{n}.0", "{n}.00", "{n},", "-{n}", "{n}%", "**{n}**", "\\boxed{{{n}}}", " {n} ", "{n}\n",
    "{n} dollars.", "１８", "eighteen", "", ".", ",", "$", "-", "..", "{n}..", "{n}-{n}", "{n}/{n}", "{n} or 7",
)  # fmt: skip
FRAMES = (
    "{}", "#### {}", "####{}", "####  {}", "#### {}\n#### 7", "#### 7\n#### {}", "2+3=<<2+3=5>>5. {}", "#### x{}",
    "The answer is {}", "The answer is {}. The answer is 7.", "the ANSWER IS {}.", "a {} b", "A.{}", "$1,2{}",
)  # fmt: skip


def outputs(docs: Sequence[Fields], phrase: str) -> list[str]:
    """Texts such as models write them, one for each document, with its number or another, often with `phrase`."""
    rng = random.Random(0)
    numbers = [str(doc.get("answer_number") or doc["answer"].split()[-1]) for doc in docs]
    texts = []
    for number in numbers:
        form = rng.choice(FORMS[:6] if rng.random() < 0.5 else FORMS)
        frame = phrase if rng.random() < 0.5 else rng.choice(FRAMES)
        texts.append(frame.format(form.format(n=rng.choice([number, number, *numbers[:8]]))))
    return texts


CASES = [
    ("gsm8k/gsm8k.yaml", "gsm8k", GSM8K),
    ("gsm8k/gsm8k-cot.yaml", "gsm8k_cot", GSM8K),
    *((f"mgsm/native_cot/mgsm_native_cot_{code}.yaml", f"mgsm_{code}", mgsm(code)) for code in MGSM),
    *((f"mgsm/en_cot/mgsm_en_cot_{code}.yaml", "mgsm_en", mgsm(code)) for code in ("ja", "en")),
    *((f"mgsm/direct/mgsm_direct_{code}.yaml", f"mgsm_{code}", mgsm(code)) for code in ("ja", "de")),
]


@pytest.mark.parametrize(("path", "style", "docs"), CASES, ids=[path for path, _, _ in CASES])
def test_answers_are_found_and_compared_as_by_the_harness(
    path: str, style: str, docs: list[Fields], tmp_path: Path
) -> None:
    many = docs * (60 if docs is GSM8K else 20)
    texts = outputs(many, STYLES[style].strict.replace(r"(\-?[0-9\.\,]+)", "{}"))
    wanted = harness_scores(harness_task(path, many), texts)
    task = gsm_task(tmp_path, many, style=style)
    found = score(task, [texts])
    for name, metric in (("strict-match", "strict"), ("flexible-extract", "flexible")):
        if name in wanted:
            differing = [text for text, a, b in zip(texts, found[metric][0], wanted[name], strict=True) if a != b]
            assert not differing
            assert 0 < sum(wanted[name]) < len(texts)
    if "strict-match" in wanted:
        np.testing.assert_array_equal(found["accuracy"], found["strict"])
    flexible = gsm_task(tmp_path, many, style=style, match="flexible")
    np.testing.assert_array_equal(score(flexible, [texts])["accuracy"], found["flexible"])


@pytest.mark.parametrize(
    ("path", "docs", "fewshot_examples"),
    [
        ("gsm8k/gsm8k.yaml", GSM8K[2:], GSM8K[:2]),
        *(
            (f"mgsm/native_cot/mgsm_native_cot_{code}.yaml", mgsm(code), mgsm(code, "text")[:2])
            for code in ("bn", "de", "en", "fr", "ja")
        ),
    ],
)
@pytest.mark.parametrize("count", [0, 2])
def test_prompts_are_those_of_the_harness(
    path: str, docs: list[Fields], fewshot_examples: list[Fields], count: int, tmp_path: Path
) -> None:
    theirs = harness_task(path, docs, fewshot_examples[:count])
    theirs.build_all_requests(limit=None, rank=0, world_size=1)
    code = path.removesuffix(".yaml")[-2:]
    keys: dict[str, Any] = {"language": code} if code in MGSM else {}
    if count:
        keys |= {"num_fewshot": count, "fewshot_source": str(write_lines(tmp_path / "shots.jsonl", fewshot_examples))}
    ours = gsm_task(tmp_path, docs, **keys)
    assert [ours.text(problem) for problem in ours.problems] == [instance.args[0] for instance in theirs.instances]
    until = theirs.instances[0].args[1]["until"]
    assert list(ours.style.stop) == until


# ---------------------------------------------------------------------------------------------------------------
# Chats

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def chat_tokenizer(docs: Sequence[Fields], template: str | None = TEMPLATE) -> Any:
    """Words of the documents; every text begins with <s>, as Llama's do."""
    text = " ".join(word for doc in docs for word in (doc["question"] + " " + doc["answer"]).split())
    roles = ("<user>", "<assistant>", "<system>", "Question:", "Answer:", "Think.")
    tokenizer = word_tokenizer([*SPECIAL, *roles, *sorted(set(text.split()))])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = template
    return tokenizer


def test_chats_are_the_models_own_with_one_beginning_of_sequence(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(GSM8K)
    keys = {"num_fewshot": 2, "apply_chat_template": True, "system_instruction": "Think."}
    task = gsm_task(tmp_path, GSM8K, **keys)
    requests = task.requests(tokenizer, 1000)
    assert len(requests.prompts) == len(GSM8K) - 2

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    for row, doc in zip(requests.prompts, GSM8K[2:], strict=True):
        turns = [turn("system", "Think.")]
        for shot in GSM8K[:2]:
            turns += [turn("user", f"Question: {shot['question']}\nAnswer:"), turn("assistant", shot["answer"])]
        turns.append(turn("user", f"Question: {doc['question']}\nAnswer:"))
        wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert list(row.tokens) == wanted
        assert row.tokens.count(tokenizer.bos_token_id) == 1
        assert row.start == len(row.tokens)
    theirs = harness_task("gsm8k/gsm8k.yaml", GSM8K[2:], GSM8K[:2])
    theirs.build_all_requests(
        limit=None, rank=0, world_size=1, system_instruction="Think.", apply_chat_template=True,
        fewshot_as_multiturn=True, chat_template=partial(tokenizer.apply_chat_template, tokenize=False),
    )  # fmt: skip
    wanted = [tokenizer(instance.args[0], add_special_tokens=False)["input_ids"] for instance in theirs.instances]
    assert [list(row.tokens) for row in requests.prompts] == wanted
    plain = gsm_task(tmp_path, GSM8K).requests(tokenizer, 1000).prompts[0].tokens
    assert plain.count(tokenizer.bos_token_id) == 1


def test_what_prompts_share_is_the_header_of_examples(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(GSM8K)
    task = gsm_task(tmp_path, GSM8K, num_fewshot=2)
    rows = [row.tokens for row in task.requests(tokenizer, 1000).prompts]
    header = tokenizer("".join(f"Question: {d['question']}\nAnswer: {d['answer']}\n\n" for d in GSM8K[:2]))["input_ids"]
    assert all(list(tokens[: len(header)]) == header for tokens in rows)
    # The first of the records are examples and are not scored, whatever part is taken.
    assert [problem.number for problem in task.subset([0, 3]).problems] == ["1,080", "700"]


def test_a_tokenizer_without_a_chat_template_or_with_a_fussy_one_is_refused(tmp_path: Path) -> None:
    task = gsm_task(tmp_path, GSM8K, apply_chat_template=True, system_instruction="Think.")
    with pytest.raises(InputError, match="no chat template"):
        task.requests(chat_tokenizer(GSM8K, template=None), 1000)
    with pytest.raises(InputError, match="no system, please"):
        task.requests(chat_tokenizer(GSM8K, template="{{ raise_exception('no system, please') }}"), 1000)


def test_a_template_that_takes_too_much_is_ended_and_the_next_is_rendered(tmp_path: Path) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    task = gsm_task(tmp_path, GSM8K, apply_chat_template=True)
    for template, message in (
        ("{{ 'a' * 10**9 }}", "512 MiB"),
        (loop, "more than 2 s"),
        ("{{ 'a' * 10**7 }}", "10,000,000"),
    ):
        with pytest.raises(InputError, match=message):
            task.requests(chat_tokenizer(GSM8K, template=template), 1000)
    long = [{"role": "user", "content": "w" * 10**6}]
    tokenizer = chat_tokenizer(GSM8K)
    expected = tokenizer.apply_chat_template(long, tokenize=False, add_generation_prompt=True)
    assert render_chat(TEMPLATE, tokenizer, long, add_generation_prompt=True) == expected


# ---------------------------------------------------------------------------------------------------------------
# Languages

ENGLISH = "First he had two apples, then he bought three more, so he has five apples in the end."
JAPANESE = "最初にりんごが2個ありました。さらに3個買ったので、全部で5個になります。"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_an_answer_counts_only_with_its_reasoning_in_the_wanted_language(tmp_path: Path, no_network: None) -> None:
    texts = [
        f"{JAPANESE}\n#### 5", f"{ENGLISH}\n#### 5", f"{JAPANESE}\n#### 6", "#### 5",
        f"\\begin{{align}} 2 + 3 &= 5 \\end{{align}} {JAPANESE} <<2+3=5>> \\boxed{{5}}\n#### 5",
    ]  # fmt: skip
    task = gsm_task(tmp_path, [GSM8K[0]] * len(texts), language="ja")
    found = score(task, [texts, [JAPANESE] * len(texts)])
    assert found["strict"].tolist() == [[1, 1, 0, 1, 1], [0] * 5]
    assert found["language"].tolist() == [[1, 0, 1, 0, 1], [1] * 5]
    assert found["accuracy"].tolist() == [[1, 0, 0, 0, 1], [0] * 5]
    assert all(matrix.dtype == np.float32 for matrix in found.values())
    assert "language" not in score(gsm_task(tmp_path, [GSM8K[0]]), [["#### 5"]])


@pytest.mark.parametrize(
    "text", ["", "#### 18", "12 + 3 = 15 %", "\\frac{1}{2} \\cdot 3", "<<1+1=2>>", "答えは5です。"]
)
def test_a_bare_answer_is_in_no_language(text: str) -> None:
    assert language_of(text) is None


def or_skip(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except PackageUnavailable as error:
        pytest.skip(str(error))


CODES = {"jpn": "ja", "eng": "en", "zho": "zh", "deu": "de", "fra": "fr", "rus": "ru", "swh": "sw", "tel": "te"}


@pytest.mark.parametrize("code", CODES)
def test_worked_answers_are_told_apart(code: str) -> None:
    source = or_skip(lambda: read_source(f"gsm-symbolic:{code}"))
    found = [language_of(record.fields["answer"]) for record in source.records]
    assert found.count(CODES[code]) >= 0.97 * len(found)


# ---------------------------------------------------------------------------------------------------------------
# Sources


def test_problems_of_the_package_are_read_in_any_language_with_numbers_as_answers() -> None:
    for code, count in (("eng", 100), ("jpn", 100), ("hin", 100), ("tam", 93), ("hrv", 2)):
        source = or_skip(lambda code=code: read_source(f"gsm-symbolic:{code}"))
        problems = [read_problem(record) for record in source.records]
        assert len(problems) == count
        style = STYLES["gsm8k"]
        assert all(find_answer(style, "strict", problem.answer or "") == problem.number for problem in problems)
        # A worked answer is itself a right output.
        task = GsmTask("gsm", 1.0, (), tuple(problems), style, "strict")
        assert score(task, [[problem.answer or "" for problem in problems]])["strict"].all()
    with pytest.raises(InputError, match=r"^gsm-symbolic:ja: unknown language; the package has .*jpn"):
        read_source("gsm-symbolic:ja")


def test_jsonl_parquet_and_a_data_set_in_the_hubs_cache_are_read_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines(tmp_path / "test.jsonl", GSM8K)
    table = pyarrow.Table.from_pylist(GSM8K)
    pyarrow.parquet.write_table(table, tmp_path / "test.parquet")
    parts = {"main/test": GSM8K, "main/train": GSM8K[:1], "socratic/test": GSM8K}
    cached = cache_data_set(tmp_path, monkeypatch, parts)
    sources = [lines, tmp_path / "test.parquet", "hub:openai/gsm8k/main:test"]
    read = [[read_problem(record) for record in read_source(source).records] for source in sources]
    assert [[p.question for p in problems] for problems in read] == [[doc["question"] for doc in GSM8K]] * 3
    assert [[p.number for p in problems] for problems in read] == [["5", "18", "1,080", "-5", "1.5", "700"]] * 3
    assert read_source(sources[2]).files == (cached / "main/test-00000-of-00001.parquet",)
    assert "row 0" in read_source(sources[1]).records[0].where
    with pytest.raises(InputError, match=r"more than one config; say which of main, socratic"):
        read_source("hub:openai/gsm8k:test")
    with pytest.raises(InputError, match=r"no split 'validation' \(known: test, train\)"):
        read_source("hub:openai/gsm8k/main:validation")
    with pytest.raises(InputError, match="more than one split; say which of test, train"):
        read_source("hub:openai/gsm8k/main")


def cache_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: dict[str, list[Fields]]) -> Path:
    """A data set as the hub's client keeps one that was fetched before."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "datasets--openai--gsm8k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    for name, docs in parts.items():
        file = snapshot / f"{name}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(docs), file)
    (snapshot / "README.md").write_text("# GSM8K")
    return snapshot


def test_a_data_set_without_parquet_files_is_read_from_the_hubs_converted_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[tuple[str, str | None]] = []

    class Api:
        def list_repo_files(self, repository: str, repo_type: str, revision: str | None) -> list[str]:
            assert repo_type == "dataset"
            return ["mgsm.py", "mgsm_ja.tsv"] if revision is None else ["ja/test/0000.parquet", "ja/train/0000.parquet"]

    def download(repository: str, name: str, repo_type: str, revision: str | None) -> str:
        requests.append((name, revision))
        return str(file)

    file = tmp_path / "0000.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(mgsm("ja")), file)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    source = read_source("hub:juletxara/mgsm/ja:test")
    assert requests == [("ja/test/0000.parquet", records.CONVERTED)]
    assert [read_problem(record).number for record in source.records] == [str(number) for number in NUMBERS]


def test_files_on_the_hub_are_grouped_by_config_and_split() -> None:
    names = [
        "README.md", "data/train-00001-of-00002-abc.parquet", "data/train-00000-of-00002-abc.parquet",
        "data/test.jsonl", "main/test-00000-of-00001.parquet", "ja/train/0000.parquet", "ja/train/0001.parquet",
        "validation.jsonl",
    ]  # fmt: skip
    assert by_split(names) == {
        ("", "train"): ["data/train-00000-of-00002-abc.parquet", "data/train-00001-of-00002-abc.parquet"],
        ("", "test"): ["data/test.jsonl"],
        ("main", "test"): ["main/test-00000-of-00001.parquet"],
        ("ja", "train"): ["ja/train/0000.parquet", "ja/train/0001.parquet"],
        ("", "validation"): ["validation.jsonl"],
    }


def test_a_data_set_that_is_neither_reachable_nor_cached_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"^hub:openai/gsm8k/main:test: the hub did not give it, and no copy") as error:
        read_source("hub:openai/gsm8k/main:test")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------
# Configs


def test_examples_are_shown_and_never_scored_in_neither_split(tmp_path: Path) -> None:
    searched = write_lines(tmp_path / "searched.jsonl", GSM8K[:4])
    heldout = write_lines(tmp_path / "heldout.jsonl", [GSM8K[1], *GSM8K[4:]])
    keys = {"source": "searched.jsonl", "heldout": "heldout.jsonl", "num_fewshot": 2, "prompt": "{question} = "}
    document = {"tasks": [{"name": "gsm", "kind": "gsm", "stop": []} | keys]}
    (config,) = parse(tmp_path / "search.yaml", document, TaskFile).tasks
    search, held_out = open_task("tasks[0]", config, tmp_path, seed=0)
    assert isinstance(search, GsmTask) and isinstance(held_out, GsmTask)
    assert [problem.number for problem in search.problems] == ["1,080", "-5"]
    assert [problem.number for problem in held_out.problems] == ["1.5", "700"]
    assert search.fewshot_examples == held_out.fewshot_examples and len(search.fewshot_examples) == 2
    assert held_out.files == (heldout, searched) and search.files == (searched,)
    # From wherever the run's config is read again, it names the same files.
    kept = resolved_config(config, search, held_out)
    assert (kept["source"], kept["heldout"], kept["fewshot_source"]) == (str(searched), str(heldout), None)
    shown = config.model_copy(update={"fewshot_source": "searched.jsonl", "heldout": 0.5})
    kept = resolved_config(shown, *open_task("tasks[0]", shown, tmp_path, seed=0))
    assert (kept["source"], kept["heldout"], kept["fewshot_source"]) == (str(searched), 0.5, str(searched))
    first = GSM8K[0]
    assert search.text(search.problems[0]).startswith(f"{first['question']} = {first['answer']}\n\n")
    assert search.style.stop == ()
    # A share of one source: what is held out is what is left.
    halves = open_task("tasks[0]", config.model_copy(update={"heldout": 0.5}), tmp_path, seed=0)
    assert sorted(problem.number for half in halves for problem in half.problems) == ["-5", "1,080"]  # type: ignore[attr-defined]


def test_an_answer_that_is_never_found_is_named() -> None:
    problem = WordProblem("?", None, "5", "here")
    task = GsmTask("gsm", 1.0, (), (problem,), STYLES["gsm8k"], "strict")
    assert task.extraction_failure(["5", "#### "]) == r"the pattern '#### (\\-?[0-9\\.\\,]+)'"
    assert task.extraction_failure(["five", "#### 5"]) is None
    assert task.target(0) == task.problems[0].number
    assert task.extracted(0, ["4 or #### 5"]) == "5" and task.extracted(0, ["5"]) is None
    flexible = GsmTask("gsm", 1.0, (), (problem,), STYLES["gsm8k"], "flexible")
    assert flexible.extraction_failure(["five"]) == "a number"
    assert flexible.extraction_failure(["5"]) is None


@pytest.mark.parametrize(
    ("doc", "message"),
    [
        ({"problem": "?", "answer": "#### 1"}, "docs.jsonl:2: question: expected a text, found None"),
        ({"question": " ", "answer": "#### 1"}, "docs.jsonl:2: question: expected a text"),
        ({"question": "?"}, "docs.jsonl:2: has neither answer nor answer_number"),
        ({"question": "?", "answer": "five"}, "docs.jsonl:2: answer: 'five' is not a number; expected a worked answer"),
        ({"question": "?", "answer": "x #### 41/5"}, "docs.jsonl:2: answer: '41/5' is not a number"),
        ({"question": "?", "answer": True}, "docs.jsonl:2: answer: expected a worked answer"),
        ({"question": "?", "answer": None, "answer_number": "many"}, "answer_number: 'many' is not a number"),
    ],
)
def test_a_bad_record_is_named_with_its_line(tmp_path: Path, doc: Fields, message: str) -> None:
    with pytest.raises(InputError) as error:
        gsm_task(tmp_path, [GSM8K[0], doc])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"language": "jp"}, "language: unknown language 'jp'; expected an ISO 639 code of: ace, af,"),
        ({"style": "gsm"}, "style: unknown style 'gsm' (did you mean 'gsm8k'?)"),
        ({"num_fewshot": 7}, "num_fewshot: 7; "),
        ({"num_fewshot": 6}, "num_fewshot: 6; leaves no problem"),
        ({"pattern": r"(\d+)"}, "pattern: '(\\\\d+)' finds '2' in the worked answer of "),
        ({"pattern": "(["}, "pattern: '([' is not a regular expression"),
        ({"prompt": "Q:"}, "prompt: expected {question} where the problem goes"),
        ({"system_instruction": "Think."}, "system_instruction: a turn of a chat"),
        ({"fewshot_source": "docs.jsonl"}, "fewshot_source: say num_fewshot"),
        ({"match": "loose"}, "match"),
        ({"source": "nowhere.jsonl"}, "source: nowhere.jsonl: no such file"),
        ({"source": "hub:gsm8k"}, "hub:gsm8k: expected hub:owner/dataset"),
        ({"source": "hub:openai/gsm8k/main:test"}, "on_test_set: hub:openai/gsm8k/main:test is a benchmark"),
        ({"nshots": 2}, "nshots: unknown key"),
    ],
)
def test_what_a_config_cannot_mean_is_refused_in_one_line(tmp_path: Path, keys: Fields, message: str) -> None:
    write_lines(tmp_path / "docs.jsonl", GSM8K)
    document = {"tasks": [{"name": "gsm", "kind": "gsm", "source": "docs.jsonl"} | keys]}
    with pytest.raises(InputError) as error:
        open_task("tasks[0]", parse(tmp_path / "search.yaml", document, TaskFile).tasks[0], tmp_path, seed=0)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_worked_examples_need_their_working(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"docs.jsonl:1: has no worked answer to show"):
        gsm_task(tmp_path, mgsm("ja"), num_fewshot=1)


@pytest.mark.parametrize("answers", [{"answer": None, "answer_number": 18.0}, {"answer": 18}, {"answer": 18.0}])
def test_numbers_are_read_like_their_texts(answers: Fields) -> None:
    """Whole ones that became floats are whole again."""
    assert read_problem(Record("here", {"question": "?", **answers})).number == "18"
