"""The headline's trained system and how much of it is measured."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from headline_tuning import SKETCHED, Grids, is_adaptive

from crocodil.data import CanonicalFunctions
from crocodil.data.corpora import Split
from crocodil.evaluation.judge import Judge
from crocodil.evaluation.verdict import Row
from crocodil.experiments import Generation, SystemGrid
from crocodil.experiments.cells import Ledger, array_fingerprint, fingerprint
from crocodil.pipeline import CrocodilPipeline, PipelineResult

FOLDER = Path("runs/headline")


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        overrides: options of `crocodil fit` for every stage.
        grids: settings that are tried.
        tuning_texts: texts of a setting that is tried.
        finalist_texts: texts of the best of these, which are measured again.
        texts: of a setting that is measured, for each seed.
        references: held-out texts of MAUVE and the Fréchet distance.
        seeds: of the measured texts.
        timed: systems whose wall-clock is measured.
        batches: at these batch sizes.
        rounds: how often, settings in turn.
        single_texts: texts that are written one at a time, for the share of wall-clock.
    """

    overrides: tuple[str, ...] = ()
    grids: Grids = field(default_factory=Grids)
    tuning_texts: int = 96
    finalist_texts: int = 384
    texts: int = 256
    references: int = 1024
    seeds: tuple[int, ...] = (0, 1, 2)
    timed: tuple[str, ...] = SKETCHED
    batches: tuple[int, ...] = (1, 8, 32)
    rounds: int = 5
    single_texts: int = 32


def headline_data() -> CanonicalFunctions:
    """The corpus, prepared."""
    data = CanonicalFunctions(folder=str(FOLDER / "corpus" / "packages"), split_by="folder", length=64)
    data.prepare_data()
    return data


def held_out(data: CanonicalFunctions, split: Split, references: int) -> torch.Tensor:
    """(2 R, L) int64: texts of a split, from all of its packages; every other one is a reference.

    Args:
        data: the corpus.
        split: "val" or "test".
        references: R.
    """
    texts = data.blocks(split)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return texts[order[: 2 * references]]


class Bench:
    """The trained system, its judge and its texts.

    Args:
        effort: how much is measured.
        data: the corpus it was trained on.
    """

    def __init__(self, effort: Effort, data: CanonicalFunctions) -> None:
        self.effort, self.data = effort, data
        self.pipeline = CrocodilPipeline.from_pretrained(FOLDER / "pipeline")
        self.judge = Judge.from_pretrained(FOLDER / "judge-lm", self.pipeline.codec, score_end=True)

    def rows(self, name: str, split: Split, systems: Sequence[SystemGrid], **options: Any) -> list[Row]:
        """The figures of settings; adaptive rules write one text at a time, as a batch waits for its slowest."""
        found: list[Row] = []
        texts = held_out(self.data, split, self.effort.references)
        for is_base, batch_size in product((True, False), (None, 1)):
            wanted = (is_base, batch_size == 1)
            chosen = [grid for grid in systems if (grid.algorithm == "base", is_adaptive(grid)) == wanted]
            if chosen:
                table = Generation(self.pipeline, self.judge, texts, chosen, batch_size=batch_size, **options)
                rows = table.rows(self.ledger(f"{split}-{name}", table, options.get("train")))
                found += [row for row in rows if not found or row["algorithm"] != "data"]
        return [{key: value for key, value in row.items() if key != "examples"} for row in found]

    def ledger(self, name: str, table: Generation, train: np.ndarray | None) -> Ledger:
        """Where the cells of a table are kept; other weights, texts or options have another file."""
        networks = {"tokenizer"}.union(*map(networks_of, table.systems))
        context = {
            "system": {name: fingerprint(FOLDER / "pipeline" / name) for name in sorted(networks)},
            "processes": (FOLDER / "pipeline" / "crocodil.json").read_text(),
            "judge": fingerprint(FOLDER / "judge-lm"),
            "texts": array_fingerprint(table.held_out.numpy()),
            "train": None if train is None else array_fingerprint(train),
            "options": [table.num_samples, table.batch_size, table.mauve_seeds],
        }
        return Ledger(FOLDER / "cells", name, context)

    def write(self, grid: SystemGrid, num_samples: int, seed: int) -> PipelineResult:
        """Texts of one setting, all at once."""
        setting = grid.settings(self.data.length)[0]
        return self.pipeline(num_samples, seed=seed, batch_size=num_samples, **setting.arguments())


def networks_of(grid: SystemGrid) -> set[str]:
    """What a system writes with, by the folders of the pipeline."""
    if grid.algorithm == "base":
        return {"base"}
    drawn_by = {"encoder"} if grid.algorithm == "oracle" else {grid.prior_network or "prior"}
    return {"demasker"} | drawn_by | ({"encoder"} if grid.algorithm == "conwithindisc" else set())
