"""What the log says of a run between two entries: means of its numbers, its speed and its memory."""

import sys
import time
from collections import defaultdict
from collections.abc import Mapping

import torch

from rdm_rl.weighting import DirectionStatistics, Weighting


class MetricWindow:
    """The numbers of the updates since the last log entry.

    Example:
        >>> window = MetricWindow()
        >>> window.add({"loss": 1.0})
        >>> window.add({"loss": 3.0})
        >>> steps, seconds, means = window.flush()
        >>> steps, means
        (2, {'loss': 2.0})
    """

    def __init__(self) -> None:
        """Start the clock."""
        self._values: dict[str, list[float]] = defaultdict(list)
        self._steps = 0
        self._start = time.perf_counter()

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the numbers of one update; not every update has all of them."""
        self._steps += 1
        for name, value in metrics.items():
            self._values[name].append(value)

    def flush(self) -> tuple[int, float, dict[str, float]]:
        """The number of updates, the seconds they took, and the mean of each number; starts a new window."""
        now = time.perf_counter()
        result = self._steps, max(now - self._start, 1e-9), {k: sum(v) / len(v) for k, v in self._values.items()}
        self._values.clear()
        self._steps, self._start = 0, now
        return result


def peak_memory_gib(device: torch.device) -> float:
    """The highest memory use so far, in GiB: of the accelerator if there is one, else of the process.

    Args:
        device: Where the networks are.

    Returns:
        The peak, in GiB.

    Example:
        >>> peak_memory_gib(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # Not on Windows.

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def reward_metrics(statistics: DirectionStatistics, weighting: Weighting) -> dict[str, float]:
    """What the log says of the rewards in one update.

    Args:
        statistics: What their directions and values look like.
        weighting: What combined them.

    Returns:
        Numbers by name; ``docs/metrics.md`` says what each means. A number that nothing is known of is left out.
    """
    metrics = dict(weighting.metrics)
    for name, one in statistics.rewards.items():
        numbers = {
            "mean": one.mean,
            "std": one.std,
            "applicable": one.applicable,
            "frac_zero_std": one.frac_zero_std,
            "faults": one.faults,
            "acted": float(one.rms is not None),
            "direction_rms": one.rms,
            "cosine_to_rdm": one.cosine,
            "lambda": weighting.lambdas.get(name),
        }
        metrics |= {f"rewards/{name}/{key}": value for key, value in numbers.items() if value is not None}
    return metrics
