from collections.abc import Callable
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from crocodil.data import CanonicalFunctions, TextCorpus
from crocodil.data.latent_store import LatentRecord, LatentStore, shard_path, write_index
from crocodil.data.tokens import TokenDataset
from crocodil.diffusion.documents import Documents
from crocodil.modules.encoding import LatentEncoder, encode_shards, missing_shards

LAYOUTS = [("padded", False), ("padded", True), ("grouped", True), ("packed", False)]
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")
MakeData = Callable[..., CanonicalFunctions]
Fit = Callable[..., list[float]]
CountCalls = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture(scope="module")
def make_data(tmp_path_factory: pytest.TempPathFactory) -> MakeData:
    """Functions of various lengths, so that rows of 64 have padding, or several texts."""
    folder = tmp_path_factory.mktemp("varied")
    for number, (one, two) in enumerate(product("+-*/%", repeat=2)):
        bodies = ["return a", f"return a {one} a", f"b = a {one} a\n    return b {two} a", f"return a {one} a {two} a"]
        for more, body in product(("", "+ b", "- b * b"), bodies):
            text = f"def g(a, b):\n    {body} {more}\n"
            (folder / f"m{number:03d}{bodies.index(body)}{len(more)}.py").write_text(text)

    def make(layout: str = "padded", hide_padding: bool = False, latents: Path | None = None) -> CanonicalFunctions:
        given = {"layout": layout, "hide_padding": hide_padding, "latents": latents and str(latents)}
        cache = str(folder.with_name("cache"))
        return CanonicalFunctions(64, 8, folder=str(folder), cache_dir=cache, min_tokens=5, **given)

    return make


WIDE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
WIDE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}


def encode(
    system: Any, data: CanonicalFunctions, folder: Path, dtype: str = "float32", encoder: Any = None
) -> LatentRecord:
    """As `crocodil encode` does, in this process; the record of what was written."""
    encoder = encoder or system.module("prior").encoder
    fabric = Fabric(accelerator="cpu", devices=1)
    texts = TokenDataset(data.store("train"), data.row_format.alone())
    latent_encoder = LatentEncoder(fabric, encoder, texts, data.batch_size, 0)
    hides, rows = texts.row_format.hides_padding, len(texts)
    record = LatentRecord(encoder.fingerprint(), data.corpus_name, "train", hides, 4, 8, dtype, rows, shard_rows=60)
    (folder / "train").mkdir(exist_ok=True, parents=True)
    missing = missing_shards(folder / "train", record, 0, 1)
    encode_shards(latent_encoder, folder / "train", record, missing, lambda count: None)
    write_index(folder / "train", record)
    return record


@pytest.mark.parametrize(("layout", "hide_padding"), LAYOUTS)
def test_stored_latents_are_those_of_the_training_batch(
    layout: str, hide_padding: bool, tiny_system: Any, make_data: MakeData, tmp_path: Path
) -> None:
    encode(tiny_system, make_data(layout, hide_padding), tmp_path)
    encoder = tiny_system.module("prior").encoder
    seen = most = 0
    for batch in make_data(layout, hide_padding, latents=tmp_path).train_dataloader():
        documents = Documents.of(batch)
        with torch.no_grad():
            expected = documents.from_rows(encoder(batch["token_ids"], **documents.attention))
        torch.testing.assert_close(batch["latents"], expected, rtol=1e-3, atol=1e-4)
        seen, most = seen + len(expected), max(most, documents.per_row)
    assert seen > 100 and (most > 1) == (layout == "packed")


def test_hidden_and_visible_padding_give_other_latents(tiny_system: Any, make_data: MakeData, tmp_path: Path) -> None:
    """Else the tests above would not tell whether padding is hidden as in training."""
    for name, hidden in (("seen", False), ("hidden", True)):
        encode(tiny_system, make_data("padded", hidden), tmp_path / name)
    seen, hidden = (LatentStore(tmp_path / name / "train")[range(100)] for name in ("seen", "hidden"))
    assert ((seen - hidden).abs().flatten(1).amax(1) > 1e-3).float().mean() > 0.5


@pytest.mark.parametrize(("layout", "hide_padding"), [LAYOUTS[0], LAYOUTS[3]])
def test_training_from_the_cache_is_training_that_encodes(
    layout: str, hide_padding: bool, tiny_system: Any, make_data: MakeData, fit: Fit, tmp_path: Path
) -> None:
    expected = fit(tiny_system.module("prior"), make_data(layout, hide_padding), max_steps=8)
    errors = {}
    for dtype in ("float32", "float16"):
        encode(tiny_system, make_data(layout, hide_padding), tmp_path / dtype, dtype)
        data = make_data(layout, hide_padding, latents=tmp_path / dtype)
        losses = fit(tiny_system.module("prior"), data, max_steps=8)
        errors[dtype] = (torch.tensor(losses) / torch.tensor(expected) - 1).abs().max().item()
    assert len(set(expected)) == 8
    assert errors["float32"] < 2e-6 < errors["float16"] < 2e-3


def test_without_conditions_the_encoder_is_never_called(
    tiny_system: Any, make_data: MakeData, fit: Fit, count_calls: CountCalls, tmp_path: Path
) -> None:
    encode(tiny_system, make_data(), tmp_path)
    module = tiny_system.module("prior", condition_share=0.0)
    calls = count_calls(module.encoder)
    fit(module, make_data(latents=tmp_path))
    assert not calls
    fit(module := tiny_system.module("prior", condition_share=0.0), make_data())
    assert calls == []
    calls = count_calls(module.encoder)
    fit(module, make_data())
    assert len(calls) == 3


@pytest.mark.parametrize("stage", ["demasker", "prior"])
def test_a_stage_that_has_no_use_for_latents_says_so(
    stage: str, tiny_system: Any, make_data: MakeData, fit: Fit, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    encode(tiny_system, make_data(), tmp_path)
    fit(tiny_system.module(stage, **({"network": WIDE} if stage == "demasker" else {})), make_data(latents=tmp_path))
    told = [str(warning.message) for warning in recwarn if "latents is ignored" in str(warning.message)]
    assert len(told) == (stage == "demasker")


def test_conditions_alone_are_encoded(
    tiny_system: Any, make_data: MakeData, fit: Fit, count_calls: CountCalls, tmp_path: Path
) -> None:
    encode(tiny_system, make_data(), tmp_path)
    module = tiny_system.module("prior", condition_share=0.25)
    calls = count_calls(module.encoder)
    fit(module, make_data(latents=tmp_path))
    assert [len(token_ids) for (token_ids,) in calls] == [2, 2, 2]


def test_whole_shards_are_not_encoded_again(
    tiny_system: Any, make_data: MakeData, count_calls: CountCalls, tmp_path: Path
) -> None:
    encoder = tiny_system.module("prior").encoder
    calls = count_calls(encoder)
    record = encode(tiny_system, make_data(), tmp_path, encoder=encoder)
    assert sum(len(token_ids) for (token_ids,) in calls) == record.rows > 2 * 60
    before = {path.name: path.read_bytes() for path in (tmp_path / "train").iterdir()}
    calls.clear()
    encode(tiny_system, make_data(), tmp_path, encoder=encoder)
    assert not calls
    shard_path(tmp_path / "train", 1).write_bytes(b"damaged")
    encode(tiny_system, make_data(), tmp_path, encoder=encoder)
    assert sum(len(token_ids) for (token_ids,) in calls) == 60
    assert {path.name: path.read_bytes() for path in (tmp_path / "train").iterdir()} == before


def test_each_shard_is_of_one_process(tmp_path: Path) -> None:
    record = LatentRecord("abc", "Corpus-1", "train", True, 2, 3, "float32", rows=23, shard_rows=5)
    shares = [missing_shards(tmp_path, record, rank, 3) for rank in range(3)]
    assert sorted(chain.from_iterable(shares)) == [0, 1, 2, 3, 4] and max(map(len, shares)) == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"encoder": "xyz"}, "encoder 'xyz'"),
        ({"corpus": "Corpus-1"}, "corpus 'Corpus-1'"),
        ({"hides_padding": True}, "hides"),
    ],
)
def test_latents_of_others_are_refused_before_training(
    change: dict, told: str, tiny_system: Any, make_data: MakeData, fit: Fit, tmp_path: Path
) -> None:
    record = encode(tiny_system, make_data(), tmp_path)
    write_index(tmp_path / "train", replace(record, **change))
    with pytest.raises(ValueError, match=f"are of others: {told}"):
        fit(tiny_system.module("prior"), make_data(latents=tmp_path))


def test_held_out_latents_are_used_if_they_are_there(tiny_system: Any, make_data: MakeData, tmp_path: Path) -> None:
    encode(tiny_system, make_data(), tmp_path)
    batch = next(iter(make_data(latents=tmp_path).val_dataloader()))
    assert "latents" not in batch
    (tmp_path / "train").rename(tmp_path / "val")
    with pytest.raises(ValueError, match="split 'train'"):
        make_data(latents=tmp_path).val_dataloader()
    with pytest.raises(ValueError, match="holds no complete latents"):
        make_data(latents=tmp_path).train_dataloader()


def test_latents_that_depend_on_the_batch_are_refused(make_data: MakeData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout=grouped to go with hide_padding=true"):
        make_data("grouped", latents=tmp_path)
    with pytest.raises(ValueError, match="set streaming=false"):
        TextCorpus(streaming=True, latents=str(tmp_path))
