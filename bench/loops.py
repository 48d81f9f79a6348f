"""The loops of a kernel that hold products, from its disassembly with encodings.

Cycles are those that `cuxray sched` reports for the same loop: what the compiler has encoded into
each instruction, at least one, summed over the loop's blocks. It is read here from one disassembly
instead of three.
"""

import re
from dataclasses import dataclass, field

from cuxray.parse.ctrl import decode_word

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
# The second half of an encoding has a line to itself.
_CONTROL = re.compile(r"^\s+/\* (0x[0-9a-f]{16}) \*/")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass
class Loop:
    """An innermost loop with products: what one iteration of one warp takes and does."""

    header: str
    cycles: int = 0
    instructions: int = 0
    macs: int = 0


def instruction_macs(opcode: str) -> int:
    """Return the 16-bit multiply-adds of one warp in a tensor-core instruction, 0 for any other."""
    if match := re.match(r"HMMA\.168(16|8)\.(?!.*TF32)", opcode):
        return 16 * 8 * int(match[1])
    if match := re.match(r"HGMMA\.64x(\d+)x(\d+)\.(?!.*TF32)", opcode):
        return 64 * int(match[1]) * int(match[2]) // 4  # four warps share it
    return 0


@dataclass
class _Block:
    """The instructions from a label to the next."""

    opcodes: list[str] = field(default_factory=list)
    cycles: int = 0
    successors: list[str] = field(default_factory=list)


def _blocks(disassembly: str) -> dict[str, _Block]:
    """Return the blocks of one kernel by label, in order, from ``nvdisasm -c -hex``."""
    blocks = {"": _Block()}
    block, falls_through = blocks[""], True
    for line in disassembly.splitlines():
        if label := _LABEL.match(line):
            if falls_through:
                block.successors.append(label[1])
            block, falls_through = blocks.setdefault(label[1], _Block()), True
        elif instruction := _INSTRUCTION.search(line):
            opcode, operands = instruction["opcode"], instruction["operands"]
            block.opcodes.append(opcode)
            # A jump out of a loop may be a call that never returns.
            leaves = opcode.split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP")
            if leaves or opcode == "CALL.REL.NOINC":
                block.successors += _TARGET.findall(operands)
                # BRA takes a uniform predicate as an operand too.
                conditional = instruction["predicate"] is not None or "UP" in operands
                falls_through = falls_through and conditional
        elif control := _CONTROL.match(line):
            block.cycles += max(decode_word(int(control[1], 16)).stall, 1)
    return blocks


def product_loops(disassembly: str) -> list[Loop]:
    """Return the innermost loops with products of the one kernel in a disassembly, in order."""
    blocks = _blocks(disassembly)
    predecessors: dict[str, list[str]] = {label: [] for label in blocks}
    for label, block in blocks.items():
        for successor in block.successors:
            predecessors.setdefault(successor, []).append(label)
    bodies: dict[str, set[str]] = {}
    for tail, header in _back_edges(blocks):
        body, left = bodies.setdefault(header, {header}), [tail]
        while left:
            label = left.pop()
            if label not in body:
                body.add(label)
                left += predecessors[label]
    loops = {}
    for header in (label for label in blocks if label in bodies):
        loop = Loop(header)
        for block in (blocks[label] for label in bodies[header]):
            loop.cycles += block.cycles
            loop.instructions += len(block.opcodes)
            loop.macs += sum(map(instruction_macs, block.opcodes))
        if loop.macs:
            loops[header] = loop
    return [
        loop
        for header, loop in loops.items()
        if not any(other in bodies[header] for other in loops if other != header)
    ]


def _back_edges(blocks: dict[str, _Block]) -> list[tuple[str, str]]:
    """Return the edges to a block that the walk from the entry is still inside of."""
    edges, inside, done = [], {""}, set()
    stack = [("", iter(blocks[""].successors))]
    while stack:
        label, successors = stack[-1]
        following = next(successors, None)
        if following is None:
            stack.pop()
            inside.remove(label)
            done.add(label)
        elif following in inside:
            edges.append((label, following))
        elif following not in done and following in blocks:
            inside.add(following)
            stack.append((following, iter(blocks[following].successors)))
    return edges
