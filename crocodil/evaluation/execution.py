"""pass@k: whether written programs pass their tests."""

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from crocodil.evaluation.sandbox import run_program


@dataclass(frozen=True)
class Task:
    """A programming task in the format of HumanEval (arXiv 2107.03374).

    Attributes:
        task_id: its name.
        prompt: Python code that the completion continues, as a signature with its docstring; may be empty.
        test: Python code that raises if the completed program is wrong.
        entry_point: the function that `check`, defined by `test`, is called with; None if `test` itself asserts.
    """

    task_id: str
    prompt: str
    test: str
    entry_point: str | None = None

    def program(self, completion: str) -> str:
        """The completed program and its tests."""
        call = "" if self.entry_point is None else f"check({self.entry_point})\n"
        return f"{self.prompt}{completion}\n{self.test}\n{call}"


def read_tasks(path: str | Path) -> list[Task]:
    """Tasks from a file of JSON lines with the keys `task_id`, `prompt`, `test` and, if it is not null, `entry_point`.

    Other keys are ignored, and so are empty lines.

    Raises:
        ValueError: if a line is no JSON object, lacks a key or has a value that is no text, if two lines have one
            `task_id`, or there is no line; the message names the line.
    """
    tasks: dict[str, Task] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                task = _task_of(line, f"{path}, line {number}")
                if task.task_id in tasks:
                    raise ValueError(f"{path}, line {number}: the task_id {task.task_id!r} is that of an earlier line")
                tasks[task.task_id] = task
    if not tasks:
        raise ValueError(f"expected a task a line in {path}, got an empty file")
    return list(tasks.values())


def _task_of(line: str, place: str) -> Task:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: expected a JSON object, got text that is no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(fields).__name__}")
    for key in ("task_id", "prompt", "test"):
        if not isinstance(fields.get(key), str):
            raise ValueError(f"{place}: expected text under {key!r}, got {fields.get(key)!r:.40}")
    entry_point = fields.get("entry_point")
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise ValueError(f"{place}: expected a function's name or null under 'entry_point', got {entry_point!r:.40}")
    return Task(fields["task_id"], fields["prompt"], fields["test"], entry_point)


def pass_at_k(num_tries: int, num_passes: int, k: int) -> float:
    """The probability that one of k tries, drawn from n without replacement, of which c pass, passes.

    1 - C(n - c, k) / C(n, k), an unbiased estimate of pass@k (arXiv 2107.03374, equation 1).

    Args:
        num_tries: n >= k.
        num_passes: c, in 0 ... n.
        k: at least 1.
    """
    return 1 - math.comb(num_tries - num_passes, k) / math.comb(num_tries, k)


class PassAtK(Metric):
    """pass@k over tasks (arXiv 2107.03374): completions are run with their tests, each in a sandbox.

    The programs' standing, limits and walls are those of `sandbox.run_program`: a program that loops for ever, forks,
    allocates without bound or writes elsewhere counts as failed. Give each process of a group its own completions.

    Args:
        tasks: at least one, of different ids.
        ks: numbers of tries, each at least 1.
        timeout: seconds a program.
        memory_mib: MiB of address space of each process of a program.
        num_workers: programs at once; None is one for each core.
        allow_unconfined: run them even where nothing keeps them from writing outside their folders.

    Raises:
        ValueError: if the tasks or the ks are none, an id occurs twice, or a k is below 1.
    """

    higher_is_better = True
    full_state_update = False
    tries: Tensor
    passes: Tensor
    timeouts: Tensor
    crashes: Tensor

    def __init__(
        self,
        tasks: Sequence[Task],
        ks: Sequence[int] = (1, 10),
        timeout: float = 10.0,
        memory_mib: int = 512,
        num_workers: int | None = None,
        allow_unconfined: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.tasks = tuple(tasks)
        self._indices = {task.task_id: i for i, task in enumerate(self.tasks)}
        if not self.tasks or len(self._indices) < len(self.tasks):
            raise ValueError(f"expected tasks of different task_id, got {len(self.tasks)} of {len(self._indices)} ids")
        if not ks or min(ks) < 1:
            raise ValueError(f"expected ks of at least 1, got {tuple(ks)}")
        self.ks = tuple(ks)
        self.timeout, self.memory_mib, self.allow_unconfined = timeout, memory_mib, allow_unconfined
        self.num_workers = num_workers or os.cpu_count()
        for name in ("tries", "passes"):
            self.add_state(name, torch.zeros(len(self.tasks), dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("timeouts", "crashes"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, task_ids: Sequence[str], completions: Sequence[str]) -> None:
        """Runs completions, several at once.

        Args:
            task_ids: the task of each completion.
            completions: what follows the prompt; it begins where that ends, with its indentation.

        Raises:
            ValueError: if the numbers differ, a task is unknown, or as of `run_program`.
        """
        if len(task_ids) != len(completions):
            raise ValueError(f"expected a task_id a completion, got {len(task_ids)} for {len(completions)}")
        if unknown := set(task_ids) - self._indices.keys():
            raise ValueError(f"expected a task_id of the tasks, got {min(unknown)!r}; read the file it is of")
        indices = [self._indices[task_id] for task_id in task_ids]
        programs = [self.tasks[i].program(text) for i, text in zip(indices, completions, strict=True)]
        with ThreadPoolExecutor(self.num_workers) as pool:
            statuses = list(pool.map(self._status, programs))
        for i, status in zip(indices, statuses, strict=True):
            self.tries[i] += 1
            self.passes[i] += status == "passed"
        self.timeouts += statuses.count("timeout")
        self.crashes += statuses.count("crashed")

    def _status(self, program: str) -> str:
        return run_program(
            program, timeout=self.timeout, memory_mib=self.memory_mib, allow_unconfined=self.allow_unconfined
        ).status

    def compute(self) -> dict[str, Tensor]:
        """`pass@k` for each k, a mean over the tasks, and of all tries `timeout_rate` and `crash_rate`; float64.

        Raises:
            ValueError: if a task has fewer tries than the largest k.
        """
        tries, passes = self.tries.tolist(), self.passes.tolist()
        fewest = min(range(len(tries)), key=tries.__getitem__)
        if tries[fewest] < max(self.ks):
            raise ValueError(
                f"pass@{max(self.ks)} needs {max(self.ks)} completions of each task, got {tries[fewest]} of "
                f"{self.tasks[fewest].task_id!r}; write more, or lower ks"
            )
        found = {}
        for k in self.ks:
            shares = [pass_at_k(n, c, k) for n, c in zip(tries, passes, strict=True)]
            found[f"pass@{k}"] = torch.tensor(shares, dtype=torch.float64, device=self.device).mean()
        count = self.tries.sum()
        return found | {"timeout_rate": self.timeouts.double() / count, "crash_rate": self.crashes.double() / count}
