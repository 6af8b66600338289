"""EMA against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastddpm.training.ema import EMA


def _set(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


def test_update_follows_the_warmed_up_recurrence() -> None:
    model = nn.Linear(3, 2)
    _set(model, 1.0)
    ema = EMA(model, decay=0.5)
    expected = 1.0
    for n in range(12):
        value = float((-1) ** n * n)
        _set(model, value)
        ema.update(n)
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * value
    for average in ema.weights.values():
        torch.testing.assert_close(average.double(), torch.full_like(average, expected).double(), rtol=1e-5, atol=1e-6)


def test_update_leaves_the_model_alone() -> None:
    model = nn.Linear(3, 2)
    _set(model, 0.0)
    ema = EMA(model, decay=0.9)
    _set(model, 1.0)
    ema.update(0)
    assert all(torch.equal(p, torch.ones_like(p)) for p in model.parameters())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_init_refuses_a_decay_outside_its_range(decay: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        EMA(nn.Linear(1, 1), decay)
