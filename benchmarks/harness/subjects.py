"""The subjects by name, in the order in which the report has them."""

from __future__ import annotations

import importlib

from fastddpm.benchmarks.harness.case import Subject

NAMES = ("sampling", "unet", "p_sample", "q_sample", "randn", "training_step", "drop_in")


def find(name: str) -> Subject:
    """Look a subject up.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in NAMES:
        raise ValueError(f"unknown benchmark {name!r}; use one of {', '.join(NAMES)}")
    subject: Subject = importlib.import_module(f"fastddpm.benchmarks.bench_{name}").SUBJECT
    return subject
