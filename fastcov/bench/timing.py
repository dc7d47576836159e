"""Interleaved timing: contenders take turns in one run, so that a slow minute hits them all.

The interval of a median comes from order statistics (inversion of the sign test), which assume
nothing about the distribution of times. Ratios are taken within a round, never between runs.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

Call = Callable[[int], object]
"""Function to time. Its argument is the number of the call, by which it rotates through inputs."""

_SHORTEST_SAMPLE_S = 5e-4  # a sample repeats a call until perf_counter's noise is below 0.1 %
# Events resolve 0.5 us. A launch queue holds about a thousand: more calls would stall the host.
_SHORTEST_EVENT_SAMPLE_S = 2e-4
_MOST_CALLS = 2000
# The device sleeps while the host enqueues, so that gaps between launches are not timed: at first
# about 0.2 ms, then longer for a call whose launches take longer; a call that itself waits for the
# device never gets ahead of it.
_SLEEP_CYCLES = 400_000
_LONGEST_SLEEP_CYCLES = 256 * _SLEEP_CYCLES


@dataclass(frozen=True)
class Quantiles:
    """Distribution of one contender's times, in seconds; low and high bound the median (95 %)."""

    p20: float
    p50: float
    p80: float
    low: float
    high: float
    samples: int


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    r"""Confidence interval of the median from order statistics.

    .. math:: P(x_{(k)} \le \text{median} \le x_{(n+1-k)}) = 1 - 2 P(\text{Bin}(n, 1/2) < k)

    Args:
        samples: At least one. Fewer than six cannot reach 95 %: their range is returned.
        confidence: Least probability that the interval holds the median.

    Returns:
        Lower and upper bound.

    Example:
        >>> median_interval(range(1, 41))
        (14, 27)
    """
    ordered = sorted(samples)
    n = len(ordered)
    rank, below = 1, 0.5**n  # below = P(Bin(n, 1/2) < rank)
    while rank < (n + 1) // 2:
        further = below + math.comb(n, rank) * 0.5**n
        if 2 * further > 1 - confidence:
            break
        rank, below = rank + 1, further
    return ordered[rank - 1], ordered[n - rank]


def mean_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % confidence interval by Student's t.

    Returns:
        Mean, lower bound, upper bound. The bounds of one sample are the sample itself.

    Raises:
        ImportError: Without scipy (the extra ``bench``).

    Example:
        >>> [round(bound, 3) for bound in mean_interval([1.0, 1.0, 4.0, 2.0])]
        [2.0, -0.25, 4.25]
    """
    mean, n = math.fsum(samples) / len(samples), len(samples)
    if n < 2:
        return mean, mean, mean
    stats = _stats()
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(samples))
    return mean, mean - half, mean + half


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("benchmarks need scipy: pip install scipy") from error
    return stats


def quantiles(samples: Sequence[float]) -> Quantiles:
    """Summary of one contender's times."""
    low, high = median_interval(samples)
    p20, p50, p80 = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
    return Quantiles(p20, p50, p80, low, high, len(samples))


def wall_s(device: torch.device, call: Call, first: int, calls: int) -> float:
    """Seconds per call as a user waits for it: host and device together."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for index in range(first, first + calls):
        call(index)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


class DeviceClock:
    """Clock of seconds per call on the device alone, by CUDA events; on a CPU :func:`wall_s`."""

    def __init__(self) -> None:
        self._sleep_cycles: dict[Call, int] = {}

    def __call__(self, device: torch.device, call: Call, first: int, calls: int) -> float:
        """Mean of ``calls`` calls, repeated with a longer sleep if the device overtook the host."""
        if device.type != "cuda":
            return wall_s(device, call, first, calls)
        cycles = self._sleep_cycles.get(call, _SLEEP_CYCLES)
        while True:
            seconds, was_ahead = _device_sample(device, call, first, calls, abs(cycles))
            if was_ahead or cycles < 0:
                break
            # Negative: no sleep was long enough, the call waits for the device. Not tried again.
            cycles = 4 * cycles if cycles < _LONGEST_SLEEP_CYCLES else -_SLEEP_CYCLES
        self._sleep_cycles[call] = cycles
        return seconds


def _device_sample(
    device: torch.device, call: Call, first: int, calls: int, cycles: int
) -> tuple[float, bool]:
    """Seconds per call, and True if every call was enqueued before the device began."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    sleep: Callable[[int], None] = torch.cuda._sleep
    sleep(cycles)
    begin.record()
    for index in range(first, first + calls):
        call(index)
    end.record()
    was_ahead = not begin.query()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3 / calls, was_ahead


def host_s(device: torch.device, call: Call, first: int, calls: int) -> float:
    """CPU seconds per call of the calling thread. The device starts idle and is not waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.thread_time()
    for index in range(first, first + calls):
        call(index)
    return (time.thread_time() - start) / calls


Clock = Literal["wall", "device", "host"]


def _reader(clock: Clock) -> Callable[[torch.device, Call, int, int], float]:
    if clock == "device":
        return DeviceClock()
    return wall_s if clock == "wall" else host_s


def interleave(
    contenders: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int,
    budget_s: float = math.inf,
    fewest_rounds: int = 6,
    clock: Clock = "wall",
    prepare: Callable[[str, int], None] | None = None,
    periods: Mapping[str, int] | None = None,
    reference: str | None = None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Times of contenders that take turns: a round runs each once, in a new order; see ``periods``.

    A machine's speed drifts: calls that follow each other closely see nearly the same speed.

    Args:
        contenders: Functions to time, by name. Each has run before, so compilation is not timed.
        device: Device that they run on.
        rounds: Largest number of rounds.
        budget_s: Seconds after which to stop, once ``fewest_rounds`` are done.
        fewest_rounds: Smallest number of rounds, whatever they take.
        clock: "wall" for a user's wait, "device" for kernels, "host" for work ahead of a GPU.
        prepare: Called with a name and the round before each sample, outside the time.
        periods: Rounds from one sample of a contender to its next; 1 if not named.
        reference: Contender that runs in the middle of each order, close to all others.
        seed: Seed of the orders.

    Returns:
        Seconds per call, by name, one entry for each round; NaN in rounds that a contender sat out.
    """
    read = _reader(clock)
    shortest_s = _SHORTEST_SAMPLE_S
    if clock == "device" and device.type == "cuda":
        shortest_s = _SHORTEST_EVENT_SAMPLE_S
    calls: dict[str, int] = {}
    for name, call in contenders.items():
        if prepare is not None:
            prepare(name, 0)
        once = read(device, call, 0, 1)
        if once < shortest_s:
            once = min(once, read(device, call, 1, 1))
        calls[name] = max(1, min(_MOST_CALLS, math.ceil(shortest_s / max(once, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    next_call = dict.fromkeys(contenders, 2)
    every = periods or {}
    shuffle = random.Random(seed).shuffle
    start = time.perf_counter()
    for round_number in range(1, rounds + 1):
        order = [name for name in contenders if (round_number - 1) % every.get(name, 1) == 0]
        shuffle(order)
        if reference in order:
            order.remove(reference)
            order.insert(len(order) // 2, reference)
        for name in contenders.keys() - set(order):
            samples[name].append(math.nan)
        for name in order:
            if prepare is not None:
                prepare(name, round_number)
            took = read(device, contenders[name], next_call[name], calls[name])
            samples[name].append(took)
            next_call[name] += calls[name]
        if round_number >= fewest_rounds and time.perf_counter() - start > budget_s:
            break
    return samples


def ratios(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Ratios of the rounds in which both contenders ran."""
    return without_nan([one / other for one, other in zip(samples, reference, strict=True)])


def without_nan(samples: Sequence[float]) -> list[float]:
    """Samples of the rounds in which the contender ran."""
    return [one for one in samples if not math.isnan(one)]
