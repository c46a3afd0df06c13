from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from crocodil.evaluation.cost import count_flops, demasker_call_equivalents, network_flops
from crocodil.models import Demasker

WIDTH, HIDDEN, LAYERS, VOCAB, LATENT_DIM = 16, 24, 2, 12, 3  # of `make_demasker`


def demasker_flops(length: int, registers: int = 0) -> int:
    """Two FLOPs a multiplication with addition: projections, attention, feed-forward, head, register projection."""
    size = length + registers
    projections = 4 * 2 * size * WIDTH * WIDTH
    attention = 2 * 2 * size * size * WIDTH
    feed_forward = 3 * 2 * size * WIDTH * HIDDEN
    head = 2 * length * WIDTH * VOCAB
    return LAYERS * (projections + attention + feed_forward) + head + 2 * registers * LATENT_DIM * WIDTH


def test_a_linear_layer_by_hand() -> None:
    assert count_flops(nn.Linear(7, 5), torch.zeros(3, 7)) == 2 * 3 * 7 * 5


@pytest.mark.parametrize("length", [8, 32])
@pytest.mark.parametrize("registers", [None, 2, 4])
def test_a_demasker_by_hand(length: int, registers: int | None, make_demasker: Callable[..., Demasker]) -> None:
    flops = network_flops(length, make_demasker(), registers)
    assert flops["demasker"] == pytest.approx(demasker_flops(length, registers or 0), rel=0.01)
    assert flops["unit"] == pytest.approx(demasker_flops(length), rel=0.01)


def test_counting_computes_nothing_and_changes_nothing(make_demasker: Callable[..., Demasker]) -> None:
    demasker = make_demasker()
    before = {name: value.clone() for name, value in demasker.state_dict().items()}
    token_ids = torch.full((1, 8), 10**6)  # no such token: it would fail if anything were looked up
    assert count_flops(demasker, token_ids) == count_flops(demasker, torch.zeros_like(token_ids))
    for name, value in demasker.state_dict().items():
        assert value.device.type == "cpu" and torch.equal(value, before[name])


def test_each_network_is_counted_by_itself(tiny_pipeline: Any) -> None:
    parts = tiny_pipeline.networks()
    assert set(network_flops(32, parts["demasker"])) == {"unit", "demasker"}
    flops = network_flops(32, parts["demasker"], 4, parts["prior"], parts["encoder"], parts["base"])
    assert flops["unit"] == count_flops(parts["base"], torch.zeros((1, 32), dtype=torch.int64))
    assert flops["prior"] == count_flops(parts["prior"], torch.zeros(1, 4, 8), torch.zeros(1))
    assert flops["encoder"] == count_flops(parts["encoder"], torch.zeros((1, 32), dtype=torch.int64))
    assert flops["unit"] < flops["demasker"]  # the registers are read, too
    assert len(flops) == 4


def test_equivalents_are_calls_weighted_by_flops() -> None:
    flops = {"unit": 100, "demasker": 130, "prior": 40, "encoder": 110}
    calls = {"demasker": 8, "prior": 32, "encoder": 1}
    assert demasker_call_equivalents(calls, flops) == pytest.approx(10.4 + 12.8 + 1.1)
    assert demasker_call_equivalents({"demasker": 5}, {"unit": 100, "demasker": 100}) == 5
    assert demasker_call_equivalents({"demasker": 2, "prior": 0}, {"unit": 1, "demasker": 1}) == 2


@pytest.mark.parametrize("num_steps", [1, 3, 32])
def test_a_plain_run_costs_its_steps_exactly(num_steps: int, tiny_pipeline: Any) -> None:
    cost = tiny_pipeline(2, algorithm="masked", num_steps=num_steps).cost
    assert cost.nfe == num_steps
    assert cost.calls == {"demasker": num_steps}


@pytest.mark.parametrize(
    ("algorithm", "calls"),
    [
        ("conthendisc", {"demasker": 4, "prior": 6, "encoder": 0}),
        ("conwithindisc", {"demasker": 4, "prior": 6 + 3 * 2, "encoder": 1}),
    ],
)
def test_a_guided_run_costs_all_its_networks(algorithm: str, calls: dict[str, int], tiny_pipeline: Any) -> None:
    """The later draw of ConWithinDisc is guided: two evaluations a step."""
    settings = {"num_steps": 4, "prior_steps": 6, "refresh_prior_steps": 3, "prior_guidance_scale": 2.0}
    cost = tiny_pipeline(2, algorithm=algorithm, num_registers=2, **settings).cost
    parts = tiny_pipeline.networks()
    flops = network_flops(32, parts["demasker"], 2, parts["prior"], parts["encoder"], parts["base"])
    assert {name: cost.calls.get(name, 0) for name in calls} == calls
    assert cost.nfe == pytest.approx(sum(count * flops[name] / flops["unit"] for name, count in calls.items()))
