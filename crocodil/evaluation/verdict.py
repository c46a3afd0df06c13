"""Who wins at equal demasker calls: means over seeds, their comparison, and the same in words.

The numbers of a setting (algorithm, remasking, temperature, registers read, number of steps) are means and sample
standard deviations over seeds. A mean with a missing part is missing: it is shown as a dash and wins no comparison.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from crocodil.evaluation.intervals import mean_and_std

Row = dict[str, Any]

ENTROPY_TOLERANCE = 0.05
"""Nats by which a base setting may lie below the latent system's entropy and still count as its equal in diversity."""

ENTROPY_SLACK = 0.2
"""Nats below the data's entropy from which samples count as collapsed."""

NAMES = {
    "data": "Data",
    "base": "Base",
    "conthendisc": "ConThenDisc",
    "conwithindisc": "ConWithinDisc",
    "oracle": "Oracle",
}
PRIOR = ("prior_network", "prior_steps", "prior_temperature")
"""What drew the sketch, in how many steps; None for what the whole table does."""
MISSING = "\N{EN DASH}"
DRAWING = ("remasking", "temperature", "top_p", "unmasking_schedule")
"""How tokens are drawn and committed."""
SETTING = ("algorithm", *DRAWING, "num_registers", "num_steps", "length", *PRIOR)
CALLS = ("demasker_calls", "prior_calls", "encoder_calls")
MEASURES = (
    *CALLS,
    *("nfe", "seconds_per_sample", "judge_nll", "entropy", "distance", "parse_rate", "duplicate_rate"),
    *("mauve", "compile_rate", "undefined_names", "distinct_2", "distinct_4", "copied_run", "copied_share"),
)


def summarise(rows: list[Row]) -> list[Row]:
    """Mean and sample standard deviation over seeds of every setting.

    Args:
        rows: Rows as in `report.Report`.

    Returns:
        One dict per setting: the entries of `SETTING`, `num_seeds`, and each measure `m` as
        `m` (mean) and `m_std` (NaN for a single seed). Order: data, base, conthendisc, conwithindisc, oracle, each by
        descending steps.

    Raises:
        ValueError: If a row names an unknown algorithm.
    """
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["algorithm"] not in NAMES:
            raise ValueError(
                f"Expected an algorithm of {', '.join(NAMES)}, got {row['algorithm']!r}; rename the row's."
            )
        groups[tuple(row.get(key) for key in SETTING)].append(row)
    summary = []
    for setting, members in groups.items():
        item: Row = dict(zip(SETTING, setting, strict=True)) | {"num_seeds": len(members)}
        for measure in MEASURES:
            item[measure], item[f"{measure}_std"] = mean_and_std([row.get(measure) for row in members])
        summary.append(item)

    def place(row: Row) -> tuple[int, int, str, float, float, str, float, str, int, float]:
        return (
            list(NAMES).index(row["algorithm"]),
            -row["num_steps"],
            row["remasking"] or "",
            -(row["temperature"] or 0),
            -(row["top_p"] or 1),
            row["unmasking_schedule"] or "",
            row["num_registers"] or math.inf,
            row["prior_network"] or "",
            row["prior_steps"] or 0,
            -(1 if row["prior_temperature"] is None else row["prior_temperature"]),
        )

    return sorted(summary, key=place)


def data_row(summary: list[Row]) -> Row:
    """The row of the held-out programs, all of its measures NaN if there is none."""
    missing = {"algorithm": "data", **{f"{m}{suffix}": math.nan for m in MEASURES for suffix in ("", "_std")}}
    return next((row for row in summary if row["algorithm"] == "data"), missing)


def collapsed(row: Row, data: Row) -> bool:
    """Whether a row's entropy is known to lie more than `ENTROPY_SLACK` below the data's."""
    return row["entropy"] < data["entropy"] - ENTROPY_SLACK


def _keeps_entropy(row: Row, data: Row) -> bool:
    """Unlike `not collapsed(...)`, False where either entropy is missing."""
    return row["entropy"] >= data["entropy"] - ENTROPY_SLACK


def best(candidates: Iterable[Row]) -> Row | None:
    """The highest parse rate; ties go to the judge. None if no candidate has a parse rate."""
    measured = [row for row in candidates if math.isfinite(row["parse_rate"])]

    def rank(row: Row) -> tuple[float, bool, float]:
        return row["parse_rate"], math.isfinite(row["judge_nll"]), -row["judge_nll"]

    return max(measured, key=rank, default=None)


def verdict(rows: list[Row], length: int) -> list[Row]:
    """Compares the latent system with the base at the same number of demasker calls.

    The budgets are length // 8, length // 16 and length // 32. At each, the latent system is the setting of ConThenDisc
    or ConWithinDisc with the highest mean parse rate among those that keep the data's entropy, or among all if none
    does. Its rivals are the base settings whose entropy is not below its own minus `ENTROPY_TOLERANCE`, so that
    repetition cannot win; a base without such a setting is compared whatever its entropy, which favours the base.

    Args:
        rows: Rows as in `report.Report`.
        length: Program length L in tokens.

    Returns:
        One dict per budget. `num_steps`: demasker calls. `latent`, `base`: rows of `summarise` with means, spreads and
        total costs (`nfe`, `seconds_per_sample`), the base being the rival that parses best; None if unmeasured.
        `base_lower_entropy`: no rival of no less entropy exists, so the base's is lower. `matching_base`: the base row
        with the fewest calls, of any number, that has at least the latent system's parse rate and keeps the data's
        entropy, or None. `data_entropy`: nats. `better_parse`, `better_judge`: the latent mean is strictly better than
        the base's; `better_judge_all`: its judge NLL is strictly lower than every rival's. `entropy_kept`: its entropy
        is at least the data's minus `ENTROPY_SLACK`. `holds`: better_parse, better_judge and entropy_kept.
    """
    summary = summarise(rows)
    return [_compare(budget, summary) for budget in filter(None, (length // 8, length // 16, length // 32))]


def _compare(budget: int, summary: list[Row]) -> Row:
    data = data_row(summary)
    bases = [row for row in summary if row["algorithm"] == "base"]
    latents = [row for row in summary if row["algorithm"] in ("conthendisc", "conwithindisc")]
    latents = [row for row in latents if row["demasker_calls"] == budget]
    latent = best(row for row in latents if _keeps_entropy(row, data)) or best(latents)
    item: Row = {"num_steps": budget, "latent": latent, "base": None, "matching_base": None}
    item |= {"data_entropy": data["entropy"], "entropy_kept": latent is not None and _keeps_entropy(latent, data)}
    item |= dict.fromkeys(("base_lower_entropy", "better_parse", "better_judge", "better_judge_all", "holds"), False)
    if latent is None:
        return item
    matching = [row for row in bases if row["parse_rate"] >= latent["parse_rate"] and _keeps_entropy(row, data)]
    item["matching_base"] = min(matching, key=lambda row: (row["demasker_calls"], -row["parse_rate"]), default=None)
    bases = [row for row in bases if row["demasker_calls"] == budget]
    lowest = latent["entropy"] - ENTROPY_TOLERANCE
    rivals = [row for row in bases if row["entropy"] >= lowest] or bases
    item["base"] = base = best(rivals)
    if base is None:
        return item
    item["base_lower_entropy"] = base["entropy"] < lowest
    item["better_parse"] = latent["parse_rate"] > base["parse_rate"]
    item["better_judge"] = latent["judge_nll"] < base["judge_nll"]
    item["better_judge_all"] = all(latent["judge_nll"] < row["judge_nll"] for row in rivals)
    item["holds"] = item["better_parse"] and item["better_judge"] and item["entropy_kept"]
    return item


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many digits behind the point, or a dash if it is missing."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def spread(row: Row, measure: str, digits: int = 2, scale: float = 1.0) -> str:
    """The mean of a measure, times `scale`, ± its standard deviation where there is one."""
    mean, std = row[measure] * scale, row[f"{measure}_std"] * scale
    return number(mean, digits) + (f" ± {number(std, digits)}" if math.isfinite(std) else "")


def milliseconds(row: Row) -> str:
    """Milliseconds per sample."""
    time = row["seconds_per_sample"] * 1000
    return number(time, 2 if time < 100 else 0)


def setting_words(row: Row) -> str:
    """Rule, registers and temperature of a row in words."""
    order = (row["remasking"] or "unknown").replace("_", " ")
    order = f"{schedule} {order}" if (schedule := row.get("unmasking_schedule")) else order
    registers = f", first {row['num_registers']} registers" if row["num_registers"] is not None else ""
    temperature = f", T = {row['temperature']:g}" if row["temperature"] is not None else ""
    nucleus = f", nucleus {row['top_p']:g}" if row.get("top_p") is not None else ""
    return f"{order} order{registers}{temperature}{nucleus}" + (f", {words}" if (words := sketch_words(row)) else "")


def sketch_words(row: Row) -> str:
    """What drew the sketch of a row, in how many steps; empty for what the whole table does."""
    network, steps, temperature = (row.get(key) for key in PRIOR)
    if network is None and steps is None and temperature is None:
        return ""
    heat = f" at temperature {temperature:g}" if temperature is not None else ""
    return (network or "prior") + (f" of {steps} steps" if steps else "") + heat


def _ratio(row: Row, other: Row, measure: str) -> str:
    return number(row[measure] / other[measure], 1) if other[measure] else MISSING


def _calls(count: float) -> str:
    return f"{count:g} call" + ("s" if count != 1 else "")


def verdict_sentences(items: list[Row]) -> list[str]:
    """Says each item of `verdict` in plain words, won or lost.

    Args:
        items: What `verdict` returned.

    Returns:
        One paragraph per item, in the same order.
    """
    return [_say(item) for item in items]


def latent_use_sentence(rows: list[Row]) -> str:
    """Says whether the demasker uses the true latents, won or lost.

    Args:
        rows: `conditioning` of `report.Report`; the most registers against none, at ratios of at least 0.5.
    """
    curves: dict[int, dict[float, float]] = defaultdict(dict)
    for row in rows:
        if row["system"] == "demasker" and row["mask_ratio"] >= 0.5:
            curves[row["num_registers"]][row["mask_ratio"]] = row["cross_entropy"]
    with_latents, without = curves[max(curves)], curves[0]
    halved = all(value <= 0.5 * without[ratio] for ratio, value in with_latents.items())
    figures = ", ".join(
        f"{number(value)} against {number(without[ratio])} at {ratio:g}" for ratio, value in with_latents.items()
    )
    verb = "uses the sketch" if halved else "makes too little of the sketch"
    return (
        f"The demasker {verb}: the cross-entropy at masked positions, in nats, with the true latents against without, "
        f"by the share of tokens masked: {figures}."
    )


def _say(item: Row) -> str:
    calls = f"{item['num_steps']} demasker call{'s' if item['num_steps'] > 1 else ''}"
    latent, base = item["latent"], item["base"]
    if latent is None:
        return f"At {calls} neither ConThenDisc nor ConWithinDisc was measured, so nothing is claimed."
    name = NAMES[latent["algorithm"]]
    if base is None:
        return (
            f"At {calls} {name} has no base to stand against: none was measured with so many calls, so nothing is "
            f"claimed. {name} parses {spread(latent, 'parse_rate', 1, 100)} %."
        )
    faults = [
        fault
        for good, fault in (
            (item["better_parse"], "it does not parse more often"),
            (item["better_judge"], "the judge does not prefer it"),
            (item["entropy_kept"], "its entropy does not stay near the data's"),
        )
        if not good
    ]
    outcome = f"does not beat the base: {', and '.join(faults)}." if faults else "beats the base."
    quality = (
        f"It parses {spread(latent, 'parse_rate', 1, 100)} % against {spread(base, 'parse_rate', 1, 100)} % for the "
        f"base; the judge gives it {spread(latent, 'judge_nll')} against {spread(base, 'judge_nll')} nats per token "
        f"(lower is better); its entropy is {number(latent['entropy'])} against {number(base['entropy'])} nats, the "
        f"data's {number(item['data_entropy'])}. ({name}: {setting_words(latent)}; base: {setting_words(base)}.)"
    )
    cost = (
        f"With the prior it costs {number(latent['nfe'], 1)} demasker-call equivalents against "
        f"{number(base['nfe'], 1)} for the base, and {milliseconds(latent)} ms per sample against {milliseconds(base)}"
        f" ms: {_ratio(latent, base, 'seconds_per_sample')} times the wall time."
    )
    parts = (f"At {calls} {name} {outcome}", quality, _say_rivals(item, name), cost, _say_match(item, name))
    return " ".join(filter(None, parts))


def _say_rivals(item: Row, name: str) -> str:
    """What else the reader must know of the base settings with as many calls."""
    lower, parts = item["base_lower_entropy"], []
    if lower:
        parts.append(
            f"No base setting with so many calls has the entropy of {name}, so this base is its best-parsing one of "
            "all: it is of lower entropy, which favours the base."
        )
    if item["better_judge"]:
        prefers = "prefers" if item["better_judge_all"] else "does not prefer"
        every = "every base setting with so many calls" + ("" if lower else " and no less entropy")
        parts.append(f"The judge {prefers} {name} to {every}.")
    return " ".join(parts)


def _say_match(item: Row, name: str) -> str:
    match, latent = item["matching_base"], item["latent"]
    if match is None:
        return "Base budget with the same parse rate and an entropy near the data's: none measured."
    cost, time = (_ratio(match, latent, measure) for measure in ("nfe", "seconds_per_sample"))
    return (
        f"The base ({setting_words(match)}) first reaches that parse rate, with an entropy near the data's, at "
        f"{_calls(match['demasker_calls'])}: {cost} times the network cost and {time} times the wall time of {name}."
    )
