"""The model "crocodil" of lm-evaluation-harness."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from crocodil.evaluation.likelihood import log_likelihood, score
from crocodil.harness.questions import Pair, Question, equal_lengths, fit_prompts, request_seed
from crocodil.harness.writer import load
from crocodil.pipeline import Algorithm, batches, masked_sampler
from crocodil.pipeline_folder import is_pipeline

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ImportError as error:
    raise ValueError(f"crocodil.harness needs lm-eval: pip install 'crocodil[eval]' ({error})") from error

Scorer = Literal["base", "demasker"]
USED = {"until", "max_gen_toks", "do_sample", "temperature"}
"""What is read of a task's `generation_kwargs`."""


@register_model("crocodil")
class CrocodilLM(TemplateLM):
    """A pipeline or a published masked-diffusion checkpoint, as lm-evaluation-harness wants it.

    Log-likelihoods are Monte Carlo estimates of a lower bound (`log_likelihood`). That of a text under a sketch drawn
    by the prior, the marginal over z, is not tractable, so they are those of a demasker without latents. Every result
    depends on the seed and its request, never on the batch size or on the order of requests.

    Args:
        pretrained: folder of a pipeline; or folder or hub id of a published checkpoint (`Demasker.from_pretrained`).
        algorithm: what writes: "masked", "conthendisc" or "conwithindisc".
        num_steps: demasker calls an answer; None takes one a token.
        length: tokens to write, where a task has no `max_gen_toks`.
        temperature: of written tokens; None takes a task's own, which is 0 where it does not sample.
        scorer: what log-likelihoods are of: the "base" of a pipeline, or its "demasker" without latents; None takes
            the base if there is one.
        mc_samples: Monte Carlo samples of a log-likelihood; answers of one token are exact with one.
        batch_size: texts in one call.
        seed: of masks and of written texts.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        add_bos_token: whether texts begin with BOS; None says yes for pipelines, which are trained so, and does what
            the tokenizer does for published checkpoints.
        prior_steps: see `CrocodilPipeline.__call__`.
        num_registers: likewise.
        dtype: see `Demasker.from_pretrained`; like the next three, for published checkpoints only.
        family: likewise.
        quantization: likewise.
        adapter: folder of a LoRA adapter in peft's layout. A pipeline has its adapters within.
        sampler: further arguments of `MaskedSampler`: `remasking`, `block_size`, `top_p`, `early_stop`, ...

    Raises:
        ValueError: if there is no model, or a setting is unknown or out of range.
    """

    def __init__(
        self,
        pretrained: str,
        algorithm: Algorithm = "masked",
        num_steps: int | None = None,
        length: int = 256,
        temperature: float | None = None,
        scorer: Scorer | None = None,
        mc_samples: int = 128,
        batch_size: int | str = 32,
        seed: int = 0,
        device: str | None = None,
        add_bos_token: bool | None = None,
        prior_steps: int = 32,
        num_registers: int | None = None,
        dtype: str | None = None,
        family: str | None = None,
        quantization: str | None = None,
        adapter: str | None = None,
        **sampler: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if mc_samples < 1:
            raise ValueError(f"mc_samples must be at least 1, got {mc_samples}")
        if scorer is not None and scorer not in get_args(Scorer):
            raise ValueError(f"scorer must be one of {', '.join(get_args(Scorer))}, got {scorer!r}")
        masked_sampler(num_steps or length, **sampler)  # settings are checked before weights are read
        self.pretrained = pretrained
        self.pipe = load(pretrained, dtype, family, quantization, adapter)
        self.pipe.check_networks(algorithm, num_registers)
        if scorer == "base" and self.pipe.base is None:
            raise ValueError(f"{pretrained} has no base to score with; leave scorer out")
        self.scorer = self.pipe.demasker if scorer == "demasker" or self.pipe.base is None else self.pipe.base
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.pipe.to(self._device)
        self.algorithm: Algorithm = algorithm
        self.num_steps, self.length, self.temperature = num_steps, length, temperature
        self.mc_samples, self.batch_size, self.seed = mc_samples, int(batch_size), seed
        self.prior_steps, self.num_registers, self.sampler = prior_steps, num_registers, sampler
        self.tokenizer = self.pipe.codec.tokenizer
        tokenizer_adds = list(self.tokenizer.encode("a"))[:1] == [self.prefix_token_id]
        self.adds_bos = (is_pipeline(pretrained) or tokenizer_adds) if add_bos_token is None else add_bos_token

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "CrocodilLM":
        """Builds it from `--model_args`, which win over lm_eval's own options.

        Those say cuda:0 where the user said nothing, so a GPU that is not there is none that was asked for.
        """
        options = {key: value for key, value in (additional_config or {}).items() if value is not None}
        options.pop("max_batch_size", None)
        if str(options.get("device")).startswith("cuda") and not torch.cuda.is_available():
            del options["device"]
        return cls(**(options | arg_dict))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "CrocodilLM":
        """The same of a string `key=value,key=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return self.pipe.codec.vocabulary.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS."""
        return self.pipe.codec.vocabulary.bos_token_id

    @property
    def max_length(self) -> int:
        """The longest text, prompt included, in tokens."""
        return self.pipe.demasker.max_length

    @property
    def tokenizer_name(self) -> str:
        """For lm_eval's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text, by the tokenizer's template.

        Raises:
            ValueError: if it has none.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{self.pretrained} has no chat template: leave --apply_chat_template out")
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return cast(str, text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; special tokens spelled out in it, as chat templates do, are read as such.

        Args:
            string: the text.
            add_special_tokens: False leaves out the BOS that a text begins with; one that it has is not doubled.
            kwargs: not used.
        """
        codec, bos = self.pipe.codec, self.prefix_token_id
        is_canonical = codec.text_format == "canonical"
        ids = codec.encode(string) if is_canonical else list(self.tokenizer.encode(string, add_special_tokens=False))
        return [bos, *ids] if self.adds_bos and add_special_tokens is not False and ids[:1] != [bos] else ids

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Scores answers. Those to one prompt share their random numbers, so that their differences vary less."""
        scores = [(0.0, False)] * len(requests)
        asked, answered = [prompt for _, prompt, _ in requests], [answer for _, _, answer in requests]
        asked = fit_prompts(asked, [len(answer) for answer in answered], self.max_length)
        pairs = list(zip(asked, answered, strict=True))
        for rows, prompts, answers in self._batches(pairs, "Scoring answers", disable_tqdm):
            seeds = self._seeds([pairs[i][0] for i in rows])
            log_p, greedy = score(self.scorer, prompts, answers, seeds, self.mc_samples, self.batch_size)
            for i, result in zip(rows, zip(log_p.tolist(), greedy.tolist(), strict=True), strict=True):
                scores[i] = result
                self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Lower bounds on log-likelihoods of whole texts; long ones in windows, each told of the token before it."""
        texts = [request.args[0] for request in requests]
        pairs, owners = [], []
        for owner, text in enumerate(texts):
            token_ids = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(token_ids, self.prefix_token_id, self.max_length - 1, 1):
                pairs.append(make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(texts)
        for rows, prompts, answers in self._batches(pairs, "Scoring windows", disable_tqdm):
            seeds = self._seeds([pairs[i] for i in rows])
            log_p = log_likelihood(self.scorer, prompts, answers, seeds, self.mc_samples, self.batch_size)
            for i, part in zip(rows, log_p.tolist(), strict=True):
                totals[owners[i]] += part
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Writes answers; a request that is made several times (`repeats`) is answered differently each time."""
        questions = self._questions([request.args for request in requests])
        alike: dict[tuple[int, float], list[int]] = defaultdict(list)
        for i, question in enumerate(questions):
            alike[question.length, question.temperature].append(i)
        texts = [""] * len(questions)
        with tqdm(total=len(questions), disable=disable_tqdm, desc="Writing answers") as bar:
            for (length, temperature), members in alike.items():
                sampler = masked_sampler(self.num_steps or length, **{**self.sampler, "temperature": temperature})
                for batch in batches([questions[i].prompt for i in members], self.batch_size):
                    rows = [members[i] for i in batch]
                    written = self.pipe.write(
                        [questions[i].prompt for i in rows],
                        [questions[i].seed for i in rows],
                        length,
                        self.algorithm,
                        sampler,
                        self.prior_steps,
                        self.num_registers,
                    )
                    for i, token_ids in zip(rows, written, strict=True):
                        texts[i] = self.pipe.answer(questions[i].prompt, token_ids, questions[i].until)
                        self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    bar.update(len(rows))
        return texts

    def _questions(self, arguments: Sequence[tuple[str, dict[str, Any]]]) -> list[Question]:
        questions: list[Question] = []
        numbers: Counter[str] = Counter()
        settings = [normalize_gen_kwargs(given, self.length) for _, given in arguments]
        if ignored := sorted({name for given in settings for name in given} - USED):
            warnings.warn(f"of generation_kwargs, {', '.join(ignored)} are not used", stacklevel=3)
        prompts = [self.tok_encode(context) for context, _ in arguments]
        prompts = fit_prompts(prompts, [given["max_gen_toks"] for given in settings], self.max_length)
        for prompt, given, request in zip(prompts, settings, arguments, strict=True):
            temperature = given.get("temperature", 0.0) if self.temperature is None else self.temperature
            seed = request_seed(self.seed, prompt, numbers[repr(request)])
            numbers[repr(request)] += 1
            questions.append(Question(prompt, seed, given["max_gen_toks"], temperature, given["until"]))
        return questions

    def _batches(
        self, pairs: Sequence[Pair], description: str, disable_tqdm: bool
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Indices, prompts (N, P) and answers (N, L') of pairs of equal lengths, N <= `batch_size`."""
        with tqdm(total=len(pairs), disable=disable_tqdm, desc=description) as bar:
            for rows in equal_lengths(pairs, self.batch_size):
                prompts, answers = (
                    torch.tensor([pairs[i][part] for i in rows], dtype=torch.int64, device=self._device)
                    for part in (0, 1)
                )
                yield rows, prompts, answers
                bar.update(len(rows))

    def _seeds(self, keys: Sequence[Any]) -> Tensor:
        return torch.tensor([request_seed(self.seed, key) for key in keys], device=self._device)
