"""A genome's way from the search to a compiled call is as short for every kind of candidate and place of models."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from helpers.families import Family, build_family
from helpers.models import tiny_config
from helpers.sampling import sample
from test_streaming import PLACES, TEXT, write_config, write_paths, write_pool

import evojax_merge as em
from evojax_merge.evaluation import evaluator
from evojax_merge.evaluation.evaluator import Evaluator

WRITERS = {"merge": write_config, "layer_path": write_paths, "member": write_pool}
# The most frames, and files, between the search and a compiled call, both included.
FRAMES, FILES = 10, 5
PACKAGE = str(Path(em.__file__).parent)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build_family(tmp_path_factory.mktemp("frames"), tiny_config(num_hidden_layers=2), 3)


@pytest.mark.parametrize(
    ("kind", "place"), sample([(kind, place) for kind in WRITERS for place in PLACES], 3), ids=lambda value: str(value)
)
def test_few_frames_lie_between_the_search_and_a_compiled_call(
    kind: str, place: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: list[list[tuple[str, str]]] = []
    run_program = evaluator.run_program

    def noting(*arguments: Any) -> Any:
        frame: FrameType | None = sys._getframe(1)
        # The function that calls the compiled one.
        stack = [(evaluator.__file__, "run_program")]
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                stack.append((frame.f_code.co_filename, frame.f_code.co_qualname))
            if stack[-1] == (f"{PACKAGE}/core.py", "search"):
                stacks.append(stack)
                break
            frame = frame.f_back
        return run_program(*arguments)

    # All work is done by the thread of the search.
    monkeypatch.setattr(Evaluator, "runs_two_jobs", lambda self, model: False)
    monkeypatch.setattr(evaluator, "run_program", noting)
    config = WRITERS[kind](family.root, tasks=[TEXT], evaluation={"bank": place})
    em.evolve(config, out=tmp_path / "run", overrides=["search.generations=1"])
    generations = [stack for stack in stacks if any(name == "evolve" for _, name in stack)]
    assert generations
    for stack in generations:
        way = "\n".join(f"{Path(file).relative_to(PACKAGE)}: {name}" for file, name in reversed(stack))
        assert len(stack) <= FRAMES and len({file for file, _ in stack}) <= FILES, way
