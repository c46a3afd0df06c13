from typing import Any

import pytest
import torch

EOS = 0


@torch.no_grad()
def test_the_loss_counts_tokens_through_the_first_end_token(tiny_system: Any) -> None:
    module = tiny_system.module("judge").eval()
    token_ids = next(iter(tiny_system.data().val_dataloader()))["token_ids"]
    log_probs = module.judge(input_ids=token_ids).logits.double().log_softmax(-1)
    nats = []
    for i, row in enumerate(token_ids.tolist()):
        for j in range(1, row.index(EOS) + 1):
            nats.append(-log_probs[i, j - 1, row[j]].item())
    assert 8 * 14 < len(nats) < 8 * 31
    loss = module.evaluate({"token_ids": token_ids}, None)["loss"].item()
    assert loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    changed = torch.where((token_ids == EOS).cumsum(1) > 1, 77, token_ids)
    assert (changed != token_ids).any()
    assert module.evaluate({"token_ids": changed}, None)["loss"].item() == loss


@torch.no_grad()
def test_the_judge_reads_from_left_to_right(tiny_system: Any) -> None:
    judge = tiny_system.module("judge").judge.eval()
    one = torch.arange(3, 35)[None]
    other = one.clone()
    other[0, 20:] = 5
    same = judge(input_ids=one).logits == judge(input_ids=other).logits
    assert same[0, :20].all() and not same[0, 20:].all(-1).any()


def test_training_lowers_the_loss(tiny_system: Any, fit: Any) -> None:
    losses = fit(tiny_system.module("judge"), tiny_system.data(64), max_steps=20)
    assert losses[-1] < losses[0] - 0.2


def test_a_judge_writes_nothing(tiny_system: Any) -> None:
    with pytest.raises(ValueError, match="sample from another stage"):
        tiny_system.module("judge").pipeline(tiny_system.data().codec)


def test_an_unknown_setting_of_the_network_is_refused(tiny_system: Any) -> None:
    with pytest.raises(ValueError, match="no setting hidden_sise; did you mean hidden_size"):
        tiny_system.module("judge", network={"model_type": "llama", "hidden_sise": 3})
