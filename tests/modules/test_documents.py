"""The stages on padded and packed batches, against their documents one by one."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from crocodil.diffusion.documents import Documents, NumberedDocuments
from crocodil.diffusion.gaussian import disturb
from crocodil.diffusion.masking import LinearMasking
from crocodil.diffusion.noise import STREAM_CHOICE, STREAM_LATENT_NOISE, STREAM_MASK, STREAM_TIME, BatchNoise
from crocodil.modules.autoencoder import LatentRegularisation, disturb_latents
from crocodil.modules.demasker import draw_masks

MASK, EOS, L_MAX = 2, 0, 24
PACKED = torch.tensor(
    [[1] * 9 + [2] * 6 + [3] * 5 + [0] * 4, [1] * 24, [1] * 4 + [2] * 16 + [0] * 4, [1] * 20 + [0] * 4]
)
PADDED = torch.tensor([[1] * 9 + [0] * 15, [1] * 24, [1] * 4 + [0] * 20, [1] * 20 + [0] * 4])
each_layout = pytest.mark.parametrize("ids", [PADDED, PACKED], ids=["padded", "packed"])
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode", "ignore:.*does not have many workers")


class Batches(L.LightningDataModule):
    """The given batches, once each, as they are."""

    def __init__(self, *batches: dict[str, Tensor]) -> None:
        super().__init__()
        self.batches = list(batches)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = train_dataloader


def batch_of(ids: Tensor, seed: int = 0) -> dict[str, Tensor]:
    token_ids = torch.randint(3, 150, ids.shape, generator=torch.Generator().manual_seed(seed))
    return {"token_ids": token_ids, "document_ids": ids}


def places(ids: Tensor) -> list[tuple[int, Tensor]]:
    documents = NumberedDocuments(ids)
    return [(row, ids[row] == n) for row, n in zip(documents.row.tolist(), documents.number.tolist(), strict=True)]


def still(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0)


@pytest.fixture
def step(fit: Callable[..., list[float]]) -> Callable[[L.LightningModule, dict[str, Tensor]], dict[str, Any]]:
    """What the first training step on a batch returns, and its `noise`; the weights stay."""

    class Outputs(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.values = {"noise": pl_module.training_noise(batch)}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.values |= outputs

    def run(module: L.LightningModule, batch: dict[str, Tensor]) -> dict[str, Any]:
        outputs = Outputs()
        fit(module, Batches(batch), outputs, max_steps=1)
        module.eval()
        assert not any(value.requires_grad for name, value in outputs.values.items() if name != "noise")
        return outputs.values

    return run


def nats_alone(demasker: Any, noisy: Tensor, clean: Tensor, is_masked: Tensor, *given: Any, **more: Any) -> Tensor:
    logits = demasker(noisy[None], *given, **more)[0]
    return F.cross_entropy(logits, clean, reduction="none") * is_masked


@each_layout
def test_masks_are_drawn_for_each_document_and_never_on_padding(ids: Tensor) -> None:
    noise = BatchNoise(torch.tensor(5), torch.arange(4), 4)
    batch, documents = batch_of(ids), NumberedDocuments(ids)
    noisy, is_masked, point = draw_masks(batch["token_ids"], noise, LinearMasking(), MASK, documents)
    uniform = noise.uniform(STREAM_MASK, 0, L_MAX)
    for (row, place), mask_prob in zip(places(ids), point.mask_prob, strict=True):
        assert torch.equal(is_masked[row][place], uniform[row][place] < mask_prob)
    assert len(point.mask_prob.unique()) == len(documents)
    assert not is_masked[ids == 0].any() and torch.equal(noisy == MASK, is_masked)
    whole = draw_masks(batch["token_ids"], noise, LinearMasking(), MASK)
    for row, place in places(ids.where(ids == 1, 0)):  # first documents are masked as if nothing followed them
        assert torch.equal(is_masked[row][place], whole[1][row][place])


@each_layout
@pytest.mark.parametrize("loss_weight", ["elbo", "none"])
@torch.no_grad()
def test_the_demasker_learns_from_documents_one_by_one(
    ids: Tensor, loss_weight: str, tiny_system: Any, step: Callable[..., dict[str, Any]]
) -> None:
    module, batch = tiny_system.module("demasker", loss_weight=loss_weight, optimizer=still), batch_of(ids)
    out, documents = step(module, batch), NumberedDocuments(ids)
    noisy, is_masked, point = draw_masks(batch["token_ids"], out["noise"], module.masking, MASK, documents)
    loss = 0.0
    for i, (row, place) in enumerate(places(ids)):
        nats = nats_alone(module.demasker, noisy[row][place], batch["token_ids"][row][place], is_masked[row][place])
        torch.testing.assert_close(out["masked_nats"][i], nats.sum(), rtol=1e-5, atol=1e-5)
        assert out["num_masked"][i] == is_masked[row][place].sum()
        weight = point.elbo_weight[i] / (ids > 0).sum() if loss_weight == "elbo" else 1 / is_masked.sum()
        loss += (nats.sum() * weight).item()
    assert out["loss"].item() == pytest.approx(loss, rel=1e-5)
    assert torch.equal(out["mask_prob"], point.mask_prob)


@each_layout
@torch.no_grad()
def test_the_autoencoder_learns_from_documents_one_by_one(
    ids: Tensor, tiny_system: Any, step: Callable[..., dict[str, Any]]
) -> None:
    settings = LatentRegularisation(nested_dropout=1.0, dropout=0.3, replacement=0.5)
    module, batch = tiny_system.module("autoencoder", regularisation=settings, optimizer=still), batch_of(ids)
    out, documents = step(module, batch), NumberedDocuments(ids)
    noisy, is_masked, point = draw_masks(batch["token_ids"], out["noise"], module.masking, MASK, documents)
    disturbed, seen = disturb_latents(out["latents"], documents.noise(out["noise"]), settings, ramp=0.0)
    assert seen is not None and len(seen.sum(1).unique()) > 1
    loss = 0.0
    for i, (row, place) in enumerate(places(ids)):
        text = batch["token_ids"][row][place]
        torch.testing.assert_close(out["latents"][i], module.encoder(text[None])[0], rtol=1e-3, atol=1e-3)
        given = out["disturbed"][i : i + 1]
        nats = nats_alone(
            module.demasker, noisy[row][place], text, is_masked[row][place], given, latent_mask=seen[i : i + 1]
        )
        torch.testing.assert_close(out["masked_nats"][i], nats.sum(), rtol=1e-5, atol=1e-5)
        loss += (nats.sum() * point.elbo_weight[i] / (ids > 0).sum()).item()
    assert out["loss"].item() == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(out["disturbed"], disturbed)
    torch.testing.assert_close(out["latents"].mean(0), torch.zeros(4, 8), rtol=0, atol=1e-4)


@each_layout
@torch.no_grad()
def test_the_encoder_reads_documents_masked_at_ratios_of_their_own(
    ids: Tensor, tiny_system: Any, count_calls: Callable[..., list[Any]], step: Callable[..., dict[str, Any]]
) -> None:
    module = tiny_system.module("autoencoder", regularisation=LatentRegularisation(input_masking=1.0))
    seen = count_calls(module.encoder.network.get_input_embeddings())
    out, documents = step(module, batch_of(ids)), NumberedDocuments(ids)
    ratio = documents.noise(out["noise"]).uniform(STREAM_CHOICE, 1, 2)[:, 1]
    uniform = out["noise"].uniform(STREAM_MASK, 1, L_MAX)
    assert torch.equal(seen[0][0] == MASK, uniform < documents.spread(ratio))


@each_layout
@pytest.mark.parametrize("brings_latents", [False, True])
@torch.no_grad()
def test_the_prior_learns_from_the_latents_of_documents(
    ids: Tensor, brings_latents: bool, tiny_system: Any, step: Callable[..., dict[str, Any]]
) -> None:
    module, batch = tiny_system.module("prior", condition_share=0.5, optimizer=still), batch_of(ids)
    torch.nn.init.normal_(module.prior.out_proj.weight)  # a fresh prior says 0 to anything
    texts = [batch["token_ids"][row][place] for row, place in places(ids)]
    clean = torch.cat([module.encoder(text[None]) for text in texts])
    if brings_latents:
        clean = batch["latents"] = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    calls: list[dict[str, Any]] = []
    hook = module.prior.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    out, documents = step(module, batch), NumberedDocuments(ids)
    hook.remove()
    torch.testing.assert_close(out["latents"], clean, rtol=1e-4, atol=1e-4)
    own, has = documents.noise(out["noise"]), documents.row < 2
    index = torch.where(has, own.rows, own.rows - 2)
    times = ((out["noise"].shared(STREAM_TIME, 0) + index / 2) % 1).float()
    point = module.noise_schedule(times)
    torch.testing.assert_close(out["log_snr"], point.log_snr)
    assert torch.equal(calls[-1]["condition_mask"], has)
    uniform, ratio = out["noise"].uniform(STREAM_MASK, 0, L_MAX), own.uniform(STREAM_CHOICE, 0, 1)[:, 0]
    hidden = uniform < documents.spread(ratio)
    for i, (row, place) in enumerate(places(ids)):
        if has[i]:
            condition = module.encoder(torch.where(hidden[row][place], MASK, texts[i])[None])[0]
            torch.testing.assert_close(calls[-1]["condition"][i], condition, rtol=1e-4, atol=1e-4)
    fresh = own.normal(STREAM_LATENT_NOISE, 0, (4, 8))
    noisy = point.alpha_t[:, None, None] * out["latents"] + point.sigma_t[:, None, None] * fresh
    losses = (module.prior(noisy, point.log_snr, **calls[-1]) - out["latents"]).square().mean((1, 2))
    torch.testing.assert_close(out["row_losses"], losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["loss"], losses.mean(), rtol=1e-4, atol=1e-5)


def test_latents_of_another_shape_are_refused(tiny_system: Any) -> None:
    module, batch = tiny_system.module("prior"), batch_of(PACKED)
    batch["latents"] = torch.zeros(4, 4, 8)
    noise = module.held_out_noise(batch, 0)
    with pytest.raises(ValueError, match=r"\(documents, registers, latent_dim\) = \(7, 4, 8\), got \(4, 4, 8\)"):
        module.evaluate(batch, noise)


@each_layout
@torch.no_grad()
def test_held_out_figures_are_those_of_documents_one_by_one(ids: Tensor, tiny_system: Any) -> None:
    batch, documents = batch_of(ids), NumberedDocuments(ids)
    module = tiny_system.module("demasker").eval()
    noise = module.held_out_noise(batch, 0)
    figures = module.evaluate(batch, noise)
    autoencoder = tiny_system.module("autoencoder").eval()
    with_latents = autoencoder.evaluate(batch, noise)
    noisy, is_masked, point = draw_masks(batch["token_ids"], noise, module.masking, MASK, documents)
    fresh = documents.noise(noise).normal(STREAM_LATENT_NOISE, 0, (4, 8))
    sums = dict.fromkeys(("loss", "masked_loss", "disturbed", "loss_clean", "loss_no_latents"), 0.0)
    for i, (row, place) in enumerate(places(ids)):
        text, weight = batch["token_ids"][row][place], point.elbo_weight[i] / (ids > 0).sum()
        asked = noisy[row][place], text, is_masked[row][place]
        nats = nats_alone(module.demasker, *asked).sum()
        sums["loss"] += nats * weight
        sums["masked_loss"] += nats / is_masked.sum()
        z = autoencoder.encoder(text[None])
        for name, latents in {
            "disturbed": disturb(z, fresh[i], autoencoder.regularisation.noise_std),
            "loss_clean": z,
            "loss_no_latents": None,
        }.items():
            sums[name] += nats_alone(autoencoder.demasker, *asked, latents).sum() * weight
    found = figures | with_latents | {"loss": figures["loss"], "disturbed": with_latents["loss"]}
    for name, value in sums.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-4), name


@each_layout
@torch.no_grad()
def test_held_out_losses_of_the_prior_are_means_over_documents(ids: Tensor, tiny_system: Any) -> None:
    module, batch = tiny_system.module("prior", self_conditioning=0.0).eval(), batch_of(ids)
    figures = module.evaluate(batch, module.held_out_noise(batch, 0))
    latents = torch.cat([module.encoder(batch["token_ids"][row][place][None]) for row, place in places(ids)])
    expected = latents.square().mean().item()  # a fresh prior says 0 to anything
    assert figures["loss"].item() == figures["loss_conditional"].item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_the_judge_does_not_count_padding_and_refuses_packed_rows(
    tiny_system: Any, step: Callable[..., dict[str, Any]]
) -> None:
    module, batch = tiny_system.module("judge", optimizer=still), batch_of(PADDED)
    batch["token_ids"][3, 10] = EOS
    nats = []
    for row, place in places(PADDED):
        text = batch["token_ids"][row][place][: 11 if row == 3 else None]
        logits = module.judge(input_ids=text[None]).logits[0, :-1]
        nats.append(F.cross_entropy(logits, text[1:], reduction="none"))
    loss = torch.cat(nats).mean().item()
    assert step(module, batch)["loss"].item() == pytest.approx(loss, rel=1e-5)
    assert module.evaluate(batch, None)["loss"].item() == pytest.approx(loss, rel=1e-5)
    with pytest.raises(ValueError, match="a judge reads one text a row, got 3 documents in a row"):
        module.evaluate(batch_of(PACKED), None)


@pytest.mark.parametrize("stage", ["demasker", "autoencoder", "prior"])
def test_figures_of_an_epoch_weigh_batches_by_what_they_hold(stage: str, tiny_system: Any, tmp_path: Any) -> None:
    module, batches = tiny_system.module(stage).eval(), [batch_of(PACKED), batch_of(PADDED[:, :12], seed=1)]
    with torch.no_grad():
        figures = [module.evaluate(batch, module.held_out_noise(batch, i)) for i, batch in enumerate(batches)]
    sizes = [7, 4] if stage == "prior" else [84, 37]
    assert [module.num_items(batch) for batch in batches] == sizes
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, **quiet)
    (found,) = trainer.test(module, datamodule=Batches(*batches), verbose=False)
    for name in figures[0]:
        expected = sum(figure[name].item() * size for figure, size in zip(figures, sizes, strict=True)) / sum(sizes)
        assert found[f"test_{name}"] == pytest.approx(expected, rel=1e-5), name
    if stage == "autoencoder":
        assert found["test_masked_loss_1.0"] > 0


@pytest.mark.parametrize("stage", ["demasker", "autoencoder", "prior"])
def test_one_document_a_row_is_the_row(stage: str, tiny_system: Any, step: Callable[..., dict[str, Any]]) -> None:
    """Numbers that tell nothing new change nothing."""
    batch = batch_of(torch.ones(4, L_MAX, dtype=torch.int64))
    plain = {"token_ids": batch["token_ids"]}
    found, expected = (step(tiny_system.module(stage, optimizer=still), given) for given in (batch, plain))
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"noise"}:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert len(Documents.of(plain)) == 4


@pytest.mark.parametrize("stage", ["demasker", "autoencoder"])
@torch.no_grad()
def test_predict_does_not_count_padding_and_refuses_packed_rows(
    stage: str, tiny_system: Any, count_calls: Callable[..., list[Any]]
) -> None:
    module, batch, is_text = tiny_system.module(stage).eval(), batch_of(PADDED), PADDED > 0
    canvases = count_calls(module.demasker)
    out = module.predict_step(batch, 0)
    asked = canvases[0][0] == MASK
    if stage == "demasker":
        assert not (asked & ~is_text).any() and asked.any(1).all()
    else:
        for row, place in places(PADDED):
            expected = module.encoder(batch["token_ids"][row][place][None])[0]
            torch.testing.assert_close(canvases[0][1][row], expected, rtol=1e-4, atol=1e-4)
    hits, counted = (out["token_ids"] == batch["token_ids"]) & is_text & asked, is_text & asked
    torch.testing.assert_close(out["token_accuracy"], hits.sum(1) / counted.sum(1))
    with pytest.raises(ValueError, match="predict reads one text a row, got 3 documents in a row; use padded rows"):
        module.predict_step(batch_of(PACKED), 0)
