"""The folder that a run writes to: one run at a time, and a manifest of what its files were made from.

A later run of the same settings completes the files that are missing; one of other settings is refused, and what a
killed process left half-written is removed. Files that no run writes are left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastddpm.checks import shown
from fastddpm.files.atomic import write_files
from fastddpm.files.safejson import read_object, to_json

logger = logging.getLogger("fastddpm")

# Seeds that form no ranges take up to 21 bytes each.
MAX_BYTES = 256 * 2**20


class RunFolder:
    """A folder, and the files in it that belong to a run.

    Args:
        path: where it is; it is made when it is locked.
        patterns: of all files that a run may write, relative to the folder, as in a shell.
        manifest: name of the file that says what the others were made from.
        kind: what the manifest calls itself.
    """

    def __init__(
        self, path: Path, patterns: Sequence[str], *, manifest: str = "manifest.json", kind: str = "fastddpm-run-1"
    ) -> None:
        self.path, self.manifest, self.kind = path, path / manifest, kind
        self._patterns = patterns

    @contextlib.contextmanager
    def locked(self, *, shared: bool = False) -> Iterator[Callable[[], None]]:
        """Hold the folder against other runs; a folder that is new and still empty at the end is removed.

        Args:
            shared: join processes of the same run, of which the one that began it has called what this yields.

        Raises:
            BlockingIOError: another run is writing there.
            NotADirectoryError: the path, or a part of it, is a file.
        """
        new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(f"{self.path} is a file; give another --outdir") from None
        try:
            with _flock(self.path, shared=shared) as share:
                yield share
        finally:
            if new:
                with contextlib.suppress(OSError):
                    self.path.rmdir()

    def begin(
        self,
        config: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        defaults: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Make the folder ready for a run, or refuse; call it while the folder is locked.

        Args:
            config: what decides the bytes of the run's files, as JSON types.
            resume: complete an earlier run of the same config, if there is one.
            defaults: what a manifest has that was written before there were these fields.
            more: further entries of the manifest.

        Raises:
            FileExistsError, ValueError: what is there must not be touched, see `refuse_unless_free`.
            ValueError: the earlier run has another config.
            OSError: the folder cannot be written to.
        """
        self.refuse_unless_free(resume=resume, overwrite=overwrite)
        earlier = None if overwrite else self.read()
        if resume and earlier is not None:
            changed = differences({**(defaults or {}), **earlier["config"]}, config)
            if changed:
                raise ValueError(f"cannot resume {self.path}, the run differs: {'; '.join(changed)}")
        # Before the new manifest: an old file must never pass for one of the new run's.
        stale = self._found() if overwrite else []
        # What `atomic.write_files` leaves in a killed process.
        leftovers = [*self._found(".{}.*.tmp"), *self.path.glob(f".{self.manifest.name}.*.tmp")]
        for path in [*stale, *leftovers]:
            path.unlink(missing_ok=True)
        content = {"format": self.kind, "config_hash": config_hash(config), "config": config, **more}
        write_files({self.manifest: to_json(content)})

    def refuse_unless_free(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a run that would harm, or could not tell apart, what the folder holds.

        Raises:
            FileExistsError: files of a run are there, and neither resume nor overwrite was asked for.
            ValueError: resume was asked for, and nothing says what made them.
        """
        if overwrite:
            return
        files, earlier = self._found(), self.read()
        if files and not resume:
            raise FileExistsError(
                f"{files[0]} exists already; use --resume to complete that run, --overwrite to replace it, or another "
                "--outdir"
            )
        if files and earlier is None:
            raise ValueError(
                f"{self.path} has outputs but no {self.manifest.name}, so nothing says what made them; use --overwrite"
            )

    def read(self) -> dict[str, Any] | None:
        """Return the manifest of the run that the folder holds, or None where there is none.

        Raises:
            ValueError: it is damaged, or of another format.
        """
        if not self.manifest.exists():
            return None
        content = read_object(self.manifest, max_bytes=MAX_BYTES)
        # Training runs of version 0.1.0 call it identity, and have no hash.
        config = content.get("config", content.get("identity"))
        known = content.get("format") == self.kind and isinstance(config, dict)
        if not known or content.get("config_hash", config_hash(config)) != config_hash(config):
            raise ValueError(
                f"{self.manifest} is damaged or was written by another version; start again with --overwrite"
            )
        return {**content, "config": config}

    def _found(self, name: str = "{}") -> list[Path]:
        """The files whose names are those of a run's, put into ``name``."""
        places = [(self.path / pattern).parent for pattern in self._patterns]
        names = [name.format(Path(pattern).name) for pattern in self._patterns]
        return [path for place, pattern in zip(places, names, strict=True) for path in sorted(place.glob(pattern))]


def config_hash(config: Any) -> str:
    """Return the SHA-256 of a config of JSON types; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, allow_nan=False).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Name each field in which two configs differ, with both values."""

    def value(config: Mapping[str, Any], key: str) -> str:
        return shown(config[key]) if key in config else "absent"

    return [
        f"{key} was {value(old, key)} and is {value(new, key)}"
        for key in sorted({*old, *new})
        if key not in old or key not in new or old[key] != new[key]
    ]


@contextlib.contextmanager
def _flock(folder: Path, *, shared: bool) -> Iterator[Callable[[], None]]:
    """Hold a lock that the system releases even when the process is killed; yield what makes it a shared one."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield lambda: None
        return

    def lock(kind: int) -> None:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another run is writing to {folder}; wait for it, or use another --outdir") from None
        except OSError as error:  # as of many network file systems
            logger.warning("%s cannot be locked (%s); let no other run write there", folder, error.strerror)

    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield lambda: lock(fcntl.LOCK_SH)
    finally:
        os.close(handle)
