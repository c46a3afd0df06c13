import json
import re
from pathlib import Path

import pytest

from crocodil.evaluation.film import Film
from crocodil.pipeline import CrocodilPipeline


def read(path: Path) -> dict:
    """The recording in the page."""
    found = re.search(r'<script type="application/json" id="film">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_film_ends_with_the_texts(tiny_pipeline: CrocodilPipeline, tmp_path: Path) -> None:
    mask = tiny_pipeline.demasker.mask_token_id
    film = Film(tiny_pipeline.codec, mask, num_texts=2)
    settings = {"remasking": "p2:2", "temperature": 1.0, "prior_steps": 2}
    result = tiny_pipeline(3, 16, "conwithindisc", 6, prompts="def f(", batch_size=3, on_step=film, **settings)
    film.save(tmp_path / "film.html", "p2 <b>")
    page, recorded = (tmp_path / "film.html").read_text(), read(tmp_path / "film.html")
    canvases = recorded["first"]
    assert len(canvases) == 2 and all(row[4:] == [mask] * 16 and mask not in row[:4] for row in canvases)
    assert [frame["refreshed"] for frame in recorded["frames"]] == [True, False, False, True, False, False]
    for frame in recorded["frames"]:
        for row, changes in zip(canvases, frame["changes"], strict=True):
            for place, token_id, probability in changes:
                assert row[place] != token_id
                assert (probability == 0) == (token_id == mask)
                row[place] = token_id
    assert canvases == result.token_ids[:2].tolist()
    assert any(change[1] == mask for frame in recorded["frames"] for row in frame["changes"] for change in row)
    assert recorded["pieces"].keys() >= {str(token) for row in canvases for token in row}
    assert "p2 &lt;b&gt;" in page and "http" not in page


def test_later_batches_are_left_out(tiny_pipeline: CrocodilPipeline, tmp_path: Path) -> None:
    films = [Film(tiny_pipeline.codec, tiny_pipeline.demasker.mask_token_id) for _ in range(2)]
    for film, num_samples in zip(films, (2, 6), strict=True):
        tiny_pipeline(num_samples, 8, "masked", 4, batch_size=2, on_step=film)
        film.save(tmp_path / "film.html", "")
    assert films[0].frames == films[1].frames


def test_text_cannot_leave_the_script(tiny_pipeline: CrocodilPipeline, tmp_path: Path) -> None:
    film = Film(tiny_pipeline.codec, tiny_pipeline.demasker.mask_token_id)
    tiny_pipeline(1, 8, "masked", 4, on_step=film)
    film.codec.pieces = lambda ids: ["</script><script>alert(1)</script>" for _ in ids]  # type: ignore[method-assign]
    try:
        film.save(tmp_path / "film.html", "")
    finally:
        del film.codec.pieces
    assert "alert(1)</script>" not in (tmp_path / "film.html").read_text()
    assert "alert(1)" in str(read(tmp_path / "film.html"))


def test_an_empty_film_is_refused(tiny_pipeline: CrocodilPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the film is empty"):
        Film(tiny_pipeline.codec, 0).save(tmp_path / "film.html", "")
