"""Fully sharded data parallelism (FSDP2): weights, gradients and optimizer state divided among all processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from crocodil.modules.sharded_checkpoint import load_sharded, read_folder, save_sharded


def shard(network: nn.Module, mesh: DeviceMesh, precision: str) -> None:
    """Divides each block of a network, and what is left of it, among the processes, in place; once is enough.

    Args:
        network: may name methods beside `forward` that use its weights in an attribute `forward_methods`.
        mesh: one-dimensional.
        precision: of the Trainer. "bf16-mixed" gathers the weights in bfloat16; gradients are always summed in float32.
    """
    if isinstance(network, FSDPModule):
        return
    gathered = torch.bfloat16 if precision == "bf16-mixed" else None
    # Autocast chooses what is computed in bfloat16, so inputs are left alone: a noise level is worth its float32.
    policy = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    for part in (*blocks(network), network):
        # Gathered again for the backward pass, the root too: between two passes all weights are always in shards.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # What is still on the meta device gets room for its own shards alone; the weights come afterwards.
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else "cpu"
    network._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    for method in getattr(network, "forward_methods", ()):
        register_fsdp_forward_method(network, method)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost module lists: in all networks here, the blocks of the transformer."""
    for child in network.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks(child)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes of the run, on any number of nodes; the Trainer knows it as `strategy: fsdp2`.

    Checkpoints are folders (`sharded_checkpoint`), from which any number of processes can go on.

    Args:
        process_group_backend: "nccl", "gloo", ...; None takes what suits the devices.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        """Starts the process group; every process takes part in the sharding."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Refuses `predict` on several processes, which may have one batch more or less: the others would wait for it.

        Raises:
            ValueError: see above.
        """
        if trainer.predicting and self.world_size > 1:
            raise ValueError("predict runs on one process of sharded networks: give it --trainer.devices=1")
        super().setup(trainer)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a folder; see `save_sharded`."""
        tensors = {"state_dict": checkpoint.pop("state_dict")}
        tensors |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        save_sharded(Path(self.broadcast(filepath)), tensors, checkpoint)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Verifies a folder, loads weights and optimizer state into their places, and returns the rest.

        Raises:
            ValueError: if the folder is damaged, or no checkpoint; each process verifies its share of the files.
        """
        path, module = Path(self.broadcast(checkpoint_path)), self.lightning_module
        assert module is not None
        rest = read_folder(path, share=slice(self.global_rank, None, self.world_size))
        weights = {"state_dict": get_model_state_dict(module)}
        load_sharded(path, weights)
        module.load_state_dict(weights["state_dict"], strict=module.strict_loading)
        for i, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{i}": get_optimizer_state_dict(module, optimizer)}
            load_sharded(path, state)
            set_optimizer_state_dict(module, optimizer, state[f"optimizer_{i}"])
        return rest


StrategyRegistry.register("fsdp2", ShardedStrategy, description="FSDP2 over all processes, with sharded checkpoints")
