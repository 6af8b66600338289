"""The UNet's inference form computes what the UNet computes, from static buffers, compiled once per size."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastddpm import Sampler, Schedule, UNet, UNetConfig, ddpm_table
from fastddpm.errors import BackendUnavailable
from fastddpm.machine import building, torch_compile
from fastddpm.machine.building import Job, Want
from fastddpm.machine.torch_compile import compile_call
from fastddpm.sampling.network import Network, sampling_networks
from fastddpm.unet import forms as unet_forms
from fastddpm.unet import inference as unet_inference
from fastddpm.unet.forms import (
    PackedConv2d,
    ShiftedResnetBlock,
    inference_form,
    is_plain,
    packs,
    use_channels_last,
    use_channels_last_norms,
    use_subpixels,
    use_winograd,
)
from fastddpm.unet.inference import (
    Denoise,
    UNetForms,
    UNetInference,
    in_slices,
    slice_rows,
    time_table,
    time_widths,
)
from tests.sampling.test_sampler import with_tape
from tests.unet.test_unet import SMALL, VARIANTS, random_inputs, relative_l2, small_unet

TOLERANCE = 1e-5  # relative L2 of eps in float32
TABLE = ddpm_table(Schedule.linear(50, 1e-3, 0.2), steps=4)
CONDITIONAL = {"num_class_embeds": 5, "null_class": 4}
SHAPE = (2, 16, 16)


def network_of(model: UNet, timesteps: Tensor, batch: int) -> Any:
    return sampling_networks(model, timesteps, want=Want.NEVER, strict=True)(batch)


@pytest.mark.parametrize(
    "config",
    [
        *(pytest.param(UNetConfig(**{**SMALL, **changes}), id=name) for name, changes in VARIANTS.items()),
        pytest.param(UNetConfig.digits(), id="digits"),
    ],
)
@torch.no_grad()
def test_form_matches_the_unet_at_every_row(config: UNetConfig) -> None:
    torch.manual_seed(0)
    model = UNet(config, zero_init=False).eval()
    x, _, labels = random_inputs(config, batch=3)
    timesteps = torch.tensor([999, 500, 1, 0])
    network = network_of(model, timesteps, 3)
    assert isinstance(network, UNetInference)
    network.load(labels)
    kwargs = {} if labels is None else {"class_labels": labels}
    x_in = x.contiguous(memory_format=network.memory_format)
    for row, t in enumerate(timesteps):
        eps = network(x_in, t.expand(3), torch.tensor([row]), kwargs)
        assert relative_l2(eps, model(x, t, labels)) < TOLERANCE


@pytest.mark.parametrize("name", ["small", "scale-shift", "padding-0", "mid-scale"])
@torch.no_grad()
def test_winograd_form_matches_the_unet(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(unet_forms, "MIN_TILE_CHANNELS", 1)
    monkeypatch.setattr(unet_forms, "MIN_CHANNELS", 1)
    model = small_unet(**VARIANTS[name])
    x, t, labels = random_inputs(model.config)
    form = inference_form(model)
    use_winograd(form, len(x), x.shape[2], x.shape[3])
    replaced = [type(module).__name__ for module in form.modules() if "Winograd" in type(module).__name__]
    assert replaced.count("WinogradUpsample") == len(model.config.block_out_channels) - 1
    assert replaced.count("WinogradConv2d") >= 2 * len(list(model.resnets()))
    time = model.project_time(model.embed(t, labels))
    assert relative_l2(form.denoise(x, time), model(x, t, labels)) < TOLERANCE


@pytest.mark.parametrize("name", ["small", "scale-shift", "mid-scale"])
@torch.no_grad()
def test_form_with_channels_last_norms_matches_the_unet(name: str) -> None:
    model = small_unet(**VARIANTS[name])
    x, t, labels = random_inputs(model.config)
    form = inference_form(model)
    use_channels_last_norms(form)
    assert not any(isinstance(module, nn.GroupNorm) for module in form.modules())
    assert all(isinstance(resnet, ShiftedResnetBlock) for resnet in form.resnets())
    time = model.project_time(model.embed(t, labels))
    assert relative_l2(form.denoise(x, time), model(x, t, labels)) < TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_subpixel_form_matches_the_unet(name: str) -> None:
    model = small_unet(**VARIANTS[name])
    x, t, labels = random_inputs(model.config)
    form = inference_form(model)
    use_subpixels(form)
    replaced = [type(module).__name__ for module in form.modules()]
    assert replaced.count("SubpixelUpsample") == len(model.config.block_out_channels) - 1
    assert "Upsample" not in replaced
    time = model.project_time(model.embed(t, labels))
    assert relative_l2(form.denoise(x, time), model(x, t, labels)) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_packed_convolution_computes_the_same_whatever_size_it_has_seen(dtype: torch.dtype, tolerance: float) -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1).to(dtype)
    if not packs(conv.weight):
        pytest.skip("oneDNN is not there for this dtype")
    packed = PackedConv2d(conv)
    for size in ((2, 4, 8, 8), (1, 4, 16, 16), (2, 4, 8, 8)):
        x = torch.randn(size).to(dtype, memory_format=torch.channels_last)
        y = packed(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        expected = functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), 2, 1)
        assert relative_l2(y, expected) < tolerance


def test_winograd_is_left_out_where_it_does_not_pay() -> None:
    form = inference_form(small_unet())
    use_winograd(form, 2, 16, 16)
    assert not any("Winograd" in type(module).__name__ for module in form.modules())


@torch.no_grad()
def test_form_leaves_the_unet_as_it_is() -> None:
    model = small_unet()
    before = {name: (p.data_ptr(), p.requires_grad, p.stride()) for name, p in model.named_parameters()}
    use_channels_last(inference_form(model))
    assert {name: (p.data_ptr(), p.requires_grad, p.stride()) for name, p in model.named_parameters()} == before


@torch.no_grad()
def test_form_copies_no_weights_but_those_it_merges_or_lays_out() -> None:
    model = small_unet()
    own = {p.data_ptr() for p in model.parameters()}
    form = inference_form(model)
    assert {name for name, p in form.named_parameters() if p.data_ptr() not in own} == {
        name for name, _ in form.named_parameters() if "to_qkv" in name
    }
    use_channels_last(form)
    convolutions = [module for module in form.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions)


@torch.no_grad()
def test_time_table_is_float32_inside_whatever_the_weights_are() -> None:
    model = small_unet(**CONDITIONAL)
    timesteps, labels = torch.tensor([999, 998, 7]), torch.tensor([0, 4])
    exact = time_table(model, timesteps, labels)
    for r, t in enumerate(timesteps):
        for i, label in enumerate(labels):
            want = torch.cat(model.project_time(model.embed(t[None], label[None])), dim=1)[0]
            torch.testing.assert_close(exact[r, i], want, rtol=1e-5, atol=1e-6)
    low = time_table(model.to(torch.bfloat16), timesteps, labels)
    assert low.dtype == torch.bfloat16
    # 998 and 999 are one number in bfloat16; the weights' rounding is the only error left.
    assert not torch.equal(low[0], low[1])
    assert relative_l2(low.float(), exact) < 8e-3


def without_form(model: UNet) -> Callable[..., Tensor]:
    """The same network as a plain callable, which has no form of its own."""
    return lambda x, t, class_labels=None: model(x, t, class_labels)


def test_sampler_with_the_form_draws_the_same_images() -> None:
    model = small_unet(out_channels=2, **CONDITIONAL)
    tape = with_tape(Sampler(model, TABLE, SHAPE, compile=False))
    plain = Sampler(without_form(model), TABLE, SHAPE, compile=False, null_class=4)
    # Other labels, fewer and more different ones, and guidance: one program each for the two batch sizes.
    for call in (
        {"seeds": [1, 2], "class_labels": [0, 1], "guidance": 2.0},
        {"seeds": [3, 4], "class_labels": [3, 3], "guidance": 1.5},
        {"seeds": [3, 4], "class_labels": [4, 2]},
        {"seeds": [5, 6]},
    ):
        assert relative_l2(tape.sample(**call), plain.sample(**call)) < TOLERANCE
    assert len(tape._steps._idle) == 3


def test_refresh_and_noticed_changes_rebuild_the_form() -> None:
    model = small_unet(out_channels=2)
    sampler = Sampler(model, TABLE, SHAPE, compile=False)
    first = sampler.sample(seeds=[1])
    with torch.no_grad():
        model.conv_out.weight.mul_(2.0)
    assert not torch.equal(sampler.sample(seeds=[1]), first)
    model.conv_out.weight.data.div_(2.0)
    sampler.refresh()
    assert torch.equal(sampler.sample(seeds=[1]), first)


def test_steps_of_a_size_share_one_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """No t, seed or label is part of it."""
    built = []

    def obtain(identity: dict[str, str], want: Want, job: Callable[[], Job]) -> Denoise:
        assert want is Want.NOW
        built.append(identity["shape"])
        form, (x, _) = job()
        assert x.is_contiguous(memory_format=torch.channels_last)
        return form

    monkeypatch.setattr(building, "obtain", obtain)
    model = small_unet(out_channels=2, **CONDITIONAL)
    compiled = Sampler(model, TABLE, SHAPE, compile=True)
    eager = Sampler(model, TABLE, SHAPE, compile=False)
    for call in (
        {"seeds": [1, 2], "class_labels": [0, 1]},
        {"seeds": [2**63, 0], "class_labels": [3, 3]},
        {"seeds": [5, 6]},
        {"seeds": [7, 7], "return_x0": True},
        {"seeds": [1], "class_labels": [2], "guidance": 3.0},
    ):
        got, want = compiled.sample(**call), eager.sample(**call)
        assert relative_l2(got[0], want[0]) < TOLERANCE
    assert built == ["2x2x16x16"]


def test_a_condition_belongs_to_the_compiled_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is decided before the condition is there."""
    built = []

    def obtain(identity: dict[str, str], want: Want, job: Callable[[], Job]) -> Denoise:
        built.append(identity["shape"])
        form, (x, _) = job()
        assert x.is_contiguous(memory_format=torch.channels_last)
        return form

    monkeypatch.setattr(building, "obtain", obtain)
    model = small_unet(in_channels=5, out_channels=2)
    compiled, eager = (Sampler(model, TABLE, SHAPE, compile=choice) for choice in (True, False))
    call = {"seeds": [1, 2], "model_kwargs": {"condition": torch.randn(2, 3, 16, 16)}}
    assert compiled.settle(**call)
    assert relative_l2(compiled.sample(**call), eager.sample(**call)) < TOLERANCE
    assert built == ["2x5x16x16"]


def one_level_unet(channels: int) -> UNet:
    """Without attention: few kernels to compile."""
    config = UNetConfig(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(channels,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        add_attention=False,
        attention_head_dim=None,
    )
    torch.manual_seed(0)
    return UNet(config, zero_init=False).eval()


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_compiled_winograd_form_keeps_channels_innermost(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Or its loops are scalar: Inductor chooses layouts of its own, and takes dimensions of 1 for channels."""
    utils = pytest.importorskip("torch._inductor.utils", reason="generated code cannot be read in this torch")
    monkeypatch.setattr(unet_forms, "MIN_TILE_CHANNELS", 1)
    model = one_level_unet(channels := 64)
    x, t, _ = random_inputs(model.config, batch=batch)
    form, _ = UNetForms(model, t, want=Want.NEVER, strict=True).job(x)
    # One block has all kinds of layouts.
    block, h, time = form.form.mid_block.resnets[0], torch.zeros(batch, channels, 8, 8), torch.zeros(batch, channels)
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    # The Python that calls the kernels can be read, and no C++ compiler need see them; a package has the same layouts.
    with torch._inductor.config.patch(freezing=True, fx_graph_cache=False):
        codes = utils.get_code(compiled, h.contiguous(memory_format=torch.channels_last), time)
    found = re.findall(r"empty_strided_cpu\((\([^)]*\)), (\([^)]*\))", "".join(codes))
    layouts = {(ast.literal_eval(size), ast.literal_eval(stride)) for size, stride in found}
    activations = {layout for layout in layouts if torch.Size(layout[0]).numel() >= batch * channels * 64}
    assert len(activations) >= 4  # padded image, rows, tiles and products
    for size, stride in activations:
        innermost = next(n for n, step in zip(size, stride, strict=True) if step == 1 and n > 1)
        assert innermost % channels == 0, f"{size} is laid out {stride}"


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 7])
@torch.no_grad()
def test_slices_of_a_batch_are_the_batch(batch: int) -> None:
    model = small_unet(**CONDITIONAL)
    x, t, labels = random_inputs(model.config, batch=batch)
    time = torch.cat(model.project_time(model.embed(t, labels)), dim=1)
    sizes = []

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        sizes.append(len(x))
        return model.denoise(x, time.split(time_widths(model), dim=1))

    rows = min(batch, 2)
    sliced = in_slices(denoise, rows, x, time)
    assert relative_l2(sliced, model(x, t, labels)) < TOLERANCE
    assert sizes == [rows] * -(-batch // rows)


@pytest.mark.parametrize(
    ("batch", "rows"),
    [(1, 1), (3, 3), (4, 4), (5, 5), (6, 3), (7, 7), (8, 4), (10, 5), (13, 7), (16, 4), (17, 3), (64, 4)],
)
def test_slices_have_a_mebibyte_a_thread_or_what_divides_the_batch(
    monkeypatch: pytest.MonkeyPatch, batch: int, rows: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = torch.empty(batch, 3, 32, 32)
    assert min(batch, slice_rows(x, 128)) == rows


def test_compiled_float32_batches_share_the_form_of_their_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def obtain(identity: dict[str, str], want: Want, job: Callable[[], Job]) -> Denoise:
        built.append(identity["shape"])
        return job()[0]

    monkeypatch.setattr(unet_inference, "SLICE_BYTES", 1)
    monkeypatch.setattr(building, "obtain", obtain)
    model = small_unet()
    timesteps = torch.tensor([5])
    forms = UNetForms(model, timesteps, want=Want.NOW, strict=True)
    x, _, _ = random_inputs(model.config, batch=4)
    for batch in (4, 2):
        network = forms(batch)
        network.load(None)
        with torch.no_grad():
            eps = network(x[:batch], timesteps.expand(batch), torch.tensor([0]), {})
            assert relative_l2(eps, model(x[:batch], timesteps.expand(batch))) < TOLERANCE
    assert built == ["1x2x16x16"]


def hooked(model: UNet) -> None:
    model.mid_block.register_forward_hook(lambda module, args, output: output)


def patched(model: UNet) -> None:
    model.conv_out.forward = lambda x: x  # type: ignore[method-assign, assignment]


def replaced(model: UNet) -> None:
    class Adapter(nn.Conv2d):
        pass

    model.conv_in = Adapter(2, 8, 3, padding=1)


@pytest.mark.parametrize("change", [hooked, patched, replaced, nn.Module.train])
def test_altered_unet_runs_as_it_is(change: Callable[[UNet], None]) -> None:
    model = small_unet()
    change(model)
    assert isinstance(network_of(model, TABLE.timesteps, 2), Network)


def test_form_refuses_what_the_unet_refuses() -> None:
    with pytest.raises(Exception, match="no null class"):
        Sampler(small_unet(num_class_embeds=5), TABLE, SHAPE, compile=False).sample(seeds=[1])
    with pytest.raises(Exception, match="without classes"):
        Sampler(small_unet(), TABLE, SHAPE, compile=False).sample(seeds=[1], class_labels=[1])
    with pytest.raises(Exception, match="multiples of 2"):
        Sampler(small_unet(), TABLE, (2, 16, 15), compile=False).sample(seeds=[1])
    with pytest.raises(Exception, match="takes class_labels and condition, got shift"):
        Sampler(small_unet(), TABLE, SHAPE, compile=False).sample(seeds=[1], model_kwargs={"shift": 1})


def test_form_is_not_taken_with_a_part_in_training() -> None:
    model = small_unet(out_channels=2, dropout=0.5).eval()
    sampler = Sampler(model, TABLE, SHAPE, compile=False)
    assert torch.equal(sampler.sample(seeds=[1]), sampler.sample(seeds=[1]))
    model.mid_block.train()
    assert not is_plain(model)
    assert not torch.equal(sampler.sample(seeds=[1]), sampler.sample(seeds=[1]))


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo alone: it traces, and PyTorch runs what it found."""
    # The fused operations stay as they are: once compiled, they are kept for the tests to come.
    monkeypatch.setattr(torch_compile, "has_cpp_compiler", lambda: False)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, **options, backend="eager"))


def test_functions_of_one_text_compile_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch)

    def times(factor: float) -> Callable[[Tensor], Tensor]:
        return compile_call(lambda x: x * factor, strict=True)

    with torch._dynamo.config.patch(recompile_limit=1):
        assert [times(factor)(torch.ones(1)).item() for factor in (1.0, 2.0, 3.0)] == [1.0, 2.0, 3.0]


def test_model_of_too_many_forms_runs_uncompiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_compiler(monkeypatch)

    def scale(x: Tensor, by: int) -> Tensor:
        return x * by

    with torch._dynamo.config.patch(recompile_limit=1):
        for strict in (False, True):
            call = compile_call(scale, strict=strict, dynamic=False)
            torch._dynamo.reset()
            assert call(torch.ones(1), 2).item() == 2.0
            if strict:
                with pytest.raises(BackendUnavailable, match="recompile"):
                    call(torch.ones(1), 3)
            else:
                assert call(torch.ones(1), 3).item() == 3.0
    assert "the model runs uncompiled" in caplog.text


def test_compile_failure_says_what_the_compiler_said_and_names_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("out of registers")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, **options, backend=backend))
    advice = f"if {torch_compile.inductor_cache().path} is damaged, remove it or set TORCHINDUCTOR_CACHE_DIR"
    with pytest.raises(BackendUnavailable, match=f"out of registers; {advice}"):
        compile_call(torch.neg, strict=True)(torch.ones(1))


def test_compile_failure_warns_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return -x

    call = compile_call(breaks, strict=False)
    with caplog.at_level(logging.WARNING, logger="fastddpm"):
        assert [call(torch.ones(1)).item() for _ in range(2)] == [-1.0, -1.0]
    assert len(caplog.records) == 1
