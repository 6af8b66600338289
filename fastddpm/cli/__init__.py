"""The ``fastddpm`` command: one module per subcommand, with help texts, ``add_options(parser)`` and ``run(args)``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from fastddpm import __version__
from fastddpm.checks import printable
from fastddpm.machine.interrupts import Stopped

COMMANDS = {
    "sample": "draw images",
    "train": "train a model",
    "eval": "measure samples",
    "steps": "how many network calls a model needs",
    "tune": "fit a sampler of few steps to a model",
    "diffuse": "draw the forward and reverse process",
    "convert": "convert a model",
    "inspect": "compile every kernel without a GPU and print what it costs",
    "verify": "check the promises on this machine",
    "bench": "measure against the alternatives",
    "profile": "show where a sampling loop's time goes",
    "compile": "compile a network ahead of time",
    "cache": "list or remove compiled networks",
    "env": "show versions, devices and the backend in use",
}

COMPLETION = """shell completion:
  pip install 'fastddpm[complete]'
  eval "$(register-python-argcomplete fastddpm)\""""

# How the library's messages name what is an option of the command line.
_KEYWORD = re.compile(r"\b(device|dtype|backend|compile|spacing|sampler|steps)=['\"]?(?:torch\.)?([\w:+.-]+\w)['\"]?")
_SWITCH = {"True": "on", "False": "off"}


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signum, "terminated")


def _one_line_error(error: Exception, options: Sequence[str]) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return printable(f"{error.filename}: {error.strerror}")

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        return f"--{name} {_SWITCH.get(value, value)}" if name in options else found[0]

    return printable(_KEYWORD.sub(option, str(error))) or type(error).__name__


def _name() -> str:
    """What lines on stderr begin with; of several processes it says which one."""
    return "fastddpm" if os.environ.get("WORLD_SIZE", "1") == "1" else f"fastddpm: rank {os.environ.get('RANK', '?')}"


def _print_line(source: str, level: str, message: object) -> None:
    from tqdm import tqdm

    line = f"{_name() if source == 'fastddpm' else source}: {level}: {printable(message)}\n"
    # Above the progress bar, if there is one, and in one piece.
    tqdm.write(line, file=sys.stderr, end="")


def _say(line: str) -> None:
    # In one piece: other processes write to the same terminal.
    sys.stderr.write(f"{line}\n")


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _print_line(record.name.partition(".")[0], record.levelname.lower(), record.getMessage())


def _show_warning(message: Warning | str, category: Any, filename: str, *rest: Any, **named: Any) -> None:
    """Show a warning without the line of code that gave it, which a user of the command never wrote."""
    below = filename.rpartition("site-packages/")[2] if "site-packages/" in filename else "fastddpm"
    _print_line(Path(below).parts[0].removesuffix(".py"), "warning", message)


@contextlib.contextmanager
def _lines_on_stderr() -> Iterator[None]:
    """Print warnings and log records as lines that begin with their source."""
    handler, show, level = _Handler(), warnings.showwarning, logging.getLogger("fastddpm").level
    logging.getLogger().addHandler(handler)
    warnings.showwarning = _show_warning
    try:
        yield
    finally:
        warnings.showwarning = show
        logging.getLogger("fastddpm").setLevel(level)
        logging.getLogger().removeHandler(handler)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with every subcommand attached."""
    from fastddpm.cli.parser import Parser

    parser = Parser(prog="fastddpm", description="Sample denoising diffusion models, fast.", epilog=COMPLETION)
    parser.add_argument("--version", action="version", version=f"fastddpm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for name, purpose in COMMANDS.items():
        module = importlib.import_module(f"fastddpm.cli.{name}")
        texts = {"description": module.DESCRIPTION, "epilog": module.EPILOG, "usage": getattr(module, "USAGE", None)}
        command = subparsers.add_parser(name, help=purpose, **texts)
        module.add_options(command)
        said = "print what is decided and why (logger fastddpm)"
        command.add_argument("--verbose", action="store_true", default=False, help=said)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (one line on stderr), 2 (usage), 130 or 143 (signals)."""
    handler = signal.signal(signal.SIGTERM, _raise_terminated)
    options: Sequence[str] = ()
    try:
        with _lines_on_stderr():
            parser = build_parser()
            if "_ARGCOMPLETE" in os.environ:
                # A shell asks what could follow.
                importlib.import_module("argcomplete").autocomplete(parser)
            args = parser.parse_args(argv)
            if args.command is None:
                parser.error(f"which command? {', '.join(COMMANDS)}")
            options = list(vars(args))
            if args.verbose:
                logging.getLogger("fastddpm").setLevel(logging.INFO)
            del args.verbose
            return int(importlib.import_module(f"fastddpm.cli.{args.command}").run(args))
    except KeyboardInterrupt:
        _say(f"{_name()}: interrupted")
        return 130
    except Stopped as stopped:
        _say(f"{_name()}: {stopped}")
        return 128 + stopped.signum
    except BrokenPipeError:
        # The reader went away; leave quietly, and keep the interpreter from flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("FASTDDPM_TRACEBACK") == "1":
            raise
        _say(f"{_name()}: error: {_one_line_error(error, options)}")
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):
            # torchrun's own report then says what it was.
            importlib.import_module("torch.distributed.elastic.multiprocessing.errors").ErrorHandler().record_exception(
                error.with_traceback(None)
            )
        return 1
    finally:
        signal.signal(signal.SIGTERM, handler)
