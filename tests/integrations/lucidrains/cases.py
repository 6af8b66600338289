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


def seeded_sample(diffusion: Any, **call: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return diffusion.sample(**call), torch.get_rng_state()


def assert_same(ours: Any, theirs: Any, label: Any) -> None:
    ours, theirs = ([value] if isinstance(value, Tensor) else list(value) for value in (ours, theirs))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), label
