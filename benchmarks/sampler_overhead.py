"""What does the sampler cost beside the network? Wall-clock of a run over that of its demasker calls alone.

    python benchmarks/sampler_overhead.py [--quick | --full --device cuda] [--hidden_size 1024] [--num_layers 4]

Every shape is sampled once while its demasker calls are recorded: canvases, positions, latents. Then the run and a bare
replay of those very calls, with nothing around them, are timed in turns. The network is LLaDA's in kind and vocabulary
with random weights; `--full` gives it LLaDA-8B's size, in bfloat16. The fewer its layers, the harder the question: all
that a sampler does is proportional to the vocabulary, as is the head, and the body is the rest of the denominator. The
last line printed is one JSON object, also written to `--output`: seconds of all repeats, and medians of their ratios.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crocodil.models import Demasker
from crocodil.samplers import MaskedSampler

VOCAB_SIZE, MASK, EOS = 126464, 126336, 126081
NUM_REGISTERS, LATENT_DIM, PROMPT_LENGTH = 16, 64, 16
LOGIT_STD = 8.0
"""Spread of the logits in nats. As they are initialised, all tokens would be about as probable at all positions."""

FULL_SIZE = {"hidden_size": 4096, "num_layers": 32, "intermediate_size": 12288, "num_heads": 32, "dtype": "bfloat16"}


@dataclass(frozen=True)
class Shape:
    """A run of the sampler; fields as those of `MaskedSampler` and its `sample`."""

    remasking: str
    temperature: float
    top_p: float = 1.0
    block_size: int | None = None
    with_latents: bool = False
    batch_size: int = 1
    length: int = 64
    num_steps: int = 8

    def sampler(self) -> MaskedSampler:
        """The sampler of the run."""
        return MaskedSampler(
            self.num_steps, self.block_size, self.remasking, temperature=self.temperature, top_p=self.top_p
        )

    def label(self) -> str:
        """What the run is called in the progress."""
        block = f" in {self.block_size}s" if self.block_size else ""
        latents = " latents" if self.with_latents else ""
        sampling = f"T={self.temperature:g}" + (f" top_p={self.top_p:g}" if self.top_p < 1 else "")
        return f"{self.remasking} {sampling} {self.batch_size}x{self.length}{block}{latents}"


SHAPES = [
    Shape("low_confidence", 0.0),
    Shape("low_confidence", 0.0, block_size=32),
    Shape("low_confidence", 0.7),
    Shape("low_confidence", 0.7, block_size=32),
    Shape("low_confidence", 0.7, with_latents=True),
    Shape("low_confidence", 1.0, top_p=0.9),
    Shape("random", 1.0),
    Shape("random", 1.0, block_size=32, with_latents=True),
    Shape("random", 1.0, num_steps=64),
    Shape("threshold:0.9", 0.0, block_size=32, num_steps=64),
    Shape("entropy", 1.0),
    Shape("low_confidence", 0.0, batch_size=4, num_steps=4),
    Shape("low_confidence", 0.7, batch_size=4, num_steps=4),
    Shape("low_confidence", 1.0, top_p=0.9, block_size=32, batch_size=4, num_steps=4),
    Shape("random", 1.0, batch_size=4, num_steps=4),
]


def full_shapes() -> list[Shape]:
    """The shapes of a GPU: longer texts, more of them."""
    singles = [shape for shape in SHAPES if shape.batch_size == 1]
    return [
        replace(shape, batch_size=batch_size, length=256, num_steps=32 if shape.num_steps < 64 else 256)
        for batch_size in (1, 8, 32)
        for shape in singles
    ]


def build_demasker(options: argparse.Namespace) -> Demasker:
    """A network like LLaDA's with random weights, as sure of its tokens as a trained one may be."""
    settings = {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_heads or options.hidden_size // 64,
        "num_key_value_heads": options.num_heads or options.hidden_size // 64,
        "intermediate_size": options.intermediate_size or 3 * options.hidden_size,
        "max_position_embeddings": 4096,
    }
    ids = {"mask_token_id": MASK, "eos_token_id": EOS}
    latents = {"latent_dim": LATENT_DIM, "num_registers": NUM_REGISTERS}
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, options.dtype))
    with torch.device(options.device):
        demasker = Demasker(settings, **ids, **latents, family="llada").eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    demasker.network.get_output_embeddings().weight.normal_(std=LOGIT_STD / options.hidden_size**0.5)
    return demasker


def some_prompts(batch_size: int) -> Tensor:
    """Prompts (B, P) of different tokens."""
    return torch.randint(1000, 100000, (batch_size, PROMPT_LENGTH), generator=torch.Generator().manual_seed(1))


def seconds(run: Callable[[], Any], device: str) -> float:
    """Wall-clock of one run."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def alternate(runs: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return times


def measure(demasker: Demasker, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """The run of a shape against its calls."""
    sampler = shape.sampler()
    prompt_ids = some_prompts(shape.batch_size)
    latents = None
    if shape.with_latents:
        noise = torch.randn(shape.batch_size, NUM_REGISTERS, LATENT_DIM, generator=torch.Generator().manual_seed(2))
        latents = noise.to(options.device)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def sample() -> None:
        sampler.sample(
            demasker,
            length=shape.length,
            batch_size=shape.batch_size,
            prompt_ids=prompt_ids,
            latents=latents,
            generator=torch.Generator().manual_seed(3),
            device=options.device,
        )

    @torch.no_grad()
    def replay() -> None:
        for args, given in calls:
            demasker(*args, **given)

    def record(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        calls.append((args, given))

    hook = demasker.register_forward_pre_hook(record, with_kwargs=True)
    sample()
    hook.remove()
    replay()
    times = alternate({"sampler": sample, "bare": replay}, options.repeats, options.device)
    pairs = zip(times["sampler"], times["bare"], strict=True)
    return {
        **asdict(shape),
        "num_calls": len(calls),
        "positions_per_call": sum(given["positions"].numel() for _, given in calls) / len(calls),
        "seconds": times,
        "bare_seconds_per_call": statistics.median(times["bare"]) / len(calls),
        "ratio": statistics.median(sampler / bare for sampler, bare in pairs),
    }


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures were taken on."""
    name = platform.processor() or platform.machine()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else name,
    }


def say(*words: str) -> None:
    """A line of progress."""
    print(*words, file=sys.stderr, flush=True)


def publish(figures: dict[str, Any], output: Path) -> None:
    """Writes the figures and prints them as one line."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=4) + "\n")
    print(json.dumps(figures))


def parse(description: str, output: str, **sizes: Any) -> argparse.Namespace:
    """The options; `sizes` are the defaults of the network on a CPU."""
    parser = argparse.ArgumentParser(description=description)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a tiny network and short texts: does it run?")
    size.add_argument("--full", action="store_true", help="the size of LLaDA-8B in bfloat16, and more and longer texts")
    parser.add_argument("--hidden_size", type=int, default=sizes["hidden_size"])
    parser.add_argument("--num_layers", type=int, default=sizes["num_layers"])
    parser.add_argument("--num_heads", type=int, help="default: heads of 64")
    parser.add_argument("--intermediate_size", type=int, help="default: 3 hidden_size, as LLaDA")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / output)
    options = parser.parse_args()
    if options.full:
        vars(options).update(FULL_SIZE)
    if options.quick:
        vars(options).update(hidden_size=64, num_layers=1, repeats=1)
    return options


def main() -> None:
    """Prints the ratios, then the figures."""
    options = parse(__doc__.splitlines()[0], "sampler_overhead.json", hidden_size=1024, num_layers=4)
    shapes = full_shapes() if options.full else SHAPES
    if options.quick:
        shapes = [replace(shape, length=32, num_steps=min(shape.num_steps, 4)) for shape in shapes]
    demasker = build_demasker(options)
    rows = []
    for shape in shapes:
        rows.append(row := measure(demasker, shape, options))
        per_call = 1e3 * row["bare_seconds_per_call"]
        say(f"{shape.label():60} {row['num_calls']:4} calls of {per_call:8.1f} ms  ratio {row['ratio']:.3f}")
    figures = {
        "benchmark": "sampler_overhead",
        **{name: value for name, value in vars(options).items() if name != "output"},
        "vocab_size": VOCAB_SIZE,
        "prompt_length": PROMPT_LENGTH,
        "shapes": rows,
        "largest_ratio": max(row["ratio"] for row in rows),
        **machine(options),
    }
    publish(figures, options.output)


if __name__ == "__main__":
    main()
