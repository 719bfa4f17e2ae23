"""How soon a browser shows the pages of runs: these, and one of 10,000 generations by 64 (a minute).

    python -m bench page runs/quickstart

The page of each run folder, as `evojax-merge report` makes it, is opened in a new headless Chromium from a server on
this machine, a few times, the runs in turn. Chromium's own clock says when the first text is painted, when the document
is read, and when the last figure is drawn (milliseconds since the navigation began; medians, and the slowest). Beside
them stand the processor seconds of the whole browser, less those that it takes for an empty page: on a busy machine
they say more. The long run is made up: random candidates of 22 genes.
"""

import argparse
import json
import resource
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from bench.shared.machine import host
from evojax_merge.report.page import write_page
from evojax_merge.search.run_parts import RunFolder

GENERATIONS, POPULATION, GENES = 10_000, 64, 22
EMPTY = "<!DOCTYPE html><html data-drawn=true><title>empty</title><p>empty"
# Sends the page's own timings when its last figure stands.
PROBE = """
<script>
const wait = setInterval(() => {
  if (document.documentElement.dataset.drawn !== "true") return;
  clearInterval(wait);
  const drawn = performance.now();
  requestAnimationFrame(() => setTimeout(() => {
    const [navigation] = performance.getEntriesByType("navigation");
    const paint = performance.getEntriesByName("first-contentful-paint")[0];
    fetch("/timings", {method: "POST", body: JSON.stringify({
      painted: paint ? paint.startTime : NaN, read: navigation.domContentLoadedEventEnd, drawn,
    })});
  }, 50));
}, 5);
</script>
"""


@dataclass(frozen=True)
class Opening:
    """One opening of a page, in milliseconds since the navigation began, and the browser's processor seconds."""

    painted: float
    read: float
    drawn: float
    processor: float


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        raise SystemExit("Chromium is not installed")
    return program


def processor_seconds() -> float:
    """User and system seconds of this process's ended children, and of their ended children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def opened(program: str, page: str, width: int) -> Opening:
    """Open a page in a browser of its own, until it is drawn."""
    done = threading.Event()
    sent: dict[str, float] = {}
    head, mark, rest = page.partition("<title>")
    content = f"{head}{PROBE}{mark}{rest}".replace("default-src 'none'", "default-src 'none'; connect-src 'self'")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(content.encode() if self.path == "/" else b"")

        def do_POST(self) -> None:
            sent.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer(b"")
            done.set()

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, tempfile.TemporaryDirectory() as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        before = processor_seconds()
        process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}",
             f"--window-size={width},1000", "--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}/"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            if not done.wait(300):
                raise SystemExit("a page was not drawn in five minutes")
        finally:
            process.terminate()
            process.wait()
            server.shutdown()
    return Opening(**{name: value or np.nan for name, value in sent.items()}, processor=processor_seconds() - before)


def long_run(folder: Path) -> Path:
    """A run folder of 10,000 generations by 64."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    (folder / "config.yaml").write_text(
        f"base: base\nparents: [one, two]\nspace: {{method: ties}}\nseed: 0\ninputs: {{}}\n"
        f"search: {{strategy: cma_es, population: {POPULATION}, generations: {GENERATIONS}}}\n"
    )
    best = -np.inf
    with (folder / "history.jsonl").open("w") as history, (folder / "timing.jsonl").open("w") as timing:
        for number in range(1, GENERATIONS + 1):
            genomes = rng.uniform(size=(POPULATION, GENES)).round(6)
            fitness = (-np.sum((genomes - 0.3) ** 2, axis=1) / number).round(8)
            best = max(best, float(fitness.max()))
            row = {
                "generation": number, "best": float(fitness.max()), "mean": float(fitness.mean()),
                "worst": float(fitness.min()), "best_so_far": best, "sigma": 0.2 / number,
                "evaluations": number * POPULATION, "failed": 0, "scores_of_best": {"sums/accuracy": best},
                "fitness": fitness.tolist(), "examples": [32] * POPULATION, "task_scores": {"sums": fitness.tolist()},
                "genomes": genomes.tolist(),
            }  # fmt: skip
            history.write(json.dumps(row) + "\n")
            timing.write(json.dumps({"generation": number, "seconds": 0.5}) + "\n")
    return folder


def table(openings: dict[str, list[Opening]], sizes: dict[str, int], empty: list[Opening]) -> str:
    lines = [
        "| page | MB | first text, ms | document read, ms | last figure, ms | slowest, ms | processor s |",
        "| --- |" + " ---: |" * 6,
    ]
    least = np.median([one.processor for one in empty])
    for name, opened in openings.items():
        cells = [
            f"{np.nanmedian([getattr(one, part) for one in opened]):,.0f}" for part in ("painted", "read", "drawn")
        ]
        cells += [
            f"{max(one.drawn for one in opened):,.0f}",
            f"{np.median([one.processor for one in opened]) - least:.2f}",
        ]
        lines.append(f"| {name} | {sizes[name] / 1e6:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--times", type=int, default=5, help="how often each page is opened (default: 5)")
    parser.add_argument("--width", type=int, default=1400, help="of the window (default: 1400)")
    options = parser.parse_args()
    program = browser()
    with tempfile.TemporaryDirectory() as folder:
        runs = {run.name: run for run in options.runs}
        runs[f"{GENERATIONS:,} generations by {POPULATION}"] = long_run(Path(folder) / "long")
        pages = {}
        for name, run in runs.items():
            write_page(RunFolder(run))
            pages[name] = RunFolder(run).page.read_text(encoding="utf-8")
    openings: dict[str, list[Opening]] = {name: [] for name in pages}
    empty = []
    opened(program, EMPTY, options.width)
    for _ in range(options.times):
        empty.append(opened(program, EMPTY, options.width))
        for name, page in pages.items():
            openings[name].append(opened(program, page, options.width))
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.strip()
    print(f"{host()}; {version}; {options.times} openings, window of {options.width} pixels")
    print(table(openings, {name: len(page.encode()) for name, page in pages.items()}, empty))


if __name__ == "__main__":
    main()
