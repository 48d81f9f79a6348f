"""Blocks of a launch on the slots of a GPU, and the turns that they take to add to a sum.

Blocks start in the order of the grid, each as soon as a slot is free: the slots are the blocks that
the multiprocessors hold at once. A block takes its steps in their order. Of a step, the last part
is held: it begins when the block's turn at an accumulator has come, and when it has ended the next
turn comes, a hand-over later. A step without an accumulator waits for nothing.

What the model leaves out: blocks of one multiprocessor do not slow each other down, memory does not
either, and clocks do not change.
"""

import heapq
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

#: An accumulator, or None, how many blocks add to it before this one, and optionally the time that
#: the step takes in the place of `step`.
Step = tuple[Hashable, int] | tuple[Hashable, int, float]


class DeadlockError(RuntimeError):
    """Every slot is taken by a block that waits for one that cannot start or go on."""


@dataclass(frozen=True)
class Span:
    """A block on its slot; times are in the unit of `step`."""

    slot: int
    begin: float
    end: float
    waited: float  # of this, for turns


@dataclass(frozen=True)
class Schedule:
    """What became of a launch."""

    slots: int
    makespan: float
    spans: tuple[Span, ...]  # by block, in grid order

    @property
    def work(self) -> float:
        """The time that blocks took without their waits for turns."""
        return sum(span.end - span.begin - span.waited for span in self.spans)

    @property
    def waited(self) -> float:
        return sum(span.waited for span in self.spans)

    @property
    def busy(self) -> float:
        """The part of the slots' time in which blocks work."""
        return self.work / (self.slots * self.makespan) if self.makespan else 1.0

    @property
    def waves(self) -> float:
        """How many blocks each slot takes on average."""
        return len(self.spans) / self.slots


class _Block:
    """A block that has started."""

    __slots__ = ("begin", "now", "number", "place", "slot", "steps", "waited")

    def __init__(self, number: int, slot: int, now: float, begin: float, steps: Sequence[Step]):
        self.number, self.slot, self.begin, self.now = number, slot, begin, now
        self.steps, self.place, self.waited = steps, 0, 0.0


def simulate(
    blocks: Iterable[Sequence[Step]],
    slots: int,
    *,
    step: float = 1.0,
    held: float = 0.0,
    hand_over: float = 0.0,
    overhead: float = 0.0,
    ordered: bool = True,
) -> Schedule:
    """Return the schedule of a launch.

    `blocks` are the steps of each block, in grid order; they are taken from it as they start.
    `step` is the time of a step, of which the turn is held for the last `held`, `hand_over` the
    time until others see that it was passed on, `overhead` what a block takes besides its steps,
    all before the first. Without `ordered` nobody waits: sums in any order.

    A block whose turns are known is followed to its end at once, since nothing that starts later
    can change them. One that waits for a block which has not started ends after that block begins,
    so after the earliest end that is known: hence the next block takes that end's slot.

    Raises `DeadlockError` if no block can go on, `ValueError` for slots or times out of range.
    """
    if slots < 1:
        raise ValueError(f"slots={slots}: at least one is needed")
    if not 0 <= held <= step or hand_over < 0 or overhead < 0:
        raise ValueError(f"times out of range: {step=}, {held=}, {hand_over=}, {overhead=}")
    passed: dict[Hashable, tuple[int, float]] = {}  # turns that are known, and when the last came
    waiting: dict[tuple[Hashable, int], _Block] = {}
    free = [(0.0, slot) for slot in range(slots)]
    spans: dict[int, Span] = {}

    def follow(first: _Block) -> None:
        going = deque([first])
        while going:
            block = going.popleft()
            steps, now = block.steps, block.now
            while block.place < len(steps):
                current = steps[block.place]
                key, turn = current[0], current[1]
                cycles = current[2] if len(current) > 2 else step
                if key is None or not ordered:
                    now += cycles
                    block.place += 1
                    continue
                arrival = now + cycles - held
                count, came = passed.get(key, (0, 0.0))
                if turn > count:
                    waiting[key, turn] = block
                    break
                if turn < count:
                    raise ValueError(f"two blocks have turn {turn} at {key}")
                begin = max(arrival, came)
                block.waited += begin - arrival
                now = begin + held
                passed[key] = count + 1, now + hand_over
                block.place += 1
                if (woken := waiting.pop((key, count + 1), None)) is not None:
                    going.append(woken)
            block.now = now
            if block.place == len(steps):
                spans[block.number] = Span(block.slot, block.begin, now, block.waited)
                heapq.heappush(free, (now, block.slot))

    number = 0
    for number, steps in enumerate(blocks, 1):
        if not free:
            raise DeadlockError(_stuck(waiting, number - 1))
        begin, slot = heapq.heappop(free)
        follow(_Block(number - 1, slot, begin + overhead, begin, steps))
    if waiting:
        raise DeadlockError(_stuck(waiting, number))
    ordered_spans = tuple(spans[index] for index in range(number))
    return Schedule(slots, max((span.end for span in ordered_spans), default=0.0), ordered_spans)


def _stuck(waiting: dict[tuple[Hashable, int], _Block], started: int) -> str:
    (key, turn), block = next(iter(waiting.items()))
    return (
        f"{len(waiting)} of {started} started blocks wait for turns that nobody passes on, block "
        f"{block.number} for turn {turn} at {key}"
    )
