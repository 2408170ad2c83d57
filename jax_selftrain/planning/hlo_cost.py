"""What a compiled program does on each chip, read from its text: memory traffic and collectives, with loops multiplied.

XLA's own `cost_analysis` counts a loop's body once. Here every instruction counts as often as it runs: the turns of
a loop stand in its condition (`i < 36`), and where they are a value (how many blocks of the cache are filled, say) the
caller says how many there will be.

Traffic is what instructions read and write in the chip's main memory. Buffers that the compiler has put into fast
memory (`S(1)` in a layout) cost nothing, an instruction that takes a slice reads the slice, and one that
updates a slice in place writes the slice. Elements are counted, not the padding of their tiles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_LEAF = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADING = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|called_computations|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id", "replica-id"),
    *("while", "conditional", "call", "after-all", "add-dependency", "opt-barrier"),
    *("async-start", "async-update", "async-done", "copy-done", "slice-done", "send-done", "recv-done"),
    *("all-gather-done", "all-reduce-done", "collective-permute-done"),
}
"""What moves nothing, or is counted where it begins."""
_NO_TRAFFIC = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollective")


@dataclass(frozen=True)
class BufferShape:
    """An array of an instruction's shape."""

    bytes: int
    in_memory: bool
    """In the chip's main memory, not in its fast one."""


@dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    shape: tuple[BufferShape, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    """What follows the operands: attributes; of a constant or parameter also what stands in the brackets."""
    is_root: bool

    def called(self) -> list[str]:
        """Computations it names."""
        return [name for group in _CALLED.findall(self.rest) for name in re.findall(r"%([\w.\-]+)", group)]


@dataclass(frozen=True)
class Collective:
    """One kind of exchange between chips."""

    kind: str
    """`all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all` or `collective-permute`."""
    participants: int
    """How many take part in each."""
    bytes: float
    """Of one whole (gathered, or not yet scattered) array, times `runs`."""
    runs: float

    @property
    def bytes_received(self) -> float:
        """Bytes that each chip must receive at least: of what is gathered or scattered the others' parts, of what is
        reduced for everybody twice that."""
        passes = {"all-reduce": 2.0, "collective-permute": self.participants / max(self.participants - 1, 1)}.get(
            self.kind, 1.0
        )
        return self.bytes * passes * (self.participants - 1) / self.participants


class HloModule:
    """The text of a compiled program (`compiled.as_text()`), taken apart."""

    def __init__(self, text: str, dynamic_turns: Sequence[float] = ()):
        """
        Args:
          dynamic_turns: turns of the loops whose number is a value, by how many such loops stand around them.

        Raises:
          ValueError: such a loop stands deeper than that, or the text is not understood (a defect of ours).
        """
        self.loop_trip_counts = tuple(dynamic_turns)
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        lines: dict[str, Instruction] = {}
        for line in text.splitlines():
            if heading := _HEADING.match(line):
                lines = self.computations.setdefault(heading[2], {})
                self.entry = heading[2] if heading[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                instruction = _parse(found[2], line[found.end() :], bool(found[1]))
                lines[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text of the program has no entry computation")

    @cached_property
    def execution_counts(self) -> dict[str, float]:
        """How often each computation that is not fused into an instruction is run."""
        found: dict[str, float] = {}

        def visit(name: str, times: float, depth: int) -> None:
            found[name] = found.get(name, 0.0) + times
            for instruction in self.computations[name].values():
                if instruction.opcode == "while":
                    trip_count = self._turns(name, instruction)
                    if trip_count is None and depth >= len(self.loop_trip_counts):
                        raise ValueError(f"nobody says how often the loop {instruction.name} turns")
                    body = re.search(r"body=%([\w.\-]+)", instruction.rest)
                    assert body is not None
                    more = self.loop_trip_counts[depth] if trip_count is None else trip_count
                    visit(body[1], times * more, depth + (trip_count is None))
                elif instruction.opcode in ("call", "conditional", "async-start"):
                    for callee in instruction.called():
                        visit(callee, times, depth)

        visit(self.entry, 1.0, 0)
        return found

    @property
    def traffic(self) -> float:
        """Bytes read from and written to a chip's main memory."""
        return sum(
            times * self._traffic_of(name, instruction)
            for name, times in self.execution_counts.items()
            for instruction in self.computations[name].values()
        )

    def collectives(self) -> list[Collective]:
        """What chips exchange, by kind and number of chips."""
        found: dict[tuple[str, int], list[float]] = {}
        for name, times in self.execution_counts.items():
            seen: set[str] = set()  # a collective may be fused, piece by piece, with several others' work
            for home, instruction in self._inline_fusions(name):
                kind = instruction.opcode.removesuffix("-start")
                if kind not in _COLLECTIVES:
                    continue
                chain = re.search(r'chain_id="(\d+)"', instruction.rest)
                if chain is not None:
                    if chain[1] in seen:
                        continue
                    seen.add(chain[1])
                if kind == "all-reduce" and home.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                chips, size = _group_size(instruction.rest), sum(leaf.bytes for leaf in instruction.shape)
                if kind == "reduce-scatter" and instruction.opcode == "reduce-scatter":
                    size *= chips  # its shape is that of a part
                if instruction.opcode.endswith("-start") and kind == "all-gather":
                    size = max(leaf.bytes for leaf in instruction.shape)  # (part, whole)
                if chips > 1:
                    entry = found.setdefault((kind, chips), [0.0, 0.0])
                    entry[0] += times * size
                    entry[1] += times
        return [Collective(kind, chips, *sums) for (kind, chips), sums in sorted(found.items())]

    def _inline_fusions(self, name: str) -> Iterator[tuple[str, Instruction]]:
        """The instructions of a computation and of all that is fused into them, with where they stand."""
        for instruction in self.computations[name].values():
            yield name, instruction
            if instruction.opcode in ("fusion", "custom-call"):
                for callee in instruction.called():
                    yield from self._inline_fusions(callee)

    def _turns(self, home: str, loop: Instruction) -> int | None:
        """How often a loop turns: None where that is a value."""
        condition = re.search(r"condition=%([\w.\-]+)", loop.rest)
        assert condition is not None
        lines = self.computations[condition[1]]
        root = next(line for line in lines.values() if line.is_root)
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        counter, bound = (lines[name] for name in root.operands)
        if bound.opcode != "constant" or counter.opcode != "get-tuple-element":
            return None
        index = re.search(r"index=(\d+)", counter.rest)
        assert index is not None
        return int(bound.rest.split(")")[0]) - self._constant(home, loop.operands[0], int(index[1]))

    def _constant(self, home: str, of: str, index: int) -> int:
        """Element `index` of the tuple that a loop begins with; 0 where it is not written out."""
        lines = self.computations[home]
        value = lines.get(lines[of].operands[index]) if lines[of].opcode == "tuple" else None
        while value is not None and value.opcode in ("copy", "bitcast"):
            value = lines.get(value.operands[0])
        written = value is not None and value.opcode == "constant" and value.rest.split(")")[0].lstrip("-").isdigit()
        return int(value.rest.split(")")[0]) if value is not None and written else 0

    def _traffic_of(self, home: str, instruction: Instruction) -> float:
        if instruction.opcode in _FREE or any(name in instruction.rest for name in _NO_TRAFFIC):
            return 0.0
        lines = self.computations[home]
        if instruction.opcode in ("copy-start", "slice-start"):  # (to, from, …) or ((from), to, …), with what it copies
            moved = [leaf for leaf in instruction.shape if leaf.bytes > 4][:2]
            size = min((leaf.bytes for leaf in moved), default=0)
            return float(size * sum(leaf.in_memory for leaf in moved))
        if instruction.opcode == "fusion":
            (callee,) = instruction.called()[:1]
            reads = [
                min(_in_memory(lines[name]), self._read_of(callee, index) if _in_memory(lines[name]) else 0.0)
                for index, name in enumerate(instruction.operands)
            ]
            return math.fsum(reads) + self._bytes_written(callee, instruction)
        return self._bytes_read_by(home, instruction) + self._update_or(home, instruction)

    def _bytes_read_by(self, home: str, instruction: Instruction) -> float:
        lines = self.computations[home]
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return (
                float(sum(leaf.bytes for leaf in instruction.shape))
                if _in_memory(lines[instruction.operands[0]])
                else 0
            )
        names = instruction.operands[1:] if instruction.opcode == "dynamic-update-slice" else instruction.operands
        return float(sum(_in_memory(lines[name]) for name in names))

    def _update_or(self, home: str, instruction: Instruction) -> float:
        """What it writes: of an update in place, the update."""
        if instruction.opcode == "dynamic-update-slice" and _in_memory(instruction):
            return float(sum(leaf.bytes for leaf in self.computations[home][instruction.operands[1]].shape))
        return float(_in_memory(instruction))

    def _read_of(self, callee: str, index: int) -> float:
        """Bytes that a fusion reads of its operand `index` if that lies in main memory."""
        lines = self.computations[callee]
        parameter = next(
            line for line in lines.values() if line.opcode == "parameter" and line.rest.split(")")[0] == str(index)
        )
        total = 0.0
        for user in _users(lines, parameter.name):
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] in _aliases(
                lines, parameter.name
            ):
                total += sum(leaf.bytes for leaf in user.shape)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] in _aliases(lines, parameter.name):
                continue
            elif user.opcode == "fusion":
                names = _aliases(lines, parameter.name)
                at = next(i for i, name in enumerate(user.operands) if name in names)
                total += self._read_of(user.called()[0], at)
            else:
                return float(sum(leaf.bytes for leaf in parameter.shape))
        return total

    def _bytes_written(self, callee: str, instruction: Instruction) -> float:
        """Bytes that a fusion writes to main memory."""
        lines = self.computations[callee]
        root = next(line for line in lines.values() if line.is_root)
        parts = [lines[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(parts) != len(instruction.shape):
            return float(_in_memory(instruction))
        total = 0.0
        for part, leaf in zip(parts, instruction.shape, strict=True):
            while part.opcode in ("bitcast", "copy", "convert") and part.operands[0] in lines:
                part = lines[part.operands[0]]
            if leaf.in_memory and part.opcode == "dynamic-update-slice":
                total += sum(update.bytes for update in lines[part.operands[1]].shape)
            elif leaf.in_memory:
                total += leaf.bytes
        return total


def _in_memory(instruction: Instruction) -> int:
    return sum(leaf.bytes for leaf in instruction.shape if leaf.in_memory)


def _aliases(lines: dict[str, Instruction], name: str) -> set[str]:
    """The array of this name, under all names that it has in a computation."""
    names = {name}
    for line in lines.values():  # operands stand before their users
        if line.opcode == "bitcast" and line.operands[0] in names:
            names.add(line.name)
    return names


def _users(lines: dict[str, Instruction], name: str) -> list[Instruction]:
    names = _aliases(lines, name)
    return [line for line in lines.values() if line.name not in names and not names.isdisjoint(line.operands)]


def _group_size(rest: str) -> int:
    """Of `replica_groups={{0,1},…}`, `[groups,size]<=[…]` or `mesh['a'=4,'b'=2] {'b'}`."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(?:, [^{]*)?\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", found[2]))
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return found[1].count("{") + 1
    return 1


def _parse(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    opcode, _, text = text.partition("(")
    close = _closing("(" + text, 0) - 1
    operands, rest = text[:close], text[close + 1 :]
    if opcode in ("constant", "parameter"):
        return Instruction(name, _leaves(shape), opcode, (), f"{operands}){rest}", is_root)
    return Instruction(name, _leaves(shape), opcode, tuple(re.findall(r"%([\w.\-]+)", operands)), rest, is_root)


def _closing(text: str, start: int) -> int:
    """Where the bracket closes that opens at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"a bracket stays open: {text[:200]}")


def _leaves(shape: str) -> tuple[BufferShape, ...]:
    leaves = []
    for kind, sizes, layout in _LEAF.findall(shape):
        number = re.match(r"[a-z]+(\d+)", kind)
        bits = _BITS[kind] if kind in _BITS else int(number[1]) if number else 0
        elements = math.prod(int(size) for size in sizes.split(",") if size)
        leaves.append(BufferShape(-(-bits * elements // 8), not re.search(r"S\([1-9]", layout)))
    return tuple(leaves)
