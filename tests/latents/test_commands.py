import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crocodil.cli import run as run_command
from crocodil.data.codec import TextCodec, byte_level_bpe
from crocodil.latents import tools
from crocodil.latents.reading import read_corpus, read_text_option, readable_forms
from crocodil.pipeline import CrocodilPipeline

FIRST = "def f(v0, v1):\n    return v0 + v1\n"
SECOND = "def f(self):\n    return self.a0[0]\n"
ORDINARY = "import math\n\n\ndef area(shape, scale):\n    'Its area.'\n    return shape.width * scale\n"
CANONICAL = "def f(v0, v1):\n    return v0.a0 * v1\n"
SUM = "v0 + v0 v0 v0 + + v0 v0 +\n"
WRITTEN = (0, 4, 57, 116)
"""The end, the line break, + and v0."""
NO_FUNCTION = "class Shape:\n    sides = 3\n"


@pytest.fixture(scope="module")
def folder(make_demasker: Any, make_encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random networks over the canonical vocabulary, K = 4, D = 3, L = 32, that write few tokens: some are right."""
    path = tmp_path_factory.mktemp("pipeline")
    sizes = {"vocab_size": 152, "max_position_embeddings": 32}
    demasker = make_demasker(mask_token_id=2, **sizes)
    demasker.network.get_output_embeddings().weight.data[[i for i in range(152) if i not in WRITTEN]] = 0
    CrocodilPipeline(demasker, TextCodec.canonical(), make_encoder(**sizes)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> CrocodilPipeline:
    return CrocodilPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def plain() -> TextCodec:
    return byte_level_bpe([ORDINARY], 270)


@pytest.fixture
def run(folder: Path) -> Callable[..., None]:
    """`run("interpolate", *arguments)`: what the command line does, on the saved pipeline."""

    def call(command: str, *arguments: str) -> None:
        run_command([command, f"--pipeline={folder}", "--device=cpu", *arguments])

    return call


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# the commands


def test_interpolate_prints_what_the_library_gives(
    run: Callable[..., None], pipeline: CrocodilPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--num_points=3", "--num_steps=4", "--kind=linear", "--seed=3", "--temperature=1", "--length=24"]
    run("interpolate", f"--first={FIRST}", f"--second={SECOND}", *options)
    rows = lines(capsys.readouterr().out)
    points = tools.interpolate(pipeline, FIRST, SECOND, 3, "linear", 4, seed=3, temperature=1.0, length=24)
    assert [row["text"] for row in rows] == [point.text for point in points]
    assert [row["token_ids"] for row in rows] == [point.token_ids.tolist() for point in points]
    assert [row["weight"] for row in rows] == [0, 0.5, 1]
    names = [name for name in vars(points[0]) if "cosine" in name]
    assert len(names) == 4
    for row, point in zip(rows, points, strict=True):
        assert row.keys() == vars(point).keys()
        assert [row[name] for name in names] == pytest.approx([getattr(point, name) for name in names])


@pytest.mark.parametrize("other", [None, SECOND])
def test_registers_prints_a_line_for_each(
    other: str | None, run: Callable[..., None], pipeline: CrocodilPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    run("registers", f"--text={SUM}", "--num_steps=4", *([] if other is None else [f"--other={other}"]))
    rows = lines(capsys.readouterr().out)
    counts = tools.by_register_count(pipeline, SUM, num_steps=4)
    effects = tools.register_effects(pipeline, SUM, other)
    assert [row["register"] for row in rows] == [1, 2, 3, 4]
    assert [row["text"] for row in rows] == [step.text for step in counts]
    assert [row["token_accuracy"] for row in rows] == [step.token_accuracy for step in counts]
    gained = torch.zeros(4, 32, dtype=torch.bool)
    for mark, row in zip(gained, rows, strict=True):
        mark[row["gained"]] = True
    assert torch.equal(gained, torch.stack([step.is_gained for step in counts]))
    assert 0 < gained.sum() < sum(step.is_right.sum() for step in counts)
    torch.testing.assert_close(torch.tensor([row["rises"] for row in rows]), effects.rises, atol=6e-5, rtol=0)


def test_neighbours_finds_a_text_in_a_file(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [SECOND, "def f():\n    pass\n", FIRST, FIRST.rstrip()]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text, "cost": 1}) + "\n" for text in texts))
    options = [f"--corpus={tmp_path / 'c.jsonl'}", "--num_neighbours=2", "--batch_size=1"]
    run("neighbours", f"--text={FIRST}", *options)
    out, err = capsys.readouterr()
    rows = lines(out)
    assert len(rows) == 2 and rows[0]["text"] == FIRST and rows[0]["source"] == "c.jsonl, line 3"
    assert rows[0]["cosine"] == pytest.approx(1) and rows[0]["index"] == 2
    assert "3 texts in" in err and "left out: 1 repeated" in err


@pytest.mark.parametrize(
    ("command", "options", "content"),
    [
        ("interpolate", [f"--first={FIRST}", f"--second={SECOND}"], "From one text to the other"),
        ("registers", [f"--text={FIRST}"], "What each register holds"),
        ("registers", [f"--text={FIRST}", f"--other={SECOND}"], "register alone is another text&#39;s"),
        ("neighbours", [f"--text={FIRST}", "--corpus={corpus}"], "The nearest of 2 texts"),
    ],
)
def test_an_output_is_a_page_or_lines(
    command: str,
    options: list[str],
    content: str,
    run: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.py").write_text(FIRST + "\n\n" + ORDINARY)
    given = [option.format(corpus=tmp_path / "corpus") for option in options]
    run(command, *given, f"--output={tmp_path / 'new' / 'page.HTML'}")
    assert content in (tmp_path / "new" / "page.HTML").read_text().replace("\n", " ")
    run(command, *given, f"--output={tmp_path / 'rows.jsonl'}")
    assert lines((tmp_path / "rows.jsonl").read_text())
    out, err = capsys.readouterr()
    assert out == "" and f"written to {tmp_path / 'rows.jsonl'}" in err


# how texts are read


def test_texts_come_from_files(pipeline: CrocodilPipeline, tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(FIRST)
    assert read_text_option(pipeline.codec, "first", f"@{tmp_path / 'first.py'}") == FIRST


def test_ordinary_python_is_read_in_canonical_names(
    pipeline: CrocodilPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_text_option(pipeline.codec, "first", ORDINARY) == CANONICAL
    told = capsys.readouterr().err
    assert "--first is ordinary Python; it is read in canonical names" in told and CANONICAL in told
    method = "    @property\n    def area(self):\n        return self.width\n"  # pasted as it stands in its class
    assert read_text_option(pipeline.codec, "first", method) == "def f(self):\n    return self.a0\n"
    read_text_option(pipeline.codec, "first", ORDINARY * 2)
    assert "the first of its 2 functions is read" in capsys.readouterr().err


@pytest.mark.parametrize("text", [FIRST, FIRST.rstrip(), "def f(v0):\n    v1 = [1,", "", "v3 = v2"])
def test_canonical_text_is_read_as_it_is(
    text: str, pipeline: CrocodilPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its final line break, which every function of the training data has."""
    read = read_text_option(pipeline.codec, "first", text)
    assert read.rstrip() == text.rstrip() and read.endswith("\n")
    assert capsys.readouterr().err == ""


def test_a_codec_of_any_text_reads_it_as_it_is(plain: TextCodec) -> None:
    for text in (ORDINARY, NO_FUNCTION, "no code", FIRST.rstrip()):
        assert readable_forms(plain, text) == [text]


def test_a_corpus_tells_what_it_leaves_out(
    pipeline: CrocodilPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "def f(v0):\n    return v0" + " + v0" * 30 + "\n"
    contents = {"a.py": ORDINARY, "b.py": ORDINARY + FIRST, "c.py": long, "d.py": NO_FUNCTION, "e.txt": SECOND}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "f.py").write_bytes(b"\xff\xfe")
    corpus_ids, sources = read_corpus(pipeline, str(tmp_path), "**/*.py", None)
    assert sources == ["a.py", "b.py, function 2"] and corpus_ids.shape == (2, 32)
    assert [pipeline.codec.decode(row) for row in corpus_ids] == [CANONICAL, FIRST]
    told = capsys.readouterr().err
    for reason in ("2 texts in", "1 repeated", "1 too long", "1 not readable by the codec", "files: 1 not utf8"):
        assert reason in told
    assert read_corpus(pipeline, str(tmp_path), "*.txt", 24)[0].shape == (1, 24)


# what users get wrong


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("interpolate", ["--first=@{folder}/absent", "--second=x"], "--first: there is no file .*absent"),
        ("interpolate", ["--first=@{file}", "--second=x"], "--first: .* must be a UTF-8 text file.*1 not utf8"),
        ("interpolate", ["--first=hello", "--second=x"], "--first: .*got the token 'hello'.* found no Python function"),
        (
            "interpolate",
            [f"--first={NO_FUNCTION}", "--second=x"],
            "--first: .* found no Python function with a canonical",
        ),
        ("interpolate", ["--first=f", "--second=f", "--kind=cubic"], "kind must be one of slerp, linear, got 'cubic'"),
        ("interpolate", ["--first=f", "--second=f", "--num_points=1"], "num_points must be at least 2"),
        ("interpolate", ["--first=f", "--second=f", "--num_steps=0"], "num_steps must be at least 1, got 0"),
        ("interpolate", ["--first=f", "--second=f", "--device=nowhere"], "the device nowhere cannot be used"),
        ("interpolate", ["--first=f", "--second=f", "--output={folder}"], "--output must be a file, got the folder"),
        ("interpolate", ["--first=f", "--second=f", "--output={file}/x/y"], "cannot be written to"),
        ("registers", ["--text=f", "--length=40"], "length must be between 2 and 32, .* got 40"),
        ("registers", ["--text=f", "--other=hello"], "--other: .*got the token 'hello'"),
        ("neighbours", ["--text=f", "--corpus={folder}/absent"], "--corpus must be a folder or a file of JSON lines"),
        ("neighbours", ["--text=f", "--corpus={folder}", "--pattern=*.c"], "folder must hold files that match"),
        ("neighbours", ["--text=f", "--corpus={lines}"], "each line must be an object .* got line 1 of"),
        ("neighbours", ["--text=f", "--corpus={folder}", "--pattern=file"], "--corpus must hold texts that fit, got 0"),
        ("neighbours", [f"--text={'v0 ' * 40}", "--corpus={folder}"], "a text must have at most 31 tokens, got 41"),
    ],
)
def test_mistakes_are_told_in_one_line(
    command: str, options: list[str], message: str, run: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"\xff")
    (tmp_path / "lines").write_text('["text"]\n')
    places = {"file": tmp_path / "file", "folder": tmp_path, "lines": tmp_path / "lines"}
    with pytest.raises(ValueError, match=message) as error:
        run(command, *(option.format(**places) for option in options))
    assert "\n" not in str(error.value)


def test_the_options_are_light() -> None:
    """Help must not wait for torch."""
    code = """
import sys
from crocodil.cli import build_parser
build_parser().format_help()
print([name for name in ("torch", "lightning", "transformers", "matplotlib", "numpy") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
