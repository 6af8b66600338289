"""What threads exchange: shuffles in a warp; shared memory, checked between two barriers as global memory is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.memory import AccessError, Loaded, Memory, Segment
from tests.ptx.parser import Address, Immediate, Instruction, Operand, PtxError, Vector
from tests.ptx.registers import Lanes
from tests.ptx.scalars import decode

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

_LINE = 16


class SharedMemory:
    """The shared memory of the blocks that run at the same time.

    Args:
        machine: whose threads use it.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine, self._memory = machine, Memory()

    def start(self, blocks: int, size: int) -> None:
        """Give each block that many bytes, which hold nothing."""
        self._size = -(-size // _LINE) * _LINE
        room = np.zeros(blocks * self._size + _LINE, np.uint8)
        self._first = -(-room.ctypes.data // _LINE) * _LINE
        self._memory = Memory()
        if size:
            segment = Segment("shared memory", self._first, blocks * self._size, unit=2, writable=True)
            segment.unreadable[:] = True
            self._room = room
            self._memory.add(segment)

    def barrier(self, lanes: Lanes) -> None:
        """``bar.sync 0``: what was written before may be read after."""
        if lanes is not None:
            raise PtxError("a thread of the block does not reach the barrier")
        for segment in self._memory.segments:
            segment.end_launch()

    def load(self, addresses: np.ndarray, width: int, count: int, threads: np.ndarray) -> Loaded:
        """Read values that the same thread wrote, or others before the last barrier."""
        return self._memory.load(addresses, width, count, threads)

    def store(self, addresses: np.ndarray, width: int, values: list[np.ndarray], threads: np.ndarray) -> None:
        """Write values; several threads may write one and the same."""
        one_each, first, of = np.unique(addresses, return_index=True, return_inverse=True)
        if any((value != value[first][of]).any() for value in values):
            raise AccessError("shared memory: race, two threads write different values")
        self._memory.store(one_each, width, [value[first] for value in values], threads[first])

    def locator(self, address: Address) -> Callable[[Lanes], tuple[np.ndarray, np.ndarray]]:
        """Addresses and global thread indices, one each per active thread."""
        registers = self._machine.registers
        read, offset = registers.reader(address.base, "u32"), address.offset

        def locate(lanes: Lanes) -> tuple[np.ndarray, np.ndarray]:
            registers.require_defined(address.base, lanes, "an address")
            threads = self._machine.threads if lanes is None else self._machine.threads[lanes]
            block = (np.arange(registers.count) if lanes is None else lanes) // self._machine.program.threads
            within = np.broadcast_to(read(lanes).astype(np.int64) + offset, threads.shape)
            if (within < 0).any() or (within >= self._size).any():
                raise AccessError("access out of bounds of the block's shared memory")
            return (self._first + block * self._size + within).astype(np.uint64), threads

        return locate

    def shuffle(self, instruction: Instruction) -> Callable[[Lanes], None]:
        """``shfl.sync.b32``: read the register of another lane, one whose number differs by bits, or a given one."""
        destination, source, which, *rest = instruction.operands
        butterfly = instruction.modifiers == ("sync", "bfly", "b32")
        if (not butterfly and instruction.modifiers != ("sync", "idx", "b32")) or rest != [
            Immediate(31),
            Immediate(-1),
        ]:
            raise PtxError(f"only whole warps, lanes by bits or by number, are defined here: {instruction.text}")
        registers = self._machine.registers
        read, lane_of = registers.reader(source, "b32"), registers.reader(which, "u32")

        def execute(lanes: Lanes) -> None:
            thread = np.arange(registers.count)
            other = lane_of(None).astype(np.int64)
            partner = thread ^ other if butterfly else thread // 32 * 32 + other % 32
            if lanes is not None and not np.isin(partner[lanes], lanes).all():
                raise PtxError(f"a thread of the warp is elsewhere: {instruction.text}")
            chosen = partner if lanes is None else partner[lanes]
            values = np.broadcast_to(read(None), partner.shape)[chosen]
            marks = registers.undefined(source, None)
            undefined = None if marks is None else np.broadcast_to(marks, partner.shape)[chosen]
            registers.write(destination, values, "b32", lanes, undefined)

        return execute

    def matrices(self, instruction: Instruction) -> Callable[[Lanes], None]:
        """``ldmatrix`` and ``stmatrix`` of 8x8 matrices of 16 bits, a row of which the n-th lane names.

        A lane holds two neighbours of each matrix: columns 2 (lane % 4) and the next one, of row lane // 4.
        """
        is_load = instruction.opcode == "ldmatrix"
        if instruction.modifiers[:3] != ("sync", "aligned", "m8n8") or "trans" in instruction.modifiers:
            raise PtxError(f"not defined here: {instruction.text}")
        data, address = instruction.operands if is_load else instruction.operands[::-1]
        assert isinstance(address, Address)
        items: tuple[Operand, ...] = data.items if isinstance(data, Vector) else (data,)
        registers, locate = self._machine.registers, self.locator(address)
        readers = [registers.reader(item, "b32") for item in items]

        def execute(lanes: Lanes) -> None:
            if lanes is not None:
                raise PtxError(f"a thread of the warp is elsewhere: {instruction.text}")
            rows, threads = locate(None)
            lane = np.arange(registers.count)
            for n, item in enumerate(items):
                named = lane // 32 * 32 + 8 * n + lane % 32 // 4
                addresses = rows[named] + (4 * (lane % 4)).astype(np.uint64)
                if is_load:
                    (values,), undefined = self.load(addresses, 4, 1, threads)
                    registers.write(item, decode(values, "b32"), "b32", None, undefined)
                else:
                    registers.require_defined(item, None, "memory")
                    self.store(addresses, 4, [np.broadcast_to(readers[n](None), threads.shape)], threads)

        return execute
