"""Memory traffic and collectives of a compiled program, from its HLO text.

`cost_analysis` of XLA counts the body of a loop once. Here an instruction counts as often as it runs: the trip count is
read from the loop's condition (`i < 36`), or given by the caller if it is dynamic (filled blocks of the KV cache).
Traffic is what instructions read and write in main memory (HBM). Buffers in fast memory (`S(1)` in a layout) are free,
a slice reads only the slice, and an in-place update writes only the update. Tile padding is not counted.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_LEAF = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADING = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_OPCODE = re.compile(r"(.*?) ([\w\-]+)\(")
_CLOSING = re.compile(r"\)(?=, \w+=|$)")
"""The bracket after the operands."""
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|called_computations|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id", "replica-id"),
    *("while", "conditional", "call", "after-all", "add-dependency", "opt-barrier"),
    *("async-start", "async-update", "async-done", "copy-done", "slice-done", "send-done", "recv-done"),
    *("all-gather-done", "all-reduce-done", "collective-permute-done"),
}
"""Instructions without traffic, or counted at their start."""
_SLICES = ("dynamic-slice", "slice", "gather")
_NO_TRAFFIC = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollective")


@dataclass(frozen=True)
class BufferShape:
    """Array in the shape of an instruction."""

    bytes: int
    in_memory: bool
    """True for main memory, False for fast memory."""


@dataclass(frozen=True)
class Instruction:
    """Line of a computation."""

    name: str
    shape: tuple[BufferShape, ...]
    opcode: str
    operands: tuple[str, ...]
    """Names; the value of a constant, the index of a parameter."""
    rest: str
    """Text after the operands (attributes)."""
    is_root: bool

    @property
    def bytes(self) -> int:
        """Bytes of the whole shape."""
        return sum(leaf.bytes for leaf in self.shape)

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of the arrays in main memory."""
        return sum(leaf.bytes for leaf in self.shape if leaf.in_memory)

    def attribute(self, name: str) -> str:
        """Return an attribute that is a name or a number."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        assert found is not None
        return found[1]

    def callees(self) -> list[str]:
        """Return the computations that it calls."""
        return [name for group in _CALLED.findall(self.rest) for name in re.findall(r"%([\w.\-]+)", group)]


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and number of chips."""

    kind: str
    """`all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all` or `collective-permute`."""
    participants: int
    """Chips of each collective."""
    bytes: float
    """Bytes of the whole (gathered, or not yet scattered) array, times `count`."""
    count: float

    @property
    def bytes_received(self) -> float:
        """Minimum bytes that each chip receives; an all-reduce counts twice."""
        passes = {"all-reduce": 2.0, "collective-permute": self.participants / max(self.participants - 1, 1)}.get(
            self.kind, 1.0
        )
        return self.bytes * passes * (self.participants - 1) / self.participants


class HloModule:
    """Parsed text of a compiled program (`compiled.as_text()`)."""

    def __init__(self, text: str, loop_trip_counts: Sequence[float] = ()):
        """Parse the text.

        Args:
          loop_trip_counts: trip counts of loops with a dynamic trip count, by nesting depth of such loops.

        Raises ValueError if such a loop is nested deeper, or the text cannot be parsed.
        """
        self.loop_trip_counts = tuple(loop_trip_counts)
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
        """Number of executions of each computation that is not fused."""
        found: dict[str, float] = {}

        def visit(name: str, times: float, depth: int) -> None:
            found[name] = found.get(name, 0.0) + times
            for instruction in self.computations[name].values():
                if instruction.opcode == "while":
                    trip_count = self._trip_count(name, instruction)
                    if trip_count is None and depth >= len(self.loop_trip_counts):
                        raise ValueError(f"the trip count of the loop {instruction.name} is unknown")
                    more = self.loop_trip_counts[depth] if trip_count is None else trip_count
                    visit(instruction.attribute("body"), times * more, depth + (trip_count is None))
                elif instruction.opcode in ("call", "conditional", "async-start"):
                    for callee in instruction.callees():
                        visit(callee, times, depth)

        visit(self.entry, 1.0, 0)
        return found

    @property
    def traffic(self) -> float:
        """Bytes that a chip reads from and writes to main memory."""
        return sum(
            times * self._instruction_traffic(name, instruction)
            for name, times in self.execution_counts.items()
            for instruction in self.computations[name].values()
        )

    def collectives(self) -> list[Collective]:
        """Return the collectives by kind and number of chips."""
        found: dict[tuple[str, int], list[float]] = {}
        for name, times in self.execution_counts.items():
            seen: set[str] = set()  # a collective can be split into a chain of fused pieces
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
                chips, size = _group_size(instruction.rest), instruction.bytes
                if kind == "reduce-scatter" and instruction.opcode == "reduce-scatter":
                    size *= chips  # its shape is one shard
                if instruction.opcode.endswith("-start") and kind == "all-gather":
                    size = max(leaf.bytes for leaf in instruction.shape)  # (shard, whole)
                if chips > 1:
                    entry = found.setdefault((kind, chips), [0.0, 0.0])
                    entry[0] += times * size
                    entry[1] += times
        return [Collective(kind, chips, *sums) for (kind, chips), sums in sorted(found.items())]

    def _inline_fusions(self, name: str) -> Iterator[tuple[str, Instruction]]:
        """Yield (computation, instruction), with fused computations."""
        for instruction in self.computations[name].values():
            yield name, instruction
            if instruction.opcode in ("fusion", "custom-call"):
                for callee in instruction.callees():
                    yield from self._inline_fusions(callee)

    def _trip_count(self, home: str, loop: Instruction) -> int | None:
        """Return the trip count of a loop; None if it is dynamic."""
        lines = self.computations[loop.attribute("condition")]
        root = next(line for line in lines.values() if line.is_root)
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        counter, bound = (lines[name] for name in root.operands)
        if bound.opcode != "constant" or counter.opcode != "get-tuple-element":
            return None
        return int(bound.operands[0]) - self._constant(home, loop.operands[0], int(counter.attribute("index")))

    def _constant(self, home: str, tuple_name: str, index: int) -> int:
        """Return an element of a loop's initial tuple, or 0."""
        lines = self.computations[home]
        value = lines.get(lines[tuple_name].operands[index]) if lines[tuple_name].opcode == "tuple" else None
        while value is not None and value.opcode in ("copy", "bitcast"):
            value = lines.get(value.operands[0])
        is_known = value is not None and value.opcode == "constant" and value.operands[0].lstrip("-").isdigit()
        return int(value.operands[0]) if value is not None and is_known else 0

    def _instruction_traffic(self, home: str, instruction: Instruction) -> float:
        if instruction.opcode in _FREE or any(name in instruction.rest for name in _NO_TRAFFIC):
            return 0.0
        if instruction.opcode in ("copy-start", "slice-start"):  # (target, source, …) or ((source), target, …)
            moved = [leaf for leaf in instruction.shape if leaf.bytes > 4][:2]
            size = min((leaf.bytes for leaf in moved), default=0)
            return float(size * sum(leaf.in_memory for leaf in moved))
        operands = [self.computations[home][name] for name in instruction.operands]
        if instruction.opcode == "fusion":
            (callee,) = instruction.callees()[:1]
            reads = [
                min(operand.bytes_in_memory, self._bytes_read(callee, index) if operand.bytes_in_memory else 0.0)
                for index, operand in enumerate(operands)
            ]
            return math.fsum(reads) + self._bytes_written(callee, instruction)
        written = instruction.bytes_in_memory
        if instruction.opcode in _SLICES:
            return float(written + (instruction.bytes if operands[0].bytes_in_memory else 0))
        if instruction.opcode == "dynamic-update-slice":
            operands, written = operands[1:], operands[1].bytes if written else 0
        return float(written + sum(operand.bytes_in_memory for operand in operands))

    def _bytes_read(self, callee: str, index: int) -> float:
        """Return the bytes that a fusion reads of an operand."""
        lines = self.computations[callee]
        parameter = next(line for line in lines.values() if (line.opcode, *line.operands) == ("parameter", str(index)))
        names = {parameter.name}
        for line in lines.values():  # operands precede their users
            if line.opcode == "bitcast" and line.operands[0] in names:
                names.add(line.name)
        total = 0.0
        for user in lines.values():
            if user.name in names or names.isdisjoint(user.operands):
                continue
            if user.opcode == "fusion":
                position = next(i for i, name in enumerate(user.operands) if name in names)
                total += self._bytes_read(user.callees()[0], position)
            elif user.opcode in _SLICES and user.operands[0] in names:
                total += user.bytes
            elif user.opcode != "dynamic-update-slice" or user.operands[0] not in names:
                return float(parameter.bytes)
        return total

    def _bytes_written(self, callee: str, instruction: Instruction) -> float:
        """Return the bytes that a fusion writes to main memory."""
        lines = self.computations[callee]
        root = next(line for line in lines.values() if line.is_root)
        parts = [lines[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(parts) != len(instruction.shape):
            return float(instruction.bytes_in_memory)
        total = 0.0
        for part, leaf in zip(parts, instruction.shape, strict=True):
            while part.opcode in ("bitcast", "copy", "convert") and part.operands[0] in lines:
                part = lines[part.operands[0]]
            if leaf.in_memory:
                total += lines[part.operands[1]].bytes if part.opcode == "dynamic-update-slice" else leaf.bytes
        return total


def _group_size(rest: str) -> int:
    """Parse `replica_groups={{0,1},…}`, `[groups,size]<=[…]` or `mesh['a'=4,'b'=2] {'b'}`."""
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
    found = _OPCODE.match(text)
    if found is None:
        raise ValueError(f"an instruction without opcode: {text[:200]}")
    shape, opcode = _leaves(found[1]), found[2]
    operands, *attributes = _CLOSING.split(text[found.end() :], maxsplit=1)
    names = [operands] if opcode in ("constant", "parameter") else re.findall(r"%([\w.\-]+)", operands)
    return Instruction(name, shape, opcode, tuple(names), "".join(attributes), is_root)


def _leaves(shape: str) -> tuple[BufferShape, ...]:
    leaves = []
    for kind, sizes, layout in _LEAF.findall(shape):
        number = re.match(r"[a-z]+(\d+)", kind)
        bits = _BITS[kind] if kind in _BITS else int(number[1]) if number else 0
        elements = math.prod(int(size) for size in sizes.split(",") if size)
        leaves.append(BufferShape(-(-bits * elements // 8), not re.search(r"S\([1-9]", layout)))
    return tuple(leaves)
