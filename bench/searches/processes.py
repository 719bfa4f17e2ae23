"""Processes of one search that disagree, and that are killed (ten minutes).

    python -m bench processes
    python -m bench processes --processes 4 --only disagreements

Every process is one of its own, with CPU devices and a run folder that all see. Disagreements: the last process differs
from the others in one thing; the table says how all of them end, after how many seconds, imports included, and which
share of the processors other programs took meanwhile. Kills: SIGKILL of each process at four moments of a search; the
table says how the others end, after how many seconds from the kill on, and whether the run that goes on ends in the
bytes of one that was left alone.
"""

import argparse
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bench.shared.machine import host
from evojax_merge.zoo import resolve_reference

GENERATIONS, POPULATION = 3, 4
MAIN = "from evojax_merge.__main__ import main; main()"
# Run before the command of a process that differs.
OTHER_VERSION = "import evojax_merge.version as v; v.__version__ = '0.0.9'"
OTHER_CLOCK = "import time; now = time.time; time.time = lambda: now() + 7200"
# The files of a run that have to be the same.
COMPARED = ("history.jsonl", "best/recipe.yaml", "best/model/model.safetensors")
PLUGIN = "# A plugin that registers nothing.\nNUMBER = {}\n"


@dataclass(frozen=True)
class Difference:
    """One thing in which the last process differs. options: of the command; folder: of its config and models; before:
    Python that runs first; devices: of its own; out: its run folder; resumes: whether all continue a run."""

    name: str
    options: tuple[str, ...] = ()
    folder: str = "a"
    before: str = ""
    devices: int = 1
    out: str = "run"
    resumes: bool = False


DIFFERENCES = (
    Difference("the seed", ("--seed", "7")),
    Difference("sigma", ("--set", "search.sigma=0.3")),
    Difference("the population", ("--set", "search.population=6")),
    Difference("a task's limit", ("--set", "tasks[0].limit=4")),
    Difference("a plugin's file", folder="plugin"),
    Difference("a model's file", folder="file"),
    Difference("the version", before=OTHER_VERSION),
    Difference("a run folder of its own", out="other/run"),
    Difference("another run in the folder", out="finished/run", resumes=True),
    Difference("the backend", ("--set", "backend=torch")),
    Difference("a clock two hours ahead", before=OTHER_CLOCK),
    Difference("the number of devices", devices=2),
)


def _has_temporary(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any(".orbax-checkpoint-tmp" in path.name for path in folder.iterdir())


# The moment of a kill, and how it shows in the run folder.
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "at start-up": lambda run: (run / "lock").exists(),
    "in a generation": lambda run: (run / "checkpoints/1").exists(),
    "while saving": _has_temporary,
    "while choosing": lambda run: (run / f"checkpoints/{GENERATIONS}").exists(),
}


def _processor_seconds() -> tuple[float, float, float]:
    """Seconds of this machine's processors: all, those in which they worked, and those of processes started here."""
    ticks = [int(each) / os.sysconf("SC_CLK_TCK") for each in Path("/proc/stat").read_text().split()[1:9]]
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(ticks), sum(ticks) - ticks[3] - ticks[4], ours.ru_utime + ours.ru_stime


@dataclass
class Process:
    """A process of a search, and its end. ended: by `time.monotonic`."""

    process: subprocess.Popen[str]
    output: Path
    ended: float = 0.0

    def errors(self) -> str:
        lines = [line for line in self.output.read_text().splitlines() if line.startswith("error:")]
        return lines[-1] if lines else ""


@dataclass
class Bench:
    """A folder with models and configs. limit: seconds after which processes that still run are killed."""

    root: Path
    limit: float = 900.0
    number: int = field(default=0)

    def prepare(self) -> None:
        """Write the folders of configs, of which two differ from `a` in a file."""
        for name in ("a", "plugin", "file"):
            folder = self.root / name
            folder.mkdir()
            for model in ("base", "maths", "japanese"):
                shutil.copytree(resolve_reference(f"zoo:{model}"), folder / model)
            for file in ("search.jsonl", "heldout.jsonl"):
                shutil.copy(resolve_reference(f"zoo:{file}"), folder / file)
            (folder / "plugin.py").write_text(PLUGIN.format(int(name == "plugin")))
            document = {
                "base": "base", "parents": ["maths", "japanese"], "plugins": ["plugin.py"],
                "space": {"method": "task_arithmetic", "layers_per_group": "all"},
                "tasks": [{"name": "sums", "kind": "likelihood", "file": "search.jsonl", "heldout": "heldout.jsonl",
                           "limit": 32}],
                "search": {"population": POPULATION, "generations": GENERATIONS}, "seed": 3,
            }  # fmt: skip
            (folder / "config.yaml").write_text(yaml.safe_dump(document))
        weights = self.root / "file" / "maths" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)

    def start(
        self, processes: int, run: str, options: Sequence[str] = (), last: Difference = Difference("nothing")
    ) -> list[Process]:
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        started = []
        for number in range(processes):
            is_last, self.number = number == processes - 1, self.number + 1
            deviation = last if is_last else Difference("nothing")
            out = self.root / (last.out if is_last and last.out != "run" else run)
            environment = os.environ | {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number), "JAX_NUM_CPU_DEVICES": str(deviation.devices), "JAX_PLATFORMS": "cpu",
                "XDG_CACHE_HOME": str(self.root / "cache"),
            }  # fmt: skip
            arguments = [
                "search",
                str(self.root / deviation.folder / "config.yaml"),
                "--out",
                str(out),
                "--distributed",
            ]
            arguments += [*options, *deviation.options]
            output = self.root / f"output.{self.number}"
            with output.open("w") as handle:
                command = [sys.executable, "-c", f"{deviation.before}\n{MAIN}", *arguments]
                process = subprocess.Popen(command, env=environment, stdout=handle, stderr=subprocess.STDOUT, text=True)
            started.append(Process(process, output))
        return started

    def finish(self, processes: Sequence[Process]) -> list[int]:
        """The exit statuses, once all have ended."""
        begun = time.monotonic()
        while any(not each.ended for each in processes):
            for each in processes:
                if not each.ended and each.process.poll() is not None:
                    each.ended = time.monotonic()
                elif not each.ended and time.monotonic() - begun > self.limit:
                    each.process.kill()
            time.sleep(0.01)
        return [each.process.returncode for each in processes]

    def disagreement(self, processes: int, difference: Difference) -> list[str]:
        run = f"run-{processes}"
        shutil.rmtree(self.root / run, ignore_errors=True)
        shutil.rmtree(self.root / "other", ignore_errors=True)
        options: tuple[str, ...] = ()
        if difference.resumes:
            shutil.copytree(self.root / f"reference-{processes}", self.root / run)
            options = ("--resume", "--set", f"search.generations={GENERATIONS + 1}")
        begun, before = time.monotonic(), _processor_seconds()
        started = self.start(processes, run, options, difference)
        statuses = self.finish(started)
        seconds = max(each.ended for each in started) - begun
        total, busy, ours = (after - each for after, each in zip(_processor_seconds(), before, strict=True))
        says = {each.errors().replace(str(self.root), "…") for each in started}
        return [
            str(processes), difference.name, " / ".join(sorted(says)), " ".join(map(str, statuses)), f"{seconds:.1f}",
            f"{(busy - ours) / total:.0%}",
        ]  # fmt: skip

    def reference(self, processes: int) -> None:
        """A search that is left alone, twice: the first one compiles."""
        for name in (f"warm-{processes}", f"reference-{processes}"):
            shutil.rmtree(self.root / name, ignore_errors=True)
            started = self.start(processes, name)
            if self.finish(started) != [0] * processes:
                raise SystemExit(started[0].output.read_text())
        shutil.copytree(self.root / f"warm-{processes}", self.root / "finished" / "run", dirs_exist_ok=True)

    def kill(self, processes: int, victim: int, moment: str) -> list[str]:
        name, reference = f"killed-{processes}", self.root / f"reference-{processes}"
        run = self.root / name
        shutil.rmtree(run, ignore_errors=True)
        started = self.start(processes, name)
        while started[victim].process.poll() is None and not MOMENTS[moment](run):
            time.sleep(0.001)
        started[victim].process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        statuses = self.finish(started)
        others = [each for number, each in enumerate(started) if number != victim]
        seconds = max(each.ended for each in others) - killed
        saved = len((run / "history.jsonl").read_text().splitlines()) if (run / "history.jsonl").exists() else 0
        again = self.start(processes, name, ("--resume",) if (run / "config.yaml").exists() else ())
        went_on = self.finish(again)
        pairs = [(run / file, reference / file) for file in COMPARED]
        same = all(one.exists() and one.read_bytes() == other.read_bytes() for one, other in pairs)
        says = {each.errors().replace(str(self.root), "…") for each in others}
        return [
            str(processes), str(victim), moment, " / ".join(sorted(says)),
            " ".join(str(status) for number, status in enumerate(statuses) if number != victim), f"{seconds:.1f}",
            str(saved), " ".join(map(str, went_on)), "the same" if same else "OTHERS",
        ]  # fmt: skip


def table(columns: Sequence[str], rows: Iterator[list[str]]) -> None:
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for cells in rows:
        print(f"| {' | '.join(cells)} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", choices=("disagreements", "kills"))
    parser.add_argument("--folder", type=Path, help="work here, and leave what is there for another run")
    options = parser.parse_args()
    root = options.folder or Path(tempfile.mkdtemp(prefix="processes."))
    bench = Bench(root)
    if not (root / "a").exists():
        root.mkdir(exist_ok=True)
        bench.prepare()
    print(f"{host()}\n")
    for count in options.processes:
        if not (root / f"reference-{count}").exists():
            bench.reference(count)
    if options.only != "kills":
        cases = [(count, each) for count in options.processes for each in DIFFERENCES]
        rows = (bench.disagreement(*case) for case in cases)
        table(["processes", "the last one differs in", "all say", "exit statuses", "s", "others"], rows)
    if options.only != "disagreements":
        kills: list[Any] = [
            (count, victim, moment) for count in options.processes for victim in range(count) for moment in MOMENTS
        ]
        columns = ["processes", "killed", "when", "the others say", "their statuses", "s", "generations saved"]
        table([*columns, "statuses of --resume", "history and winner"], (bench.kill(*case) for case in kills))
    if options.folder is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
