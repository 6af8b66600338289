"""Find which kernel argument each global load and store of a PTX text belongs to, and how wide it is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

_STATEMENT = re.compile(r"(?:@!?%\w+\s+)?([a-z]\w*(?:\.[\w:]+)*)\s+([^;]*);")
_REGISTER = re.compile(r"%[a-z]+\d+")
_PARAMETER = re.compile(r"\[\w+_param_(\d+)\]")
_NO_ADDRESS = ("ld.global", "st.global", "setp", "bra", "ret")


def accesses(ptx: str, signature: Mapping[str, str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Trace every global access back to the pointer it starts from.

    Args:
        ptx: a module with one entry.
        signature: the entry's arguments in order, with Triton's types ("*fp32" for a pointer).

    Returns:
        Bits of each "load" and "store" in the text through an argument, by its name.

    Raises:
        ValueError: if an access starts from no argument, or from several.
    """
    body = re.sub(r"//[^\n]*|\.loc[^\n]*", "", ptx.split(".entry", 1)[1].split("\n{", 1)[1])
    statements = _STATEMENT.findall(body)
    names = list(signature)
    pointers = {n for n, kind in enumerate(signature.values()) if kind.startswith("*")}
    origins = _trace(statements, pointers)
    found: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for opcode, operands in statements:
        if not opcode.startswith(("ld.global", "st.global")):
            continue
        address = _REGISTER.search(operands[operands.index("[") :])
        starts = origins[address[0]] if address else set()
        if len(starts) != 1:
            raise ValueError(f"{opcode} {operands} starts from {len(starts)} arguments, not from one")
        widths, direction = found[names[next(iter(starts))]], "load" if opcode.startswith("ld") else "store"
        widths[direction] = (*widths.get(direction, ()), _width(opcode))
    return dict(found)


def _trace(statements: Sequence[tuple[str, str]], pointers: Collection[int]) -> dict[str, set[int]]:
    """Which pointer arguments each register is computed from; what comes from memory comes from none."""
    origins: dict[str, set[int]] = defaultdict(set)
    changed = True
    while changed:
        changed = False
        for opcode, operands in statements:
            registers = _REGISTER.findall(operands)
            if opcode.startswith(_NO_ADDRESS) or not registers:
                continue
            parameter = _PARAMETER.search(operands)
            if parameter:
                new = {int(parameter[1])} & set(pointers)
            else:
                new = set().union(*(origins[register] for register in registers[1:]))
            changed = changed or not new <= origins[registers[0]]
            origins[registers[0]] |= new
    return origins


def _width(opcode: str) -> int:
    parts = opcode.split(".")
    count = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
    return count * int(parts[-1][1:])
