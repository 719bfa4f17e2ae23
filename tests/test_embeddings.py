"""Networks that embed texts and images are searched, and their exports have the same scores by their own libraries."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from helpers.commands import run_here
from helpers.files import read_json, write_json, write_lines, write_yaml
from helpers.models import randomised, save
from helpers.sampling import thorough
from helpers.searches import problem_of
from PIL import Image
from safetensors.numpy import load_file
from scipy.stats import spearmanr

from evojax_merge.backends.torch import network as networks
from evojax_merge.backends.torch.folders import open_module, open_network
from evojax_merge.backends.torch.inputs import embedded_texts
from evojax_merge.cli import cli
from evojax_merge.errors import InputError
from evojax_merge.problem import SearchProblem
from evojax_merge.steps.selection import open_evaluators

TOKENS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, 64))]
SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 64,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip


def sentence_transformer(folder: Path, seed: int) -> Path:
    """A folder of sentence-transformers: an encoder, the mean of its states, a dense module, length 1."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    encoder = randomised(transformers.BertModel(transformers.BertConfig(**SMALL)), seed, 0.3)
    save(encoder, folder.parent / f"encoder{seed}", TOKENS)
    modules = [
        Transformer(str(folder.parent / f"encoder{seed}")),
        Pooling(16),
        randomised(Dense(16, 8), seed, 0.3),
        Normalize(),
    ]
    prompts = {"query": "w9 ", "document": "w8 "}
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sentence transformers, pairs of texts with scores, and queries with documents. Read only."""
    folder = tmp_path_factory.mktemp("sentences")
    for seed in (1, 2):
        sentence_transformer(folder / f"model{seed}", seed)
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join(f"w{i}" for i in rng.integers(4, 64, 3))

    pairs = [{"sentence1": text(), "sentence2": text(), "score": int(rng.integers(0, 5))} for _ in range(12)]
    write_lines(folder / "pairs.jsonl", pairs)
    queries = [{"query": text(), "document": [text(), text()] if i % 3 else text()} for i in range(8)]
    write_lines(folder / "queries.jsonl", queries)
    write_lines(folder / "corpus.jsonl", [{"document": text()} for _ in range(5)])
    return folder


def document(folder: Path, *tasks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "backend": "torch", "parents": [str(folder / "model1"), str(folder / "model2")],
        "space": {"method": "linear", "layers_per_group": "all"},
        "tasks": [task | {"file": str(folder / task["file"])} for task in tasks],
        "search": {"generations": 2, "population": 3},
    } | changes  # fmt: skip


def searched(config: dict[str, Any], tmp_path: Path) -> tuple[Path, dict[str, float], SearchProblem]:
    """The exported winner of a search, its held-out scores, and the problem."""
    path = write_json(tmp_path / "config.yaml", config)
    result = CliRunner().invoke(cli, ["search", str(path), "--out", str(tmp_path / "run")])
    if result.exit_code:
        raise result.exception or AssertionError(result.output)
    row = read_json(tmp_path / "run" / "result.json")["table"][-1]
    assert row["role"] == "winner"
    return tmp_path / "run" / "best" / "model", row["heldout_scores"], problem_of(path, config)


def test_sentence_transformers_are_searched_and_exported(sentences: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    similar = {"name": "similar", "kind": "similarity", "file": "pairs.jsonl", "heldout": 0.5}
    found = {"name": "found", "kind": "retrieval", "file": "queries.jsonl", "heldout": 0.5, "k": 3,
             "corpus": str(sentences / "corpus.jsonl")}  # fmt: skip
    model, scores, problem = searched(document(sentences, similar, found), tmp_path)
    winner = SentenceTransformer(str(model), device="cpu")
    pairs, queries = (task.subset(range(task.size)) for task in problem.splits.heldout)
    chosen = [pairs.examples[i] for i in pairs.indices]
    first, second = (winner.encode([example.inputs[name] for example in chosen]) for name in ("first", "second"))
    expected = spearmanr((first * second).sum(-1), [example.target for example in chosen]).statistic
    assert scores["similar/spearman"] == pytest.approx(expected, abs=1e-5)

    texts = list(
        dict.fromkeys([text for example in queries.examples for text in example.target] + list(queries.corpus))
    )
    vectors = winner.encode_document(texts)
    gains = []
    for example in (queries.examples[i] for i in queries.indices):
        order = np.argsort(-(vectors @ winner.encode_query(example.inputs["query"])))[:3]
        hits = [texts[number] in example.target for number in order]
        ideal = sum(1 / np.log2(place + 2) for place in range(min(3, len(example.target))))
        gains.append(sum(hit / np.log2(place + 2) for place, hit in enumerate(hits)) / ideal)
    assert scores["found/ndcg"] == pytest.approx(np.mean(gains), abs=1e-5)
    assert "3_Normalize" in {folder.name for folder in model.iterdir()}
    assert "A recipe merges no modules of sentence transformers" in (model / "README.md").read_text()


def test_the_recipe_of_sentence_transformers_gives_their_transformers(sentences: Path, tmp_path: Path) -> None:
    similar = {"name": "similar", "kind": "similarity", "file": "pairs.jsonl", "heldout": 0.5}
    config = document(sentences, similar, space={"method": "linear"})
    backend = problem_of(tmp_path / "config.yaml", config).backend
    assert len(backend.facts.space.groups) > 2
    genome = np.random.default_rng(0).uniform(0.1, 0.9, backend.facts.space.dims).astype(np.float32)
    run_here("merge", write_yaml(tmp_path / "recipe.yaml", backend.recipe(genome)), tmp_path / "again")
    expected = backend.merged(genome)
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        ((_, array),) = [(key, value) for key, value in expected.items() if key.endswith(f".{name}")]
        np.testing.assert_allclose(tensor, np.asarray(array), atol=1e-6, err_msg=name)


def test_metrics_of_embeddings_have_their_definitions() -> None:
    rng = np.random.default_rng(0)
    queries, documents = (rng.normal(size=(count, 4)).astype(np.float32) for count in (6, 9))
    queries, documents = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (queries, documents))
    relevant = rng.random((6, 9)) < 0.3
    relevant[:, 0] |= ~relevant.any(-1)
    order = np.argsort(-(queries @ documents.T), axis=-1)
    hits = np.take_along_axis(relevant, order, -1)
    expected = {
        "recall": hits[:, :4].sum(-1) / hits.sum(-1),
        "reciprocal_rank": [next((1 / (i + 1) for i in range(4) if row[i]), 0.0) for row in hits],
    }
    for metric, values in expected.items():
        scores = networks.ranking_scores(metric, 4)(queries, documents, {"relevant": relevant}, 20.0)
        np.testing.assert_allclose(scores, values, rtol=1e-6)
    logits = 20.0 * queries @ documents.T
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    scores = networks.ranking_scores("log_probability", 4)(queries, documents, {"relevant": relevant}, 20.0)
    np.testing.assert_allclose(scores, np.log((chances * relevant).sum(-1)), rtol=1e-4, atol=1e-6)
    # Equal documents: none of them is better placed for being the right one.
    same = np.ones((3, 1), np.float32)
    tied = networks.ranking_scores("reciprocal_rank", 3)(same[:1], same, {"relevant": np.eye(3, dtype=bool)[:1]}, 1.0)
    assert tied[0] == pytest.approx(1 / 3)


CLIP_TEXT = {name: size for name, size in SMALL.items() if name != "pad_token_id"}
CLIP_IMAGE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
              "image_size": 16, "patch_size": 8}  # fmt: skip
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"height": 16, "width": 16},
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True, "do_center_crop": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks of CLIP's kind, and images in folders of their classes. Read only."""
    folder = tmp_path_factory.mktemp("clip")
    config = transformers.CLIPConfig(
        text_config=CLIP_TEXT | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, vision_config=CLIP_IMAGE,
        projection_dim=8,
    )  # fmt: skip
    for seed in (1, 2):
        save(randomised(transformers.CLIPModel(config), seed, 0.3), folder / f"model{seed}", TOKENS)
        write_json(folder / f"model{seed}" / "preprocessor_config.json", PREPROCESSOR)
    rng = np.random.default_rng(0)
    for label in ("w5", "w6", "w7"):
        (folder / "images" / label).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{number}.png")
    return folder


@thorough
def test_images_are_classified_by_the_texts_of_their_classes(clips: Path, tmp_path: Path) -> None:
    task = {"name": "named", "kind": "classification", "file": "images", "heldout": 0.5, "metric": "log_probability",
            "prompts": ["w9 {label}", "w10 w11 {label} w12"]}  # fmt: skip
    model, scores, problem = searched(document(clips, task), tmp_path)
    winner = transformers.CLIPModel.from_pretrained(model).eval()
    images = transformers.AutoImageProcessor.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    heldout = problem.splits.heldout[0]
    chosen = [heldout.examples[i] for i in heldout.indices]
    pixels = images([Image.open(example.inputs["image"]) for example in chosen], return_tensors="pt")
    with torch.no_grad():
        seen = torch.nn.functional.normalize(winner.get_image_features(**pixels).pooler_output)
        means = []
        for label in ("w5", "w6", "w7"):
            texts = tokenizer([f"w9 {label}", f"w10 w11 {label} w12"], padding=True, return_tensors="pt")
            tokens = {name: texts[name] for name in ("input_ids", "attention_mask")}
            embedded = torch.nn.functional.normalize(winner.get_text_features(**tokens).pooler_output)
            means.append(torch.nn.functional.normalize(embedded.mean(0), dim=0))
        logits = winner.logit_scale.exp() * seen @ torch.stack(means).T
    target = torch.tensor([("w5", "w6", "w7").index(example.target) for example in chosen])
    expected = float(logits.log_softmax(-1).gather(1, target[:, None]).mean())
    assert scores["named/log_probability"] == pytest.approx(expected, abs=1e-4)


def test_siglip_reads_texts_of_one_length(clips: Path, tmp_path: Path) -> None:
    """The pipeline of zero-shot classification and the processor of SigLIP 2 pad them to the full length."""
    config = transformers.SiglipConfig(text_config=SMALL | {"max_position_embeddings": 12}, vision_config=CLIP_IMAGE)
    folder = save(transformers.SiglipModel(config), tmp_path / "siglip", TOKENS)
    network, texts = open_network(open_module(folder)), ["w5 w6", "w7"]
    tokens = embedded_texts(network, folder, texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = tokenizer(texts, padding="max_length", max_length=12, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(tokens["input_ids"], expected)
    assert embedded_texts(network, folder, ["w5 " * 20])["input_ids"].shape == (1, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["w5", "w6"]}, r"images/w7/0.png: label 'w7' is none of the 2 classes"),
        ({"prompts": ["a photo"]}, r"prompts.*'a photo' lacks \{label\}"),
    ],
)
def test_classes_that_no_text_names_are_refused(
    clips: Path, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    task = {"name": "named", "kind": "classification", "file": "images", "heldout": 0.5} | changes
    with pytest.raises(InputError, match=message):
        problem_of(tmp_path / "config.yaml", document(clips, task)).prepare()


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("similarity", {"sentence1": "w5", "sentence2": "w6"}, r":2: has no field 'score' \(it has sentence1, sent"),
        ("similarity", {"sentence1": "w5", "sentence2": 7, "score": 1}, r":2: sentence2: 7; expected a text"),
        ("similarity", {"sentence1": "w5", "sentence2": "w6", "score": "x"}, r":2: target: 'x'; expected"),
        ("retrieval", {"query": "w5", "document": []}, r":2: document: \[\]; expected a text, or a list of texts"),
        ("retrieval", {"document": "w5"}, r":2: has no field 'query'"),
    ],
)
def test_a_record_that_is_no_pair_is_named(
    sentences: Path, kind: str, record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = {"sentence1": "w5", "sentence2": "w6", "score": 1, "query": "w5", "document": "w6"}
    data = write_lines(tmp_path / "data.jsonl", [good, record, good])
    task = {"name": "task", "kind": kind, "file": str(data), "heldout": 0.5}
    with pytest.raises(InputError, match=message):
        problem_of(tmp_path / "config.yaml", document(sentences, task)).prepare()


def test_a_plain_encoder_has_the_mean_of_its_states(tmp_path: Path) -> None:
    for seed in (1, 2):
        config = transformers.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"])
        save(randomised(transformers.DebertaV2Model(config), seed, 0.3), tmp_path / f"model{seed}", TOKENS)
    pairs = [{"sentence1": f"w{5 + i} w6", "sentence2": f"w{7 + i % 3}", "score": i % 4} for i in range(8)]
    write_lines(tmp_path / "pairs.jsonl", pairs)
    task = {"name": "pairs", "kind": "similarity", "file": "pairs.jsonl", "heldout": 0.5, "metric": "pearson"}
    problem = problem_of(tmp_path / "config.yaml", document(tmp_path, task))
    prepared, (_, baselines) = problem.prepare(), problem.space.baselines()
    scores = open_evaluators(problem, prepared).heldout.score(baselines).matrices["pairs"]["pearson"]
    problem.backend.export("", baselines[0], tmp_path / "out", "---\n---\n", lambda: None)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    chosen = [pairs[i] for i in prepared.heldout[0].indices]

    def embedded(name: str) -> Any:
        tokens = tokenizer([record[name] for record in chosen], padding=True, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        with torch.no_grad():
            states = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))

    cosines = (embedded("sentence1") * embedded("sentence2")).sum(-1).numpy()
    expected = np.corrcoef(cosines, [record["score"] for record in chosen])[0, 1]
    assert scores[0].mean() == pytest.approx(expected, abs=1e-4)
