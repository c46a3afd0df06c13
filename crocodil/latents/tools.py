"""What registers hold: the way from one text's latents to another's, neighbours in a corpus, each register's part."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from crocodil.diffusion.masking import token_cross_entropy
from crocodil.diffusion.noise import RowNoise
from crocodil.evaluation.ends import tokens_through_eos
from crocodil.models import Demasker, RegisterEncoder
from crocodil.pipeline import CrocodilPipeline, check_batch_and_seed, masked_sampler
from crocodil.samplers.protocols import ProgressCallback

Kind = Literal["slerp", "linear"]
BATCH_SIZE = 64
"""Texts on the way that are written and read at once."""


@dataclass(frozen=True)
class Interpolant:
    """A point on the way from one text to another; cosines are of whole latents, all registers together.

    Attributes:
        weight: w in [0, 1], the share of the second text.
        text: what the demasker writes from the latents of this point.
        token_ids: (L,) int64, that text; behind its end stands the end token.
        cosine_first: of the point's latents with the first text's.
        cosine_second: likewise with the second text's.
        text_cosine_first: of the latents that the encoder reads from `text` with the first text's. Near `cosine_first`,
            the text followed the latents.
        text_cosine_second: likewise with the second text's.
    """

    weight: float
    text: str
    token_ids: Tensor
    cosine_first: float
    cosine_second: float
    text_cosine_first: float
    text_cosine_second: float


@dataclass(frozen=True)
class Neighbour:
    """A text of a corpus: its row, its cosine with the query, the text, and its token ids (L,) int64."""

    index: int
    cosine: float
    text: str
    token_ids: Tensor


@dataclass(frozen=True)
class RegisterCount:
    """What the first k registers give.

    Attributes:
        num_registers: k.
        text: what the demasker writes from them.
        token_ids: (L,) int64, as written; the text ends at the first end token.
        token_accuracy: share of the source's tokens, from behind the start token through the first end token, that
            stand in their places, in [0, 1].
        is_right: (L,) bool, which those are.
        is_gained: (L,) bool, which of them were not right with the count before.
    """

    num_registers: int
    text: str
    token_ids: Tensor
    token_accuracy: float
    is_right: Tensor
    is_gained: Tensor


@dataclass(frozen=True)
class RegisterEffects:
    """What each register tells of each token of a text.

    Attributes:
        token_ids: (L,) int64, the text.
        nats: (L,) float, -log f(x_0^i | all masked, z) with all registers.
        rises: (K, L) float, how much that rises, in nats, where register k alone is changed; below 0 it falls.
    """

    token_ids: Tensor
    nats: Tensor
    rises: Tensor


def text_blocks(pipeline: CrocodilPipeline, texts: Sequence[str], length: int | None = None) -> Tensor:
    """Texts as the networks were trained on them: BOS, the tokens, and EOS up to the end.

    Args:
        pipeline: whose codec is used.
        texts: B texts.
        length: L, at most what the demasker reads; None takes that.

    Returns:
        (B, L) int64, on the pipeline's device.

    Raises:
        ValueError: if a text does not fit, or its tokens are not the codec's.
    """
    most = pipeline.demasker.max_length
    length = most if length is None else length
    if not 2 <= length <= most:
        raise ValueError(f"length must be between 2 and {most}, which is what the demasker reads, got {length}")
    blocks = torch.full((len(texts), length), pipeline.demasker.eos_token_id, dtype=torch.int64)
    for block, text in zip(blocks, texts, strict=True):
        token_ids = torch.tensor([pipeline.codec.vocabulary.bos_token_id, *pipeline.codec.encode(text)])
        if len(token_ids) > length:
            raise ValueError(f"a text must have at most {length - 1} tokens, got {len(token_ids) - 1} in {text[:40]!r}")
        block[: len(token_ids)] = token_ids
    return blocks.to(pipeline.device)


def mix(first: Tensor, second: Tensor, weights: Tensor, kind: Kind = "slerp") -> Tensor:
    r"""Latents between two.

    "slerp" turns each register on the great circle through its two ends (Shoemake, 1985), at its own angle Omega_k:
    z_k(w) = |z_k(w)| (sin((1 - w) Omega_k) u_k + sin(w Omega_k) v_k) / sin(Omega_k), where u_k and v_k are the unit
    vectors of the ends and the norm |z_k(w)| runs linearly from the one's to the other's. So registers keep the scale
    that the demasker knows, and one on which the texts agree stays as it is; a common angle Omega of the whole latent
    would lengthen it, by 1 / cos(Omega / 2) in the middle. "linear" is (1 - w) a + w b, whose variance between
    independent ends is (1 - w)^2 + w^2: half of it is lost in the middle.

    Args:
        first: (K, D) float, a.
        second: (K, D) float, b.
        weights: (N,) float in [0, 1], w.
        kind: "slerp" or "linear". Registers that are (anti)parallel are mixed linearly in either.

    Returns:
        (N, K, D), at 0 and 1 exactly the ends.

    Raises:
        ValueError: if the kind is unknown.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    a, b, w = first.double(), second.double(), weights.double()[:, None, None]
    if kind == "linear":
        return torch.lerp(a, b, w).to(first.dtype)
    norm_a, norm_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    apart, along = a / norm_a - b / norm_b, a / norm_a + b / norm_b
    # The arc cosine would lose half of the digits of a small angle.
    angle = 2 * torch.atan2(apart.norm(dim=-1, keepdim=True), along.norm(dim=-1, keepdim=True))
    share_a, share_b = (
        torch.where(angle.sin() < 1e-6, share, (share * angle).sin() / angle.sin()) for share in (1 - w, w)
    )
    norm = torch.lerp(norm_a, norm_b, w)
    return (share_a * (norm / norm_a) * a + share_b * (norm / norm_b) * b).to(first.dtype)


def cosine(latents: Tensor, other: Tensor) -> Tensor:
    """Cosines (B,) float64 of latents (B, K, D) with others (B or 1, K, D), all registers together."""
    return F.cosine_similarity(latents.double().flatten(1), other.double().flatten(1))


@torch.no_grad()
def interpolate(
    pipeline: CrocodilPipeline,
    first: str,
    second: str,
    num_points: int = 8,
    kind: Kind = "slerp",
    num_steps: int = 8,
    *,
    length: int | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
    **sampler: Any,
) -> list[Interpolant]:
    """Goes from the latents of one text to those of another and decodes what is on the way, as CRoCoDiL shows it.

    Args:
        pipeline: with an encoder.
        first: where the way begins.
        second: where it ends.
        num_points: how many points there are, both ends among them.
        kind: see `mix`.
        num_steps: demasker calls a text.
        length: see `text_blocks`.
        seed: all points draw the random numbers of its first sample: nothing but their latents tells them apart.
        progress: called as `progress("demasker", done, total)`.
        sampler: further arguments of `MaskedSampler`; the temperature is 0 if not given.

    Returns:
        The points in order; at the ends is what `CrocodilPipeline.reconstruct` makes of each text.

    Raises:
        ValueError: if a setting is out of range, a text does not fit, or there is no encoder.
    """
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2, the two ends, got {num_points}")
    encoder, blocks = _encoder(pipeline), text_blocks(pipeline, [first, second], length)
    a, b = encoder(blocks)
    weights = torch.linspace(0, 1, num_points, dtype=torch.float64, device=a.device)
    latents = mix(a, b, weights, kind)
    token_ids, texts = _write(pipeline, latents, blocks.shape[1], num_steps, seed, progress, **sampler)
    is_over = ~tokens_through_eos(token_ids, pipeline.demasker.stop_token_ids)
    token_ids = token_ids.masked_fill(is_over, pipeline.demasker.eos_token_id)
    read = torch.cat([encoder(part.to(a.device)) for part in token_ids.split(BATCH_SIZE)])
    cosines = torch.stack([cosine(z, end[None]) for z in (latents, read) for end in (a, b)], dim=1)
    return [
        Interpolant(float(weight), text, row, *values)
        for weight, text, row, values in zip(weights, texts, token_ids, cosines.tolist(), strict=True)
    ]


def top_k(scores: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of scores that come in parts (N_i,), and their places in the whole; of equals the first."""
    best, places, num_seen = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64), 0
    for part in scores:
        places = torch.cat([places, torch.arange(num_seen, num_seen + len(part))])
        best, order = torch.cat([best, part]).sort(descending=True, stable=True)
        best, places, num_seen = best[:count], places[order[:count]], num_seen + len(part)
    return best, places


@torch.no_grad()
def nearest(
    pipeline: CrocodilPipeline,
    query: str | Tensor,
    corpus_ids: Tensor,
    num_neighbours: int = 5,
    batch_size: int = 64,
    num_registers: int | None = None,
    progress: ProgressCallback | None = None,
) -> list[Neighbour]:
    """The texts of a corpus whose latents have the largest cosine with a query's; all are compared, none is kept.

    Args:
        pipeline: with an encoder.
        query: a text, or standardised latents (k, D) float, such as the prior draws.
        corpus_ids: (N, L) int64, the corpus; see `text_blocks`.
        num_neighbours: how many are wanted; a smaller corpus gives all it has.
        batch_size: texts encoded at once.
        num_registers: compare the first so many registers; None for all that the query has.
        progress: called as `progress("encoder", done, total)`, in texts.

    Returns:
        The nearest first; of equally near ones, the first of the corpus.

    Raises:
        ValueError: if a setting is out of range, the query does not fit, or there is no encoder.
    """
    encoder = _encoder(pipeline)
    if num_neighbours < 1 or batch_size < 1:
        raise ValueError(f"num_neighbours and batch_size must be at least 1, got {num_neighbours} and {batch_size}")
    latents = encoder(text_blocks(pipeline, [query], corpus_ids.shape[1]))[0] if isinstance(query, str) else query
    most, shape = encoder.num_registers, tuple(latents.shape)
    if len(shape) != 2 or not 1 <= shape[0] <= most or shape[1] != encoder.latent_dim:
        raise ValueError(f"the query's latents must be (1 to {most}, {encoder.latent_dim}), got {shape}")
    count = shape[0] if num_registers is None else num_registers
    if not 1 <= count <= shape[0]:
        raise ValueError(f"num_registers must be between 1 and the query's {shape[0]}, got {num_registers}")
    wanted = latents[None, :count].to(pipeline.device)

    def scores() -> Iterator[Tensor]:
        for start in range(0, len(corpus_ids), batch_size):
            batch = corpus_ids[start : start + batch_size].to(pipeline.device)
            yield cosine(encoder(batch)[:, :count], wanted).cpu()
            if progress is not None:
                progress("encoder", start + len(batch), len(corpus_ids))

    best, places = top_k(scores(), num_neighbours)
    rows = corpus_ids[places].cpu()
    return [
        Neighbour(place, value, pipeline.codec.decode(row), row)
        for place, value, row in zip(places.tolist(), best.tolist(), rows, strict=True)
    ]


@torch.no_grad()
def by_register_count(
    pipeline: CrocodilPipeline,
    text: str,
    counts: Sequence[int] | None = None,
    num_steps: int = 8,
    *,
    length: int | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
    **sampler: Any,
) -> list[RegisterCount]:
    """Writes a text again from its first k registers, for several k: nested dropout made every prefix a latent.

    Args:
        pipeline: with an encoder.
        text: the source.
        counts: the k; None for 1 to K.
        num_steps: demasker calls a text.
        length: see `text_blocks`.
        seed: all k draw the random numbers of its first sample.
        progress: called as `progress("demasker", done, total)`.
        sampler: further arguments of `MaskedSampler`; the temperature is 0 if not given.

    Returns:
        One entry for each k, in rising order, with what `CrocodilPipeline.reconstruct` makes of so many registers.

    Raises:
        ValueError: if a setting is out of range, the text does not fit, or there is no encoder.
    """
    encoder, source = _encoder(pipeline), text_blocks(pipeline, [text], length)
    wanted = sorted(set(range(1, encoder.num_registers + 1) if counts is None else counts))
    if not wanted or not 1 <= wanted[0] <= wanted[-1] <= encoder.num_registers:
        raise ValueError(f"counts must be numbers between 1 and {encoder.num_registers}, got {counts}")
    latents = encoder(source).expand(len(wanted), -1, -1)
    token_ids, texts = _write(pipeline, latents, source.shape[1], num_steps, seed, progress, wanted, **sampler)
    counted = tokens_through_eos(source, pipeline.demasker.stop_token_ids).cpu()
    counted[:, 0] = False
    is_right = (token_ids == source.cpu()) & counted
    is_gained = is_right.clone()
    is_gained[1:] &= ~is_right[:-1]
    accuracies = (is_right.sum(1) / counted.sum()).tolist()
    return [
        RegisterCount(*step) for step in zip(wanted, texts, token_ids, accuracies, is_right, is_gained, strict=True)
    ]


@torch.no_grad()
def register_effects(
    pipeline: CrocodilPipeline, text: str, other: str | None = None, *, length: int | None = None, batch_size: int = 16
) -> RegisterEffects:
    r"""What register k alone tells of token i: log f(x_0^i | m, z) - log f(x_0^i | m, z without k), m all masks.

    Registers share what they know: where several tell a token, none of them alone is missed, so a row of small rises
    is no proof of an idle register.

    Args:
        pipeline: with an encoder.
        text: x_0.
        other: a text whose register k takes the place of the text's own; None hides register k from the demasker. A
            hidden register with visible ones behind it is something that only `masking` of `LatentRegularisation`
            trains; another text's register is a latent the demasker knows, but one that misleads.
        length: see `text_blocks`.
        batch_size: registers that are tried at once.

    Raises:
        ValueError: if a text does not fit, or there is no encoder.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    encoder, blocks = _encoder(pipeline), text_blocks(pipeline, [text] if other is None else [text, other], length)
    latents, source = encoder(blocks), blocks[:1]
    each = torch.arange(encoder.num_registers, device=pipeline.device)
    rows = latents[:1].repeat(len(each) + 1, 1, 1)  # the first row stays whole
    is_heard = torch.ones(rows.shape[:2], dtype=torch.bool, device=pipeline.device)
    if other is None:
        is_heard[each + 1, each] = False
    else:
        rows[each + 1, each] = latents[1]
    masked = torch.full_like(source, pipeline.demasker.mask_token_id)
    nats = []
    for z, heard in zip(rows.split(batch_size), is_heard.split(batch_size), strict=True):
        logits = pipeline.demasker(masked.expand(len(z), -1), z, latent_mask=heard)
        nats.append(token_cross_entropy(logits, source.expand(len(z), -1)))
    all_nats = torch.cat(nats).cpu()
    return RegisterEffects(source[0].cpu(), all_nats[0], all_nats[1:] - all_nats[0])


def _encoder(pipeline: CrocodilPipeline) -> RegisterEncoder:
    if pipeline.encoder is None:
        raise ValueError("this needs a pipeline with an encoder, but this one has none; export one with --autoencoder")
    return pipeline.encoder


class _Prefixes:
    """A demasker whose rows hear the first so many registers each: the same as giving each row no more than these.

    Args:
        demasker: f_theta.
        counts: (B,) int64.
    """

    def __init__(self, demasker: Demasker, counts: Tensor) -> None:
        self.demasker = demasker
        self.mask_token_id = demasker.mask_token_id
        self.counts = counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.demasker, name)

    def __call__(self, token_ids: Tensor, latents: Tensor | None = None, **given: Any) -> Tensor:
        assert latents is not None
        counts = self.counts.repeat(len(token_ids) // len(self.counts))  # guidance asks twice for each row
        is_heard = torch.arange(latents.shape[1], device=counts.device) < counts[:, None]
        if "latent_mask" in given:
            is_heard &= given.pop("latent_mask")
        return self.demasker(token_ids, latents, latent_mask=is_heard, **given)


def _write(
    pipeline: CrocodilPipeline,
    latents: Tensor,
    length: int,
    num_steps: int,
    seed: int,
    progress: ProgressCallback | None,
    counts: Sequence[int] | None = None,
    **sampler: Any,
) -> tuple[Tensor, list[str]]:
    """What the demasker writes from latents (B, K, D), of which each row hears the first `counts`: (B, L) and texts."""
    check_batch_and_seed(BATCH_SIZE, seed)
    demasker, device = pipeline.demasker, pipeline.device
    settings, rows = (
        masked_sampler(num_steps, **{"temperature": 0.0, "static_shapes": pipeline.is_compiled, **sampler}),
        [],
    )
    heard = torch.full((len(latents),), latents.shape[1]) if counts is None else torch.tensor(counts)
    for part, few in zip(latents.split(BATCH_SIZE), heard.to(device).split(BATCH_SIZE), strict=True):
        out = settings.sample(
            demasker if counts is None else _Prefixes(demasker, few),
            length=length,
            batch_size=len(part),
            latents=part,
            generator=RowNoise(torch.full((len(part),), seed << 32, device=device)),
            device=device,
            progress=progress,
        )
        rows.append(out.token_ids)
    token_ids, stops = torch.cat(rows).cpu(), demasker.stop_token_ids
    is_text = tokens_through_eos(token_ids, stops) & ~torch.isin(token_ids, torch.tensor(stops))
    return token_ids, [pipeline.codec.decode(row[kept]) for row, kept in zip(token_ids, is_text, strict=True)]
