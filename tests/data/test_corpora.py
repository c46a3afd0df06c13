from importlib.metadata import distribution
from pathlib import Path

import pytest

from crocodil.data.corpora import (
    EXCLUDED_FOLDERS,
    MAX_FILE_BYTES,
    SkipCount,
    SourceFile,
    distinct_by_split,
    folder_files,
    installed_package_files,
    read_text,
    split_of,
    standard_library_files,
)
from crocodil.data.functions import MIN_FILES_FOR_POOL, functions_of_file, read_functions

FUNCTION = "def g(a, b):\n    c = a + b\n    return c * a - b\n"
HOSTILE = {
    "good.py": FUNCTION.encode(),
    "byte_order_mark.py": b"\xef\xbb\xbf" + FUNCTION.encode(),
    "latin.py": b"# -*- coding: latin-1 -*-\nx = '\xe9'\n",
    "nul.py": b"x = 1\0\n",
    "empty.py": b"",
    "blank.py": b" \n\n",
    "huge.py": b"#" * (MAX_FILE_BYTES + 1),
    "largest.py": FUNCTION.encode() + b"#" * (MAX_FILE_BYTES - len(FUNCTION)),
    "syntax.py": b"def g(:\n",
    "nested.py": b"x = " + b"-" * 100_000 + b"1\n",
}


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    for name, content in HOSTILE.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dangling.py").symlink_to(tmp_path / "absent.py")
    (tmp_path / "folder.py").mkdir()
    return tmp_path


def test_hostile_files_are_counted_and_skipped(hostile: Path) -> None:
    files = folder_files(hostile)
    assert len(files) == len(HOSTILE)
    _, total, skipped = read_functions(files, min_tokens=1, max_tokens=100)
    assert skipped == SkipCount(not_utf8=1, null_bytes=1, empty=2, too_large=1, unparsable=2)
    assert total == 3
    assert str(skipped) == "1 not utf8, 1 null bytes, 2 empty, 1 too large, 2 unparsable"
    assert skipped.total == 7


def test_a_file_that_vanishes_is_counted(tmp_path: Path) -> None:
    skipped = SkipCount()
    assert read_text(tmp_path / "absent.py", skipped) is None
    assert skipped == SkipCount(unreadable=1)


def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffé\r\n\tx".encode())
    skipped = SkipCount()
    assert read_text(tmp_path / "a.txt", skipped) == "é\r\n\tx"
    assert skipped == SkipCount()


def test_folder_errors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"existing folder, got .*absent"):
        folder_files(tmp_path / "absent")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"match '\*\*/\*\.py', got none"):
        folder_files(tmp_path)
    assert [file.name for file in folder_files(tmp_path, "*.txt")] == ["a.txt"]


def test_folder_files_are_sorted_by_relative_name(tmp_path: Path) -> None:
    names = [f"{folder}{number}.py" for number in (3, 11, 1, 2) for folder in ("b/", "", "a/c/", "a/")]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(FUNCTION)
    assert [file.name for file in folder_files(tmp_path)] == sorted(names)


def test_standard_library_has_the_library_and_nothing_else() -> None:
    names = [file.name for file in standard_library_files()]
    assert {"json/decoder.py", "ast.py"} <= set(names)
    assert names == sorted(names)
    assert not [name for name in names if EXCLUDED_FOLDERS & set(name.split("/"))]


def test_installed_packages_skip_absent_ones_and_crocodil() -> None:
    files = installed_package_files(["rich", "no-such-distribution", "omegaconf", "crocodil"])
    names = [file.name for file in files]
    assert {"rich/console.py", "omegaconf/base.py"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"rich", "omegaconf"}
    assert names == sorted(names)
    assert files[0].path.is_absolute() and files[0].path.is_file()
    assert len(installed_package_files(["rich", "rich"])) == len(installed_package_files(["rich"]))


def test_test_folders_of_packages_are_left_out() -> None:
    listed = [str(path) for path in distribution("numpy").files or [] if path.suffix == ".py"]
    assert any("/tests/" in name for name in listed)
    assert not any("/tests/" in file.name for file in installed_package_files(["numpy"]))


def test_split_is_pinned() -> None:
    """The split of a name must never change: checkpoints were trained on it."""
    names = [f"package/module_{number}.py" for number in range(2000)]
    splits = [split_of(name) for name in names]
    assert [splits.count(split) for split in ("train", "val", "test")] == [1811, 89, 100]
    assert split_of("json/decoder.py") == "train"


def test_distinct_items_prefer_the_held_out_splits() -> None:
    found = {"train": ["d", "a", "e", "b", "d"], "val": ["b", "c", "a", "c"], "test": ["a", "f", "a"]}
    assert distinct_by_split(found) == {"test": ["a", "f"], "val": ["b", "c"], "train": ["d", "e"]}


def test_worker_processes_give_what_one_process_gives() -> None:
    files = standard_library_files()[:260]
    assert len(files) >= MIN_FILES_FOR_POOL
    found, total, skipped = read_functions(files, min_tokens=14, max_tokens=62)
    expected, expected_total, expected_skips = {"train": {}, "val": {}, "test": {}}, 0, SkipCount()
    for number, file in enumerate(files):
        functions, skips = functions_of_file(file, min_tokens=14, max_tokens=62)
        for place, function in enumerate(functions):
            expected[split_of(file.name)].setdefault(function, (number, place))
        expected_total += len(functions)
        expected_skips.add(skips)
    assert (found, total, skipped) == (expected, expected_total, expected_skips)
    assert [list(functions) for functions in found.values()] == [list(functions) for functions in expected.values()]
    lengths = {len(function) for functions in found.values() for function in functions}
    assert (min(lengths), max(lengths)) == (14, 62)


def test_the_files_of_a_folder_stay_together(tmp_path: Path) -> None:
    """Every file has a function of its own; split by name they part, split by folder they do not."""
    for number in range(40):
        (tmp_path / f"package{number % 4}").mkdir(exist_ok=True)
        body = "\n".join(f"    self.x{i} = y + {number}" for i in range(number % 10 + 3))
        (tmp_path / f"package{number % 4}" / f"m{number}.py").write_text(f"def f(self, y):\n{body}\n    return y\n")
    files = [SourceFile(path, path.relative_to(tmp_path).as_posix()) for path in sorted(tmp_path.glob("*/*.py"))]
    for split_by, key in (("name", lambda name: name), ("folder", lambda name: name.partition("/")[0])):
        found, _, _ = read_functions(files, 1, 200, split_by)
        for split, functions in found.items():
            assert all(split_of(key(files[number].name)) == split for number, _ in functions.values())
