"""How long does a run take beside LLaDA's published procedure, on the same weights? The same tokens, sooner.

    python benchmarks/versus_official.py [--quick | --full --device cuda] [--hidden_size 512] [--num_layers 12]

The published one (arXiv 2502.09992, appendix; generate.py of ML-GSAI/LLaDA) is written out in `published`: logits of
the whole canvas, a softmax over all of them, noise in float64 on all of them where the temperature is above 0, and the
best positions row by row. At temperature 0 both must write the same tokens: that is asserted in float32; in bfloat16,
where confidences tie, the share of equal tokens is reported. What is saved does not depend on the weights, which are
random, but on the share of the head in the network's FLOPs, which is reported: 7 % in LLaDA-8B (`--full`), more in a
network that a CPU can bear. The last line printed is one JSON object, also written to `--output`: seconds of all
repeats, in turns, and ratios of their medians.
"""

import argparse
import statistics
from dataclasses import replace
from typing import Any

import torch
from sampler_overhead import (
    MASK,
    PROMPT_LENGTH,
    VOCAB_SIZE,
    Shape,
    alternate,
    build_demasker,
    machine,
    parse,
    publish,
    say,
    some_prompts,
)
from torch import Tensor

from crocodil.models import Demasker

SHAPES = [
    Shape("low_confidence", 0.0, length=64, num_steps=64, block_size=64),
    Shape("low_confidence", 0.0, length=128, num_steps=32, block_size=32),
    Shape("low_confidence", 0.7, length=64, num_steps=16, block_size=64),
    Shape("low_confidence", 0.7, length=128, num_steps=8, block_size=32),
    Shape("random", 1.0, length=64, num_steps=16, block_size=64),
    Shape("low_confidence", 0.0, batch_size=8, length=64, num_steps=4, block_size=64),
    Shape("low_confidence", 0.0, batch_size=8, length=64, num_steps=4, block_size=32),
    Shape("low_confidence", 0.7, batch_size=8, length=64, num_steps=4, block_size=32),
]
FULL_SHAPES = [
    Shape(remasking, temperature, batch_size=batch_size, length=length, num_steps=num_steps, block_size=block_size)
    for batch_size in (1, 8, 32)
    for remasking, temperature in (("low_confidence", 0.0), ("low_confidence", 0.7), ("random", 1.0))
    for length, num_steps, block_size in ((64, 64, 64), (128, 32, 32), (256, 64, 32))
]


@torch.no_grad()
def published(demasker: Demasker, prompt_ids: Tensor, shape: Shape) -> Tensor:
    """LLaDA's procedure. Random weights, unlike trained ones, must be told not to write the mask."""
    prompt_length, block_size = prompt_ids.shape[1], shape.block_size or shape.length
    masks = torch.full((shape.batch_size, shape.length), MASK, device=prompt_ids.device)
    canvas = torch.cat([prompt_ids, masks], dim=1)
    num_blocks = shape.length // block_size
    num_steps = shape.num_steps // num_blocks
    for start in range(prompt_length, prompt_length + shape.length, block_size):
        num_masked = (canvas[:, start : start + block_size] == MASK).sum(1)
        for step in range(num_steps):
            is_masked = canvas == MASK
            logits = demasker(canvas)
            logits[..., MASK] = -torch.inf
            tokens = noised(logits, shape.temperature).argmax(-1)
            if shape.remasking == "random":
                confidence = torch.rand(canvas.shape, device=canvas.device)
            else:
                confidence = logits.softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
            confidence[:, start + block_size :] = -torch.inf
            confidence = confidence.masked_fill(~is_masked, -torch.inf)
            num_committed = num_masked // num_steps + (step < num_masked % num_steps)
            for row in range(len(canvas)):
                best = confidence[row].topk(int(num_committed[row])).indices
                canvas[row, best] = tokens[row, best]
    return canvas


def noised(logits: Tensor, temperature: float) -> Tensor:
    """Logits whose largest is a sample at the temperature: exp(l) / (-log u)^T, in float64."""
    if temperature == 0:
        return logits
    logits = logits.double()
    return logits.exp() / (-torch.rand_like(logits).log()) ** temperature


def measure(demasker: Demasker, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Both on one shape."""
    sampler, prompt_ids = shape.sampler(), some_prompts(shape.batch_size)
    on_device = prompt_ids.to(options.device)

    def ours() -> Tensor:
        torch.manual_seed(3)
        return sampler.sample(
            demasker,
            length=shape.length,
            batch_size=shape.batch_size,
            prompt_ids=prompt_ids,
            device=options.device,
        ).token_ids

    def theirs() -> Tensor:
        torch.manual_seed(3)
        return published(demasker, on_device, shape)

    is_equal = ours()[:, PROMPT_LENGTH:] == theirs()[:, PROMPT_LENGTH:]  # warms up, too
    if shape.temperature == 0 and options.dtype == "float32":
        assert is_equal.all(), f"{(~is_equal).sum()} of {is_equal.numel()} tokens differ at {shape.label()}"
    times = alternate({"sampler": ours, "published": theirs}, options.repeats, options.device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        **{name: getattr(shape, name) for name in ("batch_size", "length", "num_steps", "block_size")},
        **{name: getattr(shape, name) for name in ("remasking", "temperature")},
        "equal_tokens": is_equal.double().mean().item() if shape.temperature == 0 else None,
        "seconds": times,
        "ratio": medians["sampler"] / medians["published"],
    }


def head_share(demasker: Demasker) -> float:
    """Share of the head in the multiplications with weights, where logits are computed at all positions."""
    head = demasker.network.get_output_embeddings().weight.numel()
    body = sum(weight.numel() for weight in demasker.decoder.layers.parameters())
    return head / (head + body)


def main() -> None:
    """Prints the ratios, then the figures."""
    options = parse(__doc__.splitlines()[0], "versus_official.json", hidden_size=512, num_layers=12)
    shapes = FULL_SHAPES if options.full else SHAPES
    if options.quick:
        shapes = [replace(shape, length=32, num_steps=4, block_size=min(shape.block_size, 16)) for shape in shapes]
    demasker = build_demasker(options)
    rows = []
    for shape in shapes:
        rows.append(row := measure(demasker, shape, options))
        ours, theirs = (statistics.median(values) for values in row["seconds"].values())
        say(f"{shape.label():50} {shape.num_steps:4} steps {ours:8.3f} s  {theirs:8.3f} s  ratio {row['ratio']:.3f}")
    figures = {
        "benchmark": "versus_official",
        **{name: value for name, value in vars(options).items() if name != "output"},
        "vocab_size": VOCAB_SIZE,
        "prompt_length": PROMPT_LENGTH,
        "head_share": head_share(demasker),
        "shapes": rows,
        "largest_ratio": max(row["ratio"] for row in rows),
        **machine(options),
    }
    publish(figures, options.output)


if __name__ == "__main__":
    main()
