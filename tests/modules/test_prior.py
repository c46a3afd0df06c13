import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crocodil.diffusion.gaussian import TangentSchedule
from crocodil.diffusion.noise import STREAM_CHOICE, STREAM_LATENT_NOISE, STREAM_MASK, STREAM_TIME
from crocodil.modules.checkpoints import StageCheckpoint
from crocodil.samplers import MaskedSampler

MASK = 2
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")


def watch(network: nn.Module) -> list[dict[str, Any]]:
    """Keyword arguments of each later call, the noisy latents among them as `z`."""
    seen: list[dict[str, Any]] = []
    network.register_forward_pre_hook(lambda _, args, kwargs: seen.append({"z": args[0], **kwargs}), with_kwargs=True)
    return seen


def test_the_checkpoint_holds_the_prior_alone(tiny_system: Any) -> None:
    content = torch.load(tiny_system.checkpoint("prior"), weights_only=True)
    names = {f"prior.{name}" for name in tiny_system.module("prior").prior.state_dict()}
    assert set(content["state_dict"]) == names
    assert set(content["ema"]["raw"]) == names
    encoder = StageCheckpoint(tiny_system.checkpoint("autoencoder"), "autoencoder").encoder()
    assert content["crocodil"]["networks"]["autoencoder"] == encoder.fingerprint()


def test_what_is_not_saved_is_not_missed_and_all_else_is(tiny_system: Any) -> None:
    module = tiny_system.module("prior")
    saved = torch.load(tiny_system.checkpoint("prior"), weights_only=True)["state_dict"]
    assert set(module.state_dict()) == set(saved)
    module.load_state_dict(saved)
    assert torch.equal(module.prior.out_proj.weight, saved.pop("prior.out_proj.weight"))
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "prior.out_proj.weight"\.'):
        module.load_state_dict(saved)


def test_training_moves_the_prior_and_leaves_the_autoencoder(tiny_system: Any, fit: Callable[..., list[float]]) -> None:
    module = tiny_system.module("prior")
    parts = nn.ModuleDict(dict(module.named_children()))
    before = {name: value.clone() for name, value in parts.state_dict().items()}
    fit(module, tiny_system.data(), max_steps=4)
    saved = torch.load(tiny_system.checkpoint("autoencoder"), weights_only=True)["state_dict"]
    for name, value in parts.state_dict().items():
        if name.startswith("prior."):
            assert not torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, before[name]) and torch.equal(value, saved[name]), name
    assert module.prior.training and not module.encoder.training and not module.demasker.training


def test_latents_are_those_of_the_encoder(
    tiny_system: Any, fit: Callable[..., list[float]], count_calls: Callable[..., list[tuple[Any, ...]]]
) -> None:
    """A fresh prior says 0, so its loss is the mean square of the latents of the batch."""
    module = tiny_system.module("prior", condition_share=0.0)
    texts = count_calls(module.encoder)
    losses = fit(module, tiny_system.data(), max_steps=1)
    with torch.no_grad():
        latents = module.encoder(texts[0][0])
    assert losses == pytest.approx([latents.square().mean().item()])
    other = tiny_system.module("prior", condition_share=0.0)
    nn.init.normal_(other.encoder.out_proj.weight, generator=torch.Generator().manual_seed(0))
    assert abs(fit(other, tiny_system.data(), max_steps=1)[0] - losses[0]) > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.5, 1.0])
def test_conditions_are_given_to_the_stated_share_of_rows(
    share: float, tiny_system: Any, fit: Callable[..., list[float]]
) -> None:
    module = tiny_system.module("prior", condition_share=share, self_conditioning=0.0)
    texts: list[Tensor] = []
    module.encoder.register_forward_hook(lambda _, args, __: texts.append(args[0]))
    seen = watch(module.prior)
    fit(module, tiny_system.data(10), max_steps=1)
    given = seen[0]
    if share == 0:
        assert given["condition"] is None and given["condition_mask"] is None and len(texts) == 1
        return
    has, (whole, masked) = given["condition_mask"], texts
    assert torch.equal(has, torch.arange(10) < has.sum())
    assert has.sum() in (math.floor(10 * share), math.ceil(10 * share)) and len(masked) == math.ceil(10 * share)
    with torch.no_grad():
        torch.testing.assert_close(given["condition"][has], module.encoder(masked)[: has.sum()], rtol=0, atol=0)
    clean = whole[: len(masked)]
    assert torch.equal(masked[masked != MASK], clean[masked != MASK]) and (masked == MASK).any()


@pytest.mark.parametrize("batch_size", [1, 10])
def test_a_share_that_is_no_whole_number_of_rows_is_met_on_average(
    batch_size: int, tiny_system: Any, fit: Callable[..., list[float]]
) -> None:
    module = tiny_system.module("prior", condition_share=0.25, self_conditioning=0.0)
    seen = watch(module.prior)
    fit(module, tiny_system.data(batch_size), max_steps=60)
    counts = torch.tensor([given["condition_mask"].sum() for given in seen])
    assert len(counts.unique()) == 2
    assert counts.float().mean().item() == pytest.approx(0.25 * batch_size, abs=0.2)


def test_rows_with_and_without_a_condition_are_spread_over_all_times(
    tiny_system: Any, fit: Callable[..., list[float]]
) -> None:
    """The first half of the rows has conditions; in both halves, each quarter of the times holds one row."""
    module = tiny_system.module("prior", condition_share=0.5, self_conditioning=0.0)
    seen: list[Tensor] = []
    module.prior.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    fit(module, tiny_system.data(), max_steps=5)
    edges = TangentSchedule()(torch.tensor([0.75, 0.5, 0.25])).log_snr
    for log_snr in seen:
        quarters = torch.bucketize(log_snr, edges)
        assert sorted(quarters[:4].tolist()) == sorted(quarters[4:].tolist()) == [0, 1, 2, 3]


def test_conditions_are_texts_masked_at_every_ratio(tiny_system: Any, fit: Callable[..., list[float]]) -> None:
    module = tiny_system.module("prior", condition_share=1.0)
    texts: list[Tensor] = []
    module.encoder.register_forward_hook(lambda _, args, __: texts.append(args[0]))
    fit(module, tiny_system.data(200), max_steps=1)
    ratios = (texts[1] == MASK).float().mean(1).sort().values
    torch.testing.assert_close(ratios, torch.linspace(0, 1, 200), atol=0.12, rtol=0)


@pytest.mark.parametrize(("share", "calls"), [(0.0, [1, 1, 1, 1]), (1.0, [2, 2, 2, 2])])
def test_self_conditioning_costs_a_second_call_without_gradients(
    share: float, calls: list[int], tiny_system: Any, fit: Callable[..., list[float]]
) -> None:
    module = tiny_system.module("prior", self_conditioning=share)
    outputs: list[Tensor] = []
    module.prior.register_forward_hook(lambda _, __, output: outputs.append(output))
    seen = watch(module.prior)
    fit(module, tiny_system.data(), max_steps=4)
    assert len(seen) == sum(calls)
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert first.get("self_condition") is None
        assert (second["self_condition"] is not None) == (share == 1.0)
    if share == 1.0:
        assert all(torch.equal(outputs[i], seen[i + 1]["self_condition"]) for i in range(0, 8, 2))
        assert not any(output.requires_grad for output in outputs[::2])


def test_self_conditioning_is_drawn_for_each_step(tiny_system: Any, fit: Callable[..., list[float]]) -> None:
    module = tiny_system.module("prior", self_conditioning=0.5)
    seen = watch(module.prior)
    fit(module, tiny_system.data(), max_steps=40)
    assert 10 <= len(seen) - 40 <= 30


@pytest.mark.parametrize("prediction_type", ["x0", "eps", "v"])
@torch.no_grad()
def test_held_out_losses_by_hand(prediction_type: str, tiny_system: Any) -> None:
    module = tiny_system.module("prior", prediction_type=prediction_type, self_conditioning=0.0).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in module.prior.parameters():
        weight += 0.2 * torch.randn(weight.shape, generator=generator)
    batch = next(iter(tiny_system.data().val_dataloader()))
    token_ids, noise = batch["token_ids"], module.held_out_noise(batch, 0)
    clean = module.encoder(token_ids)
    times = (noise.uniform(STREAM_TIME, 0, 1)[0, 0] + torch.arange(8) / 8) % 1
    point = TangentSchedule()(times.float())
    alpha, sigma = point.alpha_t[:, None, None], point.sigma_t[:, None, None]
    fresh = noise.normal(STREAM_LATENT_NOISE, 0, (4, 8))
    target = {"x0": clean, "eps": fresh, "v": alpha * fresh - sigma * clean}[prediction_type]
    hidden = noise.uniform(STREAM_MASK, 0, 32) < noise.uniform(STREAM_CHOICE, 0, 1)
    condition = module.encoder(torch.where(hidden, MASK, token_ids))
    figures = module.evaluate(batch, noise)
    for name, given in (("loss", None), ("loss_conditional", condition)):
        output = module.prior(alpha * clean + sigma * fresh, point.log_snr, condition=given)
        assert figures[name].item() == pytest.approx((output - target).square().mean().item(), rel=1e-5)
    assert figures["loss"] != figures["loss_conditional"]


def test_the_process_tells_how_to_sample(tiny_system: Any) -> None:
    settings = {"prediction_type": "v", "noise_schedule": TangentSchedule(d=3.0)}
    module = tiny_system.module("prior", **settings, self_conditioning=0.0, condition_share=0.0)
    process = module.latent_process
    assert (process.prediction_type, process.noise_schedule.d) == ("v", 3.0)
    assert not process.self_conditioning and not process.conditional
    pipeline = module.pipeline(tiny_system.data().codec)
    assert pipeline.latent_process == process
    with pytest.raises(ValueError, match="condition_share above 0"):
        pipeline(algorithm="conwithindisc")


@torch.no_grad()
def test_predict_writes_new_texts(tiny_system: Any) -> None:
    module = tiny_system.module("prior", sampler=MaskedSampler(8, temperature=1.0)).eval()
    batch = next(iter(tiny_system.data().test_dataloader()))
    out = module.predict_step(batch, 0)
    assert out["token_ids"].shape == (8, 32) and not (out["token_ids"] == MASK).any()
    assert torch.equal(out["token_ids"], module.predict_step(batch, 0)["token_ids"])
    assert not torch.equal(out["token_ids"], module.predict_step(batch, 1)["token_ids"])
