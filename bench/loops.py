"""The loops of a kernel that hold products, from its disassembly."""

import re
from dataclasses import dataclass, field

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);?")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Loop:
    """An innermost loop with products: what one iteration of one warp takes and does."""

    header: str
    cycles: int
    instructions: int
    macs: int
    score: float


def instruction_macs(opcode: str) -> int:
    """Return the 16-bit multiply-adds of one warp in a tensor-core instruction, 0 for any other."""
    if match := re.match(r"HMMA\.168(16|8)\.(?!.*TF32)", opcode):
        return 16 * 8 * int(match[1])
    if match := re.match(r"HGMMA\.64x(\d+)x(\d+)\.(?!.*TF32)", opcode):
        return 64 * int(match[1]) * int(match[2]) // 4  # four warps share it
    return 0


@dataclass
class _Block:
    """A run of instructions that is entered at its head alone."""

    opcodes: list[str] = field(default_factory=list)
    successors: list[str] = field(default_factory=list)


def _blocks(disassembly: str) -> dict[str, _Block]:
    """Return the blocks of one kernel by label, in order, from what ``nvdisasm -c`` prints."""
    blocks = {"": _Block()}
    block, falls_through = blocks[""], True
    for line in disassembly.splitlines():
        if label := _LABEL.match(line):
            if falls_through:
                block.successors.append(label[1])
            block, falls_through = blocks.setdefault(label[1], _Block()), True
        elif instruction := _INSTRUCTION.search(line):
            predicate, opcode, operands = instruction.groups()
            block.opcodes.append(opcode)
            leaves = opcode.split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP")
            # A jump out of a loop may be a call that never returns.
            if leaves or opcode == "CALL.REL.NOINC":
                block.successors += _TARGET.findall(operands)
                falls_through = falls_through and (predicate is not None or "UP" in operands)
    return blocks


def loop_bodies(disassembly: str) -> dict[str, dict[str, int]]:
    """Return {header: {"mma", "macs", "instructions"}} of the innermost loops with products."""
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
    found = {}
    for header, body in bodies.items():
        opcodes = [opcode for label in body for opcode in blocks[label].opcodes]
        macs = [instruction_macs(opcode) for opcode in opcodes]
        if any(macs):
            found[header] = {
                "mma": sum(map(bool, macs)),
                "macs": sum(macs),
                "instructions": len(opcodes),
            }
    return {h: f for h, f in found.items() if not any(o in bodies[h] for o in found if o != h)}


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
