"""Pipelines and published checkpoints that answer prompts of token ids, each with a seed of its own."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from crocodil.data.codec import TextCodec
from crocodil.diffusion.noise import RowNoise
from crocodil.evaluation.stopwatch import Stopwatch
from crocodil.models import Demasker
from crocodil.pipeline import Algorithm, CrocodilPipeline
from crocodil.pipeline_folder import is_pipeline
from crocodil.samplers import MaskedSampler


class Writer(CrocodilPipeline):
    """A pipeline that writes behind prompts of token ids instead of texts."""

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        length: int,
        algorithm: Algorithm,
        sampler: MaskedSampler,
        prior_steps: int = 32,
        num_registers: int | None = None,
    ) -> list[Tensor]:
        """The tokens written behind each prompt, (length,) int64; they depend on prompt and seed, never on the batch.

        Args:
            prompts: B lists of token ids, of any lengths.
            seeds: one for each, 64 bits.
            length: tokens to write.
            algorithm: see `CrocodilPipeline.__call__`, as for the rest.
            sampler: fills the tokens in.
            prior_steps: steps of the prior for the first draw.
            num_registers: registers the demasker reads.
        """
        first, later = (self.latent_sampler(num_steps) for num_steps in (prior_steps, 8))
        draw = self.bound_sampler(algorithm, sampler, first, later, None, num_registers, Stopwatch(self.device))
        out = draw(
            length=length,
            batch_size=len(prompts),
            prompt_ids=[torch.tensor(prompt, dtype=torch.int64) for prompt in prompts],
            generator=RowNoise(torch.tensor(seeds, device=self.device)),
        )
        rows = zip(out.token_ids.cpu(), prompts, strict=True)
        return [row[len(prompt) : len(prompt) + length] for row, prompt in rows]

    def answer(self, prompt: Sequence[int], written: Tensor, until: Sequence[str]) -> str:
        """The text of what was written behind a prompt, up to the first stop token or string.

        Args:
            prompt: token ids.
            written: (L,) int64.
            until: stop strings.
        """
        is_stop = torch.isin(written, torch.tensor(self.demasker.stop_token_ids))
        written = written[: int(is_stop.int().argmax())] if is_stop.any() else written
        before = [token for token in prompt if token != self.codec.vocabulary.eos_token_id]  # would end the text
        text = self.codec.decode([*before, *written.tolist()])[len(self.codec.decode(before)) :]
        return text[: min((at for stop in until if stop and (at := text.find(stop)) >= 0), default=len(text))]


def load(
    pretrained: str,
    dtype: str | None = None,
    family: str | None = None,
    quantization: str | None = None,
    adapter: str | None = None,
) -> Writer:
    """A pipeline, or a published checkpoint as one.

    Args:
        pretrained: folder of either, or hub id of a checkpoint.
        dtype: see `Demasker.from_pretrained`; like the next three, for published checkpoints.
        family: likewise.
        quantization: likewise.
        adapter: folder of a LoRA adapter in peft's layout.

    Raises:
        ValueError: if there is no such model, or a pipeline is given what is for published checkpoints.
    """
    if is_pipeline(pretrained):
        given = {"dtype": dtype, "family": family, "quantization": quantization, "adapter": adapter}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{', '.join(wrong)} must be left out: {pretrained} is a pipeline and has its own")
        return Writer.from_pretrained(pretrained)
    demasker = Demasker.from_pretrained(pretrained, family, quantization, dtype)
    if adapter is not None:
        add_peft_adapter(demasker, adapter)
    return Writer(demasker, TextCodec.published(pretrained, family))


def add_peft_adapter(demasker: Demasker, folder: str) -> None:
    """Puts a LoRA adapter in peft's layout on a network without any, in place.

    Raises:
        ValueError: if there is none in the folder, or it does not fit.
    """
    from peft import LoraConfig

    from crocodil.models.adapters import load_adapter

    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"expected an adapter in peft's layout in {folder}, but it has no adapter_config.json")
    demasker.with_lora(LoraConfig.from_pretrained(folder).to_dict())
    load_adapter(demasker.network, folder)
