"""The register file: one NumPy vector per register, one entry per thread, and which entries are undefined."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.ptx.memory import AccessError
from tests.ptx.parser import Immediate, Operand, PtxError, Register, Sink, Symbol
from tests.ptx.scalars import UNSIGNED, decode, encode, literal, type_bits

Lanes = np.ndarray | None
"""The threads that execute: indices, or None for all of them."""


class UndefinedValueError(AccessError):
    """A value that no instruction defined reached memory, an address or a decision."""


class RegisterFile:
    """Bits of every register; a register that all threads hold equal is kept as one value.

    A masked load leaves its destination as it was, so a register may be undefined for some threads. Undefined values
    may be computed with, as on the hardware, but not used: ``require_defined`` guards the uses.
    """

    def __init__(self, widths: dict[str, int]) -> None:
        self._widths = widths
        self.reset(0, {})

    def reset(self, count: int, special: dict[str, np.ndarray]) -> None:
        """Start over with ``count`` threads and these special registers."""
        self.count, self._special = count, special
        self._values: dict[str, np.ndarray] = {}
        self._undefined: dict[str, np.ndarray] = {}
        # Of a register packed by all threads, which pieces are undefined: Triton fills up pairs it needs half of.
        self._undefined_pieces: dict[str, list[np.ndarray | None]] = {}

    def reader(self, operand: Operand, kind: str) -> Callable[[Lanes], np.ndarray]:
        """A function that reads the operand as a typed array: one value per active thread, or one for all."""
        if isinstance(operand, Immediate):
            constant = literal(operand.value, kind)
            return lambda lanes: constant
        if isinstance(operand, Symbol):
            return lambda lanes: self._take(self._special_bits(operand), kind, lanes)
        if not isinstance(operand, Register):
            raise PtxError(f"cannot read {operand}")
        name, nothing = operand.name, np.zeros(1, UNSIGNED[self.width(operand)])
        return lambda lanes: self._take(self._values.get(name, nothing), kind, lanes)

    def width(self, register: Register) -> int:
        """Declared width in bits."""
        if register.name not in self._widths:
            raise PtxError(f"register {register.name} is not declared")
        return self._widths[register.name]

    def _special_bits(self, symbol: Symbol) -> np.ndarray:
        if symbol.name not in self._special:
            raise PtxError(f"cannot read {symbol.name}")
        return self._special[symbol.name]

    @staticmethod
    def _take(bits: np.ndarray, kind: str, lanes: Lanes) -> np.ndarray:
        if lanes is not None and bits.size > 1:
            bits = bits[lanes]
        return decode(bits, kind)

    def write(
        self, operand: Operand, values: np.ndarray, kind: str, lanes: Lanes, undefined: np.ndarray | None = None
    ) -> None:
        """Write the active threads' values; the other threads keep theirs, or stay undefined."""
        if isinstance(operand, Sink):
            return
        if not isinstance(operand, Register):
            raise PtxError(f"cannot write {operand}")
        bits = encode(values, kind, self.width(operand))
        self._undefined_pieces.pop(operand.name, None)
        if lanes is not None:
            bits, undefined = self._merge(operand, bits, lanes, undefined)
        self._values[operand.name] = bits
        if undefined is not None:
            self._undefined[operand.name] = undefined
        else:
            self._undefined.pop(operand.name, None)

    def _merge(
        self, register: Register, bits: np.ndarray, lanes: np.ndarray, undefined: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        old_marks = self.undefined(register, None)
        merged = np.array(np.broadcast_to(self._values.get(register.name, np.zeros(1, bits.dtype)), (self.count,)))
        merged[lanes] = bits
        if old_marks is None and undefined is None:
            return merged, None
        marks = np.array(np.broadcast_to(_or_false(old_marks), (self.count,)))
        marks[lanes] = _or_false(undefined)
        return merged, marks if marks.any() else None

    def undefined(self, operand: Operand, lanes: Lanes) -> np.ndarray | None:
        """Which active threads hold no defined value; None when all do."""
        if not isinstance(operand, Register):
            return None
        if operand.name not in self._values:
            return np.ones(1, np.bool_)
        marks = self._undefined.get(operand.name)
        return _of(marks, lanes)

    def undefined_among(self, operands: Sequence[Operand], lanes: Lanes) -> np.ndarray | None:
        """Which results depend on an undefined value, where every operand counts."""
        return _any([self.undefined(operand, lanes) for operand in operands])

    def undefined_selected(self, operands: Sequence[Operand], choice: np.ndarray, lanes: Lanes) -> np.ndarray | None:
        """The same for ``selp``, whose result depends on the predicate and on the side it picks."""
        left, right, predicate = (_or_false(self.undefined(operand, lanes)) for operand in operands)
        marks = np.where(choice, left, right) | predicate
        return marks if marks.any() else None

    def require_defined(self, operand: Operand, lanes: Lanes, where: str) -> None:
        """Raise when an active thread holds no defined value."""
        marks = self.undefined(operand, lanes)
        if marks is not None and marks.any():
            raise UndefinedValueError(f"an undefined value reached {where}: {operand}")

    def undefined_halves(self, operands: Sequence[Operand]) -> list[np.ndarray | None]:
        """The same for arithmetic on pairs, whose halves depend on the operands' same halves."""
        return [_any(marks) for marks in zip(*(self._pieces(operand, 2) for operand in operands), strict=True)]

    def note_pieces(self, destination: Operand, pieces: list[np.ndarray | None], lanes: Lanes) -> None:
        """Remember which pieces of a register that was just written are undefined."""
        if lanes is None and isinstance(destination, Register):
            self._undefined_pieces[destination.name] = pieces

    def _pieces(self, operand: Operand, count: int) -> list[np.ndarray | None]:
        known = self._undefined_pieces.get(operand.name) if isinstance(operand, Register) else None
        return known if known is not None and len(known) == count else [self.undefined(operand, None)] * count

    def unpack(self, items: Sequence[Operand], source: Operand, kind: str) -> Callable[[Lanes], None]:
        """``mov.b32 {low, high}, source``."""
        part = type_bits(kind) // len(items)
        read = self.reader(source, f"u{type_bits(kind)}")

        def execute(lanes: Lanes) -> None:
            bits = read(lanes)
            undefined = [_of(marks, lanes) for marks in self._pieces(source, len(items))]
            for i, item in enumerate(items):
                piece = (bits >> bits.dtype.type(part * i)).astype(UNSIGNED[part])
                self.write(item, piece, f"u{part}", lanes, undefined[i])

        return execute

    def pack(self, destination: Operand, items: Sequence[Operand], kind: str) -> Callable[[Lanes], None]:
        """``mov.b32 destination, {low, high}``."""
        width = type_bits(kind)
        part, whole = width // len(items), UNSIGNED[width]
        readers = [self.reader(item, f"u{part}") for item in items]

        def execute(lanes: Lanes) -> None:
            shifted = [read(lanes).astype(whole) << whole(part * i) for i, read in enumerate(readers)]
            packed = np.bitwise_or.reduce(np.broadcast_arrays(*shifted))
            pieces = [self.undefined(item, None) for item in items]
            self.write(destination, packed, f"u{width}", lanes, self.undefined_among(items, lanes))
            self.note_pieces(destination, pieces, lanes)

        return execute


def _any(marks: Sequence[np.ndarray | None]) -> np.ndarray | None:
    present = [mark for mark in marks if mark is not None]
    return np.logical_or.reduce(np.broadcast_arrays(*present)) if present else None


def _of(marks: np.ndarray | None, lanes: Lanes) -> np.ndarray | None:
    return marks[lanes] if marks is not None and lanes is not None and marks.size > 1 else marks


def _or_false(marks: np.ndarray | None) -> np.ndarray:
    return np.zeros(1, np.bool_) if marks is None else marks
