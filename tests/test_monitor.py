"""Programs that watch a search read its heartbeat, its metrics, its lines of JSON; signals of batch systems."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import refusal, run_here
from helpers.families import Family, build_family
from helpers.files import read_lines
from helpers.models import tiny_config
from helpers.sampling import sample
from hostile import start_command
from test_devices import CHOICE, write_config

from evojax_merge.evaluation.targets import find_target
from evojax_merge.report.monitor import Monitor, metrics_text
from evojax_merge.search.recording import Generation

# A line of Prometheus' text format.
SAMPLE = re.compile(r"evojax_merge_([a-z_]+) (-?[0-9.e+-]+)")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build_family(tmp_path_factory.mktemp("monitor"), tiny_config())


def test_a_search_says_how_far_it_is(family: Family, tmp_path: Path) -> None:
    config = write_config(family.root, tasks=[CHOICE], search={"population": 4, "generations": 2})
    heartbeat, metrics = tmp_path / "alive", tmp_path / "search.prom"
    began = time.time()
    done = run_here(
        "search", config, "--out", tmp_path / "run", "--json", "--heartbeat", heartbeat, "--metrics", metrics
    )
    assert heartbeat.read_bytes() == b"" and heartbeat.stat().st_mtime >= began - 1
    lines = metrics.read_text().splitlines()
    values = {match[1]: float(match[2]) for line in lines if (match := SAMPLE.fullmatch(line))}
    assert len(lines) == 3 * len(values)
    history = read_lines(tmp_path / "run" / "history.jsonl")
    assert values["generation"] == values["generations"] == len(history) == 2
    assert values["failed_candidates"] == 0 and values["seconds_per_candidate"] > 0
    records = [json.loads(line) for line in done.stdout.splitlines()]
    generations = [record for record in records if "generation" in record]
    assert values["best_fitness"] == pytest.approx(generations[-1]["best_so_far"])
    # Of so few held-out examples a warning is certain: that the winner may not be better.
    warnings = [record["warning"] for record in records if "warning" in record]
    assert len(generations) == 2 and len(generations) + len(warnings) == len(records)
    assert warnings == [line.removeprefix("warning: ") for line in done.stderr.splitlines() if "warning: " in line]
    # Its own files give way to the next search's.
    again = "search", config, "--out", tmp_path / "run", "--overwrite", "--heartbeat", heartbeat, "--metrics", metrics
    run_here(*again, "--set", "search.generations=1", "--quiet")
    assert "evojax_merge_generation 1\n" in metrics.read_text()


def test_watchers_whose_folder_is_gone_are_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They do not end the search."""
    watching = Monitor(tmp_path / "gone" / "alive", tmp_path / "gone" / "search.prom")
    generation = Generation(1, np.array([0.5, np.nan]), 0.5, 0.5, 0.5, 1, {}, 2.0)
    watching.finished(generation)
    watching.finished(generation)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in lines] == ["--heartbeat", "--metrics"]
    assert "evojax_merge_failed_candidates 1\n" in metrics_text(generation)


def test_files_of_others_stay_and_errors_are_json(family: Family, tmp_path: Path) -> None:
    config = write_config(family.root, tasks=[CHOICE], search={"population": 4, "generations": 2})
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    for option, what in (("--heartbeat", "is no heartbeat"), ("--metrics", "holds no metrics")):
        line = refusal("search", config, "--out", tmp_path / "run", option, thesis)
        assert f"{thesis}: {option}: exists, and {what} of evojax-merge" in line
    assert thesis.read_text() == "years of work" and not (tmp_path / "run").exists()
    done = run_here("search", config, "--out", thesis, "--json", status=2)
    assert json.loads(done.stdout) == {"error": f"{thesis}: is a file; expected a run folder"}
    done = run_here("search", tmp_path / "no.yaml", "--json", status=2)
    assert json.loads(done.stdout) == {"error": f"{tmp_path}/no.yaml: no such file"}


@pytest.mark.parametrize("option", ["--heartbeat", "--metrics"])
@pytest.mark.parametrize("name", ["lock", "history.csv", "controls.safetensors", "votes.jsonl"])
def test_watchers_are_no_files_of_the_run(option: str, name: str, family: Family, tmp_path: Path) -> None:
    config = write_config(family.root, tasks=[CHOICE], search={"population": 4, "generations": 2})
    line = refusal("search", config, "--out", tmp_path, option, tmp_path / name)
    assert f"{option}: is the file of the run's {name} as well" in line


@pytest.mark.parametrize("command", ["search", "metrics"])
def test_addresses_of_object_stores_are_refused(command: str, family: Family, tmp_path: Path) -> None:
    config = write_config(family.root, tasks=[CHOICE], search={"population": 4, "generations": 2})
    address = "s3://bucket/run"
    options = ("--out", address) if command == "search" else ("--out", tmp_path / "run", "--metrics", address)
    assert "is an address; expected a path on this machine" in refusal("search", config, *options)
    assert not Path("s3:").exists()


@pytest.mark.parametrize("number", sample([signal.SIGUSR1, signal.SIGTERM], 1))
def test_a_batch_system_s_signal_ends_with_the_last_generation_saved(
    number: signal.Signals, family: Family, tmp_path: Path
) -> None:
    config = write_config(family.root, tasks=[CHOICE], search={"population": 4, "generations": 500})
    out = tmp_path / "run"
    process = start_command("search", config, "--out", out)
    deadline = time.monotonic() + 240
    while not (out / "history.jsonl").exists() or len(read_lines(out / "history.jsonl")) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait() == 130
    saved = len(read_lines(out / "history.jsonl"))
    assert f"stopped; {saved} generations are saved. Continue with: evojax-merge search" in process.read("stderr")


def test_targets_are_named_in_letters_of_any_case() -> None:
    assert find_target("--target", "8xH100") == find_target("--target", "8xh100")
    assert find_target("--target", "V5E-8").name == "v5e-8"


IN_A_PASS = """
from concurrent.futures import ThreadPoolExecutor
import jax
from evojax_merge.system import interrupts

interrupts.install()
interrupts.UNWINDING = 5.0
never_ends = jax.jit(lambda: jax.lax.while_loop(lambda x: x > 0, lambda x: x * 0.5 + 1, 1.0)).lower().compile()
with interrupts.ending_within(0.5, lambda: "stopped; 3 generations are saved\\n"):
    print("begins", flush=True)
    {work}
"""


@pytest.mark.parametrize(
    ("work", "says"),
    [
        ("never_ends().block_until_ready()", "stopping …\nstopped; 3 generations are saved\ninterrupted\n"),
        # The unwinding waits for a thread that is in a pass.
        (
            "with ThreadPoolExecutor() as pool: pool.submit(lambda: never_ends().block_until_ready()).result()",
            "stopping …\nstopped; 3 generations are saved\ninterrupted\n",
        ),
        # Python notices a signal here, and unwinds for longer.
        ("try: interrupts.time.sleep(60)\n    finally: interrupts.time.sleep(1.5); print('unwound')", "unwound"),
    ],
)
def test_a_signal_ends_a_search_in_the_middle_of_a_pass(work: str, says: str) -> None:
    program = [sys.executable, "-c", IN_A_PASS.format(work=work)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begins\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGUSR1)
        output, errors = process.communicate(timeout=120)
    assert says in output + errors
    assert (process.returncode == 130) == (says != "unwound")
