"""A small network and its two diffusions, the original's and ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.integrations.lucidrains import GaussianDiffusion

SIZE = 8
DTYPES = [torch.float32, torch.float64]
PREDICTION = {"pred_noise": "epsilon", "pred_x0": "x_0", "pred_v": "v"}


class Net(nn.Module):
    """A small network whose output depends on every input, on its neighbours and on t."""

    def __init__(self, channels: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.channels = self.out_dim = channels
        self.self_condition = False
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(0.3 * torch.randn(channels, channels, 3, 3, generator=generator))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        h = nn.functional.conv2d(self.dropout(x), self.weight, padding=1)
        return torch.tanh(h + 0.01 * t.float().view(-1, 1, 1, 1)) + 0.5 * x


def options(**changes: Any) -> dict[str, Any]:
    return {"image_size": SIZE, "timesteps": 50, **changes}


def pair(original: Any, **changes: Any) -> tuple[Any, GaussianDiffusion]:
    net = Net().eval()
    return original.GaussianDiffusion(net, **options(**changes)), GaussianDiffusion(net, **options(**changes))


class Cast(Net):
    """Computes in float32, and returns another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return super().forward(x.float(), t).to(self.dtype)


def images(seed: int = 0, batch: int = 4, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def seeded(call: Any, *arguments: Any, **options: Any) -> tuple[Any, Tensor]:
    """Return what a call gives, and the state in which it leaves the global generator."""
    torch.manual_seed(5)
    return call(*arguments, **options), torch.get_rng_state()


def seeded_sample(diffusion: Any, **call: Any) -> tuple[Tensor, Tensor]:
    return seeded(diffusion.sample, **call)


def both(ours: Any, theirs: Any, method: str, *arguments: Any, within: float = 1e-5, **options: Any) -> Tensor:
    """Return ours, after comparing it and the state of the generator with the original's."""
    results, states = [], []
    for diffusion in (theirs, ours):
        # The original adds to noise that it is given.
        own = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
        result, state = seeded(getattr(diffusion, method), *own, **options)
        results.append(result[0] if isinstance(result, tuple) else result)
        states.append(state)
    assert results[1].shape == results[0].shape
    assert relative(results[1], results[0]) <= within, method
    assert torch.equal(*states), method
    return results[1]


def assert_same(ours: Any, theirs: Any, label: Any) -> None:
    ours, theirs = ([value] if isinstance(value, Tensor) else list(value) for value in (ours, theirs))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), label
