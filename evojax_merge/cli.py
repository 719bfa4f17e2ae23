"""The command line: parse, call, print. Every heavy import happens inside the command that needs it."""

import io
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

from evojax_merge import __version__
from evojax_merge.system import interrupts, without_torch

if __name__ == "__main__":  # Before click: an interruption should not find the program unprepared.
    interrupts.end_at_once(interrupts.INTERRUPTED, "interrupted\n")

import click

from evojax_merge.cli_parts import (
    DTYPE,
    FAILED,
    FILE,
    OUTPUT_DTYPE,
    SEED,
    Commands,
    FloatRange,
    InitCommand,
    import_command,
    run,
    with_gguf_type,
    with_overrides,
    with_plugins,
    with_shard_size,
)
from evojax_merge.errors import InputError, PeerLostError, without_secrets
from evojax_merge.mergekit.flags import given_without_meaning, without_meaning
from evojax_merge.system.interrupts import INTERRUPTED
from evojax_merge.system.users_traceback import hide_inner_frames


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Evolve merges of open-weight models, on accelerators, in JAX."""


@cli.command(short_help="Compare models before a merge: what they are, and how their weights differ.")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=click.Path())
@click.option("--base", metavar="MODEL", type=click.Path(), help="Which one is the base. Default: found by distances.")
@click.option("--json", "json_file", type=FILE, help="Write the report here as well.")
@click.option("--picture", type=FILE, help="Draw distances and task vectors (.png or .svg).")
def inspect(models: tuple[str, ...], base: str | None, json_file: Path | None, picture: Path | None) -> None:
    """Compare models before a merge: headers, tokenizers, which one is the base of the others, their task vectors,
    and what that means for the choice of a method. Reads all weights, a few tensors at a time."""
    import_command("inspect").inspect(list(models), base, json_file, picture)


@cli.command(cls=InitCommand, short_help="Write the commented config of a first search.")
@click.argument("file", type=FILE, default=Path("search.yaml"))
@click.option("--base", metavar="MODEL", type=click.Path(), help="The model that task vectors are taken from.")
@click.option("--parents", multiple=True, metavar="MODEL...", type=click.Path(), help="The models that are merged.")
@click.option("--data", metavar="FILE", type=click.Path(), help="A data file, a folder of pictures, or an .npz.")
@click.option("--hub", metavar="OWNER/DATASET", help="Score on a data set of the hub: [/CONFIG][:SPLIT] may follow.")
@click.option("--lm-eval", metavar="TASK", help="Score on a task of lm-eval.")
@click.option("--prompt", multiple=True, metavar="FIELD...", help="The fields of an example's prompt or input.")
@click.option("--target", multiple=True, metavar="FIELD...", help="The fields of what is right about an example.")
@click.option("--method", metavar="NAME", help="One of `evojax-merge methods`. Default: what `inspect` advises.")
@click.option("--backend", metavar="FILE.py:NAME", help="Parents are state dicts: a function that makes their module.")
@click.option("--function", metavar="FILE.py:NAME", help="A function that scores networks, pictures or pytrees.")
@click.option("--out", metavar="RUN", type=click.Path(), help="The run folder of the search.")
@click.option(
    "--budget-generations", "generations", type=click.IntRange(1, 1_000_000),
    help="Generations; default: a budget of 180 to 600 passes.",
)  # fmt: skip
@click.option("--overwrite", "--force", "overwrite", is_flag=True, help="Replace FILE, if init wrote it.")
def init(
    file: Path, overwrite: bool, hub: str | None, prompt: tuple[str, ...], target: tuple[str, ...], **choices: Any
) -> None:
    """Write the commented config of a first search to FILE (search.yaml), checked like one that is searched with. Asks
    on a terminal for what is missing. The kind of task goes by the models and the data's first record, the method by
    the models' weights, and the number of parameters by that of the examples."""
    sources = {"--data": choices["data"], "--hub": hub, "--lm-eval": choices["lm_eval"]}
    given = [option for option, value in sources.items() if value is not None]
    if len(given) > 1:
        raise InputError(given[1], f"cannot go with {given[0]}; expected one source of data")
    command = import_command("init")
    if hub is not None:
        choices["data"] = f"hub:{hub.removeprefix('hub:')}"
    command.init(file, command.Choices(fields=command.Fields(prompt, target), **choices), overwrite)


@cli.command(short_help="Print a script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes evojax-merge's commands, options and paths in SHELL, for its startup file:

    eval "$(evojax-merge completion bash)"
    """
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(cli, {}, "evojax-merge", "_EVOJAX_MERGE_COMPLETE").source())


@cli.command(short_help="Search for the best merge, and export the winner.")
@click.argument("config", type=FILE)
@click.option("--out", type=FILE, help="Run folder. Default: the config's `out`, or runs/NAME.")
@click.option("--resume", is_flag=True, help="Continue a run: after an interruption, or with more generations.")
@click.option("--overwrite", is_flag=True, help="Start again in a folder that holds a run.")
@click.option("--seed", type=SEED, help="Override the config's seed.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    help="Override one key of CONFIG (search.generations=50, tasks.0.limit=20); repeatable.",
)
@click.option("--distributed", is_flag=True, help="This is one of several processes that share the search.")
@click.option("--force", is_flag=True, help="Go on where the models or the passes do not fit into memory.")
@click.option("--quiet", is_flag=True, help="Print nothing on stdout; the run folder's run.log has all lines.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone: a line for each generation and warning.")
@click.option("--heartbeat", type=FILE, help="Touch this file at each pass, for a program that watches.")
@click.option("--metrics", type=FILE, help="Write figures of each generation here, as Prometheus reads them.")
@with_plugins
def search(
    config: Path,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    seed: int | None,
    overrides: tuple[str, ...],
    distributed: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
    plugin_names: tuple[str, ...],
    **watching: Path | None,
) -> None:
    """Search for the best merge that CONFIG describes, and export the winner. docs/glossary.md explains the words of
    the lines that it prints."""
    if resume and overwrite:
        raise InputError("--resume", "cannot go with --overwrite")
    if quiet and as_json:
        raise InputError("--json", "cannot go with --quiet")
    if distributed:
        # JAX's text on a lost process would stand before the line that says so: this leaves it out.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "4")
    command = import_command("search", plugin_names, distributed)
    output: Literal["text", "json", "none"] = "json" if as_json else "none" if quiet else "text"
    from evojax_merge.report.monitor import Monitor

    command.search(
        config,
        out,
        resume,
        overwrite,
        seed,
        list(overrides),
        force,
        plugin_names,
        output,
        watching=Monitor(watching["heartbeat"], watching["metrics"]),
    )


@cli.command(short_help="Search for the merge whose answers people prefer.")
@click.argument("config", type=FILE)
@click.option("--out", type=FILE, help="Run folder. Default: the config's `out`, or runs/NAME.")
@click.option("--resume", is_flag=True, help="Continue a run; no vote is asked for again.")
@click.option("--overwrite", is_flag=True, help="Replace a run that has no votes.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port of the page. Default: any that is free.")
@click.option("--replay", type=FILE, help="Take the votes of this votes.jsonl of an equal search.")
@click.option("--export", "pairs", type=FILE, help="Write pairs (.jsonl, and a page) and stop.")
@click.option("--import", "choices", type=FILE, help="Votes on the pairs that were written.")
@with_overrides
@with_plugins
def judge(
    config: Path,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    port: int,
    replay: Path | None,
    pairs: Path | None,
    choices: Path | None,
    overrides: tuple[str, ...],
    plugin_names: tuple[str, ...],
) -> None:
    """Search like `search`, for the merge whose answers people prefer: CONFIG has a task of `kind: human`. Serves a
    page on this machine where people choose between two answers."""
    command = import_command("search", plugin_names)
    from evojax_merge.judge.batch import VotesAwaited
    from evojax_merge.judge.opening import JudgeOptions

    if resume and overwrite:
        raise InputError("--resume", "cannot go with --overwrite")
    judges = JudgeOptions(port, replay, pairs, choices)
    try:
        command.search(config, out, resume, overwrite, None, list(overrides), plugin_names=plugin_names, judges=judges)
    except VotesAwaited as awaited:
        click.echo(f"{awaited}; then go on with --resume --import votes.jsonl --export {pairs}")


@cli.command(short_help="Say what a search would take: memory, work, time.")
@click.argument("config", type=FILE)
@click.option("--target", metavar="NAME", help="rtx4090, 8xh100, 2x8xh100, v5p-8, cpu, … Default: the devices here.")
@click.option("--json", "json_file", type=FILE, help="Write the plan here as well.")
@with_overrides
@with_plugins
def plan(
    config: Path,
    target: str | None,
    json_file: Path | None,
    overrides: tuple[str, ...],
    plugin_names: tuple[str, ...],
) -> None:
    """Say, from the models' headers alone, whether the search of CONFIG fits a target's memory, how much it computes
    and moves, and how long that takes at least. The last lines are the verdict and the time; docs/accelerators.md says
    what each column of the table holds."""
    import_command("plan", plugin_names).plan(config, target, json_file, list(overrides))


@cli.command(short_help="Measure this device: merging, scoring, decoding, a generation of a search.")
@click.option("--shape", metavar="NAME", help="Of the models: 7B, 3B, 1B, 100M, 10M. Default: the largest that fits.")
@click.option(
    "--seconds", type=FloatRange(1, 86_400), default=540, show_default=True, metavar="SECONDS",
    help="What would take longer is left out.",
)  # fmt: skip
@click.option("--json", "json_file", type=FILE, help="Write figures, machine and versions here.")
@click.option("--compare", type=FILE, help="An earlier file of --json to compare with.")
def bench(shape: str | None, seconds: float, json_file: Path | None, compare: Path | None) -> None:
    """Measure the device at hand on models of random weights, which are made on it: merge kernels against the device's
    own copy, likelihood passes against its best matrix product, decoding, and a generation of a search."""
    import_command("bench").bench(shape, seconds, json_file, compare)


@cli.command(short_help="Do one merge, described by a mergekit YAML.")
@click.argument("recipe", type=FILE)
@click.argument("out", type=FILE)
@click.option("--dtype", type=OUTPUT_DTYPE, help="Override the output dtype.")
@with_gguf_type
@click.option("--seed", "--random-seed", "seed", type=SEED, help="Override the seed of random methods.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, if it is a model that evojax-merge wrote.")
@click.option("--allow-nonfinite", is_flag=True, help="Merge even where a parent holds NaN or Inf.")
@click.option("--allow-crimes/--no-allow-crimes", help="Merge different architectures if their tensors agree.")
@click.option("--strict", is_flag=True, help="Refuse keys and filters without a meaning, and tensors left out.")
@with_shard_size
@click.option(
    "--copy-tokenizer/--no-copy-tokenizer", default=True, help="Whether OUT gets the first model's tokenizer."
)
@click.option(
    "--write-model-card/--no-write-model-card", "card", default=True, help="Whether OUT gets a card and the recipe."
)
@click.option("--transformers-cache", type=FILE, help="Where models of the hub are kept.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--verbose", "-v", count=True, help="Print what becomes of each tensor.")
@with_plugins
@partial(without_meaning, taken=("--verbose",))
@click.pass_context
def merge(
    context: click.Context,
    recipe: Path,
    out: Path,
    transformers_cache: Path | None,
    quiet: bool,
    plugin_names: tuple[str, ...],
    **options: Any,
) -> None:
    """Do the merge that RECIPE (a mergekit YAML) describes and write the model to OUT, a folder, or a GGUF file where
    its name ends in .gguf.

    RECIPE may have several documents, as mergekit-multi takes them: those with a `name` are merged first, and others
    name them as models. --dtype is for the result, --seed for all documents.

    The other options of mergekit-yaml (--cuda, --lazy-unpickle, …) are taken as well, and change nothing.
    """
    if transformers_cache is not None:
        # Before anything imports huggingface_hub.
        os.environ["HF_HUB_CACHE"] = os.path.realpath(os.path.expanduser(transformers_cache))
    command = import_command("merge", plugin_names)
    given = command.MergeOptions(**{name: value for name, value in options.items() if value is not None})
    command.merge(recipe, out, given, quiet, given_without_meaning(context))


@cli.command(short_help="Make a mixture of experts out of dense models, described by mergekit-moe's YAML.")
@click.argument("recipe", type=FILE)
@click.argument("out", type=FILE)
@click.option("--dtype", type=DTYPE, help="Override the output dtype.")
@click.option("--seed", "--random-seed", "seed", type=SEED, help="Override the seed of random gates and of noise.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, if it is a model that evojax-merge wrote.")
@click.option("--allow-nonfinite", is_flag=True, help="Go on even where a model holds NaN or Inf.")
@with_shard_size
@click.option("--write-model-card/--no-write-model-card", "card", default=True, help="Whether OUT gets a card.")
@click.option(
    "--i-understand-this-is-not-useful-without-training", "allow_same", is_flag=True,
    help="Let all experts be one model, to be trained afterwards.",
)  # fmt: skip
@click.option("--load-in-4bit", "--load-in-8bit", is_flag=True, hidden=True, expose_value=False)
@partial(
    without_meaning, taken=("--i-understand-this-is-not-useful-without-training", "--load-in-4bit", "--load-in-8bit")
)
@click.pass_context
def moe(context: click.Context, recipe: Path, out: Path, allow_same: bool, **options: Any) -> None:
    """Write the mixture of experts that RECIPE (a mergekit-moe YAML) describes to OUT: attention, norms, embedding and
    head of its base model, the MLPs of its experts, and routers whose rows are made of their prompts."""
    command = import_command("moe")
    given = command.MergeOptions(**{name: value for name, value in options.items() if value is not None})
    command.moe(recipe, out, given, allow_same, given_without_meaning(context))


@cli.command(short_help="Give a model another model's tokenizer, as mergekit-tokensurgeon does.")
@click.argument("model", type=click.Path())
@click.argument("donor", type=click.Path())
@click.argument("out", type=FILE)
@click.option(
    "--approximation-method", "-a", "approximate", default="omp", show_default=True, metavar="METHOD",
    help="How rows that MODEL lacks are made: omp, common_interpolation, subword, landmark_pca, mean, zero, randn.",
)  # fmt: skip
@click.option("-k", "--k", default=64, show_default=True, help="Rows of one approximation (omp, common_interpolation).")
@click.option("--weight-scheme", "-w", help="distance_proportional, barycentric, least_squares (common_interpolation).")
@click.option("--cosine-similarity/--no-cosine-similarity", "-c/-nc", default=False, help="Of common_interpolation.")
@click.option("--subword-method", "-s", help="Of subword: mean, sum, weighted_mean, first_last.")
@click.option("--dtype", type=DTYPE, help="Override the output dtype.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, if it is a model that evojax-merge wrote.")
@click.option("--allow-nonfinite", is_flag=True, help="Go on even where a model holds NaN or Inf.")
@with_shard_size
@click.option("--batch-size", hidden=True, expose_value=False)
def transplant_tokenizer(model: str, donor: str, out: Path, **options: Any) -> None:
    """Write MODEL with the tokenizer of DONOR to OUT. Tokens that both have keep their rows; those that MODEL lacks get
    rows that its own are combined to, as DONOR's rows of the token combine from DONOR's rows."""
    import_command("merge").transplant(model, donor, out, {k: v for k, v in options.items() if v is not None})


@cli.command("extract-lora", short_help="Write a fine-tune as a LoRA adapter of its base.")
@click.argument("model", type=click.Path())
@click.argument("out", type=FILE)
@click.option("--base", "--base-model", "base", required=True, type=click.Path(), help="The model it was made from.")
@click.option("--max-rank", type=click.IntRange(1, 2**16), default=128, show_default=True, help="The largest rank.")
@click.option(
    "--energy", type=FloatRange(0, 1, min_open=True), metavar="SHARE",
    help="Of each matrix the smallest rank that keeps this share of its squared change.",
)  # fmt: skip
@click.option("--distribute-scale/--no-distribute-scale", default=True, help="Split singular values between A and B.")
@click.option("--embed-lora/--no-embed-lora", help="Cut embeddings and head to the rank as well. Default: saved whole.")
@click.option("--save-module", multiple=True, metavar="NAME", help="Save this module whole; repeatable.")
@click.option("--exclude-regex", "-e", multiple=True, help="Leave modules out whose names match; repeatable.")
@click.option("--include-regex", "-i", multiple=True, help="Change only modules whose names match; repeatable.")
@click.option("--sv-epsilon", type=FloatRange(0), default=0.0, help="Leave out singular values up to this.")
@click.option("--skip-undecomposable", is_flag=True, help="Leave norms as they are in the base.")
@click.option("--tasks", type=FILE, help="Score base, model and adapter on these tasks as well.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, if it is a folder that evojax-merge wrote.")
@with_plugins
def extract_lora(
    model: str, out: Path, base: str, tasks: Path | None, overwrite: bool, plugin_names: tuple[str, ...], **options: Any
) -> None:
    """Write the difference of MODEL to its base to OUT, as an adapter that PEFT loads, with mergekit-extract-lora's
    options. Embeddings, heads, norms and biases that changed are in it. Says what is lost, by layer."""
    import_command("extract_lora", plugin_names).extract_lora(model, base, out, options, overwrite, tasks)


@cli.command(short_help="Score stored models on tasks.")
@click.argument("models", metavar="MODEL_OR_RUN...", nargs=-1, required=True, type=click.Path())
@click.option("--tasks", required=True, type=FILE, help="YAML with `tasks:`, as in a search.")
@click.option("--json", "json_file", type=FILE, help="Write the scores here as well.")
@click.option(
    "--samples",
    "samples_file",
    type=FILE,
    help="Write what each model answered here: JSON lines, one for each model, task and example.",
)
@click.option(
    "--split",
    type=click.Choice(["search", "validation", "heldout", "all"]),
    default="all",
    show_default=True,
    help="Only the examples that a search of TASKS, with its seed, has in this split.",
)
@with_plugins
def evaluate(
    models: tuple[str, ...],
    tasks: Path,
    json_file: Path | None,
    samples_file: Path | None,
    split: Literal["search", "validation", "heldout", "all"],
    plugin_names: tuple[str, ...],
) -> None:
    """Score stored models on the examples of the tasks (a search's config can serve as the tasks file). A run folder
    stands for its winner."""
    import_command("evaluate", plugin_names).evaluate(list(models), tasks, json_file, samples_file, split)


@cli.command(short_help="Write a search's winner again, in another dtype or place.")
@click.argument("run", type=FILE)
@click.argument("out", type=FILE)
@click.option("--dtype", type=OUTPUT_DTYPE, help="Override the output dtype.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, if it is a model that evojax-merge wrote.")
@click.option("--best-so-far", is_flag=True, help="Of a run that was broken off: the best candidate that it has saved.")
@click.option("--member", type=int, help="Of a search for a front: the member of this number, in place of the winner.")
@click.option(
    "--as",
    "form",
    type=click.Choice(["model", "adapter", "polished"]),
    default="model",
    help="The whole model, its difference to the base as a LoRA adapter, or the model with search.then: polish.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Of an adapter, which needs it: the rank it is cut to.")
@with_gguf_type
@with_shard_size
def export(
    run: Path,
    out: Path,
    dtype: str | None,
    overwrite: bool,
    best_so_far: bool,
    member: int | None,
    form: str,
    rank: int | None,
    **output: Any,
) -> None:
    """Write the winner of the run folder RUN, or a member of its front, to OUT: as a Hugging Face folder, as a GGUF
    file where its name ends in .gguf, or as an adapter of its base."""
    if (form == "adapter") != (rank is not None):
        raise InputError(
            "--rank", "missing; expected the adapter's rank" if rank is None else "only --as adapter has one"
        )
    if best_so_far and member is not None:
        raise InputError("--member", "cannot go with --best-so-far")
    if rank is not None and (output["type"] is not None or out.suffix == ".gguf"):
        raise InputError("--as", "adapter: is a folder; expected --as model for a GGUF file")
    given = {} if output["max_shard_bytes"] is None else {"max_shard_bytes": output["max_shard_bytes"]}
    given |= {"polished": form == "polished"}
    command = import_command("export")
    command.export(run, out, dtype, overwrite, best_so_far, member, rank, output["type"], **given)


@cli.command(short_help="Write a run as one HTML page.")
@click.argument("run", type=FILE)
@click.option("--out", type=FILE, help="The page. Default: RUN/report.html.")
@click.option("--watch", is_flag=True, help="Write the page again whenever the run goes on, until it is finished.")
@with_plugins
def report(run: Path, out: Path | None, watch: bool, plugin_names: tuple[str, ...]) -> None:
    """Write RUN/report.html, from the run folder alone: one file, which a browser opens without a network. A search
    writes it as well, at its end and every so often before."""
    import_command("report", plugin_names).report(run, out, watch)


@cli.command(short_help="Compare runs: a table, and a page.")
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True, type=FILE)
@click.option("--out", type=FILE, default="compare.html", show_default=True, help="The page.")
def compare(runs: tuple[Path, ...], out: Path) -> None:
    """Print a line for each RUN, and write a page of all of them."""
    if len(runs) < 2:
        raise InputError("compare", f"{runs[0]} alone; expected two runs or more (report makes the page of one)")
    import_command("compare").compare(list(runs), out)


@cli.command(short_help="Show a run in the terminal.")
@click.argument("run", type=FILE)
def show(run: Path) -> None:
    """Show how far RUN is, finished or not: its best fitness, its winner, and the held-out scores."""
    import_command("show").show(run)


@cli.command("runs", short_help="List the runs below a folder.")
@click.argument("folder", default="runs", type=FILE)
def list_runs(folder: Path) -> None:
    """List the runs below FOLDER (default: runs), the newest first."""
    import_command("runs").runs(folder)


@cli.command(short_help="Search a finished run again, and compare the two to the bit.")
@click.argument("run", type=FILE)
@click.option("--out", type=FILE, help="The new run folder. Default: RUN-reproduced.")
@with_plugins
def reproduce(run: Path, out: Path | None, plugin_names: tuple[str, ...]) -> None:
    """Search the finished run RUN again, into a new folder, and compare history, recipe and weights. The inputs must be
    unchanged. Exit status 1 where the two runs differ, with the first generation that does."""
    import_command("reproduce", plugin_names).reproduce(run, out)


@cli.command(short_help="Upload a run's winner to the hub, with what proves it.")
@click.argument("run", type=FILE)
@click.option(
    "--repo", required=True, metavar="OWNER/NAME", help="The repository of the hub; made where there is none."
)
@click.option("--push", is_flag=True, help="Upload. Without it, the files are listed and nothing leaves this machine.")
@click.option("--private", is_flag=True, help="A repository that is made is private.")
@click.option("--with-answers", is_flag=True, help="Upload prompts, answers, pictures and the log of the run as well.")
def publish(run: Path, repo: str, push: bool, private: bool, with_answers: bool) -> None:
    """List, or with --push upload, the winner of the finished run RUN with its model card, recipe, result and page. No
    file has a path of this machine: models are named by the last part of theirs."""
    import_command("publish").publish(run, repo, push, private, with_answers)


@cli.command(short_help="List the merge methods, with their parameters and bounds.")
@with_plugins
def methods(plugin_names: tuple[str, ...]) -> None:
    """List the merge methods: what they take, their parameters, and the bounds that a search has by default."""
    import_command("listings", plugin_names).list_known("methods")


@cli.command(short_help="List the search strategies.")
@with_plugins
def strategies(plugin_names: tuple[str, ...]) -> None:
    """List the search strategies."""
    import_command("listings", plugin_names).list_known("strategies")


@cli.command(short_help="List the architectures that can be searched and merged.")
def architectures() -> None:
    """List the architectures that can be searched and merged."""
    import_command("listings").list_known("architectures")


@cli.command(short_help="List the keys of a search's config, with their defaults and meanings.")
@click.argument("section", required=False)
def keys(section: str | None) -> None:
    """List the keys that a search's config may have: what each takes, its default, and what it means. SECTION: this key
    and those in it (search, space.parameters, tasks), or all; without it, the sections."""
    import_command("listings").list_known("keys", section)


def main() -> None:
    interrupts.install()
    without_torch.is_command = True
    # Warnings are for developers, who ask for them (-W, PYTHONWARNINGS); users' messages are this program's own.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # A character that the terminal's encoding lacks is escaped and must not end the program.
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, interrupts.lasting(stream))
    try:
        status = run(lambda: cli.main(standalone_mode=False))
    except PeerLostError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # An ordinary exit would wait for the lost process.
        os._exit(FAILED)
    except Exception as error:
        import traceback

        hide_inner_frames(error)
        print(without_secrets("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        status = FAILED
    # The work is done: from now on a signal only ends the program sooner.
    interrupts.end_at_once(status)
    try:
        sys.stdout.flush()
    except OSError:
        # The interpreter would flush again at exit, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if status == INTERRUPTED:
        # An ordinary exit would wait for the other processes, which may wait for this one in a pass, and take the
        # interpreter from under threads that still compute.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
