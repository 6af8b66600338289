"""A sampler made once follows its model, however weights and layers are changed; the oracle is a sampler made anew."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import diffusers
import ema_pytorch
import pytest
import torch
from torch import Tensor, nn

from fastddpm import Sampler, Schedule, UNet, UNetConfig, ddpm_table
from fastddpm.sampling import changes
from fastddpm.sampling.changes import checksum, modules_of, structure

TABLE = ddpm_table(Schedule.linear(50, 1e-3, 0.2), steps=3)
SHAPE = (3, 8, 8)


def unet() -> UNet:
    """A network whose form for sampling copies some weights, shares others and tabulates the time embedding."""
    config = UNetConfig(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,),
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
    )
    torch.manual_seed(0)
    return UNet(config, zero_init=False).eval()


class Convolution(nn.Module):
    """A network without a form of its own; in another dtype it is a copy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("shift", torch.zeros(3, 1, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv_out(x) + self.shift


def optimizer_step(model: nn.Module, **options: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    model(torch.ones(2, *SHAPE), torch.tensor([3, 4])).square().mean().backward()
    optimizer.step()


def load(model: nn.Module) -> None:
    model.load_state_dict({name: 0.5 * tensor for name, tensor in model.state_dict().items()})


def write_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(2)


def negate_data(model: nn.Module) -> None:
    """The sign of every second number alone, an even number of them: integer sums of 64-bit words cancel."""
    for p in model.parameters():
        p.data.flatten()[1::2].neg_()


def swap_filters(model: Any) -> None:
    model.conv_out.weight.data[[0, 1]] = model.conv_out.weight.data[[1, 0]].clone()


def one_weight(model: Any) -> None:
    model.conv_out.weight.data[0, 0, 0, 0] += 0.5


def replace_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = 2 * p.data


def copy_under_no_grad(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(2 * p)


def write_detached(model: nn.Module) -> None:
    for p in model.parameters():
        p.detach().numpy()[...] *= 2


def average_by_hand(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    write_data(other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.data.lerp_(q.data, 0.3)


def average_of_diffusers(model: nn.Module) -> None:
    ema = diffusers.training_utils.EMAModel(model.parameters(), decay=0.5)
    write_data(model)
    ema.step(model.parameters())
    ema.store(model.parameters())
    ema.copy_to(model.parameters())


def average_of_ema_pytorch(model: nn.Module) -> None:
    ema = ema_pytorch.EMA(copy.deepcopy(model), ema_model=model, beta=0.5, update_after_step=0, update_every=1)
    write_data(ema.model)
    ema.update()
    ema.update()


def convert_and_back(model: nn.Module) -> None:
    write_data(model.to(torch.bfloat16))
    model.to(torch.float32)


def replace_layer(model: Any) -> None:
    model.conv_out = nn.Conv2d(model.conv_out.in_channels, 3, 3, padding=1)


def hook(model: Any) -> None:
    model.conv_out.register_forward_hook(lambda module, args, output: 0.5 * output)


def replace_forward(model: Any) -> None:
    model.conv_out.forward = lambda x: x[:, :3]


def pad_circularly(model: Any) -> None:
    model.conv_out.padding_mode = "circular"


CHANGES: list[Callable[[Any], None]] = [
    optimizer_step,
    functools.partial(optimizer_step, fused=True),
    load,
    write_data,
    negate_data,
    swap_filters,
    one_weight,
    replace_data,
    copy_under_no_grad,
    write_detached,
    average_by_hand,
    average_of_diffusers,
    average_of_ema_pytorch,
    convert_and_back,
    replace_layer,
    hook,
    replace_forward,
    pad_circularly,
]


def name_of(change: Any) -> str:
    return f"fused_{change.func.__name__}" if isinstance(change, functools.partial) else change.__name__


@pytest.mark.parametrize("change", CHANGES, ids=name_of)
@pytest.mark.parametrize(
    ("build", "dtype"),
    [(unet, torch.float32), (unet, torch.bfloat16), (Convolution, torch.bfloat16)],
    ids=["unet", "unet-bfloat16", "copy-bfloat16"],
)
def test_a_sampler_follows_every_change(
    build: Callable[[], nn.Module], dtype: torch.dtype, change: Callable[[Any], None]
) -> None:
    model = build().eval()
    s = Sampler(model, TABLE, SHAPE, dtype=dtype, compile=False)
    before = s.sample(seeds=[1])
    change(model)
    after = s.sample(seeds=[1])
    assert torch.equal(after, Sampler(model, TABLE, SHAPE, dtype=dtype, compile=False).sample(seeds=[1]))
    assert not torch.equal(after, before)


def test_a_sampler_follows_an_average_put_in_and_taken_out_again() -> None:
    model = unet()
    s = Sampler(model, TABLE, SHAPE, compile=False)
    own = s.sample(seeds=[1])
    ema = diffusers.training_utils.EMAModel(model.parameters(), decay=0.5)
    for shadow in ema.shadow_params:
        shadow.mul_(2)
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    assert not torch.equal(s.sample(seeds=[1]), own)
    ema.restore(model.parameters())
    assert torch.equal(s.sample(seeds=[1]), own)


def test_nothing_is_built_again_where_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    s = Sampler(unet(), TABLE, SHAPE, compile=False)
    expected = s.sample(seeds=[1])
    monkeypatch.setattr(s._steps, "_build", None)
    assert torch.equal(s.sample(seeds=[1]), expected)


def test_shared_or_frozen_weights_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "checksum", None)
    model = unet()
    frozen = Sampler(model, TABLE, SHAPE, compile=False, frozen=True)
    first = frozen.sample(seeds=[1])
    assert torch.equal(frozen.sample(seeds=[1]), first)
    write_data(model)
    frozen.refresh()
    assert not torch.equal(frozen.sample(seeds=[1]), first)


def test_checksum_sees_every_bit() -> None:
    sizes = (3, 1000, 2048 * 3 + 5, 2**15 + 7)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8):
        tensors = [torch.ones(size, dtype=dtype) for size in sizes]
        before = checksum(tensors)
        assert all(map(torch.equal, before, checksum(tensors)))
        for tensor in tensors:
            memory = tensor.view(torch.uint8)
            for i, bit in itertools.product((0, len(memory) // 2, len(memory) - 1), (1, 128)):
                memory[i] ^= bit
                assert not all(map(torch.equal, before, checksum(tensors))), (dtype, len(tensor), i, bit)
                memory[i] ^= bit


def test_checksum_of_weights_that_are_not_numbers_equals_itself() -> None:
    weights = torch.full((2**15,), float("nan"))
    assert all(map(torch.equal, checksum([weights]), checksum([weights])))


def test_sums_on_a_gpu_see_a_flipped_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two signs in one sum; with the arithmetic of a GPU, run here."""
    weights = torch.randn(2**14, generator=torch.Generator().manual_seed(0))
    memory = weights.view(torch.uint8)
    before = changes._wide_sums(memory)
    weights[[1, 3]] *= -1
    assert not torch.equal(before, changes._wide_sums(memory))


def test_modules_are_found_in_what_calls_them() -> None:
    net = Convolution()

    class Wrapper:
        def __init__(self) -> None:
            self.net = net

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return self.net(x, t)

    def helper(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t)

    callables = [net, net.forward, Wrapper(), Wrapper().__call__, functools.partial(net), lambda x, t: helper(x, t)]
    assert all(modules_of(model) == list(net.modules()) for model in callables)
    assert modules_of(torch.sin) == []


def test_structure_stays_the_same_when_a_model_keeps_a_state() -> None:
    net: Any = Convolution()
    before = structure(net)
    net.seen = torch.ones(2)
    assert structure(net) == before
    net.act = torch.relu
    assert structure(net) != before
