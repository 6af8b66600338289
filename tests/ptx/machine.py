"""Run a PTX program: all threads of many blocks at once, each register a NumPy vector with one value per thread.

Threads that part at a branch become groups, each with its own program counter; the group with the lowest counter runs
first and joins the others when it reaches them, which reconverges every structured branch and loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.ptx import conversions, floats, integers
from tests.ptx.memory import Memory
from tests.ptx.parser import Address, Instruction, Operand, Program, PtxError, Register, Symbol, Vector
from tests.ptx.registers import Lanes, RegisterFile
from tests.ptx.scalars import Operation, decode, literal, type_bits
from tests.ptx.shared import SharedMemory

LANES_AT_ONCE = 1 << 13
_FLOAT_TYPES = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f32x2", "f64")
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}
_CACHE_HINTS = ("global", "nc", "volatile", "relaxed", "weak", "gpu", "sys", "ca", "cg", "cs", "wt", "wb")

Step = Callable[[int, Lanes], int | None]


@dataclass
class Grid:
    """Launch configuration; ``blocks`` are the linear block indices to run, all of them when None."""

    shape: tuple[int, int, int]
    blocks: np.ndarray | None = None

    def linear_blocks(self) -> np.ndarray:
        x, y, z = self.shape
        return np.arange(x * y * z, dtype=np.int64) if self.blocks is None else np.asarray(self.blocks, np.int64)


def build_operation(instruction: Instruction) -> Operation:
    """The arithmetic of an instruction that touches neither memory nor control flow."""
    opcode, modifiers = instruction.opcode, instruction.modifiers
    try:
        if opcode == "cvt":
            return conversions.build(modifiers)
        is_float = bool(modifiers) and modifiers[-1] in _FLOAT_TYPES
        if is_float and opcode not in ("setp", "selp"):
            return floats.BUILDERS[opcode](modifiers)
        return integers.BUILDERS[opcode](modifiers)
    except (KeyError, ValueError) as error:
        raise PtxError(f"not defined here: {instruction.text}") from error


class Machine:
    """Executes one program on one memory."""

    def __init__(self, program: Program, memory: Memory, shared: int = 0) -> None:
        self.program, self.memory, self._shared_size = program, memory, shared
        self.registers = RegisterFile(program.registers)
        self.shared = SharedMemory(self)
        self._steps = [self._decode(instruction) for instruction in program.instructions]
        targets = (i.operands[-1] for i in program.instructions if i.opcode == "bra")
        self._joins = {program.labels[t.name] for t in targets if isinstance(t, Symbol)}

    def run(self, arguments: list[int], grid: Grid) -> None:
        """Run the grid's blocks; ``arguments`` are the parameters' bits in order."""
        if len(arguments) != len(self.program.parameters):
            raise PtxError(f"{len(self.program.parameters)} parameters expected, {len(arguments)} given")
        self._arguments = dict(zip((p.name for p in self.program.parameters), arguments, strict=True))
        with np.errstate(all="ignore"):
            if any(segment.in_place for segment in self.memory.segments):
                with self.memory.rehearsal():
                    self._run_blocks(grid)
            self._run_blocks(grid)
        for segment in self.memory.segments:
            segment.end_launch()

    def _run_blocks(self, grid: Grid) -> None:
        blocks, per_chunk = grid.linear_blocks(), max(1, LANES_AT_ONCE // self.program.threads)
        for first in range(0, len(blocks), per_chunk):
            self._start(blocks[first : first + per_chunk], grid.shape)
            self._run_groups()

    def _start(self, blocks: np.ndarray, shape: tuple[int, int, int]) -> None:
        """Lay out one thread per entry and set the special registers."""
        size = self.program.threads
        tid = np.tile(np.arange(size, dtype=np.uint32), len(blocks))
        block = np.repeat(blocks, size)
        self.threads = block * size + tid
        special = {"%tid.x": tid, "%laneid": tid % np.uint32(32), "%warpid": tid // np.uint32(32)}
        coordinates = (block % shape[0], block // shape[0] % shape[1], block // (shape[0] * shape[1]))
        for axis, ctaid, count in zip("xyz", coordinates, shape, strict=True):
            special[f"%ctaid.{axis}"] = ctaid.astype(np.uint32)
            special[f"%nctaid.{axis}"] = np.array([count], np.uint32)
        for name, value in {"%ntid.x": size, "%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0}.items():
            special[name] = np.array([value], np.uint32)
        # Offsets within shared memory begin at 0.
        special |= {name: np.zeros(1, np.uint32) for name in self.program.shared_symbols}
        self.registers.reset(len(tid), special)
        self.shared.start(len(blocks), self._shared_size)

    def _run_groups(self) -> None:
        """Run the group with the lowest program counter until every thread has returned."""
        self._waiting: dict[int, Lanes] = {0: None}
        while self._waiting:
            start = min(self._waiting)
            self._run_group(start, self._waiting.pop(start))

    def _run_group(self, counter: int, lanes: Lanes) -> None:
        """Run threads that are at the same place until they branch, return, or may meet others."""
        while (following := self._steps[counter](counter, lanes)) is not None:
            counter = following
            if self._waiting and counter in self._joins:
                self._wait(counter, lanes)
                return

    def _wait(self, counter: int, lanes: Lanes) -> None:
        """Queue a group at a program counter, joining the group that is already there."""
        if lanes is not None and not len(lanes):
            return
        if lanes is not None and counter in self._waiting:
            lanes = np.sort(np.concatenate([lanes, self._waiting[counter]]))
        if lanes is not None and len(lanes) == self.registers.count:
            lanes = None
        self._waiting[counter] = lanes

    def _split(self, guard: tuple[str, bool] | None, lanes: Lanes) -> tuple[Lanes, Lanes]:
        """The threads whose guard holds, and the others."""
        nobody = np.empty(0, np.int64)
        if guard is None:
            return lanes, nobody
        predicate = Register(guard[0])
        self.registers.require_defined(predicate, lanes, "a decision")
        holds = self.registers.reader(predicate, "pred")(lanes) == guard[1]
        if holds.all():
            return lanes, nobody
        if not holds.any():
            return nobody, lanes
        everyone = np.arange(self.registers.count) if lanes is None else lanes
        return everyone[holds], everyone[~holds]

    def _decode(self, instruction: Instruction) -> Step:
        """Turn an instruction into a function of (program counter, threads) that returns the next counter."""
        if instruction.opcode in ("bra", "ret", "exit"):
            return self._decode_jump(instruction)
        execute, guard = self._decode_plain(instruction), instruction.guard

        def step(counter: int, lanes: Lanes) -> int:
            execute(lanes)
            return counter + 1

        def guarded_step(counter: int, lanes: Lanes) -> int:
            taken, _ = self._split(guard, lanes)
            if taken is None or len(taken):
                execute(taken)
            return counter + 1

        return guarded_step if guard else step

    def _decode_jump(self, instruction: Instruction) -> Step:
        guard, target = instruction.guard, None
        if instruction.opcode == "bra":
            (label,) = instruction.operands
            assert isinstance(label, Symbol)
            target = self.program.labels[label.name]

        def step(counter: int, lanes: Lanes) -> None:
            taken, left = self._split(guard, lanes)
            if target is not None:
                self._wait(target, taken)
            self._wait(counter + 1, left)

        return step

    def _decode_plain(self, instruction: Instruction) -> Callable[[Lanes], None]:
        opcode, modifiers = instruction.opcode, instruction.modifiers
        if opcode == "mov":
            return self._decode_move(instruction)
        if opcode == "ld" and modifiers[0] == "param":
            return self._decode_argument(instruction)
        if opcode in ("ld", "st"):
            return self._decode_access(instruction)
        if opcode == "shfl":
            return self.shared.shuffle(instruction)
        # The barrier of a warp is that of a block of one warp.
        if instruction.text == "bar.sync 0" or (instruction.text == "bar.warp.sync -1" and self.program.threads == 32):
            return self.shared.barrier
        if opcode in ("ldmatrix", "stmatrix"):
            return self.shared.matrices(instruction)
        return self._decode_arithmetic(instruction)

    def _decode_arithmetic(self, instruction: Instruction) -> Callable[[Lanes], None]:
        operation, registers = build_operation(instruction), self.registers
        destination, *sources = instruction.operands
        if len(sources) != len(operation.sources):
            raise PtxError(f"{len(operation.sources)} sources expected: {instruction.text}")
        readers = [registers.reader(s, kind) for s, kind in zip(sources, operation.sources, strict=True)]
        selects, paired = instruction.opcode == "selp", operation.result == "f32x2"

        def execute(lanes: Lanes) -> None:
            values = [read(lanes) for read in readers]
            if selects:
                undefined = registers.undefined_selected(sources, values[2], lanes)
            else:
                undefined = registers.undefined_among(sources, lanes)
            halves = registers.undefined_halves(sources) if paired else None
            registers.write(destination, operation.compute(*values), operation.result, lanes, undefined)
            if halves is not None:
                registers.note_pieces(destination, halves, lanes)

        return execute

    def _decode_move(self, instruction: Instruction) -> Callable[[Lanes], None]:
        kind, registers = instruction.modifiers[-1], self.registers
        destination, source = instruction.operands
        if isinstance(destination, Vector):
            return registers.unpack(destination.items, source, kind)
        if isinstance(source, Vector):
            return registers.pack(destination, source.items, kind)
        read = registers.reader(source, kind)
        return lambda lanes: registers.write(destination, read(lanes), kind, lanes, registers.undefined(source, lanes))

    def _decode_argument(self, instruction: Instruction) -> Callable[[Lanes], None]:
        kind = instruction.modifiers[-1]
        destination, address = instruction.operands
        if not isinstance(address, Address) or not isinstance(address.base, Symbol) or address.offset:
            raise PtxError(f"parameter access not defined here: {instruction.text}")
        name = address.base.name
        return lambda lanes: self.registers.write(destination, literal(self._arguments[name], kind), kind, lanes)

    def _decode_access(self, instruction: Instruction) -> Callable[[Lanes], None]:
        modifiers, is_load = instruction.modifiers, instruction.opcode == "ld"
        kind = modifiers[-1]
        count = next((_VECTORS[m] for m in modifiers if m in _VECTORS), 1)
        unknown = [m for m in modifiers[:-1] if m not in _CACHE_HINTS and m not in _VECTORS and "::" not in m]
        space = modifiers[0].partition("::")[0]
        if space not in ("global", "shared") or set(unknown) - {"shared"}:
            raise PtxError(f"only plain global and shared memory are defined here: {instruction.text}")
        data, address = instruction.operands[:2] if is_load else instruction.operands[1::-1]
        items = data.items if isinstance(data, Vector) else (data,)
        if len(items) != count or not isinstance(address, Address):
            raise PtxError(f"{count} values and an address expected: {instruction.text}")
        memory, locate = (
            (self.memory, self._locator(address)) if space == "global" else (self.shared, self.shared.locator(address))
        )
        return (self._load if is_load else self._store)(items, kind, locate, memory)

    def _locator(self, address: Address) -> Callable[[Lanes], tuple[np.ndarray, np.ndarray]]:
        """Addresses and global thread indices, one each per active thread."""
        read, offset = self.registers.reader(address.base, "u64"), np.uint64(address.offset & (2**64 - 1))

        def locate(lanes: Lanes) -> tuple[np.ndarray, np.ndarray]:
            self.registers.require_defined(address.base, lanes, "an address")
            threads = self.threads if lanes is None else self.threads[lanes]
            return np.broadcast_to(read(lanes) + offset, threads.shape), threads

        return locate

    def _load(
        self, items: tuple[Operand, ...], kind: str, locate: Callable, memory: Memory | SharedMemory
    ) -> Callable[[Lanes], None]:
        width = type_bits(kind) // 8

        def execute(lanes: Lanes) -> None:
            addresses, threads = locate(lanes)
            values, undefined = memory.load(addresses, width, len(items), threads)
            for item, value in zip(items, values, strict=True):
                self.registers.write(item, decode(value, kind), kind, lanes, undefined)

        return execute

    def _store(
        self, items: tuple[Operand, ...], kind: str, locate: Callable, memory: Memory | SharedMemory
    ) -> Callable[[Lanes], None]:
        width = type_bits(kind) // 8
        readers = [self.registers.reader(item, f"u{width * 8}") for item in items]

        def execute(lanes: Lanes) -> None:
            addresses, threads = locate(lanes)
            for item in items:
                self.registers.require_defined(item, lanes, "memory")
            values = [np.broadcast_to(read(lanes), threads.shape) for read in readers]
            memory.store(addresses, width, values, threads)

        return execute
