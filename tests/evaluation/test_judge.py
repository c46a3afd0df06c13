import pytest
import torch
from transformers import PreTrainedModel

from crocodil.evaluation.judge import build_judge, judge_texts, tokens_through_eos

SETTINGS = {
    "model_type": "llama",
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
EOS = 0


@pytest.fixture(scope="module")
def judge() -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_judge({**SETTINGS, "initializer_range": 0.5})
    return network.eval()


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    """Seven texts: ends early, in the middle, at the last place, twice, and never."""
    token_ids = torch.randint(1, 12, (7, 10), generator=torch.Generator().manual_seed(0))
    token_ids[0, 1], token_ids[1, 5], token_ids[2, 9] = EOS, EOS, EOS
    token_ids[3, 3] = token_ids[3, 7] = token_ids[4, 4] = token_ids[4, 5] = EOS
    return token_ids


def length_of(row: list[int]) -> int:
    return row.index(EOS) + 1 if EOS in row else len(row)


def test_tokens_through_the_first_end_token_count(texts: torch.Tensor) -> None:
    counted = tokens_through_eos(texts, EOS)
    assert counted.tolist() == [[j < length_of(row) for j in range(10)] for row in texts.tolist()]
    assert counted.sum(1).tolist() == [2, 6, 10, 4, 5, 10, 10]


@torch.no_grad()
def test_nats_and_features_text_by_text(judge: PreTrainedModel, texts: torch.Tensor) -> None:
    """Each text alone and cut at its end; sums in float64."""
    nll, features = judge_texts(judge, texts, EOS)
    total, count = 0.0, 0
    for i, row in enumerate(texts.tolist()):
        row = row[: length_of(row)]
        out = judge(input_ids=torch.tensor([row]), output_hidden_states=True)
        log_probs = out.logits[0].double().log_softmax(-1)
        total -= sum(log_probs[j - 1, row[j]].item() for j in range(1, len(row)))
        count += len(row) - 1
        torch.testing.assert_close(features[i], out.hidden_states[-1][0].mean(0), rtol=1e-4, atol=1e-5)
    assert nll == pytest.approx(total / count, rel=1e-6)
    assert features.shape == (7, 16) and features.dtype == torch.float32


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_batch_size_does_not_matter(batch_size: int, judge: PreTrainedModel, texts: torch.Tensor) -> None:
    nll, features = judge_texts(judge, texts, EOS)
    other_nll, other_features = judge_texts(judge, texts, EOS, batch_size)
    assert other_nll == pytest.approx(nll, rel=1e-6)
    torch.testing.assert_close(other_features, features, rtol=1e-4, atol=1e-5)


def test_what_follows_the_end_does_not_matter(judge: PreTrainedModel, texts: torch.Tensor) -> None:
    changed = torch.where(tokens_through_eos(texts, EOS), texts, 7)
    assert (changed != texts).any()
    nll, features = judge_texts(judge, texts, EOS)
    other_nll, other_features = judge_texts(judge, changed, EOS)
    assert other_nll == nll
    torch.testing.assert_close(other_features, features, rtol=0, atol=0)


def test_settings_that_fit_no_network_are_refused() -> None:
    with pytest.raises(ValueError, match="no setting hidden_sise; did you mean hidden_size"):
        build_judge({**SETTINGS, "hidden_sise": 3})
    with pytest.raises(ValueError, match="needs `model_type`"):
        build_judge({"hidden_size": 16})
