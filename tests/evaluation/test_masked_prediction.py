import math
from collections.abc import Callable

import pytest
import torch

from crocodil.diffusion.documents import NumberedDocuments
from crocodil.diffusion.noise import STREAM_MASK, RowNoise
from crocodil.evaluation.masked_prediction import MaskedPrediction
from crocodil.models import Demasker, RegisterEncoder


def test_cross_entropy_and_top1_by_hand(
    make_demasker: Callable[..., Demasker], make_encoder: Callable[..., RegisterEncoder]
) -> None:
    """Token by token from the logits."""
    demasker, encoder = make_demasker(), make_encoder()
    token_ids = torch.randint(1, 11, (6, 20), generator=torch.Generator().manual_seed(0))
    noise = RowNoise(torch.arange(6))
    uniform = noise.uniform(STREAM_MASK, 2, 20)
    found = {}
    for latents in (encoder(token_ids).detach(), None):
        metric = MaskedPrediction((0.3, 1.0))
        metric.update(demasker, token_ids, latents, noise)
        figures = metric.compute()
        for k, ratio in enumerate(metric.ratios):
            masked = [(i, j) for i in range(6) for j in range(20) if uniform[i, j] < ratio]
            noisy_ids = token_ids.clone()
            for i, j in masked:
                noisy_ids[i, j] = demasker.mask_token_id
            log_probs = demasker(noisy_ids, latents).log_softmax(-1)
            nats = torch.tensor([-log_probs[i, j, token_ids[i, j]].item() for i, j in masked])
            hits = [int(log_probs[i, j].argmax() == token_ids[i, j]) for i, j in masked]
            assert figures["cross_entropy"][k].item() == pytest.approx(nats.mean().item(), rel=1e-5)
            assert figures["top1"][k].item() == pytest.approx(sum(hits) / len(hits))
            error = nats.std(unbiased=False).item() / math.sqrt(len(masked))
            assert figures["standard_error"][k].item() == pytest.approx(error, rel=1e-4)
            assert figures["num_tokens"][k] == len(masked)
        found[latents is None] = figures["cross_entropy"][0]
    assert abs(found[False] - found[True]) > 1e-3


def test_batches_do_not_matter_and_the_masks_are_the_same_for_all(make_demasker: Callable[..., Demasker]) -> None:
    demasker = make_demasker()
    token_ids = torch.randint(0, 11, (6, 9), generator=torch.Generator().manual_seed(0))
    whole, parts, other = MaskedPrediction(), MaskedPrediction(), MaskedPrediction()
    whole.update(demasker, token_ids, None, RowNoise(torch.arange(6)))
    for places in torch.arange(6).split(4):
        parts.update(demasker, token_ids[places], None, RowNoise(places))
    other.update(make_demasker(seed=3), token_ids, None, RowNoise(torch.arange(6)))
    for name, values in whole.compute().items():
        torch.testing.assert_close(parts.compute()[name], values)
    assert torch.equal(other.compute()["num_tokens"], whole.compute()["num_tokens"])
    assert (whole.compute()["num_tokens"].diff() > 0).all()  # more are masked at a larger ratio


def test_packed_documents_count_as_if_alone_and_padding_not_at_all(
    make_demasker: Callable[..., Demasker], make_encoder: Callable[..., RegisterEncoder]
) -> None:
    demasker, encoder = make_demasker(), make_encoder()
    ids = torch.tensor([[1] * 5 + [2] * 3 + [0] * 4, [1] * 12])
    token_ids = torch.randint(1, 11, ids.shape, generator=torch.Generator().manual_seed(0))
    documents, noise = NumberedDocuments(ids), RowNoise(torch.arange(2))
    latents = documents.from_rows(encoder(token_ids, **documents.attention)).detach()
    packed, ones = MaskedPrediction(), MaskedPrediction((1.0,))
    packed.update(demasker, token_ids, latents, noise, documents)
    for row, place, z in zip((0, 0, 1), (ids[0] == 1, ids[0] == 2, ids[1] == 1), latents, strict=True):
        ones.update(demasker, token_ids[row][place][None], z[None], RowNoise(torch.arange(1)))
    last = {name: values[-1] for name, values in packed.compute().items()}
    for name, values in ones.compute().items():  # all is masked, whatever the noise
        torch.testing.assert_close(last[name], values)
    uniform = noise.uniform(STREAM_MASK, 2, 12)
    for ratio, count in zip(packed.ratios, packed.compute()["num_tokens"], strict=True):
        assert count == ((uniform < ratio) & (ids > 0)).sum()
