"""Have packages built in a process of its own, `fastddpm.machine.compiling`, now or for later.

A lock keeps two of them from building the same package;
the system releases it when one is killed, and the next removes what was left.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastddpm.errors import BackendUnavailable
from fastddpm.files.atomic import temporary_of
from fastddpm.machine import packages
from fastddpm.machine.allocator import memory_given_back
from fastddpm.machine.packages import Code
from fastddpm.machine.torch_compile import has_cpp_compiler, package_cache

logger = logging.getLogger("fastddpm")


class Want(enum.IntEnum):
    """How much a run wants compiled code."""

    NEVER = 0
    IF_FOUND = 1
    FOR_LATER = 2  # if found; else built in the background, for a later run
    NOW = 3  # built if need be, while the run waits


Job = tuple[nn.Module | bytes, tuple[Tensor, ...]]
"""A network that can be pickled, or is exported already (see `exported`), and its arguments: their shapes, dtypes and
strides are those of all later calls."""

# Seconds until a run says that it waits for another process, and from then on.
SAYS_AFTER, SAYS_EVERY = 2.0, 5.0

# At most one of them runs; those that ended go at the next call.
_background: dict[Path, _Build] = {}
_failed: set[Path] = set()
_guard = threading.Lock()


@dataclass
class Wish:
    """How much compiled code of a network is wanted; what all of its sampler's runs share.

    Attributes:
        want: asked again at each run.
        strict: raise where it is wanted now and cannot be had, instead of running uncompiled.
        file: where it is, instead of in the cache; one that is not there is built, if it is wanted now.
    """

    want: Want
    strict: bool
    file: Path | None = None

    def insist(self, compiled: bool) -> None:
        """From now on run compiled code, waiting for it or raising where there is none; or run none."""
        self.want, self.strict = (Want.NOW if compiled else Want.NEVER), True
        self.file = self.file if compiled else None

    @property
    def idle(self) -> bool:
        """Whether nothing compiled is to be run."""
        return self.want is Want.NEVER and self.file is None

    def code(self, identity: Mapping[str, str], job: Callable[[], Job]) -> Code | None:
        """Return a package's code, built first where that is wanted; None where there is none yet.

        Args:
            identity: see `packages.identify`.

        Raises:
            BackendUnavailable: it cannot be had, and the caller insists, or named a file.
        """
        if self.file is not None:
            absent = self.want is Want.NOW and not self.file.exists()
            return build(identity, job, self.file) if absent else packages.load(self.file, identity)
        try:
            return obtain(identity, self.want, job)
        except BackendUnavailable as error:
            if self.strict:
                raise
            logger.warning("the model runs uncompiled: %s", error)
            self.want = Want.IF_FOUND
            return None


def obtain(identity: Mapping[str, str], want: Want, job: Callable[[], Job]) -> Code | None:
    """Return a package's code from the cache, built first where that is wanted; None where there is none yet.

    Raises:
        BackendUnavailable: it is wanted now, and it cannot be built.
    """
    if want is Want.NEVER:
        return None
    code = packages.find(identity)
    if code is None and want is Want.NOW:
        return build(identity, job)
    if code is None and want is Want.FOR_LATER:
        _build_in_background(identity, job)
    return code


def build(identity: Mapping[str, str], job: Callable[[], Job], out: Path | None = None) -> Code:
    """Build a package into the cache, or into a file, wait for it and load it.

    Raises:
        BackendUnavailable: it cannot be built.
    """
    reason = why_not(to_cache=out is None)
    if reason is None:
        _await_others(packages.path_of(identity))
        if out is None and (code := packages.find(identity)) is not None:
            return code
        logger.info("compiling the network: half a minute or more, once; later processes find it")
        reason = _start(identity, job, out=out, waits=True).wait()
    if reason is None:
        code = packages.find(identity) if out is None else packages.load(out, identity)
        if code is not None:
            return code
        reason = f"{packages.path_of(identity)} is not as it was written"
    raise BackendUnavailable(f"the network cannot be compiled: {reason}")


def why_not(*, to_cache: bool = True) -> str | None:
    """Return why nothing can be built here; None where it can."""
    cache = package_cache()
    if to_cache and cache.open_part is not None:
        return f"others can write to {cache.open_part}: set {cache.variable} to a folder of yours"
    if to_cache and (reason := cache.why_unusable()) is not None:
        return reason
    return None if has_cpp_compiler() else "no C++ compiler was found; set CXX to one"


def _build_in_background(identity: Mapping[str, str], job: Callable[[], Job]) -> None:
    """Start a build that outlives this process, once; warn once where it has failed."""
    path = packages.path_of(identity)
    with _guard:
        for ended in [other for other, build in _background.items() if not build.runs()]:
            if (reason := _background.pop(ended).failure()) is not None:
                _failed.add(ended)
                logger.warning("the model runs uncompiled: %s", reason)
        if path in _background or path in _failed:
            return
        if (reason := why_not()) is not None:
            logger.info("the model runs uncompiled: %s", reason)
        elif _background:
            logger.info("the model runs uncompiled: this process is building another network in the background")
        else:
            logger.info("building compiled code in the background, for later calls; compile=False turns it off")
            _background[path] = _start(identity, job, out=None, waits=False)


def _await_others(path: Path) -> None:
    """Wait while another process builds a package, and say so; if it dies, the system gives up its lock."""
    import filelock

    started, patience = time.monotonic(), SAYS_AFTER
    while True:
        try:
            with packages.locked(path, patience):
                return
        except filelock.Timeout:
            patience, seconds = SAYS_EVERY, time.monotonic() - started
            logger.warning("waiting for %s, which compiles the same network: %.0f s", packages.builder(path), seconds)


def _start(identity: Mapping[str, str], job: Callable[[], Job], *, out: Path | None, waits: bool) -> _Build:
    try:
        with memory_given_back():
            return _Build(identity, job(), out=out, waits=waits)
    except (OSError, RuntimeError, AttributeError, TypeError, pickle.PicklingError) as error:
        # A full disk, or something in the network that cannot be pickled.
        raise BackendUnavailable(f"the build cannot be started: {error}") from error


class _Build:
    """A process that builds a package."""

    def __init__(self, identity: Mapping[str, str], job: Job, *, out: Path | None, waits: bool) -> None:
        self._target = packages.path_of(identity)
        self._target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._target = self._target if out is None else out
        self._log: IO[bytes] | None = tempfile.TemporaryFile()  # noqa: SIM115  read when the process has ended
        with tempfile.TemporaryFile() as order:
            torch.save({"identity": dict(identity), "job": job, "out": out, "waits": waits}, order)
            order.seek(0)
            self._process = subprocess.Popen(
                # -P: Python would look for modules in the current folder first.
                [sys.executable, "-P", "-m", "fastddpm.machine.compiling"],
                stdin=order,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if isinstance(p, str))},
                # Ctrl-C at a terminal ends what a run waits for, not what it does not.
                start_new_session=not waits,
            )

    def wait(self) -> str | None:
        """Wait for its end, with a clock on a terminal, and return why it failed; None where it has not."""
        silent = not sys.stderr.isatty()
        try:
            with tqdm(desc="compiling the network, once", bar_format="{desc}: {elapsed}", disable=silent) as bar:
                while self._process.poll() is None:
                    bar.refresh()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(timeout=1)
        finally:
            if self.runs():
                self._process.kill()
                self._process.wait()
                temporary_of(self._target, self._process.pid).unlink(missing_ok=True)
                packages.sweep()
        return self.failure()

    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def failure(self) -> str | None:
        """Return why it failed, the first time that this is known."""
        status, log = self._process.poll(), self._log
        if status is None or log is None:
            return None
        with log:
            self._log = None
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
        if status == 0:
            return None
        return lines[-1] if status > 0 and lines else f"the process that builds it ended with status {status}"


def _after_fork() -> None:
    """Let a forked child build: what its parent builds, and who held the lock there, are not its own."""
    global _guard
    _guard = threading.Lock()
    _background.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
