"""``fastddpm cache``: list the compiled networks that are kept, or remove them."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

from fastddpm.cli.parser import add_shared, examples

_MIB = 1 << 20


DESCRIPTION = """Networks that were compiled for a CPU are kept for later processes, up to 4 GiB, those used longest ago
removed first. FASTDDPM_CACHE_DIR moves the folder."""

EPILOG = examples("fastddpm cache", "fastddpm cache clear")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("action", nargs="?", choices=("list", "clear"), default="list", help="default: list")
    add_shared(parser, "json")


def run(args: argparse.Namespace) -> int:
    """List or remove them."""
    from fastddpm.machine import packages
    from fastddpm.machine.torch_compile import package_cache

    running = 0
    folder, found = package_cache().path, [_entry(path) for path in packages.stored()]
    if args.action == "clear":
        running = packages.clear()
    if args.json:
        print(json.dumps({"folder": str(folder), "packages": found}, indent=1))
        return 0
    size = sum(entry["bytes"] for entry in found) / _MIB
    print(f"{folder}: {len(found)} compiled networks, {size:.1f} MiB{', removed' if args.action == 'clear' else ''}")
    if running:
        print(f"{running} more are being built and will be there")
    if args.action == "list":
        for entry in found:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["used"]))
            made_for = ", ".join(
                f"{name} {entry.get(name, 'unknown')}" for name in ("shape", "dtype", "weights", "torch")
            )
            print(f"{used} {entry['bytes'] / _MIB:8.1f} MiB  {made_for}")
    return 0


def _entry(path: Path) -> dict[str, Any]:
    from fastddpm.errors import BackendUnavailable
    from fastddpm.machine import packages

    status = path.stat()
    entry: dict[str, Any] = {"file": path.name, "bytes": status.st_size, "used": status.st_mtime}
    with contextlib.suppress(BackendUnavailable):
        entry |= packages.identity_of(path)
    return entry
