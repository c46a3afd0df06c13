"""The page of the latent tools."""

from collections.abc import Sequence
from importlib.resources import files
from math import exp
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from torch import Tensor

from crocodil.evaluation.ends import tokens_through_eos
from crocodil.evaluation.page import mark_differences
from crocodil.latents.tools import Interpolant, Neighbour, RegisterCount, RegisterEffects
from crocodil.pipeline import CrocodilPipeline


def save_page(
    path: str | Path,
    title: str,
    pipeline: CrocodilPipeline,
    *,
    interpolation: Sequence[Interpolant] = (),
    counts: Sequence[RegisterCount] = (),
    effects: RegisterEffects | None = None,
    changed: str = "is hidden",
    neighbours: Sequence[tuple[str, Neighbour]] = (),
    query: str = "",
) -> None:
    """Writes one HTML page that needs no network and runs no script; every text is escaped.

    Args:
        path: file to write.
        title: what the page says on top.
        pipeline: whose codec shows tokens.
        interpolation: of `tools.interpolate`; empty leaves the section out, as everywhere.
        counts: of `tools.by_register_count`.
        effects: of `tools.register_effects`.
        changed: what happened to the register there.
        neighbours: where each text stands, and the text, of `tools.nearest`.
        query: whose neighbours they are.
    """
    texts = [point.text for point in interpolation]
    points = [
        {**vars(point), "html": mark_differences(before, point.text)[1]}
        for before, point in zip([*texts[:1], *texts[:-1]], interpolation, strict=True)
    ]
    found = [
        {**vars(one), "source": source, "html": mark_differences(query, one.text)[1]} for source, one in neighbours
    ]
    lowest = min((point[key] for point in points for key in point if "cosine" in key), default=0.0)
    template = (files("crocodil.evaluation") / "latents.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(template).render(
        title=title,
        interpolation=points,
        lowest=min(0.0, lowest),
        counts=[{**vars(step), "pieces": _pieces_by_kind(pipeline, step)} for step in counts],
        pieces=[] if effects is None else _pieces(pipeline, effects.token_ids),
        rises=[] if effects is None else effects.rises.tolist(),
        exp=exp,
        changed=changed,
        neighbours=found,
        query=query,
    )
    Path(path).write_text(html, encoding="utf-8")


def _pieces(pipeline: CrocodilPipeline, token_ids: Tensor) -> list[str]:
    """How the tokens of a text look, through its first end token; those that do not show, as a dot."""
    shown = token_ids[tokens_through_eos(token_ids[None], pipeline.demasker.stop_token_ids)[0]]
    return [piece or "\u00b7" for piece in pipeline.codec.pieces(shown)]


def _pieces_by_kind(pipeline: CrocodilPipeline, step: RegisterCount) -> list[tuple[str, str]]:
    kinds = [
        "gained" if gained else "" if right else "wrong"
        for right, gained in zip(step.is_right.tolist(), step.is_gained.tolist(), strict=True)
    ]
    kinds[0] = ""  # the start token is not counted
    return list(zip(_pieces(pipeline, step.token_ids), kinds, strict=False))
