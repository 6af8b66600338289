"""Start, mask, guidance, condition, dtype, sampler and batch in all pairs, against a plain loop from the papers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastddpm import DiffusionConfig, Sampler
from fastddpm.noise import v1 as noise
from fastddpm.ops.draw import randn
from fastddpm.tables.by_name import make_table

CONFIG = DiffusionConfig(num_timesteps=50, beta_start=1e-3, beta_end=0.2)
ALPHA_BAR = CONFIG.schedule().alphas_cumprod
SHAPE, STEPS, NULL = (2, 4, 5), 8, 3
FACTORS: dict[str, tuple[Any, ...]] = {
    "start": ("noise", "part-way"),
    "mask": (False, True),
    "guidance": ("none", "classes", "interval", "rescale", "gradient"),
    "condition": (False, True),
    "dtype": (torch.float32, torch.bfloat16),
    "sampler": ("ddpm", "ddim", "dpm++2m"),
    "batch": (1, 3),
}


class Net(nn.Module):
    """A smooth network that sees all that it may be given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.null_class = nn.Parameter(torch.tensor(0.7)), NULL

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, condition: Any = None) -> Tensor:
        per_sample = (-1, 1, 1, 1)
        m = self.weight * x + (t / 100).to(x.dtype).reshape(per_sample)
        if class_labels is not None:
            m = m - 0.2 * class_labels.to(x.dtype).reshape(per_sample)
        if condition is not None:
            m = torch.cat([m, condition.to(x.dtype)], dim=1).unflatten(1, (2, -1)).mean(dim=1)
        return torch.tanh(m)


def gradient(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    return (0.3 - 0.2 * x) * (1 + t.reshape(-1, 1, 1, 1) / 50)


def all_pairs() -> list[dict[str, Any]]:
    """Few cases in which any two values of two factors meet: of all cases the one that has most new pairs, in turn."""
    names = list(FACTORS)
    everything = [dict(zip(names, values, strict=True)) for values in itertools.product(*FACTORS.values())]

    def pairs(case: dict[str, Any]) -> set[Any]:
        return set(itertools.combinations(case.items(), 2))

    missing, chosen = set().union(*map(pairs, everything)), []
    while missing:
        chosen.append(max(everything, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def plain_loop(net: Net, case: dict[str, Any], timesteps: list[int], data: dict[str, Tensor]) -> Tensor:
    """float64 but for the network: Ho et al. 2020, Algorithm 2; Song et al. 2021, eq. 12; Lu et al. 2022, Alg. 2."""
    B, seeds = case["batch"], range(case["batch"])
    levels = [*(float(ALPHA_BAR[t]) for t in timesteps), 1.0]

    def draw(step: int, stream: int) -> Tensor:
        return randn((B, *SHAPE), seeds=seeds, step=step, stream=stream).double()

    def forward(x_0: Tensor, i: int) -> Tensor:
        return levels[i] ** 0.5 * x_0.double() + (1 - levels[i]) ** 0.5 * draw(i, noise.STREAM_FORWARD)

    def paste(x: Tensor, i: int) -> Tensor:
        return torch.where(data["mask"], x, forward(data["known"], i)) if case["mask"] else x

    def predict(x: Tensor, t: int, labels: Tensor | None) -> Tensor:
        condition = data["condition"] if case["condition"] else None
        return net(x.to(case["dtype"]), torch.full((B,), t), labels, condition).double()

    x = draw(0, noise.STREAM_X_T) if case["start"] == "noise" else forward(data["init"], 0)
    x, older = paste(x, 0), None
    for i, t in enumerate(timesteps):
        here, after, kind = levels[i], levels[i + 1], case["guidance"]
        eps = predict(x, t, data["labels"] if kind in ("classes", "interval", "rescale") else None)
        if kind in ("classes", "rescale") or (kind == "interval" and 10 <= t <= 35):
            conditional, unconditional = eps, predict(x, t, torch.full((B,), NULL))
            eps = unconditional + 2.0 * (conditional - unconditional)
            if kind == "rescale":  # Lin et al. 2023, section 3.4
                spread = [m.flatten(1).std(dim=1).view(-1, 1, 1, 1) for m in (conditional, eps)]
                eps = 0.7 * eps * spread[0] / spread[1] + 0.3 * eps
        g = gradient(x, torch.full((B,), t)) if kind == "gradient" else torch.zeros_like(x)
        if case["sampler"] != "ddpm":  # Dhariwal & Nichol 2021, Algorithm 2
            eps = eps - (1 - here) ** 0.5 * g
        x_0 = ((x - (1 - here) ** 0.5 * eps) / here**0.5).clamp(-1, 1)
        z, last = draw(i, noise.STREAM_REVERSE), i == len(timesteps) - 1
        if case["sampler"] == "ddpm":
            beta = 1 - here / after
            mean = after**0.5 * beta / (1 - here) * x_0 + (1 - beta) ** 0.5 * (1 - after) / (1 - here) * x
            variance = (1 - after) / (1 - here) * beta
            x = mean + variance * g + variance**0.5 * z  # the former: Dhariwal & Nichol 2021, Algorithm 1
        elif case["sampler"] == "ddim":
            sigma = 0.5 * ((1 - after) / (1 - here) * (1 - here / after)) ** 0.5
            eps = (x - here**0.5 * x_0) / (1 - here) ** 0.5
            x = after**0.5 * x_0 + (1 - after - sigma**2) ** 0.5 * eps + sigma * z
        else:
            D = x_0
            if older is not None and not last:
                lam = [torch.tensor(a / (1 - a), dtype=torch.float64).log() / 2 for a in levels[i - 1 : i + 2]]
                D = x_0 + (x_0 - older) * (lam[2] - lam[1]) / (2 * (lam[1] - lam[0]))
            ratio = ((1 - after) / (1 - here)) ** 0.5
            # alpha_i (exp(-h) - 1) = ratio alpha_{i-1} - alpha_i
            x, older = ratio * x - (ratio * here**0.5 - after**0.5) * D, x_0
        x = paste(x, i + 1)
    return x


@pytest.mark.parametrize("case", all_pairs(), ids=lambda case: "-".join(str(v).split(".")[-1] for v in case.values()))
def test_all_pairs_match_a_plain_loop(case: dict[str, Any]) -> None:
    B, g = case["batch"], torch.Generator().manual_seed(0)
    data = {name: torch.rand(B, *SHAPE, generator=g) * 2 - 1 for name in ("init", "known", "condition")}
    data |= {"mask": torch.rand(B, *SHAPE, generator=g) < 0.5, "labels": torch.arange(B)}
    options = {"eta": 0.5} if case["sampler"] == "ddim" else {}
    strength = 1.0 if case["start"] == "noise" else 0.5
    table = make_table(case["sampler"], CONFIG, steps=STEPS, strength=strength, **options)
    arguments: dict[str, Any] = {"seeds": range(B)}
    if case["start"] == "part-way":
        arguments["init"] = data["init"]
    if case["mask"]:
        arguments |= {"mask": data["mask"], "known": data["known"]}
    if case["condition"]:
        arguments["model_kwargs"] = {"condition": data["condition"]}
    if case["guidance"] in ("classes", "interval", "rescale"):
        arguments |= {"class_labels": data["labels"], "guidance": 2.0}
    if case["guidance"] == "interval":
        arguments["guidance_interval"] = (10, 35)
    if case["guidance"] == "rescale":
        arguments["guidance_rescale"] = 0.7
    if case["guidance"] == "gradient":
        arguments |= {"cond_fn": gradient, "cond_form": "mean" if case["sampler"] == "ddpm" else "epsilon"}
    net = Net().eval().to(case["dtype"])
    x = Sampler(net, table, SHAPE, compile=False).sample(**arguments)
    with torch.no_grad():
        expected = plain_loop(net, case, table.timesteps.tolist(), data)
    # In bfloat16 a network's input may round to a neighbour, 2^-8 away.
    atol = 1e-5 if case["dtype"] == torch.float32 else 0.02
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=atol)
