import sys
from statistics import fmean, stdev

import pytest
import torch

from crocodil.evaluation.judge import Judge
from crocodil.evaluation.mauve import Mauve

mauve = pytest.importorskip("mauve")


def test_the_library_on_the_same_features(own_judge: Judge, token_ids: torch.Tensor, texts: list[str]) -> None:
    many_ids, many = token_ids.repeat(5, 1), texts * 5
    many_ids[9:, 3] = torch.arange(20, 56)  # not only copies
    reference = own_judge.read(many, many_ids.flip(0)).last_states + 0.1
    metric = Mauve(own_judge, reference, seeds=(0, 1))
    for part in (slice(0, 20), slice(20, 45)):
        metric.update(many[part], many_ids[part])
    features = own_judge.read(many, many_ids).last_states
    features = features[torch.argsort(features[:, 0], stable=True)]
    values = [
        mauve.compute_mauve(
            reference.double().numpy(), features.double().numpy(), device_id=-1, seed=seed, verbose=False
        ).mauve
        for seed in (0, 1)
    ]
    found = metric.compute()
    assert found["mauve"].item() == pytest.approx(fmean(values), rel=1e-6)
    assert found["mauve_kmeans_std"].item() == pytest.approx(stdev(values), abs=1e-9)


def test_without_the_library_it_says_what_to_install(own_judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ValueError, match=r"pip install 'crocodil\[eval\]'"):
        Mauve(own_judge, torch.zeros(2, 16))
