"""The plan of a run against the run itself, as the allocator sees it, and against numbers known by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crocodil_callbacks import EMA
from lightning.pytorch import Callback, Trainer
from torch.profiler import ProfilerActivity, profile, record_function

from crocodil.cli import run
from crocodil.data.vocabulary import Vocabulary
from crocodil.models import Demasker
from crocodil.modules import CrocodilModule, DemaskerModule, JudgeModule
from crocodil.planner.estimate import FRAGMENTATION, GIB, plan_run
from crocodil.planner.step import SimulatedStep, WeightlessMode
from crocodil.trainer_cli import CrocodilCLI, run_trainer
from crocodil.weightless import without_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*barebones")
SECOND_STEP = "the second training step"
ADAMW = "--model.init_args.optimizer=torch.optim.AdamW"
NETWORK = "--model.init_args.network"
WIDE = [f"{NETWORK}.hidden_size=128", f"{NETWORK}.intermediate_size=344", f"{NETWORK}.num_hidden_layers=4"]
WIDER = [f"{NETWORK}.hidden_size=256", f"{NETWORK}.intermediate_size=512", "--data.init_args.batch_size=2"]
ENCODER = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
CHECKPOINTING = "--model.init_args.gradient_checkpointing=true"
MANY = "--data.init_args.batch_size=64"


class Mark(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            with record_function(SECOND_STEP):
                pass


class MeasuredCLI(CrocodilCLI):
    """The run itself, without what is no part of a training step."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
        return super().instantiate_trainer(callbacks=[Mark(), EMA()], max_steps=3, val_check_interval=None, **quiet)


def measured_peak(arguments: list[str], folder: Path) -> int:
    """Bytes at the peak of the second and third training step, by what the CPU's allocator gave and took back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_trainer(arguments, MeasuredCLI)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    (start,) = [event["ts"] for event in events if event["name"] == SECOND_STEP]
    held: dict[int, int] = {}  # by address; what is taken back may have been given before the run
    peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        address, change = event["args"]["Addr"], event["args"]["Bytes"]
        if change > 0:
            held[address] = change
        else:
            held.pop(address, None)
        if event["ts"] >= start:
            peak = max(peak, sum(held.values()))
    return peak


def planned(arguments: list[str], capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    run(["plan", *arguments[1:], "--json", *options])
    return json.loads(capsys.readouterr().out)


def slow(*values: Any) -> Any:
    """Parameters of the slow run."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("stage", "options", "largest_part"),
    [
        ("demasker", [*WIDE, MANY], "activations"),
        slow("demasker", [*WIDE, MANY, ADAMW, CHECKPOINTING, "--trainer.precision=bf16-mixed"], "activations"),
        slow("demasker", [*WIDE, *WIDER, ADAMW, "--trainer.accumulate_grad_batches=2"], "optimizer_state"),
        slow("demasker", [*WIDE, *WIDER, "--trainer.precision=bf16-true"], "optimizer_state"),
        slow("autoencoder", [MANY, f"--model.init_args.encoder={json.dumps(ENCODER)}"], "activations"),
        slow("prior", [MANY, f"{NETWORK}.hidden_size=96"], "activations"),
    ],
)
def test_the_planned_memory_is_that_of_the_run(
    stage: str,
    options: list[str],
    largest_part: str,
    tiny_system: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = tiny_system.arguments("fit", stage, *options, f"--trainer.default_root_dir={tmp_path}")
    plan = planned(arguments, capsys)
    memory = plan["memory"]
    assert plan["needed"] - memory.pop("allowance") == pytest.approx(measured_peak(arguments, tmp_path), rel=0.15)
    assert max(memory, key=lambda part: memory[part]) == largest_part


# numbers known by hand

LENGTH, VOCABULARY = 8, Vocabulary(size=40, pad_token_id=0, bos_token_id=1, eos_token_id=0, mask_token_id=2)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}
BLOCK_MATRICES = 4 * 16 * 16 + 3 * 16 * 24
NUM_PARAMETERS = 2 * 40 * 16 + 3 * (BLOCK_MATRICES + 2 * 16) + 16
NUM_TENSORS = 2 + 3 * 9 + 1


def simulated(make: type[CrocodilModule] = DemaskerModule, world_size: int = 1, **settings: Any) -> SimulatedStep:
    fake_mode = WeightlessMode()
    settings = {"network": LLAMA, "optimizer": torch.optim.AdamW, **settings}
    with without_weights(), fake_mode:
        module = make(VOCABULARY, **settings)
    trainer = Trainer(accelerator="cpu", devices=1, barebones=True)
    return SimulatedStep(module, trainer, fake_mode, LENGTH, world_size)


def test_adamw_keeps_two_numbers_for_each_parameter() -> None:
    memory = simulated().run(1).peaks["optimizer"]
    buffers = 2 * 4 * 16 // 2 // 2  # the rotary frequencies, twice
    assert memory["weights"] == 4 * NUM_PARAMETERS + buffers
    assert memory["gradients"] == 4 * NUM_PARAMETERS
    assert memory["optimizer_state"] == 8 * NUM_PARAMETERS + 4 * NUM_TENSORS
    plan = plan_run(simulated(), 1, GIB * 80)
    assert plan.parameters["demasker"].total == plan.parameters["demasker"].trainable == NUM_PARAMETERS


def test_flops_of_a_causal_network() -> None:
    """Every matrix is used once forward and twice backward; attention, 2 products forward, is 5 backward."""
    flops = simulated(JudgeModule).run(4).flops
    linear, attention = 2 * (3 * BLOCK_MATRICES + 40 * 16), 3 * 4 * LENGTH * 16
    assert flops["forward"] == linear + attention
    assert flops["backward"] == 2 * linear + 2.5 * attention
    assert flops["recomputation"] == flops["optimizer"] == 0


def test_gradient_checkpointing_computes_the_blocks_again_and_saves_memory() -> None:
    plain, frugal = (simulated(gradient_checkpointing=given).run(64) for given in (False, True))
    blocks = 2 * 3 * BLOCK_MATRICES + 3 * 4 * LENGTH * 16
    last_product = 3 * 2 * 16 * 24  # what the blocks return was kept
    assert frugal.flops["recomputation"] == blocks - last_product
    assert frugal.flops["forward"] == plain.flops["forward"] and frugal.flops["backward"] == plain.flops["backward"]
    assert frugal.peaks["backward"]["activations"] < 0.6 * plain.peaks["backward"]["activations"]


def test_frozen_parameters_have_neither_gradients_nor_state() -> None:
    step = simulated(lora={"r": 4})
    trainable = 4 * 3 * (4 * (16 + 16) + 3 * (16 + 24))
    memory = step.run(1).peaks["optimizer"]
    assert memory["gradients"] == 4 * trainable
    assert memory["optimizer_state"] == 8 * trainable + 4 * 2 * 3 * 7
    count = plan_run(step, 1, GIB * 80).parameters["demasker"]
    assert (count.total, count.trainable) == (NUM_PARAMETERS + trainable, trainable)


def test_fsdp_divides_weights_gradients_and_state_but_not_activations() -> None:
    alone, shared = simulated().run(16).peaks["forward"], simulated(world_size=4).run(16).peaks["forward"]
    for part in ("weights", "gradients", "optimizer_state"):
        assert shared[part] == pytest.approx(alone[part] / 4)
    assert shared["activations"] == alone["activations"]


def test_fsdp_holds_the_largest_block_and_the_rest_whole() -> None:
    memory = plan_run(simulated(world_size=2), 4, GIB * 80, weight_copies=1).memory
    block, rest = BLOCK_MATRICES + 2 * 16, 2 * 40 * 16 + 16
    assert memory["gathered_blocks"] == (2 * 4 + 8) * block + (4 + 8) * rest
    assert memory["averaged_weights"] == 4 * NUM_PARAMETERS / 2


def test_the_largest_batch_fits_and_a_larger_one_does_not() -> None:
    step = simulated()
    gpu_memory = round(1.5 * GIB) + 50_000_000
    plan = plan_run(step, 4, gpu_memory)
    assert plan.fits and plan.largest_batch_size > 100

    def peak(batch_size: int) -> float:
        return (1 + FRAGMENTATION) * max(sum(parts.values()) for parts in step.run(batch_size).peaks.values())

    assert peak(plan.largest_batch_size) <= 50_000_000 * 1.01
    assert peak(round(1.1 * plan.largest_batch_size)) > 50_000_000
    too_many = plan_run(step, round(1.1 * plan.largest_batch_size), gpu_memory)
    assert not too_many.fits and too_many.headroom < 0
    assert too_many.largest_batch_size == pytest.approx(plan.largest_batch_size, rel=0.05)


# networks without their weights

LLADA_8B = {
    "model_type": "llada",
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "embedding_size": 126464,
    "vocab_size": 126464,
    "max_sequence_length": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "weight_tying": False,
    "block_type": "llama",
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(("quantization", "num_bytes"), [(None, 2.0), ("nf4", 0.5 + 1 / 64 + 4 / 64 / 256)])
def test_eight_billion_parameters_from_a_configuration_alone(
    quantization: str | None, num_bytes: float, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLADA_8B))
    with without_weights(), WeightlessMode():
        demasker = Demasker.from_pretrained(tmp_path, quantization=quantization)
    inside = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    outside = 2 * 126464 * 4096 + 65 * 4096
    assert inside + outside == 8_015_581_184
    held = sum(weight.numel() * weight.element_size() for weight in demasker.parameters())
    assert held == pytest.approx(inside * num_bytes + outside * 2)


# the command


def test_the_table_says_whether_it_fits(tiny_system: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = tiny_system.arguments("fit", "demasker")[1:]
    run(["plan", *arguments, "--gpu_memory=80"])
    fits = capsys.readouterr().out
    run(["plan", *arguments, "--gpu_memory=1.4", "--world_size=2"])
    too_small = capsys.readouterr().out
    for words in ("parameters of the demasker", "trainable", "optimizer state", "assumed", "8 texts of 32 tokens"):
        assert words in fits
    assert "Fits on 80 GiB with 78." in fits and "Does not fit" not in fits
    assert "Does not fit on 1.4 GiB" in too_small and "No batch fits" in too_small and "each of 2 GPUs" in too_small


@pytest.mark.slow
def test_overrides_reach_the_plan(tiny_system: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = tiny_system.arguments("fit", "demasker")
    base = planned(arguments, capsys)
    other = planned(arguments, capsys, "--batch_size=3", "--data.init_args.length=40", f"{NETWORK}.num_hidden_layers=3")
    assert (base["batch_size"], base["length"]) == (8, 32) and (other["batch_size"], other["length"]) == (3, 40)
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    assert other["parameters"]["demasker"]["total"] == base["parameters"]["demasker"]["total"] + layer


def test_a_plan_leaves_nothing_behind(tiny_system: Any, tmp_path: Path) -> None:
    run(["plan", *tiny_system.arguments("fit", "judge", f"--trainer.default_root_dir={tmp_path / 'runs'}")[1:]])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu_memory=0"], "gpu_memory must be above 0 GiB, got 0"),
        (["--world_size=0"], "world_size must be at least 1, got 0"),
        (["--batch_size=0"], "batch_size must be at least 1, got 0"),
        (["--gpumemory=3"], "--gpumemory"),
        (["--model.init_args.depth=3"], "'depth' is not accepted"),
        (["--config=absent.yaml"], "does not exist.*absent.yaml"),
        ([f"{NETWORK}.max_position_embeddings=16"], "reads at most 16 tokens, got 32"),
    ],
)
def test_a_plan_refuses_in_one_sentence(options: list[str], message: str, tiny_system: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        run(["plan", *tiny_system.arguments("fit", "demasker")[1:], *options])
    assert "\n" not in str(error.value)
