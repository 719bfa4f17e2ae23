"""`evojax-merge publish`: a run's winner as a repository of the hub, with its card, recipe and result."""

import os
import tempfile
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from evojax_merge.checkpoints.pipelines import SHEET
from evojax_merge.checkpoints.writer import MARKER, own_names
from evojax_merge.errors import Failed, InputError, hide, print_warning
from evojax_merge.report.page import run_page
from evojax_merge.report.publication import Publication
from evojax_merge.report.run_data import read_run
from evojax_merge.search.run_folder import run_at
from evojax_merge.search.run_schema import read_run_config
from evojax_merge.system.console import console


def publish(run: Path, repo: str, push: bool, private: bool, with_answers: bool = False) -> None:
    """List the files of a run's winner, and upload them to the hub with `push`."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError("--repo", f"{repo}: expected owner/name as on the hub ({error})") from None
    with tempfile.TemporaryDirectory() as folder:
        files = stage(run, Path(folder), with_answers)
        for file in files:
            console.print(f"{file.relative_to(folder)}  {file.stat().st_size:,} bytes", soft_wrap=True)
        if not push:
            console.print(f"nothing was uploaded; --push uploads these {len(files)} files to {repo}")
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
    console.print(f"uploaded {len(files)} files: {commit}", soft_wrap=True)


def stage(run: Path, place: Path, with_answers: bool) -> list[Path]:
    """Fill a folder with the files to upload: those that this program wrote, as links, or without paths of this machine
    where they have any. Return the files. Raises InputError where the run has no winner, or links in place of files."""
    folder = run_at(run)
    if not (folder.result.is_file() and folder.recipe.is_file() and folder.model.is_dir()):
        raise InputError(run, "has no winner to publish; finish it with search … --resume")
    publication = Publication(run, read_run_config(folder.config), with_answers)
    written = own_names(folder.model).keys() - {MARKER, *(() if with_answers else (SHEET,))}
    files = {folder.recipe.name: folder.recipe, folder.result.name: folder.result}
    for file in sorted(folder.model.rglob("*")):
        name = file.relative_to(folder.model).as_posix()
        if name in written:
            files[name] = file
        elif name not in (MARKER, SHEET) and not (file.is_dir() and not file.is_symlink()):
            print_warning(f"{file}: evojax-merge did not write it, and it is not uploaded")
    for name, file in files.items():
        if file.is_symlink():
            raise InputError(file, "is a link, which is not followed; put the file itself in its place")
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        text = publication.file(file)
        if text is None:
            os.symlink(file.resolve(), place / name)
        else:
            (place / name).write_text(text, encoding="utf-8")
    if folder.page.is_file():
        page = run_page(read_run(run, working=False), publication=publication)
        (place / folder.page.name).write_text(page, encoding="utf-8")
    return sorted(path for path in place.rglob("*") if path.is_file())
