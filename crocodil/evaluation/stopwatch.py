"""Wall-clock of each network while a sampler runs."""

import time
from typing import Any

import torch


class Stopwatch:
    """Wall-clock of networks, without making a GPU wait: its own clock is read when all is over.

    Args:
        device: where the networks are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._start = self._now()
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, part: str, network: Any) -> "Timed":
        """The network, whose calls are timed from now on."""
        return Timed(self, part, network)

    def add(self, part: str, start: Any) -> None:
        """A span from `start` to now."""
        self._spans.append((part, start, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds since the beginning, "total", and of each part; waits for the device."""
        end = self._now()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = {"total": self._between(self._start, end)}
        for part, start, stop in self._spans:
            seconds[part] = seconds.get(part, 0.0) + self._between(start, stop)
        return seconds

    def _between(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) / 1000 if self.device.type == "cuda" else stop - start


class Timed:
    """A network that a stopwatch follows; in all else it is the network itself."""

    def __init__(self, stopwatch: Stopwatch, part: str, network: Any) -> None:
        self._stopwatch, self._part, self._network = stopwatch, part, network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the network."""
        start = self._stopwatch._now()
        out = self._network(*args, **kwargs)
        self._stopwatch.add(self._part, start)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)
