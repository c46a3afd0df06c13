from pathlib import Path

import pytest
import torch

from crocodil.data.codec import TextCodec
from crocodil.evaluation import judge as judge_module
from crocodil.evaluation.ends import tokens_through_eos
from crocodil.evaluation.judge import Judge, build_judge

EOS, BOS = 0, 1


def length_of(row: list[int]) -> int:
    return row.index(EOS) + 1 if EOS in row else len(row)


@torch.no_grad()
def alone(judge: Judge, row: list[int], first: int = 1) -> tuple[float, torch.Tensor, torch.Tensor]:
    """One text by itself, unpadded, summed in float64."""
    out = judge.network(input_ids=torch.tensor([row]), output_hidden_states=True)
    log_probs = out.logits[0].double().log_softmax(-1)
    states = out.hidden_states[-1][0]
    return -sum(log_probs[j - 1, row[j]].item() for j in range(first, len(row))), states.mean(0), states[-1]


def test_tokens_through_the_first_end_token_count(token_ids: torch.Tensor) -> None:
    counted = tokens_through_eos(token_ids, EOS)
    assert counted.tolist() == [[j < length_of(row) for j in range(20)] for row in token_ids.tolist()]
    assert counted.sum(1).max() == 20 and counted.sum(1).min() < 12
    either = tokens_through_eos(torch.tensor([[1, 5, 7, 0], [1, 0, 5, 5]]), (0, 5))
    assert either.sum(1).tolist() == [2, 2]


@pytest.mark.parametrize("score_end", [True, False])
def test_own_tokens_text_by_text(
    score_end: bool, own_judge: Judge, token_ids: torch.Tensor, texts: list[str], codec: TextCodec
) -> None:
    judge = Judge(own_judge.network, codec, codec, score_end)
    found = judge.read(texts, token_ids)
    for i, row in enumerate(token_ids.tolist()):
        ends = EOS in row
        row = row[: length_of(row) - (ends and not score_end)]
        nats, mean, last = alone(judge, row)
        assert found.nats[i].item() == pytest.approx(nats, rel=1e-6)
        assert found.num_tokens[i] == len(row) - 1
        torch.testing.assert_close(found.mean_states[i], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.last_states[i], last, rtol=1e-4, atol=1e-5)


def test_a_published_judge_reads_the_text_anew(judge_folder: Path, token_ids: torch.Tensor, texts: list[str]) -> None:
    """From its start token, here its end token, which is given; without the end of the writer's tokens."""
    judge = Judge.from_pretrained(judge_folder, TextCodec.canonical())
    assert not judge.shares_tokens
    found = judge.read(texts[:4], token_ids[:4])
    for i, text in enumerate(texts[:4]):
        row = [256, *judge.codec.encode(text, add_special_tokens=False)]
        assert len(row) == 1 + len(text.encode())
        assert found.nats[i].item() == pytest.approx(alone(judge, row)[0], rel=1e-6)
        assert found.num_tokens[i] == len(text.encode())


def test_a_folder_of_ours_comes_back_with_its_tokens(
    own_judge: Judge, token_ids: torch.Tensor, texts: list[str], codec: TextCodec, tmp_path: Path
) -> None:
    own_judge.save_pretrained(tmp_path / "judge")
    judge = Judge.from_pretrained(tmp_path / "judge", codec, score_end=True)
    assert judge.shares_tokens
    torch.testing.assert_close(judge.read(texts, token_ids).nats, own_judge.read(texts, token_ids).nats)


def test_special_tokens_spelled_out_are_text(judge_folder: Path) -> None:
    judge = Judge.from_pretrained(judge_folder)
    assert judge.read(["<|endoftext|>"]).num_tokens == len("<|endoftext|>")


@pytest.mark.parametrize("at_once", [1, 40, 10_000])
def test_batches_do_not_matter_and_none_is_dropped(
    at_once: int, own_judge: Judge, token_ids: torch.Tensor, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = own_judge._read([row[: length_of(row)] for row in token_ids.tolist()], [1] * 9)
    monkeypatch.setattr(judge_module, "TOKENS_AT_ONCE", at_once)
    found = own_judge._read([row[: length_of(row)] for row in token_ids.tolist()], [1] * 9)
    torch.testing.assert_close(found.nats, expected.nats, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.num_tokens, expected.num_tokens)
    torch.testing.assert_close(found.mean_states, expected.mean_states, rtol=1e-4, atol=1e-5)


def test_what_follows_the_end_does_not_matter(own_judge: Judge, token_ids: torch.Tensor, texts: list[str]) -> None:
    changed = torch.where(tokens_through_eos(token_ids, EOS), token_ids, 7)
    assert (changed != token_ids).any()
    assert torch.equal(own_judge.read(texts, changed).nats, own_judge.read(texts, token_ids).nats)


def test_a_missing_start_token_is_put_in_front(own_judge: Judge, token_ids: torch.Tensor, texts: list[str]) -> None:
    """Else the first token of a text that begins with something else would be given instead of counted."""
    other = token_ids.clone()
    other[:, 0] = 30
    found = own_judge.read(texts, other)
    for i, row in enumerate(other.tolist()):
        row = [BOS, *row[: length_of(row)]]
        assert found.nats[i].item() == pytest.approx(alone(own_judge, row)[0], rel=1e-6)
        assert found.num_tokens[i] == len(row) - 1


def test_prompts_are_given_and_not_counted(judge_folder: Path, texts: list[str]) -> None:
    judge = Judge.from_pretrained(judge_folder)
    prompts = [text[:5] for text in texts[:4]]
    found = judge.read(texts[:4], prompts=prompts)
    for i, text in enumerate(texts[:4]):
        row = [256, *judge.codec.encode(text, add_special_tokens=False)]
        assert found.nats[i].item() == pytest.approx(alone(judge, row, first=6)[0], rel=1e-6)
        assert found.num_tokens[i] == len(text) - 5
    with pytest.raises(ValueError, match="must begin with its prompt"):
        judge.read(["abc"], prompts=["b"])


def test_texts_longer_than_the_judge_reads_are_read_in_windows(judge_folder: Path) -> None:
    """Each token counts once, with at least half a window before it: a context of 48, then steps of 24."""
    judge = Judge.from_pretrained(judge_folder)
    text = "".join(chr(97 + i * i % 26) for i in range(130))
    row = [256, *judge.codec.encode(text)]
    expected = alone(judge, row[:48])[0]
    for counted in range(48, len(row), 24):
        end = min(counted + 24, len(row))
        expected += alone(judge, row[end - 48 : end], first=48 - (end - counted))[0]
    found = judge.read([text])
    assert found.num_tokens == 130
    assert found.nats.item() == pytest.approx(expected, rel=1e-5)


def test_texts_are_read_once_for_all_figures(own_judge: Judge, token_ids: torch.Tensor, texts: list[str]) -> None:
    assert own_judge.read(texts, token_ids) is own_judge.read(list(texts), token_ids.clone())
    assert own_judge.read(texts, token_ids) is not own_judge.read(texts[1:], token_ids[1:])


def test_what_is_no_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a causal language model with its tokenizer as judge"):
        Judge.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no setting hidden_sise; did you mean hidden_size"):
        build_judge({"model_type": "llama", "hidden_sise": 3})
    with pytest.raises(ValueError, match="needs `model_type`"):
        build_judge({"hidden_size": 16})
