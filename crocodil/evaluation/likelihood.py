"""log p(answer | prompt) of a masked-diffusion model, by Monte Carlo, and whether greedy decoding gives the answer."""

from math import comb

import torch
from torch import Tensor
from torch.nn import functional as F

from crocodil.diffusion.noise import RowNoise, mix
from crocodil.models import Demasker

STREAM_COUNT, STREAM_ORDER = 0, 1


def score(
    demasker: Demasker,
    prompt_ids: Tensor,
    answer_ids: Tensor,
    seeds: Tensor,
    num_samples: int = 128,
    batch_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """`log_likelihood` and `is_greedy` of the same answers; answers of one token take fewer calls. See those."""
    if answer_ids.shape[1] == 1:
        return score_single_tokens(demasker, prompt_ids, answer_ids, batch_size)
    return (
        log_likelihood(demasker, prompt_ids, answer_ids, seeds, num_samples, batch_size),
        is_greedy(demasker, prompt_ids, answer_ids, batch_size),
    )


@torch.no_grad()
def log_likelihood(
    demasker: Demasker,
    prompt_ids: Tensor,
    answer_ids: Tensor,
    seeds: Tensor,
    num_samples: int = 128,
    batch_size: int = 32,
    latents: Tensor | None = None,
) -> Tensor:
    r"""Unbiased estimates of the lower bound on log p(answer | prompt) of LLaDA (arXiv 2502.09992, eq. 6).

    The bound is E [ L'/l sum over masked i of log f(x_i | x_l, prompt) ], where l is uniform over 1 .. L' and x_l is
    the answer with l of its L' tokens masked, drawn without replacement. It is the mean over all orders of writing the
    answer one token at a time of the log-probability of that, so it is log p itself for a model whose conditionals are
    those of one joint distribution. The counts l of the samples are stratified. An answer has 2^L' - 1 masked forms;
    where `num_samples` is no less, each is asked for once, and the bound is exact: with one sample for one token, with
    128 up to 7 tokens.

    Args:
        demasker: f_theta.
        prompt_ids: (N, P) int64, never masked; P may be 0.
        answer_ids: (N, L') int64.
        seeds: (N,) int64. What is masked depends on the seed and L' alone, so equal seeds give answers of one length
            the same masks.
        num_samples: S, Monte Carlo samples for each answer.
        batch_size: samples in one call; it changes nothing but rounding.
        latents: (N, K, D) gives log p(answer | prompt, z). The marginal over z is not tractable; None is the model
            without latents.

    Returns:
        (N,) float64, nats.

    Raises:
        ValueError: if an argument is out of range.
        FloatingPointError: if the demasker returns NaN.
    """
    num_answers, length = answer_ids.shape
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("the length of answers", length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    forms = 2**length - 1 if 2**length - 1 <= num_samples else None
    num_rows = forms or num_samples
    weights = form_weights(length) if forms else length / num_samples / torch.arange(length + 1).double()
    weights = weights.to(answer_ids.device)
    token_ids = torch.cat([prompt_ids, answer_ids], dim=1)
    values = []
    for rows in torch.arange(num_answers * num_rows, device=token_ids.device).split(batch_size):
        answer, sample = rows // num_rows, rows % num_rows
        masks = form_masks(sample, length) if forms else draw_masks(seeds[answer], sample, num_samples, length)
        is_masked = torch.cat([torch.zeros_like(prompt_ids[answer], dtype=torch.bool), masks], dim=1)
        clean = token_ids[answer]
        given = None if latents is None else latents[answer]
        nats, _ = demasker.nats(clean.masked_fill(is_masked, demasker.mask_token_id), clean, is_masked, given)
        values.append(-nats.double().sum(1) * weights[masks.sum(1)])
    return _checked(torch.cat(values).view(num_answers, num_rows).sum(1))


def form_masks(form: Tensor, length: int) -> Tensor:
    """The masked forms of an answer by number, from 0 to 2^L' - 2: (R,) int64 -> (R, L') bool, never all False."""
    return (form[:, None] + 1 >> torch.arange(length, device=form.device)) % 2 == 1


def form_weights(length: int) -> Tensor:
    """What a form with l masks counts in the bound, P(form) L'/l = 1 / (l binom(L', l)): (L' + 1,) float64, at l."""
    weights = [1 / (count * comb(length, count)) for count in range(1, length + 1)]
    return torch.tensor([0.0, *weights], dtype=torch.float64)


def draw_masks(seeds: Tensor, sample: Tensor, num_samples: int, length: int) -> Tensor:
    """The masks of Monte Carlo samples: l ~ U{1 .. L'}, then l of L' tokens without replacement.

    Over the samples of one seed l is stratified: l = 1 + floor(L' ((u + sample / num_samples) mod 1)), one u for all,
    so each sample by itself is uniform.

    Args:
        seeds: (R,) int64, of the answer that a row belongs to.
        sample: (R,) int64, number of the row among the samples of its answer, from 0.
        num_samples: samples of each answer.
        length: L'.

    Returns:
        (R, L') bool.
    """
    offset = RowNoise(seeds).uniform(STREAM_COUNT, 0, 1).squeeze(1)
    count = 1 + ((offset + sample.double() / num_samples) % 1.0 * length).long().clamp(max=length - 1)
    permutation = RowNoise(mix(seeds) + sample).uniform(STREAM_ORDER, 0, length).argsort(1)
    return permutation < count[:, None]


@torch.no_grad()
def is_greedy(demasker: Demasker, prompt_ids: Tensor, answer_ids: Tensor, batch_size: int = 32) -> Tensor:
    """Whether greedy decoding of L' tokens behind the prompt gives exactly the answer, (N,) bool.

    One token a call, the one the model is surest of (`suffix_greedy_prediction` in LLaDA's `get_log_likelihood.py`).
    A row is given up at its first token that is not the answer's.

    Args:
        demasker: f_theta.
        prompt_ids: (N, P) int64.
        answer_ids: (N, L') int64.
        batch_size: rows in one call.
    """
    batches = zip(prompt_ids.split(batch_size), answer_ids.split(batch_size), strict=True)
    return torch.cat([_agrees(demasker, prompts, answers) for prompts, answers in batches])


def _agrees(demasker: Demasker, prompt_ids: Tensor, answer_ids: Tensor) -> Tensor:
    """`is_greedy` of one batch: as long as a row agrees, what was decoded so far are tokens of its answer."""
    agrees = torch.ones(len(answer_ids), dtype=torch.bool, device=answer_ids.device)
    is_open = torch.ones_like(answer_ids, dtype=torch.bool)
    columns = torch.arange(answer_ids.shape[1], device=answer_ids.device) + prompt_ids.shape[1]
    for _ in range(answer_ids.shape[1]):
        rows = agrees.nonzero().squeeze(1)
        if not len(rows):
            break
        answers, hidden = answer_ids[rows], is_open[rows]
        canvas = torch.cat([prompt_ids[rows], answers.masked_fill(hidden, demasker.mask_token_id)], dim=1)
        logits = _written(demasker(canvas, positions=columns.expand(len(rows), -1)), demasker.mask_token_id)
        sureness, tokens = logits.softmax(-1).max(-1)
        surest = sureness.masked_fill(~hidden, -1.0).argmax(1, keepdim=True)
        agrees[rows] = (tokens == answers).gather(1, surest).squeeze(1)
        is_open[rows] = hidden.scatter(1, surest, False)
    return agrees


@torch.no_grad()
def score_single_tokens(
    demasker: Demasker, prompt_ids: Tensor, answer_ids: Tensor, batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """`log_likelihood` and `is_greedy` of answers of one token, both exact; answers to one prompt share one row.

    Args:
        demasker: f_theta.
        prompt_ids: (N, P) int64.
        answer_ids: (N, 1) int64.
        batch_size: distinct prompts in one call.

    Returns:
        (N,) float64, nats, and (N,) bool.

    Raises:
        FloatingPointError: if the demasker returns NaN.
    """
    canvases, which = F.pad(prompt_ids, (0, 1), value=demasker.mask_token_id).unique(dim=0, return_inverse=True)
    log_p = torch.empty(len(answer_ids), dtype=torch.float64, device=answer_ids.device)
    is_first = torch.empty(len(answer_ids), dtype=torch.bool, device=answer_ids.device)
    for start in range(0, len(canvases), batch_size):
        canvas = canvases[start : start + batch_size]
        logits = demasker(canvas, positions=torch.full_like(canvas[:, :1], prompt_ids.shape[1])).squeeze(1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        mine = ((which >= start) & (which < start + batch_size)).nonzero().squeeze(1)
        row, token = which[mine] - start, answer_ids[mine, 0]
        log_p[mine] = logits.log_softmax(-1)[row, token].double()
        is_first[mine] = _written(logits, demasker.mask_token_id).argmax(-1)[row] == token
    return _checked(log_p), is_first


def _written(logits: Tensor, mask_token_id: int) -> Tensor:
    """Logits in which the mask is impossible, float32 or wider: what a sampler writes from."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    logits[..., mask_token_id] = -torch.inf
    return logits


def _checked(log_p: Tensor) -> Tensor:
    if log_p.isnan().any():
        raise FloatingPointError(f"the demasker returned NaN for {int(log_p.isnan().sum())} of {len(log_p)} answers")
    return log_p
