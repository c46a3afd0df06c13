"""The student's stage on the tiny system: what it is asked for, what it keeps, and where its steps lead."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crocodil.diffusion.gaussian import NoiseLevel, TangentSchedule, add_noise
from crocodil.diffusion.mean_flow import adaptive_loss, jump, mean_flow_target, noise_share, step_ends
from crocodil.diffusion.noise import STREAM_CHOICE, STREAM_LATENT_NOISE, STREAM_MASK, STREAM_TIME
from crocodil.modules import LastCheckpoint, StudentModule
from crocodil.modules.checkpoints import StageCheckpoint
from crocodil.samplers import MaskedSampler
from crocodil.samplers.mean_flow import StudentProcess

MASK = 2
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")


@pytest.fixture
def make(tiny_system: Any) -> Callable[..., StudentModule]:
    """A module whose prior and student are away from zero and from each other."""

    def build(**settings: Any) -> StudentModule:
        module = tiny_system.module("student", **settings).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in [*module.prior.parameters(), *module.student.parameters()]:
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
        return module

    return build


@pytest.fixture
def batch(tiny_system: Any) -> dict[str, Tensor]:
    return next(iter(tiny_system.data().val_dataloader()))


def test_the_checkpoint_holds_the_student_alone(tiny_system: Any, student_checkpoint: Path) -> None:
    content = torch.load(student_checkpoint, weights_only=True)
    names = {f"student.{name}" for name in tiny_system.module("student").student.state_dict()}
    assert set(content["state_dict"]) == set(content["ema"]["raw"]) == names
    checkpoint = StageCheckpoint(student_checkpoint, "student")
    encoder = StageCheckpoint(tiny_system.checkpoint("autoencoder"), "autoencoder").encoder()
    assert checkpoint.networks["autoencoder"] == encoder.fingerprint()
    process = StudentProcess.from_dict(checkpoint.networks["student_process"])
    assert process == StudentProcess(TangentSchedule(d=3.0))
    student = checkpoint.student()
    assert all(
        torch.equal(value, content["state_dict"][f"student.{name}"]) for name, value in student.state_dict().items()
    )


def test_it_begins_as_its_teacher_and_alone_is_trained(tiny_system: Any, fit: Callable[..., list[float]]) -> None:
    module = tiny_system.module("student")
    teacher = StageCheckpoint(tiny_system.checkpoint("prior"), "prior").prior().state_dict()
    assert all(torch.equal(module.student.state_dict()[name], value) for name, value in teacher.items())
    parts = nn.ModuleDict(dict(module.named_children()))
    before = {name: value.clone() for name, value in parts.state_dict().items()}
    fit(module, tiny_system.data(), max_steps=4)
    for name, value in parts.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("student."), name
    assert module.student.training and not (module.prior.training or module.encoder.training)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("first_leg", [0.0, 0.3])
@torch.no_grad()
def test_held_out_losses_by_hand(
    first_leg: float, conditional: bool, make: Callable[..., StudentModule], batch: dict[str, Tensor]
) -> None:
    module = make(first_leg=first_leg, final_share=0.3, guidance_scale=1.5, start_log_snr=-5.0, settled_log_snr=1.0)
    noise, clean, schedule = module.held_out_noise(batch, 0), module.encoder(batch["token_ids"]), TangentSchedule(d=3.0)
    hidden = noise.uniform(STREAM_MASK, 0, 32) < noise.uniform(STREAM_CHOICE, 0, 1)
    condition = module.encoder(torch.where(hidden, MASK, batch["token_ids"]))
    t = (noise.uniform(STREAM_TIME, 0, 1)[0, 0] + torch.arange(8) / 8) % 1
    level = NoiseLevel.at(schedule(t).log_snr.clamp(min=-5).float())
    ends = step_ends(t, noise.uniform(STREAM_TIME, 1, 1)[:, 0], 0.25, 0.3)
    ends = torch.where(ends <= 1e-3, torch.inf, schedule(ends).log_snr.clamp(min=-5)).float()
    z = add_noise(clean, noise.normal(STREAM_LATENT_NOISE, 0, (4, 8)), level)

    def teacher(z: Tensor, level: NoiseLevel, earlier: Tensor | None) -> Tensor:
        without = module.prior(z, level.log_snr, self_condition=earlier)
        if not conditional:
            return without
        return without + 1.5 * (module.prior(z, level.log_snr, self_condition=earlier, condition=condition) - without)

    def student(z: Tensor, level: NoiseLevel) -> Tensor:
        return module.student(z, level.log_snr, ends, condition=condition if conditional else None)

    estimate = teacher(z, level, teacher(z, level, None))
    if first_leg:
        s, r = noise_share(level.log_snr), noise_share(ends)
        m = torch.maximum(0.7 * s, r)
        middle = NoiseLevel.at(2 * torch.log((1 - m) / m))
        mean = (estimate + teacher(jump(z, estimate, level, middle), middle, estimate)) / 2
        rest = student(jump(z, mean, level, middle), middle)
        weight = ((1 - r / m) / (1 - r / s).clamp(min=1e-9))[:, None, None]
        target = torch.where((r < s)[:, None, None], weight * rest + (1 - weight) * mean, estimate)
    else:
        target = mean_flow_target(student, z, estimate, level.log_snr, ends)
    target[level.log_snr >= 1] = estimate[level.log_snr >= 1]
    losses = (student(z, level) - target).square().mean((1, 2))
    figures = module.evaluate(batch, noise)
    assert 0 < (level.log_snr >= 1).sum() < 8 and (ends == torch.inf).any()
    found = figures["loss_conditional" if conditional else "loss"]
    assert found.item() == pytest.approx(losses.mean().item(), rel=1e-4)


@torch.no_grad()
def test_endpoints_are_compared_from_the_same_noise(
    make: Callable[..., StudentModule], batch: dict[str, Tensor]
) -> None:
    module = make()
    noise = module.held_out_noise(batch, 3)
    figures = module.evaluate(batch, noise)
    expected = module.latent_process.sampler(32).sample(module.prior, batch_size=8, generator=noise)
    for num_steps in (1, 2, 4):
        found = module.student_process.sampler(num_steps).sample(module.student, batch_size=8, generator=noise)
        assert figures[f"mse_{num_steps}"].item() == pytest.approx((found - expected).square().mean().item(), rel=1e-5)
        a, b = found.flatten(1), expected.flatten(1)
        cosine = ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
        assert figures[f"cosine_{num_steps}"].item() == pytest.approx(cosine.item(), rel=1e-5)


def test_a_teacher_without_self_conditioning_is_asked_once(
    make: Callable[..., StudentModule], batch: dict[str, Tensor], count_calls: Callable[..., list[tuple[Any, ...]]]
) -> None:
    module = make()
    seen = count_calls(module.prior)
    level, z = NoiseLevel.at(torch.zeros(8)), torch.randn(8, 4, 8)
    both = module.teach(z, level)
    object.__setattr__(module.latent_process, "self_conditioning", False)
    once = module.teach(z, level)
    assert len(seen) == 2 + 1 and not torch.allclose(both, once)
    assert not both.requires_grad


def test_student_and_teacher_have_the_same_conditions(tiny_system: Any, fit: Callable[..., list[float]]) -> None:
    module = tiny_system.module("student", condition_share=0.5)
    seen: list[dict[str, Any]] = []
    for network in (module.student, module.prior):
        network.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    fit(module, tiny_system.data(), max_steps=1)
    assert len(seen) == 3 + 2  # the teacher twice at z_t and once ahead, the student ahead and at z_t
    for given in seen:
        assert given["condition_mask"].tolist() == [True] * 4 + [False] * 4
        assert torch.equal(given["condition"], seen[0]["condition"])


def test_the_teacher_is_evaluated_as_it_would_sample(tiny_system: Any) -> None:
    module = tiny_system.module("student").train()
    module.on_train_epoch_start()
    assert module.student.training and not (module.prior.training or module.encoder.training)


def test_the_derivative_s_term_warms_up(tiny_system: Any, fit: Callable[..., list[float]]) -> None:
    """A student that stays what its teacher is misses the target by the term alone."""

    def losses(warmup: int) -> list[float]:
        settings = {"first_leg": 0.0, "tangent_warmup": warmup, "optimizer": partial(torch.optim.SGD, lr=0.0)}
        return fit(tiny_system.module("student", **settings), tiny_system.data(), max_steps=2)

    (first, second), (first_part, second_part) = losses(0), losses(3)
    assert first_part == pytest.approx(first / 16, rel=0.05) and second_part == pytest.approx(second / 4, rel=0.05)


def test_the_loss_is_adaptive_and_figures_are_not(tiny_system: Any, fit: Callable[..., list[float]]) -> None:
    plain, weighted = (tiny_system.module("student", loss_power=power) for power in (0.0, 0.5))
    rows: list[Tensor] = []
    for module in (plain, weighted):
        step = module.training_step
        module.training_step = lambda *args, step=step: rows.append(step(*args)) or rows[-1]  # type: ignore[method-assign]
        fit(module, tiny_system.data(), max_steps=1)
    torch.testing.assert_close(rows[0]["row_losses"], rows[1]["row_losses"])
    assert rows[0]["loss"].item() == pytest.approx(rows[0]["row_losses"].mean().item())
    assert rows[1]["loss"].item() == pytest.approx(adaptive_loss(rows[1]["row_losses"], 0.5).mean().item())


def test_a_resumed_run_goes_on_bit_for_bit(tiny_system: Any, fit: Callable[..., list[float]], tmp_path: Path) -> None:
    keep = LastCheckpoint(str(tmp_path), every_n_train_steps=2)
    whole = fit(tiny_system.module("student"), tiny_system.data(), max_steps=4)
    first = fit(tiny_system.module("student"), tiny_system.data(), keep, max_steps=2, enable_checkpointing=True)
    rest = fit(tiny_system.module("student"), tiny_system.data(), max_steps=4, ckpt_path=tmp_path / "last.ckpt")
    assert whole == first + rest and len(rest) == 2


@torch.no_grad()
def test_predict_and_the_pipeline_draw_with_the_student(tiny_system: Any, batch: dict[str, Tensor]) -> None:
    module = tiny_system.module("student", sampler=MaskedSampler(8, temperature=1.0)).eval()
    out = module.predict_step(batch, 0)["token_ids"]
    assert out.shape == (8, 32) and not (out == MASK).any()
    assert torch.equal(out, module.predict_step(batch, 0)["token_ids"])
    pipeline = module.pipeline(tiny_system.data().codec)
    assert pipeline(num_steps=4).cost.calls == {"demasker": 4, "student": 4}
    module.student.out_proj.bias += 1
    assert not torch.equal(out, module.predict_step(batch, 0)["token_ids"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"instant_share": 0.6, "final_share": 0.4}, "at least 0 and below 1 together, got 0.6 and 0.4"),
        ({"final_share": -0.1}, "at least 0 and below 1 together"),
        ({"first_leg": 1.5}, r"first_leg must be between 0 \(a derivative\) and 1, got 1.5"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, tiny_system: Any) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_system.module("student", **settings)


def test_a_teacher_must_fit(tiny_system: Any, tmp_path: Path, fit: Callable[..., list[float]]) -> None:
    none = {"condition_share": 0.0}
    content = torch.load(tiny_system.checkpoint("prior"), weights_only=True)
    networks = content["crocodil"]["networks"]
    networks["latent_process"]["conditional"] = False
    torch.save(content, tmp_path / "unconditional.ckpt")
    with pytest.raises(ValueError, match=r"condition_share must be 0, got 0.25: .*unconditional.ckpt knows no cond"):
        tiny_system.module("student", prior_checkpoint=str(tmp_path / "unconditional.ckpt"))
    networks["autoencoder"] = "another"
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt was trained on another autoencoder than .*last.ckpt"):
        fit(tiny_system.module("student", prior_checkpoint=str(tmp_path / "other.ckpt"), **none), tiny_system.data())
