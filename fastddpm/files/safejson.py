"""JSON from files that nobody vouches for: bounded in size and depth, finite numbers only, no key twice."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastddpm.checks import printable
from fastddpm.files.outside import regular_size

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

# To its closing quote, or to the end of a text that lacks it.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


def read_object(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, infinities: bool = False
) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: a regular file, UTF-8.
        max_bytes: larger files are refused unread.
        infinities: allow Infinity and -Infinity, which are Python's and not JSON's; the caller refuses them where they
            mean nothing.

    Raises:
        ValueError: everything else that is wrong with it; the message begins with the path.
    """
    path = Path(path)
    size = regular_size(path)
    if size > max_bytes:
        raise ValueError(f"{path}: {size} bytes; a file of this kind has at most {max_bytes}")
    with path.open("rb") as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path}: more than {max_bytes} bytes, the most a file of this kind has")
    return parse_object(content, source=str(path), infinities=infinities)


def parse_object(content: bytes, *, source: str, infinities: bool = False) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top level is an object; the caller has bounded its length.

    Args:
        content: the text.
        source: what it is, for messages.
        infinities: allow Infinity and -Infinity.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deep, a key given twice, NaN, an infinity or a number that overflows
            to one, or not an object.
    """
    try:
        text = content.decode("utf-8")
        _check_depth(text)
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=functools.partial(_constant, infinities=infinities),
            parse_float=_finite_float,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(printable(f"{source}: not usable as JSON: {error}")) from None
    if not isinstance(value, dict):
        raise ValueError(f"{source}: must hold a JSON object, got {type(value).__name__}")
    return value


def to_json(value: Mapping[str, Any]) -> bytes:
    """Write a JSON object for people and diffs: indented, its keys sorted, a newline at the end.

    Raises:
        ValueError: a number is not finite.
    """
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _check_depth(text: str) -> None:
    """Refuse deep nesting unparsed: the parser recurses, and the stack is not ours."""
    brackets = re.finditer(r"[\[\]{}]", _STRING.sub("", text))
    if any(depth > MAX_DEPTH for depth in itertools.accumulate(1 if b[0] in "[{" else -1 for b in brackets)):
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice[:80]!r} is given twice")
    return result


def _constant(name: str, infinities: bool) -> float:
    if name == "NaN" or not infinities:
        raise ValueError(f"{name} is not a JSON number")
    return float(name)


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value
