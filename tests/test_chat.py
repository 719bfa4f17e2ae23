"""Tasks for instruct models: their prompts are those of transformers and of the lm-eval harness, token by token, and
their scores those of the harness, example by example."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import yaml
from helpers.families import Family
from helpers.files import read_lines, write_lines
from helpers.models import random_model, tiny_config
from helpers.sampling import ALL, thorough
from hostile import build_world, run_command
from hostile import config as search_config
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from evojax_merge.backends.decoder.opening import stop_tokens
from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import TaskFile
from evojax_merge.errors import InputError
from evojax_merge.evaluation.batched_tasks import batch_tasks
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.tasks.opening import open_task, open_whole_task, resolved_config
from evojax_merge.tasks.task import Responses, Task

CONTEXT, NEW_TOKENS = 1024, 6
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>\n{% endif %}{% endif %}"
)
QUESTIONS = [
    {"question": "Anna has 3 apples and buys 4. How many has she?", "answer": "3 + 4 = 7\n#### 7"},
    {"question": "Ben reads 2 pages a day. How many in 5 days?", "answer": "2 * 5 = 10\n#### 10"},
    {"question": "Half of 18?", "answer": "18 / 2 = 9\n#### 9"},
    {"question": "A dozen and one?", "answer": "12 + 1 = 13\n#### 13"},
    {"question": "What is 6 times 7?", "answer": "6 * 7 = 42\n#### 42"},
    {"question": "Days of two weeks?", "answer": "2 * 7 = 14\n#### 14"},
]
CHOICES = [
    {"question": "Which is a fruit?", "choices": ["apple", "chair", "a long road", "sea"], "gold": 0},
    {"question": "The sky is", "choices": ["green as grass", "blue", "naïve", "té"], "gold": 1},
    {"question": "Water freezes at", "choices": ["0 °C", "50 °C", "100 degrees of Celsius", "1"], "gold": 0},
    {"question": "The opposite of hot?", "choices": ["warm", "dry", "cold", "…"], "gold": 2},
    {"question": "Two and two are", "choices": ["five", "four", "a great many", "x"], "gold": 1},
    {"question": "A cat says", "choices": ["woof woof", "moo", "meow", "tweet tweet tweet"], "gold": 2},
]
SHOWN = 2


def write_tokenizer(folder: Path, template: str | dict[str, str] | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that begins every text with <s>, as Llama's do, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
    )  # fmt: skip
    tokenizer.train_from_iterator([record["question"] for record in [*QUESTIONS, *CHOICES]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    size = len(write_tokenizer(folder))
    config = tiny_config(
        vocab_size=size,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
        num_hidden_layers=1,
    )
    random_model(config, seed=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def harness_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of the harness like GSM8K, ARC, LAMBADA and IFEval, with local data; the first examples are shown."""
    folder = tmp_path_factory.mktemp("tasks")
    mean = {"aggregation": "mean", "higher_is_better": True}
    for name, records in (("sums", QUESTIONS), ("choices", CHOICES)):
        write_lines(folder / f"{name}_shown.jsonl", records[:SHOWN])
        write_lines(folder / f"{name}.jsonl", records[SHOWN:])

    def data(name: str) -> dict[str, Any]:
        files = {"train": str(folder / f"{name}_shown.jsonl"), "test": str(folder / f"{name}.jsonl")}
        return {
            "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "training_split": "train",
            "test_split": "test", "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"},
        }  # fmt: skip

    tasks: dict[str, dict[str, Any]] = {
        "gsm_like": data("sums") | {
            "output_type": "generate_until", "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{answer}}", "generation_kwargs": {"until": [], "max_gen_toks": NEW_TOKENS},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        "arc_like": data("choices") | {
            "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "gold", "doc_to_choice": "choices",
            "metric_list": [{"metric": metric, **mean} for metric in
                            ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")],
        },
        "lambada_like": data("sums") | {
            "output_type": "loglikelihood", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
        },
        "ifeval_like": data("sums") | {
            "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["ma"], "max_gen_toks": NEW_TOKENS},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    }  # fmt: skip
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | task, sort_keys=False))
    return folder


OURS: dict[str, dict[str, Any]] = {
    "gsm_like": {
        "kind": "exact_match", "file": "sums.jsonl", "prompt": "Question: {question}\nAnswer:", "target": "{answer}",
        "max_new_tokens": NEW_TOKENS,
    },
    "arc_like": {
        "kind": "multiple_choice", "file": "choices.jsonl", "prompt": "Question: {question}\nAnswer:",
        "answer": "gold",
    },
    "lambada_like": {
        "kind": "likelihood", "file": "sums.jsonl", "prompt": "{question}", "target": "{answer}",
    },
    "ifeval_like": {
        "kind": "exact_match", "file": "sums.jsonl", "prompt": "{question}", "target": "{answer}", "stop": ["ma"],
        "max_new_tokens": NEW_TOKENS,
    },
}  # fmt: skip
METRICS = {"acc": "accuracy", "acc_norm": "acc_norm", "acc_bytes": "acc_bytes", "acc_mutual_info": "acc_mutual_info"}


def open_ours(folder: Path, name: str, **keys: Any) -> Task:
    section = {"name": name} | OURS[name] | keys
    (config,) = parse(folder / "tasks.yaml", {"tasks": [section]}, TaskFile).tasks
    return open_whole_task("tasks.yaml: tasks[0]", config, folder)


def answers_of(model: Path, task: Task) -> tuple[np.ndarray, list[str]]:
    """The stored model's total log-probability of each row, and its outputs."""
    tokenizer = load_tokenizer(model)
    sources, config = open_sources([model])
    ((batched_task,),) = batch_tasks([[task]], tokenizer, 4096, CONTEXT, stop_tokens(model, tokenizer))
    scores = Evaluator(config, tokenizer, [batched_task]).score_stored(load_stored(sources, config, 0, "float32"))
    return scores.log_probabilities.get(task.name, np.zeros((1, 0)))[0], scores.outputs.get(task.name, [[]])[0]


CHATS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # Name: our keys, the harness's options, and keys of its tasks.
    "plain": ({}, {}, {}),
    "plain, shown": ({"num_fewshot": 2}, {"num_fewshot": 2}, {}),
    "chat": ({"apply_chat_template": True}, {"apply_chat_template": True}, {}),
    "system": (
        {"apply_chat_template": True, "system_instruction": "Be brief."},
        {"apply_chat_template": True, "system_instruction": "Be brief."}, {},
    ),
    "shown as turns": (
        {"apply_chat_template": True, "num_fewshot": 2},
        {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": True}, {},
    ),
    "shown as text": (
        {"apply_chat_template": True, "num_fewshot": 1, "fewshot_as_multiturn": False, "system_instruction": "Think."},
        {"apply_chat_template": True, "num_fewshot": 1, "fewshot_as_multiturn": False, "system_instruction": "Think."},
        {},
    ),
    "prefix": (
        {"apply_chat_template": True, "num_fewshot": 1, "assistant_prefix": "Let us see:"},
        {"apply_chat_template": True, "num_fewshot": 1, "fewshot_as_multiturn": True}, {"gen_prefix": "Let us see:"},
    ),
    "plain prefix": (
        {"num_fewshot": 1, "assistant_prefix": "Let us see:"}, {"num_fewshot": 1}, {"gen_prefix": "Let us see:"},
    ),
    "no thinking": (
        {"apply_chat_template": True, "chat_template_kwargs": {"enable_thinking": False}},
        {"apply_chat_template": True, "chat_template_args": {"enable_thinking": False}}, {},
    ),
}  # fmt: skip

# Cases of which the scores are compared as well. Each costs the compilation of its own lengths.
SCORED = tuple(CHATS) if ALL else ("shown as turns",)


def harness_samples(
    model: Path, folder: Path, names: Sequence[str], keys: dict[str, Any], **options: Any
) -> dict[str, list[dict[str, Any]]]:
    """The harness's examples with its answers, by task, from its own `hf` model."""
    arguments = options.pop("chat_template_args", {})
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks: list[Any] = [manager.load([name])["tasks"][name] for name in names]
    for task in tasks:
        for key, value in keys.items():
            task.set_config(key, value)
            setattr(task.fewshot_cfg, key, value)
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(model), batch_size=1, device="cpu", dtype="float32", chat_template_args=arguments),
        tasks=tasks, task_manager=manager, bootstrap_iters=0, **options,
    )  # fmt: skip
    return {name: results["samples"][name] for name in names}


@pytest.mark.parametrize("case", CHATS)
def test_prompts_and_scores_are_those_of_the_harness(case: str, model: Path, harness_tasks: Path) -> None:
    ours, options, keys = CHATS[case]
    # A log-likelihood of the harness has no delimiter at all; instructions are followed without examples.
    chats, shown = bool(ours.get("apply_chat_template")), bool(ours.get("num_fewshot"))
    skipped = {"lambada_like": keys or not chats, "ifeval_like": shown}
    names = [name for name in OURS if not skipped.get(name)]
    samples = harness_samples(model, harness_tasks, names, keys, **options)
    tokenizer = load_tokenizer(model)
    for name in names:
        fewshot = {"fewshot_source": OURS[name]["file"].replace(".", "_shown.")} if "num_fewshot" in ours else {}
        metric = {"metric": "acc_mutual_info"} if name == "arc_like" else {}
        task = open_ours(harness_tasks, name, **ours, **fewshot, **metric)
        requests = task.requests(tokenizer, CONTEXT)
        rows = requests.scored or requests.prompts
        asked = [arguments for sample in samples[name] for arguments in sample["arguments"]]
        if name == "arc_like":
            asked = [arguments for arguments in asked if arguments[0]]
            rows = tuple(row for row in rows if row.start > 1)
        texts = [context + target if requests.scored else context for context, target in asked]
        assert [tokenizer.decode(row.tokens) for row in rows] == [
            text if text.startswith("<s>") else f"<s>{text}" for text in texts
        ], case
        assert all(row.tokens.count(tokenizer.bos_token_id) == 1 for row in rows)
        if case not in SCORED:
            continue
        totals, outputs = answers_of(model, task)
        if requests.prompts:
            assert outputs == [sample["resps"][0][0] for sample in samples[name]], (case, name)
            continue
        expected = [response[0][0] for sample in samples[name] for response in sample["resps"]]
        np.testing.assert_allclose(totals, expected, rtol=1e-5, atol=1e-3)
        for theirs, ours_name in METRICS.items() if name == "arc_like" else ():
            # Only mutual information has rows without the prompt.
            asked_rows = [row.start > 1 or theirs == "acc_mutual_info" for row in requests.scored]
            answers = Responses(totals[None, asked_rows], np.ones(sum(asked_rows), int), np.zeros((1, 0), bool), [])
            task = open_ours(harness_tasks, name, **ours, **fewshot, metric=theirs)
            assert task.metric == ours_name
            assert task.score(answers)[ours_name][0].tolist() == [sample[theirs] for sample in samples[name]], theirs


# ---------------------------------------------------------------------------------------------------------------
# Conversations of records


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALKS = [
    {"talk": [turn("user", record["question"]), turn("assistant", record["answer"])]} for record in QUESTIONS[:5]
]  # fmt: skip
SYSTEM = [{"talk": [turn("system", "Be kind."), turn("user", "Hi?")], "target": "Hello!", "choices": ["No", "Yes"]}]


def open_talks(folder: Path, records: Sequence[dict[str, Any]], kind: str = "likelihood", **keys: Any) -> Any:
    write_lines(folder / "talks.jsonl", records)
    section = {"name": "talks", "kind": kind, "file": "talks.jsonl", "messages": "talk", "apply_chat_template": True}
    (config,) = parse(folder / "tasks.yaml", {"tasks": [section | keys]}, TaskFile).tasks
    return open_whole_task("tasks.yaml: tasks[0]", config, folder)


def test_conversations_of_records_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    """A last turn of the assistant is the target; shown examples are turns as well."""
    tokenizer = load_tokenizer(model)
    task = open_talks(tmp_path, TALKS, num_fewshot=1, system_instruction="Think.")
    assert task.size == 4
    for row, record in zip(task.requests(tokenizer, CONTEXT).scored, TALKS[1:], strict=True):
        question = [turn("system", "Think."), *TALKS[0]["talk"], record["talk"][0]]
        wanted = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
        assert list(row.tokens[: len(wanted)]) == wanted
        # The line feed of the template is predicted as well, as in the harness.
        assert tokenizer.decode(row.tokens[row.start :]) == f"\n{record['talk'][1]['content']}"
    writing = open_talks(tmp_path, TALKS, "exact_match")
    assert [writing.target(i) for i in range(5)] == [record["answer"] for record in QUESTIONS[:5]]
    for row, record in zip(writing.requests(tokenizer, CONTEXT).prompts, TALKS, strict=True):
        asked = record["talk"][:1]
        assert list(row.tokens) == tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]


def test_a_system_turn_of_the_record_leads_the_conversation(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    talk = SYSTEM[0]["talk"]
    task = open_talks(tmp_path, [*SYSTEM, SYSTEM[0] | {"talk": talk[1:]}])
    first, second = task.requests(tokenizer, CONTEXT).scored
    for row, turns in ((first, talk), (second, talk[1:])):
        wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(row.tokens) == f"{wanted}Hello!"
    later = [turn("user", "Hi?"), turn("system", "Be kind."), turn("user", "So?")]
    (row,) = open_talks(tmp_path, [{"talk": later, "target": "x"}]).requests(tokenizer, CONTEXT).scored
    wanted = tokenizer.apply_chat_template(later, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(row.tokens) == f"{wanted}x"
    records = [record | {"answer": "Yes"} for record in SYSTEM]
    choices = open_talks(tmp_path, records, "multiple_choice", target="{target}").requests(tokenizer, CONTEXT).scored
    assert [tokenizer.decode(row.tokens[row.start :]) for row in choices] == ["\nNo", "\nYes"]
    shown = open_talks(tmp_path, [*SYSTEM, *TALKS], num_fewshot=1).requests(tokenizer, CONTEXT).scored[0]
    # One system turn at most, and at the beginning.
    assert tokenizer.decode(shown.tokens).startswith("<s><|user|>\nHi?<|end|>\n<|assistant|>\nHello!<|end|>\n<|user|>")
    with pytest.raises(InputError, match=r"talks.jsonl:1: tasks.yaml: tasks\[0\].system_instruction: .* of its own"):
        open_talks(tmp_path, SYSTEM, system_instruction="Think.").requests(tokenizer, CONTEXT)


def test_turns_of_other_forms_are_those_of_role_and_content(model: Path, tmp_path: Path) -> None:
    """ShareGPT's, and OpenAI's, whose contents are lists of parts."""
    tokenizer = load_tokenizer(model)
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"talk": [{"from": names[t["role"]], "value": t["content"]} for t in talk["talk"]]} for talk in TALKS]
    in_parts = [
        {"talk": [t | {"content": [{"type": "text", "text": part} for part in t["content"]]} for t in talk["talk"]]}
        for talk in TALKS
    ]
    rows = [
        [(row.tokens, row.start) for row in open_talks(tmp_path, talks).requests(tokenizer, CONTEXT).scored]
        for talks in (TALKS, shared, in_parts)
    ]
    assert rows[0] == rows[1] == rows[2]


def test_a_conversation_that_ends_with_the_users_turn_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"talk: ends with a turn of the role 'user'; expected the assistant's.*target"
    ):
        open_talks(tmp_path, [{"talk": [turn("user", "Hi?")]}])


def test_extra_keys_of_turns_reach_the_template(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(
        tmp_path, "{% for m in messages %}{{ m.name | default('?') }}: {{ m.content }}{% endfor %}"
    )
    talk = [turn("user", "Hi") | {"name": "Anna"}, turn("user", "Ho") | {"name": None}]
    (row,) = open_talks(tmp_path, [{"talk": talk, "target": "x"}]).requests(tokenizer, CONTEXT).scored
    assert tokenizer.decode(row.tokens) == "Anna: Hi?: Hox"


# ---------------------------------------------------------------------------------------------------------------
# Shown examples


def questions_of(task: Any) -> list[str]:
    return [example.prompt for example in task.examples]


def test_shown_examples_are_scored_in_no_split(tmp_path: Path) -> None:
    asked = [record["question"] for record in QUESTIONS]
    write_lines(tmp_path / "searched.jsonl", [*QUESTIONS[:4], QUESTIONS[0] | {"answer": "seven: #### 7"}])
    write_lines(tmp_path / "heldout.jsonl", [QUESTIONS[1], *QUESTIONS[4:]])
    section = {
        "name": "sums", "kind": "exact_match", "file": "searched.jsonl", "heldout": "heldout.jsonl", "num_fewshot": 2,
        "prompt": "{question}", "target": "{answer}",
    }  # fmt: skip

    def splits(**keys: Any) -> tuple[Any, Any, dict[str, Any]]:
        (config,) = parse(tmp_path / "tasks.yaml", {"tasks": [section | keys]}, TaskFile).tasks
        search, heldout = open_task("tasks.yaml: tasks[0]", config, tmp_path, 0)
        return search, heldout, resolved_config(config, search, heldout)

    search, heldout, kept = splits()
    assert (questions_of(search), questions_of(heldout)) == (asked[2:4], asked[4:])
    assert search.prompts.shots == heldout.prompts.shots
    assert [shot.answer for shot in search.prompts.shots] == [record["answer"] for record in QUESTIONS[:2]]
    assert set(heldout.files) == {tmp_path / "searched.jsonl", tmp_path / "heldout.jsonl"}
    assert kept["file"] == str(tmp_path / "searched.jsonl") and "fewshot_source" not in kept
    search, heldout, kept = splits(fewshot_source="heldout.jsonl", heldout=0.5)
    assert sorted(questions_of(search) + questions_of(heldout)) == sorted([asked[0], *asked[2:4], asked[0]])
    assert kept["fewshot_source"] == str(tmp_path / "heldout.jsonl")
    # The section of a task without any of the keys is what it was.
    (plain,) = parse(tmp_path / "tasks.yaml", {"tasks": [section | {"num_fewshot": 0}]}, TaskFile).tasks
    assert not {"num_fewshot", "apply_chat_template", "messages", "assistant_prefix"} & set(plain.model_dump())


def test_choices_of_an_equal_question_are_another_example(tmp_path: Path) -> None:
    record = {"prompt": "Which?", "choices": ["a", "b"], "answer": 0}
    write_lines(tmp_path / "data.jsonl", [record, record | {"choices": ["c", "d"]}, record | {"answer": 1}])
    section = {"name": "choices", "kind": "multiple_choice", "file": "data.jsonl", "num_fewshot": 1}
    (config,) = parse(tmp_path / "tasks.yaml", {"tasks": [section]}, TaskFile).tasks
    task: Any = open_whole_task("tasks", config, tmp_path)
    assert [example.choices for example in task.examples] == [("c", "d")]


def test_a_function_gets_the_records_that_are_scored(model: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def score(records, texts):\n    return [r['n'] for r in records]\n")
    write_lines(tmp_path / "data.jsonl", [record | {"n": i} for i, record in enumerate(QUESTIONS)])
    section = {
        "name": "mine", "kind": "function", "function": "own.py:score", "file": "data.jsonl", "prompt": "{question}",
        "target": "{answer}", "num_fewshot": 1, "apply_chat_template": True, "assistant_prefix": "So",
    }  # fmt: skip
    (config,) = parse(tmp_path / "tasks.yaml", {"tasks": [section]}, TaskFile).tasks
    task: Any = open_whole_task("tasks", config, tmp_path)
    assert [record["n"] for record in task.records] == [1, 2, 3, 4, 5]
    tokenizer = load_tokenizer(model)
    asked, answer = QUESTIONS[0]["question"], f"So {QUESTIONS[0]['answer']}"
    turns = [turn("user", asked), turn("assistant", answer), turn("user", QUESTIONS[1]["question"])]
    text = tokenizer.apply_chat_template(
        [*turns, turn("assistant", "So")], tokenize=False, continue_final_message=True
    )  # fmt: skip
    assert tokenizer.decode(task.requests(tokenizer, CONTEXT).prompts[0].tokens) == text


# ---------------------------------------------------------------------------------------------------------------
# Refusals


def test_templates_are_chosen_by_name(tmp_path: Path) -> None:
    named = {"default": "d{{ messages[0].content }}", "short": "s{{ messages[0].content }}"}
    tokenizer = write_tokenizer(tmp_path, named)
    write_lines(tmp_path / "data.jsonl", [{"prompt": "Hi", "target": "x"}])

    def text(template: bool | str) -> str:
        section = {"name": "n", "kind": "exact_match", "file": "data.jsonl", "apply_chat_template": template}
        (config,) = parse(tmp_path / "tasks.yaml", {"tasks": [section | {"pattern": ".+"}]}, TaskFile).tasks
        task = open_whole_task("tasks[0]", config, tmp_path)
        return str(tokenizer.decode(task.requests(tokenizer, CONTEXT).prompts[0].tokens))

    assert [text(True), text("short"), text("default")] == ["dHi", "sHi", "dHi"]
    for template, asked, names in (
        (named, "long", "default, short"),
        ({"short": "s"}, True, "short"),
        (TEMPLATE, "short", "default"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=rf"tasks\[0\].apply_chat_template: .*{tmp_path}.*; expected .*{names}$"):
            text(asked)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=rf"the tokenizer of {tmp_path} has no chat template"):
        text(True)


REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "keys", "message"),
    [
        (REFUSES, {"system_instruction": "Think."},
         r"tasks\[0\].system_instruction: .* refuses a system turn \(no system role\)"),
        ("{{ raise_exception('users only') }}", {"system_instruction": "Think."},
         r"data.jsonl:1: .*apply_chat_template: the chat template of .* failed \(users only\)"),
        ("{% if %}", {}, "data.jsonl:1: .*failed"),
    ],
)  # fmt: skip
def test_a_template_that_fails_is_named_with_the_example(
    template: str, keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tokenizer = write_tokenizer(tmp_path, template)
    write_lines(tmp_path / "data.jsonl", [{"prompt": "Hi", "target": "x"}])
    section = {"name": "n", "kind": "likelihood", "file": "data.jsonl", "apply_chat_template": True}
    (config,) = parse(tmp_path / "tasks.yaml", {"tasks": [section | keys]}, TaskFile).tasks
    with pytest.raises(InputError, match=message):
        open_whole_task("tasks[0]", config, tmp_path).requests(tokenizer, CONTEXT)


@pytest.mark.parametrize(
    ("records", "keys", "message"),
    [
        ([{"talks": []}], {}, r"talks.jsonl:1: the record has no field 'talk', which tasks.yaml: tasks\[0\].messages"),
        ([{"talk": []}], {}, r"talks.jsonl:1: talk: \[\]; expected a list of turns"),
        ([{"talk": "Hi"}], {}, "talks.jsonl:1: talk: 'Hi'; expected a list of turns"),
        ([{"talk": [{"role": "user"}]}], {}, r"talks.jsonl:1: talk\[0\]: .*; expected a list of turns"),
        ([{"talk": [turn("assistant", "Hi")]}], {}, "talk: holds the assistant's turn alone"),
        (TALKS, {"target": "{talk}!"}, "talk: ends with the assistant's turn, which would be the target; leave"),
        (TALKS, {"kind": "multiple_choice"}, "talk: ends with the assistant's turn; expected the user's"),
        (TALKS, {"num_fewshot": 6}, r"tasks\[0\].num_fewshot: 6; .*talks.jsonl has only 5"),
        (TALKS, {"num_fewshot": 5}, r"tasks\[0\].num_fewshot: 5; leaves no example of .*talks.jsonl to score"),
        (TALKS, {"prompt": "{talk}"}, "prompt: has no meaning beside messages"),
        (TALKS, {"fewshot_as_multiturn": False}, "fewshot_as_multiturn: the examples of messages are turns"),
        (TALKS, {"apply_chat_template": False}, "messages: has no meaning outside of a chat"),
        (TALKS, {"fewshot_source": "talks.jsonl"}, "fewshot_source: say num_fewshot"),
        (TALKS, {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs: tools is set by the program"),
    ],
)
def test_what_is_no_conversation_is_refused(
    records: list[dict[str, Any]], keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        open_talks(tmp_path, records, **keys)


# ---------------------------------------------------------------------------------------------------------------
# Commands


@thorough
def test_a_search_and_an_evaluation_score_chats(family: Family, tmp_path: Path) -> None:
    world = build_world(tmp_path / "world", family)
    template = "{% for m in messages %}w{{ 10 + m.role | length }} {{ m.content }} {% endfor %}"
    for name in ("base", "one", "two"):
        world.write(f"{name}/chat_template.jinja", template)
    chat = {"file": "tasks.jsonl", "apply_chat_template": True, "num_fewshot": 2, "assistant_prefix": "w9"}
    tasks = [
        {"name": "choices", "kind": "multiple_choice", "metric": "acc_mutual_info", **chat},
        {"name": "words", "kind": "generation", "metric": "chrf", "max_new_tokens": 3, **chat},
    ]  # fmt: skip
    world.write("config.yaml", search_config(tasks=tasks))
    run_command("search", "config.yaml", "--out", "run", folder=world.root)
    kept = yaml.safe_load((world / "run/config.yaml").read_text())["tasks"]
    assert all(section["num_fewshot"] == 2 and section["apply_chat_template"] is True for section in kept)
    samples = ("--samples", "samples.jsonl")
    run_command("evaluate", "run", "two", "--tasks", "run/config.yaml", *samples, folder=world.root)
    lines = read_lines(world / "samples.jsonl")
    assert {line["example"] for line in lines} == {f"{world / 'tasks.jsonl'}:{number}" for number in range(3, 13)}
    # Each choice has a log-probability after the prompt, and one without it.
    assert {len(line.get("log_probabilities", [])) for line in lines if line["task"] == "choices"} == {8}
    assert {tuple(line["scores"]) for line in lines if line["task"] == "words"} == {("chrf",)}
