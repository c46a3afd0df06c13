"""Tiny real networks and toy models with known answers, shared by the tests."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crocodil.models import Demasker, LatentPrior, RegisterEncoder

torch.set_num_threads(1)  # threads that wait for each other cost more than networks as small as these

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
VOCAB_SIZE, MASK, EOS = 12, 11, 0
NUM_REGISTERS, LATENT_DIM = 4, 3


def build(make: Callable[[], nn.Module], seed: int, std: float) -> Any:
    """A network with noise on every weight, so that no zero or near-zero initial value hides a path through it."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        network = make().eval()
        for weight in network.parameters():
            weight += std * torch.randn_like(weight)
    return network


@pytest.fixture(scope="session")
def make_demasker() -> Callable[..., Demasker]:
    """Builds a Demasker of 12 tokens (mask 11, end 0), K = 4, in float64; keywords change its network."""

    def make(latent_dim: int | None = LATENT_DIM, mask_token_id: int = MASK, seed: int = 0, **network: Any) -> Demasker:
        settings = {**TINY, "vocab_size": VOCAB_SIZE, **network}
        sizes = {} if latent_dim is None else {"latent_dim": latent_dim, "num_registers": NUM_REGISTERS}
        ids = {"mask_token_id": mask_token_id, "eos_token_id": EOS}
        return build(lambda: Demasker(settings, **ids, **sizes).double(), seed, std=0.4)

    return make


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., RegisterEncoder]:
    """Builds a RegisterEncoder with K = 4 and D = 3 in float64; keywords change its network."""

    def make(seed: int = 1, **network: Any) -> RegisterEncoder:
        settings = {**TINY, "vocab_size": VOCAB_SIZE, **network}
        sizes = {"num_registers": NUM_REGISTERS, "latent_dim": LATENT_DIM}
        return build(lambda: RegisterEncoder(settings, **sizes).double(), seed, std=0.4)

    return make


@pytest.fixture(scope="session")
def make_prior() -> Callable[..., LatentPrior]:
    """Builds a LatentPrior with K = 4 and D = 3 in float32 whose weights are all away from zero."""

    def make(seed: int = 2) -> LatentPrior:
        sizes = {"num_registers": NUM_REGISTERS, "latent_dim": LATENT_DIM}
        return build(lambda: LatentPrior(**sizes, hidden_size=16, num_layers=2, num_heads=2), seed, std=0.2)

    return make


class TabulatedDemasker:
    """The exact conditionals p(x_i | unmasked tokens) of a joint table over V tokens and L positions.

    Args:
        table: (V, ..., V) float64, one axis a position. The mask is token V; its logit is absurdly high, so that a
            sampler that does not rule it out is found out.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table / table.sum()
        self.mask_token_id = table.shape[0]
        self.states = torch.cartesian_prod(*[torch.arange(size) for size in table.shape])

    @property
    def joint(self) -> Tensor:
        """(V^L,) probabilities in the order of `states`."""
        return self.table.flatten()

    def __call__(self, token_ids: Tensor, latents: Tensor | None = None, *, positions: Tensor | None = None) -> Tensor:
        known = token_ids[:, None] != self.mask_token_id
        agrees = ((token_ids[:, None] == self.states) | ~known).all(-1)
        weights = agrees * self.joint
        tokens = nn.functional.one_hot(self.states, self.mask_token_id).double()
        marginals = torch.einsum("bn,nlv->blv", weights, tokens) / weights.sum(1)[:, None, None]
        logits = nn.functional.pad(marginals.log(), (0, 1), value=9.0)
        return logits if positions is None else logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))


@pytest.fixture(scope="session")
def tabulated_demasker() -> type[TabulatedDemasker]:
    """The class `TabulatedDemasker`."""
    return TabulatedDemasker


@pytest.fixture(scope="session")
def chi_square() -> Callable[[Tensor, Tensor], float]:
    """The p-value of Pearson's chi-square test of counts (N,) against probabilities (N,), all above zero."""

    def p_value(counts: Tensor, probabilities: Tensor) -> float:
        expected = probabilities.double() * counts.sum()
        assert expected.min() >= 5, "too few samples for a chi-square test"
        statistic = ((counts - expected) ** 2 / expected).sum()
        return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()

    return p_value


@pytest.fixture
def count_calls() -> Callable[[nn.Module], list[tuple[Any, ...]]]:
    """`seen = count_calls(module)`: the positional arguments of each later call are appended to `seen`."""

    def watch(module: nn.Module) -> list[tuple[Any, ...]]:
        seen: list[tuple[Any, ...]] = []
        module.register_forward_hook(lambda _, args, __: seen.append(args))
        return seen

    return watch


RUN_OPTIONS = {
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 2,
    "trainer.limit_val_batches": 1,
    "trainer.limit_test_batches": 1,
    "trainer.limit_predict_batches": 1,
    "data.init_args.length": 32,
    "data.init_args.batch_size": 8,
    "model.init_args.compile": "false",
}
NETWORK_OPTIONS = {
    "model.init_args.network.hidden_size": 16,
    "model.init_args.network.intermediate_size": 24,
    "model.init_args.network.num_hidden_layers": 2,
    "model.init_args.network.num_attention_heads": 2,
    "model.init_args.network.num_key_value_heads": 2,
}
STAGE_OPTIONS = {
    "demasker": NETWORK_OPTIONS,
    "autoencoder": {"model.init_args.num_registers": 4, "model.init_args.latent_dim": 8},
    "prior": {
        "model.init_args.network.hidden_size": 16,
        "model.init_args.network.num_layers": 2,
        "model.init_args.network.num_heads": 2,
    },
    "student": {},
    "judge": NETWORK_OPTIONS,
}
PREVIOUS = {
    "autoencoder": {"demasker_checkpoint": "demasker"},
    "prior": {"autoencoder_checkpoint": "autoencoder"},
    "student": {"prior_checkpoint": "prior", "autoencoder_checkpoint": "autoencoder"},
}


@dataclass(frozen=True)
class TinySystem:
    """Four stages, trained for two steps each by the CLI on 375 generated functions; K = 4, D = 8, L = 32."""

    root: Path

    def checkpoint(self, stage: str) -> Path:
        return self.root / stage / "checkpoints" / "last.ckpt"

    def arguments(self, command: str, stage: str, *more: str, family: str = "quickstart") -> list[str]:
        """The command line of a stage: its YAML made tiny, then `more`."""
        options = {
            **RUN_OPTIONS,
            **STAGE_OPTIONS[stage],
            f"data.init_args.{'folder' if family == 'quickstart' else 'sources'}": self.root / "corpus",
            "data.init_args.cache_dir": self.root / "cache",
            "trainer.default_root_dir": self.root / stage,
        }
        for argument, previous in PREVIOUS.get(stage, {}).items():
            options[f"model.init_args.{argument}"] = self.checkpoint(previous)
        config = Path(__file__).parents[1] / "lightning_configs" / f"{family}_{stage}.yaml"
        return [command, f"--config={config}", *(f"--{name}={value}" for name, value in options.items()), *more]

    def data(self, batch_size: int = 8):
        from crocodil.data import CanonicalFunctions

        return CanonicalFunctions(32, batch_size, folder=str(self.root / "corpus"), cache_dir=str(self.root / "cache"))

    def module(self, stage: str, **settings: Any):
        """A fresh module of a stage as the CLI builds it, on the previous stage's checkpoint."""
        from crocodil import modules
        from crocodil.data import CanonicalFunctions

        prefix = "model.init_args.network."
        network = {name.removeprefix(prefix): value for name, value in STAGE_OPTIONS[stage].items() if prefix in name}
        if stage in ("demasker", "judge"):
            network |= {"model_type": "llama", "max_position_embeddings": 32}
        given: dict[str, Any] = {"network": network} if network else {}
        if stage == "autoencoder":
            given = {"num_registers": 4, "latent_dim": 8}
        for argument, previous in PREVIOUS.get(stage, {}).items():
            given[argument] = str(self.checkpoint(previous))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            make = getattr(modules, f"{stage.capitalize()}Module")
            return make(CanonicalFunctions(32).vocabulary, **{**given, **settings})


@pytest.fixture(scope="session")
def tiny_system(tmp_path_factory: pytest.TempPathFactory) -> TinySystem:
    """A trained system; do not write to its folder."""
    from crocodil.trainer_cli import run_trainer

    system = TinySystem(tmp_path_factory.mktemp("system"))
    (system.root / "corpus").mkdir()
    for i, (a, b, c) in enumerate(product("+-*/%", repeat=3)):
        functions = [f"def g(a, b):\n    c = a {a} b\n    return c {b} a {c} {last}\n" for last in "abc"]
        (system.root / "corpus" / f"m{i:03d}.py").write_text("\n\n".join(functions))
    for stage in ("demasker", "autoencoder", "prior", "judge"):
        run_trainer(system.arguments("fit", stage))
    return system


@pytest.fixture(scope="session")
def student_checkpoint(tiny_system: TinySystem) -> Path:
    """A student of the trained system's prior, two steps on; do not change it."""
    from crocodil.trainer_cli import run_trainer

    run_trainer(tiny_system.arguments("fit", "student"))
    return tiny_system.checkpoint("student")


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_system: TinySystem):
    """The trained system as a pipeline with base, encoder and prior; do not change it."""
    from crocodil.commands import build_pipeline

    return build_pipeline(*(str(tiny_system.checkpoint(stage)) for stage in ("autoencoder", "prior", "demasker")))


LLADA_NAMES = {
    "model.layers.": "model.transformer.blocks.",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}
"""From the names of Llama in transformers to those of LLaDA's checkpoints."""


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., Any]:
    """`byte_tokenizer(*special, bos=None, eos=0)`: a tokenizer of bytes and special tokens; the end token pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(*special: str, bos: int | None = None, eos: int = 0) -> Any:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(special))
        named = {"eos_token": special[eos], "pad_token": special[eos]}
        named |= {} if bos is None else {"bos_token": special[bos]}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)

    return make


@pytest.fixture(scope="session")
def tiny_llada(byte_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in LLaDA's published format, with a byte-level tokenizer that knows no mask; do not change it."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llada")
    byte_tokenizer("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", bos=0, eos=1).save_pretrained(str(folder))

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LlamaForCausalLM(LlamaConfig(vocab_size=272, **sizes, bos_token_id=None, eos_token_id=None))
    tensors = {}
    for name, tensor in network.state_dict().items():
        for theirs, ours in LLADA_NAMES.items():
            name = name.replace(theirs, ours)
        tensors[name] = tensor
    save_file(tensors, str(folder / "model.safetensors"))
    config = {
        "model_type": "llada",
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 4,
        "mlp_hidden_size": 128,
        "vocab_size": 272,
        "embedding_size": 272,
        "max_sequence_length": 64,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "weight_tying": False,
        "mask_token_id": 258,
        "eos_token_id": 257,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., list[float]]:
    """`losses = fit(module, data, *callbacks, max_steps=3, ckpt_path=None)`: a fit without files or validation."""
    from lightning.pytorch import Callback, Trainer

    class Losses(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
            self.values.append(outputs["loss"].item())

    def run(module: nn.Module, data: Any, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> list[float]:
        losses = Losses()
        settings: dict[str, Any] = {
            "max_steps": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        trainer = Trainer(**(settings | options), callbacks=[losses, *callbacks])
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return losses.values

    return run
