import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crocodil.models import Demasker, LatentPrior
from crocodil.modules.optimizers import InSinglePrecision, MuonAdamW, WarmupCosine, parameter_groups

MUON = {"momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}


class Stage(nn.Module):
    """Networks under the names that a stage gives them."""

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)


@pytest.fixture
def make_stage(
    make_demasker: Callable[..., Demasker], make_encoder: Callable[..., nn.Module], make_prior: Callable[..., Any]
) -> Callable[[], Stage]:
    return lambda: Stage(demasker=make_demasker(), encoder=make_encoder(), prior=make_prior()).float()


def matrices(stage: Stage) -> Iterator[Tensor]:
    """The weights of the linear layers inside blocks, found by walking the networks instead of by their names."""
    demasker, encoder, prior = stage.get_submodule("demasker"), stage.get_submodule("encoder"), stage.prior
    assert isinstance(demasker, Demasker) and isinstance(prior, LatentPrior)
    for block in (*demasker.network.model.layers, *encoder.network.layers, *prior.blocks):
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear) and name != "modulation":
                yield layer.weight


def ids(parameters: Any) -> list[int]:
    return sorted(map(id, parameters))


def test_every_trainable_parameter_is_in_exactly_one_group(make_stage: Callable[[], Stage]) -> None:
    stage = make_stage()
    stage.get_submodule("encoder").requires_grad_(False)
    grouped = [p for group in parameter_groups(stage) for p in group["params"]]
    assert ids(grouped) == ids(p for p in stage.parameters() if p.requires_grad)


def test_the_matrices_of_blocks_decay_and_nothing_else(make_stage: Callable[[], Stage]) -> None:
    stage = make_stage()
    first, rest = parameter_groups(stage)
    assert ids(first["params"]) == ids(matrices(stage))
    assert len(first["params"]) == 2 * 7 + 2 * 7 + 2 * 4
    assert first["matrices"] and not rest["matrices"]
    optimizer = MuonAdamW([first, rest], weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(stage: Stage, steps: range, *optimizers: torch.optim.Optimizer) -> None:
    for step in steps:
        gradients(list(stage.parameters()), step)
        for optimizer in optimizers:
            optimizer.step()


def test_equals_muon_and_adamw_run_apart(make_stage: Callable[[], Stage]) -> None:
    joint, apart = make_stage(), make_stage()
    together = MuonAdamW(parameter_groups(joint), lr=0.01, weight_decay=0.1, momentum=0.9, betas=(0.8, 0.9))
    train(joint, range(5), together)
    first, rest = (group["params"] for group in parameter_groups(apart))
    muon = torch.optim.Muon(first, lr=0.01, weight_decay=0.1, **MUON)
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.8, 0.9), weight_decay=0.0)
    with InSinglePrecision():
        train(apart, range(5), muon, adamw)
    for one, other in zip(joint.parameters(), apart.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_matrices_are_made_orthogonal_in_single_precision(shape: tuple[int, int]) -> None:
    """Against five steps of the quintic iteration in double precision; bfloat16 would differ in the third digit."""
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = weight.grad.double()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    MuonAdamW([{"params": [weight], "matrices": True}], lr=1.0, weight_decay=0.0).step()
    assert torch.allclose(weight.double(), -0.2 * math.sqrt(20) * x, rtol=1e-4, atol=1e-5)


def test_goes_on_bitwise_from_a_saved_state(make_stage: Callable[[], Stage]) -> None:
    whole, before = make_stage(), make_stage()
    train(whole, range(6), MuonAdamW(parameter_groups(whole)))
    optimizer = MuonAdamW(parameter_groups(before))
    train(before, range(3), optimizer)
    file = io.BytesIO()
    torch.save({"weights": before.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    after = make_stage()
    after.load_state_dict(saved["weights"])
    optimizer = MuonAdamW(parameter_groups(after), lr=123.0)
    optimizer.load_state_dict(saved["optimizer"])
    train(after, range(3, 6), optimizer)
    for one, other in zip(whole.parameters(), after.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["matrices", "rest"])
def test_works_with_one_kind_of_parameter(kind: str, make_stage: Callable[[], Stage]) -> None:
    stage = make_stage()
    inside = set(ids(matrices(stage)))
    for parameter in stage.parameters():
        parameter.requires_grad_((id(parameter) in inside) == (kind == "matrices"))
    groups = parameter_groups(stage)
    assert [group["matrices"] for group in groups] == [kind == "matrices"]
    before = [parameter.clone() for parameter in stage.parameters()]
    optimizer = MuonAdamW(groups)
    train(stage, range(2), optimizer)
    for old, new in zip(before, stage.parameters(), strict=True):
        assert torch.equal(old, new) != new.requires_grad


def test_a_schedule_reaches_both_parts(make_stage: Callable[[], Stage]) -> None:
    stage = make_stage()
    optimizer = MuonAdamW(parameter_groups(stage))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [parameter.clone() for parameter in stage.parameters()]
    train(stage, range(2), optimizer)
    assert all(torch.equal(old, new) for old, new in zip(before, stage.parameters(), strict=True))


def test_a_closure_is_run_with_gradients_and_its_loss_returned() -> None:
    weight = nn.Parameter(torch.tensor([3.0]))
    optimizer = MuonAdamW([{"params": [weight], "matrices": False}], lr=0.1, weight_decay=0.0)

    def closure() -> Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 9.0
    assert weight.item() == pytest.approx(2.9)  # the first step of Adam is the learning rate


def test_warmup_cosine_by_hand() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, num_steps=10, warmup_steps=4, final_ratio=0.1)
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        schedule.step()
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[5] == pytest.approx(0.1 + 0.45 * (1 + 0.75**0.5))  # cos(pi / 6)
    assert rates[7] == pytest.approx(0.55)
    assert rates[8] == pytest.approx(0.1 + 0.45 * 0.5)  # cos(2 pi / 3) = -1/2
    assert rates[10:] == pytest.approx([0.1] * 3)


def test_without_warmup_the_peak_comes_first() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    WarmupCosine(optimizer, num_steps=10)
    assert optimizer.param_groups[0]["lr"] == 1.0
