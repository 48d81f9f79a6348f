"""The model of a launch: schedules that were computed by hand, and orders that run one by one."""

import pytest

from bench import schedule
from bench.grids import Launch, tiles
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


def test_tiles_are_those_of_the_sources():
    assert tiles()["forward", 128]["block_m"] == 128
    assert {size for kernel, size in tiles() if kernel == "forward"} == set(schedule.HEAD_DIMS)


def test_steps_of_causal_blocks_and_their_order():
    # Blocks of 128 queries over steps of 64 keys: the last two of each hold the diagonal.
    launch = Launch("forward", 128, 300, 300, 2, causal=True)
    blocks = list(launch.blocks(80))
    assert [len(block) for block in blocks] == [5, 4, 2] * 2
    masked = launch.masked_cost(80)
    assert masked > 1
    assert [cost for _, _, cost in blocks[1]] == [1.0, 1.0, masked, masked]
    # The window of 100 hides the first keys of the second block in part.
    window = Launch("forward", 128, 300, 300, 1, causal=True, window=100)
    assert [len(block) for block in window.blocks(80)] == [3, 4, 2]
    # Aligned with the last key, the first query sees 201 keys, the last one all 300.
    aligned = Launch("forward", 128, 100, 300, 1, causal=True, bottom_right=True)
    assert [[cost > 1 for _, _, cost in block] for block in aligned.blocks(80)] == [
        [False, False, False, True, True]
    ]


def test_launches_of_many_waves_keep_slots_busy(capsys, tmp_path):
    assert schedule.main(["--lengths", "16384", "--output", str(tmp_path / "rows.json")]) == 0
    assert " 0 below goal" in capsys.readouterr().out


def test_a_launch_with_a_long_tail_is_a_failure(monkeypatch, capsys, tmp_path):
    tail = Launch("linear", 1024, 128 * (4 * 108 + 1), 256)  # one block in a fifth wave
    monkeypatch.setattr(schedule, "launches", lambda lengths: [tail])
    picture = tmp_path / "tail.png"
    assert schedule.main(["--plot", str(picture)]) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "missed" in capsys.readouterr().out
