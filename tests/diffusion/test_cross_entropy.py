import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from crocodil.diffusion import cross_entropy
from crocodil.diffusion.cross_entropy import CHUNK_ROWS, chunked_nats, weighted_cross_entropy

VOCAB, WIDTH = 37, 8


def inputs(rows: int, dtype: torch.dtype = torch.float64, with_bias: bool = True) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "hidden": draw(rows, WIDTH),
        "weight": draw(VOCAB, WIDTH),
        "bias": draw(VOCAB) if with_bias else None,
        "targets": torch.randint(0, VOCAB, (rows,), generator=generator),
        "row_weights": torch.rand(rows, generator=generator),
    }


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, bias: Tensor | None) -> Tensor:
    nats = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    return (nats * row_weights).sum(-1)


@pytest.mark.parametrize("rows", [0, 1, CHUNK_ROWS, 2 * CHUNK_ROWS + 3])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradients_are_those_of_full_logits(rows: int, with_bias: bool) -> None:
    ours, theirs = inputs(rows, with_bias=with_bias), inputs(rows, with_bias=with_bias)
    (loss, nats), expected = weighted_cross_entropy(**ours), plain(**theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    parts = plain(**theirs | {"row_weights": torch.eye(rows)})
    torch.testing.assert_close(nats, parts)
    assert not nats.requires_grad
    (3 * loss).backward()
    (3 * expected).backward()
    for name in ("hidden", "weight", "bias") if with_bias else ("hidden", "weight"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-6, atol=1e-9)


def test_gradients_by_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 3)
    given = inputs(7)
    targets, row_weights = given["targets"], given["row_weights"].double()
    assert torch.autograd.gradcheck(
        lambda h, w, b: weighted_cross_entropy(h, w, targets, row_weights, b)[0],
        (given["hidden"], given["weight"], given["bias"]),
    )


def test_a_frozen_head_gets_no_gradient_and_no_memory_for_one() -> None:
    given = inputs(5, with_bias=False)
    given["weight"].requires_grad_(False)
    loss, _ = weighted_cross_entropy(**given)
    saved = [t for t in loss.grad_fn.saved_tensors if t is not None]
    assert [tuple(t.shape) for t in saved] == [(5, WIDTH)]
    loss.backward()
    assert given["weight"].grad is None and given["hidden"].grad.abs().max() > 0


def test_bfloat16_states_are_reduced_in_float32() -> None:
    given, wide = inputs(600, torch.bfloat16), inputs(600)
    loss, nats = weighted_cross_entropy(**given)
    assert loss.dtype == nats.dtype == torch.float32
    torch.testing.assert_close(loss.double(), plain(**wide), rtol=3e-3, atol=0)
    loss.backward()
    assert given["weight"].grad.dtype == torch.bfloat16


def test_autocast_multiplies_in_its_own_dtype() -> None:
    given = inputs(40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = weighted_cross_entropy(**given)
    loss.backward()
    narrow = {name: t.detach().bfloat16() if t.is_floating_point() else t for name, t in given.items()}
    narrow["row_weights"] = given["row_weights"]
    assert loss.item() == weighted_cross_entropy(**narrow)[0].item()
    assert given["hidden"].grad.dtype == torch.float32


def test_no_more_rows_of_logits_than_a_chunk_are_ever_made() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    given = inputs(4 * CHUNK_ROWS)
    with Largest() as seen:
        weighted_cross_entropy(**given)[0].backward()
    assert seen.elements == CHUNK_ROWS * VOCAB


def test_nats_and_hits_of_each_row() -> None:
    given = inputs(CHUNK_ROWS + 7)
    logits = F.linear(given["hidden"], given["weight"], given["bias"])
    nats, hits = chunked_nats(given["hidden"], given["weight"], given["targets"], given["bias"])
    torch.testing.assert_close(nats, F.cross_entropy(logits, given["targets"], reduction="none"))
    assert torch.equal(hits, logits.argmax(1) == given["targets"]) and 0 < hits.sum() < len(hits)
