"""Bugs planted in the emulator of CUDA C++ kernels itself must be caught by its checks."""

import shutil

import pytest
from emulator_build import SOURCES
from emulator_checks import everything, load

#: Name -> (file, correct text, planted text).
MUTANTS = {
    "rows of an operand are exchanged": (
        "tensor_cores.cpp",
        "a[group + 8 * i][2 * pair + 8 * half] =",
        "a[group + 8 * half][2 * pair + 8 * i] =",
    ),
    "columns of a tf32 operand are exchanged": (
        "tensor_cores.cpp",
        "tf32_of(mine.a[2 * half + i])",
        "tf32_of(mine.a[2 * i + half])",
    ),
    "a tensor core reads more than tf32": (
        "tensor_cores.cpp",
        "  bits &= ~0x1fffu;\n",
        "",
    ),
    "tf32 is cut off": (
        "primitives.cpp",
        "std::isfinite(x) ? 0x1000 : 0",
        "0 * std::isfinite(x)",
    ),
    "ldmatrix turns what it should not": (
        "tensor_cores.cpp",
        "lanes[lane]->transposed",
        "!lanes[lane]->transposed",
    ),
    "conflicts are counted over half of the banks": (
        "tensor_cores.cpp",
        "/ 16 % 8",
        "/ 16 % 4",
    ),
    "a shuffle goes to the next lane": (
        "primitives.cpp",
        "lanes[(i ^ lanes[i]->mask) & 31]",
        "lanes[(i + lanes[i]->mask) & 31]",
    ),
    "numbers are cut off": (
        "primitives.cpp",
        "(bits + 0x7fff + (bits >> 16 & 1)) >> 16",
        "bits >> 16",
    ),
    "a turn is taken before it comes": (
        "scheduler.cpp",
        "if (*counter >= value) return;",
        "if (counter != nullptr || value != 0) return;",
    ),
    "a turn that has come wakes nobody": (
        "scheduler.cpp",
        "return *awaited.counter >= awaited.value;",
        "return awaited.counter == nullptr;",
    ),
    "blocks that run at the same time have one shared memory": (
        "memory.cpp",
        "shared_begin + block.slot * kSharedSpace",
        "shared_begin + 0 * block.slot",
    ),
    "a turn may come by a later block": (
        "primitives.cpp",
        "passer->second > block.number",
        "passer->second > block.number + 9",
    ),
    "a barrier before a turn is passed on is not needed": (
        "primitives.cpp",
        "if (&thread != current && !seen) {",
        "if (false && !seen) {",
    ),
    "sums may come outside of a turn": (
        "primitives.cpp",
        "block.turns.empty() || !has_seen(block.waiter, block.waited)",
        "!has_seen(block.waiter, block.waited)",
    ),
    "a barrier after the wait is not needed": (
        "primitives.cpp",
        "block.turns.empty() || !has_seen(block.waiter, block.waited)",
        "block.turns.empty()",
    ),
    "blocks run one after the other": (
        "scheduler.cpp",
        "std::min<uint64_t>(kResidentBlocks, blocks) : 1",
        "1 : 1",
    ),
    "late copies land early": (
        "primitives.cpp",
        "landing == Landing::kEarly ||",
        "landing == Landing::kLate || landing == Landing::kEarly ||",
    ),
    "a wait lets one group more stay": (
        "primitives.cpp",
        "current->copy_groups.size()) > pending",
        "current->copy_groups.size()) > pending + 1",
    ),
    "a barrier orders nothing": (
        "barriers.cpp",
        "  join_clocks(arrived);\n",
        "",
    ),
    "nobody looks whether memory was written": (
        "memory.cpp",
        "(word.initialised & touched) != touched)",
        "false)",
    ),
    "races are overlooked": (
        "memory.cpp",
        "clock <= current->clocks[thread])",
        "clock <= current->clocks[thread] + 1000)",
    ),
    "misaligned accesses are overlooked": (
        "memory.cpp",
        "reinterpret_cast<uintptr_t>(first) % bytes)",
        "reinterpret_cast<uintptr_t>(first) % 1)",
    ),
    "registers start at 0": (
        "scheduler.cpp",
        "std::memset(below, 0xff,",
        "std::memset(below, 0,",
    ),
    "the readers of other blocks are forgotten": (
        "memory.cpp",
        "word.other_read_block = word.read_block;",
        "word.other_read_block = 0;",
    ),
    "sums may begin with anything": (
        "memory.cpp",
        "(reads || access == Access::kAtomic)",
        "reads",
    ),
    "two copies to one place are overlooked": (
        "memory.cpp",
        "word.copies_on_the_way && access == Access::kCopyBegins",
        "word.copies_on_the_way > 9 && access == Access::kCopyBegins",
    ),
    "lanes that read one word are in each other's way": (
        "bank_conflicts.cpp",
        "    wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());\n",
        "",
    ),
    "sixteen bytes are served like four": (
        "bank_conflicts.cpp",
        "static_cast<int>(kBanks / words)",
        "kBanks",
    ),
    "barriers of two sizes are one": (
        "barriers.cpp",
        "!barrier.waiting.empty() && barrier.expected != threads",
        "false",
    ),
    "copies on their way are overlooked": (
        "memory.cpp",
        "if (word.copies_on_the_way && !copy)",
        "if (word.copies_on_the_way > 9 && !copy)",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_emulator_is_caught(name, tmp_path):
    file, correct, wrong = MUTANTS[name]
    copy = tmp_path / "csrc"
    shutil.copytree(SOURCES, copy)
    source = (copy / "emulator" / file).read_text()
    assert correct in source, f"{file} has changed: plant the mutant anew"
    (copy / "emulator" / file).write_text(source.replace(correct, wrong))
    with pytest.raises(AssertionError):
        everything(load(copy))
