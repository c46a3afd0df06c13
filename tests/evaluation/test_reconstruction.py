from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics.text import CharErrorRate as LibraryCharErrorRate
from transformers import AutoTokenizer, BertConfig, BertModel

from crocodil.evaluation.reconstruction import CharErrorRate, CodeBertScore, TokenAccuracy

TEXTS = ["return v0", "a = b", "", "xyz"]
REFERENCES = ["return v1", "a == b\n", "ab", "xyz"]


def distance(a: str, b: str) -> int:
    """Edit distance by the recursion itself."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_character_errors_by_hand(batch_size: int) -> None:
    metric = CharErrorRate()
    for start in range(0, 4, batch_size):
        metric.update(TEXTS[start : start + batch_size], REFERENCES[start : start + batch_size])
    expected = sum(map(distance, TEXTS, REFERENCES)) / sum(map(len, REFERENCES))
    assert distance(TEXTS[1], REFERENCES[1]) == 2
    assert metric.compute()["cer"].item() == pytest.approx(expected)
    assert LibraryCharErrorRate()(TEXTS, REFERENCES).item() == pytest.approx(expected)


def test_tokens_count_through_the_end_of_the_reference() -> None:
    reference = torch.tensor([[1, 5, 6, 0, 0, 0], [1, 5, 6, 7, 8, 9]])
    written = torch.tensor([[1, 5, 9, 0, 9, 9], [7, 5, 6, 7, 8, 0]])
    metric = TokenAccuracy(0)
    metric.update(written[:1], reference[:1])
    metric.update(written[1:], reference[1:])
    assert metric.compute()["token_accuracy"].item() == pytest.approx((2 + 4) / (3 + 5))


@pytest.fixture(scope="module")
def code_model(byte_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("code_model")
    byte_tokenizer("<|endoftext|>").save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=257, max_position_embeddings=64, initializer_range=0.5, **sizes)
        BertModel(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def f1_by_hand(folder: Path, text: str, reference: str, layer: int) -> float:
    """Greedy matching of contextual embeddings; the library leaves out the first and last token of each text."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()

    def states(content: str) -> torch.Tensor:
        out = model(**tokenizer(content, return_tensors="pt"), output_hidden_states=True)
        found = out.hidden_states[layer][0][1:-1]
        return found / found.norm(dim=1, keepdim=True)

    similarity = states(text) @ states(reference).T
    precision, recall = similarity.max(1).values.mean(), similarity.max(0).values.mean()
    return float(2 * precision * recall / (precision + recall))


@pytest.mark.filterwarnings("ignore")
def test_bert_score_by_hand(code_model: Path) -> None:
    texts, references = ["return v0", "a = b + c"], ["return v1", "while a: b"]
    metric = CodeBertScore(code_model, num_layers=2, max_length=48)
    metric.update(texts[:1], references[:1])
    metric.update(texts[1:], references[1:])
    expected = [f1_by_hand(code_model, *pair, layer=2) for pair in zip(texts, references, strict=True)]
    assert metric.compute()["codebertscore"].item() == pytest.approx(sum(expected) / 2, abs=1e-4)
    metric.reset()
    metric.update(texts, texts)
    assert metric.compute()["codebertscore"].item() == pytest.approx(1.0, abs=1e-5)


def test_what_is_no_model_of_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a model of code for CodeBERTScore"):
        CodeBertScore(tmp_path)
