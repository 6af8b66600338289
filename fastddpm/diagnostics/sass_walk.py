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

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastddpm.diagnostics.sass import SassError, SassInstruction, access_width, instruction_class, parse

_JUMPS = ("BRA", "UBRA")
_INDIRECT = ("BRX", "BRXU", "JMX", "JMXU", "JMP", "RET")


@dataclass(frozen=True)
class Walk:
    """What one thread executes.

    Attributes:
        executed: instructions on the costliest path.
        classes: the same, by class.
        avoided: what rare paths were left out, and why; empty for straight-line arithmetic.
        accesses: (opcode stem, bytes) of the path's loads and stores, with how often each runs.
    """

    executed: int
    classes: Mapping[str, int]
    avoided: tuple[str, ...]
    accesses: Mapping[tuple[str, int], int]

    def widths(self, stem: str) -> dict[int, int]:
        """Bytes per access of "LDG" or "STG", with how often each runs."""
        return {width: count for (name, width), count in sorted(self.accesses.items()) if name == stem}


def walk(listing: str, kernel: str, trips: Sequence[int] = ()) -> Walk:
    """Walk one kernel of a listing.

    Args:
        trips: how often the body of each loop runs, in order of address; loops without a number are avoided. If the
            compiler has unrolled them all, the numbers are not needed and not used.

    Raises:
        SassError: for an indirect branch, or where every path meets a subroutine or a loop without a number.
    """
    instructions, labels = parse(listing, kernel)
    blocks = _blocks(instructions, labels)
    flow = [(start, f) for start, block in blocks.items() for f in _following(block[-1], start + len(block), labels)]
    graph = _Graph(blocks, [(start, f) for start, f in flow if f in blocks], trips)
    executed: Counter[int] = graph.costliest_path()
    classes: Counter[str] = Counter()
    accesses: Counter[tuple[str, int]] = Counter()
    for start, times in executed.items():
        for instruction in blocks[start]:
            classes[instruction_class(instruction)] += times
            if instruction.stem in ("LDG", "STG", "LD", "ST", "LDS", "STS", "LDL", "STL"):
                accesses[instruction.stem, access_width(instruction)] += times
    return Walk(
        executed=sum(classes.values()),
        classes=dict(classes),
        avoided=tuple(sorted(set(graph.rare.values()))),
        accesses=dict(accesses),
    )


def _blocks(instructions: list[SassInstruction], labels: Mapping[str, int]) -> dict[int, list[SassInstruction]]:
    """Instructions that run one after the other, by the index of the first."""
    targets = {labels[i.target] for i in instructions if i.stem in _JUMPS and i.target and i.target in labels}
    ends = {n + 1 for n, i in enumerate(instructions) if i.stem in (*_JUMPS, *_INDIRECT, "EXIT")}
    starts = sorted(n for n in {0} | targets | ends if n < len(instructions))
    return {start: instructions[start:stop] for start, stop in itertools.pairwise([*starts, len(instructions)])}


def _following(last: SassInstruction, stop: int, labels: Mapping[str, int]) -> Iterator[int]:
    """Where the blocks begin that may follow one; ``stop`` is the index after its last instruction."""
    if last.stem in _INDIRECT or (last.stem in _JUMPS and last.target not in labels):
        raise SassError(f"indirect branch at {last.address:#x}: {last.opcode} {last.operands}")
    if last.stem in _JUMPS:
        yield labels[str(last.target)]
    # A uniform branch names its predicate among the operands: BRA.U UP0, `(.L_x_1).
    conditional = last.guard is not None or "," in last.operands.split("`")[0]
    if conditional or last.stem not in (*_JUMPS, "EXIT"):
        yield stop


class _Graph:
    """Loops, rare blocks and the costliest path of a kernel's blocks."""

    def __init__(
        self, blocks: Mapping[int, list[SassInstruction]], flow: Iterable[tuple[int, int]], trips: Sequence[int]
    ) -> None:
        import networkx

        self._nx, self._blocks = networkx, blocks
        whole = networkx.DiGraph(flow)
        whole.add_node(0)
        self._flow = whole.subgraph({0} | networkx.descendants(whole, 0))
        self.loops = self._find_loops(self._flow, 0)
        self._trips = dict(zip(sorted(self.loops), trips, strict=False))
        if len(trips) > len(self.loops) > 0:
            raise SassError(f"{len(trips)} loop counts given, but the kernel has {len(self.loops)} loops")
        self.rare = self._find_rare()

    def _find_loops(self, flow: Any, entry: int) -> dict[int, set[int]]:
        """Header and body of each loop, loops inside others too; an irreducible graph is refused."""
        loops: dict[int, set[int]] = {}
        for body in self._nx.strongly_connected_components(flow):
            if not flow.subgraph(body).edges:
                continue
            headers = {f for s, f in flow.in_edges(body) if s not in body} | ({entry} & body)
            if len(headers) > 1:
                raise SassError("the control flow is irreducible: a loop has two entries")
            (header,) = headers
            loops |= {header: body} | self._find_loops(self._round(flow, header, body), header)
        return loops

    @staticmethod
    def _round(flow: Any, header: int, body: set[int]) -> Any:
        """A loop's blocks without the way back to its header."""
        inside = flow.subgraph(body).copy()
        inside.remove_edges_from([edge for edge in inside.edges if edge[1] == header])
        return inside

    def _find_rare(self) -> dict[int, str]:
        """Blocks to avoid, and why."""
        reasons = {}
        for start, block in self._blocks.items():
            for instruction in block:
                if instruction.stem == "CALL":
                    reasons[start] = f"call of {instruction.target or 'a subroutine'}"
                elif instruction.stem in ("LDL", "STL"):
                    reasons[start] = "local memory"
        for header, body in self.loops.items():
            if header not in self._trips:
                address = self._blocks[header][0].address
                reasons.update(dict.fromkeys(body, f"loop at {address:#x}"))
        return reasons

    def costliest_path(self) -> Counter[int]:
        """How often each block runs on the costliest path that avoids the rare blocks."""
        flow = self._flow.copy()
        flow.remove_nodes_from(self.rare)
        content = {start: Counter([start]) for start in flow}
        leaving = {start for start in flow if self._blocks[start][-1].stem == "EXIT"}
        for header in sorted(self._trips, key=lambda h: len(self.loops[h])):
            self._collapse(header, flow, content, leaving)
        best = self._longest(0, leaving, flow, content)
        if best is None or (self._stores(self._blocks) and not self._stores(best)):
            reasons = ", ".join(sorted(set(self.rare.values()))) or "no EXIT is reached"
            raise SassError(f"every path that stores meets what cannot be counted: {reasons}; give the trip counts")
        return best

    def _stores(self, starts: Iterable[int]) -> bool:
        """Whether any of these blocks writes global memory: a thread with work to do does."""
        return any(i.stem in ("STG", "ST") for start in starts for i in self._blocks[start])

    def _collapse(self, header: int, flow: Any, content: dict[int, Counter[int]], leaving: set[int]) -> None:
        """Replace a loop by one block that holds its costliest round as often as it runs."""
        body = self.loops[header] & set(flow)
        latches = {start for start in body if flow.has_edge(start, header)}
        once = self._longest(header, latches, self._round(flow, header, body), content)
        if once is None:
            raise SassError(f"the loop at block {header} has no round that can be counted")
        content[header] = Counter({start: times * self._trips[header] for start, times in once.items()})
        if body & leaving:
            leaving.add(header)
        exits = {f for start in body for f in flow.successors(start)} - body
        flow.remove_edges_from([(header, f) for f in body])
        flow.remove_nodes_from(body - {header})
        flow.add_edges_from((header, f) for f in exits)

    def _longest(
        self, entry: int, ends: set[int], flow: Any, content: Mapping[int, Counter[int]]
    ) -> Counter[int] | None:
        """The costliest path from ``entry`` to one of ``ends`` in an acyclic graph; None if there is none."""
        best = {entry: content[entry]} if entry in flow else {}
        for block in self._nx.topological_sort(flow):
            ways = [best[before] for before in flow.predecessors(block) if before in best]
            if ways:
                best[block] = max(ways, key=self._cost) + content[block]
        return max((best[end] for end in ends if end in best), key=self._cost, default=None)

    def _cost(self, path: Counter[int]) -> int:
        return sum(times * len(self._blocks[start]) for start, times in path.items())
