"""The prompts of a `calibration` section, and sources with the moments that a method looks at on them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from merge_kernels import Method

from evojax_merge.checkpoints.config_file import trained_positions
from evojax_merge.checkpoints.moments import Moments, Rows
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.errors import InputError
from evojax_merge.schema.calibration import Calibration
from evojax_merge.tasks.prompts import encode_prompt
from evojax_merge.tasks.records import read_file
from evojax_merge.tasks.task import FindFile
from evojax_merge.tasks.templates import check_template, fields_of_any, fill_prompt

NONE = "calibration: {file: prompts.jsonl}"


def with_moments(
    where: str, section: Calibration | None, method: Method, sources: Sources, parents: Sequence[int], folder: Path,
    find_file: FindFile, warn: Callable[[str], None],
) -> Sources:  # fmt: skip
    """Sources whose `moments` are those that a method looks at, measured when they are asked for; the same sources for
    a method that looks at none. parents: the numbers of the sources that are merged; relative paths start in `folder`.

    Raises InputError for a section that is missing or has no meaning, prompts that cannot be read, and models that this
    program does not run.
    """
    key = f"{where}: calibration"
    if not method.looks_at:
        if section is not None:
            raise InputError(key, f"{method.name} looks at no prompts; leave it out")
        return sources
    if section is None:
        what = f"missing; {method.name} looks at the parents' {method.looks_at} on prompts; expected {NONE}"
        raise InputError(key, what)
    if len(section.files) not in (1, len(parents)):
        what = f"a list of {len(section.files)}; expected one file, or one for each of the {len(parents)} parents"
        raise InputError(f"{key}.file", what)
    if method.looks_at == "merged inputs" and sources.vocabulary is not None:
        what = f"{method.name} reads all prompts with merged layers; expected models of one tokenizer"
        raise InputError(f"{where}: tokenizer_source", what)
    check_template(f"{key}.prompt", section.prompt)
    files = tuple(find_file(f"{key}.file", file, folder) for file in section.files)
    records = [read_file(file)[: section.limit] for file in files]
    fields = [fields_of_any(section.prompt, [row.fields for row in rows]) for rows in records]
    texts = [
        [fill_prompt(row.where, f"{key}.prompt", section.prompt, row.fields, names) for row in rows]
        for rows, names in zip(records, fields, strict=True)
    ]
    rows: list[Rows | None] = [None] * len(sources.folders)
    for k, source in enumerate(parents):
        rows[source] = _tokens(key, sources, source, texts[k if len(texts) > 1 else 0], warn)
    if method.looks_at != "gradients":
        matrices = [entry for entry in sources.folders[parents[0]].entries.values() if len(entry.shape) == 2]
        width, fewest = max(entry.shape[-1] for entry in matrices), min(sum(map(len, each)) for each in rows if each)
        if fewest < width:
            warn(
                f"{key}: {fewest:,} tokens for inputs of up to {width:,} numbers: covariances are singular, and are "
                "damped; more prompts make them full"
            )
    return replace(sources, moments=Moments(method, sources.folders, tuple(rows), files))


def _tokens(key: str, sources: Sources, source: int, texts: Sequence[str], warn: Callable[[str], None]) -> Rows:
    """The tokens of prompts by a source's own tokenizer, cut at its context."""
    folder = sources.folders[source]
    config = folder.decoder_config()
    tokenizer, context = load_tokenizer(folder.path), trained_positions(folder.config)
    context = context if config.positions is None else min(context, config.positions)
    rows = [encode_prompt(tokenizer, text) for text in texts]
    if not any(len(row) > 1 for row in rows):
        raise InputError(key, f"no prompt has two tokens or more of {folder.path}; expected texts")
    largest = max(max(row, default=0) for row in rows)
    if largest >= config.vocab:
        what = f"a prompt has token {largest:,}, and the embedding of {folder.path} {config.vocab:,} rows"
        raise InputError(key, f"{what}; expected its own tokenizer beside it")
    long = sum(len(row) > context for row in rows)
    if long:
        warn(
            f"{key}: {long} of {len(rows)} prompts are longer than the context of {folder.path}, and are cut at "
            f"{context:,} tokens"
        )
    return [row[:context] for row in rows if len(row) > 1]
