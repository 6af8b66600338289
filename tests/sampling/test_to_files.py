"""What decides the bytes of a run's files is in its manifest."""

from __future__ import annotations

import torch

from fastddpm.sampling.to_files import model_digest


def test_model_digest_sees_every_weight() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    first = model_digest(model)
    assert model_digest(model) == first
    for tensor in model.state_dict().values():
        before = tensor.clone()
        tensor.add_(1)
        assert model_digest(model) != first
        tensor.copy_(before)
    assert model_digest(model) == first
