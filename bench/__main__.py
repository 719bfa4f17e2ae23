"""Lists the benchmarks, or runs one.

python -m bench                      # the names, with the first line of each benchmark's docstring
python -m bench strategies --help    # a benchmark, with its options
"""

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def benchmarks() -> dict[str, Path]:
    """Script of each benchmark, by its name on the command line: every file but the shared helpers."""
    scripts = sorted(FOLDER.glob("*/*.py"))
    return {script.stem.replace("_", "-"): script for script in scripts if script.parent.name != "shared"}


def summary(script: Path) -> str:
    """First line of a script's docstring, read without importing the script."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def listing() -> str:
    scripts = benchmarks()
    width = max(map(len, scripts))
    lines = []
    for folder in dict.fromkeys(script.parent.name for script in scripts.values()):
        lines.append(f"{folder}:")
        lines += [
            f"  make bench-{name:<{width}}  {summary(script)}"
            for name, script in scripts.items()
            if script.parent.name == folder
        ]
    return "\n".join([*lines, "Options: python -m bench NAME --help"])


def main() -> None:
    scripts = benchmarks()
    if len(sys.argv) == 1:
        print(listing())
        return
    name, *arguments = sys.argv[1:]
    if name not in scripts:
        raise SystemExit(f"{name}: no benchmark has this name; expected one of {', '.join(scripts)}")
    sys.argv = [f"python -m bench {name}", *arguments]
    script = scripts[name]
    runpy.run_module(f"bench.{script.parent.name}.{script.stem}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
