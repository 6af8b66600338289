"""DDPMPipeline and DDIMPipeline of diffusers with the whole loop in this library's sampler."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Self, Unpack

import torch
from diffusers import DDIMPipeline, DDPMPipeline, ImagePipelineOutput
from torch import Tensor

from fastddpm.checks import number
from fastddpm.integrations.diffusers.fast import NamedAsOriginal
from fastddpm.integrations.diffusers.loop import Generators, draw_like, predictor, step_by_step
from fastddpm.integrations.diffusers.native_unet import native_unet, shares_parameters
from fastddpm.integrations.diffusers.schedulers import FAST_FORM, fast_scheduler
from fastddpm.integrations.kept_samplers import KeptSamplers
from fastddpm.integrations.shared import NoiseSource, Seeds, check_options, look_through, replay
from fastddpm.ops.operators import DTYPES
from fastddpm.sampling.network import Model, null_class_of
from fastddpm.sampling.options import SamplerArguments
from fastddpm.sampling.sampler import Sampler, StepResult
from fastddpm.tables.table import Table

logger = logging.getLogger("fastddpm")

# Held while a call sets timesteps and takes its copy of them.
_TURN = threading.Lock()

Callback = Callable[[StepResult], None]


class WholeLoop(NamedAsOriginal):
    """Mixin before one of diffusers' unconditional pipelines."""

    unet: Any
    scheduler: Any
    _options: dict[str, Any] | None = None
    _samplers: KeptSamplers | None = None
    _native: tuple[Any, Any] = (None, None)

    def register_modules(self, **modules: Any) -> None:
        """Take the network, from inside DataParallel too, and the scheduler in its fast form."""
        if "scheduler" in modules:
            modules["scheduler"] = fast_scheduler(modules["scheduler"])
        if "unet" in modules:
            modules["unet"] = look_through(modules["unet"])
        super().register_modules(**modules)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a copy makes again: samplers hold locks and graphs."""
        return {name: value for name, value in vars(self).items() if name not in ("_samplers", "_native")}

    def configure(self, **options: Unpack[SamplerArguments]) -> Self:
        """Set further arguments of `Sampler`, those of `SamplerArguments`; return the pipeline itself.

        Raises:
            TypeError: there is no such option.
        """
        check_options(options)
        self._options = dict(options)
        self.refresh()
        return self

    def refresh(self) -> None:
        """Take the weights again; needed after changes in place that leave no trace, see `Sampler.refresh`."""
        if self._samplers is not None:
            self._samplers.clear()

    def _generate(
        self,
        batch_size: int,
        generator: Generators | None,
        num_inference_steps: int,
        seeds: Seeds | None,
        class_labels: int | Sequence[int] | Tensor | None,
        guidance: float,
        callback: Callback | None,
        **step_options: Any,
    ) -> Tensor:
        """Return x_0 [B, ...]."""
        self.scheduler, self.unet = fast_scheduler(self.scheduler), look_through(self.unet)
        has_fast_form = isinstance(self.scheduler, NamedAsOriginal)
        if not has_fast_form:
            raise TypeError(
                f"{type(self).__qualname__} runs {', '.join(kind.__name__ for kind in FAST_FORM)}, got "
                f"{type(self.scheduler).__name__}; use diffusers' own {self._original.__name__} for it"
            )
        null_class = self._check_labels(class_labels, guidance)
        source, x_T = self._start(batch_size, generator, seeds)
        # Threads may share the pipeline: this call's steps are those of its own copy of the scheduler.
        with _TURN:
            self.scheduler.set_timesteps(num_inference_steps)
            scheduler = copy.copy(self.scheduler)
            sampler = self._sampler(scheduler, source, x_T, step_options)
        draws = [scheduler.draws(t, **step_options) for t in scheduler.visited]
        with self.progress_bar(total=len(draws)) as bar:  # type: ignore[attr-defined]

            def after(result: StepResult) -> None:
                bar.update()
                if callback is not None:
                    callback(result)

            if sampler is None:
                x_T, predict = x_T.to(self.unet.dtype), predictor(self.unet, x_T, class_labels, guidance, null_class)
                return step_by_step(predict, scheduler, source, x_T, generator, after, step_options)
            call = {"class_labels": class_labels, "guidance": guidance, "return_x0": callback is not None}
            x = replay(sampler, source, x_T, draws, after, **call)
            return x if callback is None else x[0]

    def _start(self, batch_size: int, generator: Generators | None, seeds: Seeds | None) -> tuple[NoiseSource, Tensor]:
        """Return a call's source of noise and x_T."""
        source = NoiseSource.resolve(None, lambda like: draw_like(like, generator), seeds=seeds)
        if source.batch is not None:
            if generator is not None:
                raise ValueError("noise comes from one source, got seeds and generator; pass one of them")
            if batch_size not in (1, source.batch):
                raise ValueError(f"got {source.batch} seeds for a batch size of {batch_size}; leave batch_size out")
            batch_size = source.batch
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        device = self._execution_device  # type: ignore[attr-defined]
        return source, source.start(torch.empty(shape, device=device, dtype=self.unet.dtype))

    def _check_labels(self, class_labels: Any, guidance: float) -> int | None:
        """Return the label that means "no class", None where there is none."""
        conditional = getattr(self.unet, "class_embedding", None) is not None
        # A forward that somebody replaced may bring labels of its own.
        if conditional and class_labels is None and "forward" not in vars(self.unet):
            raise ValueError("class_labels should be provided: the UNet is class-conditional")
        if class_labels is not None and not conditional:
            raise ValueError("class_labels were given, and the UNet has no class embedding; leave them out")
        null_class = (self._options or {}).get("null_class", null_class_of(self.unet))
        if number("guidance", guidance) != 1.0:
            if class_labels is None:
                raise ValueError(f"guidance needs class_labels, got guidance={guidance} alone; leave it out")
            if null_class is None:
                raise ValueError(
                    "guidance needs the label that means 'no class': pass null_class= to fastddpm.accelerate, or to "
                    "the pipeline's configure"
                )
        return null_class

    def _sampler(
        self, scheduler: Any, source: NoiseSource, x_T: Tensor, step_options: dict[str, Any]
    ) -> Sampler | None:
        """Return the sampler that runs the whole loop, or None where it has to go step by step."""
        if not self._can_replay(scheduler, x_T.device):
            return None
        table: Table = scheduler.as_table(quiet_end=source.key is not None, **step_options)
        model, shape = self._network(), tuple(x_T.shape[1:])
        rows, t = table.rows.numpy().tobytes(), tuple(table.timesteps.tolist())
        key = (id(model), rows, t, shape, self.unet.dtype, str(self.unet.device))
        self._samplers = self._samplers or KeptSamplers()
        return self._samplers.get(
            key, model, table, shape, batch=len(x_T), device=self.unet.device, options=self._options or {}
        )

    def _can_replay(self, scheduler: Any, device: torch.device) -> bool:
        """Whether a table expresses the steps, and the UNet may be called from a captured step."""
        return (
            type(scheduler) in FAST_FORM.values()
            and scheduler.fits_a_table
            and device.type in ("cpu", "cuda")
            and self.unet.dtype in DTYPES
            and getattr(self.unet.config, "class_embed_type", None) is None
            and not hasattr(self.unet, "_hf_hook")
        )

    def _network(self) -> Model:
        """Return this library's form of the UNet where it has one, else the UNet itself."""
        unet, native = self._native
        if unet is not self.unet or (native is not None and not shares_parameters(native, self.unet)):
            native = native_unet(self.unet)
            self._native = (self.unet, native)
        return self.unet if native is None else native

    def _finish(self, x: Tensor, output_type: str | None, return_dict: bool) -> Any:
        images: Any = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)  # type: ignore[attr-defined]
        self.maybe_free_model_hooks()  # type: ignore[attr-defined]
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class FastDDPMPipeline(WholeLoop, DDPMPipeline):
    """`diffusers.DDPMPipeline`, same arguments, files and images, with the whole loop in one sampler.

    On CUDA a step, network included, is captured once and replayed; on the CPU the loop runs without host decisions.
    The state is float32 whatever the UNet's dtype is. A scheduler or network that cannot be replayed (dynamic
    thresholding, a "learned" variance, offloading) runs step by step, with the same arguments.
    """

    _original = DDPMPipeline

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators | None = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        seeds: Seeds | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance: float = 1.0,
        callback: Callback | None = None,
    ) -> Any:
        """Draw images.

        Args:
            batch_size: how many; with `seeds`, their number.
            generator: where noise is drawn from, in diffusers' order, one for all or one per image.
            num_inference_steps: steps per image.
            output_type: "pil", "np" (NHWC) or "pt" (NCHW), in [0, 1].
            return_dict: return an object with images; else a tuple.
            seeds: one seed per image instead of a generator: an image then depends on its own seed alone.
            class_labels: one label for all images or one each.
            guidance: weight w of classifier-free guidance, m = m_u + w (m_c - m_u); 1.0 means none.
            callback: called after each step with a `StepResult`, see `Sampler.sample`.

        Raises:
            ValueError: seeds and a generator are both given, or labels or guidance do not fit the UNet.
            TypeError: the scheduler has no fast form.
            IndexError: fewer generators than images.
        """
        x = self._generate(batch_size, generator, num_inference_steps, seeds, class_labels, guidance, callback)
        return self._finish(x, output_type, return_dict)


class FastDDIMPipeline(WholeLoop, DDIMPipeline):
    """`diffusers.DDIMPipeline`, same arguments, files and images, as `FastDDPMPipeline`."""

    _original = DDIMPipeline

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        seeds: Seeds | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance: float = 1.0,
        callback: Callback | None = None,
    ) -> Any:
        """Draw images; arguments as in `FastDDPMPipeline`.

        Args:
            eta: 0 for the deterministic sampler, 1 for DDPM's noise.
            use_clipped_model_output: take eps from x_t and the clipped x_0.

        Raises:
            ValueError: as in `FastDDPMPipeline`, or the number of generators is not the batch size.
        """
        if not 0.0 <= eta <= 1.0:
            logger.warning("eta should lie in [0, 1], from DDIM to DDPM, got %s", eta)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"got {len(generator)} generators for a batch size of {batch_size}; give one per image")
        step = {"eta": eta, "use_clipped_model_output": bool(use_clipped_model_output)}
        x = self._generate(batch_size, generator, num_inference_steps, seeds, class_labels, guidance, callback, **step)
        return self._finish(x, output_type, return_dict)
