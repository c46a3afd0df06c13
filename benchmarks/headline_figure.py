"""The frontier of the headline: quality against cost, from the figures that headline.py wrote.

python benchmarks/headline_figure.py [--figures benchmarks/results/headline.json] [--output docs/headline.svg]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from headline_tuning import entropy_floor
from matplotlib import rc_context
from matplotlib.figure import Figure

from crocodil.evaluation.figures import INK, LINES, PALETTE

Row = dict[str, Any]
SYSTEMS = ("base", "conthendisc", "conwithindisc", "oracle")
PANELS = {"judge_nll": "judge, nats a token", "mauve": "MAUVE", "parse_rate": "share that parses"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "crocodil",
}


def best_by_calls(rows: list[Row], algorithm: str, floor: float) -> list[Row]:
    """For each number of calls the measured setting the judge likes best among those that keep the entropy."""
    kept = [row for row in rows if row["algorithm"] == algorithm and row["entropy"] >= floor]
    if algorithm in ("conthendisc", "conwithindisc"):
        kept = [row for row in kept if row["prior_network"] == "student"]
    kept = [row for row in kept if not row["remasking"].startswith(("threshold", "factor"))]
    steps = sorted({row["num_steps"] for row in kept})
    return [min((r for r in kept if r["num_steps"] == n), key=lambda row: row["judge_nll"]) for n in steps]


@rc_context(STYLE)
def draw(figures: Row) -> Figure:
    """Three panels over the cost in demasker calls; bars are standard deviations over seeds."""
    rows = figures["rows"]
    data, floor = next(row for row in rows if row["algorithm"] == "data"), entropy_floor(rows)
    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    for axes, (measure, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for algorithm in SYSTEMS:
            line = best_by_calls(rows, algorithm, floor)
            spread = [row.get(f"{measure}_std") or 0.0 for row in line]
            points = [row["nfe"] for row in line], [row[measure] for row in line]
            style = {"color": PALETTE[algorithm][0], "marker": LINES[algorithm].marker, "markersize": 4}
            axes.errorbar(*points, yerr=spread, label=LINES[algorithm].label, elinewidth=0.8, **style)
        axes.axhline(data[measure], color=INK, linestyle="--", linewidth=0.8, label="held-out data")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("cost in demasker calls")
        axes.set_title(label, loc="left", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def main() -> None:
    """Draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", type=Path, default=Path("benchmarks/results/headline.json"))
    parser.add_argument("--output", type=Path, default=Path("docs/headline.svg"))
    options = parser.parse_args()
    draw(json.loads(options.figures.read_text())).savefig(options.output, metadata={"Date": None})
    print(json.dumps({"figure": str(options.output)}))


if __name__ == "__main__":
    main()
