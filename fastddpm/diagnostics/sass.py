"""Read the SASS that nvdisasm prints: instructions, labels, and what class and width each instruction is."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LABEL = re.compile(r"^(\.L_x_\d+|\$?[\w$.]+):\s*$")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\(([^)]+)\)")
_FUNCTION = re.compile(r"^\s*\.type\s+(\S+),@function")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}

_CLASSES = (
    ("memory", r"(LD|ST|ATOM|RED)(?!C)"),
    ("branch", r"(BRA|EXIT|CALL|RET|BSSY|BSYNC|WARPSYNC|NOP|BAR|YIELD)"),
    ("integer multiply", r"(IMAD(?!\.(MOV|SHL|IADD|U32|X|SHR)\b)|IMUL|XMAD)"),
    ("float", r"(FADD|FMUL|FFMA|FSETP|FSEL|FMNMX|FSET|FSWZ|HFMA|HADD|HMUL)"),
    ("conversion", r"(I2F|F2I|F2F|I2I|F2FP|I2FP|FRND)"),
    ("special function", r"MUFU"),
    ("uniform", r"(U[A-Z]|LDCU?|R2UR|S2UR)"),
)


class SassError(ValueError):
    """The listing cannot be read or walked."""


@dataclass(frozen=True)
class SassInstruction:
    """One instruction: address, guard ("!P0" or None), opcode with modifiers, operands, and the label it jumps to."""

    address: int
    guard: str | None
    opcode: str
    operands: str
    target: str | None

    @property
    def stem(self) -> str:
        return self.opcode.split(".", 1)[0]


def instruction_class(instruction: SassInstruction) -> str:
    """Coarse class of an instruction; what fits none is integer arithmetic and logic."""
    for name, pattern in _CLASSES:
        if re.match(pattern, instruction.opcode):
            return name
    return "integer"


def access_width(instruction: SassInstruction) -> int:
    """Bytes per thread of a load or store."""
    return next((_WIDTHS[part] for part in instruction.opcode.split(".")[1:] if part in _WIDTHS), 4)


def parse(text: str, kernel: str) -> tuple[list[SassInstruction], dict[str, int]]:
    """Instructions of one kernel in order of address, and its labels; subroutines after it are left out.

    Raises:
        SassError: if the listing has no such kernel.
    """
    instructions: list[SassInstruction] = []
    labels: dict[str, int] = {}
    inside = False
    for line in text.splitlines():
        function = _FUNCTION.match(line)
        if function is not None and inside:
            break
        label = _LABEL.match(line)
        if label is not None:
            inside = inside or label[1] == f".text.{kernel}"
            labels[label[1]] = len(instructions)
            continue
        match = _LINE.match(line)
        if inside and match is not None:
            target = _TARGET.search(match[4])
            instructions.append(
                SassInstruction(int(match[1], 16), match[2], match[3], match[4].strip(), target[1] if target else None)
            )
    if not instructions:
        raise SassError(f"the listing holds no kernel {kernel!r}")
    return _without_padding(instructions, labels), labels


def _without_padding(instructions: list[SassInstruction], labels: dict[str, int]) -> list[SassInstruction]:
    """Drop what follows the kernel: a branch to itself, and NOPs."""
    end = len(instructions)
    while end and instructions[end - 1].stem == "NOP":
        end -= 1
    last = instructions[end - 1]
    if last.stem == "BRA" and last.guard is None and last.target and labels.get(last.target) == end - 1:
        end -= 1
    return instructions[:end]
