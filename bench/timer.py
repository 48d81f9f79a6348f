"""The one timer: verify, then time the candidates in turn, repetition by repetition.

Machines drift while they are measured. Candidates therefore run A B C A B C ..., and a ratio is the
median of the ratios of neighbouring runs, not the ratio of two medians.
"""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from fuseformer.testing import assert_close_to_reference

Result = tuple[torch.Tensor, ...]


@dataclass
class Candidate:
    """A named way to compute the same thing; `run` returns what is compared."""

    name: str
    run: Callable[[], Result]


@dataclass
class Row:
    """What one candidate took: seconds, its ratio to the first candidate's time, and memory."""

    case: str
    name: str
    median_s: float
    low_s: float
    high_s: float
    speedup: float
    tflops: float
    peak_mib: float
    over: dict[str, float] = field(default_factory=dict)  # the same ratio to each other candidate

    def as_dict(self) -> dict[str, float | str | dict[str, float]]:
        return asdict(self)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def verify(candidates: list[Candidate], exact: Callable[[], Result], baseline: Result) -> None:
    """Raise `AssertionError` unless every candidate is as near to `exact` as `baseline` is."""
    expected = exact()
    for candidate in candidates:
        for index, (a, e, b) in enumerate(zip(candidate.run(), expected, baseline, strict=True)):
            assert_close_to_reference(a, e, b, factor=3, name=f"{candidate.name}, result {index}")


def peak_mib(run: Callable[[], Result], device: str) -> float:
    """Return the most memory that one call holds beyond its inputs, in MiB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak / 2**20


def process_peak_mib() -> float:
    """Return the most memory this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(
    case: str,
    candidates: list[Candidate],
    *,
    flops: float,
    repetitions: int,
    device: str = "cpu",
    warmup: int = 2,
) -> list[Row]:
    """Time verified candidates in turn; speedups are over the first one.

    `flops` is the work of one call. Returns a row a candidate, in order.
    """
    for _ in range(warmup):
        for candidate in candidates:
            candidate.run()
    times: list[list[float]] = [[] for _ in candidates]
    order = list(enumerate(candidates))
    for _ in range(repetitions):
        order = order[1:] + order[:1]  # whoever runs first differs: what it leaves in caches counts
        for index, candidate in order:
            synchronize(device)
            start = time.perf_counter()
            candidate.run()
            synchronize(device)
            times[index].append(time.perf_counter() - start)
    rows = []
    for candidate, taken in zip(candidates, times, strict=True):
        median = statistics.median(taken)
        over = {
            other.name: statistics.median(a / b for a, b in zip(theirs, taken, strict=True))
            for other, theirs in zip(candidates, times, strict=True)
        }
        rows.append(
            Row(
                case=case,
                name=candidate.name,
                median_s=median,
                low_s=min(taken),
                high_s=max(taken),
                speedup=over[candidates[0].name],
                tflops=flops / median / 1e12,
                peak_mib=peak_mib(candidate.run, device),
                over={name: ratio for name, ratio in over.items() if name != candidate.name},
            )
        )
    return rows
