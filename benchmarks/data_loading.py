"""How fast are the loaders, against the fastest consumer of the quickstart, and what do the layouts of rows cost?

    python benchmarks/data_loading.py [--seconds 10] [--length 64] [--batch_size 64]

Reads the standard library as a `TextCorpus`, memory-mapped and streamed, in each layout and with 0 and 2 workers, and
trains the quickstart's demasker (forward, backward and optimizer) in the same run. Padding does not count as tokens.
Then it trains the same demasker on canonical functions, whose lengths vary, in rows of 128 tokens: how many real tokens
a second each layout trains on, against rows padded to the full length. The last line printed is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, product, repeat
from typing import Any

import lightning as L
import torch
from torch import Tensor

from crocodil.data import CanonicalFunctions, TextCorpus
from crocodil.evaluation.machine import machine
from crocodil.modules import DemaskerModule

NETWORK = {  # of lightning_configs/quickstart_demasker.yaml
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 344,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padded, hidden": {"hide_padding": True},
    "grouped": {"layout": "grouped", "hide_padding": True},
    "packed": {"layout": "packed"},
}
REPEATS = 3


def real_tokens(batch: dict[str, Tensor], eos_token_id: int) -> int:
    """Tokens of texts, one end token of each counted, the tail not."""
    if "document_ids" in batch:
        return int((batch["document_ids"] > 0).sum())
    return int(((batch["token_ids"] != eos_token_id).sum(1) + 1).clamp(max=batch["token_ids"].shape[1]).sum())


def tokens_per_second(batches: Iterator[dict[str, Tensor]], seconds: float, eos_token_id: int) -> float:
    """Of a loader alone; its start-up is not counted, the time of its first batch is."""
    next(batches)
    tokens, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        tokens += real_tokens(next(batches), eos_token_id)
    return tokens / (time.perf_counter() - start)


def forever(loader: Any) -> Iterator[dict[str, Tensor]]:
    """Epoch after epoch."""
    return chain.from_iterable(repeat(loader))


def training_tokens_per_second(data: Any, seconds: float) -> float:
    """Real tokens that the quickstart's demasker trains on in a second, loading included; median of `REPEATS`."""
    torch.manual_seed(0)
    module = DemaskerModule(data.vocabulary, NETWORK | {"max_position_embeddings": data.length}, loss_weight="none")
    rates = []

    class Meter(L.Callback):
        tokens, start, steps = 0, 0.0, 0

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.steps += 1
            if self.steps <= 3:  # warm-up
                self.start = time.perf_counter()
                return
            self.tokens += real_tokens(batch, data.vocabulary.eos_token_id)
            if (spent := time.perf_counter() - self.start) > seconds:
                rates.append(self.tokens / spent)
                self.tokens, self.start = 0, time.perf_counter()
            trainer.should_stop = len(rates) == REPEATS

    with tempfile.TemporaryDirectory() as folder:
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(
            **options, enable_model_summary=False, accelerator="cpu", max_epochs=-1, limit_val_batches=0,
            callbacks=[Meter()], default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    return statistics.median(rates)


def main() -> None:
    """Prints what is measured, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--layout_length", type=int, default=128, help="of rows where layouts are compared")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    options = parser.parse_args()
    consumed = training_tokens_per_second(CanonicalFunctions(options.length, options.batch_size), options.seconds)
    print(f"the quickstart's demasker trains on {consumed:,.0f} tokens a second")
    loaders: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for streaming, name, workers in product((False, True), LAYOUTS, (0, 2)):
            settings = {"streaming": streaming, "num_workers": workers, "cache_dir": cache, **LAYOUTS[name]}
            data = TextCorpus(options.length, options.batch_size, **settings)
            data.prepare_data()
            batches = forever(data.train_dataloader())
            key = f"{'streamed' if streaming else 'mapped'}, {name}, {workers} workers"
            loaders[key] = tokens_per_second(batches, options.seconds, data.vocabulary.eos_token_id)
            ratio = loaders[key] / consumed
            print(f"{key:38} {loaders[key]:14,.0f} tokens a second, {ratio:8.1f} times as many")
    layouts = {}
    for name, layout in LAYOUTS.items():
        data = CanonicalFunctions(options.layout_length, 32, **layout)
        layouts[name] = training_tokens_per_second(data, options.seconds)
        ratio = layouts[name] / layouts["padded"]
        print(f"trained, {name:18} {layouts[name]:10,.0f} real tokens a second, {ratio:.2f} times the padded ones")
    figures = {
        "benchmark": "data_loading",
        **vars(options),
        "consumed_tokens_per_second": consumed,
        "loader_tokens_per_second": loaders,
        "least_ratio": min(loaders.values()) / consumed,
        "trained_tokens_per_second_by_layout": layouts,
        "layout_ratios": {name: value / layouts["padded"] for name, value in layouts.items()},
        **machine(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
