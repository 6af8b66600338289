"""What every command promises: one line for an error or a warning, and an exit code that says what happened."""

from __future__ import annotations

import argparse
import signal
import warnings
from collections.abc import Callable

import pytest

from fastddpm.cli import env, main


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], int]:
    """Run some code as if it were a command."""

    def run(body: Callable[[], int]) -> int:
        def pretend(args: argparse.Namespace) -> int:
            return body()

        monkeypatch.setattr(env, "run", pretend)
        return main(["env"])

    return run


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("steps must be at least 1,\n  got 0"), "steps must be at least 1, got 0"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), "a/b: No such file or directory"),
        (OSError("no space"), "no space"),
        (KeyError(), "KeyError"),
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


def test_main_gives_a_warning_one_line(command: Callable[[Callable[[], int]], int]) -> None:
    shown: list[str] = []

    def warn() -> int:
        # pytest records warnings instead of showing them.
        shown.append(warnings.formatwarning("few\n steps", UserWarning, "schedule.py", 7))
        return 0

    before = warnings.formatwarning
    assert command(warn) == 0
    assert shown == ["fastddpm: warning: few steps\n"]
    assert warnings.formatwarning is before


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
