"""The table of README: that each row is measured, and that both libraries draw digits."""

from __future__ import annotations

import pytest
import torch
from fastddpm.benchmarks import few_steps


def test_every_row_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_steps, "BATCH", 1)
    monkeypatch.setattr(few_steps, "Sampler", lambda *args, compile, **more: _uncompiled(*args, **more))
    seconds = few_steps.measure(many=2, rounds=1, inner=2)
    assert [len(each) for each in seconds.values()] == [1] + [2] * 8
    assert min(min(each) for each in seconds.values()) > 0


def test_few_steps_of_both_draw_the_same_kind_of_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_steps, "Sampler", lambda *args, compile, **more: _uncompiled(*args, **more))
    torch.manual_seed(0)
    _, unipc, sa, fast, _, ours, _, tuned, _ = few_steps.providers(2).values()
    means = [draw().mean() for draw in (unipc, sa, fast, ours, tuned)]  # type: ignore[attr-defined]
    assert max(means) - min(means) < 0.1


def _uncompiled(*args: object, **options: object) -> object:
    from fastddpm.sampling.sampler import Sampler

    return Sampler(*args, compile=False, **options)  # type: ignore[arg-type]
