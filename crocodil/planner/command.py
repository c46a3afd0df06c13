"""`crocodil plan`: from the command line to a table."""

import json as json_format
import logging
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from crocodil.data.block_datamodule import require_at_least
from crocodil.planner.estimate import CUDA_CONTEXT, FRAGMENTATION, GIB, Plan, plan_run
from crocodil.planner.step import SimulatedStep, WeightlessMode
from crocodil.trainer_cli import CrocodilCLI, run_trainer
from crocodil.weightless import without_weights

PARTS = {
    "weights": "weights",
    "cast_weights": "weights cast by autocast",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "averaged_weights": "averaged weights (EMA)",
    "activations": "activations and temporary tensors",
    "logits": "logits and their loss",
    "gathered_blocks": "blocks gathered by FSDP2",
    "allowance": "CUDA context and fragmentation *",
}
IRRELEVANT = (".*Trainer\\(barebones=True\\)", "GPU available but not used")


class PlanCLI(CrocodilCLI):
    """Parses what `crocodil fit` parses, and builds the stage from fake tensors and a Trainer that never runs."""

    def before_instantiate_classes(self) -> None:
        """Nothing will be written."""

    def instantiate_classes(self) -> None:
        """Builds everything inside the mode of the fake tensors; checkpoints give their settings, not their weights."""
        self.fake_mode = WeightlessMode()
        with without_weights(), self.fake_mode:
            super().instantiate_classes()
            self.model.load_weights()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer with the numerics of the configured one, on the CPU."""
        options = self.config_init[self.subcommand].trainer
        numerics = {name: options[name] for name in ("precision", "accumulate_grad_batches")}
        return Trainer(accelerator="cpu", devices=1, barebones=True, **numerics)

    def fit(self, **kwargs: Any) -> None:
        """Stands where the training would be."""

    def weight_copies(self) -> int:
        """How often the callbacks keep the trained weights; they tell by an attribute `weight_copies`."""
        callbacks = self.config_init[self.subcommand].trainer.callbacks
        listed = callbacks if isinstance(callbacks, list) else [callbacks]
        return sum(getattr(callback, "weight_copies", 0) for callback in listed)

    def step(self, world_size: int) -> SimulatedStep:
        """The training step, on GPUs unless the configuration says CPU."""
        on_gpu = self.config[self.subcommand].trainer.accelerator != "cpu"
        foreach = on_gpu and world_size == 1  # as torch decides: sharded parameters are handled one by one
        return SimulatedStep(self.model, self.trainer, self.fake_mode, self.datamodule.length, world_size, foreach)


def plan(
    config: Sequence[str],
    overrides: Sequence[str],
    gpu_memory: float,
    world_size: int,
    batch_size: int | None,
    json: bool,
) -> None:
    """Prints what the training run of a configuration needs, and whether it fits.

    Args:
        config: YAML files of `crocodil fit`.
        overrides: further options of `crocodil fit`.
        gpu_memory: memory of one GPU in GiB.
        world_size: number of GPUs.
        batch_size: texts in a batch of one GPU; None takes the configuration's.
        json: print one JSON object instead of a table.

    Raises:
        ValueError: if the options or the files they name are wrong, or the step cannot be simulated.
    """
    require_at_least("world_size", world_size, 1)
    if gpu_memory <= 0:
        raise ValueError(f"gpu_memory must be above 0 GiB, got {gpu_memory}.")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # which devices there are here does not matter
    for message in IRRELEVANT:
        warnings.filterwarnings("ignore", message=message)
    cli = run_trainer(["fit", *(f"--config={path}" for path in config), *overrides], PlanCLI)
    assert isinstance(cli, PlanCLI)
    batch_size = cli.datamodule.batch_size if batch_size is None else batch_size
    require_at_least("batch_size", batch_size, 1)
    try:
        found = plan_run(cli.step(world_size), batch_size, round(gpu_memory * GIB), cli.weight_copies())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"a step of {type(cli.model).__name__} cannot be simulated: {reason}") from error
    if json:
        print(json_format.dumps(found.to_dict()))
    else:
        show(found, f"{type(cli.model).__name__} in {cli.trainer.precision}")


def show(plan: Plan, title: str) -> None:
    """Prints a plan as a table and its verdict as a sentence."""
    console = Console(highlight=False)
    gpus = "1 GPU" if plan.world_size == 1 else f"each of {plan.world_size} GPUs"
    console.print(f"{title}: {plan.batch_size} texts of {plan.length} tokens on {gpus}", style="bold")
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, count in plan.parameters.items():
        table.add_row(f"parameters of the {name}", _short(count.total))
        table.add_row("  trainable", _short(count.trainable))
    table.add_section()
    table.add_row("a training step, for each token", f"{_short(sum(plan.flops_per_token.values()))}FLOP")
    for work, flops in plan.flops_per_token.items():
        if flops:
            table.add_row(f"  {work}", f"{_short(flops)}FLOP")
    table.add_section()
    table.add_row(f"memory at the peak (in the {plan.peak_phase} phase)", _size(plan.needed))
    for part, name in PARTS.items():
        if plan.memory[part]:
            table.add_row(f"  {name}", _size(plan.memory[part]))
    console.print(table)
    console.print(verdict(plan))
    console.print(
        f"* assumed: {CUDA_CONTEXT / GIB:g} GiB and {FRAGMENTATION:.0%} of the rest, which is counted in the real "
        "training step, run without weights or data. Not counted: validation, and what torch.compile saves.",
        style="dim",
    )


def verdict(plan: Plan) -> str:
    """Whether it fits, what is left, and the batch to take."""
    card = f"{plan.gpu_memory / GIB:g} GiB"
    if plan.fits:
        return (
            f"Fits on {card} with {_size(plan.headroom)} to spare; "
            f"the largest batch that fits has about {plan.largest_batch_size} texts on each GPU."
        )
    excess = f"Does not fit on {card}: {_size(-plan.headroom)} too much."
    if plan.largest_batch_size:
        return f"{excess} The largest batch that fits has about {plan.largest_batch_size} texts on each GPU."
    return (
        f"{excess} No batch fits: share the weights among more GPUs (--world_size), train adapters (lora), turn on "
        "gradient_checkpointing, or shorten the texts."
    )


def _short(number: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {letter}"
    return f"{number:.0f}"


def _size(num_bytes: float) -> str:
    unit, name = (GIB, "GiB") if num_bytes >= GIB / 10 else (2**20, "MiB")
    return f"{num_bytes / unit:.2f} {name}"
