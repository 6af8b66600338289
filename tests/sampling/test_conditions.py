"""Conditions beyond classes, and their null for guidance, against the paper's loop with two calls written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddpm
from fastddpm import Sampler, Schedule, ddpm_table, reference
from fastddpm.noise import v1 as noise
from fastddpm.ops.draw import randn
from fastddpm.sampling import network
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.unet.inference import UNetInference
from tests.tiny import tiny_unet

SCHEDULE = Schedule.linear(50, 1e-3, 0.2)
TABLE = ddpm_table(SCHEDULE, steps=6)
SEEDS = [3, 4]
# Six steps of about ten roundings each, on values of size 1.
TOLERANCE = 5e-6


class Conditioned(nn.Module):
    """A network that a vector, a number, a label and further channels condition."""

    null_class = 5

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.75))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        class_labels: Tensor | None = None,
        vector: Tensor | None = None,
        number: Any = None,
        channels: Tensor | None = None,
    ) -> Tensor:
        m = x * self.weight / (1 + x.abs()) + (t.to(x.dtype) / 64)[:, None, None, None]
        if class_labels is not None:
            m = m - 0.25 * class_labels.to(x.dtype)[:, None, None, None]
        if vector is not None:
            m = m + vector.to(x.dtype).mean(dim=1)[:, None, None, None]
        if number is not None:
            m = m * (1 + torch.as_tensor(number, dtype=x.dtype).reshape(-1, 1, 1, 1))
        return m if channels is None else m + 0.5 * channels.to(x.dtype).mean(dim=1, keepdim=True)


def drawn(shape: tuple[int, ...], steps: int) -> tuple[Tensor, Tensor]:
    x_T = randn((len(SEEDS), *shape), seeds=SEEDS, stream=noise.STREAM_X_T)
    z = torch.stack([randn((len(SEEDS), *shape), seeds=SEEDS, step=i) for i in range(steps)])
    return x_T.double(), z.double()


def by_hand(
    model: Callable[..., Tensor], w: float, given: dict[str, Any], null: dict[str, Any]
) -> Callable[..., Tensor]:
    """Ho & Salimans 2022, eq. 6: two calls."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        m_u = model(x, t, **null)
        return m_u + w * (model(x, t, **given) - m_u)

    return predict


VECTOR = torch.tensor([[0.1, -0.3, 0.5], [0.2, 0.0, -0.4]])
MULTI_HOT = torch.tensor([[1, 0, 1], [0, 1, 1]])
CHANNELS = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(1))
EMPTY = torch.tensor([0.7, 0.8, -0.9])
# Arguments, their null as it is passed, and what it means for each sample.
NULLS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "vector-number": ({"vector": VECTOR}, {"vector": 0.5}, {"vector": torch.full_like(VECTOR, 0.5)}),
    "vector-tensor": ({"vector": VECTOR}, {"vector": EMPTY}, {"vector": EMPTY.expand(2, 3)}),
    "vector-function": ({"vector": VECTOR}, {"vector": torch.zeros_like}, {"vector": torch.zeros_like(VECTOR)}),
    "vector-rows": ({"vector": VECTOR}, {"vector": VECTOR.flip(0)}, {"vector": VECTOR.flip(0)}),
    "multi-hot": ({"vector": MULTI_HOT}, {"vector": 0}, {"vector": torch.zeros_like(MULTI_HOT)}),
    "float": ({"number": 0.25}, {"number": -0.5}, {"number": torch.full((2,), -0.5)}),
    "float-tensor": ({"number": torch.tensor(0.25)}, {"number": 0.0}, {"number": torch.zeros(2)}),
    "channels": ({"channels": CHANNELS}, {"channels": 0.0}, {"channels": torch.zeros_like(CHANNELS)}),
    "one-of-two": (
        {"vector": VECTOR, "channels": CHANNELS},
        {"vector": 0.0},
        {"vector": torch.zeros_like(VECTOR), "channels": CHANNELS},
    ),
}


@pytest.mark.parametrize("labels", [False, True], ids=["alone", "with-labels"])
@pytest.mark.parametrize("case", NULLS)
def test_guidance_takes_a_null_for_any_argument(case: str, labels: bool) -> None:
    given, null, meant = NULLS[case]
    model = Conditioned().eval()
    sampler = Sampler(model, TABLE, (3, 5, 7), compile=False)
    got = sampler.sample(
        seeds=SEEDS, class_labels=[0, 2] if labels else None, guidance=2.5, model_kwargs=given, null_kwargs=null
    )
    if labels:
        given = {**given, "class_labels": torch.tensor([0, 2])}
        meant = {**meant, "class_labels": torch.tensor([5, 5])}
    x_T, z = drawn((3, 5, 7), len(TABLE))
    exact = reference.p_sample_loop(
        by_hand(model.double(), 2.5, given, meant), x_T, SCHEDULE, timesteps=TABLE.timesteps, z=z
    )
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=TOLERANCE)


def test_null_of_an_argument_leaves_labels_without_a_null_class() -> None:
    model = Conditioned().eval()
    model.null_class = None  # type: ignore[assignment]
    given, labels = {"vector": VECTOR}, torch.tensor([0, 2])
    got = Sampler(model, TABLE, (3, 5, 7), compile=False).sample(
        seeds=SEEDS, class_labels=labels, guidance=2.0, model_kwargs=given, null_kwargs={"vector": 0.0}
    )
    meant = {"vector": torch.zeros_like(VECTOR), "class_labels": labels}
    predict = by_hand(model.double(), 2.0, {**given, "class_labels": labels}, meant)
    x_T, z = drawn((3, 5, 7), len(TABLE))
    exact = reference.p_sample_loop(predict, x_T, SCHEDULE, timesteps=TABLE.timesteps, z=z)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"model_kwargs": {"vector": VECTOR}}, "needs class_labels, or null_kwargs="),
        ({"null_kwargs": {"vector": 0}}, "'vector', which model_kwargs has not"),
        (
            {"model_kwargs": {"vector": VECTOR[:1]}, "null_kwargs": {"vector": 0}},
            r"tensor of 2 rows, got shape \[1, 3\]",
        ),
        ({"model_kwargs": {"vector": "text"}, "null_kwargs": {"vector": ""}}, "tensor of 2 rows, got str"),
        ({"model_kwargs": {"vector": VECTOR}, "null_kwargs": {"vector": torch.zeros(4)}}, r"not broadcast to \[2, 3\]"),
        ({"model_kwargs": {"vector": VECTOR}, "null_kwargs": {"vector": "text"}}, r"not broadcast to \[2, 3\]"),
    ],
)
def test_nulls_that_do_not_fit_are_refused(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(Conditioned().eval(), TABLE, (3, 5, 7), compile=False).sample(seeds=SEEDS, guidance=2.0, **call)


@pytest.mark.parametrize("w", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unet_with_a_condition_keeps_its_form(dtype: torch.dtype, w: float) -> None:
    unet = tiny_unet(in_channels=3)
    condition = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(unet, TABLE, (1, 8, 8), dtype=dtype, compile=False)
    call = {"model_kwargs": {"condition": condition}, "null_kwargs": {"condition": 0.0}, "guidance": w}
    assert sampler.settle(seeds=SEEDS, **call) is False
    got = sampler.sample(seeds=SEEDS, **call)
    assert isinstance(sampler._steps._idle[0].network, UNetInference)
    double = tiny_unet(in_channels=3).double()

    def beside(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return double(torch.cat([x, c.double()], dim=1), t)

    predict = by_hand(beside, w, {"c": condition}, {"c": torch.zeros_like(condition)})
    x_T, z = drawn((1, 8, 8), len(TABLE))
    exact = reference.p_sample_loop(predict, x_T, SCHEDULE, timesteps=TABLE.timesteps, z=z)
    error = (got.double() - exact).norm() / exact.norm()
    assert error < (2e-6 if dtype == torch.float32 else 0.02)
    # The network alone says the same.
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(unet(x, 3, condition=condition), unet(torch.cat([x, condition], dim=1), 3))


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_shape_of_a_conditioned_unet_is_its_samples(variance: str) -> None:
    model = tiny_unet(in_channels=7, out_channels=2 if variance == "learned_range" else 1)
    model.diffusion = DiffusionConfig(beta_schedule="cosine", num_timesteps=20, variance_type=variance)
    condition = torch.randn(5, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    arguments: dict[str, Any] = {"steps": 3, "sampler": "ddpm"}
    whole = fastddpm.sample(model, seeds=range(5), batch_size=2, model_kwargs={"condition": condition}, **arguments)
    assert whole.shape == (5, 1, 8, 8)
    for i in range(5):
        one = fastddpm.sample(model, seeds=[i], model_kwargs={"condition": condition[i : i + 1]}, **arguments)
        torch.testing.assert_close(one[0], whole[i], rtol=0, atol=1e-5)
    assert network.shape_of(tiny_unet(in_channels=3, out_channels=6)) == (3, 8, 8)


def test_condition_that_does_not_fit_is_named() -> None:
    sampler = Sampler(tiny_unet(in_channels=3), TABLE, (1, 8, 8), compile=False)
    with pytest.raises(Exception, match=r"pass the other channels as condition="):
        sampler.sample(seeds=[1])
    with pytest.raises(Exception, match=r"condition must be \[1, channels, 8, 8\], got \[1, 2, 4, 4\]"):
        sampler.sample(seeds=[1], model_kwargs={"condition": torch.zeros(1, 2, 4, 4)})
