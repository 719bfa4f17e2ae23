"""Tasks of the lm-eval harness: our scores against those of its own `hf` model, and what is refused."""

import itertools
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from helpers.families import Family
from helpers.files import read_json, read_lines, write_lines, write_yaml
from helpers.models import random_model, save, tiny_config, words
from helpers.sampling import ALL
from helpers.searches import open_problem, search_config
from lm_eval.tasks import TaskManager

from evojax_merge.backends.decoder.opening import stop_tokens
from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.commands import evaluate as evaluate_command
from evojax_merge.errors import InputError
from evojax_merge.evaluation.batched_tasks import batch_tasks
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.problem import resolved_document
from evojax_merge.tasks import patterns, task_folders
from evojax_merge.tasks.harness import HarnessConfig, HarnessTask, is_benchmark, open_task
from evojax_merge.tasks.opening import open_whole_task
from evojax_merge.tasks.task import Opening, Responses

CONTEXT = 48
FEWSHOT = {"num_fewshot": 2, "fewshot_split": "train", "fewshot_config": {"sampler": "default"}}


def _text(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(words()[i] for i in rng.integers(4, 64, int(rng.integers(low, high))))


def _records(seed: int, count: int, model: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        question = _text(rng, 2, 9)
        tokens = torch.tensor([[words().index(word) for word in question.split()]])
        written = model.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :]
        likely = [words()[token] for token in written.tolist()]
        records.append({
            # White space at the end of a context goes to the target.
            "question": question, "spaced": question + "  ",
            # Every other target is what the model would write.
            "target": " ".join(likely[:2]) if number % 2 else _text(rng, 1, 5),
            "choices": [likely[0], *(_text(rng, 1, 4) for _ in range(3))],
            "gold": int(rng.integers(4)), "last": likely[-1],
            # Some need several windows of the context.
            "long": _text(rng, 3, 3 * CONTEXT),
        })  # fmt: skip
    return records


@pytest.fixture(scope="session")
def harness_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task YAMLs of all kinds of requests, the data that they name, and a `model`."""
    folder = tmp_path_factory.mktemp("harness")
    model = random_model(tiny_config(max_position_embeddings=CONTEXT, tie_word_embeddings=True), seed=3)
    save(model, folder / "model")
    files = {
        split: str(write_lines(folder / f"{split}.jsonl", _records(seed, count, model)))
        for split, seed, count in (("train", 1, 12), ("test", 2, 10))
    }
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    data |= {"training_split": "train", "test_split": "test"}
    mean = {"aggregation": "mean", "higher_is_better": True}
    brier = {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}
    pick = [{"function": "regex", "regex_pattern": r"w(\d)", "group_select": -1}, {"function": "take_first"}]
    first = [{"function": "regex", "regex_pattern": r"the answer is (w\d+)"}, {"function": "take_first"}]
    tasks: dict[str, dict[str, Any]] = {
        "own_loglikelihood": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{spaced}}",
            "doc_to_target": "{{target}}",
            "target_delimiter": "",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", **mean},
            ],
        },
        "own_choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": "gold",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean},
                            {"metric": "acc_mutual_info", **mean}, brier],
            **FEWSHOT,
        },
        "own_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{long}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        "own_generation": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{last[1]}}",
            "generation_kwargs": {"until": ["w9", "w1"], "max_gen_toks": 12},
            "filter_list": [{"name": "flexible", "filter": pick}, {"name": "strict", "filter": first}],
            "metric_list": [{"metric": "exact_match", **mean, "ignore_case": True}],
            **FEWSHOT,
        },
    }  # fmt: skip
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **task}, sort_keys=False))
    group = {"group": "own_group", "task": ["own_choices", "own_rolling"]}
    write_yaml(folder / "own_group.yaml", group)
    return folder


NAMES = ("own_loglikelihood", "own_choices", "own_rolling", "own_generation")


@dataclass(frozen=True)
class Scored:
    """One task, by the harness's own `hf` model and by us."""

    results: dict[str, float]
    samples: list[dict[str, Any]]
    task: HarnessTask
    answers: Responses
    scores: dict[str, np.ndarray]
    outputs: list[str]


def score_both(model: Path, folder: Path, names: Sequence[str], context: int, **options: Any) -> dict[str, Scored]:
    from lm_eval.models.huggingface import HFLM

    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(model), batch_size=1, device="cpu", dtype="float32"),
        tasks=list(names), task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0, **options,
    )  # fmt: skip
    tasks = [open_own(folder, name, **options) for name in names]
    sources, config = open_sources([model])
    tokenizer = load_tokenizer(model)
    (batched_tasks,) = batch_tasks([tasks], tokenizer, 4096, context, stop_tokens(model, tokenizer))
    seen: dict[str, Responses] = {}
    # What the evaluator hands to a task is recorded on its way.
    spies = [replace(request, task=Spy(request.task, seen)) for request in batched_tasks]
    scores = Evaluator(config, tokenizer, spies).score_stored(load_stored(sources, config, 0, "float32"))
    return {
        name: Scored(
            theirs["results"][name], theirs["samples"][name], task, seen[name], scores.matrices[name],
            scores.outputs.get(name, [[]])[0],
        )
        for name, task in zip(names, tasks, strict=True)
    }  # fmt: skip


@dataclass(frozen=True)
class Spy:
    task: Any
    seen: dict[str, Responses]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def score(self, answers: Responses) -> dict[str, np.ndarray]:
        self.seen[self.task.name] = answers
        return self.task.score(answers)


@pytest.fixture(scope="session")
def scored(harness_tasks: Path) -> dict[str, Scored]:
    return score_both(harness_tasks / "model", harness_tasks, NAMES, CONTEXT)


def responses(sample: dict[str, Any]) -> list[Any]:
    """What the `hf` model answered to an example's requests."""
    return [response[0] for response in sample["resps"]]


@pytest.mark.parametrize("name", NAMES[:3])
def test_log_likelihoods_are_those_of_the_hf_model(name: str, scored: dict[str, Scored]) -> None:
    answers, samples = scored[name].answers, scored[name].samples[: scored[name].task.size]
    theirs = [response for sample in samples for response in responses(sample)]
    if name == "own_rolling":
        windows = [scored[name].task.source.rows[i][0] for i in range(len(samples))]
        assert max(windows) > 2
        edges = np.cumsum([0, *windows])
        ours = [answers.totals[0, a:b].sum() for a, b in itertools.pairwise(edges)]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-3)
        return
    np.testing.assert_allclose(answers.totals[0], [total for total, _ in theirs], rtol=1e-5, atol=1e-3)
    greedy = [is_greedy for _, is_greedy in theirs]
    assert answers.greedy[0].tolist() == greedy
    assert len(set(greedy)) == 2


def test_generations_are_those_of_the_hf_model(scored: dict[str, Scored]) -> None:
    case = scored["own_generation"]
    theirs = [responses(sample)[0] for sample in case.samples if sample["filter"] == "flexible"]
    assert case.outputs == theirs
    # Stop texts and the limit both end some.
    assert len({len(text.split()) for text in theirs}) > 2


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_is_the_harness_s_own(name: str, scored: dict[str, Scored]) -> None:
    """Example by example, and as the harness adds them up."""
    case = scored[name]
    expected = {key for key in case.results if "," in key and "stderr" not in key} - {"brier_score,none"}
    assert set(case.scores) == expected
    for key, matrix in case.scores.items():
        metric, _, pipeline = key.partition(",")
        mean, total = float(matrix[0].mean(dtype=np.float64)), case.results[key]
        if "perplexity" in metric:
            assert np.exp(-mean) == pytest.approx(total, rel=1e-4)
        elif metric == "bits_per_byte":
            assert -mean == pytest.approx(total, rel=1e-5)
        else:
            samples = [sample for sample in case.samples if sample["filter"] == pipeline]
            assert matrix[0].tolist() == [float(sample[metric]) for sample in samples]
            assert mean == pytest.approx(total, abs=1e-6)
    assert any(0 < matrix.mean() < 1 for matrix in case.scores.values()) or name == "own_rolling"


def test_a_chat_template_and_a_system_s_instruction_are_the_harness_s(harness_tasks: Path, tmp_path: Path) -> None:
    """The models' own template; here one that knows a system and ends each turn with a word."""
    model = tmp_path / "chat"
    shutil.copytree(harness_tasks / "model", model)
    template = "{% for m in messages %}w{{ 10 + m['role'] | length }} {{ m['content'] }} w11 {% endfor %}"
    (model / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}w13 {% endif %}")
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "w7 w8"}
    case = score_both(model, harness_tasks, ["own_choices"], CONTEXT, **options)["own_choices"]
    theirs = [total for sample in case.samples for total, _ in responses(sample)]
    np.testing.assert_allclose(case.answers.totals[0], theirs, rtol=1e-5, atol=1e-3)
    with pytest.raises(InputError, match=r"apply_chat_template: the tokenizer of .*model has no chat template"):
        case.task.requests(load_tokenizer(harness_tasks / "model"), CONTEXT)


def test_the_question_is_shared_by_its_choices_and_the_shots_by_all(harness_tasks: Path) -> None:
    task = open_own(harness_tasks, "own_choices")
    rows = task.requests(load_tokenizer(harness_tasks / "model"), CONTEXT).scored
    # Four choices, and each again without the question, for acc_mutual_info.
    assert [row.example for row in rows] == [example for example in range(10) for _ in range(8)]
    for example in range(10):
        first, *others = [row for row in rows if row.example == example][:4]
        assert first.start > 2
        assert all(row.tokens[: row.start] == first.tokens[: first.start] for row in others)


def test_candidates_are_scored_each_by_its_own_answers(scored: dict[str, Scored]) -> None:
    """Several candidates at once, some of which agree, and one that has no number."""
    choices, generation = scored["own_choices"], scored["own_generation"]
    one = choices.answers
    mirrored = -one.totals
    broken = np.where(np.arange(one.totals.shape[1]) == 8, np.nan, one.totals)
    rows = np.concatenate([one.totals, mirrored, one.totals, broken]).astype(np.float32)
    several = replace(one, totals=rows, greedy=np.repeat(one.greedy, 4, axis=0), texts=[[]] * 4)
    matrices = choices.task.score(several)
    for key, matrix in matrices.items():
        alone = [choices.task.score(replace(one, totals=row[None]))[key] for row in rows]
        np.testing.assert_array_equal(matrix, np.concatenate(alone))
        assert np.flatnonzero(np.isnan(matrix[3])).tolist() == [1]
        np.testing.assert_array_equal(matrix[0], matrix[2])
    assert (matrices["acc,none"][0] != matrices["acc,none"][1]).any()
    texts = generation.outputs
    two = replace(generation.answers, totals=np.zeros((2, 0), np.float32), greedy=np.zeros((2, 0), bool),
                  texts=[texts, ["the answer is w1"] * len(texts)])  # fmt: skip
    both = generation.task.score(two)
    np.testing.assert_array_equal(both["exact_match,flexible"][0], generation.scores["exact_match,flexible"][0])
    assert both["exact_match,strict"][0].tolist() == [0.0] * len(texts)
    assert set(both["exact_match,strict"][1]) == {0.0, 1.0} or both["exact_match,strict"][1].sum() == 0


def test_a_part_asks_and_scores_what_the_whole_does_for_its_examples(scored: dict[str, Scored]) -> None:
    case = scored["own_rolling"]
    part = case.task.subset([7, 2])
    tokenizer = load_tokenizer(Path(case.task.files[0]).parent / "model")
    rows, whole = part.requests(tokenizer, CONTEXT).scored, case.task.requests(tokenizer, CONTEXT).scored
    assert [row.tokens for row in rows] == [row.tokens for e in (7, 2) for row in whole if row.example == e]
    assert part.size == 2 and {row.example for row in rows} == {0, 1}


def test_an_output_without_an_answer_is_told(scored: dict[str, Scored]) -> None:
    task = replace(scored["own_generation"].task, metric="exact_match,strict")
    assert task.extraction_failure(["w1 w2", "w3"]) == "the filter strict"
    assert task.extraction_failure(["w1 w2", "the answer is w3"]) is None
    assert scored["own_choices"].task.extraction_failure([]) is None


# ---------------------------------------------------------------------------------------------------------------
# What a config may say


def open_own(harness_tasks: Path, name: str, metric: str | None = None, **options: Any) -> HarnessTask:
    section = HarnessConfig(lm_eval=name, metric=metric, include_path=str(harness_tasks), **options)
    return open_task(section, Opening("tasks[0]", Path()))


def test_the_metric_is_the_first_unless_it_is_named(harness_tasks: Path) -> None:
    assert open_own(harness_tasks, "own_generation").metric == "exact_match,flexible"
    assert open_own(harness_tasks, "own_generation", "exact_match,strict").metric == "exact_match,strict"
    assert open_own(harness_tasks, "own_choices", "acc_norm").metric == "acc_norm,none"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("own_chioces", {}, r"tasks\[0\]: lm_eval: lm-eval has no task 'own_chioces' \(did you mean 'own_choices'\?\)"),
        ("own_group", {}, r"own_group is a group of tasks; name them one by one \(own_choices, own_rolling\)"),
        ("own_choices", {"metric": "acc,strict"}, "metric: 'acc,strict'; the task has \"acc,none\""),
        ("own_choices", {"metric": "brier_score,none"}, "metric: 'brier_score,none'; the task has"),
        ("own_no_train", {"split": "train"}, "split: own_no_train has no training split"),
        ("own_no_data", {}, "own_no_data: data_files: .*nothing.jsonl: no such file"),
        (
            "own_no_pattern",
            {},
            r"own_no_pattern: filter_list\[0\].filter\[0\].regex_pattern: .*unterminated character set",
        ),
        ("own_no_template", {}, "own_no_template: the template .* failed"),
        ("own_ending", {"allow_code": True}, r"own_ending cannot be loaded \(own_ending failed \(SystemExit: 0\)\)"),
        ("own_sampled", {}, "own_sampled, example 0: the task draws its outputs at random"),
        ("own_endless", {}, "own_endless, example 0: asks for 48 new tokens; the models' context is 48"),
        ("own_choices", {"num_fewshot": 12, "split": "train"}, "lm-eval cannot build its requests"),
    ],
)
def test_what_the_harness_cannot_do_is_told(
    name: str,
    options: dict[str, Any],
    message: str,
    harness_tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not ALL:
        # One of the harness's own folders: its index of all of them takes ten seconds.
        some = str(Path(lm_eval.__file__).parent / "tasks/gsm8k")
        monkeypatch.setattr(
            task_folders, "default_task_manager", lambda: TaskManager(include_path=some, include_defaults=False)
        )
    folder = tmp_path / "tasks"
    shutil.copytree(harness_tasks, folder)
    own = yaml.safe_load((folder / "own_generation.yaml").read_text())
    variants: dict[str, dict[str, Any]] = {
        "own_no_train": {"training_split": None, "fewshot_split": "test"},
        "own_no_data": {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "nothing.jsonl")}}},
        "own_no_pattern": {
            "filter_list": [
                {"name": "f", "filter": [{"function": "regex", "regex_pattern": "[/INST"}, {"function": "take_first"}]},
            ]
        },
        "own_no_template": {"doc_to_text": "{{question"},
        "own_sampled": {"generation_kwargs": {"until": ["w9"], "do_sample": True, "temperature": 0.7}},
        "own_endless": {"generation_kwargs": {"until": ["w9"], "max_gen_toks": CONTEXT}},
    }
    for variant, changes in variants.items():
        write_yaml(folder / f"{variant}.yaml", own | {"task": variant} | changes)
    (folder / "ending.py").write_text("raise SystemExit(0)\n")
    ending = {name: value for name, value in own.items() if name != "doc_to_text"} | {"task": "own_ending"}
    (folder / "own_ending.yaml").write_text(f"{yaml.safe_dump(ending)}doc_to_text: !function ending.text\n")
    with pytest.raises(InputError, match=message):
        open_own(folder, name, **options).requests(load_tokenizer(harness_tasks / "model"), CONTEXT)


def test_whatever_a_task_is_made_of_is_among_its_files(harness_tasks: Path, tmp_path: Path) -> None:
    own = yaml.safe_load((harness_tasks / "own_choices.yaml").read_text())
    (tmp_path / "below").mkdir()
    write_yaml(tmp_path / "below" / "common.yaml", {"doc_to_text": own.pop("doc_to_text")})
    write_yaml(tmp_path / "below" / "more.yaml", {"include": "common.yaml"})
    (tmp_path / "own_functions.py").write_text("def gold(doc):\n    return doc['gold']\n")
    own |= {"task": "own_parts", "include": "below/more.yaml"}
    del own["doc_to_target"]
    (tmp_path / "own_parts.yaml").write_text(yaml.safe_dump(own) + "doc_to_target: !function own_functions.gold\n")
    task = open_own(tmp_path, "own_parts", allow_code=True)
    assert set(task.files) == {
        *(tmp_path / name for name in ("own_parts.yaml", "below/more.yaml", "below/common.yaml", "own_functions.py")),
        *(harness_tasks / f"{split}.jsonl" for split in ("train", "test")),
    }


def test_a_filter_that_backtracks_without_end_is_given_up(
    harness_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    own = yaml.safe_load((harness_tasks / "own_generation.yaml").read_text()) | {"task": "own_slow"}
    slow = [{"function": "regex", "regex_pattern": r"((?:w+ ?)+)!"}, {"function": "take_first"}]
    own["filter_list"] = [{"name": "slow", "filter": slow}]
    write_yaml(tmp_path / "own_slow.yaml", own)
    task = open_own(tmp_path, "own_slow")
    task.requests(load_tokenizer(harness_tasks / "model"), CONTEXT)

    def answers(*texts: str) -> Responses:
        rows = [[text] * task.size for text in texts]
        none = np.zeros((len(rows), 0))
        return Responses(none, np.zeros(0, int), none, rows)

    hostile = ["w" * length for length in (40, 41, 42)]
    handler = signal.getsignal(signal.SIGVTALRM)
    task.score(answers("w1 w2 w3!", *hostile[:1]))
    task.score(answers(*hostile[:2]))
    assert capsys.readouterr().err.count("such an output counts as one without an answer") == 1
    with pytest.raises(InputError, match=r"own_slow: pattern: .* takes more than 0.2 s .* on 3 outputs"):
        task.score(answers(hostile[2]))
    assert signal.getsignal(signal.SIGVTALRM) is handler
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_without_the_harness_the_extra_is_named(harness_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install 'evojax-merge\[lm-eval\]'"):
        open_own(harness_tasks, "own_choices")


def test_training_examples_are_not_shown_to_themselves(harness_tasks: Path) -> None:
    tokenizer = load_tokenizer(harness_tasks / "model")
    test = open_own(harness_tasks, "own_choices").requests(tokenizer, 256).scored
    task = open_own(harness_tasks, "own_choices", split="train", num_fewshot=10, docs=8)
    assert task.size == 8
    rows = [row for row in task.requests(tokenizer, 4096).scored if row.start > 1]
    questions = [tokenizer(record["question"])["input_ids"] for record in task.source.task.eval_docs]
    for row in rows:
        shown = tokenizer.decode(row.tokens[: row.start]).count(tokenizer.decode(questions[row.example]))
        assert shown == 1
    assert not {row.tokens for row in rows} & {row.tokens for row in test}


def config_file(folder: Path, family: Family, *tasks: dict[str, Any]) -> Path:
    space = {"method": "task_arithmetic", "layers_per_group": "all", "components": ["attention+mlp+norm"],
             "parameters": {"weight": {}}}  # fmt: skip
    document = search_config(family, space=space, tasks=list(tasks), search={"finalists": 2})
    return write_yaml(folder / "search.yaml", document)


def test_a_benchmark_is_only_searched_on_when_the_config_says_so(
    family: Family, harness_tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = yaml.safe_load((harness_tasks / "own_choices.yaml").read_text()) | {"task": "gsm8k_mine"}
    write_yaml(tmp_path / "gsm8k_mine.yaml", own)
    task = {"lm_eval": "gsm8k_mine", "include_path": "."}

    def opened(**changes: Any) -> Any:
        path = config_file(tmp_path, family, task | changes)
        return open_problem(path).splits.search[0]

    with pytest.raises(InputError, match=r"tasks\[0\]: on_test_set: gsm8k_mine is a benchmark"):
        opened()
    assert opened(on_test_set=True).size == 8
    assert "gsm8k_mine is a benchmark" in capsys.readouterr().err
    assert opened(split="train").size == 10
    assert capsys.readouterr().err == ""
    # Whoever only looks at it takes nothing from it.
    assert open_whole_task("tasks[0]", HarnessConfig.model_validate(task), tmp_path).size == 10


def test_evaluate_takes_the_harness_s_tasks(harness_tasks: Path, tmp_path: Path, scored: dict[str, Scored]) -> None:
    names = ("own_choices", "own_generation")
    tasks = tmp_path / "tasks.yaml"
    rows = [{"lm_eval": name, "include_path": str(harness_tasks)} for name in names]
    write_yaml(tasks, {"tasks": rows})
    evaluate_command.evaluate(
        [str(harness_tasks / "model")], tasks, tmp_path / "scores.json", tmp_path / "samples.jsonl"
    )
    (shown,) = read_json(tmp_path / "scores.json")
    samples = read_lines(tmp_path / "samples.jsonl")
    choices, texts = ([line for line in samples if line["task"] == name] for name in names)
    totals = iter(scored["own_choices"].answers.totals[0])
    for line in choices:
        assert "outputs" not in line
        expected = [next(totals) for _ in line["log_probabilities"]]
        np.testing.assert_allclose(line["log_probabilities"], expected, rtol=1e-4)
    assert next(totals, None) is None
    assert [line["outputs"] for line in texts] == [[text] for text in scored["own_generation"].answers.texts[0]]
    assert not any("log_probabilities" in line for line in texts)
    assert texts[3]["example"] == f"{tasks}: tasks[1]: own_generation, example 3"
    assert [line["score"] for line in texts] == list(scored["own_generation"].scores["exact_match,flexible"][0])
    theirs = [sample for sample in scored["own_generation"].samples if sample["filter"] == "flexible"]
    answers = [sample["filtered_resps"][0] for sample in theirs]
    assert [line["extracted"] for line in texts] == [None if one == "[invalid]" else one for one in answers]
    assert [line["target"] for line in texts] == [sample["target"] for sample in theirs]
    docs = [sample["doc"] for sample in scored["own_choices"].samples]
    assert [line["target"] for line in choices] == [doc["choices"][doc["gold"]] for doc in docs]
    for name in names:
        for key, matrix in scored[name].scores.items():
            assert shown["scores"][f"{name}/{key}"] == pytest.approx(float(matrix.mean()), abs=1e-6)


def test_a_run_keeps_where_its_tasks_came_from(family: Family, harness_tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "own").symlink_to(harness_tasks)
    path = config_file(tmp_path, family, {"lm_eval": "own_choices", "include_path": "own", "heldout": "own_generation"})
    with pytest.raises(InputError, match="metric"):
        # The second task has to have the metric, too.
        open_problem(path, "tasks.0.metric=acc,none")
    path = config_file(tmp_path, family, {"lm_eval": "own_choices", "include_path": "own", "name": "choices"})
    problem = open_problem(path)
    assert (problem.splits.search[0].name, problem.splits.search[0].size, problem.splits.heldout[0].size) == (
        "choices",
        8,
        2,
    )
    kept = resolved_document(problem.backend.config, problem)
    assert {str(harness_tasks / name) for name in ("own_choices.yaml", "test.jsonl")} <= set(kept["inputs"])
    assert kept["tasks"][0]["include_path"] == str(harness_tasks)


@pytest.mark.parametrize(
    ("name", "known"),
    [("gsm8k", True), ("mgsm_direct_ja", True), ("mmlu_pro", True), ("arc_challenge", True), ("hellaswag", True),
     ("tinyMMLU", True), ("gsm_symbolic", False), ("racecar_names", False), ("own_gsm8k", False)],
)  # fmt: skip
def test_benchmarks_are_known_by_their_names(name: str, known: bool) -> None:
    assert is_benchmark(name) == known
