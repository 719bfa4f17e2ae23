"""Seconds of plans: exchanges between devices, the host's link, files, and what comes before and after a search."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_advice import models, plan_of

from evojax_merge.errors import InputError
from evojax_merge.evaluation.costs import Cost
from evojax_merge.evaluation.liveness import Exchange, flat_program, sent_bytes
from evojax_merge.evaluation.targets import find_target
from evojax_merge.report.plan import COMPILING, LOADING, WRITING

__all__ = ["models"]


def test_sums_over_devices_are_counted_once_for_each_trip() -> None:
    """The results of an MLP that is cut by its inner entries are summed up, those of a loop in each trip."""

    def mlp(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ up.T) @ down.T, None), x, length=3)[0]

    def until(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: mlp(y, up, down), x)

    shapes = jnp.ones((8, 64)), jnp.ones((256, 64)), jnp.ones((64, 256))
    result, cut = 4 * 8 * 64, (None, 0, 1)
    assert flat_program(jax.make_jaxpr(mlp)(*shapes), cut, 4).exchanges == {Exchange(result, is_sum=True): 3}
    repeated = flat_program(jax.make_jaxpr(until)(*shapes), cut, 4).exchanges
    assert repeated == {Exchange(result, is_sum=True, is_repeated=True): 3}
    # Twice round a ring of four, in each of five steps.
    assert sent_bytes(repeated, 4, steps=5) == 5 * 3 * 2 * 3 / 4 * result
    assert not flat_program(jax.make_jaxpr(mlp)(*shapes), (None,) * 3, 1).exchanges


def test_groups_exchange_at_the_rate_of_their_links() -> None:
    """Within a host over NVLink, beyond it over all adapters of the hosts."""
    hosts, cards = find_target("t", "2x8xh100"), find_target("t", "2x8xrtx4090")
    assert hosts.exchange_rate(8) == 450e9 and hosts.exchange_rate(16) == 400e9
    assert cards.exchange_rate(8) == cards.link > cards.exchange_rate(16)
    slow = find_target("t", "2x8xH100:network=1e9,disk=2e9")
    assert (slow.name, slow.exchange_rate(16), slow.disk, slow.link) == ("2x8xh100", 8e9, 2e9, hosts.link)
    cost = Cost(sent_bytes=900e9, brought_bytes=63e9 * 8, disk_bytes=7e9 * 6)
    assert [cost.exchange_seconds(hosts, 8), cost.link_seconds(hosts, 8), cost.disk_seconds(hosts, 8)] == [2, 1, 6]
    # Two hosts read a half each.
    assert cost.disk_seconds(hosts, 16) == 3 and cost.seconds(hosts, 8) == 6


@pytest.mark.parametrize("rates", ["disk=", "disk=1e9,link", "disk=0", "disk=-1", "speed=1e9", "disk=inf", "disk=nan"])
def test_wrong_rates_are_refused(rates: str) -> None:
    with pytest.raises(
        InputError, match=f"--target: {rates.split(',')[-1]}: expected KEY=BYTES.*bandwidth, link, interconnect"
    ):
        find_target("--target", f"8xh100:{rates}")


def test_a_plan_says_which_part_binds(models: Any) -> None:
    def plan(target: str, bank: str, **settings: Any) -> Any:
        return plan_of(models("small"), "likelihood", target, bank=bank, **settings)

    host, disk = plan("h100", "host"), plan("h100", "disk")
    assert host.generation.link_seconds > 0 == host.generation.disk_seconds
    assert disk.generation.disk_seconds == pytest.approx(disk.generation.link_seconds * 63e9 / 7e9, rel=1e-6)
    assert disk.run.bound == "the disk" and "bound by the disk" in disk.conclusion()[-1]
    assert plan("h100:disk=1e13,link=1e13", "disk").run.bound not in ("the disk", "the host's link")
    # Models that stay in files are not loaded.
    assert disk.around[LOADING].disk_seconds == 0 < host.around[LOADING].disk_seconds
    assert host.around[COMPILING].seconds > 0 and host.around[WRITING].bound == "the disk"
    within, across = (plan("2x8xh100:network=1e9", "device", model=shards).candidate for shards in (8, 16))
    assert within.exchange_seconds > 0
    # As many bytes, in a ring of twice as many devices, at 8 GB/s and not at 450.
    ratio = (2 * 15 / 16 / 8e9) / (2 * 7 / 8 / 450e9)
    # Eight heads of keys are no sixteen parts, and are gathered beside that.
    assert ratio < across.exchange_seconds / within.exchange_seconds < 1.5 * ratio


def test_a_materialised_candidate_is_in_parts_on_the_devices_that_share_it(models: Any) -> None:
    """Merged from the host's memory: its layers, its embedding, and the array that they are written into."""

    def needed(model: int) -> list[int]:
        plan = plan_of(models("small"), "generation", "8xh200", bank="host", model=model, tokens=64)
        passes = [row for row in plan.passes if row.name == "materialise"]
        assert sum(row.sent_bytes for row in passes) == 0
        return [row.temporary_bytes // row.chunk for row in passes if row.temporary_bytes > 10**6]

    assert needed(8) == pytest.approx([nbytes / 4 for nbytes in needed(2)], rel=0.001)
