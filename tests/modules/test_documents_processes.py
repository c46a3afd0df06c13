"""Documents spread unevenly over two processes (gloo) count as in one. Run as a script, this file is one of them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from crocodil.diffusion.documents import NumberedDocuments
from crocodil.diffusion.masking import LinearMasking
from crocodil.diffusion.noise import BatchNoise
from crocodil.models import Demasker, RegisterEncoder
from crocodil.modules.demasker import masked_diffusion_loss

IDS = torch.tensor(
    [[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 4, 4, 5, 5], [1, 1, 1, 1, 2, 0, 0, 0]]
)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 12}
NETWORK = {"model_type": "llama", **SIZES, "bos_token_id": None, "eos_token_id": None}


def figures(rank: int, size: int) -> dict[str, Tensor]:
    """Losses, a gradient and latent statistics of every `size`-th row, averaged over processes."""
    torch.manual_seed(0)
    demasker = Demasker(NETWORK, mask_token_id=11, eos_token_id=0).double()
    encoder = RegisterEncoder(NETWORK, num_registers=2, latent_dim=3).double()
    token_ids, documents = torch.randint(1, 11, IDS.shape)[rank::size], NumberedDocuments(IDS[rank::size])
    noise = BatchNoise(torch.tensor(7), torch.arange(4)[rank::size], 4)
    found = {}
    for weight in ("elbo", "none"):
        demasker.zero_grad()
        loss = masked_diffusion_loss(demasker, token_ids, noise, LinearMasking(), weight, documents=documents)["loss"]
        loss.backward()
        found[weight] = loss.detach()
        found[f"{weight} gradient"] = demasker.network.lm_head.weight.grad.clone()
    for value in found.values():
        if size > 1:
            distributed.all_reduce(value)
            value /= size
    encoder.update_statistics(documents.from_rows(encoder.encode(token_ids, **documents.attention)), 1.0)
    return found | {"mean": encoder.latent_mean, "std": encoder.latent_std}


@pytest.mark.slow
def test_uneven_processes_count_documents_and_tokens_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path)], env=os.environ | settings | {"RANK": str(rank)})
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    torch.testing.assert_close(torch.load(tmp_path / "two.pt"), figures(0, 1), rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    results = figures(distributed.get_rank(), 2)
    if distributed.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "two.pt")
    distributed.destroy_process_group()
