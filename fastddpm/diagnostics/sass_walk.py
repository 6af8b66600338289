"""Count the instructions that a thread executes, by walking the control flow of its SASS.

A listing's length says little: library functions keep slow paths for rare arguments in the listing, and a loop's body
runs more often than once. The walk takes the costliest path from the entry to an EXIT:

- An early EXIT (a program with nothing to do) and a masked branch are covered, because the costliest path is a full
  thread's. Predicated instructions count, taken or not: each occupies an issue slot.
- A loop counts as often as the caller says. ptxas may have unrolled it; the number is that of the loop as compiled.
- Rare paths are avoided where a way around exists: calls of library subroutines, local memory, and loops of which the
  caller says nothing. Code of additions, multiplications and integer operations has none; in the library's square
  root, division, sine and cosine they handle subnormal and huge arguments. What was avoided is reported, never silent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fastddpm.diagnostics.sass import SassError, SassInstruction, access_width, instruction_class, parse

_JUMPS = ("BRA", "UBRA")
_INDIRECT = ("BRX", "BRXU", "JMX", "JMXU", "JMP", "RET")


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow."""

    instructions: list[SassInstruction]
    following: list[int] = field(default_factory=list)
    leaves: bool = False


@dataclass(frozen=True)
class Walk:
    """What one thread executes.

    Attributes:
        executed: instructions on the costliest path.
        classes: the same, by class.
        listed: instructions in the kernel's listing, padding left out.
        avoided: what rare paths were left out, and why; empty for straight-line arithmetic.
        loops: number of loops on the path.
        accesses: (opcode stem, bytes) of the path's loads and stores, with how often each runs.
        barriers: barriers in the listing.
    """

    executed: int
    classes: Mapping[str, int]
    listed: int
    avoided: tuple[str, ...]
    loops: int
    accesses: Mapping[tuple[str, int], int]
    barriers: int

    def widths(self, stem: str) -> dict[int, int]:
        """Bytes per access of "LDG" or "STG", with how often each runs."""
        return {width: count for (name, width), count in sorted(self.accesses.items()) if name == stem}


def walk(listing: str, kernel: str, trips: Sequence[int] = ()) -> Walk:
    """Walk one kernel of a listing.

    Args:
        listing: what nvdisasm prints, labels included.
        kernel: its symbol.
        trips: how often the body of each loop runs, in order of address; loops without a number are avoided. If the
            compiler has unrolled them all, the numbers are not needed and not used.

    Raises:
        SassError: for an indirect branch, or where every path meets a subroutine or a loop without a number.
    """
    instructions, labels = parse(listing, kernel)
    blocks = split_blocks(instructions, labels)
    graph = _Graph(blocks, trips)
    executed: Counter[int] = graph.costliest_path()
    classes: Counter[str] = Counter()
    accesses: Counter[tuple[str, int]] = Counter()
    for start, times in executed.items():
        for instruction in blocks[start].instructions:
            classes[instruction_class(instruction)] += times
            if instruction.stem in ("LDG", "STG", "LD", "ST", "LDS", "STS", "LDL", "STL"):
                accesses[instruction.stem, access_width(instruction)] += times
    return Walk(
        executed=sum(classes.values()),
        classes=dict(classes),
        listed=len(instructions),
        avoided=tuple(sorted(set(graph.rare.values()))),
        loops=sum(header in executed for header in graph.loops),
        accesses=dict(accesses),
        barriers=sum(i.stem == "BAR" for i in instructions),
    )


def split_blocks(instructions: list[SassInstruction], labels: Mapping[str, int]) -> dict[int, Block]:
    """Basic blocks by the index of their first instruction."""
    targets = {labels[i.target] for i in instructions if i.stem in _JUMPS and i.target and i.target in labels}
    ends = {n + 1 for n, i in enumerate(instructions) if i.stem in (*_JUMPS, *_INDIRECT, "EXIT")}
    starts = sorted(n for n in {0} | targets | ends if n < len(instructions))
    blocks = {}
    for start, stop in zip(starts, [*starts[1:], len(instructions)], strict=True):
        block = Block(instructions[start:stop])
        _connect(block, stop, labels, len(instructions))
        blocks[start] = block
    return blocks


def _connect(block: Block, stop: int, labels: Mapping[str, int], count: int) -> None:
    """Find the blocks that follow, from the block's last instruction."""
    last = block.instructions[-1]
    if last.stem in _INDIRECT or (last.stem in _JUMPS and last.target not in labels):
        raise SassError(f"indirect branch at {last.address:#x}: {last.opcode} {last.operands}")
    # A uniform branch names its predicate among the operands: BRA.U UP0, `(.L_x_1).
    conditional = last.guard is not None or "," in last.operands.split("`")[0]
    if last.stem in _JUMPS:
        assert last.target is not None
        block.following.append(labels[last.target])
    block.leaves = last.stem == "EXIT"
    falls_through = conditional or last.stem not in (*_JUMPS, "EXIT")
    if falls_through and stop < count and stop not in block.following:
        block.following.append(stop)


class _Graph:
    """Loops, rare blocks and the costliest path of a kernel's blocks."""

    def __init__(self, blocks: dict[int, Block], trips: Sequence[int]) -> None:
        self._blocks = blocks
        self.loops = _natural_loops(blocks)
        self._trips = dict(zip(sorted(self.loops), trips, strict=False))
        if len(trips) > len(self.loops) > 0:
            raise SassError(f"{len(trips)} loop counts given, but the kernel has {len(self.loops)} loops")
        self.rare = self._find_rare()

    def _find_rare(self) -> dict[int, str]:
        """Blocks to avoid, and why."""
        reasons = {}
        for start, block in self._blocks.items():
            for instruction in block.instructions:
                if instruction.stem == "CALL":
                    reasons[start] = f"call of {instruction.target or 'a subroutine'}"
                elif instruction.stem in ("LDL", "STL"):
                    reasons[start] = "local memory"
        for header, body in self.loops.items():
            if header not in self._trips:
                address = self._blocks[header].instructions[0].address
                reasons.update(dict.fromkeys(body, f"loop at {address:#x}"))
        return reasons

    def costliest_path(self) -> Counter[int]:
        """How often each block runs on the costliest path that avoids the rare blocks."""
        following = {s: [f for f in b.following if f not in self.rare] for s, b in self._blocks.items()}
        content = {s: Counter([s]) for s in self._blocks if s not in self.rare}
        leaving = {s for s in content if self._blocks[s].leaves}
        for header in sorted(self._trips, key=lambda h: len(self.loops[h])):
            self._collapse(header, content, following, leaving)
        best = self._longest(0, set(content), content, following, leaving)
        if best is None or (self._stores(self._blocks) and not self._stores(best)):
            reasons = ", ".join(sorted(set(self.rare.values()))) or "no EXIT is reached"
            raise SassError(f"every path that stores meets what cannot be counted: {reasons}; give the trip counts")
        return best

    def _stores(self, starts: Iterable[int]) -> bool:
        """Whether any of these blocks writes global memory: a thread with work to do does."""
        return any(i.stem in ("STG", "ST") for start in starts for i in self._blocks[start].instructions)

    def _collapse(
        self, header: int, content: dict[int, Counter[int]], following: dict[int, list[int]], leaving: set[int]
    ) -> None:
        """Replace a loop by one block that holds its costliest round as often as it runs."""
        body = {start for start in self.loops[header] if start in content}
        inside = {s: [f for f in following[s] if f in body and f != header] for s in body}
        latches = {s for s in body if header in following[s]}
        once = self._longest(header, body, content, inside, latches)
        if once is None:
            raise SassError(f"the loop at block {header} has no round that can be counted")
        exits = sorted({f for s in body for f in following[s] if f not in body})
        if body & leaving:
            leaving.add(header)
        content[header] = Counter({start: times * self._trips[header] for start, times in once.items()})
        following[header] = exits
        for start in body - {header}:
            del content[start]

    def _longest(
        self,
        entry: int,
        nodes: set[int],
        content: Mapping[int, Counter[int]],
        following: Mapping[int, list[int]],
        ends: Iterable[int],
    ) -> Counter[int] | None:
        """The costliest acyclic path from ``entry`` to one of ``ends``; None if there is none."""
        best: dict[int, Counter[int] | None] = {}
        ends = set(ends)
        for node in _reverse_order(entry, nodes, following):
            paths = [p for f in following[node] if (p := best.get(f)) is not None]
            if node in ends:
                paths.append(Counter())
            tail = max(paths, key=self._cost, default=None)
            best[node] = None if tail is None else content[node] + tail
        return best.get(entry)

    def _cost(self, path: Counter[int]) -> int:
        return sum(times * len(self._blocks[start].instructions) for start, times in path.items())


def _reverse_order(entry: int, nodes: set[int], following: Mapping[int, list[int]]) -> list[int]:
    """Nodes in depth-first post-order: what follows a node comes before it."""
    order: list[int] = []
    state: dict[int, bool] = {}
    stack = [(entry, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
            state[node] = True
        elif node in nodes and node not in state:
            state[node] = False
            stack.append((node, True))
            stack.extend((f, False) for f in following[node])
    return order


def _natural_loops(blocks: dict[int, Block]) -> dict[int, set[int]]:
    """Header and body of each loop, loops with one header joined; an irreducible graph is refused."""
    dominators = _dominators(blocks)
    loops: dict[int, set[int]] = {}
    forward: dict[int, list[int]] = {}
    for start, block in blocks.items():
        forward[start] = [f for f in block.following if f not in dominators[start]]
        for header in (f for f in block.following if f in dominators[start]):
            loops.setdefault(header, {header}).update(_reaching(start, header, blocks))
    position = {node: n for n, node in enumerate(_reverse_order(0, set(blocks), forward))}
    if any(position[f] > position[s] for s in position for f in forward[s]):
        raise SassError("the control flow is irreducible: a loop has two entries")
    return loops


def _reaching(latch: int, header: int, blocks: Mapping[int, Block]) -> set[int]:
    """Blocks from which the latch is reached without passing the header."""
    before: dict[int, set[int]] = {start: set() for start in blocks}
    for start, block in blocks.items():
        for f in block.following:
            before[f].add(start)
    body, stack = {header}, [latch]
    while stack:
        node = stack.pop()
        if node not in body:
            body.add(node)
            stack.extend(before[node])
    return body


def _dominators(blocks: dict[int, Block]) -> dict[int, set[int]]:
    """For each block, the blocks that every path from the entry passes, itself included."""
    everything = set(blocks)
    dominators = {start: everything if start else {0} for start in blocks}
    before: dict[int, set[int]] = {start: set() for start in blocks}
    for start, block in blocks.items():
        for f in block.following:
            before[f].add(start)
    changed = True
    while changed:
        changed = False
        for start in blocks:
            if start and before[start]:
                new = set.intersection(*(dominators[p] for p in before[start])) | {start}
                changed, dominators[start] = changed or new != dominators[start], new
    return dominators
