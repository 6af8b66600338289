"""The parser of every command, and the options that several of them have."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastddpm.checks import DTYPES, nearest, one_of, printable

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

    def _get_help_string(self, action: argparse.Action) -> str:
        """Add the default, unless it is none or the text speaks of it."""
        text, default = action.help or "", action.default
        if "default" in text or any(default is none for none in (None, False, argparse.SUPPRESS)):
            return text
        return f"{text} (default: {f'{default:g}' if isinstance(default, float) else default})"


# Options that several commands have.
_SHARED: dict[str, dict[str, Any]] = {
    "model": {"default": "digits", "help": "shipped model, directory, or id on the Hugging Face Hub"},
    "guidance": {"type": float, "default": 1.0, "help": "weight of classifier-free guidance"},
    "seed": {"type": int, "default": 0, "help": "the first of as many seeds"},
    "device": {"default": "auto", "help": "auto, cpu, cuda, cuda:1"},
    "dtype": {"choices": DTYPES, "help": "of the network (default: the model's)"},
    "backend": {"choices": BACKENDS, "default": "auto", "help": "of the fused operations"},
    "compile": {"choices": tuple(COMPILE), "default": "auto", "help": "torch.compile the network"},
    "outdir": {"type": Path, "metavar": "DIR", "help": "where to write"},
    "overwrite": {"action": "store_true", "help": "replace what is in the directory"},
    "json": {"action": "store_true", "help": "print JSON"},
}


def examples(*commands: str) -> str:
    """Return a paragraph of a help text that shows how a command is used."""
    return "\n  ".join(["examples:", *commands])


def add_shared(parser: argparse._ActionsContainer, *names: str, **defaults: Any) -> None:
    """Add options that several commands have; ``defaults`` replaces those that they usually have."""
    for name in names:
        parser.add_argument(f"--{name}", **_SHARED[name])
    parser.set_defaults(**defaults)


def add_output(parser: argparse.ArgumentParser, summary: str) -> None:
    """Add --json and --quiet."""
    parser.add_argument("--json", action="store_true", help=f"print the {summary} as JSON")
    parser.add_argument("--quiet", action="store_true", help=f"no progress bar and no {summary}")


def print_output(args: argparse.Namespace, summary: Mapping[str, Any], text: str) -> None:
    """Print what --json and --quiet ask for: a summary as JSON, as text, or nothing."""
    if args.json:
        print(json.dumps(summary))
    elif not args.quiet:
        print(text)


def announce(what: str, *, quiet: bool) -> None:
    """Say on a terminal what is waited for where no bar shows it."""
    if sys.stderr.isatty() and not quiet:
        print(printable(f"fastddpm: {what} ..."), file=sys.stderr, flush=True)


def refuse_existing(args: argparse.Namespace, paths: Iterable[Path]) -> None:
    """Refuse to replace files unless --overwrite is given.

    Raises:
        FileExistsError: one exists.
    """
    for path in paths:
        if path.exists() and not args.overwrite:
            raise FileExistsError(f"{path} exists already; use --overwrite to replace it, or another --outdir")


def new_file(text: str) -> Path:
    """Read the name of a file to write; an argparse type.

    Raises:
        argparse.ArgumentTypeError: a folder has it.
    """
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file")
    return Path(text)


def positive(text: str, low: int = 1) -> int:
    """Read an integer of at least ``low``; an argparse type.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least {low}")
    return int(text)


def positives(text: str, low: int = 1) -> list[int]:
    """Read such integers between commas, in ascending order."""
    return sorted({positive(part.strip(), low) for part in text.split(",")})
