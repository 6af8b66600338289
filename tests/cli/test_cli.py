"""What every command promises: one line for an error or a warning, and an exit code that says what happened."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import types
import warnings
from collections.abc import Callable

import pytest

from fastddpm import cli
from fastddpm.cli import COMMANDS, env, main
from fastddpm.tables.names import listing


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], int]:
    """Run some code as if it were a command."""

    def run(body: Callable[[], int]) -> int:
        def pretend(args: argparse.Namespace) -> int:
            return body()

        monkeypatch.setattr(env, "run", pretend)
        monkeypatch.setattr(env, "add_options", lambda parser: parser.add_argument("--device"))
        return main(["env", "--device", "auto"])

    return run


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("steps must be at least 1,\n  got 0"), "steps must be at least 1, got 0"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), "a/b: No such file or directory"),
        (OSError("no space"), "no space"),
        (KeyError(), "KeyError"),
        (ValueError("no GPU; use device='cpu', or steps=3"), "no GPU; use --device cpu, or steps=3"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_main_reports_an_error_in_one_line(
    command: Callable[[Callable[[], int]], int], capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    def fail() -> int:
        raise error

    assert command(fail) == 1
    assert capsys.readouterr().err == f"fastddpm: error: {line}\n"


def test_main_gives_warnings_and_log_records_one_line_each(
    command: Callable[[Callable[[], int]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    def warn() -> int:
        # pytest records warnings instead of showing them.
        warnings.showwarning("few\n steps", UserWarning, "schedule.py", 7)
        warnings.showwarning("old", UserWarning, "/usr/lib/python3/site-packages/torch/jit/a.py", 7)
        logging.getLogger("fastddpm").warning("slow\n%s", "here")
        logging.getLogger("fastddpm").info("why")
        return 0

    before = warnings.showwarning
    assert command(warn) == 0
    lines = ["fastddpm: warning: few steps", "torch: warning: old", "fastddpm: warning: slow here"]
    assert capsys.readouterr().err.splitlines() == lines
    assert warnings.showwarning is before


def test_verbose_prints_what_is_decided(
    command: Callable[[Callable[[], int]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    def decide() -> int:
        logging.getLogger("fastddpm").info("compile='auto': uncompiled")
        return 0

    assert command(decide) == 0
    assert main(["env", "--verbose"]) == 0
    assert capsys.readouterr().err == "fastddpm: info: compile='auto': uncompiled\n"
    assert logging.getLogger("fastddpm").level == logging.NOTSET


def test_main_heeds_sigterm_before_anything_is_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> argparse.ArgumentParser:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError

    monkeypatch.setattr(cli, "build_parser", interrupted)
    assert main(["env"]) == 143
    assert capsys.readouterr().err == "fastddpm: terminated\n"


def test_main_completes_for_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    class Completed(Exception):  # noqa: N818 - argcomplete ends the process here
        pass

    def autocomplete(parser: argparse.ArgumentParser) -> None:
        raise Completed(parser.prog)

    module = types.ModuleType("argcomplete")
    module.autocomplete = autocomplete  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "argcomplete", module)
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setenv("FASTDDPM_TRACEBACK", "1")
    with pytest.raises(Completed, match="fastddpm"):
        main(["sa"])


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_main_says_which_signal_ended_it(
    command: Callable[[Callable[[], int]], int], capsys: pytest.CaptureFixture[str], signum: signal.Signals, code: int
) -> None:
    def interrupted() -> int:
        signal.raise_signal(signum)
        return 0

    assert command(interrupted) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_main_raises_on_request(command: Callable[[Callable[[], int]], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDPM_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        command(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smaple"], "unknown choice 'smaple' (did you mean 'sample'?); choose one of sample, train, "),
        (["--bogus"], "unknown argument --bogus"),
        ([], "which command? sample, train, "),
        (["sample", "--sedes", "3"], "unknown argument --sedes; did you mean --seeds?"),
        (["train", "--outdri=x"], "unknown argument --outdri=x; did you mean --outdir?"),
        (["eval", "--samples", "1"], "'1' is no integer of at least 2"),
        (["profile", "--trace", "."], "'.' is a folder; name a file"),
        (["compile", "--out", "."], "'.' is a folder; name a file"),
        (["sample", "--compile", "of"], "unknown choice 'of' (did you mean 'off'?); choose one of auto, on, off"),
    ],
    ids=" ".join,
)
def test_usage_errors_name_what_was_probably_meant(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert f"examples:\n  fastddpm {name}" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", ["sample", "eval"])
def test_help_lists_the_samplers(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main([name, "--help"])
    assert exit_status.value.code == 0
    assert listing() in capsys.readouterr().out
