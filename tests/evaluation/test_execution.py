import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from crocodil.evaluation.execution import PassAtK, Task, pass_at_k, read_tasks
from crocodil.evaluation.sandbox import confinement

needs_walls = pytest.mark.skipif(confinement() == "none", reason="no namespaces and no Landlock here")

ADD = Task(
    "add",
    'def add(a: int, b: int) -> int:\n    """The sum.\n    >>> add(1, 2)\n    3\n    """\n',
    "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
    "add",
)
SQUARE = Task("square", "", "assert square(3) == 9\nassert square(-2) == 4")
RIGHT = {"add": "    return a + b\n", "square": "def square(x):\n    return x * x\n"}
WRONG = {"add": "    return a - b\n", "square": "def square(x):\n    return x + x\n"}


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n: int) -> None:
    for c in range(n + 1):
        passed = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(combinations(passed, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), rel=1e-14, abs=0)


def test_pass_at_k_of_many_tries() -> None:
    product = 1.0
    for i in range(200 - 7 + 1, 201):  # the product of the paper's figure 3
        product *= 1 - 100 / i
    assert pass_at_k(200, 7, 100) == pytest.approx(1 - product, rel=1e-12)
    assert pass_at_k(10**5, 10**4, 5 * 10**4) == 1.0


def test_a_program_of_each_format() -> None:
    assert ADD.program(RIGHT["add"]) == f"{ADD.prompt}    return a + b\n\n{ADD.test}\ncheck(add)\n"
    assert SQUARE.program("x") == f"x\n{SQUARE.test}\n"


@needs_walls
def test_completions_are_run_and_counted() -> None:
    metric = PassAtK([ADD, SQUARE], ks=(1, 2, 3))
    metric.update(["add", "square", "add"], [RIGHT["add"], WRONG["square"], WRONG["add"]])
    metric.update(["square"] * 3 + ["add"], [RIGHT["square"], RIGHT["square"], "", "    return"])
    assert metric.tries.tolist() == [3, 4] and metric.passes.tolist() == [1, 2]
    assert metric.tries.dtype == metric.passes.dtype == torch.int64
    figures = metric.compute()
    assert list(figures) == ["pass@1", "pass@2", "pass@3", "timeout_rate", "crash_rate"]
    for k in (1, 2, 3):
        assert figures[f"pass@{k}"].item() == pytest.approx((pass_at_k(3, 1, k) + pass_at_k(4, 2, k)) / 2, rel=1e-15)
    assert figures["timeout_rate"] == 0 and figures["crash_rate"] == 0


HARMFUL = {
    "loops": "while True: pass",
    "sleeps": "import time; time.sleep(60)",
    "forks": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "allocates": "x = []\nwhile True: x.append(bytes(2**20))",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n1 / 0",
    "writes": "open({path!r}, 'w').write('changed')",
    "kills": "import os, signal; os.kill(os.getppid(), signal.SIGKILL); 1 / 0",
    "crashes": "import ctypes; ctypes.string_at(0)",
    "leaves": "import sys; sys.exit(0)",
}


@needs_walls
def test_harmful_completions_do_no_harm_and_count_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sentinel = tmp_path / "sentinel"
    sentinel.write_text("untouched")
    tasks = [Task(name, "", "") for name in HARMFUL]
    metric = PassAtK(tasks, ks=[1], timeout=1.0, memory_mib=256, num_workers=4)
    figures = metric(list(HARMFUL), [text.replace("{path!r}", repr(str(sentinel))) for text in HARMFUL.values()])
    assert metric.passes.tolist() == [0] * len(HARMFUL) and figures["pass@1"] == 0
    assert figures["timeout_rate"].item() == 3 / len(HARMFUL) and figures["crash_rate"].item() == 1 / len(HARMFUL)
    assert sentinel.read_text() == "untouched"
    assert os.listdir(tmp_path) == ["sentinel"]
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            assert str(tmp_path) not in Path(f"/proc/{entry}/cmdline").read_text(errors="replace")


@needs_walls
def test_programs_run_side_by_side() -> None:
    """Eight sleepers take far less than their sum of 4 s, and do not use up each other's processes."""
    source = "import threading, time\nfor _ in range(20): threading.Thread(target=time.sleep, args=(.5,)).start()"
    metric = PassAtK([Task("sleep", "", "")], ks=[1], num_workers=8)
    started = time.monotonic()
    metric.update(["sleep"] * 8, [source] * 8)
    assert metric.passes.tolist() == [8]
    assert time.monotonic() - started < 3


@needs_walls
def test_limits_are_those_given() -> None:
    task, source = Task("t", "", ""), "import time\nx = bytearray(200 * 2**20)\ntime.sleep(0.3)"
    limits = [{}, {"timeout": 0.2}, {"memory_mib": 150}]
    found = [PassAtK([task], ks=[1], **limit)(["t"], [source]) for limit in limits]  # type: ignore[arg-type]
    assert [figures["pass@1"].item() for figures in found] == [1, 0, 0]
    assert [figures["timeout_rate"].item() for figures in found] == [0, 1, 0]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_every_task_needs_k_completions() -> None:
    metric = PassAtK([ADD, SQUARE], ks=(1, 3))
    metric.tries += torch.tensor([3, 2])
    with pytest.raises(ValueError, match=r"pass@3 needs 3 completions of each task, got 2 of 'square'"):
        metric.compute()


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        ([], {}, "different task_id, got 0"),
        ([ADD, ADD], {}, "different task_id, got 2 of 1"),
        ([ADD], {"ks": ()}, "ks of at least 1"),
        ([ADD], {"ks": (0, 1)}, "ks of at least 1"),
    ],
)
def test_settings_are_checked(tasks: list[Task], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PassAtK(tasks, **settings)


def test_updates_are_checked() -> None:
    metric = PassAtK([ADD])
    with pytest.raises(ValueError, match="expected a task_id a completion, got 2 for 1"):
        metric.update(["add", "add"], ["x"])
    with pytest.raises(ValueError, match="got 'other'"):
        metric.update(["add", "other"], ["x", "x"])
    assert metric.tries.tolist() == [0]


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_tasks_are_read(tmp_path: Path) -> None:
    fields = {"task_id": "add", "prompt": ADD.prompt, "test": ADD.test, "entry_point": "add", "canonical_solution": "x"}
    other = {"task_id": "square", "prompt": "", "test": SQUARE.test}
    path = write(tmp_path / "tasks.jsonl", fields, "", other, {**other, "task_id": "s", "entry_point": None})
    assert read_tasks(path) == [ADD, SQUARE, Task("s", "", SQUARE.test)]


GOOD = {"task_id": "a", "prompt": "", "test": "", "entry_point": "f"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "{"], "line 2: expected a JSON object, got text that is no JSON"),
        ([[1]], "line 1: expected a JSON object, got list"),
        ([GOOD, "", {"task_id": "b", "prompt": ""}], "line 3: expected text under 'test', got None"),
        ([{**GOOD, "task_id": 3}], "line 1: expected text under 'task_id', got 3"),
        ([{**GOOD, "entry_point": "f(); g"}], "line 1: expected a function's name or null under 'entry_point'"),
        ([GOOD, GOOD], "line 2: the task_id 'a' is that of an earlier line"),
        ([], "expected a task a line in .*, got an empty file"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tasks(write(tmp_path / "tasks.jsonl", *lines))


TWO = """
import sys
import torch.distributed as dist
from crocodil.evaluation.execution import PassAtK, Task
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
metric = PassAtK([Task("one", "", "assert x == 1"), Task("two", "", "assert x == 2")], ks=(1, 2), timeout=0.5)
tries = [{"one": ["x = 1", "x = 2"], "two": ["x = 1"]}, {"one": ["x = 3"], "two": ["x = 2", "while True: pass"]}][rank]
for task_id, texts in tries.items():
    metric.update([task_id] * len(texts), texts)
print(*(value.item() for value in metric.compute().values()))
dist.destroy_process_group()
"""


@pytest.mark.slow
@needs_walls
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWO, str(tmp_path / "store")]
    options = {"stdout": subprocess.PIPE, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    two = [subprocess.Popen([*command, str(rank)], **options) for rank in range(2)]  # type: ignore[call-overload]
    for process in two:
        said, _ = process.communicate(timeout=60)
        assert [float(word) for word in said.split()] == pytest.approx([1 / 3, 2 / 3, 1 / 6, 0])
