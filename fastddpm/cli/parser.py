"""The parser of every command, and the options that several of them have."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from fastddpm.checks import DTYPES, nearest, one_of

BACKENDS = ("auto", "triton", "torch")
COMPILE: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}


class Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest name for one it does not know, and prints indented examples as they are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, refusing what is left: argparse would report it with the usage of the command above."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            near = nearest(rest[0].partition("=")[0], self._option_string_actions)
            self.error(f"unknown argument {rest[0]}" + (f"; did you mean {near}?" if near else ""))
        return namespace, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None:
            one_of("choice", value, action.choices, functools.partial(argparse.ArgumentError, action))


class _Formatter(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(part if "\n  " in part else fill(part, width, indent) for part in text.split("\n\n"))


def examples(*commands: str) -> str:
    """Return a paragraph of a help text that shows how a command is used."""
    return "\n  ".join(["examples:", *commands])


def add_outdir(parser: argparse.ArgumentParser, default: str | None, *, dest: str = "outdir", old: str = "") -> None:
    """Add --outdir; ``old`` is a name that it had before."""
    text = f"where to write{f' (default: {default})' if default else ''}{f'; {old} is its old name' if old else ''}"
    action = parser.add_argument("--outdir", *([old] if old else []), dest=dest, type=Path, metavar="DIR", help=text)
    if default is not None:
        action.default = Path(default)


def add_machine(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add options that say where and how to compute: "device", "dtype", "backend", "compile"."""
    known: dict[str, dict[str, Any]] = {
        "device": {"default": "auto", "help": "auto, cpu, cuda, cuda:1 (default: auto)"},
        "dtype": {"choices": DTYPES, "help": "of the network (default: the model's)"},
        "backend": {"choices": BACKENDS, "default": "auto", "help": "of the fused operations (default: auto)"},
        "compile": {"choices": tuple(COMPILE), "default": "auto", "help": "torch.compile the network (default: auto)"},
    }
    for name in names:
        parser.add_argument(f"--{name}", **known[name])


def add_output(parser: argparse.ArgumentParser, summary: str) -> None:
    """Add --json and --quiet."""
    parser.add_argument("--json", action="store_true", help=f"print the {summary} as JSON")
    parser.add_argument("--quiet", action="store_true", help=f"no progress bar and no {summary}")


def positive(text: str, low: int = 1) -> int:
    """Read an integer of at least ``low``; an argparse type.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least {low}")
    return int(text)
