import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.api.registry import get_model

from crocodil.data.codec import TextCodec, byte_level_bpe
from crocodil.evaluation.likelihood import is_greedy, log_likelihood
from crocodil.harness import CrocodilLM
from crocodil.harness.__main__ import main
from crocodil.harness.questions import equal_lengths, request_seed
from crocodil.models import Demasker, LatentPrior, RegisterEncoder
from crocodil.pipeline import ALGORITHMS, CrocodilPipeline
from crocodil.samplers import MaskedSampler

TEXTS = ["the cat sat on the mat", "the dog ate the cat", "a mat is on the dog"] * 4
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def stirred(make: Callable[[], torch.nn.Module], seed: int) -> Any:
    """A network whose answers are far from uniform."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        network = make().eval()
        for weight in network.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return network


@pytest.fixture(scope="module")
def pipeline() -> CrocodilPipeline:
    codec = byte_level_bpe(TEXTS, 280)
    network = {"model_type": "llama", **SIZES, "max_position_embeddings": 48, "vocab_size": codec.vocabulary.size}
    network |= {"bos_token_id": None, "eos_token_id": None}
    ids = {"mask_token_id": codec.vocabulary.mask_token_id, "eos_token_id": codec.vocabulary.eos_token_id}
    latents = {"latent_dim": 3, "num_registers": 4}
    return CrocodilPipeline(
        stirred(lambda: Demasker(network, **ids, **latents), 0),
        codec,
        stirred(lambda: RegisterEncoder(network, **latents), 1),
        stirred(lambda: LatentPrior(**latents, hidden_size=16, num_layers=2, num_heads=2), 2),
        base=stirred(lambda: Demasker(network, **ids), 3),
    )


@pytest.fixture(scope="module")
def folder(pipeline: CrocodilPipeline, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("harness") / "pipeline"
    pipeline.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def lm(folder: str) -> CrocodilLM:
    return CrocodilLM(folder, mc_samples=8, length=6, device="cpu")


def instances(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, i, metadata=("task", i, 1)) for i, given in enumerate(arguments)]


CHOICES = [(q, a) for q in ("the cat", "a dog on the", "the mat is on") for a in (" sat", " sit on dogs", " mat", "\n")]
QUESTIONS = [(q, {"until": ["\n"], "max_gen_toks": n}) for q in ("the cat", "a dog on the", "the") for n in (4, 6)]


def ids(lm: CrocodilLM, text: str) -> list[int]:
    return [lm.prefix_token_id, *lm.pipe.codec.encode(text)]


def test_scores_are_those_of_the_base_behind_bos_and_the_context(lm: CrocodilLM) -> None:
    assert lm.scorer is lm.pipe.base
    scores = lm.loglikelihood(instances("loglikelihood", *CHOICES), disable_tqdm=True)
    for (context, continuation), (log_p, greedy) in zip(CHOICES, scores, strict=True):
        prompt = ids(lm, context)
        answer = ids(lm, context + continuation)[len(prompt) :]
        pair = torch.tensor([prompt]), torch.tensor([answer])
        seed = torch.tensor([request_seed(0, prompt)])
        assert log_p == pytest.approx(log_likelihood(lm.pipe.base, *pair, seed, 8).item(), abs=1e-4)
        assert greedy is is_greedy(lm.pipe.base, *pair).item()


def test_greedy_answers_are_told(lm: CrocodilLM) -> None:
    prompt = ids(lm, "the cat sat")
    (written,) = lm.pipe.write([prompt], [0], 4, "masked", MaskedSampler(4))
    requests = [(("", ""), prompt, answer) for answer in (written.tolist(), [*written.tolist()[:3], 9])]
    assert written[3] != 9
    assert [greedy for _, greedy in lm._loglikelihood_tokens(requests)] == [True, False]


def test_spaces_behind_the_context_belong_to_the_answer(lm: CrocodilLM) -> None:
    one, other = lm.loglikelihood(instances("loglikelihood", ("the cat  ", "sat"), ("the cat", "  sat")))
    assert one == other


def test_without_context_bos_stands_in_front(lm: CrocodilLM) -> None:
    (score,) = lm.loglikelihood(instances("loglikelihood", ("", "cat")))
    bos, answer = lm.prefix_token_id, lm.pipe.codec.encode("cat")
    seed = torch.tensor([request_seed(0, [bos])])
    expected = log_likelihood(lm.pipe.base, torch.tensor([[bos]]), torch.tensor([answer]), seed, 8)
    assert score[0] == pytest.approx(expected.item(), abs=1e-4)


def test_the_scorer_can_be_the_demasker_without_latents(lm: CrocodilLM, folder: str) -> None:
    requests = instances("loglikelihood", *CHOICES)
    demasker = CrocodilLM(folder, mc_samples=8, scorer="demasker", device="cpu")
    assert demasker.loglikelihood(requests) != lm.loglikelihood(requests)
    assert CrocodilLM(folder, mc_samples=8, scorer="base", device="cpu").loglikelihood(requests) == lm.loglikelihood(
        requests
    )


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_neither_batch_size_nor_order_matters(algorithm: Any, batch_size: int, folder: str) -> None:
    settings = {"algorithm": algorithm, "mc_samples": 5, "num_steps": 2, "prior_steps": 2, "temperature": 1.0}
    one = CrocodilLM(folder, batch_size=7, device="cpu", **settings)
    other = CrocodilLM(folder, batch_size=batch_size, device="cpu", **settings)
    texts = [(f"{context}{continuation}" * repeats,) for context, continuation in CHOICES for repeats in (1, 9)]
    for kind, arguments in (
        ("generate_until", QUESTIONS),
        ("loglikelihood", CHOICES),
        ("loglikelihood_rolling", texts),
    ):
        if kind != "generate_until" and algorithm != "masked":
            continue
        requests = instances(kind, *arguments)
        order = random.Random(0).sample(range(len(requests)), len(requests))
        expected = getattr(one, kind)(requests, disable_tqdm=True)
        shuffled = getattr(other, kind)([requests[i] for i in order], disable_tqdm=True)
        if kind == "generate_until":
            assert shuffled == [expected[i] for i in order] and len(set(expected)) > 3
        else:
            assert torch.tensor(shuffled).numpy() == pytest.approx(torch.tensor(expected)[order].numpy(), abs=1e-4)


def test_the_seed_matters(lm: CrocodilLM, folder: str) -> None:
    other = CrocodilLM(folder, mc_samples=8, length=6, device="cpu", seed=1, temperature=1.0)
    one = CrocodilLM(folder, mc_samples=8, length=6, device="cpu", temperature=1.0)
    for kind, arguments in (("generate_until", QUESTIONS), ("loglikelihood", CHOICES)):
        assert getattr(one, kind)(instances(kind, *arguments)) != getattr(other, kind)(instances(kind, *arguments))


def test_batches_hold_equal_lengths_the_longest_first() -> None:
    pairs = [([1], [2]), ([1, 2], [3]), ([1], [2, 3]), ([0, 2], [3]), ([3], [4]), ([9, 9], [9])]
    assert list(equal_lengths(pairs, 2)) == [[2], [3, 1], [5], [0, 4]]


def silence(pipe: CrocodilPipeline) -> None:
    """Every token has probability 1 / V from now on, whatever is read."""
    with torch.no_grad():
        for network in (pipe.base, pipe.demasker):
            assert network is not None
            network.network.get_output_embeddings().weight.zero_()


def test_a_rolling_likelihood_counts_every_token_once(folder: str) -> None:
    """Under a uniform model each token costs log V, through all windows."""
    lm = CrocodilLM(folder, mc_samples=3, device="cpu")
    silence(lm.pipe)
    texts = [("the cat " * repeats,) for repeats in (1, 8, 30, 60)]
    sizes = [len(lm.pipe.codec.encode(text)) for (text,) in texts]
    assert sizes[0] < 47 < 2 * 47 < sizes[-1]
    totals = lm.loglikelihood_rolling(instances("loglikelihood_rolling", *texts))
    nats = torch.tensor(lm.pipe.codec.vocabulary.size).log().item()
    assert totals == pytest.approx([-nats * size for size in sizes], rel=1e-5)
    assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("",))) == [0.0]


def test_a_window_is_told_of_the_token_before_it(lm: CrocodilLM) -> None:
    token_ids = lm.pipe.codec.encode("the cat sat on the dog " * 12)
    assert 47 < len(token_ids) < 2 * 47
    text = lm.pipe.codec.decode(token_ids)
    rest = len(token_ids) - 47
    first = [lm.prefix_token_id], token_ids[:47]
    second = token_ids[-48:-rest], token_ids[-rest:]
    expected = 0.0
    for pair in (first, second):
        seed = torch.tensor([request_seed(0, pair)])
        expected += log_likelihood(lm.pipe.base, *(torch.tensor([part]) for part in pair), seed, 8).item()
    (total,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    assert total == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_writer_writes_what_the_pipeline_does(algorithm: Any, lm: CrocodilLM) -> None:
    """Given the seeds that the pipeline gives to its samples."""
    texts = ["the cat", "a dog on the", "the"]
    sampler = MaskedSampler(4, temperature=1.0)
    written = lm.pipe.write([ids(lm, text) for text in texts], [0, 1, 2], 8, algorithm, sampler, prior_steps=3)
    result = lm.pipe(1, 8, algorithm, 4, texts, temperature=1.0, prior_steps=3)
    for row, text, token_ids in zip(written, texts, result.token_ids, strict=True):
        assert torch.equal(row, token_ids[len(ids(lm, text)) :][:8])


def test_answers_are_the_texts_of_the_pipeline_without_the_prompt(lm: CrocodilLM) -> None:
    """At temperature 0 the masked model needs no seed."""
    texts = ["the cat", "a dog on the", "the"]
    answers = lm.generate_until(instances("generate_until", *[(text, {"until": []}) for text in texts]))
    result = lm.pipe(1, 6, "masked", 6, texts, temperature=0.0)
    assert [text + answer for text, answer in zip(texts, answers, strict=True)] == result.texts


def test_an_answer_ends_before_a_stop_string_and_has_nothing_of_the_prompt(lm: CrocodilLM) -> None:
    codec = lm.pipe.codec
    prompt = ids(lm, "the cat sat")
    written = torch.tensor([*codec.encode(" on the mat the dog"), lm.eot_token_id, *codec.encode(" never")])
    assert lm.pipe.answer(prompt, written, []) == " on the mat the dog"
    assert lm.pipe.answer(prompt, written, ["the dog", "mat"]) == " on the "
    assert lm.pipe.answer(prompt, written, ["cat", ""]) == " on the mat the dog"
    assert lm.pipe.answer([*prompt, lm.eot_token_id, *prompt], written, []) == " on the mat the dog"
    assert lm.pipe.answer(prompt, torch.tensor([lm.eot_token_id, 5]), []) == ""


def test_the_end_of_a_turn_ends_an_answer_too(folder: str) -> None:
    """In families that have such a token (LLaDA's <|eot_id|>)."""
    pipe = CrocodilLM(folder, device="cpu").pipe
    words, end = pipe.codec.encode(" on the mat"), pipe.codec.encode("!")
    pipe.demasker.conventions = replace(pipe.demasker.conventions, stop_token_ids=tuple(end))
    assert pipe.answer([1], torch.tensor([*words, *end, *words]), []) == " on the mat"


def test_the_task_says_how_much_is_written_and_how_warm(folder: str, count_calls: Any) -> None:
    lm = CrocodilLM(folder, length=6, device="cpu")
    calls = count_calls(lm.pipe.base)
    widths = []
    for settings in ({}, {"max_gen_toks": 3}, {"max_new_tokens": 4}):
        calls.clear()
        lm.generate_until(instances("generate_until", ("the cat", {"until": [], **settings})))
        widths.append((calls[0][0].shape[1] - len(ids(lm, "the cat")), len(calls)))
    assert widths == [(6, 6), (3, 3), (4, 4)], "one token a call, where num_steps is not given"
    warm = [("the cat", {"until": [], "do_sample": True, "temperature": 1.0})] * 5
    assert len(set(lm.generate_until(instances("generate_until", *warm)))) > 1
    cold = [("the cat", {"until": [], "do_sample": False, "temperature": 1.0})] * 5
    assert len(set(lm.generate_until(instances("generate_until", *cold)))) == 1
    lm.temperature = 1.0
    assert len(set(lm.generate_until(instances("generate_until", *cold)))) > 1


def test_settings_of_the_sampler_are_used(folder: str, lm: CrocodilLM) -> None:
    requests = instances("generate_until", *[(q, {"until": [], "max_gen_toks": 8}) for q, _ in QUESTIONS])
    expected = lm.generate_until(requests)
    for settings in ({"num_steps": 2}, {"block_size": 2}, {"remasking": "random"}, {"algorithm": "conthendisc"}):
        other = CrocodilLM(folder, length=6, device="cpu", **settings)
        assert other.generate_until(requests) != expected, settings


@pytest.mark.parametrize("change", [{"prior_steps": 2}, {"num_registers": 1}])
def test_settings_of_the_sketch_are_used(change: dict[str, Any], folder: str) -> None:
    settings = {"algorithm": "conthendisc", "num_steps": 2, "prior_steps": 4, "length": 8, "device": "cpu"}
    requests = instances("generate_until", *[(q, {"until": []}) for q in ("the cat", "a dog on the", "the", "mat")])
    one, other = (CrocodilLM(folder, **{**settings, **more}).generate_until(requests) for more in ({}, change))  # type: ignore[arg-type]
    assert one != other


def test_programs_are_scored_and_written_in_the_canonical_format(tmp_path: Path) -> None:
    codec = TextCodec.canonical()
    network = {"model_type": "llama", **SIZES, "max_position_embeddings": 48, "vocab_size": codec.vocabulary.size}
    given = {"mask_token_id": codec.vocabulary.mask_token_id, "eos_token_id": codec.vocabulary.eos_token_id}
    CrocodilPipeline(stirred(lambda: Demasker(network, **given), 0), codec).save_pretrained(tmp_path)
    lm = CrocodilLM(str(tmp_path), mc_samples=4, length=5, device="cpu")
    prompt = "def f(self, v0):\n    v1 = v0 +"
    assert lm.tok_encode(prompt) == [codec.vocabulary.bos_token_id, *codec.encode(prompt)]
    pairs = [(prompt, " v0"), (prompt, " v0\n    return v1"), ("def f(self, v0):\n    ", "return v0")]
    assert all(log_p < 0 for log_p, _ in lm.loglikelihood(instances("loglikelihood", *pairs)))
    assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("def f():\n    return v0",)))[0] < 0
    written = torch.tensor(codec.encode(prompt + " v0\n    return v1")[len(codec.encode(prompt)) :])
    assert lm.pipe.answer(ids(lm, prompt), written, []).strip() == "v0\n    return v1"
    assert len(lm.generate_until(instances("generate_until", (prompt, {"until": ["\n\n"]})))) == 1


def test_results_are_cached_as_they_come(lm: CrocodilLM, tmp_path: Path, count_calls: Any) -> None:
    """What was done before a run broke off is not done again."""
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    requests = {
        "loglikelihood": instances("loglikelihood", *CHOICES),
        "loglikelihood_rolling": instances("loglikelihood_rolling", *[(q,) for q, _ in CHOICES]),
        "generate_until": instances("generate_until", *QUESTIONS),
    }
    expected = {kind: getattr(lm, kind)(given) for kind, given in requests.items()}
    lm.set_cache_hook(CacheHook(None))
    calls = count_calls(lm.pipe.base.decoder)
    for kind, given in requests.items():
        assert getattr(cached, kind)(given) == expected[kind]
    assert not calls


def test_settings_of_tasks_that_are_not_used_are_named(lm: CrocodilLM) -> None:
    requests = instances("generate_until", ("the", {"until": [], "max_gen_toks": 2, "top_p": 0.5, "num_beams": 3}))
    with pytest.warns(UserWarning, match="of generation_kwargs, num_beams, top_p are not used"):
        lm.generate_until(requests)


def test_long_prompts_lose_their_beginning_with_a_warning(lm: CrocodilLM) -> None:
    long = "the cat sat on a dog " * 30
    kept = lm.pipe.codec.encode(long)
    answer = lm.pipe.codec.encode(" mat on")
    with pytest.warns(UserWarning, match="1 of 2 prompts lost their beginning: the model reads 48 tokens"):
        score, _ = lm.loglikelihood(instances("loglikelihood", (long.rstrip(), " mat on"), ("the", " mat")))
    prompt = lm.pipe.codec.encode(long.rstrip())[-(48 - len(answer)) :]
    pair, seed = (torch.tensor([prompt]), torch.tensor([answer])), torch.tensor([request_seed(0, prompt)])
    assert score[0] == pytest.approx(log_likelihood(lm.pipe.base, *pair, seed, 8).item(), abs=1e-4)
    with pytest.warns(UserWarning, match="1 of 1 prompts lost their beginning"):
        (text,) = lm.generate_until(instances("generate_until", (long, {"until": []})))
    (written,) = lm.pipe.write([kept[-42:]], [0], 6, "masked", MaskedSampler(6))
    assert text == lm.pipe.answer(kept[-42:], written, [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm.loglikelihood(instances("loglikelihood", *CHOICES))


def test_answers_without_a_token_of_their_own_or_too_long_are_refused(lm: CrocodilLM) -> None:
    with pytest.raises(ValueError, match="an answer must have a token of its own"):
        lm.loglikelihood(instances("loglikelihood", ("the cat", "")))
    with pytest.raises(ValueError, match="an answer must have at most 48 tokens, all that the model reads, got"):
        lm.loglikelihood(instances("loglikelihood", ("the", " q" * 60)))
    with pytest.raises(ValueError, match=r"at most 48 tokens, all that the model reads, got 64 .*max_gen_toks"):
        lm.generate_until(instances("generate_until", ("the", {"until": [], "max_gen_toks": 64})))


def test_a_published_checkpoint_is_scored_as_its_tokenizer_reads(tiny_llada: Path) -> None:
    lm = CrocodilLM(str(tiny_llada), mc_samples=4, device="cpu", length=4)
    assert not lm.adds_bos and lm.max_length == 64
    (score,) = lm.loglikelihood(instances("loglikelihood", ("ab", "cd")))
    demasker, codec = Demasker.from_pretrained(tiny_llada).eval(), TextCodec.published(str(tiny_llada))
    prompt = codec.encode("ab")
    pair = torch.tensor([prompt]), torch.tensor([codec.encode("cd")])
    expected = log_likelihood(demasker, *pair, torch.tensor([request_seed(0, prompt)]), 4)
    assert score[0] == pytest.approx(expected.item(), abs=1e-4)
    with_bos = CrocodilLM(str(tiny_llada), mc_samples=4, device="cpu", add_bos_token=True)
    assert with_bos.tok_encode("ab") == [256, *prompt] and with_bos.tok_encode("ab", add_special_tokens=False) == prompt
    half = CrocodilLM(str(tiny_llada), dtype="bfloat16", device="cpu")
    assert half.scorer.network.dtype == torch.bfloat16
    assert len(lm.generate_until(instances("generate_until", ("ab", {"until": []})))) == 1


def test_chat_templates_give_special_tokens(tiny_llada: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(tiny_llada, folder)
    lm = CrocodilLM(str(folder), device="cpu")
    with pytest.raises(ValueError, match="has no chat template: leave --apply_chat_template out"):
        lm.apply_chat_template([{"role": "user", "content": "hi"}])
    (folder / "chat_template.jinja").write_text(CHAT)
    lm = CrocodilLM(str(folder), device="cpu", add_bos_token=True)
    text = lm.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "<|startoftext|><user>hi<assistant>"
    assert lm.tok_encode(text) == [256, *lm.pipe.codec.encode("<user>hi<assistant>")], "BOS, and only one"
    assert lm.chat_template(True) == CHAT
    assert lm.tokenizer_name == str(folder).replace("/", "__")


@pytest.fixture(scope="module")
def adapted(tiny_llada: Path) -> Demasker:
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        demasker = Demasker.from_pretrained(tiny_llada).with_lora(settings)
        for name, weight in demasker.named_parameters():
            if ".lora_B" in name:
                weight.normal_()
    return demasker


def test_adapters_are_worn(adapted: Demasker, tiny_llada: Path, tmp_path: Path) -> None:
    """Those of a pipeline folder by themselves, those in peft's layout where they are named; both change the score."""
    CrocodilPipeline(adapted, TextCodec.published(str(tiny_llada))).save_pretrained(tmp_path / "pipeline")
    adapter = tmp_path / "pipeline" / "demasker" / "adapter"
    requests = instances("loglikelihood", ("abc", "def"), ("ab", "z"))

    def scores(pretrained: Path, **given: Any) -> list[float]:
        lm = CrocodilLM(str(pretrained), mc_samples=4, device="cpu", add_bos_token=False, **given)
        return [log_p for log_p, _ in lm.loglikelihood(requests)]

    plain = scores(tiny_llada)
    inside, named = scores(tmp_path / "pipeline"), scores(tiny_llada, adapter=str(adapter))
    assert inside == pytest.approx(named, abs=1e-5)
    assert all(abs(a - b) > 1e-3 for a, b in zip(inside, plain, strict=True))
    with pytest.raises(ValueError, match=r"adapter must be left out: .* is a pipeline"):
        scores(tmp_path / "pipeline", adapter=str(adapter))
    with pytest.raises(ValueError, match=r"expected an adapter in peft's layout in .*, but it has no adapter_config"):
        scores(tiny_llada, adapter=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": "auto"}, "batch_size must be a whole number of at least 1, got 'auto'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"mc_samples": 0}, "mc_samples must be at least 1, got 0"),
        ({"scorer": "prior"}, "scorer must be one of base, demasker, got 'prior'"),
        ({"algorithm": "greedy"}, "algorithm must be one of masked, conthendisc, conwithindisc, got 'greedy'"),
        ({"remasking": "best"}, "remasking must be one of random, .*, got 'best'"),
        ({"beams": 3}, "there is no setting beams"),
        ({"dtype": "bfloat16", "family": "llada"}, "dtype, family must be left out: .* is a pipeline"),
        ({"num_registers": 9, "algorithm": "conthendisc"}, "num_registers must be between 1 and the trained 4, got 9"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(folder: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        CrocodilLM(folder, **settings)
    assert "\n" not in str(error.value)


def test_a_plain_checkpoint_has_no_base_and_no_sketch(tiny_llada: Path) -> None:
    with pytest.raises(ValueError, match="has no base to score with; leave scorer out"):
        CrocodilLM(str(tiny_llada), scorer="base")
    with pytest.raises(ValueError, match="conthendisc needs an encoder and a prior"):
        CrocodilLM(str(tiny_llada), algorithm="conthendisc")


def test_model_args_win_over_the_options_of_lm_eval(folder: str) -> None:
    assert get_model("crocodil") is CrocodilLM
    given = {"batch_size": 1, "max_batch_size": 64, "device": "cuda:0" if not torch.cuda.is_available() else "cpu"}
    lm = CrocodilLM.create_from_arg_string(f"pretrained={folder},num_steps=3,batch_size=5,temperature=0.5", given)
    assert (lm.num_steps, lm.batch_size, lm.temperature, lm.device.type) == (3, 5, 0.5, "cpu")
    assert CrocodilLM.create_from_arg_obj({"pretrained": folder}, given).batch_size == 1


MULTIPLE_CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATE = """
task: tiny_answer
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    questions = ["the cat", "a dog on the", "the mat is on", "the dog", "a cat", "on the mat"]
    rows = [{"question": q, "choices": ["sat", "ate the cat", "mat"], "answer": i % 3} for i, q in enumerate(questions)]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("choice", MULTIPLE_CHOICE), ("answer", GENERATE)):
        (path / f"{name}.yaml").write_text(text.format(data=path / "data.jsonl"))
    return path


PRETRAINED = ("pipeline", "published")
Evaluated = dict[str, tuple[dict[str, Any], Path, str]]


@pytest.fixture(scope="module")
def evaluated(folder: str, tiny_llada: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """The same command for a pipeline and for a published checkpoint, side by side: model arguments, folder, output."""
    root = tmp_path_factory.mktemp("evaluated")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    settings: dict[str, dict[str, Any]] = {
        "pipeline": {"pretrained": folder, "algorithm": "conthendisc", "num_steps": 3, "mc_samples": 8},
        "published": {"pretrained": str(tiny_llada), "num_steps": 6, "mc_samples": 8},
    }
    processes = {}
    for kind, given in settings.items():
        model_args = ",".join(f"{key}={value}" for key, value in given.items())
        command = [sys.executable, "-m", "crocodil.harness", "run", "--model=crocodil", f"--model_args={model_args}"]
        command += ["--tasks=tiny_choice,tiny_answer", f"--include_path={tasks}", "--batch_size=4"]
        command += ["--device=cpu", "--log_samples", f"--output_path={root / kind}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes[kind] = subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
    done = {kind: process.communicate(timeout=300) for kind, process in processes.items()}
    assert all(process.returncode == 0 for process in processes.values()), done
    return {kind: (given, root / kind, done[kind][0]) for kind, given in settings.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PRETRAINED)
def test_the_command_line_evaluates(kind: str, evaluated: Evaluated, tasks: Path) -> None:
    given, root, output = evaluated[kind]
    assert "tiny_choice" in output and "exact_match" in output
    (results,) = root.rglob("results_*.json")
    lm = CrocodilLM(device="cpu", **given)
    rows = [json.loads(line) for line in (tasks / "data.jsonl").read_text().splitlines()]
    pairs = [(row["question"], f" {choice}") for row in rows for choice in row["choices"]]
    log_p = torch.tensor([value for value, _ in lm.loglikelihood(instances("loglikelihood", *pairs))]).view(-1, 3)
    accuracy = (log_p.argmax(1) == torch.tensor([row["answer"] for row in rows])).double().mean().item()
    assert json.loads(results.read_text())["results"]["tiny_choice"]["acc,none"] == pytest.approx(accuracy)
    (samples,) = root.rglob("samples_tiny_answer_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    answers = {line["doc"]["question"]: line["resps"][0][0] for line in lines}
    questions = [(question, {"until": ["\n"], "max_gen_toks": 6}) for question in answers]
    assert list(answers.values()) == lm.generate_until(instances("generate_until", *questions))


def test_mistakes_on_the_command_line_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["run", "--model=crocodil", "--tasks=tiny_choice", "--limit=3", '--samples={"tiny_choice": [0]}']
    monkeypatch.setattr(sys, "argv", ["crocodil.harness", *arguments])
    with pytest.raises(SystemExit, match="crocodil: If --samples is not None, then --limit must be None"):
        main()


@pytest.mark.slow
def test_without_lm_eval_the_extra_is_named() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; sys.modules['lm_eval.api'] = None\nimport crocodil.harness"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError: crocodil.harness needs lm-eval: pip install 'crocodil[eval]'" in done.stderr
