"""Kill searches, merges and exports at random instants, as real processes, and see that nothing is lost.

    python tests/torture.py --kills 100 --seed 0

A search that was never disturbed is the reference. Then the same search is started, killed (SIGKILL, SIGTERM, SIGINT),
started again as it says itself, killed again, … and at last left alone: its files have to be those of the reference, to
the byte, and no others may be there. Of every second one the checkpoints and the winner lie on another disk, behind
links, and a user's files beside them. Merges and exports over an existing model are killed too: at each instant the old
model or the new one stands there as a whole.

Half of the kills come at a random instant of a process's life, so that imports are met as well. The other half wait for
a file to appear that is there for a moment only (a checkpoint or a model that is being written, the old model that has
been moved aside): from there on the instant is random again. What is to be killed is a process from its start; what is
left alone is forked from one that has imported everything.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import yaml
from hostile import run_command

GENERATIONS = 4
REFERENCE = "reference/run"
# How the names of checkpoints begin while they are written.
UNFINISHED = tuple(f"{generation}." for generation in range(1, GENERATIONS + 1))
# The command that goes on, or begins again where nothing was saved.
NEXT = re.compile("(?:Continue|Start again) with: (evojax-merge search.*)")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# What a killed process may be in the middle of, by files of the run folder that are there just then.
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "start": lambda run: run.exists(),
    "checkpoint": lambda run: any(path.name.startswith(UNFINISHED) for path in _entries(run / "checkpoints")),
    "generation": lambda run: (run / "history.jsonl").exists(),
    "recipe": lambda run: (run / "best/recipe.yaml").exists(),
    "export": lambda run: any(path.name.startswith(".model") for path in _entries(run / "best")),
    "swap": lambda run: any("old." in path.name for path in _entries(run / "best")),
    "report": lambda run: (run / "best/model").exists(),
}


# Parts of a run that may lie on another disk, and what a user keeps beside them.
LINKED = ("checkpoints", "best")
MINE = ("thesis/chapter.tex", "2024/data.csv", "9.orbax-checkpoint-tmp/notes.txt", ".recipe.yaml.swp", "result.json")


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _is_begun(run: Path) -> bool:
    """Whether a search has written anything into a folder."""
    return any(not path.is_symlink() for path in _entries(run))


@dataclass
class Torture:
    """A folder with a family of models and a config, the reference run, and what has been seen so far. `seconds`: how
    long each command takes behind its imports, and `importing` how long those do."""

    root: Path
    rng: random.Random
    seconds: dict[str, float] = field(default_factory=dict)
    importing: float = 0.0
    kills: Counter = field(default_factory=Counter)
    ends: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    linked: bool = False

    def start(self, *arguments: object) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "evojax_merge", *map(str, arguments)], cwd=self.root,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # What runs in the background inherits an ignored SIGINT, which a terminal's user has not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def whole(self, *arguments: object) -> None:
        """Run a command to its end."""
        started = time.monotonic()
        done = run_command(*arguments, folder=self.root, seconds=600, status=None)
        self.seconds[str(arguments[0])] = time.monotonic() - started
        if done.returncode:
            self.fault(f"{shlex.join(map(str, arguments))} ended with {done.returncode}", done.stderr)

    def fault(self, what: str, stderr: str = "") -> None:
        self.faults.append(f"{what}\n{stderr[-3000:]}")
        print(f"FAULT: {self.faults[-1]}", flush=True)

    def kill(self, arguments: Sequence[str], moment: str | None, folder: Path) -> str:
        """Start a command and kill it: at a random instant, or, where `moment` names one that is not there yet, soon
        after that. Returns what it said."""
        number = self.rng.choice(SIGNALS)
        awaited = None if moment is None or MOMENTS[moment](folder) else MOMENTS[moment]
        process = self.start(*arguments)
        while awaited is not None and process.poll() is None and not awaited(folder):
            time.sleep(0.0005)
        whole = self.importing + self.seconds[arguments[0]]
        delay = self.rng.uniform(0, whole) if awaited is None else self.rng.expovariate(50)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        met = process.poll() is None
        if met:
            process.send_signal(number)
        _, stderr = process.communicate(timeout=600)
        if met:
            self.kills[number.name, arguments[0], _phase(folder)] += 1
            self.ends[number.name, process.returncode] += 1
            self._check_end(number, process.returncode, stderr, arguments)
        elif process.returncode:
            self.fault(f"{shlex.join(arguments)} ended by itself with {process.returncode}", stderr)
        return stderr

    def _check_end(self, number: signal.Signals, status: int, stderr: str, arguments: Sequence[str]) -> None:
        # It may have been done at that very instant; what was not Python yet ends by the signal itself.
        expected = {-number} if number == signal.SIGKILL else {130, 0, -number}
        if status not in expected or "Traceback" in stderr:
            self.fault(f"{number.name}: {shlex.join(arguments)} ended with {status}", stderr)
        elif status == 130:
            advises = NEXT.search(stderr) is not None or arguments[0] != "search"
            if stderr.splitlines()[-1:] != ["interrupted"] or not (advises or stderr == "interrupted\n"):
                self.fault(f"{number.name}: it does not say how to go on", stderr)

    def search(self, kills: int) -> None:
        """One search, killed up to `kills` times and then left alone."""
        run, disk = self.root / "run", self.root / "disk"
        begin = ["search", "config.yaml", "--out", "run"]
        self.linked = not self.linked
        for part in LINKED if self.linked else ():
            (disk / part).mkdir(parents=True)
            run.mkdir(exist_ok=True)
            (run / part).symlink_to(f"../disk/{part}")
        for _ in range(kills):
            command = [*begin, "--resume"] if _is_begun(run) else begin
            moment = self.rng.choice([None] * len(MOMENTS) + [*MOMENTS])
            stderr = self.kill(command, moment, run)
            if (hint := NEXT.search(stderr)) is not None:
                again = shlex.split(hint[1])
                if ("--resume" in again) != _is_begun(run):
                    self.fault(f"it says {again}, where the folder has {sorted(map(str, _entries(run)))}", stderr)
            if (run / "config.yaml").exists():
                for file in self._mine(disk):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text("mine")
        self.whole(*([*begin, "--resume"] if _is_begun(run) else begin))
        self._compare(run)
        shutil.rmtree(run)
        shutil.rmtree(disk, ignore_errors=True)

    def _mine(self, disk: Path) -> list[Path]:
        """A user's files beside the parts of a run that lie on another disk."""
        return [disk / part / name for part in LINKED if self.linked for name in MINE]

    def _compare(self, run: Path) -> None:
        mine = self._mine(run)
        if any(file.exists() for file in mine) and not all(file.exists() for file in mine):
            self.fault(f"{run.name}: of the user's files there are only {sorted(map(str, filter(Path.exists, mine)))}")
        reference, found = contents(self.root / REFERENCE), contents(run)
        theirs = {str(file.relative_to(run)) for file in mine} | {f"checkpoints/{Path(n).parts[0]}" for n in MINE}
        found = {name: digest for name, digest in found.items() if name not in theirs}
        for name in sorted({*reference} | {*found}):
            if reference.get(name) != found.get(name):
                what = "missing" if name not in found else "left behind" if name not in reference else "different"
                self.fault(f"{run.name}: {name} is {what}")


def _phase(run: Path) -> str:
    """What a killed search was in the middle of."""
    for name in ("swap", "export", "checkpoint"):
        if MOMENTS[name](run):
            return name
    if MOMENTS["report"](run):
        return "report"
    return "search" if MOMENTS["generation"](run) else "begun" if run.exists() else "imports and checks"


def contents(run: Path) -> dict[str, str]:
    """Every file of a run folder, by its digest; of what depends on the clock or on chance only that it is there."""
    found = {}
    # A user's folder is named 2024.
    steps = [step for step in range(1, GENERATIONS + 1) if (run / "checkpoints" / str(step)).exists()]
    earlier = {f"checkpoints/{step}" for step in steps[:-1]}
    walk = os.walk(run, followlinks=True)
    for path in sorted(Path(above) / name for above, folders, files in walk for name in (*folders, *files)):
        name = str(path.relative_to(run))
        if name.startswith("checkpoints/"):
            # Which generations before the last have one depends on the clock.
            if name.count("/") == 1 and name not in earlier:
                found[name] = "checkpoint"
        elif path.is_file():
            loose = name in ("timing.jsonl", "report.html", "environment.json", "run.log")
            found[name] = "" if loose else sha256(path.read_bytes()).hexdigest()
    return found


def build(root: Path) -> None:
    """The family, the config and the recipe."""
    from helpers.families import build_family
    from hostile import build_world

    build_world(root, build_family(root.parent / "family"))
    config = yaml.safe_load((root / "config.yaml").read_text())
    config["search"] = {"generations": GENERATIONS, "population": 4}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    (root / "other.yaml").write_text(yaml.safe_dump(recipe | {"merge_method": "dare_ties"}))


def torture(root: Path, kills: int, seed: int, log: Callable[[str], None] = print) -> Torture:
    """Kill so many times, merges and exports about a tenth of them. `root`: a folder that is not there yet."""
    torment = Torture(root, random.Random(seed))
    build(root)
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import evojax_merge.api.models"], check=True)
    torment.importing = time.monotonic() - started
    # Twice, so that compiled programs are kept when it is timed. The run's name stands in its model's card.
    for _ in range(2):
        torment.whole("search", "config.yaml", "--out", REFERENCE, "--overwrite")
    for number in range(-(-kills // 10)):
        replace(torment, number)
        log(f"{sum(torment.kills.values())} kills, {len(torment.faults)} faults")
    while sum(torment.kills.values()) < kills:
        torment.search(min(kills - sum(torment.kills.values()), torment.rng.randint(1, 6)))
        log(f"{sum(torment.kills.values())} kills, {len(torment.faults)} faults")
    return torment


def replace(torment: Torture, number: int) -> None:
    """Kill a merge or an export that replaces a model."""
    root, out = torment.root, torment.root / "out"
    name, source = (("merge", "recipe.yaml"), ("export", REFERENCE))[number % 2]
    command = [name, source, "out", "--overwrite"]
    if not (root / name).exists():
        torment.whole(name, source, name)
    new = tree(root / name)
    # Something that the program wrote, and another than it is to write.
    torment.whole("merge", "other.yaml", "out")
    old = tree(out)
    torment.kill(command, None, root / "none")
    if tree(out) not in (old, new):
        torment.fault(f"{shlex.join(command)}: neither the old model nor the new one: {sorted(tree(out))}")
    torment.whole(*command)
    left = [path.name for path in root.iterdir() if path.name.startswith(".")]
    if tree(out) != new or left:
        torment.fault(f"{shlex.join(command)}: after a kill, another start did not make the model, or left {left}")
    shutil.rmtree(out)


def tree(folder: Path) -> dict[str, str]:
    """Every file of a model but the card, which has the folder's name, and the marker, which has the card's digest."""
    besides = ("README.md", "evojax_merge.json")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in besides]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave it there")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    root = options.keep or Path(tempfile.mkdtemp(prefix="torture."))
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    torment = torture(root / "world", options.kills, options.seed, lambda line: print(line, flush=True))
    print("kills by signal and what was going on:")
    for (name, command, phase), count in sorted(torment.kills.items()):
        print(f"  {name:8} {command:8} {phase:20} {count}")
    print("statuses:", json.dumps({f"{name} {status}": n for (name, status), n in sorted(torment.ends.items())}))
    print(f"{sum(torment.kills.values())} kills, {len(torment.faults)} faults")
    if options.keep is None:
        shutil.rmtree(root)
    sys.exit(bool(torment.faults))


if __name__ == "__main__":
    main()
