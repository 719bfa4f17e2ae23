"""The worked example of a search over pytrees, compiled as users run it: most of its time goes into training."""

import sys
from pathlib import Path

import pytest
from helpers.sampling import thorough

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.searches.digits import Plan, accuracy, evolve, log_probabilities, make_family, uniform


@thorough
def test_digits_are_read_better_than_by_any_expert_or_the_uniform_merge() -> None:
    plan = Plan(base_steps=20, expert_steps=150, generations=12, population=8)
    family = make_family(0, plan)
    run = evolve(family, 0, plan, lambda generation: None)
    best = run.best.merged()
    by_model = [accuracy(model, family.heldout) for model in (*family.experts, uniform(family), best)]
    # An expert reads its own half of the digits and nothing else.
    assert max(by_model[:2]) < 0.6
    assert by_model[3] > by_model[2] + 0.02 > max(by_model[:2]) + 0.1
    assert run.best.fitness == pytest.approx(float(log_probabilities(best, family.search).mean()), rel=1e-4)
