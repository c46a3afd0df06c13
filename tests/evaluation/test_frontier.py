import math
from collections.abc import Callable

import pytest

from crocodil.evaluation.frontier import calls_to_reach, calls_to_reach_all, sentence, speedups, value_at
from crocodil.evaluation.intervals import interval
from crocodil.evaluation.verdict import Row

CURVE = [(2, 4.0), (8, 2.0), (32, 1.0)]  # nats: lower is better


def test_calls_are_interpolated_in_their_logarithm() -> None:
    assert calls_to_reach(2.0, CURVE, False) == 8
    assert calls_to_reach(3.0, CURVE, False) == pytest.approx(4.0)  # half-way between 2 and 8
    assert calls_to_reach(1.5, CURVE, False) == pytest.approx(16.0)
    assert calls_to_reach(5.0, CURVE, False) == 2  # good enough from the start
    assert calls_to_reach(0.5, CURVE, False) is None
    assert calls_to_reach(0.3, [(1, 0.1), (4, 0.5)], True) == pytest.approx(2.0)


def test_the_first_crossing_counts_where_a_curve_falls_back() -> None:
    assert calls_to_reach(2.0, [(1, 3.0), (4, 2.0), (16, 2.5), (64, 1.0)], False) == 4


def test_values_between_points() -> None:
    assert value_at(4.0, CURVE) == pytest.approx(3.0)
    assert value_at(1.0, CURVE) == 4.0 and value_at(64.0, CURVE) == 1.0
    assert value_at(4.0, [(4, 1.0), (4, 2.0), (8, 3.0)]) == 2.0  # more steps than tokens: as many calls twice


@pytest.fixture
def rows(make_row: Callable[..., Row]) -> list[Row]:
    """At 32 calls the base has 2.0 nats; ConThenDisc has them at 4, 5.04, 3.17 calls in three seeds."""
    found = []
    for seed, shift in enumerate((0.0, 0.2, -0.2)):
        for calls, nll in ((64, 1.5), (32, 2.0), (8, 3.5)):
            costs = {"entropy": 5.0 + shift / 10, "seconds_batch_8": calls / 100}
            found.append(make_row("base", calls, 0.1, nll, seed=seed, **costs))
        for calls, nll in ((2, 2.6), (8, 1.4)):
            found.append(
                make_row(
                    "conthendisc",
                    calls,
                    0.1,
                    nll + shift,
                    entropy=5.0,
                    seed=seed,
                    nfe=calls + 6.0,
                    seconds_batch_8=(calls + 6) / 100,
                )
            )
    return found


def test_speedup_at_the_quality_of_each_budget(rows: list[Row]) -> None:
    found = {item.base_calls: item for item in speedups(rows, "judge_nll")}
    assert list(found) == [64, 32, 8]
    item = found[32]
    calls = [2 * 4 ** ((0.6 + shift) / 1.2) for shift in (0.0, 0.2, -0.2)]
    assert calls[0] == pytest.approx(4.0)
    assert item.calls is not None and item.calls.mean == pytest.approx(interval(calls).mean)
    logs = interval([math.log(32 / count) for count in calls])
    factor = item.factors["demasker_calls"]
    expected = tuple(map(math.exp, (logs.mean, logs.low, logs.high)))
    assert (factor.mean, factor.low, factor.high) == pytest.approx(expected)
    cost = item.factors["nfe"]
    ratios = [32 / value_at(count, [(2, 8.0), (8, 14.0)]) for count in calls]
    assert cost.mean == pytest.approx(math.prod(ratios) ** (1 / 3))
    assert item.factors["seconds_batch_8"].mean == pytest.approx(cost.mean)
    assert item.claimed and item.num_reached == 3 and not item.at_most
    assert "wall-clock: " in sentence(item) and "No speed-up" not in sentence(item)
    assert found[8].at_most and "at most" in sentence(found[8])


def test_no_claim_without_the_entropy(rows: list[Row]) -> None:
    """The base's entropy is 5.0 with a spread of 0.02 over seeds."""
    for entropy, claimed in ((4.985, True), (4.97, False)):
        changed = [row | ({"entropy": entropy} if row["algorithm"] == "conthendisc" else {}) for row in rows]
        item = speedups(changed, "judge_nll")[1]
        assert item.claimed == claimed
        assert ("its entropy is" in sentence(item)) != claimed


def test_no_claim_where_the_prior_costs_what_it_saves(rows: list[Row]) -> None:
    dear = [row | ({"nfe": row["nfe"] + 40} if row["algorithm"] == "conthendisc" else {}) for row in rows]
    item = speedups(dear, "judge_nll")[1]
    assert item.factors["demasker_calls"].low > 1 and item.factors["nfe"].high < 1 and not item.claimed
    assert "prior and encoder cost as much as the calls they save" in sentence(item)


def test_no_claim_where_a_seed_fails(rows: list[Row]) -> None:
    failing = ("conthendisc", 1)
    changed = [row | ({"judge_nll": 3.0} if (row["algorithm"], row["seed"]) == failing else {}) for row in rows]
    item = speedups(changed, "judge_nll")[1]
    assert item.num_reached == 2 and not item.claimed
    assert "only 2 of 3 seeds reach it" in sentence(item)
    never = [row | ({"judge_nll": 9.0} if row["algorithm"] == "conthendisc" else {}) for row in rows]
    item = speedups(never, "judge_nll")[1]
    assert item.calls is None and not item.claimed and "does not reach" in sentence(item)


def test_no_claim_where_the_interval_holds_one(rows: list[Row], make_row: Callable[..., Row]) -> None:
    """Four calls of the base against 4, 2.2 and 8 of the system."""
    bases = [make_row("base", 4, 0.1, nll, seed=seed) for seed, nll in enumerate((2.0, 2.717, 1.2))]
    (item,) = speedups([*bases, *(row for row in rows if row["algorithm"] != "base")], "judge_nll")
    assert item.calls is not None and item.calls.mean == pytest.approx((4 + 2.2 + 8) / 3, rel=1e-3)
    assert item.num_reached == 3 and item.factors["demasker_calls"].low < 1 and not item.claimed
    assert "does not exclude 1" in sentence(item)


def test_the_base_has_its_best_setting_at_each_budget(rows: list[Row]) -> None:
    better = [
        row | {"temperature": 0.5, "judge_nll": row["judge_nll"] - 0.5}
        for row in rows
        if row["algorithm"] == "base" and row["num_steps"] == 32
    ]
    item = next(item for item in speedups(rows + better, "judge_nll") if item.base_calls == 32)
    assert item.base["temperature"] == 0.5


def test_a_collapsed_base_stands_beside_one_that_is_not(rows: list[Row], make_row: Callable[..., Row]) -> None:
    data = make_row("data", 0, 1.0, 1.0, entropy=5.0)
    collapsed = [
        row | {"temperature": 0.5, "judge_nll": 1.4, "entropy": 4.7}
        for row in rows
        if row["algorithm"] == "base" and row["num_steps"] == 32
    ]
    diverse = [row | {"entropy": 4.9} for row in collapsed]
    for added, temperatures in ((collapsed, [0.5, 1.0]), (diverse, [0.5])):
        found = [item for item in speedups([data, *rows, *added], "judge_nll") if item.base_calls == 32]
        assert [item.base["temperature"] for item in found] == temperatures


def test_a_quality_that_grows_is_matched_from_below(make_row: Callable[..., Row]) -> None:
    rows = [make_row("base", 16, 0.2, 1.0, seed=s) for s in (0, 1)]
    rows += [make_row("conthendisc", calls, rate, 1.0, seed=s) for calls, rate in ((2, 0.1), (8, 0.3)) for s in (0, 1)]
    (item,) = speedups(rows, "parse_rate")
    assert item.calls is not None and item.calls.mean == pytest.approx(4.0)


def test_several_qualities_are_reached_together_or_not_at_all() -> None:
    rows = [
        {"demasker_calls": calls, "judge_nll": nll, "mauve": mauve}
        for calls, nll, mauve in ((2, 4.0, 0.5), (8, 2.0, 0.9), (32, 1.0, 0.6), (128, 0.9, 0.9))
    ]
    assert calls_to_reach_all({"judge_nll": 3.0}, rows) == pytest.approx(4.0)
    assert calls_to_reach_all({"judge_nll": 3.0, "mauve": 0.6}, rows) == pytest.approx(4.0)
    assert calls_to_reach_all({"judge_nll": 3.0, "mauve": 0.8}, rows) == pytest.approx(2 * 4**0.75)
    assert calls_to_reach_all({"judge_nll": 1.0, "mauve": 0.8}, rows) == 128  # at 32 calls MAUVE has fallen back
    assert calls_to_reach_all({"judge_nll": 0.9, "mauve": 0.95}, rows) is None
    assert calls_to_reach_all({"judge_nll": 0.5, "mauve": 0.5}, rows) is None


def test_a_further_measure_may_fall_short_by_the_bases_own_spread(rows: list[Row]) -> None:
    """The base's MAUVE is 0.5 with a deviation of 0.1 at every budget."""
    for mauve, reached in ((0.41, True), (0.39, False)):
        changed = [
            row | {"mauve": 0.5 + 0.1 * (row["seed"] - 1) if row["algorithm"] == "base" else mauve} for row in rows
        ]
        item = speedups(changed, "judge_nll", also=("mauve",))[1]
        assert item.base_calls == 32 and (item.num_reached == item.num_seeds) == reached
        assert "with no worse MAUVE" in sentence(item)
        assert item.calls is None or item.calls == speedups(changed, "judge_nll")[1].calls
