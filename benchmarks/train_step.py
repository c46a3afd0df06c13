"""What does the chunked loss at masked positions save over full logits? One training step of each, in one run.

    python benchmarks/train_step.py [--vocab_size 32000] [--length 512] [--batch_size 4] [--device cpu]

Both train the same demasker on the same masks: once as the modules do (`Demasker.weighted_loss`), once the
straightforward way, (B, L, V) logits and a cross-entropy over all of them, masked afterwards. The last line printed is
one JSON object: seconds and peak bytes of both (medians over repeats, alternating), and the ratios.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from crocodil.diffusion.masking import LinearMasking, corrupt, loss_weights
from crocodil.models import Demasker

Step = Callable[[], None]


def build_steps(options: argparse.Namespace) -> dict[str, Step]:
    """The two training steps, forward and backward, on one network and one batch."""
    torch.manual_seed(0)
    settings = {
        "model_type": "llama",
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.hidden_size // 64,
        "num_key_value_heads": options.hidden_size // 64,
        "intermediate_size": 3 * options.hidden_size,
        "max_position_embeddings": options.length,
    }
    demasker = Demasker(settings, mask_token_id=0, eos_token_id=1).to(options.device)
    batch, length = options.batch_size, options.length
    token_ids = torch.randint(2, options.vocab_size, (batch, length))
    point = LinearMasking()((torch.arange(batch) + 0.5) / batch)  # half of the tokens are masked, as on average
    noisy_ids, is_masked = corrupt(token_ids, point.mask_prob[:, None], torch.rand(batch, length), 0)
    weights = loss_weights(is_masked, point, "elbo")
    noisy_ids, token_ids = noisy_ids.to(options.device), token_ids.to(options.device)

    def step(loss: Callable[[], Tensor]) -> Step:
        def run() -> None:
            demasker.zero_grad()
            loss().backward()

        return run

    on_device = weights.to(options.device)

    def full_logits() -> Tensor:
        nats = F.cross_entropy(demasker(noisy_ids).float().transpose(1, 2), token_ids, reduction="none")
        return (nats * on_device).sum()

    return {
        "chunked": step(lambda: demasker.weighted_loss(noisy_ids, token_ids, weights)[0]),
        "full_logits": step(full_logits),
    }


def seconds(step: Step, device: str) -> float:
    """Wall-clock of one step."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(step: Step, device: str) -> int:
    """Bytes the step takes at its highest point, beyond what is held before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held, peak = 0, 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def main() -> None:
    """Prints what is measured, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    steps = build_steps(options)
    for step in steps.values():  # warm-up
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            times[name].append(seconds(step, options.device))
    peaks = {name: peak_bytes(step, options.device) for name, step in steps.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{'':12} {'seconds':>10} {'spread':>10} {'peak MiB':>10}")
    for name in steps:
        spread = max(times[name]) - min(times[name])
        print(f"{name:12} {medians[name]:10.3f} {spread:10.3f} {peaks[name] / 2**20:10.1f}")
    figures = {
        "benchmark": "train_step",
        **vars(options),
        "seconds": medians,
        "peak_bytes": peaks,
        "time_ratio": medians["chunked"] / medians["full_logits"],
        "memory_ratio": peaks["chunked"] / peaks["full_logits"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
