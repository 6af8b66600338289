"""The UNet as a sampler wants it: same weights, same output to rounding, less work per step.

What does not depend on x_t (the time embedding and its projections in every residual block) is computed once per run
and looked up by row and label; images and weights are channels last; and where compiled code is wanted on a CPU, it
comes from a package whose weights are constants that oneDNN has packed, and a large batch runs in slices whose
activations stay in the cache.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastddpm.errors import BackendUnavailable
from fastddpm.files.run_folder import config_hash
from fastddpm.machine import packages
from fastddpm.machine.building import Job, Want, Wish, build
from fastddpm.machine.torch_compile import compile_call
from fastddpm.unet import fused
from fastddpm.unet.forms import inference_form, use_channels_last, use_channels_last_norms, use_subpixels, use_winograd
from fastddpm.unet.unet import UNet, beside

logger = logging.getLogger("fastddpm")

Denoise = Callable[[Tensor, Tensor], Tensor]

# What the first activation of a slice takes per thread. Slices of 2 and 4 MB were slower, and so were halves of it.
SLICE_BYTES = 1 << 20
# Compiled networks of other batch sizes; each holds weights of its own.
MAX_COMPILED = 8


class UNetForms:
    """Makes a UNet's networks for sampling; what they can share (packed weights, compiled code) is made once.

    Args:
        unet: the network in eval mode, on its device and in its dtype; not changed. Its weights are taken when the
            first image arrives.
        timesteps: [R], what the rows of the table ask for.
        want: how much a run wants compiled code; asked again at each.
        strict: raise where it is wanted now and cannot be had, instead of running uncompiled.
        file: a package to take it from, instead of the cache.
        fuse: normalise by `unet.fused`, for CUDA.
    """

    def __init__(
        self, unet: UNet, timesteps: Tensor, *, want: Want, strict: bool, file: Path | None = None, fuse: bool = False
    ) -> None:
        self.unet, self.timesteps = unet, timesteps
        self._wish, self._fuse = Wish(want, strict, file), fuse
        self._compiled: dict[torch.Size, Denoise] = {}

    def __call__(self, batch: int) -> UNetInference:
        """Return a network for `batch` rows of x."""
        return UNetInference(self, batch)

    def insist(self, compiled: bool) -> None:
        """From now on run compiled code, waiting for it or raising where there is none; or run none."""
        self._wish.insist(compiled)
        if not compiled:
            self._compiled.clear()

    def choose(self, x: Tensor) -> tuple[Denoise, bool]:
        """Return `UNet.denoise` in the form for a run over x, which takes the blocks' time projections side by side.

        Returns:
            The form, and whether it is compiled.
        """
        self.unet.check_image(x)
        part = self._slice(x)
        if part.shape not in self._compiled:
            compiled = None if self._wish.idle else self._compile(part)
            if compiled is None:
                return self._uncompiled, False
            if len(self._compiled) == MAX_COMPILED:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[part.shape] = compiled
        form = self._compiled[part.shape]
        return (form if len(part) == len(x) else functools.partial(in_slices, form, len(part))), True

    @functools.cached_property
    def _uncompiled(self) -> Denoise:
        return cuda_form(self.unet, self._fuse)

    def _slice(self, x: Tensor) -> Tensor:
        """As much of x as compiled code takes at a time."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return x
        return x[: slice_rows(x, self.unet.config.block_out_channels[0])]

    def _compile(self, x: Tensor) -> Denoise | None:
        if x.device.type == "cpu":
            return self._wish.code(self._identity(x), lambda: self.job(x))
        if self._wish.file is not None:
            raise BackendUnavailable(f"{self._wish.file} is code for a CPU, and the model runs on {x.device}")
        form = self._uncompiled
        return compile_call(lambda x, time: form(x, time), strict=self._wish.strict)

    def build(self, x: Tensor, out: Path | None = None) -> Path:
        """Build compiled code for x, into a file or the cache, and return where it is.

        Raises:
            BackendUnavailable: it cannot be built.
        """
        self.unet.check_image(x)
        part = self._slice(x)
        identity = self._identity(part)
        build(identity, lambda: self.job(part), out)
        return packages.path_of(identity) if out is None else out

    def _identity(self, x: Tensor) -> dict[str, str]:
        return packages.identify(
            network=config_hash(self.unet.config.to_dict())[:16],
            weights=self._weights[:16],
            shape="x".join(map(str, x.shape)),
            dtype=str(x.dtype).removeprefix("torch."),
            code=packages.source_digest(Path(__file__).parent, Path(packages.__file__).parent)[:16],
        )

    @functools.cached_property
    def _weights(self) -> str:
        return packages.weights_digest(self.unet)

    def job(self, x: Tensor) -> Job:
        """Return what compiled code for x is made of: the form, and arguments to try it with.

        Raises:
            BackendUnavailable: the weights are no longer those under whose hash it would be kept.
        """
        unet = copy.deepcopy(self.unet)
        if packages.weights_digest(unet) != self._weights:
            raise BackendUnavailable("its weights were changed meanwhile: call Sampler.refresh()")
        form = inference_form(unet)
        use_channels_last_norms(form)
        use_winograd(form, x.shape[0], x.shape[2], x.shape[3])
        use_subpixels(form)
        like = torch.zeros_like(x)
        return Form(form), (like, like.new_zeros(len(x), sum(time_widths(self.unet))))


class Form(nn.Module):
    """A network from `inference_form`, given x and the blocks' time projections side by side."""

    def __init__(self, form: UNet, denoise: Callable[[UNet, Tensor, Sequence[Tensor]], Tensor] = UNet.denoise) -> None:
        super().__init__()
        self.form, self.widths, self.denoise = form, time_widths(form), denoise

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, C, H, W] and [B, sum of the widths] -> [B, C_out, H, W]."""
        return self.denoise(self.form, x, time.split(self.widths, dim=1))


def cuda_form(unet: UNet, fuse: bool) -> Form:
    """Return a network's form for a GPU, with the normalisations of `unet.fused` or PyTorch's."""
    form = inference_form(unet)
    # `fused.denoise` takes a convolution's bias apart from it.
    use_channels_last(form, pack=not fuse)
    return Form(form, fused.denoise if fuse else UNet.denoise)


class UNetInference:
    """A `Network`: one UNet, one batch size, and its run's timesteps and labels."""

    memory_format = torch.channels_last
    reads_t = False
    compiles_step = False

    def __init__(self, forms: UNetForms, batch: int) -> None:
        self._forms, self._batch = forms, batch
        unet, rows = forms.unet, len(forms.timesteps)
        width = sum(time_widths(unet))
        classes = unet.config.num_class_embeds
        # Labels in use: at most one per row of x, and no more than there are.
        self._slots = 1 if classes is None else min(batch, classes)
        like = unet.conv_in.weight
        self._table = like.new_empty(rows, self._slots, width)
        self._time = like.new_empty(batch, width)
        self._slot = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self._index = torch.zeros_like(self._slot)
        self._labels: Tensor | None = None
        self._denoise: Denoise | None = None

    @torch.no_grad()
    def load(self, class_labels: Tensor | None) -> None:
        """Compute every block's time projection for all rows and the labels of the next run."""
        self._denoise = None
        labels = self._forms.unet.labels(class_labels, self._slot)
        labels = torch.zeros_like(self._slot) if labels is None else labels.clone()
        if self._labels is not None and torch.equal(labels, self._labels):
            return
        unique, slot = labels.unique(return_inverse=True)
        self._slot.copy_(slot)
        self._table[:, : len(unique)].copy_(time_table(self._forms.unet, self._forms.timesteps, unique))
        self._labels = labels

    def __call__(self, x: Tensor, t: Tensor, row: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Predict from x [B, C, H, W] at a row [1] of the table; t and class_labels were looked up by `load`."""
        if unknown := kwargs.keys() - {"class_labels", "condition"}:
            raise TypeError(f"the UNet takes class_labels and condition, got {', '.join(sorted(unknown))}")
        x = beside(x, kwargs.get("condition"))
        if self._denoise is None:
            self._denoise, _ = self._forms.choose(x)
        torch.add(self._slot, row, alpha=self._slots, out=self._index)
        torch.index_select(self._table.flatten(0, 1), 0, self._index, out=self._time)
        return self._denoise(x, self._time)

    def settle(self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any], compiled: bool | None) -> bool:
        """Decide for all later runs, see `network.Network`; x may lack the channels of a condition."""
        if compiled is not None:
            self._forms.insist(compiled)
        if (missing := self._forms.unet.config.in_channels - x.shape[1]) > 0 and x.dim() == 4:
            x = beside(x, x.new_zeros(len(x), missing, *x.shape[2:]))
        self._denoise, compiled = self._forms.choose(x)
        if not compiled:
            self._forms.insist(False)
        return compiled


def slice_rows(x: Tensor, channels: int) -> int:
    """How many images of a batch to denoise at a time.

    Args:
        channels: of the activations at x's resolution.

    Returns:
        The size near `SLICE_BYTES` per thread, if need be half or twice that, which divides the batch best.
    """
    image = channels * x.shape[2:].numel() * x.element_size()
    wanted = max(1, SLICE_BYTES * torch.get_num_threads() // image)
    return min(range(wanted // 2 + 1, 2 * wanted + 1), key=lambda rows: (-len(x) % rows, abs(rows - wanted)))


def in_slices(denoise: Denoise, rows: int, x: Tensor, time: Tensor) -> Tensor:
    """Denoise a batch `rows` images at a time; the last slice repeats some of the one before if it has to."""
    parts = []
    for start in range(0, len(x), rows):
        first = min(start, len(x) - rows)
        part = denoise(x[first : first + rows], time[first : first + rows])
        parts.append(part[start - first :])
    return torch.cat(parts)


def time_widths(unet: UNet) -> list[int]:
    """The widths of the residual blocks' time projections."""
    return [resnet.time_emb_proj.out_features for resnet in unet.resnets()]


def time_table(unet: UNet, timesteps: Tensor, labels: Tensor) -> Tensor:
    """Every residual block's projection of the embedding of every timestep and label, side by side.

    Computed in float32 whatever the weights' dtype, and rounded to it once.

    Args:
        timesteps: [R].
        labels: int64 [L]; any single value where the network has no classes.

    Returns:
        [R, L, sum of the widths of the projections] in the weights' dtype.
    """

    def linear(layer: nn.Linear, x: Tensor) -> Tensor:
        return functional.linear(x, layer.weight.float(), layer.bias.float())

    embedding, emb = unet.time_embedding, unet.sinusoids(timesteps)
    temb = linear(embedding.linear_2, functional.silu(linear(embedding.linear_1, emb)))[:, None]  # [R, 1, D]
    if unet.class_embedding is not None:
        temb = temb + unet.class_embedding.weight.float()[labels]
    return torch.cat([linear(r.time_emb_proj, r.act(temb)) for r in unet.resnets()], dim=-1).to(unet.dtype)
