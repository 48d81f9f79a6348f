"""The model of a launch: schedules that were computed by hand, and orders that run one by one."""

import pytest

from bench.simulator import DeadlockError, Span, simulate


def test_blocks_take_the_slot_that_is_free_first():
    blocks = [[(None, 0)] * count for count in (3, 1, 1, 2)]
    schedule = simulate(blocks, 2, overhead=0.5)
    assert schedule.spans == (
        Span(0, 0.0, 3.5, 0.0),
        Span(1, 0.0, 1.5, 0.0),
        Span(1, 1.5, 3.0, 0.0),
        Span(1, 3.0, 5.5, 0.0),
    )
    assert (schedule.makespan, schedule.work) == (5.5, 9.0)
    assert schedule.busy == 9.0 / 11.0


def test_a_turn_is_held_for_the_last_part_of_a_step():
    # The second block waits from 0.75 to 1 + 0.5, the third from then on.
    schedule = simulate([[("a", 0)], [("a", 1)], [("a", 2)]], 3, held=0.25, hand_over=0.5)
    assert [span.end for span in schedule.spans] == [1.0, 1.75, 2.5]
    assert [span.waited for span in schedule.spans] == [0.0, 0.75, 1.5]
    assert schedule.work == 3.0


def test_turns_pass_across_waves_and_to_blocks_that_start_earlier():
    # Block 0 waits for block 1's sum; block 2 starts when block 1 has ended.
    schedule = simulate([[("a", 1)], [("a", 0)], [("a", 2, 3.0)]], 2, held=0.5)
    assert [(span.begin, span.end) for span in schedule.spans] == [(0, 1.5), (0, 1), (1, 4)]


def test_a_launch_that_cannot_end_is_seen():
    with pytest.raises(DeadlockError, match="block 0 for turn 1 at a"):
        simulate([[("a", 1)], [("a", 0)]], 1)
    with pytest.raises(DeadlockError, match="2 of 2 started blocks"):
        simulate([[("a", 1), ("b", 0)], [("b", 1), ("a", 0)]], 2)
    assert simulate([[("a", 1)], [("a", 0)]], 1, ordered=False).makespan == 2


def test_a_turn_that_two_blocks_have_is_refused():
    with pytest.raises(ValueError, match="two blocks have turn 0"):
        simulate([[("a", 0)], [("a", 0)]], 2)


def _causal(steps: int, diagonal_first: bool) -> list[list[tuple[int, int]]]:
    """Return the order of blocks whose keys are those of two steps of queries."""
    blocks = []
    for block in range(steps // 2):
        edge, full = [2 * block + 1, 2 * block], [*range(steps - 1, 2 * block + 1, -1)]
        order = edge + full if diagonal_first else full + edge
        blocks.append([(step, block) for step in order])
    return blocks


@pytest.mark.parametrize(
    ("keys", "times"), [(1024, 4.06), (2048, 8.03), (4096, 16.02), (8192, 32.01)]
)
def test_the_diagonal_first_runs_blocks_one_by_one_and_last_costs_nothing(keys, times):
    steps = keys // 64
    unordered = simulate(_causal(steps, True), 108, ordered=False).makespan
    first = simulate(_causal(steps, True), 108, held=1.0).makespan
    assert round(first / unordered, 2) == times
    last = simulate(_causal(steps, False), 108, held=0.25, hand_over=0.25).makespan
    assert last <= 1.10 * unordered
