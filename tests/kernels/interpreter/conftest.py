"""Tests of the kernels in Triton's interpreter: a process of their own, since it cannot share one with the compiler.

Run with ``TRITON_INTERPRET=1 pytest tests/kernels/interpreter``. In the ordinary run they are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.triton_interpreter)
        if os.environ.get("TRITON_INTERPRET") != "1":
            item.add_marker(
                pytest.mark.skip(reason="runs in its own process: TRITON_INTERPRET=1 pytest tests/kernels/interpreter")
            )
