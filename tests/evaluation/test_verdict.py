import math
from collections.abc import Callable

import pytest

from crocodil.evaluation.verdict import MISSING, Row, latent_use_sentence, summarise, verdict, verdict_sentences


def at(budget: int, rows: list[Row]) -> Row:
    return next(item for item in verdict(rows, 64) if item["num_steps"] == budget)


def say(item: Row) -> str:
    return verdict_sentences([item])[0]


def test_summary_is_mean_and_sample_deviation_over_seeds(base: Row) -> None:
    item = summarise([base | {"parse_rate": 0.1}, base | {"parse_rate": 0.3, "seed": 1}])[0]
    assert item["num_seeds"] == 2
    assert item["parse_rate"] == pytest.approx(0.2)
    assert item["parse_rate_std"] == pytest.approx(math.sqrt(0.02))
    assert math.isnan(summarise([base])[0]["parse_rate_std"])


def test_summary_separates_settings_and_orders_them(data: Row, make_row: Callable[..., Row]) -> None:
    rows = [make_row(name, 8, 0.1, 2.0) for name in ("oracle", "conwithindisc", "conthendisc")]
    rows += [make_row("base", calls, 0.1, 2.0, temperature=t) for calls in (8, 64) for t in (0.7, 1.0)] + [data]
    order = [(item["algorithm"], item["num_steps"], item["temperature"]) for item in summarise(rows)]
    expected = [("base", 64, 1.0), ("base", 64, 0.7), ("base", 8, 1.0), ("base", 8, 0.7)]
    assert order == [
        ("data", 0, None),
        *expected,
        *((name, 8, 1.0) for name in ("conthendisc", "conwithindisc", "oracle")),
    ]


def test_a_mean_with_a_missing_part_is_missing(base: Row) -> None:
    item = summarise([base, base | {"judge_nll": math.nan}, base | {"distance": None}])[0]
    assert math.isnan(item["judge_nll"]) and math.isnan(item["distance"])
    assert item["parse_rate"] == pytest.approx(0.04)


def test_unknown_algorithm_is_refused(base: Row) -> None:
    with pytest.raises(ValueError, match="got 'magic'"):
        summarise([base | {"algorithm": "magic"}])


def test_verdict_of_a_win_names_both_sides_and_all_costs(
    data: Row, base: Row, latent: Row, make_row: Callable[..., Row]
) -> None:
    worse = make_row("conwithindisc", 8, 0.10, 2.2)
    item = at(8, [data, base, worse, latent])
    assert item["latent"]["algorithm"] == "conthendisc"
    assert (item["latent"]["parse_rate"], item["base"]["parse_rate"]) == pytest.approx((0.12, 0.04))
    assert item["better_parse"] and item["better_judge"] and item["entropy_kept"] and item["holds"]
    text = say(item)
    assert text.startswith("At 8 demasker calls ConThenDisc beats the base.")
    for part in (
        "12.0 % against 4.0 %",
        "2.30 against 2.60",
        "9.3 demasker-call equivalents against 8.0",
        "11.20 ms per sample against 8.00 ms",
        "1.4 times",
    ):
        assert part in text


def test_budgets_follow_the_length(data: Row) -> None:
    assert [item["num_steps"] for item in verdict([data], 64)] == [8, 4, 2]
    assert [item["num_steps"] for item in verdict([data], 16)] == [2, 1]


@pytest.mark.parametrize(
    ("changes", "flag", "fault"),
    [
        ({"parse_rate": 0.04}, "better_parse", "it does not parse more often"),
        ({"judge_nll": 2.6}, "better_judge", "the judge does not prefer it"),
        ({"entropy": 4.79}, "entropy_kept", "its entropy does not stay near the data's"),
    ],
)
def test_verdict_of_a_loss_says_so(data: Row, base: Row, latent: Row, changes: Row, flag: str, fault: str) -> None:
    item = at(8, [data, base, latent | changes])
    flags = {name: item[name] for name in ("better_parse", "better_judge", "entropy_kept")}
    assert flags == dict.fromkeys(flags, True) | {flag: False}
    assert not item["holds"]
    assert say(item).startswith(f"At 8 demasker calls ConThenDisc does not beat the base: {fault}.")


def test_entropy_is_kept_within_the_slack(data: Row, base: Row, latent: Row) -> None:
    assert at(8, [data, base, latent | {"entropy": 4.81}])["entropy_kept"]


def test_collapsed_base_rule_is_not_chosen_but_a_diverse_one_is(data: Row, base: Row, latent: Row) -> None:
    collapsed = base | {"remasking": "low_confidence", "parse_rate": 0.9, "entropy": 4.94}
    assert at(8, [data, base, collapsed, latent])["base"]["remasking"] == "random"
    diverse = collapsed | {"entropy": 4.96}
    item = at(8, [data, base, diverse, latent])
    assert item["base"]["remasking"] == "low_confidence" and not item["better_parse"]


def test_latent_system_is_the_best_that_keeps_the_entropy(
    data: Row, base: Row, latent: Row, make_row: Callable[..., Row]
) -> None:
    collapsed = make_row("conwithindisc", 8, 0.9, 1.0, entropy=4.79)
    elsewhere = make_row("conthendisc", 16, 0.9, 1.0)
    item = at(8, [data, base, collapsed, elsewhere, latent])
    assert (item["latent"]["algorithm"], item["latent"]["demasker_calls"]) == ("conthendisc", 8)
    assert item["entropy_kept"]
    worse = latent | {"entropy": 4.79}
    item = at(8, [data, base, worse, collapsed])
    assert item["latent"]["algorithm"] == "conwithindisc" and not item["entropy_kept"] and not item["holds"]


def test_base_without_the_entropy_is_compared_and_said_to_be_favoured(
    data: Row, base: Row, latent: Row, make_row: Callable[..., Row]
) -> None:
    weak = base | {"entropy": 4.94, "temperature": 0.9, "parse_rate": 0.01}
    strong = base | {"entropy": 3.0, "temperature": 0.7, "parse_rate": 0.13}
    elsewhere = make_row("base", 16, 0.9, 1.0)
    item = at(8, [data, weak, strong, elsewhere, latent])
    assert (item["base"]["entropy"], item["base"]["demasker_calls"]) == (3.0, 8)
    assert item["base_lower_entropy"] and not item["better_parse"] and item["better_judge"]
    assert "is of lower entropy, which favours the base" in say(item)
    assert "its entropy is 5.00 against 3.00 nats, the data's 5.00" in say(item)
    beaten = at(8, [data, weak, latent])
    assert beaten["holds"] and "which favours the base" in say(beaten)
    fair = at(8, [data, base, strong, latent])
    assert not fair["base_lower_entropy"] and "favours" not in say(fair)


def test_judge_against_every_base_setting_of_no_less_entropy(
    data: Row, base: Row, latent: Row, make_row: Callable[..., Row]
) -> None:
    likelier = base | {"temperature": 0.9, "parse_rate": 0.03, "judge_nll": 2.2}
    item = at(8, [data, base, likelier, latent])
    assert item["better_judge"] and item["holds"] and not item["better_judge_all"]
    every = "every base setting with so many calls"
    assert f"The judge does not prefer ConThenDisc to {every} and no less entropy." in say(item)
    item = at(8, [data, base, likelier | {"entropy": 4.94}, make_row("base", 16, 0.01, 1.0), latent])
    assert item["better_judge_all"]
    assert f"The judge prefers ConThenDisc to {every} and no less entropy." in say(item)


def test_judge_against_every_base_setting_where_none_has_the_entropy(data: Row, base: Row, latent: Row) -> None:
    low, likelier = base | {"entropy": 4.0}, base | {"temperature": 0.9, "parse_rate": 0.03, "entropy": 3.0}
    assert at(8, [data, low, likelier, latent])["better_judge_all"]
    item = at(8, [data, low, likelier | {"judge_nll": 2.2}, latent])
    assert item["better_judge"] and not item["better_judge_all"]
    assert "The judge does not prefer ConThenDisc to every base setting with so many calls." in say(item)
    assert not at(8, [data, low, likelier | {"judge_nll": None}, latent])["better_judge_all"]


def test_ties_in_parse_rate_go_to_the_judge(data: Row, base: Row, latent: Row) -> None:
    better = base | {"temperature": 0.9, "judge_nll": 2.5}
    unjudged = base | {"temperature": 0.8, "judge_nll": math.nan}
    assert at(8, [data, unjudged, base, better, latent])["base"]["temperature"] == 0.9


def test_matching_base_is_the_cheapest_that_keeps_the_entropy(
    data: Row, base: Row, latent: Row, make_row: Callable[..., Row]
) -> None:
    collapsed = make_row("base", 16, 0.9, 1.0, entropy=3.0)
    rows = [data, base, latent, collapsed, make_row("base", 64, 0.2, 2.0), make_row("base", 32, 0.12, 2.1)]
    item = at(8, rows)
    assert item["base"]["demasker_calls"] == 8
    assert item["matching_base"]["demasker_calls"] == 32
    assert "at 32 calls: 3.4 times the network cost and 2.9 times the wall time" in say(item)
    assert "none measured" in say(at(8, [data, base, latent, collapsed]))


def test_matching_base_keeps_the_entropy_of_the_data_not_of_the_latent_system(
    data: Row, base: Row, latent: Row, make_row: Callable[..., Row]
) -> None:
    for entropy, found in ((4.81, True), (4.79, False)):
        item = at(8, [data, base, latent, make_row("base", 16, 0.2, 2.0, entropy=entropy)])
        assert (item["matching_base"] is not None) == found
    latent = latent | {"entropy": 4.7}
    item = at(8, [data, base, latent, make_row("base", 16, 0.2, 2.0, entropy=4.75)])
    assert item["matching_base"] is None


def test_matching_base_is_the_best_rule_of_the_smallest_budget(
    data: Row, base: Row, latent: Row, make_row: Callable[..., Row]
) -> None:
    fewer = [make_row("base", 4, rate, 2.0, temperature=t) for rate, t in ((0.12, 1.0), (0.3, 0.9), (0.2, 0.8))]
    item = at(8, [data, base, latent, make_row("base", 2, 0.119, 1.0), *fewer, make_row("base", 16, 0.9, 1.0)])
    assert (item["matching_base"]["demasker_calls"], item["matching_base"]["temperature"]) == (4, 0.9)
    assert "The base (random order, T = 0.9) first reaches that parse rate" in say(item)
    single = at(8, [data, base, latent, make_row("base", 1, 0.2, 1.0)])
    assert "at 1 call: 0.1 times the network cost" in say(single)


def test_nothing_is_claimed_without_both_sides(data: Row, base: Row, latent: Row, make_row: Callable[..., Row]) -> None:
    for rows in ([data, base], [data, latent], [data, latent, make_row("base", 16, 0.01, 3.0)]):
        item = at(8, rows)
        assert not item["holds"] and not item["better_judge_all"]
        assert "nothing is claimed" in say(item)


def test_missing_numbers_win_nothing(data: Row, base: Row, latent: Row) -> None:
    item = at(8, [data, base, latent | {"judge_nll": math.nan, "seconds_per_sample": None}])
    assert not item["holds"]
    assert f"gives it {MISSING} against 2.60" in say(item)
    assert f"{MISSING} times the wall time" in say(item)
    assert not at(8, [base, latent])["entropy_kept"]
    unparsed = base | {"temperature": 1.5, "parse_rate": math.nan}
    assert at(8, [data, unparsed, base, latent])["base"]["temperature"] == 1.0


def test_the_use_of_latents_is_told_won_or_lost() -> None:
    """The most registers against none; the base and fewer registers stand aside."""

    def rows(points: list[tuple[float, float, float]]) -> list[Row]:
        return [
            {"system": system, "num_registers": count, "mask_ratio": ratio, "cross_entropy": value}
            for ratio, with_latents, without in points
            for system, count, value in (
                ("demasker", 4, with_latents),
                ("demasker", 1, 9.0),
                ("demasker", 0, without),
                ("base", 0, 9.0),
            )
        ]

    used = [(0.1, 0.1, 0.11), (0.5, 0.1, 0.2), (1.0, 0.1, 2.5)]
    sentence = latent_use_sentence(rows(used))
    assert "uses the sketch" in sentence and "0.10 against 0.20 at 0.5, 0.10 against 2.50 at 1." in sentence
    assert "at 0.1" not in sentence
    assert "too little" in latent_use_sentence(rows([*used, (0.7, 0.6, 1.1)]))
