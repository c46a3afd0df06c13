import numpy as np
import pytest
import torch

from crocodil.evaluation.copying import LongestCopiedRun, SuffixArray

BOS, EOS = 1, 0


def by_hand(text: list[int], corpus: list[list[int]]) -> int:
    runs = {tuple(row[i:j]) for row in corpus for i in range(len(row)) for j in range(i + 1, len(row) + 1)}
    inside = {run for run in runs if BOS not in run and EOS not in run}
    runs = {tuple(text[i:j]) for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    return max(map(len, runs & inside), default=0)


@pytest.mark.parametrize("width", [1, 2, 6, 13, 16, 17])
def test_runs_by_trying_all(width: int) -> None:
    """Few token types, so that long runs are copies by chance; rows of other lengths than the texts."""
    generator = np.random.default_rng(width)
    corpus = generator.integers(0, 5, (30, width))
    corpus[:, 0] = BOS
    texts = [generator.integers(2, 5, n) for n in (1, 2, 5, 8, 8, 12, 0)]
    found = SuffixArray(corpus, (BOS, EOS)).longest_runs(texts)
    assert found.tolist() == [by_hand(text.tolist(), corpus.tolist()) for text in texts]
    assert len(set(found.tolist())) > 2 or width < 6


def test_no_texts_have_no_runs() -> None:
    corpus = SuffixArray(np.array([[1, 5, 0]]), (BOS, EOS))
    assert corpus.longest_runs([]).tolist() == []
    assert corpus.longest_runs([np.zeros(0, np.int64)]).tolist() == [0]


def test_a_copied_text_is_copied_whole_and_a_run_does_not_cross_rows() -> None:
    corpus = np.array([[1, 5, 6, 7, 8, 0], [1, 9, 5, 6, 0, 0]], dtype=np.int32)
    metric = LongestCopiedRun(SuffixArray(corpus, (BOS, EOS)), BOS, EOS)
    metric.update(torch.tensor([[1, 5, 6, 7, 8, 0, 0], [1, 7, 8, 9, 5, 6, 0]]))
    metric.update(torch.tensor([[1, 3, 3, 3, 3, 3, 3]]))
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == {
        "copied_run": pytest.approx((4 + 3 + 0) / 3),
        "copied_share": pytest.approx((1 + 3 / 5 + 0) / 3),
        "longest_copied_run": 4,
    }
