import math
from pathlib import Path

import pytest
import torch

from crocodil.data.codec import TextCodec
from crocodil.evaluation.judge import Judge
from crocodil.evaluation.perplexity import GenerativePerplexity


@torch.no_grad()
def by_hand(judge: Judge, rows: list[list[int]]) -> float:
    """exp of all nats over all tokens, texts one by one and unpadded, in float64; the first token is given."""
    nats, count = 0.0, 0
    for row in rows:
        log_probs = judge.network(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
        nats -= sum(log_probs[j - 1, row[j]].item() for j in range(1, len(row)))
        count += len(row) - 1
    return math.exp(nats / count)


def through_end(row: list[int]) -> list[int]:
    return row[: row.index(0) + 1] if 0 in row else row


@pytest.mark.parametrize("batch_size", [1, 2, 4, 9])
def test_perplexity_by_direct_summation(
    batch_size: int, own_judge: Judge, token_ids: torch.Tensor, texts: list[str]
) -> None:
    metric = GenerativePerplexity(own_judge)
    for start in range(0, 9, batch_size):
        metric.update(texts[start : start + batch_size], token_ids[start : start + batch_size])
    expected = by_hand(own_judge, [through_end(row) for row in token_ids.tolist()])
    assert metric.compute()["perplexity"].item() == pytest.approx(expected, rel=1e-6)
    assert metric.compute()["judge_nll"].item() == pytest.approx(math.log(expected), rel=1e-6)


def test_of_texts_under_a_published_judge(judge_folder: Path, token_ids: torch.Tensor, texts: list[str]) -> None:
    judge = Judge.from_pretrained(judge_folder)
    metric = GenerativePerplexity(judge)
    metric.update(texts[:4])
    rows = [[256, *judge.codec.encode(text)] for text in texts[:4]]
    assert metric.compute()["perplexity"].item() == pytest.approx(by_hand(judge, rows), rel=1e-6)


def test_the_traps_each_change_the_number(
    own_judge: Judge, judge_folder: Path, token_ids: torch.Tensor, texts: list[str], codec: TextCodec
) -> None:
    """What is often done wrong is not what is done here: the right figure is pinned, and each wrong one differs."""

    def perplexity(judge: Judge, chosen: slice = slice(None), **options: object) -> float:
        metric = GenerativePerplexity(judge)
        metric.update(texts[chosen], **options)  # type: ignore[arg-type]
        return metric.compute()["perplexity"].item()

    without_end = Judge(own_judge.network, codec, codec)
    right = by_hand(without_end, [through_end(row)[: -1 if 0 in row else None] for row in token_ids.tolist()])
    assert perplexity(without_end, token_ids=token_ids) == pytest.approx(right, rel=1e-6)
    with_end = perplexity(own_judge, token_ids=token_ids)
    dropped = perplexity(without_end, slice(8), token_ids=token_ids[:8])  # the last partial batch of four
    padded = by_hand(without_end, token_ids.tolist())
    wrong = {"end token counted": with_end, "last batch dropped": dropped, "padding counted": padded}
    assert all(abs(value / right - 1) > 0.01 for value in wrong.values()), (right, wrong)

    published = Judge.from_pretrained(judge_folder)
    prompts = [text[:10] for text in texts[:6]]
    continued = perplexity(published, slice(6), prompts=prompts)
    assert abs(perplexity(published, slice(6)) / continued - 1) > 0.01  # prompt counted


def test_nothing_counted_is_no_number(own_judge: Judge) -> None:
    metric = GenerativePerplexity(own_judge)
    metric.update([""], torch.tensor([[1]]))
    assert math.isnan(metric.compute()["perplexity"])
