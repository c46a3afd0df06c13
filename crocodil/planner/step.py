"""The training step of a stage on fake tensors: its real code runs, but no weight is allocated and nothing computed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from crocodil.modules import CrocodilModule
from crocodil.planner.meter import Part, Phase, StepMeter, Work


class WeightlessMode(FakeTensorMode):
    """Builds networks from fake tensors: of the right shape and dtype, without content.

    Networks may be cast and moved while they are built. torch swaps fake tensors for that, and refuses to swap one
    that somebody holds weakly, as the memo of the mode does.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True, allow_fallback_kernels=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs or {})
        self.fake_tensor_converter.tensor_memo.clear()
        return out


@dataclass(frozen=True)
class StepCost:
    """What a step took.

    Attributes:
        peaks: bytes by part at the highest point of each phase.
        flops: floating-point operations for each token of text; those of the optimizer are spread over all tokens of
            the batches it follows.
    """

    peaks: dict[Phase, dict[Part, float]]
    flops: dict[Work, float]

    @property
    def peak_phase(self) -> Phase:
        """The phase with the highest point of all."""
        return max(self.peaks, key=lambda phase: sum(self.peaks[phase].values()))


class SimulatedStep:
    """Runs the training step of a module whose weights are fake tensors, as often as asked, and measures it.

    The mode of the fake tensors is not entered for a step: what touches a weight is fake, and the corruption noise,
    which does not, is real, so that sizes that depend on it are those of a real step. Attention masks, which may be
    large, become fake where they enter a transformer.

    Args:
        module: a stage, built inside `fake_mode`.
        trainer: one that is never run; it gives the precision and the number of batches whose gradients are summed.
        fake_mode: the mode of the weights.
        length: L, tokens in a text.
        world_size: GPUs among which FSDP2 divides weights, gradients and optimizer state.
        foreach: let the optimizer handle all parameters at once, as it prefers on a GPU, instead of one by one.
    """

    def __init__(
        self,
        module: CrocodilModule,
        trainer: Trainer,
        fake_mode: WeightlessMode,
        length: int,
        world_size: int = 1,
        foreach: bool = True,
    ) -> None:
        self.module, self.trainer, self.length, self.world_size = module, trainer, length, world_size
        module.trainer = trainer
        with fake_mode:
            module.configure_model()
        trainer.precision_plugin.convert_module(module).train()
        module.compile_networks = False  # the operators of the networks themselves are what is counted
        module.on_fit_start()
        module.on_train_epoch_start()
        for network in module.modules():
            if isinstance(network, PreTrainedModel):
                network.register_forward_pre_hook(_fake_inputs(fake_mode), with_kwargs=True)
        self.meter = StepMeter(_parts_by_shape(module), _shares(world_size, trainer.precision))
        for weight in [*module.parameters(), *module.buffers()]:
            self.meter.assign(weight, "weights")
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.meter.assign(p.grad, "gradients"))
        self.optimizer = _optimizer(module, foreach)
        self._differentiate(1, 0)
        self._update()
        for state in tree_leaves(dict(self.optimizer.state)):
            if isinstance(state, Tensor):
                self.meter.assign(state, "optimizer_state")
        self.meter.restart()
        self._update()  # only now is it a step as any other
        self._of_update = StepCost(self.meter.peaks, dict(self.meter.flops))

    def run(self, batch_size: int) -> StepCost:
        """One optimizer step with batches of `batch_size` texts.

        As Lightning does it, the gradients of the step before live until the first backward pass.
        """
        summed = self.trainer.accumulate_grad_batches
        simulated = min(2, summed)  # the second batch is as all that follow it
        self.meter.restart()
        for batch_idx in range(simulated):
            self._differentiate(batch_size, batch_idx)
        tokens = batch_size * self.length
        flops: dict[Work, float] = dict.fromkeys(get_args(Work), 0.0)
        flops |= {work: count / simulated / tokens for work, count in self.meter.flops.items()}
        flops |= {work: count / summed / tokens for work, count in self._of_update.flops.items()}
        return StepCost(self.meter.peaks | self._of_update.peaks, flops)

    def _differentiate(self, batch_size: int, batch_idx: int) -> None:
        with self.meter:
            self.meter.phase = "forward"
            batch = {"token_ids": torch.zeros((batch_size, self.length), dtype=torch.int64)}
            with self.trainer.precision_plugin.train_step_context():
                outputs = self.module.training_step(batch, batch_idx)
            if batch_idx == 0:
                self.optimizer.zero_grad()
            assert isinstance(outputs, Mapping)
            self.meter.phase = "backward"
            outputs["loss"].backward()

    def _update(self) -> None:
        with self.meter:
            self.meter.phase = "optimizer"
            self.optimizer.step()


def _shares(world_size: int, precision: str) -> dict[Part, float]:
    """What one GPU holds of what FSDP2 divides. It gathers weights in bfloat16 already, where autocast would cast."""
    gathers_cast = world_size > 1 and precision == "bf16-mixed"
    sharded: tuple[Part, ...] = ("weights", "gradients", "optimizer_state")
    return {**dict.fromkeys(sharded, 1 / world_size), "cast_weights": 0.0 if gathers_cast else 1.0}


def _fake_inputs(fake_mode: WeightlessMode) -> Callable[..., Any]:
    def fake(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else fake_mode.from_tensor(tensor)

    return lambda _, args, kwargs: tree_map_only(Tensor, fake, (args, kwargs))


def _parts_by_shape(module: nn.Module) -> Callable[[Tensor], Part]:
    """What has an axis of the vocabulary and is not shaped as a weight is logits, or what a loss makes of them."""
    heads = [m.get_output_embeddings() for m in module.modules() if isinstance(m, PreTrainedModel)]
    vocabularies = {head.out_features for head in heads if head is not None}
    weights = {tuple(sorted(weight.shape)) for weight in module.parameters()}

    def part_of(tensor: Tensor) -> Part:
        is_logits = not vocabularies.isdisjoint(tensor.shape) and tuple(sorted(tensor.shape)) not in weights
        return "logits" if is_logits else "activations"

    return part_of


def _optimizer(module: CrocodilModule, foreach: bool) -> Optimizer:
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    for group in optimizer.param_groups:
        if foreach and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer
