"""SIGINT and SIGTERM in the middle of long work: noted, so that what has been reached is kept."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Stopped(BaseException):
    """A signal ends the process; unwinds the stack so that finished files are kept and temporary ones removed."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class Interrupt:
    """The signal that has arrived, if any."""

    signal: int | None = None


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Note SIGINT and SIGTERM instead of dying in the middle of a step; the second one acts as it did before."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    # nohup and a shell's & have a signal ignored: leave it so.
    previous: dict[int, Any] = {s: handler for s, handler in handlers.items() if handler is not signal.SIG_IGN}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def note(signum: int, frame: FrameType | None) -> None:
        interrupt.signal = signum
        restore()

    for signum in previous:
        signal.signal(signum, note)
    try:
        yield interrupt
    finally:
        restore()
