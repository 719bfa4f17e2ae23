"""`evojax-merge publish`: a run's winner as a repository of the hub, with its card, recipe and result."""

import os
import tempfile
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from evojax_merge.checkpoints.writer import MARKER, RECIPE
from evojax_merge.errors import Failed, InputError, hide
from evojax_merge.regular_file import read_regular
from evojax_merge.report.card import public_recipe
from evojax_merge.report.progress import console
from evojax_merge.search.run_folder import is_run
from evojax_merge.search.run_parts import RunFolder


def publish(run: Path, repo: str, push: bool, private: bool) -> None:
    """List the files of a run's winner, and upload them to the hub with `push`."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError("--repo", f"{repo}: expected owner/name as on the hub ({error})") from None
    with tempfile.TemporaryDirectory() as folder:
        files = _stage(run, Path(folder))
        for file in files:
            console.print(f"{file.name}  {file.stat().st_size:,} bytes", markup=False, highlight=False, soft_wrap=True)
        if not push:
            console.print(f"nothing was uploaded; --push uploads these {len(files)} files to {repo}", highlight=False)
            return
        token = huggingface_hub.get_token()
        if token is None:
            raise InputError("HF_TOKEN", "is not set; expected a token of the hub with write access")
        hide(token, "HF_TOKEN")
        try:
            api = huggingface_hub.HfApi(token=token)
            api.create_repo(repo, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with evojax-merge")
        except Exception as error:
            # Also an error of the client's HTTP library, which is another one in other versions of the client.
            raise Failed(f"{repo}: could not be uploaded ({error})") from None
    console.print(f"uploaded {len(files)} files: {commit}", markup=False, highlight=False, soft_wrap=True)


def _stage(run: Path, place: Path) -> list[Path]:
    """Fill a folder with the files to upload, as links, and recipes without paths of this machine. Return the files.
    Raises InputError where the run has no winner."""
    folder = RunFolder(run)
    if not is_run(folder):
        raise InputError(run, "is not a run folder of a search" if run.exists() else "no such folder")
    if not (folder.result.is_file() and folder.recipe.is_file() and folder.model.is_dir()):
        raise InputError(run, "has no winner to publish; finish it with search … --resume")
    model = [file for file in sorted(folder.model.iterdir()) if file.is_file() and file.name != MARKER]
    others = [file for file in (folder.recipe, folder.result, run / "report.html") if file.is_file()]
    for file in (*model, *others):
        if file.name in (folder.recipe.name, RECIPE):
            text = public_recipe(read_regular(file, "a recipe").decode(errors="replace"), file)
            (place / file.name).write_text(text, encoding="utf-8")
        else:
            os.symlink(file.resolve(), place / file.name)
    return sorted(place.iterdir())
