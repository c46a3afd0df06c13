import pytest
import torch
from torch import Tensor

from crocodil.diffusion.documents import Documents, NumberedDocuments
from crocodil.diffusion.masking import LinearMasking, loss_weights, stratified_times
from crocodil.diffusion.noise import BatchNoise

IDS = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0], [1, 1, 2, 3, 3, 0]])
PADDED = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


def batch_noise(rows: int, seed: int = 3) -> BatchNoise:
    return BatchNoise(torch.tensor(seed), torch.arange(rows), rows)


def test_documents_are_counted_from_the_left_of_each_row() -> None:
    documents = NumberedDocuments(IDS)
    assert (len(documents), documents.per_row, documents.num_tokens) == (6, 3, 11)
    assert documents.row.tolist() == [0, 0, 1, 2, 2, 2]
    assert documents.number.tolist() == [1, 2, 1, 1, 2, 3]
    assert torch.equal(documents.attention["attention_mask"], IDS) and documents.attention["num_documents"] == 3


def test_values_are_spread_over_their_documents_and_summed_over_them() -> None:
    documents, values = NumberedDocuments(IDS), torch.tensor([1.0, 2, 3, 4, 5, 6])
    spread = documents.spread(values)
    assert spread.tolist() == [[1, 1, 2, 2, 2, 0], [3, 0, 0, 0, 0, 0], [4, 4, 5, 6, 6, 0]]
    assert documents.sums(spread).tolist() == [2, 6, 3, 8, 5, 12]
    assert documents.of_row(torch.tensor([7, 8, 9])).tolist() == [7, 7, 8, 9, 9, 9]
    assert documents.first_rows(2).row.tolist() == [0, 0, 1]


@pytest.mark.parametrize("ids", [IDS, PADDED, IDS[:, :5] * 0 + 1, torch.tensor([[1, 2], [1, 2]])])
def test_rows_of_documents_and_back(ids: Tensor) -> None:
    documents = NumberedDocuments(ids)
    values = torch.arange(len(documents) * 6.0).view(-1, 2, 3)
    rows = documents.to_rows(values)
    assert rows.shape == (len(ids), *((documents.per_row,) if documents.per_row > 1 else ()), 2, 3)
    assert torch.equal(documents.from_rows(rows), values)
    if documents.per_row == 3:
        assert torch.equal(rows[2, 2], values[5]) and (rows[1, 1:] == 0).all()


def test_rows_without_numbers_are_documents() -> None:
    documents, numbered = Documents.of({"token_ids": PADDED}), NumberedDocuments(torch.ones_like(PADDED))
    values = torch.tensor([1.0, 2, 3])
    assert (len(documents), documents.num_tokens, documents.attention) == (3, 12, {})
    assert torch.equal(documents.spread(values).expand(3, 4), numbered.spread(values))
    assert torch.equal(documents.sums(PADDED), numbered.sums(PADDED))
    assert torch.equal(numbered.noise(batch_noise(3)).keys, documents.noise(batch_noise(3)).keys)


@pytest.mark.parametrize(
    ("ids", "got"),
    [
        ([[1, 1], [1, 3]], r"\[1, 3\]"),
        ([[1, 2, 1]], r"\[1, 2, 1\]"),
        ([[2, 2]], r"\[2\]"),
        ([[1, 0, 1]], r"\[1, 0, 1\]"),
    ],
)
def test_documents_with_gaps_or_in_pieces_are_refused(ids: list[list[int]], got: str) -> None:
    with pytest.raises(ValueError, match=f"contiguous documents of each row 1, 2, ... without a gap, got {got}"):
        NumberedDocuments(torch.tensor(ids))


def test_a_batch_of_padding_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one document from 1, got zeros only"):
        NumberedDocuments(torch.zeros(2, 3, dtype=torch.int64))


def test_each_document_has_noise_of_its_own_whatever_shares_the_row() -> None:
    documents, noise = NumberedDocuments(IDS), batch_noise(3)
    own = documents.noise(noise)
    assert len(own.keys.unique()) == 6
    first = documents.number == 1
    assert torch.equal(own.keys[first], noise.keys) and torch.equal(own.rows[first], noise.rows.double())
    fewer = NumberedDocuments(IDS[:, :3])  # the last document of the last row is gone
    assert torch.equal(fewer.noise(noise).keys, own.keys[:5])
    values = own.uniform(5, 0, 20_000)
    assert torch.corrcoef(values).fill_diagonal_(0).abs().max() < 0.03


def test_times_of_documents_are_uniform_and_evenly_spread() -> None:
    """Of 16 documents in each of 8 rows every 32nd of the time axis holds between 2 and 6; 4 on average."""
    ids = torch.arange(1, 17).repeat_interleave(2).expand(8, -1)
    own, documents = NumberedDocuments(ids).noise(batch_noise(8)), NumberedDocuments(ids)
    for u in (torch.arange(40, dtype=torch.float64) + 0.5) / 40:
        times = stratified_times(u, own.rows, own.num_rows)
        counts = (times * 32).long().bincount(minlength=32)
        assert counts.min() >= 2 and counts.max() <= 6
        for n in range(1, 17):  # the n-th documents of all rows, each in a bin of its own
            shifted = (times[documents.number == n].double() + 1 - times[documents.number == n].min()) % 1
            assert sorted((shifted * 8 + 1e-4).long().tolist()) == list(range(8))
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    each = torch.stack([stratified_times(u, own.rows, own.num_rows) for u in grid]).sort(dim=0).values
    torch.testing.assert_close(each.double(), grid[:, None].expand_as(each), rtol=0, atol=2e-3)


def test_two_processes_draw_the_noise_of_one() -> None:
    seed, own = torch.tensor(9), NumberedDocuments(IDS[[0, 2]]).noise(BatchNoise(torch.tensor(9), torch.arange(2), 2))
    parts = [
        NumberedDocuments(IDS[[row]]).noise(BatchNoise(seed, torch.tensor([i]), 2)) for i, row in enumerate((0, 2))
    ]
    assert torch.equal(torch.cat([part.keys for part in parts]), own.keys)
    assert torch.equal(torch.cat([part.rows for part in parts]), own.rows)


def test_weights_are_those_of_all_documents_one_by_one() -> None:
    documents, is_masked = (
        NumberedDocuments(IDS),
        torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0)) < 0.7,
    )
    is_masked &= IDS > 0
    times = torch.tensor([0.1, 0.4, 0.9, 0.6, 0.3, 0.8])
    weights = loss_weights(is_masked, LinearMasking()(times), "elbo", documents)
    for i, (row, number) in enumerate(zip(documents.row, documents.number, strict=True)):
        place = IDS[row] == number
        alone = loss_weights(is_masked[row][place][None], LinearMasking()(times[i : i + 1]), "elbo")
        torch.testing.assert_close(weights[row][place], alone[0] * place.sum() / 11)
    plain = loss_weights(is_masked, LinearMasking()(times), "none", documents)
    torch.testing.assert_close(plain, is_masked / is_masked.sum())
