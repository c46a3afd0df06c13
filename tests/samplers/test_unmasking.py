import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise, permutations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from crocodil.diffusion.masking import CosineMasking, LinearMasking, MaskingSchedule
from crocodil.diffusion.noise import RowNoise
from crocodil.samplers import MaskedSampler, StepEvent
from crocodil.samplers.unmasking import (
    LINEAR,
    RULES,
    Ancestral,
    Candidates,
    ConfidenceFactor,
    ConfidenceThreshold,
    EntropyBound,
    LowConfidence,
    LowEntropy,
    PathPlanning,
    RandomOrder,
    ReMDM,
    ScoredRule,
    TopKMargin,
    UnmaskingRule,
    late_last,
    make_rule,
    rank_scores,
    step_quotas,
)

MASK = 11  # of `make_demasker`
SCORED = ("low_confidence", "margin", "entropy", "threshold", "factor", "entropy_bound")
SCHEDULES = (LINEAR, LinearMasking(), LinearMasking(0.2), CosineMasking(), CosineMasking(0.1))

each_rule = pytest.mark.parametrize("name", RULES)


def random_open(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def random_order(is_open: Tensor, seed: int = 0) -> Tensor:
    uniform = RowNoise(torch.arange(len(is_open)) + seed).uniform(1, 0, is_open.shape[1])
    return uniform.masked_fill(~is_open, 2.0)


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("random", RandomOrder()),
        ("ancestral", Ancestral(LinearMasking(0.0))),
        ("low_confidence", LowConfidence()),
        ("margin", TopKMargin()),
        ("entropy", LowEntropy()),
        ("threshold", ConfidenceThreshold(0.9)),
        ("threshold:0.25", ConfidenceThreshold(0.25)),
        ("threshold:0", ConfidenceThreshold(0.0)),
        ("threshold:1", ConfidenceThreshold(1.0)),
        ("factor", ConfidenceFactor(1.0)),
        ("factor:2.5", ConfidenceFactor(2.5)),
        ("entropy_bound", EntropyBound(0.1)),
        ("entropy_bound:0", EntropyBound(0.0)),
        ("entropy_bound:1e-2", EntropyBound(0.01)),
        ("remdm_cap", ReMDM(0.02, "cap")),
        ("remdm_cap:0.5", ReMDM(0.5, "cap")),
        ("remdm_rescale", ReMDM(0.1, "rescale")),
        ("remdm_rescale:0.5", ReMDM(0.5, "rescale")),
        ("p2", PathPlanning(1.0)),
        ("p2:0", PathPlanning(0.0)),
        ("p2:3", PathPlanning(3.0)),
    ],
)
def test_rules_by_name(name: str, expected: UnmaskingRule) -> None:
    for rule in (make_rule(name), MaskedSampler(remasking=name).rule):
        assert type(rule) is type(expected)
        assert vars(rule) == vars(expected)
    assert MaskedSampler(remasking=expected).rule is expected


@each_rule
def test_every_name_makes_a_rule(name: str) -> None:
    assert isinstance(make_rule(name), UnmaskingRule)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", f"remasking must be one of {', '.join(RULES)}, got 'best'"),
        ("", f"remasking must be one of {', '.join(RULES)}, got ''"),
        ("Threshold:0.8", f"remasking must be one of {', '.join(RULES)}, got 'Threshold:0.8'"),
        ("random:3", "remasking random takes no number, got 'random:3'"),
        ("ancestral:0.1", "remasking ancestral takes no number, got 'ancestral:0.1'"),
        ("margin:2", "remasking margin takes no number, got 'margin:2'"),
        ("threshold:x", "remasking threshold takes a number behind the colon, its threshold, got 'threshold:x'"),
        ("factor:1:2", "remasking factor takes a number behind the colon, its factor, got 'factor:1:2'"),
        (
            "entropy_bound:a",
            "remasking entropy_bound takes a number behind the colon, its gamma, got 'entropy_bound:a'",
        ),
        ("remdm_cap:0,1", "remasking remdm_cap takes a number behind the colon, its eta, got 'remdm_cap:0,1'"),
        ("threshold:1.1", "threshold must be between 0 and 1, got 1.1"),
        ("threshold:-0.1", "threshold must be between 0 and 1, got -0.1"),
        ("threshold:nan", "threshold must be between 0 and 1, got nan"),
        ("factor:0", "factor must be above 0, got 0.0"),
        ("factor:-1", "factor must be above 0, got -1.0"),
        ("factor:nan", "factor must be above 0, got nan"),
        ("entropy_bound:-0.1", "gamma must not be negative, got -0.1"),
        ("entropy_bound:nan", "gamma must not be negative, got nan"),
        ("remdm_cap:1.5", "eta must be between 0 and 1, got 1.5"),
        ("remdm_rescale:-0.5", "eta must be between 0 and 1, got -0.5"),
        ("remdm_rescale:nan", "eta must be between 0 and 1, got nan"),
        ("p2:-1", "eta must not be negative, got -1.0"),
        ("p2:nan", "eta must not be negative, got nan"),
    ],
)
def test_bad_rules_are_refused_in_one_sentence(name: str, message: str) -> None:
    for make in (make_rule, lambda remasking: MaskedSampler(remasking=remasking)):
        with pytest.raises(ValueError) as refusal:
            make(name)
        assert str(refusal.value) == message


# Quotas


@pytest.mark.parametrize(("num_masked", "num_steps"), product([0, 1, 5, 8, 13], [1, 3, 8, 20]))
def test_step_quotas_are_equal_shares_with_the_remainder_first(num_masked: int, num_steps: int) -> None:
    quotas = step_quotas(torch.tensor([num_masked, 2 * num_masked]), num_steps)
    assert quotas.shape == (num_steps, 2)
    assert quotas.sum(0).tolist() == [num_masked, 2 * num_masked]
    assert (quotas.diff(dim=0) <= 0).all()
    assert (quotas.amax(0) - quotas.amin(0) <= 1).all()


@pytest.mark.parametrize(("num_masked", "num_steps"), product([0, 1, 5, 8, 13, 64], [1, 3, 5, 8, 20]))
def test_cosine_quotas_begin_small(num_masked: int, num_steps: int) -> None:
    """After step i cos(pi i / 2N) of the masks are left, rounded down, or fewer where each step must commit one."""
    quotas = step_quotas(torch.tensor([num_masked, 2 * num_masked]), num_steps, "cosine")
    assert quotas.shape == (num_steps, 2) and quotas.dtype == torch.int64 and (quotas >= 0).all()
    for row, count in enumerate((num_masked, 2 * num_masked)):
        left = count - quotas[:, row].cumsum(0)
        assert left[-1] == 0
        for i in range(1, num_steps + 1):
            share = math.floor(count * math.cos(math.pi * i / (2 * num_steps)))
            assert left[i - 1] == max(min(share, count - i), 0)


def test_cosine_quotas_of_one_token_a_step_are_the_linear_ones() -> None:
    num_open = torch.tensor([64, 40])
    assert torch.equal(step_quotas(num_open, 64, "cosine"), step_quotas(num_open, 64))
    assert step_quotas(torch.tensor([64]), 5, "cosine").flatten().tolist() == [4, 9, 14, 18, 19]


@pytest.mark.parametrize("rule", ["random", "low_confidence", "p2"])
def test_a_run_commits_what_its_schedule_says(make_demasker: Callable, rule: str) -> None:
    events: list[StepEvent] = []
    sampler = MaskedSampler(5, remasking=rule, temperature=1.0, unmasking_schedule="cosine")
    sampler.sample(make_demasker(), length=20, batch_size=3, on_step=events.append)
    masked = [(event.token_ids == MASK).sum(1) for event in events]
    quotas = step_quotas(torch.full((3,), 20), 5, "cosine")
    assert torch.equal(20 - torch.stack(masked), quotas.cumsum(0))


@pytest.mark.parametrize("name", ["ancestral", "remdm_cap", "remdm_rescale"])
def test_rules_with_a_noise_schedule_take_no_other(name: str) -> None:
    with pytest.raises(ValueError, match="must be linear under"):
        MaskedSampler(8, remasking=name, unmasking_schedule="cosine")


@each_rule
@pytest.mark.parametrize("num_steps", [1, 2, 7, 30])
def test_quotas_add_up_to_the_masks(name: str, num_steps: int) -> None:
    is_open = random_open(40, 9)
    is_open[0], is_open[1] = False, True
    rule = make_rule(name)
    quotas = rule.quotas(is_open.sum(1), num_steps, random_order(is_open))
    assert quotas.shape == (num_steps, 40)
    assert quotas.dtype == torch.int64
    assert (quotas >= 0).all()
    assert torch.equal(quotas.sum(0), is_open.sum(1))
    if not isinstance(rule, Ancestral):
        assert torch.equal(quotas, step_quotas(is_open.sum(1), num_steps))


def reveal_step(uniform: float, num_steps: int, schedule: MaskingSchedule) -> int:
    """The step of a mask whose number is `uniform`: at t it is masked if the number is below the mask probability."""
    times = [1 - i / num_steps for i in range(1, num_steps)]
    still_masked = [uniform < schedule(torch.tensor(t, dtype=torch.float64)).mask_prob.item() for t in times]
    return sum(still_masked)  # all are masked at 1, and none at 0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 25])
def test_ancestral_quotas_by_brute_force(schedule: MaskingSchedule, num_steps: int) -> None:
    is_open = random_open(60, 6)
    order = random_order(is_open)
    quotas = Ancestral(schedule).quotas(is_open.sum(1), num_steps, order)
    for row in range(60):
        steps = Counter(reveal_step(u, num_steps, schedule) for u in order[row, is_open[row]].tolist())
        assert quotas[:, row].tolist() == [steps[i] for i in range(num_steps)]


def test_a_number_at_the_mask_probability_is_not_masked() -> None:
    order = torch.tensor([[0.5, 0.25, 0.75, 2.0]], dtype=torch.float64)  # times 3/4, 1/2, 1/4
    assert Ancestral().quotas(torch.tensor([3]), 4, order).flatten().tolist() == [1, 1, 1, 0]


# Scores and counts


def test_rank_scores_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (200, 6), generator=generator).float()  # many ties
    allowed = random_open(200, 6)
    ranked, ranks = rank_scores(scores, allowed)
    for row in range(200):
        best = sorted((i for i in range(6) if allowed[row, i]), key=lambda i: (-scores[row, i].item(), i))
        assert ranked[row].tolist() == [scores[row, i].item() for i in best] + [-math.inf] * (6 - len(best))
        assert [ranks[row, i].item() for i in best] == list(range(len(best)))
        assert sorted(ranks[row].tolist()) == list(range(6))


def test_rank_scores_copes_with_infinite_scores() -> None:
    scores = torch.tensor([[-torch.inf, -torch.inf, 0.0, torch.inf]])
    ranked, ranks = rank_scores(late_last(scores, None), torch.tensor([[False, True, True, False]]))
    assert ranks[0, [2, 1]].tolist() == [0, 1]
    assert ranked.isfinite().sum() == 2  # what may be committed is told from what may not


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_late_positions_are_last_of_those_allowed(dtype: torch.dtype) -> None:
    scores = torch.tensor([[3.0, -torch.inf, 5.0, -1e30, torch.inf]], dtype=dtype)
    is_late = torch.tensor([[False, False, True, False, True]])
    moved = late_last(scores, is_late)
    assert moved[0, [0, 3]].tolist() == scores[0, [0, 3]].tolist()
    assert moved.isfinite().all()
    assert (moved[is_late] <= moved[~is_late].min()).all()
    assert scores[0, 2] == 5.0  # not written to


def plain_count(name: str, number: float, scores: list[float]) -> int:
    """How many positions an adaptive rule commits at least, of falling scores: log p(token) or minus the entropy."""
    fitting = [0]
    for n in range(1, len(scores) + 1):
        if name == "threshold":
            fits = math.exp(scores[n - 1]) >= number
        elif name == "factor":
            fits = (n + 1) * (1 - math.exp(scores[n - 1])) < number
        else:
            entropies = [-score for score in scores[:n]]
            fits = sum(entropies) - max(entropies) <= number
        if fits:
            fitting.append(n)
    return max(fitting)


ADAPTIVE = [
    *(("threshold", number) for number in (0.0, 0.3, 0.9, 1.0)),
    *(("factor", number) for number in (0.01, 0.5, 1.0, 2.0, 4.5)),
    *(("entropy_bound", number) for number in (0.0, 0.05, 0.5, 3.0)),
]


@pytest.mark.parametrize(("name", "number"), ADAPTIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_by_brute_force(name: str, number: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = 3 * torch.rand(300, 1, generator=generator, dtype=torch.float64) ** 3
    scores = (scale * torch.rand(300, 7, generator=generator, dtype=torch.float64).log()).to(dtype)
    scores[:60, 0], scores[:30, 1] = 0.0, 0.0  # certain tokens
    allowed = random_open(300, 7)
    ranked, _ = rank_scores(scores, allowed)
    quota = torch.randint(0, 3, (300,), generator=generator)
    rule = make_rule(f"{name}:{number}")
    assert isinstance(rule, ScoredRule)
    counts = torch.minimum(rule.count(ranked, quota), allowed.sum(1))
    plain = []
    for row in range(300):
        num_allowed = int(allowed[row].sum())
        enough = max(plain_count(name, number, ranked[row, :num_allowed].tolist()), int(quota[row]))
        plain.append(min(enough, num_allowed))
    assert counts.tolist() == plain
    assert len(set(plain)) > 2


def some_candidates(num_rows: int = 200, size: int = 6, **given: Any) -> Candidates:
    """Random candidates, some masked, some written and some neither, in float64."""
    generator = torch.Generator().manual_seed(0)
    scale = 8 * torch.rand(num_rows, size, 1, generator=generator, dtype=torch.float64)
    logits = scale * torch.randn(num_rows, size, 5, generator=generator, dtype=torch.float64)
    logits[..., 4] = -torch.inf
    kind = torch.randint(0, 3, (num_rows, size), generator=generator)
    is_open, is_written = kind == 0, kind == 1
    settings = {
        "logits": logits,
        "tokens": torch.randint(0, 4, (num_rows, size), generator=generator),
        "is_open": is_open,
        "is_written": is_written,
        "is_late": None,
        "quota": torch.minimum(torch.randint(0, 3, (num_rows,), generator=generator), is_open.sum(1)),
        "num_kept": torch.randint(0, size, (num_rows,), generator=generator),
        "uniform": RowNoise(torch.arange(num_rows)).uniform(1, 1, size),
        "now": 0.25,
        "after": 0.5,
    }
    return Candidates(**{**settings, **given})


@pytest.mark.parametrize("name", [*SCORED, "threshold:0", "factor:9", "entropy_bound:9", "p2", "p2:0"])
def test_late_tokens_are_committed_after_all_others(name: str) -> None:
    is_late = random_open(200, 6, seed=1)
    candidates = some_candidates(is_late=is_late)
    commit = make_rule(name).choose(candidates).commit
    assert not (commit & ~candidates.is_open).any()
    has_late, left = (commit & is_late).any(1), (candidates.is_open & ~is_late & ~commit).any(1)
    assert has_late.any()
    assert not (has_late & left).any()


def test_an_entropy_bound_never_counts_late_tokens_in() -> None:
    candidates = some_candidates(is_late=torch.ones(200, 6, dtype=torch.bool))
    assert torch.equal(EntropyBound(1e300).choose(candidates).commit.sum(1), candidates.quota)


# Runs at temperature 0, against what the papers say, as plainly as can be said


def plain_score(name: str, probabilities: list[float], token: int) -> float:
    best, second = sorted(probabilities, reverse=True)[:2]
    if name == "margin":
        return best - second
    if name.startswith("entropy"):
        return sum(p * math.log(p) for p in probabilities if p > 0)
    return math.log(probabilities[token])


def plain_step(
    remasking: str, text: list[int], ours: list[int], probabilities: list[list[float]], quota: int, num_left: int
) -> list[int]:
    """The text after one step: `quota` is the schedule's share, `num_left` what it leaves masked."""
    name, _, number = remasking.partition(":")
    is_open = [i for i in ours if text[i] == MASK]
    greedy = {i: max(range(MASK), key=probabilities[i].__getitem__) if i in is_open else text[i] for i in ours}
    scores = {i: plain_score(name, probabilities[i], greedy[i]) for i in ours}
    if name == "p2":
        weighted = {i: scores[i] if i in is_open else float(number) * scores[i] for i in ours}
        kept = sorted(ours, key=weighted.__getitem__, reverse=True)[: len(ours) - num_left]
        return [(greedy[i] if i in kept else MASK) if i in ours else text[i] for i in range(len(text))]
    best = sorted(is_open, key=scores.__getitem__, reverse=True)
    if number:
        least = min(max(1, len(is_open) - num_left), len(is_open))
        quota = max(least, plain_count(name, float(number), [scores[i] for i in best]))
    return [greedy[i] if i in best[:quota] else text[i] for i in range(len(text))]


def plain_run(demasker: Any, remasking: str, canvas: Tensor, num_steps: int) -> list[list[list[int]]]:
    """All rows after each of the steps."""
    texts = canvas.tolist()
    ours = [[i for i, token in enumerate(text) if token == MASK] for text in texts]
    runs = []
    for step in range(num_steps):
        shares = [[len(o) // num_steps + (i < len(o) % num_steps) for i in range(num_steps)] for o in ours]
        logits = demasker(torch.tensor(texts))
        logits[..., MASK] = -torch.inf
        probabilities = logits.softmax(-1).tolist()
        texts = [
            plain_step(remasking, text, mine, p, share[step], sum(share[step + 1 :]))
            for text, mine, p, share in zip(texts, ours, probabilities, shares, strict=True)
        ]
        runs.append(texts)
    return runs


def some_canvas(num_rows: int = 6, length: int = 9) -> Tensor:
    """Texts of which more than half is masked, each a little differently."""
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(0, MASK, (num_rows, length), generator=generator)
    return token_ids.masked_fill(torch.rand(num_rows, length, generator=generator) < 0.75, MASK)


@pytest.mark.parametrize(
    "remasking",
    [
        *("low_confidence", "margin", "entropy", "p2:0", "p2:0.3", "p2:1", "p2:4"),
        *("threshold:0", "threshold:0.6", "threshold:1", "factor:0.5", "factor:1.2"),
        *("entropy_bound:0", "entropy_bound:1.5"),
    ],
)
@pytest.mark.parametrize("num_steps", [1, 3, 9])
@torch.no_grad()
def test_greedy_runs_are_those_of_a_plain_loop(make_demasker: Callable, remasking: str, num_steps: int) -> None:
    demasker, canvas, seen = make_demasker(latent_dim=None), some_canvas(), {}

    def watch(event: StepEvent) -> None:
        seen[event.index] = event.token_ids.tolist()

    MaskedSampler(num_steps, remasking=remasking).fill(demasker, canvas, on_step=watch)
    runs = plain_run(demasker, remasking, canvas, num_steps)
    for step, texts in enumerate(runs):
        assert seen.get(step, runs[-1]) == texts  # steps that are left out come after the end
    assert not any(MASK in text for text in runs[-1])


# Exact laws


def marginal(table: Tensor, kept: set[int]) -> Tensor:
    summed = [axis for axis in range(table.ndim) if axis not in kept]
    return table.sum(summed, keepdim=True) if summed else table


def law_of_groups(table: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """The law of texts whose tokens are written group by group, independently within a group."""
    law, known = torch.ones_like(table), set[int]()
    for group in groups:
        for position in group:
            law = law * marginal(table, known | {position}) / marginal(table, known)
        known |= set(group)
    return law


def random_law(table: Tensor, num_steps: int) -> Tensor:
    """All orders alike, cut into equal shares with the remainder first."""
    length = table.ndim
    shares = [length // num_steps + (i < length % num_steps) for i in range(num_steps)]
    ends = [sum(shares[:i]) for i in range(num_steps + 1)]
    laws = [law_of_groups(table, [order[a:b] for a, b in pairwise(ends)]) for order in permutations(range(length))]
    return torch.stack(laws).mean(0)


def ancestral_law(table: Tensor, step_shares: Sequence[float]) -> Tensor:
    """Each position is written in a step of its own, which is i with probability `step_shares[i]`."""
    orders = Counter[tuple[int, ...]]()
    for steps in product(range(len(step_shares)), repeat=table.ndim):
        places = sorted(set(steps))
        orders[tuple(places.index(step) for step in steps)] += math.prod(step_shares[step] for step in steps)  # type: ignore[assignment]
    laws = [
        share * law_of_groups(table, [[i for i, s in enumerate(places) if s == step] for step in range(table.ndim)])
        for places, share in orders.items()
    ]
    return torch.stack(laws).sum(0)


def linear_law(table: Tensor, num_steps: int) -> Tensor:
    return ancestral_law(table, [1 / num_steps] * num_steps)


def step_shares(schedule: MaskingSchedule, num_steps: int) -> list[float]:
    """Probability of each reveal step: all are masked at 1, none at 0."""
    times = torch.tensor([1 - i / num_steps for i in range(1, num_steps)], dtype=torch.float64)
    masked = [1.0, *schedule(times).mask_prob.tolist(), 0.0]
    return [before - after for before, after in pairwise(masked)]


def distance(law: Tensor, other: Tensor) -> float:
    """Total variation."""
    return (law - other).abs().sum().item() / 2


@pytest.fixture
def toy(tabulated_demasker: Callable) -> Any:
    """A joint of three dependent ternary tokens: equal neighbours are five times as probable."""
    table = 0.5 + torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    equal = torch.eye(3, dtype=torch.float64)
    return tabulated_demasker(table * (1 + 4 * equal[:, :, None]) * (1 + 4 * equal[None]))


@pytest.fixture
def independent(tabulated_demasker: Callable) -> Any:
    """Three independent ternary tokens."""
    one, two, three = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2]], dtype=torch.float64)
    return tabulated_demasker(one[:, None, None] * two[:, None] * three)


def text_counts(model: Any, sampler: MaskedSampler, size: int = 6000, **given: Any) -> Tensor:
    """How often each text (V^L,) is drawn, in the order of the model's states."""
    noise = RowNoise(torch.arange(size))
    out = sampler.sample(model, length=model.table.ndim, batch_size=size, generator=noise, **given)
    counts = (out.token_ids[:, None] == model.states).all(-1).sum(0)
    assert counts.sum() == size
    return counts


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_random_order_has_its_exact_law(toy: Any, chi_square: Callable, num_steps: int) -> None:
    law = random_law(toy.table, min(num_steps, 3))
    counts = text_counts(toy, MaskedSampler(num_steps, remasking="random", temperature=1.0))
    assert chi_square(counts, law.flatten()) > 1e-3
    if num_steps >= 3:  # one token a step
        torch.testing.assert_close(law, toy.table)
    else:
        assert chi_square(counts, toy.joint) < 1e-9


@pytest.mark.parametrize("num_steps", [1, 2, 3, 12])
def test_ancestral_sampling_has_its_exact_law(toy: Any, chi_square: Callable, num_steps: int) -> None:
    counts = text_counts(toy, MaskedSampler(num_steps, remasking="ancestral", temperature=1.0))
    assert chi_square(counts, linear_law(toy.table, num_steps).flatten()) > 1e-3
    if num_steps <= 3:
        assert chi_square(counts, toy.joint) < 1e-9  # the factorisation error
        assert chi_square(counts, linear_law(toy.table, num_steps + 3).flatten()) < 1e-3


@pytest.mark.parametrize("schedule", [CosineMasking(), LinearMasking(0.4)], ids=str)
def test_ancestral_sampling_follows_its_schedule(toy: Any, chi_square: Callable, schedule: MaskingSchedule) -> None:
    counts = text_counts(toy, MaskedSampler(3, remasking=Ancestral(schedule), temperature=1.0), 10_000)
    assert chi_square(counts, ancestral_law(toy.table, step_shares(schedule, 3)).flatten()) > 1e-3
    assert chi_square(counts, linear_law(toy.table, 3).flatten()) < 1e-3


def test_the_factorisation_error_vanishes_with_the_number_of_steps(toy: Any) -> None:
    singles = [toy.table.sum([axis for axis in range(3) if axis != kept]) for kept in range(3)]
    product_of_marginals = torch.einsum("a,b,c->abc", *singles)
    torch.testing.assert_close(linear_law(toy.table, 1), product_of_marginals)
    distances = [distance(linear_law(toy.table, num_steps), toy.table) for num_steps in (1, 2, 4, 8, 16, 32)]
    assert distances[0] > 0.1
    for coarse, fine in pairwise(distances):
        assert 0.45 < fine / coarse < 0.7  # as 1 / N in the end
    assert distances[-1] < 0.02


@pytest.mark.parametrize("num_steps", [2, 3])
@pytest.mark.parametrize("schedule", [LINEAR, CosineMasking()], ids=["linear", "cosine"])
def test_remdm_without_remasking_is_ancestral(
    toy: Any, chi_square: Callable, num_steps: int, schedule: MaskingSchedule
) -> None:
    rule = ReMDM(0.0, noise_schedule=schedule)
    counts = text_counts(toy, MaskedSampler(num_steps, remasking=rule, temperature=1.0))
    assert chi_square(counts, ancestral_law(toy.table, step_shares(schedule, num_steps)).flatten()) > 1e-3


def mask_patterns(is_masked: Tensor) -> Tensor:
    """How many rows of (B, L) have each of the 2^L patterns."""
    return (is_masked * 2 ** torch.arange(is_masked.shape[1])).sum(1).bincount(minlength=2 ** is_masked.shape[1])


def bernoulli_patterns(share: float, length: int) -> Tensor:
    masks = torch.tensor([bin(pattern).count("1") for pattern in range(2**length)])
    return share**masks * (1 - share) ** (length - masks)


@pytest.mark.parametrize("strategy", ["cap", "rescale"])
@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [LINEAR, LinearMasking(0.1)], ids=["linear", "eps"])
def test_remdm_keeps_the_share_of_masks_and_the_law_of_the_texts(
    independent: Any, chi_square: Callable, strategy: Any, eta: float, schedule: MaskingSchedule
) -> None:
    events: list[StepEvent] = []
    rule, size = ReMDM(eta, strategy, schedule), 6000
    sampler = MaskedSampler(5, remasking=rule, temperature=1.0)
    counts = text_counts(independent, sampler, size, on_step=events.append)
    assert chi_square(counts, independent.joint) > 1e-3
    assert len(events) == 5

    times = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
    masked = [*schedule(times).mask_prob.tolist(), 0.0]
    was_masked = torch.ones(size, 3, dtype=torch.bool)
    num_remasked = 0
    for event, (masked_t, masked_s) in zip(events, pairwise(masked), strict=True):
        is_masked = event.token_ids == independent.mask_token_id
        assert torch.equal(event.remasked, is_masked & ~was_masked)
        if masked_s:
            assert chi_square(mask_patterns(is_masked), bernoulli_patterns(masked_s, 3)) > 1e-3
        most = min(1.0, masked_s / (1 - masked_t)) if masked_t < 1 else 1.0
        sigma = min(eta, most) if strategy == "cap" else eta * most
        again = torch.tensor([(~is_masked & ~was_masked).sum(), event.remasked.sum()])
        if not again.sum() or sigma in (0, 1):
            assert again[int(sigma != 1)] == 0 or not again.sum()
        else:
            assert chi_square(again, torch.tensor([1 - sigma, sigma])) > 1e-3
        num_remasked += int(event.remasked.sum())
        was_masked = is_masked
    assert not was_masked.any()
    assert (num_remasked > 0) == (eta > 0)


# Path planning


def watched_run(demasker: Any, sampler: MaskedSampler, canvas: Tensor, seed: int = 0) -> list[StepEvent]:
    events: list[StepEvent] = []
    sampler.fill(demasker, canvas, generator=RowNoise(torch.arange(len(canvas)) + seed), on_step=events.append)
    return events


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("num_steps", [1, 3, 9, 14])
def test_path_planning_keeps_to_its_schedule(
    make_demasker: Callable, temperature: float, eta: float, num_steps: int
) -> None:
    canvas = some_canvas()
    sampler = MaskedSampler(num_steps, remasking=PathPlanning(eta), temperature=temperature)
    events = watched_run(make_demasker(), sampler, canvas)
    num_masked = (canvas == MASK).sum(1)
    planned = step_quotas(num_masked, num_steps).cumsum(0)
    assert [event.index for event in events] == list(range(num_steps))
    for event, num_unmasked in zip(events, planned, strict=True):
        assert torch.equal((event.token_ids == MASK).sum(1), num_masked - num_unmasked)
        if eta == 0:
            assert not event.remasked.any()


@pytest.mark.parametrize("num_steps", [1, 3, 9, 14])
def test_path_planning_with_eta_zero_is_low_confidence(make_demasker: Callable, num_steps: int) -> None:
    demasker, canvas = make_demasker(), some_canvas(30)
    runs = {}
    for name in ("p2:0", "p2:3", "low_confidence"):
        events = watched_run(demasker, MaskedSampler(num_steps, remasking=name), canvas)
        runs[name] = [event.token_ids.tolist() for event in events]
        assert any(event.remasked.any() for event in events) == (name == "p2:3" and num_steps > 1)
    steps = len(runs["low_confidence"])
    assert runs["p2:0"][:steps] == runs["low_confidence"]
    assert all(texts == runs["low_confidence"][-1] for texts in runs["p2:0"][steps:])


def test_path_planning_with_eta_zero_keeps_what_is_written_among_certain_tokens(tabulated_demasker: Callable) -> None:
    # The first two tokens are both the exclusive or of the others, which are the surest and written first.
    table = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    for a, b in product(range(2), repeat=2):
        table[a ^ b, a ^ b, a, b] = (0.7, 0.3)[a] * (0.6, 0.4)[b]
    canvas = torch.full((1, 4), 2)
    for name in ("p2:0", "low_confidence"):
        events = watched_run(tabulated_demasker(table), MaskedSampler(3, remasking=name), canvas)
        assert [event.token_ids[0].tolist() for event in events] == [[2, 2, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]]


# All rules


@pytest.mark.parametrize("name", [*RULES, "remdm_cap:1", "p2:5", "threshold:0.2", "entropy_bound:1"])
@pytest.mark.parametrize(("num_steps", "block_size"), [(4, None), (14, None), (6, 3)])
def test_only_masks_of_the_block_are_written_and_masked_again(
    make_demasker: Callable, name: str, num_steps: int, block_size: int | None
) -> None:
    canvas = some_canvas()
    sampler = MaskedSampler(num_steps, block_size, name, temperature=1.0)
    events = watched_run(make_demasker(), sampler, canvas)
    width, before = block_size or 9, canvas
    steps_per_block = num_steps // (9 // width)
    for event in events:
        block = event.index // steps_per_block
        may_change = torch.zeros_like(canvas, dtype=torch.bool)
        may_change[:, block * width : (block + 1) * width] = True
        may_change &= canvas == MASK
        assert not ((event.committed | event.remasked) & ~may_change).any()
        assert torch.equal(event.committed, (before == MASK) & (event.token_ids != MASK))
        assert torch.equal(event.remasked, (before != MASK) & (event.token_ids == MASK))
        kept = ~event.committed & ~event.remasked
        assert torch.equal(event.token_ids[kept], before[kept])
        before = event.token_ids
    assert (before != MASK).all()


@pytest.mark.parametrize("name", ["remdm_cap:1", "remdm_rescale:1", "p2:5"])
def test_prompts_are_never_masked_again(make_demasker: Callable, name: str) -> None:
    prompts = [torch.tensor([3, 1, 4]), torch.tensor([5]), torch.tensor([2, MASK, 7, 1])]
    events: list[StepEvent] = []
    sampler = MaskedSampler(12, 3, name, temperature=1.0)
    noise = RowNoise(torch.arange(3))
    out = sampler.sample(
        make_demasker(), length=6, batch_size=3, prompt_ids=prompts, generator=noise, on_step=events.append
    )
    assert any(event.remasked.any() for event in events)
    for token_ids in [event.token_ids for event in events] + [out.token_ids]:
        for row, prompt in zip(token_ids, prompts, strict=True):
            given = prompt != MASK
            assert torch.equal(row[: len(prompt)][given], prompt[given])
            assert (row[len(prompt) + 6 :] == 0).all()
    assert (out.token_ids != MASK).all()
