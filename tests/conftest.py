"""What every test module shares: GPU tests say why they were skipped."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

# A job that a shell's & or nohup started ignores Ctrl-C, and so would everything that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tensors of tests are too small to share, and threads beyond the cores wait for each other; so do processes of tests.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run: a test that passed here passes there.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled networks of the user are neither used nor added to."""
    os.environ["FASTDDPM_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def still_generators() -> Iterator[None]:
    """The test may not move a global generator."""

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]

    before = states()
    yield
    assert states() == before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
