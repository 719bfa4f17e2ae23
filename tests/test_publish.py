"""The files that `publish` would upload of runs of several kinds have no path of the machine, no key, and no prompt or
answer unless the user asks for them."""

import base64
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.commands import refusal, run_here
from helpers.families import Family, build_family
from helpers.files import read_json, write_json, write_yaml
from helpers.searches import search_config
from tiny_generators import make_ddpm

from evojax_merge.checkpoints.pipelines import SHEET
from evojax_merge.commands.publish import stage
from evojax_merge.report.publication import LEFT_OUT, Publication

KEY = "sk-abcdefgh12345678"
FUNCTIONS = """
def shorter(record, left, right):
    return "left" if len(left) < len(right) else "right"

def grey(records, images):
    return -abs(images.mean((1, 2, 3)) - 0.4)
"""
PROMPT = "Kindly continue: {prompt}"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Models of one name in folders of their own, one with a space and a character of HTML in its name, whose files
    name places of the machine on which a library wrote them."""
    root = tmp_path_factory.mktemp("machine") / "Jo & Co"
    family = build_family(root)
    models = []
    for number, folder in enumerate(family.parents):
        place = root / f"models {number}" / "tuned"
        place.parent.mkdir()
        models.append(folder.rename(place))
        config = read_json(place / "tokenizer_config.json")
        config |= {"name_or_path": str(place), "tokenizer_file": "/home/somebody/else/tokenizer.json"}
        write_json(place / "tokenizer_config.json", config)
    (root / "functions.py").write_text(FUNCTIONS)
    return Family(root, family.base, tuple(models), family.tasks)


def searched(family: Family, run: Path, **changes: Any) -> Path:
    space, search = {"method": "linear", "parameters": {"weight": {}}}, {"strategy": "random"}
    document = search_config(family, 1, 3, **({"space": space, "search": search, "seed": 1, "tasks": None} | changes))
    config = write_yaml(family.root / f"{run.name}.yaml", document)
    run_here("search", config, "--out", run)
    # What a library's exception, a warning or a user's traceback may have brought into the log.
    record = json.loads(family.tasks.read_text().splitlines()[0])
    with (run / "run.log").open("a") as log:
        log.write(f"2026-01-01T00:00:00Z warning: {family.root}/functions.py: Authorization: {KEY} {record}\n")
    run_here("report", run)
    return run


@pytest.fixture(scope="module")
def runs(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = family.root / "runs"
    task = {"name": "text", "kind": "exact_match", "file": str(family.tasks), "max_new_tokens": 2, "prompt": PROMPT,
            "heldout": 0.5}  # fmt: skip
    likely = {"name": "text", "kind": "likelihood", "file": str(family.tasks), "heldout": 0.5}
    judged = {"name": "taste", "kind": "human", "file": str(family.tasks), "max_new_tokens": 2, "votes": 4,
              "prompt": PROMPT, "question": "Which one is kinder to cats?", "heldout_votes": 2,
              "judge": str(family.root / "functions.py:shorter")}  # fmt: skip
    images = {"name": "grey", "kind": "image_generation", "function": str(family.root / "functions.py:grey"),
              "images": 4, "steps": 2, "heldout": 0.5}  # fmt: skip
    first = make_ddpm(family.root / "a/ddpm", 0)
    pipelines = [str(first), str(make_ddpm(family.root / "b/ddpm", 1, base=first))]
    return {
        "text": searched(family, folder / "text", tasks=[task]),
        "judged": searched(family, folder / "judged", tasks=[judged], search={"generations": 1, "population": 3}),
        "measured": searched(
            family, folder / "measured", tasks=[likely], space={"method": "regmean"}, search={"then": "polish"},
            calibration={"file": str(family.tasks), "prompt": "Kindly continue, kinder to cats: {prompt}"},
        ),
        "mixture": searched(
            family, folder / "mixture", tasks=[likely], space=None, search={"generations": 1, "population": 3},
            mixture={"experts": list(map(str, family.parents)), "positive_prompts": {
                str(parent): [f"Kindly continue, w{k + 4} w5"] for k, parent in enumerate(family.parents)}},
        ),
        "images": searched(family, folder / "images", tasks=[images], backend="torch", base=None, parents=pipelines,
                           evaluation={"chunk": 1}),
    }  # fmt: skip


def published(run: Path, place: Path, with_answers: bool = False) -> dict[str, bytes]:
    place.mkdir()
    return {str(file.relative_to(place)): file.read_bytes() for file in stage(run, place, with_answers)}


def private(family: Family) -> Iterator[str]:
    """Texts that no file for the public may hold."""
    yield from (str(family.root), family.root.parent.name, "Jo & Co", "Jo &amp; Co", "models 0", "/somebody/else")
    yield from (f"{path}/" for path in (Path.home(), Path.cwd(), Path(sys.prefix), Path(__file__).parents[1]))
    yield from (KEY, "Kindly continue", "kinder to cats", str(os.getpid()) + " on ")


def texts(family: Family) -> list[str]:
    """The prompts and right answers of the examples, of which a vocabulary holds single words."""
    values = [value for line in family.tasks.read_text().splitlines() for value in json.loads(line).values()]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    return [text.strip() for text in texts if isinstance(text, str) and len(text.split()) > 2]


@pytest.mark.parametrize("kind", ["text", "judged", "measured", "mixture", "images"])
def test_nothing_private_would_be_uploaded(kind: str, runs: dict[str, Path], family: Family, tmp_path: Path) -> None:
    run, prompts = runs[kind], texts(family)
    assert len(prompts) >= 12
    # The run itself holds all of it.
    page = (run / "report.html").read_text()
    assert KEY in page and "Jo &amp; Co" in page
    files = published(run, tmp_path / "upload")
    assert {"README.md", "recipe.yaml", "result.json", "report.html"} <= files.keys()
    for name, content in files.items():
        for text in (*private(family), *prompts):
            assert text.encode() not in content and json.dumps(text)[1:-1].encode() not in content, (name, text)
    assert not {"contact_sheet.png", "run.log", "votes.jsonl", "heldout_answers.jsonl"} & files.keys()
    assert b"contact_sheet" not in files["README.md"] and b"data:image/png" not in files["report.html"]
    assert {"images": "unet/config.json"}.get(kind, "config.json") in files
    # The page still has what proves the result: figures, config, inputs, environment.
    shown = files["report.html"].decode()
    assert "<summary>Config</summary>" in shown and "<summary>Environment</summary>" in shown and "Vega" in shown
    assert LEFT_OUT in shown or kind == "images"
    # The files that need no change are the run's own, to the byte.
    weights = next(name for name in files if name.endswith(".safetensors"))
    assert files[weights] == (run / "best/model" / weights).read_bytes()


@pytest.mark.parametrize("kind", ["text", "images"])
def test_answers_are_uploaded_where_the_user_wants_them(
    kind: str, runs: dict[str, Path], family: Family, tmp_path: Path
) -> None:
    files = published(runs[kind], tmp_path / "upload", with_answers=True)
    page = files["report.html"].decode()
    assert str(family.root) not in page and "Jo &amp; Co" not in page
    assert "<summary>Log</summary>" in page
    if kind == "images":
        assert "contact_sheet.png" in files and b"contact_sheet.png" in files["README.md"] and "image/png" in page
    else:
        assert "Kindly continue" in page and "Wins and losses" in page


def test_models_have_the_names_of_the_card(runs: dict[str, Path], family: Family, tmp_path: Path) -> None:
    files = published(runs["text"], tmp_path / "upload")
    recipe, page = files["recipe.yaml"].decode(), files["report.html"].decode()
    assert set(re.findall("model: (.+)", recipe)) >= {"tuned", "tuned-2"}
    assert b"- `tuned`" in files["README.md"] and b"- `tuned-2`" in files["README.md"]
    assert "tuned-2" in page
    assert {"base", "tuned"} <= {row["name"] for row in json.loads(files["result.json"])["table"]}
    tokenizer = json.loads(files["tokenizer_config.json"])
    assert tokenizer["name_or_path"] in ("base", "tuned", "tuned-2") or "name_or_path" not in tokenizer


def test_only_what_this_program_wrote_is_uploaded(runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    """Links are not followed, and files of a user's own stay at home."""
    run = shutil.copytree(runs["text"], tmp_path / "run")
    secret = tmp_path / "secret"
    secret.write_text("2026-01-01T00:00:00Z the user's diary")
    (run / "run.log").unlink()
    (run / "run.log").symlink_to(secret)
    (run / "best/model/diary.txt").symlink_to(secret)
    (run / "best/model/notes").mkdir()
    (run / "best/model/notes/a.txt").write_text("the user's diary")
    run_here("report", run)
    assert "diary" not in (run / "report.html").read_text()
    files = published(run, tmp_path / "upload", with_answers=True)
    assert not any(b"diary" in content for content in files.values())
    warnings = capsys.readouterr().err
    assert "diary.txt: evojax-merge did not write it, and it is not uploaded" in warnings
    assert "notes/a.txt: evojax-merge did not write it" in warnings
    (run / "run.log").unlink()
    (run / "run.log").write_text("a log of the user's diary\n")
    assert not any(b"diary" in content for content in published(run, tmp_path / "again", True).values())


def test_what_a_link_in_the_place_of_pictures_leads_to_stays_at_home(runs: dict[str, Path], tmp_path: Path) -> None:
    run, secret = shutil.copytree(runs["text"], tmp_path / "run"), tmp_path / "secret"
    for content in (b"the user's diary", b"\x89PNG the user's diary"):
        secret.write_bytes(content)
        (run / "best/model" / SHEET).unlink(missing_ok=True)
        (run / "best/model" / SHEET).symlink_to(secret)
        run_here("report", run)
        pages = [(run / "report.html").read_bytes(), published(run, tmp_path / content.hex(), True)["report.html"]]
        assert not any(base64.b64encode(content) in page for page in pages)
    (run / "best/model" / SHEET).unlink()
    (run / "best/model" / SHEET).write_bytes(b"no picture")
    assert b"data:image/png" not in published(run, tmp_path / "again", True)["report.html"]


@pytest.mark.parametrize("changes", [{"parents": 3}, {"inputs": 5}, {"inputs": {1: "a"}}, {"base": [1]}])
def test_a_config_that_no_search_wrote_names_its_key(
    changes: dict[str, Any], runs: dict[str, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(runs["text"], tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text()) | changes
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert f"run/config.yaml: {next(iter(changes))}" in refusal("publish", run, "--repo", "one/two")


def test_names_that_are_the_same_without_their_folders_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs["text"], tmp_path / "run")
    bred = {"method": "slerp", "parents": ["one", "two"], "parameters": {"t": 0.5}, "split": 1}
    result = read_json(run / "result.json") | {"lineage": [bred | {"name": name} for name in ("/a/x", "/b/x")]}
    write_json(run / "result.json", result)
    assert "run/result.json: has names that are the same" in refusal("publish", run, "--repo", "one/two")


def test_a_key_of_today_is_in_no_line_of_an_old_log(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    page = published(runs["text"], tmp_path / "upload", with_answers=True)["report.html"].decode()
    assert "Authorization: [OPENAI_API_KEY]" in page and KEY not in page


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/me/x/model", "model"),
        ("see /home/me/x/y.py:3 and /data/z", "see y.py:3 and z"),
        ('File "/opt/a b/c.py", line 3', 'File "a b/c.py", line 3'),
        ("file:///home/me/x", "x"),
        ("oxen:/srv/data@main/a.jsonl", "oxen:a.jsonl"),
        ("--out=/srv/runs/mine", "--out=mine"),
        ("https://host/a/b and accuracy/mean, 1 / 2, </pre>", "https://host/a/b and accuracy/mean, 1 / 2, </pre>"),
        ("/models/of/me/base+/srv/lora", "base model+lora"),
        ("/models/of/me/base/config.json", "base model/config.json"),
        ("/models/of/me/base-2/config.json", "config.json"),
    ],
)
def test_paths_are_cut(text: str, public: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publication = Publication(tmp_path, {"base": "/models/of/me/base", "parents": ["zoo:maths"]}, False)
    publication.names["/models/of/me/base"] = "base model"
    assert publication.text(text) == public
