"""The processes of a run, which may be one: their number, and means over all of them."""

import torch
from torch import Tensor, distributed


def rank_and_size() -> tuple[int, int]:
    """The index of this process and the number of all, (0, 1) without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@torch.no_grad()
def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of `value` over all processes, which must all call this; integers become float32.

    Args:
        value: of any shape, the same everywhere; no gradient flows through.
    """
    _, size = rank_and_size()
    mean = value.detach() if value.is_floating_point() else value.float()
    if size > 1:
        mean = mean / size
        distributed.all_reduce(mean)
    return mean


def as_part_of_all(mean: Tensor, count: Tensor) -> Tensor:
    """Weighs a mean over `count` items of this process so that, averaged over processes, it is the mean of all items.

    Args:
        mean: scalar; the gradient flows through it.
        count: scalar; above 0 on some process.
    """
    if rank_and_size()[1] == 1:
        return mean
    count = count.to(mean.device, mean.dtype, non_blocking=True)
    return mean * (count / mean_over_ranks(count))


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks: (N_rank, ...) -> (N, ...).

    Args:
        rows: may differ in number, not in the other sizes.
    """
    if rank_and_size()[1] == 1:
        return rows
    from torchmetrics.utilities.distributed import gather_all_tensors  # a slow import

    return torch.cat(gather_all_tensors(rows))


def mean_over_items(means: dict[str, float], num_items: int, device: torch.device) -> dict[str, float]:
    """Means over the items of this process, as means over those of all processes.

    Args:
        means: the same names everywhere.
        num_items: items of this process.
        device: of the process group's backend.
    """
    if rank_and_size()[1] == 1:
        return means
    sums = torch.tensor([*(value * num_items for value in means.values()), num_items], dtype=torch.float64)
    sums = sums.to(device)
    distributed.all_reduce(sums)
    return dict(zip(means, (sums[:-1] / sums[-1]).tolist(), strict=True))
