"""What a long run shows: a bar on a terminal, and a line now and then where there is none."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType

from tqdm.auto import tqdm

# Seconds from line to line where there is no terminal for a bar, as in a batch system's log.
LINE_EVERY = 60.0


class Progress:
    """How far a run is, on stderr; a context manager."""

    def __init__(self, name: str, total: int, start: int = 0, *, hidden: bool) -> None:
        self._name, self._total = name, total
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            desc=name,
            file=sys.stderr,
            dynamic_ncols=True,
            disable=hidden or not terminal,
        )
        self._line_due = math.inf if hidden or terminal else time.monotonic() + LINE_EVERY

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.close()

    def say(self, note: str) -> None:
        """Show at once what is being done between two steps; on a terminal only."""
        self._bar.set_postfix_str(note)

    def show(self, done: int, note: str = "") -> None:
        """Show that so many steps are done, and a note on them."""
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)
        if time.monotonic() >= self._line_due:
            line = f"{self._name}: step {done} of {self._total}{note and f', {note}'}"
            print(line, file=sys.stderr, flush=True)
            self._line_due = time.monotonic() + LINE_EVERY
