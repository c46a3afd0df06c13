from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crocodil.models import LatentPrior, LatentStudent

B, K, D = 3, 4, 3
LOG_SNR, END = torch.tensor([-3.0, 0.0, 4.0]), torch.tensor([-1.0, torch.inf, 5.0])


@pytest.fixture
def noisy() -> Tensor:
    return torch.randn(B, K, D, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_new_student_is_its_teacher_wherever_steps_end(make_prior: Callable[..., LatentPrior], noisy: Tensor) -> None:
    prior, condition = make_prior(), torch.randn(B, K, D)
    student, some = LatentStudent.of(prior), torch.tensor([True, False, True])
    for given in ({}, {"condition": condition}, {"condition": condition, "condition_mask": some}):
        assert torch.equal(student(noisy, LOG_SNR, END, **given), prior(noisy, LOG_SNR, **given))
    student.out_proj.bias += 1
    assert not torch.equal(student(noisy, LOG_SNR, END), prior(noisy, LOG_SNR))  # copies, not the teacher's own


def test_the_end_is_learned_from_the_first_step_on(make_prior: Callable[..., LatentPrior], noisy: Tensor) -> None:
    student = LatentStudent.of(make_prior())
    student(noisy, LOG_SNR, END).square().sum().backward()
    with torch.no_grad():
        for parameter in student.end_embedding.parameters():
            parameter -= 0.1 * parameter.grad.sign()
        one, other = student(noisy, LOG_SNR, END), student(noisy, LOG_SNR, END + torch.tensor([1.0, 0.0, -0.5]))
    changed = (one - other).abs().amax((1, 2))
    assert changed[0] > 1e-4 and changed[1] == 0 and changed[2] > 1e-4


@torch.no_grad()
def test_it_comes_back_from_its_folder(make_prior: Callable[..., LatentPrior], noisy: Tensor, tmp_path: Path) -> None:
    student = LatentStudent.of(make_prior())
    student.end_embedding.mlp[-1].weight.fill_(0.1)
    student.save_pretrained(tmp_path)
    loaded = LatentStudent.from_pretrained(tmp_path)
    assert torch.equal(loaded(noisy, LOG_SNR, END), student(noisy, LOG_SNR, END))
    with pytest.raises(ValueError, match="expected a LatentPrior"):
        LatentPrior.from_pretrained(tmp_path)
