"""Read the PTX that Triton emits into a list of instructions (PTX ISA 8.x and 9.x, one entry per module)."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

REGISTER_BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}


class PtxError(Exception):
    """The text cannot be read, or holds something that this interpreter does not define."""


@dataclass(frozen=True)
class Register:
    """A virtual register."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal: an integer, or the bit pattern of a float with its width."""

    value: int


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter, a special register or a shared-memory variable."""

    name: str


@dataclass(frozen=True)
class Sink:
    """The bit bucket ``_``."""


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Operand
    offset: int


Operand = Register | Immediate | Symbol | Sink | Vector | Address


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``guard`` is the predicate register and the value it must have."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    text: str

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter and its size in bytes."""

    name: str
    size: int


@dataclass
class Program:
    """One entry function."""

    name: str
    target: str
    parameters: list[Parameter]
    threads: int
    registers: dict[str, int]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared_symbols: tuple[str, ...] = ()


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.([a-z]\d+)\s+(?:\.ptr\s+)?(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?(\w+)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.+)")
_RANGE = re.compile(r"(%\w+)<(\d+)>")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+(\w+)")
_LABEL = re.compile(r"\s*(\$?\w+):")
_GUARD = re.compile(r"@(!?)(%\w+)\s+")
_OPCODE = re.compile(r"([a-z]\w*)((?:\.[\w:]+)*)\s*")


def parse(text: str) -> Program:
    """Parse a module with exactly one entry.

    Raises:
        PtxError: on anything outside the subset that Triton emits.
    """
    clean = _COMMENT.sub("", text)
    entries = _ENTRY.findall(clean)
    if len(entries) != 1:
        raise PtxError(f"expected one .entry, found {len(entries)}")
    target = re.search(r"\.target\s+(\w+)", clean)
    threads = re.search(r"\.reqntid\s+(\d+)", clean)
    if target is None or threads is None:
        raise PtxError("the module names no .target or no .reqntid")
    name, parameters = entries[0]
    program = Program(
        name=name,
        target=target[1],
        parameters=[Parameter(n, int(kind[1:]) // 8) for kind, n in _PARAMETER.findall(parameters)],
        threads=int(threads[1]),
        registers={},
        shared_symbols=tuple(_SHARED.findall(clean)),
    )
    for statement in _statements(_body(clean)):
        _add_statement(program, statement)
    _check_branches(program)
    return program


def _body(text: str) -> str:
    start = text.index("{", text.index(".entry"))
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + 1 : position]
    raise PtxError("the entry's body is not closed")


def _statements(body: str) -> list[str]:
    """Split the body at semicolons, labels and scope braces; drop line directives."""
    lines = [line for line in body.splitlines() if not line.lstrip().startswith((".loc", ".file"))]
    statements = []
    for chunk in "\n".join(lines).split(";"):
        rest = chunk.strip()
        while rest:
            label = _LABEL.match(rest)
            if rest[0] in "{}":
                rest = rest[1:].lstrip()
            elif label is not None:
                statements.append(label[1] + ":")
                rest = rest[label.end() :].lstrip()
            else:
                statements.append(" ".join(rest.split()))
                break
    return statements


def _add_statement(program: Program, statement: str) -> None:
    if statement.endswith(":"):
        program.labels[statement[:-1]] = len(program.instructions)
    elif statement.startswith(".reg"):
        _declare_registers(program, statement)
    elif statement.startswith(".pragma"):
        return
    elif statement.startswith("."):
        raise PtxError(f"unknown directive: {statement}")
    else:
        program.instructions.append(_parse_instruction(statement))


def _declare_registers(program: Program, statement: str) -> None:
    match = _REGISTERS.match(statement)
    if match is None or match[1] not in REGISTER_BITS:
        raise PtxError(f"unknown register declaration: {statement}")
    for declared in match[2].split(","):
        ranged = _RANGE.fullmatch(declared.strip())
        names = [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [declared.strip()]
        for name in names:
            bits = REGISTER_BITS[match[1]]
            if program.registers.setdefault(name, bits) != bits:
                raise PtxError(f"register {name} is declared twice with different widths")


def _parse_instruction(statement: str) -> Instruction:
    rest = statement
    guard = _GUARD.match(rest)
    if guard is not None:
        rest = rest[guard.end() :]
    opcode = _OPCODE.match(rest)
    if opcode is None:
        raise PtxError(f"not an instruction: {statement}")
    operands = tuple(parse_operand(part) for part in _split_operands(rest[opcode.end() :]))
    modifiers = tuple(opcode[2].split(".")[1:])
    return Instruction(opcode[1], modifiers, operands, (guard[2], not guard[1]) if guard else None, statement)


def _split_operands(text: str) -> list[str]:
    """Split at commas, and at the ``|`` of ``dst|pred``, outside braces and brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
        if character in ",|" and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    parts.append(current)
    return [part.strip() for part in parts if part.strip()]


def parse_operand(text: str) -> Operand:
    """Parse one operand."""
    if text == "_":
        return Sink()
    if text.startswith("{"):
        return Vector(tuple(parse_operand(part) for part in _split_operands(text[1:-1])))
    if text.startswith("["):
        return _parse_address(text[1:-1])
    if re.match(r"%(tid|ntid|ctaid|nctaid|laneid|warpid)\b", text):
        return Symbol(text)
    if text.startswith("%"):
        return Register(text)
    return _parse_literal(text)


def _parse_literal(text: str) -> Operand:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return Immediate(int(text[2:], 16))
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    if re.fullmatch(r"-?\d+\.\d*(e[-+]?\d+)?", text):
        return Immediate(struct.unpack("<I", struct.pack("<f", float(text)))[0])
    return Symbol(text)


def _parse_address(text: str) -> Address:
    base, _, offset = text.partition("+")
    return Address(parse_operand(base.strip()), int(offset.strip() or "0", 0))


def _check_branches(program: Program) -> None:
    for instruction in program.instructions:
        target = instruction.operands[-1] if instruction.opcode == "bra" else None
        if isinstance(target, Symbol) and target.name not in program.labels:
            raise PtxError(f"branch to an unknown label: {instruction.text}")
