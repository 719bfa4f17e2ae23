"""Opens the ballots of a search: its votes file, and where people vote the page on which they do."""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from evojax_merge.checkpoints.writer import check_outside
from evojax_merge.errors import InputError, printable
from evojax_merge.judge.activity import Activity
from evojax_merge.judge.ballot import Ballot
from evojax_merge.judge.batch import Choices, pair_files, read_choices, votes_of
from evojax_merge.judge.server import listen, served
from evojax_merge.judge.votes import VoteFile
from evojax_merge.problem import SearchProblem
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.system import interrupts
from evojax_merge.system.file_system import atomic_file, atomic_write_bytes, check_outputs
from evojax_merge.tasks.voting import JudgedTask


@dataclass(frozen=True)
class JudgeOptions:
    """port: of the page of judges; 0: any that is free. replay: a votes file of an equal search, whose votes are
    taken. pairs: a file that pairs are written to, instead of a page that is served; choices: a file of votes on
    pairs that were written before, or a pipe."""

    port: int = 0
    replay: Path | None = None
    pairs: Path | None = None
    choices: Path | None = None

    @cached_property
    def chosen(self) -> Choices:
        """The choices of the file. A pipe can be read once."""
        return {} if self.choices is None else read_choices(self.choices)


def check_export(path: Path, out: Path, options: JudgeOptions) -> None:
    """Raises InputError where the files of --export would take the place of others, or lie in a part of the run.
    `path`: the config; `out`: the run folder."""
    if options.pairs is None:
        return
    run, named = RunFolder(out), {"--import": options.choices, "--replay": options.replay, "CONFIG": path}
    others = run.named_files | {name: file for name, file in named.items() if file is not None}
    outputs = pair_files(options.pairs)
    check_outputs(outputs, others, made=out)
    for output in outputs:
        check_outside(output.path, run.parts)


def check_judges(path: Path, out: Path, problem: SearchProblem, options: JudgeOptions | None, *, resume: bool) -> None:
    """Raises InputError for a search that nobody can judge, for votes that it would lose, and for those that are not
    its own. path: the config; options: None where nobody asked for judges."""
    tasks = _judged_tasks(problem)
    if not tasks:
        if options is not None:
            what = "has none of kind: human or human_images, for people to judge; evojax-merge search takes the config"
            raise InputError(f"{path}: tasks", what)
        return
    options = options or JudgeOptions()
    votes = RunFolder(out).votes
    if not resume and votes.exists():
        raise InputError(votes, "holds votes; --resume continues with them, or move the file (--replay takes it)")
    if options.replay is not None and not options.replay.is_file():
        raise InputError("--replay", f"{options.replay}: no such file")
    source = votes if options.replay is None or votes.exists() else options.replay
    file = VoteFile(source, _sizes(problem))
    if source == options.replay and not file.rounds:
        raise InputError("--replay", f"{source}: holds no votes; expected the votes.jsonl of a run")
    if options.choices is not None:
        votes_of(options.choices, options.chosen, file, _weights(tasks))
    # Before the port is tried: processes on one machine would all try it.
    if jax.process_count() > 1:
        raise InputError(f"task {tasks[0].name}", "people judge searches of one process; leave --distributed out")
    if options.pairs is None and any(task.voting.judge is None for task in tasks):
        listen(options.port).close()
    if len(problem.splits.shards) > 1:
        raise InputError("search.rungs", f"have no meaning for task {tasks[0].name}, which people judge; say rungs: 1")
    guarded = next((task.name for task in tasks if task.name in problem.guards), None)
    if guarded is not None:
        raise InputError(f"task {guarded}", "guard: people give the base no score to compare with; leave it out")
    if problem.scale == "parents":
        raise InputError("scale", f"task {tasks[0].name} has no score of a parent to measure by; say scale: none")


@contextmanager
def judging(
    folder: RunFolder, problem: SearchProblem, log: Callable[[str], None], options: JudgeOptions
) -> Iterator[tuple[Mapping[str, Ballot], Activity]]:
    """The ballots of the tasks that people judge, by their names, while the block runs, empty where the search has no
    such task; and what their page says meanwhile. Raises InputError for a votes file that is not the search's, and for
    a page that cannot be served."""
    tasks = _judged_tasks(problem)
    if not tasks:
        yield {}, Activity()
        return
    votes = folder.votes
    if options.replay is not None and not votes.exists():
        atomic_write_bytes(votes, options.replay.read_bytes())
    file, ballots = VoteFile(votes, _sizes(problem)), {}
    file.mend()
    if options.choices is not None:
        added, taken = votes_of(options.choices, options.chosen, file, _weights(tasks))
        for one, vote in added:
            file.add(one, vote)
        log(f"{options.choices}: {taken}")
    history = folder.read_history()
    activity = Activity(None if problem.search.parsed_budget.seconds else problem.search.generations, len(history))
    for task in tasks:
        ballots[task.name] = Ballot(
            task, file, problem.search.generations, problem.seed, interrupts.check, pairs=options.pairs,
            done=len(history), log=log,
        )  # fmt: skip
    _check_rounds(votes, file, problem.space.dims, history)
    with ExitStack() as stack:
        pages = [ballots[task.name] for task in tasks if task.voting.judge is None]
        if options.pairs is None and pages:
            address = stack.enter_context(served(pages, options.port, _token(folder.judge_token), activity))
            log(f"judge: open {address} on this machine, and vote; Ctrl-C stops, and keeps all votes")
        yield ballots, activity
        for task in tasks:
            line = None if task.voting.judge is None else task.voting.judge.report()
            agreements = [agreement.describe() for agreement in ballots[task.name].agreements()]
            for each in (*([] if line is None else [line]), *agreements):
                log(printable(each))


def _token(path: Path) -> str:
    """The token in the addresses of a run's pages: links to them stay good when the run goes on. One that others can
    read makes way for a new one. Raises InputError for a link."""
    if path.is_symlink():
        raise InputError(path, "is a link; expected a file of the run, or none")
    if not path.exists() or path.stat().st_mode & 0o077:
        with atomic_file(path) as work:
            # Nobody else can read it, not for a moment.
            work.touch(0o600, exist_ok=False)
            work.write_text(secrets.token_urlsafe(16))
    return path.read_text("utf-8").strip()


def _weights(tasks: Sequence[JudgedTask]) -> dict[str, Mapping[str, float]]:
    return {task.name: task.voting.config.judges for task in tasks}


def _judged_tasks(problem: SearchProblem) -> list[JudgedTask]:
    return [task for task in problem.splits.search if isinstance(task, JudgedTask)]


def _sizes(problem: SearchProblem) -> dict[str, tuple[int, int]]:
    heldout = {task.name: task.size for task in problem.splits.heldout}
    judged = _judged_tasks(problem)
    return {task.name: (task.size, min(heldout[task.name], task.voting.config.heldout_votes)) for task in judged}


def _check_rounds(path: Path, file: VoteFile, dims: int, history: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError for votes of another search than that of the history's generations, or of other dimensions."""
    for task in dict.fromkeys(one.task for one in file.rounds):
        rounds = [one.genomes for one in file.of_task(task) if one.genomes.shape[1]]
        if any(genomes.shape[1] != dims for genomes in rounds):
            what = f"its votes on task {task} are on candidates of another space: it is of another run"
            raise InputError(path, f"{what}; expected the votes.jsonl of this run, or of an equal one")
        # A generation is in the votes before it is in the history, which may have been cut back to a checkpoint.
        for number, (genomes, row) in enumerate(zip(rounds, history, strict=False), start=1):
            searched = np.array(row["genomes"], np.float32)
            if not np.array_equal(genomes[: len(searched)].astype(np.float32), searched):
                what = f"its generation {number} of task {task} has other candidates than this run's"
                raise InputError(path, f"{what}: it is of another run; expected the votes.jsonl that the run wrote")
