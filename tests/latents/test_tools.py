from copy import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crocodil.data.codec import TextCodec
from crocodil.diffusion.masking import token_cross_entropy
from crocodil.evaluation.page import mark_differences
from crocodil.latents.page import save_page
from crocodil.latents.tools import (
    RegisterCount,
    by_register_count,
    cosine,
    interpolate,
    mix,
    nearest,
    register_effects,
    text_blocks,
    top_k,
)
from crocodil.pipeline import CrocodilPipeline

FIRST = "def f(v0, v1):\n    return v0 + v1\n"
SECOND = "def f(self):\n    if self.a0:\n        return None\n    return self.a1[0]\n"
LENGTH = 32
WRITTEN = EOS, V0, PLUS = (0, 116, 57)


@pytest.fixture(scope="module")
def pipeline(make_demasker: Any, make_encoder: Any) -> CrocodilPipeline:
    """Random networks over the canonical vocabulary, K = 4, D = 3, float64, that write few tokens: some are right."""
    demasker = make_demasker(mask_token_id=2, vocab_size=152)
    head = demasker.network.get_output_embeddings().weight.data
    head[[i for i in range(152) if i not in WRITTEN]] = 0
    head[EOS] *= 0.5  # a text needs some tokens
    return CrocodilPipeline(demasker, TextCodec.canonical(), make_encoder(vocab_size=152))


@pytest.fixture(scope="module")
def blocks(pipeline: CrocodilPipeline) -> Tensor:
    """A corpus of 23 texts, two of them twice."""
    texts = [f"def f(v0):\n    return v0{' + v0' * n} - {last}\n" for n in range(7) for last in ("1", "2", "9")]
    return text_blocks(pipeline, [*texts, texts[3], texts[8]], LENGTH)


def ends(seed: int = 0, registers: int = 4, size: int = 5) -> tuple[Tensor, Tensor]:
    """Two latents of different norms, (K, D) float64."""
    noise = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, registers, size, generator=noise, dtype=torch.float64)
    return first, second * torch.rand(registers, 1, generator=noise, dtype=torch.float64).add(0.5)


# the way between two latents


@pytest.mark.parametrize("kind", ["slerp", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_are_exact(kind: Any, dtype: torch.dtype) -> None:
    first, second = (end.to(dtype) for end in ends())
    both = mix(first, second, torch.tensor([0.0, 1.0]), kind)
    assert both.dtype == dtype and torch.equal(both, torch.stack([first, second]))


def test_slerp_keeps_the_norm_of_every_register_and_linear_does_not() -> None:
    first, second = ends()
    weights = torch.linspace(0, 1, 9, dtype=torch.float64)
    straight = torch.lerp(first.norm(dim=1), second.norm(dim=1), weights[:, None])
    torch.testing.assert_close(mix(first, second, weights).norm(dim=2), straight)
    assert (mix(first, second, weights, "linear").norm(dim=2)[1:-1] < straight[1:-1]).all()


def test_slerp_turns_every_register_at_an_even_pace_in_its_own_plane() -> None:
    first, second = ends(1)
    way = mix(first, second, torch.linspace(0, 1, 7, dtype=torch.float64))
    units = way / way.norm(dim=2, keepdim=True)
    angles = (units[1:] * units[:-1]).sum(2).acos()
    torch.testing.assert_close(angles, angles[:1].expand(6, -1))
    whole = (units[-1] * units[0]).sum(1).acos()
    torch.testing.assert_close(angles.sum(0), whole)
    assert whole.max() > 1.2 * whole.min()  # else one angle for all registers would pass, too


def test_the_middle_is_as_far_from_one_end_as_from_the_other() -> None:
    first, second = ends(2)
    middle = mix(first, second, torch.tensor([0.5]))[0]
    for k in range(4):
        near = [torch.cosine_similarity(middle[k], end[k], dim=0) for end in (first, second)]
        torch.testing.assert_close(near[0], near[1])
        assert near[0] > torch.cosine_similarity(first[k], second[k], dim=0)


def test_linear_loses_half_of_the_variance_in_the_middle() -> None:
    first, second = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0))
    middle = torch.tensor([0.5])
    assert mix(first, second, middle, "linear").var().item() == pytest.approx(0.5, rel=0.02)
    assert mix(first, second, middle, "slerp").var().item() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("factor", [1.0, 1.0 + 1e-9, 2.0, -1.0])
def test_parallel_registers_are_mixed_linearly(factor: float) -> None:
    """One register on which two texts agree stays as it is, whatever the others do."""
    first, second = ends(3)
    second[1] = factor * first[1]
    way = mix(first, second, torch.tensor([0.25, 0.5]))
    if factor > 0:
        torch.testing.assert_close(way[:, 1], torch.lerp(first[1], second[1], torch.tensor([[0.25], [0.5]]).double()))
    assert way.isfinite().all()


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of slerp, linear, got 'cubic'"):
        mix(*ends(), torch.tensor([0.5]), "cubic")  # type: ignore[arg-type]


# texts on the way


@pytest.mark.parametrize("kind", ["slerp", "linear"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "remasking": "random", "seed": 5}])
def test_at_the_ends_are_the_reconstructions(kind: Any, settings: dict[str, Any], pipeline: CrocodilPipeline) -> None:
    """Of either text, as if it alone were written, with the same random numbers."""
    points = interpolate(pipeline, FIRST, SECOND, 4, kind, 8, length=LENGTH, **settings)
    for text, point in ((FIRST, points[0]), (SECOND, points[-1])):
        alone = pipeline.reconstruct(text_blocks(pipeline, [text], LENGTH), 8, **settings)
        row = alone.token_ids[0].tolist()
        end = row.index(0) if 0 in row else LENGTH
        assert point.text == alone.texts[0]
        assert point.token_ids.tolist() == row[:end] + [0] * (LENGTH - end)


def test_points_tell_where_they_are_and_where_their_texts_are(pipeline: CrocodilPipeline) -> None:
    points = interpolate(pipeline, FIRST, SECOND, 5, num_steps=8, length=LENGTH)
    latents = pipeline.encoder(text_blocks(pipeline, [FIRST, SECOND], LENGTH))  # type: ignore[misc]
    assert [point.weight for point in points] == [0, 0.25, 0.5, 0.75, 1]
    assert points[0].cosine_first == pytest.approx(1) and points[-1].cosine_second == pytest.approx(1)
    assert points[0].cosine_second == pytest.approx(cosine(latents[:1], latents[1:]).item())
    assert all(a.cosine_first > b.cosine_first for a, b in pairwise(points))
    for point in points:
        read = pipeline.encoder(point.token_ids[None])  # type: ignore[misc]
        assert point.text_cosine_first == pytest.approx(cosine(read, latents[:1]).item())
        assert point.text_cosine_second == pytest.approx(cosine(read, latents[1:]).item())
    assert len({point.text for point in points}) > 1


def test_texts_end_at_any_stop_token(pipeline: CrocodilPipeline) -> None:
    demasker = copy(pipeline.demasker)
    demasker.conventions = replace(demasker.conventions, stop_token_ids=(PLUS,))
    stopping = CrocodilPipeline(demasker, pipeline.codec, pipeline.encoder)
    first, *_, last = interpolate(stopping, FIRST, SECOND, 3, length=LENGTH)
    for text, point in ((FIRST, first), (SECOND, last)):
        written = stopping.reconstruct(text_blocks(pipeline, [text], LENGTH))
        row = written.token_ids[0].tolist()
        end = row.index(PLUS)
        assert point.token_ids.tolist() == row[: end + 1] + [EOS] * (LENGTH - end - 1)
        assert point.text == written.texts[0] and "+" not in point.text


def test_points_share_their_random_numbers(pipeline: CrocodilPipeline) -> None:
    points = interpolate(pipeline, FIRST, FIRST, 3, num_steps=8, length=LENGTH, temperature=1.0)
    assert len({point.text for point in points}) == 1
    others = interpolate(pipeline, FIRST, FIRST, 2, num_steps=8, length=LENGTH, temperature=1.0, seed=1)
    assert others[0].text != points[0].text


# neighbours


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("count", [1, 4, 50])
def test_a_running_top_k_is_that_of_the_whole(size: int, count: int) -> None:
    """Scores with many ties: of equals the first come first."""
    scores = torch.randint(5, (40,), generator=torch.Generator().manual_seed(0)).double()
    order = sorted(range(40), key=lambda i: (-scores[i].item(), i))[:count]
    best, places = top_k(scores.split(size), count)
    assert places.tolist() == order and best.tolist() == scores[order].tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 23, 64])
@pytest.mark.parametrize("num_registers", [None, 1, 3])
def test_neighbours_are_those_of_brute_force(
    batch_size: int, num_registers: int | None, pipeline: CrocodilPipeline, blocks: Tensor
) -> None:
    latents = pipeline.encoder(torch.cat([text_blocks(pipeline, [SECOND], LENGTH), blocks]))  # type: ignore[misc]
    flat = latents[:, :num_registers].detach().flatten(1)
    expected = flat[1:] @ flat[0] / (flat[1:].norm(dim=1) * flat[0].norm())
    found = nearest(pipeline, SECOND, blocks, 9, batch_size, num_registers)
    assert [one.cosine for one in found] == pytest.approx(expected.sort(descending=True).values[:9].tolist())
    assert all(one.cosine == pytest.approx(expected[one.index].item()) for one in found)
    assert all(torch.equal(one.token_ids, blocks[one.index]) for one in found)
    assert all(one.text == pipeline.codec.decode(one.token_ids) for one in found)


def test_a_text_of_the_corpus_is_its_own_neighbour(pipeline: CrocodilPipeline, blocks: Tensor) -> None:
    for index in (0, 10, 20):
        found = nearest(pipeline, pipeline.codec.decode(blocks[index]), blocks, 1)[0]
        assert found.index == index and found.cosine == pytest.approx(1)
    again = nearest(pipeline, pipeline.codec.decode(blocks[3]), blocks, 2, batch_size=64)
    assert {one.index for one in again} == {3, 21} and again[1].cosine == pytest.approx(1)


def test_latents_have_neighbours_too(pipeline: CrocodilPipeline, blocks: Tensor) -> None:
    """Drawn ones, or a prefix of registers."""
    latents = pipeline.encoder(text_blocks(pipeline, [FIRST], LENGTH))[0].detach()  # type: ignore[misc]
    calls: list[tuple[str, int, int]] = []
    for count in (4, 2):
        by_latents = nearest(pipeline, latents[:count], blocks, 3, 10, progress=lambda *call: calls.append(call))
        by_text = nearest(pipeline, FIRST, blocks, 3, 10, count)
        assert [one.index for one in by_latents] == [one.index for one in by_text]
    assert calls[:3] == [("encoder", 10, 23), ("encoder", 20, 23), ("encoder", 23, 23)]


# what registers hold


@pytest.mark.parametrize("given", [{}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guided_by": "prompt"}])
def test_each_count_of_registers_reconstructs_as_if_alone(given: dict[str, Any], pipeline: CrocodilPipeline) -> None:
    """And its accuracy counts the source from behind its start token through its end."""
    text = "v0 + v0 v0 v0 + + v0 v0 +"
    block = text_blocks(pipeline, [text], LENGTH)
    source, end = block[0].tolist(), block[0].tolist().index(0)
    settings = {"temperature": 0.5, "seed": 2, **given}
    steps = by_register_count(pipeline, text, [4, 1, 3], 8, length=LENGTH, **settings)
    assert [step.num_registers for step in steps] == [1, 3, 4]
    before: set[int] = set()
    for step in steps:
        alone = pipeline.reconstruct(block, 8, num_registers=step.num_registers, **settings)
        assert torch.equal(step.token_ids, alone.token_ids[0]) and step.text == alone.texts[0]
        right = {i for i in range(1, end + 1) if step.token_ids[i] == source[i]}
        assert step.token_accuracy == pytest.approx(len(right) / end)
        assert set(step.is_right.nonzero().flatten().tolist()) == right
        assert set(step.is_gained.nonzero().flatten().tolist()) == right - before
        before = right


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("other", [None, SECOND])
def test_effects_are_those_of_one_register_at_a_time(
    batch_size: int, other: str | None, pipeline: CrocodilPipeline
) -> None:
    effects = register_effects(pipeline, FIRST, other, length=LENGTH, batch_size=batch_size)
    blocks = text_blocks(pipeline, [FIRST, SECOND], LENGTH)
    masked, (own, strange) = torch.full((1, LENGTH), 2), pipeline.encoder(blocks)  # type: ignore[misc]
    whole = token_cross_entropy(pipeline.demasker(masked, own[None]), blocks[:1])[0]
    torch.testing.assert_close(effects.nats, whole)
    assert effects.rises.shape == (4, LENGTH) and torch.equal(effects.token_ids, blocks[0])
    for k in range(4):
        latents, is_heard = own.clone()[None], torch.ones(1, 4)
        if other is None:
            is_heard[0, k] = 0
        else:
            latents[0, k] = strange[k]
        nats = token_cross_entropy(pipeline.demasker(masked, latents, latent_mask=is_heard), blocks[:1])[0]
        torch.testing.assert_close(effects.rises[k], nats - whole, atol=1e-5, rtol=1e-5)
        assert (nats - whole).abs().max() > 1e-3


# what users get wrong


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: interpolate(pipe, FIRST, SECOND, 1), "num_points must be at least 2, the two ends, got 1"),
        (lambda pipe: interpolate(pipe, FIRST, SECOND, length=8), "a text must have at most 7 tokens, got 15 in 'def"),
        (lambda pipe: interpolate(pipe, FIRST, SECOND, length=65), "length must be between 2 and 64, .* got 65"),
        (lambda pipe: interpolate(pipe, FIRST, SECOND, seed=2**31), "seed must be at least -2.31"),
        (lambda pipe: interpolate(pipe, FIRST, SECOND, steps=3), "there is no setting steps"),
        (lambda pipe: interpolate(pipe, FIRST, "a + b"), "got the token 'a'"),
        (lambda pipe: by_register_count(pipe, FIRST, [0, 2]), r"between 1 and 4, got \[0, 2\]"),
        (lambda pipe: by_register_count(pipe, FIRST, [5]), r"between 1 and 4, got \[5\]"),
        (lambda pipe: by_register_count(pipe, FIRST, []), r"between 1 and 4, got \[\]"),
        (lambda pipe: register_effects(pipe, FIRST, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda pipe: nearest(pipe, FIRST, torch.zeros(2, 32).long(), 0), "num_neighbours .* got 0"),
        (lambda pipe: nearest(pipe, FIRST, torch.zeros(2, 32).long(), num_registers=5), "between 1 and the query's 4"),
        (lambda pipe: nearest(pipe, torch.zeros(5, 3), torch.zeros(2, 32).long()), r"\(1 to 4, 3\), got \(5, 3\)"),
        (lambda pipe: nearest(pipe, torch.zeros(12), torch.zeros(2, 32).long()), r"\(1 to 4, 3\), got \(12,\)"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(call: Any, message: str, pipeline: CrocodilPipeline) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(pipeline)
    assert "\n" not in str(error.value)


def test_registers_need_an_encoder(pipeline: CrocodilPipeline) -> None:
    plain = CrocodilPipeline(pipeline.demasker, pipeline.codec)
    with pytest.raises(ValueError, match="this needs a pipeline with an encoder, but this one has none"):
        interpolate(plain, FIRST, SECOND)


# the page


HOSTILE = "<script>alert(1)</script>\"' onload=alert(2) </pre>&amp;"


class HostileCodec(TextCodec):
    """Shows every token, and every text, as an attack."""

    def pieces(self, token_ids: Any) -> list[str]:
        return [HOSTILE for _ in token_ids]

    def decode(self, token_ids: Any) -> str:
        return f"{HOSTILE} {len(list(token_ids))}"


@pytest.fixture(scope="module")
def page(pipeline: CrocodilPipeline, blocks: Tensor, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Everything a page can show, of texts that attack it."""
    codec = HostileCodec(pipeline.codec.tokenizer, "canonical")
    hostile = CrocodilPipeline(pipeline.demasker, codec, pipeline.encoder)
    path: Path = tmp_path_factory.mktemp("page") / "latents.html"
    found = nearest(hostile, FIRST, blocks, 3)
    save_page(
        path,
        HOSTILE,
        hostile,
        interpolation=interpolate(hostile, FIRST, SECOND, 3, length=LENGTH),
        counts=by_register_count(hostile, FIRST, length=LENGTH),
        effects=register_effects(hostile, FIRST, length=LENGTH),
        changed=HOSTILE,
        neighbours=[(HOSTILE, one) for one in found],
        query=HOSTILE,
    )
    return path.read_text()


def test_the_page_escapes_every_text(page: str) -> None:
    assert "<script" not in page and "</pre>&amp;amp;" not in page and "' onload" not in page
    assert page.count("&lt;script&gt;") > 80
    assert page.count("<pre>") == page.count("</pre>") == 3 + 4 + 4 + 4


def test_the_page_needs_no_network_and_runs_nothing(page: str) -> None:
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page
    for forbidden in ("http:", "https:", "src=", "href=", "url(", "@import", "javascript:"):
        assert forbidden not in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_colours_tokens_by_the_probability_they_lose(pipeline: CrocodilPipeline, tmp_path: Path) -> None:
    effects = register_effects(pipeline, FIRST, length=LENGTH)
    effects.rises[:] = 0
    effects.rises[2, 1] = torch.log(torch.tensor(4.0))
    effects.rises[3, 0] = -torch.log(torch.tensor(2.0))
    save_page(tmp_path / "page.html", "", pipeline, effects=effects)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<rect") == 2 and page.count("<span title=") == 4 * 17
    assert '<rect x="50" y="26" width="17" height="12" style="fill: rgb(var(--told) / 0.75)"/>' in page
    assert '<span title="+1.39 nats" style="background: rgb(var(--told) / 0.75)">def </span>' in page
    assert '<rect x="32" y="39" width="17" height="12" style="fill: rgb(var(--misled) / 0.5)"/>' in page


def test_the_page_marks_tokens_that_became_right(pipeline: CrocodilPipeline, tmp_path: Path) -> None:
    ids = text_blocks(pipeline, ["def f(): pass"], 9)[0]
    ids[2] = ids[1]
    is_right = torch.tensor([0, 1, 0, 1, 1, 1, 1, 1, 0]).bool()
    step = RegisterCount(2, "", ids, 0.75, is_right, is_right & (torch.arange(9) == 3))
    save_page(tmp_path / "page.html", "", pipeline, counts=[step])
    shown = (tmp_path / "page.html").read_text()
    assert "First 2 <small>75 % of tokens" in shown
    assert "<pre><span>\u00b7</span><span>def </span>" in shown
    assert '<span class="wrong">def </span><span class="gained">( </span><span>) </span>' in shown


def test_sections_without_content_are_left_out(pipeline: CrocodilPipeline, tmp_path: Path) -> None:
    points = interpolate(pipeline, FIRST, SECOND, 3, length=LENGTH)
    save_page(tmp_path / "page.html", "a <b>", pipeline, interpolation=points)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<section>") == page.count("<h2>") == 1 and page.count("<polyline") == 4
    assert "<h1>a &lt;b&gt;</h1>" in page
    cards = page.split("<article")[1:]
    for card, before, point in zip(cards, [points[0], *points], points, strict=False):
        assert f"<pre>{mark_differences(before.text, point.text)[1]}</pre>" in card
    assert len({point.text for point in points}) > 1 and "<mark>" in "".join(cards) and "<mark>" not in cards[0]
