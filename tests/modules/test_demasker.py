from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from crocodil import modules
from crocodil.data import Vocabulary
from crocodil.diffusion.masking import CosineMasking
from crocodil.diffusion.noise import STREAM_MASK, STREAM_TIME
from crocodil.modules.demasker import draw_masks

MASK = 2


def held_out(tiny_system: Any) -> dict[str, torch.Tensor]:
    return next(iter(tiny_system.data().val_dataloader()))


def test_rows_are_masked_at_evenly_spread_times(tiny_system: Any) -> None:
    """Row i of B has the time (u + i / B) mod 1; its tokens are masked where their numbers are below 1 - alpha."""
    module, batch = tiny_system.module("demasker"), held_out(tiny_system)
    noise = module.held_out_noise(batch, 3)
    noisy_ids, is_masked, point = draw_masks(batch["token_ids"], noise, module.masking, MASK)
    u, uniform = noise.uniform(STREAM_TIME, 0, 1)[0, 0].item(), noise.uniform(STREAM_MASK, 0, 32)
    for i in range(8):
        mask_prob = 0.999 * ((u + i / 8) % 1) + 0.001
        assert point.mask_prob[i].item() == pytest.approx(mask_prob, abs=1e-6)
        assert torch.equal(is_masked[i], uniform[i] < point.mask_prob[i])
    assert torch.equal(noisy_ids, torch.where(is_masked, MASK, batch["token_ids"]))
    assert 60 < is_masked.sum() < 200


def test_held_out_figures_by_direct_summation(tiny_system: Any, fit: Callable[..., list[float]]) -> None:
    module, batch = tiny_system.module("demasker"), held_out(tiny_system)
    fit(module, tiny_system.data(), max_steps=10)  # until it gets some tokens right
    module.requires_grad_(False).eval()
    figures = module.evaluate(batch, module.held_out_noise(batch, 0))
    noisy_ids, is_masked, point = draw_masks(batch["token_ids"], module.held_out_noise(batch, 0), module.masking, MASK)
    log_probs = module.demasker(noisy_ids).double().log_softmax(-1)
    elbo, nats, hits = 0.0, [], 0
    for i, j in is_masked.nonzero().tolist():
        token = batch["token_ids"][i, j]
        nats.append(-log_probs[i, j, token].item())
        elbo += nats[-1] * 0.999 / point.mask_prob[i].item() / (8 * 32)
        hits += int(log_probs[i, j].argmax() == token)
    assert figures["loss"].item() == pytest.approx(elbo, rel=1e-5)
    assert figures["masked_loss"].item() == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert figures["accuracy"].item() == pytest.approx(hits / len(nats))
    assert hits > 3


@pytest.mark.parametrize("loss_weight", ["elbo", "none"])
def test_training_minimises_the_loss_that_was_asked_for(
    loss_weight: str, tiny_system: Any, fit: Callable[..., list[float]]
) -> None:
    seen: list[tuple[float, float]] = []
    module = tiny_system.module("demasker", loss_weight=loss_weight, masking=CosineMasking())

    def by_hand(decoder: Any, args: tuple[Any, ...], out: Any) -> None:
        batch = {"token_ids": tokens}
        logits = stage.demasker.network.lm_head(out.last_hidden_state)
        _, is_masked, point = draw_masks(tokens, stage.training_noise(batch), CosineMasking(), MASK)
        nats = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none") * is_masked
        elbo = (nats.sum(1) * -point.d_alpha_t / point.mask_prob).mean() / 32
        seen.append((elbo.item(), (nats.sum() / is_masked.sum()).item()))

    stage, data = module, tiny_system.data()
    data.setup("fit")
    tokens = next(iter(data.train_dataloader()))["token_ids"]
    module.demasker.decoder.register_forward_hook(by_hand)
    losses = fit(module, data, max_steps=1)
    assert losses == pytest.approx([seen[0][loss_weight == "none"]], rel=1e-5)
    assert abs(seen[0][0] - seen[0][1]) > 0.01


def test_goes_on_from_a_checkpoint(tiny_system: Any) -> None:
    path = tiny_system.checkpoint("demasker")
    module = tiny_system.module("demasker", network=None, demasker_checkpoint=str(path))
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("settings", [{"network": None}, {"demasker_checkpoint": "some.ckpt"}])
def test_takes_either_a_network_or_a_checkpoint(settings: dict[str, Any], tiny_system: Any) -> None:
    with pytest.raises(ValueError, match="exactly one of"):
        tiny_system.module("demasker", **settings)


@pytest.mark.parametrize(
    "vocabulary", [Vocabulary(300, 0, 1, 0, 2), Vocabulary(152, 3, 1, 3, 2), Vocabulary(152, 0, 1, 0, 4)]
)
@pytest.mark.parametrize(
    ("stage", "previous"), [("Demasker", "demasker"), ("Autoencoder", "demasker"), ("Prior", "autoencoder")]
)
def test_other_tokens_than_the_checkpoint_has_are_refused(
    stage: str, previous: str, vocabulary: Vocabulary, tiny_system: Any
) -> None:
    with pytest.raises(ValueError, match=r"\(152, 2, 0\) and "):
        getattr(modules, f"{stage}Module")(
            vocabulary, **{f"{previous}_checkpoint": str(tiny_system.checkpoint(previous))}
        )


@torch.no_grad()
def test_predict_writes_the_masked_tokens_again(tiny_system: Any) -> None:
    module, batch = tiny_system.module("demasker").eval(), held_out(tiny_system)
    out = module.predict_step(batch, 0)
    masked = module.held_out_noise(batch, 0).uniform(STREAM_MASK, 0, 32) < 0.5
    source = batch["token_ids"]
    assert torch.equal(out["token_ids"][~masked], source[~masked])
    assert (out["token_ids"] != source).any() and not (out["token_ids"] == MASK).any()
    assert torch.equal(out["source_token_ids"], source)
    for i in range(8):
        hits = (out["token_ids"][i] == source[i])[masked[i]].tolist()
        assert out["token_accuracy"][i].item() == pytest.approx(sum(hits) / len(hits))
