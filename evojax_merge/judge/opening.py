"""Opens the ballots of a search: its votes file, and where people vote the page on which they do."""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from evojax_merge import interrupts
from evojax_merge.checkpoints.writer import check_outside
from evojax_merge.errors import InputError, printable
from evojax_merge.file_system import atomic_write_bytes, check_outputs
from evojax_merge.judge.ballot import Ballot
from evojax_merge.judge.batch import pair_files, votes_of
from evojax_merge.judge.server import listen, served
from evojax_merge.judge.votes import VoteFile
from evojax_merge.problem import SearchProblem
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.tasks.voting import JudgedTask


@dataclass(frozen=True)
class JudgeOptions:
    """port: of the page of judges; 0: any that is free. replay: a votes file of an equal search, whose votes are
    taken. pairs: a file that pairs are written to, instead of a page that is served; choices: a file of votes on
    pairs that were written before."""

    port: int = 0
    replay: Path | None = None
    pairs: Path | None = None
    choices: Path | None = None


def check_export(path: Path, out: Path, options: JudgeOptions) -> None:
    """Raises InputError where the files of --export would take the place of others, or lie in a part of the run.
    `path`: the config; `out`: the run folder."""
    if options.pairs is None:
        return
    run, named = RunFolder(out), {"--import": options.choices, "--replay": options.replay, "CONFIG": path}
    others = {f"the run's {file.name}": file for file in (*run.files, run.votes, run.judge_token, run.lock)}
    others |= {name: file for name, file in named.items() if file is not None}
    outputs = pair_files(options.pairs)
    check_outputs(outputs, others, made=out)
    for output in outputs:
        check_outside(output.path, run.parts)


def check_judges(path: Path, out: Path, problem: SearchProblem, options: JudgeOptions | None, *, resume: bool) -> None:
    """Raises InputError for a search that nobody can judge, and for votes that it would lose. path: the config;
    options: None where nobody asked for judges."""
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
    if options.choices is not None:
        votes_of(options.choices, VoteFile(votes), _weights(tasks))
    if options.pairs is None and _by_people(tasks):
        listen(options.port).close()
    if jax.process_count() > 1:
        raise InputError(f"task {tasks[0].name}", "people judge searches of one process; leave --distributed out")
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
) -> Iterator[Mapping[str, Ballot]]:
    """The ballots of the tasks that people judge, by their names, while the block runs; empty where the search has no
    such task. Raises InputError for a votes file that is not the search's, and for a page that cannot be served."""
    tasks = _judged_tasks(problem)
    if not tasks:
        yield {}
        return
    votes = folder.votes
    if options.replay is not None and not votes.exists():
        atomic_write_bytes(votes, options.replay.read_bytes())
    file, ballots = VoteFile(votes), {}
    if options.choices is not None:
        choices = votes_of(options.choices, file, _weights(tasks))
        for one, vote in choices.added:
            file.add(one, vote)
        log(f"{options.choices}: {choices.describe()}")
    history = folder.read_history()
    for task in tasks:
        ballots[task.name] = Ballot(
            task, file, problem.search.generations, problem.seed, interrupts.check, pairs=options.pairs,
            done=len(history), log=log,
        )  # fmt: skip
    _check_rounds(votes, file, ballots, history)
    with ExitStack() as stack:
        people = _by_people(tasks)
        if options.pairs is None and people:
            pages = [ballots[task.name] for task in people]
            address = stack.enter_context(served(pages, options.port, _token(folder.judge_token)))
            log(f"judge: open {address} on this machine, and vote; Ctrl-C stops, and keeps all votes")
        yield ballots
        for task in tasks:
            line = None if task.voting.judge is None else task.voting.judge.report()
            agreements = [agreement.describe() for agreement in ballots[task.name].agreements()]
            for each in (*([] if line is None else [line]), *agreements):
                log(printable(each))


def _token(path: Path) -> str:
    """The token in the addresses of a run's pages: links to them stay good when the run goes on."""
    if not path.exists():
        atomic_write_bytes(path, secrets.token_urlsafe(16).encode())
        path.chmod(0o600)
    return path.read_text("utf-8").strip()


def _weights(tasks: Sequence[JudgedTask]) -> dict[str, Mapping[str, float]]:
    return {task.name: task.voting.weights for task in tasks}


def _by_people(tasks: Sequence[JudgedTask]) -> list[JudgedTask]:
    """The tasks on which people vote, and no function in their place."""
    return [task for task in tasks if task.voting.judge is None]


def _judged_tasks(problem: SearchProblem) -> list[JudgedTask]:
    return [task for task in problem.splits.search if isinstance(task, JudgedTask)]


def _check_rounds(
    path: Path, file: VoteFile, ballots: Mapping[str, Ballot], history: Sequence[Mapping[str, Any]]
) -> None:
    """Raises InputError for votes of another search than that of the history's generations."""
    for one in file.rounds:
        if one.task not in ballots:
            raise InputError(path, f"has votes on task {one.task!r}, which the search does not have")
    for task in ballots:
        rounds = [one.genomes for one in file.of_task(task) if one.genomes.shape[1]]
        # A generation is in the votes before it is in the history, which may have been cut back to a checkpoint.
        for number, (genomes, row) in enumerate(zip(rounds, history, strict=False), start=1):
            searched = np.array(row["genomes"], np.float32)
            if not np.array_equal(genomes[: len(searched)].astype(np.float32), searched):
                what = (
                    f"its generation {number} of task {task} has other candidates than this run's: it is of another run"
                )
                raise InputError(path, f"{what}; expected the votes.jsonl that the run wrote")
