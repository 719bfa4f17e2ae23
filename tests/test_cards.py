"""Model cards: what others read of a merge, and what is believed of the cards of its parents."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from evojax_merge.checkpoints.references import hub_id
from evojax_merge.report.card import card_in_dtype, merge_card, public_names
from evojax_merge.report.front_matter import MAX_BYTES, read_front_matter
from evojax_merge.zoo.references import canonical_reference, recipe_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model(folder: Path, card: str | bytes = "", architecture: str = "LlamaForCausalLM") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(f'{{"architectures": ["{architecture}"]}}')
    if card:
        (folder / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
    return folder


def header_of(*folders: Path) -> dict[str, object]:
    card = merge_card("mine", ["linear"], {str(folder): folder for folder in folders}, "merge_method: linear\n")
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def card(**header: object) -> str:
    return f"---\n{yaml.safe_dump(header)}---\n# A model\n"


def test_the_front_matter_is_the_hubs(tmp_path: Path) -> None:
    shared = card(license="apache-2.0", language=["en", "ja"], tags=["x"])
    one = model(tmp_path / "models--owner--one" / "snapshots" / COMMIT, shared)
    other = model(tmp_path / "other", shared)
    assert header_of(one, other) == {
        "base_model": ["owner/one"],
        "base_model_relation": "merge",
        "license": "apache-2.0",
        "language": ["en", "ja"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mergekit", "merge", "evojax-merge"],
    }
    assert "pipeline_tag" not in header_of(one, model(tmp_path / "vision", architecture="ViTForImageClassification"))


def test_models_of_no_hub_are_not_linked(tmp_path: Path) -> None:
    assert header_of(model(tmp_path / "one")).keys() == {"library_name", "pipeline_tag", "tags"}


def test_the_hubs_library_takes_a_card_with_its_results(tmp_path: Path) -> None:
    one = model(tmp_path / "models--owner--one" / "snapshots" / COMMIT, card(license="apache-2.0", language="en"))
    scores = {"sums/exact_match": 0.25, "a: b/c/acc": 1.0, "text/log_probability": -4.5, "text/none": float("nan")}
    text = merge_card("mine", ["linear"], {"owner/one": one}, "{}\n", scores)
    data = ModelCard(text, ignore_metadata_errors=False).data
    for name in data.base_model:
        validate_repo_id(name)
    assert data.model_name == "mine"
    results = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert results == {("sums", "exact_match"): 0.25, ("a: b/c", "acc"): 1.0, ("text", "log_probability"): -4.5}
    assert {(result.task_type, result.dataset_split) for result in data.eval_results} == {
        ("text-generation", "heldout")
    }
    # The library writes the same front matter, and another model than the scored one has none of its results.
    assert yaml.safe_load(data.to_yaml()) == yaml.safe_load(text.split("---\n")[1])
    assert ModelCard(card_in_dtype(text, "bfloat16", "float32")).data.eval_results is None


@pytest.mark.parametrize(
    ("one", "other", "agreed"),
    [
        ({"license": "mit"}, {"license": "MIT"}, {"license": "mit"}),
        ({"license": "mit"}, {"license": "apache-2.0"}, {}),
        ({"license": "mit"}, {}, {}),
        ({"license": "mit"}, {"license": ["mit"]}, {}),
        ({"license": "other", "license_name": "a", "license_link": "https://a.b/c"},
         {"license": "other", "license_name": "a", "license_link": "https://a.b/c"},
         {"license": "other", "license_name": "a", "license_link": "https://a.b/c"}),
        ({"license": "other", "license_name": "a"}, {"license": "other", "license_name": "b"}, {}),
        ({"license": "mit\nevil: yes"}, {"license": "mit\nevil: yes"}, {}),
        ({"license": 7}, {"license": 7}, {}),
        ({"language": "en"}, {"language": ["en"]}, {"language": ["en"]}),
        ({"language": ["ja", "en"]}, {"language": ["en", "ja"]}, {"language": ["en", "ja"]}),
        ({"language": False}, {"language": "no"}, {"language": ["no"]}),
        ({"language": "en"}, {"language": "ja"}, {}),
        ({"language": []}, {"language": []}, {}),
        ({"language": [["en"]]}, {"language": [["en"]]}, {}),
        ({"language": [{"en": 1}]}, {"language": [{"en": 1}]}, {}),
        ({"language": ["en"] * 1000}, {"language": ["en"] * 1000}, {}),
        ({"language": "<b>"}, {"language": "<b>"}, {}),
    ],
)  # fmt: skip
def test_what_all_cards_say(one: dict, other: dict, agreed: dict, tmp_path: Path) -> None:
    found = header_of(model(tmp_path / "one", card(**one)), model(tmp_path / "other", card(**other)))
    keys = ("license", "license_name", "license_link", "language")
    assert {key: found[key] for key in keys if key in found} == agreed


@pytest.mark.parametrize(
    "text",
    [
        b"", b"---", b"---\n---\n", b"# no front matter\n", b"---\nlicense: mit\n",
        b"\xff\xfe\x00---\nlicense: mit\n---\n", b"---\n- a\n- list\n---\n", b"---\nlicense: [mit\n---\n",
        b"---\na: &a [*a]\n---\n", b"---\nlicense: mit\nseed: 2020-99-99\n---\n",
        b"---\n!!python/object/apply:os.system [ls]\n---\n", b"---\n? {a: b}\n: c\n---\n", b"---\na: 1\na: 2\n---\n",
        b"---\n" + b"[" * 5000 + b"\n---\n", b"---\n" + b"a: b\n" * MAX_BYTES + b"---\n",
        b"---\na: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
        b"c: &c [*b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c]\n"
        b"e: &e [*d, *d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e, *e, *e, *e, *e, *e, *e, *e, *e]\n---\n" * 3,
    ],
)  # fmt: skip
def test_strangers_front_matter_that_is_none(text: bytes, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", text)
    assert "license" not in read_front_matter(folder)
    assert "license" not in header_of(folder)


def test_a_card_that_is_no_file(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / "README.md").mkdir()
    assert read_front_matter(folder) == {}
    (folder / "README.md").rmdir()
    (folder / "README.md").symlink_to("/dev/zero")
    assert read_front_matter(folder) == {}


def test_hub_ids_of_folders() -> None:
    hub = Path("/cache/hub")
    assert hub_id(hub / "models--owner--name" / "snapshots" / COMMIT) == "owner/name"
    assert hub_id(hub / "models--gpt2" / "snapshots" / COMMIT) == "gpt2"
    for other in ("models--a--b--c/snapshots/x", "models--a b--c/snapshots/x", "models--a--b/x", "a--b/snapshots/x"):
        assert hub_id(hub / other) is None


def test_recipes_name_models_so_that_they_are_found_from_any_place() -> None:
    snapshot = Path(f"/cache/hub/models--owner--name/snapshots/{COMMIT}")
    for reference in ("owner/name", "owner/name@main", f"owner/name@{COMMIT}"):
        assert recipe_reference(reference, snapshot) == f"owner/name@{COMMIT}"
    assert recipe_reference(str(snapshot), snapshot) == str(snapshot)
    assert canonical_reference(str(snapshot)) == canonical_reference(f"owner/name@{COMMIT}")
    assert recipe_reference("../models/one", Path("/home/models/one")) == "/home/models/one"
    assert recipe_reference("zoo:maths", Path("/cache/zoo/maths")) == "zoo:maths"


def test_models_of_one_name_are_numbered() -> None:
    assert public_names([Path("/a/m"), Path("/b/m"), Path("/c/n"), Path("/d/m")]) == ["m", "m-2", "n", "m-3"]


def test_revisions_of_one_hub_model_are_told_apart(tmp_path: Path) -> None:
    snapshots = tmp_path / "models--owner--name" / "snapshots"
    revisions = [model(snapshots / COMMIT), model(snapshots / COMMIT[::-1])]
    assert public_names(revisions) == ["owner/name", f"owner/name@{COMMIT[::-1]}"]
    assert header_of(*revisions)["base_model"] == ["owner/name"]


def test_the_recipe_names_models_and_no_places(tmp_path: Path) -> None:
    one, other = model(tmp_path / "a" / "one"), model(tmp_path / "b" / "one")
    hub = model(tmp_path / "models--owner--name" / "snapshots" / COMMIT)
    recipe = (
        f"merge_method: linear\n# from {tmp_path}\nmodels:\n- model: {one}\n- model: ../b/one\n"
        "- model: owner/name@main\n"
        f"tokenizer_source: {one}\nchat_template: '{{{{ ```messages``` }}}}'\n"
    )
    models = {str(one): one, "../b/one": other, "owner/name@main": hub}
    text = merge_card("mine", ["linear"], models, recipe)
    assert str(tmp_path) not in text and "../b" not in text
    shown = yaml.safe_load(text.partition("````yaml\n")[2].partition("````")[0])
    assert [row["model"] for row in shown["models"]] == ["one", "one-2", "owner/name@main"]
    assert shown["tokenizer_source"] == "one"
    # One that names no place is shown as it was written.
    plain = "merge_method: linear  # mine\nmodels: [{model: owner/name}, {model: zoo:3/base}]\n"
    assert plain in merge_card("mine", ["linear"], {"owner/name": hub, "zoo:3/base": one}, plain)
