"""A run as the public may see it: models by their public names, other paths of the machine by their last part, and
prompts, answers and the log where the user wants them."""

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from evojax_merge.checkpoints.pipelines import SHEET
from evojax_merge.errors import InputError, without_secrets
from evojax_merge.mergekit.write import dump_yaml
from evojax_merge.report.card import map_texts, public_names, public_recipe
from evojax_merge.report.run_data import Result, RunData
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.run_schema import MAX_DOCUMENT
from evojax_merge.system.regular_file import read_regular

_PART = r"[^\s/\"'<>|:;,()\[\]{}`*\\&]+"
# Keys of a model's JSON files whose values are paths of the machine on which a library wrote them.
_PATH_KEY = re.compile(r"(path|file|dir|folder)$")
# Words of a config; other texts may be prompts, instructions and addresses.
_WORD = re.compile(r"[!-~]*")
LEFT_OUT = "(left out)"
# The recipe in a card.
_RECIPE = re.compile(r"(\n(`{3,})yaml\n)(.*?\n)(\2\n)", re.DOTALL)
# The section of a card with the contact sheet.
_SHEET = re.compile(rf"\n## Pictures\n\n[^\n]*\n\n!\[contact sheet\]\({re.escape(SHEET)}\)\n")


class Publication:
    """The public form of a run's texts and documents. `config`: the run's; `with_answers`: whether prompts, answers and
    the log are public."""

    def __init__(self, run: Path, config: Mapping[str, Any], with_answers: bool) -> None:
        self.with_answers = with_answers
        models = [m for m in (config.get("base"), *(config.get("parents") or ())) if os.path.isabs(str(m))]
        self.names = dict(zip(models, public_names([Path(model) for model in models]), strict=True))
        inputs = config.get("inputs") or {}
        files = (*models, *inputs, os.path.abspath(run), os.path.realpath(run), sys.prefix, Path(__file__).parents[1])
        folders = {str(Path(file).parent) for file in files if os.path.isabs(file)}
        folders |= {os.getcwd(), str(Path.home()), tempfile.gettempdir()}
        places = sorted({*self.names, *folders} - {"/"}, key=len, reverse=True)
        # A path in a page of HTML or in its JSON may be escaped.
        forms = dict.fromkeys(form for path in places for form in (path, escape(path), json.dumps(path)[1:-1]))
        # Paths of one folder below the root stand together: their common beginning is looked for once.
        by_root: dict[str, list[str]] = {}
        for form in forms:
            by_root.setdefault(form.split("/")[1], []).append(re.escape(form))
        paths = "|".join(f"(?:{'|'.join(group)})" for group in by_root.values()) or r"(?!)"
        self._known = re.compile(rf"(?:file://)?(?:{paths})(?![\w.-])(?:/+{_PART})*/*")
        self._any = re.compile(rf"(?<![\w.~/<\\-])(?:file://)?/{_PART}(?:/+{_PART})+/*")

    def known(self, text: str) -> str:
        """The text in which models have their public names, and other paths that the run knows are cut to their last
        part."""
        return self._known.sub(self._cut, text)

    def text(self, text: str) -> str:
        """The text in which any absolute path is cut."""
        return self._any.sub(self._cut, self.known(text))

    def _cut(self, path: re.Match[str]) -> str:
        place = path[0].removeprefix("file://").rstrip("/")
        for model, name in self.names.items():
            if place == model or place.startswith(f"{model}/"):
                return name + place.removeprefix(model)
        return place.rpartition("/")[2]

    def value(self, document: Any) -> Any:
        """A document of JSON or YAML whose texts are public, in keys as well."""
        return map_texts(document, lambda key, text: self._of_document(text))

    def _of_document(self, text: str) -> str:
        return Path(text).name if os.path.isabs(text) and self.known(text) == text else self.text(text)

    def _of_config(self, key: str, text: str) -> str:
        is_word = os.path.isabs(text) or (_WORD.fullmatch(text) and "{" not in text and "://" not in text)
        return self._of_document(text) if is_word or self.with_answers else LEFT_OUT

    def _of_model(self, key: str, text: str) -> str:
        is_private = os.path.isabs(text) and (_PATH_KEY.search(key) or self.known(text) != text)
        return self._of_document(text) if is_private else text

    def file(self, file: Path) -> str | None:
        """The public text of a file of the winner, or of its recipe or result; None where it is public as it is."""
        if file.suffix not in (".md", ".yml", ".yaml", ".json") or file.name in ("tokenizer.json", "vocab.json"):
            return None
        text = read_regular(file, "a text", MAX_DOCUMENT).decode(errors="replace")
        if file.suffix == ".md":
            card = _RECIPE.sub(lambda part: part[1] + self._recipe(part[3], file) + part[4], text)
            return self.text(card if self.with_answers else _SHEET.sub("", card))
        if file.suffix != ".json":
            return self._recipe(text, file)
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            raise InputError(file, "is no JSON, and cannot be published") from None
        public = self.value(document) if file.name == "result.json" else map_texts(document, self._of_model)
        return None if public == document else json.dumps(public, indent=1, ensure_ascii=False) + "\n"

    def _recipe(self, text: str, file: Path) -> str:
        """The public text of a recipe, without the prompts of its calibration or its experts."""
        return public_recipe(text, file, self.names, "" if self.with_answers else LEFT_OUT)

    def run(self, run: RunData) -> RunData:
        """The run of a page for the public."""
        config = map_texts(run.config, self._of_config)
        sessions = [session for session in run.environment.get("sessions", ()) if isinstance(session, dict)]
        environment = [{name: part for name, part in each.items() if name != "command"} for each in sessions]
        log, warnings = (
            [without_secrets(self.text(line)) for line in lines] if self.with_answers else []
            for lines in (run.log, run.warnings)
        )
        try:
            document = None if run.result is None else self.value(run.result.model_dump(by_alias=True))
            result = None if document is None else Result.model_validate(document)
        except ValueError:
            where = RunFolder(run.path).result
            raise InputError(where, "has names that are the same without their folders; rename the models") from None
        return replace(
            run, config=config, config_text=dump_yaml(config), environment={"sessions": self.value(environment)},
            recipe=None if run.recipe is None else self.file(RunFolder(run.path).recipe),
            log=log, warnings=warnings, notes=list(map(self.text, run.notes)),
            result=result,
        )  # fmt: skip
