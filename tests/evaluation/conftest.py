"""Rows of a comparison in which the latent system wins at 8 of 64 demasker calls; judges; texts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crocodil.data.codec import TextCodec
from crocodil.evaluation.judge import Judge, build_judge
from crocodil.evaluation.verdict import Row


def row_of(
    algorithm: str, calls: int, parse_rate: float, judge_nll: float, entropy: float = 5.0, **changes: Any
) -> Row:
    row = {
        "algorithm": algorithm,
        "remasking": None if algorithm == "data" else "random",
        "temperature": None if algorithm == "data" else 1.0,
        "num_registers": None,
        "num_steps": calls,
        "length": 64,
        "demasker_calls": calls,
        "prior_calls": 0,
        "encoder_calls": 0,
        "nfe": float(calls),
        "seconds_per_sample": calls / 1000,
        "judge_nll": judge_nll,
        "entropy": entropy,
        "distance": 2.0,
        "parse_rate": parse_rate,
        "duplicate_rate": 0.01,
        "seed": 0,
    }
    return row | changes


@pytest.fixture
def make_row() -> Callable[..., Row]:
    """Builds a row from its algorithm, demasker calls, parse rate and judge NLL; keywords change the rest."""
    return row_of


@pytest.fixture
def data() -> Row:
    """The held-out programs, of entropy 5."""
    return row_of("data", 0, 1.0, 1.3)


@pytest.fixture
def base() -> Row:
    """The base at 8 calls."""
    return row_of("base", 8, 0.04, 2.6)


@pytest.fixture
def latent() -> Row:
    """ConThenDisc at 8 calls, better and dearer than the base."""
    return row_of("conthendisc", 8, 0.12, 2.3, prior_calls=32, nfe=9.3, seconds_per_sample=0.0112)


@pytest.fixture(scope="session")
def codec() -> TextCodec:
    """Canonical functions: end 0, start 1."""
    return TextCodec.canonical()


def tiny_network(vocab_size: int, context: int = 64):
    settings = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.5,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_judge(settings)


@pytest.fixture(scope="session")
def own_judge(codec: TextCodec) -> Judge:
    """A judge over the tokens of canonical functions themselves, which counts end tokens."""
    return Judge(tiny_network(codec.vocabulary.size), codec, codec, score_end=True)


@pytest.fixture(scope="session")
def judge_folder(byte_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge as it is published: a transformers folder, a tokenizer of bytes, no start token (as StarCoder)."""
    folder = tmp_path_factory.mktemp("judge")
    byte_tokenizer("<|endoftext|>").save_pretrained(str(folder))
    tiny_network(257, context=48).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def token_ids(codec: TextCodec) -> torch.Tensor:
    """Nine canonical texts of 20 tokens: start token, text, end tokens; two are equal, one never ends."""
    texts = [
        "def f(v0):\n    return v0",
        "def f(v0, v1):\n    return v0 + v1",
        "def f(v0):\n    return v0",
        "def f():\n    pass",
        "def f(self):\n    return self.a0",
        "def f(self, v0):\n    self.a0 = v0",
        "def f(v0):\n    return g0(v0)",
        "def f(v0):\n    v0 += 1\n    return v0",
    ]
    rows = [[1, *codec.encode(text)] for text in texts]
    rows = [(row + [0] * 20)[:20] for row in rows]
    return torch.tensor([*rows, [1, *range(20, 39)]])


@pytest.fixture(scope="session")
def texts(codec: TextCodec, token_ids: torch.Tensor) -> list[str]:
    """The same as text."""
    return [codec.decode(row) for row in token_ids]
