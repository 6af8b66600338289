"""The ``fastddpm`` command: one module per subcommand, each with ``add_parser(subparsers)`` and ``run(args)``."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

from fastddpm import __version__

COMMANDS = ("sample", "train", "eval", "diffuse", "convert", "inspect", "verify", "bench", "profile", "env")


class _Terminated(BaseException):
    """SIGTERM arrived; unwinds the stack so that finished files are kept and temporary ones removed."""


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    raise _Terminated


def _one_line_warning(message: Warning | str, *rest: Any, **named: Any) -> str:
    """Format a warning without the line of code that gave it, which a user of the command never wrote."""
    return f"fastddpm: warning: {' '.join(str(message).split())}\n"


def _one_line_error(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with every subcommand attached."""
    parser = argparse.ArgumentParser(prog="fastddpm", description="Sample denoising diffusion models, fast.")
    parser.add_argument("--version", action="version", version=f"fastddpm {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name in COMMANDS:
        module = importlib.import_module(f"fastddpm.cli.{name}")
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (one line on stderr), 2 (usage), 130 or 143 (signals)."""
    args = build_parser().parse_args(argv)
    module = importlib.import_module(f"fastddpm.cli.{args.command}")
    handler = signal.signal(signal.SIGTERM, _raise_terminated)
    formatting = warnings.formatwarning
    warnings.formatwarning = _one_line_warning
    try:
        return int(module.run(args))
    except KeyboardInterrupt:
        print("fastddpm: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print("fastddpm: terminated", file=sys.stderr)
        return 143
    except BrokenPipeError:
        # The reader went away; leave quietly, and keep the interpreter from flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("FASTDDPM_TRACEBACK") == "1":
            raise
        print(f"fastddpm: error: {_one_line_error(error)}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, handler)
        warnings.formatwarning = formatting
