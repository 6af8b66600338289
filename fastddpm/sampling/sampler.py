"""The sampler: Algorithm 2 of Ho et al. (2020) for any table, as one step that is captured once and replayed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from fastddpm.machine.building import Want
from fastddpm.sampling.network import Model
from fastddpm.sampling.options import resolve_options
from fastddpm.sampling.request import Request, RequestArguments, refuse_unknown, resolve_request
from fastddpm.sampling.state import State, StepResult, origin_of
from fastddpm.sampling.step import StaticStep, explain, raise_if_bad
from fastddpm.sampling.step_pool import StepPool
from fastddpm.tables.table import COLUMN, Table


class Sampler:
    """Draws samples from a model with the steps of a table.

    The model is called as ``model(x, t, **kwargs)`` with x [B, ...] in `dtype` and t [B] on x's device, int64 (float32
    where the table says so); it returns the prediction, shaped like x (twice the channels for a learned variance), as
    a tensor or as an object with ``.sample``. Any nn.Module or callable will do. With labels it is also given
    ``class_labels`` int64 [B]; with guidance all of these are [2B], the conditional half first.

    The state x_t is float32 whatever `dtype` is: only the network runs in low precision. Noise depends on the seed,
    the sample id, the step and the element alone, never on the batch around a sample (a network's own rounding may).

    One sampler may be shared by threads: calls take turns, and an open `steps()` generator has buffers of its own.
    Each call samples from the model as it is then: replaced layers, hooks and methods are noticed, and weights, which
    the fast forms of a network copy, are compared with a checksum, however they were changed (``.data`` too).

    Args:
        model: the network; a module elsewhere, or in another dtype, is copied and converted, never changed.
        table: the steps, e.g. from `ddpm_table`.
        shape: one sample's shape: (C, H, W), or (D,) for points.
        device: where to sample; default the model's.
        dtype: what the network runs in: float32, bfloat16 or float16; default the model's.
        compile: run the model compiled, as one graph. A `UNet` on a CPU is compiled in a process of its own, once:
            its code is kept for later processes (`fastddpm cache`). True waits for that and raises where it fails.
            "auto" compiles on CUDA; on a CPU it uses what is there, builds in the background for later calls when
            `samples_ahead` are half a minute's work, and waits for it when they repay that (`options.REPAYS_AFTER`).
        cuda_graph: replay the step as a CUDA graph. "auto" tries on CUDA and falls back with a warning, True raises.
        backend: "auto", "triton" or "torch", for the fused step.
        null_class: the label that means "no class", for guidance; default the model's.
        self_condition: the argument in which the model takes the last step's estimate of x_0, zeros at first (Chen et
            al. 2023, arXiv:2208.04202); default "x_self_cond" where ``model.self_condition`` is true.
        check_finite: raise SamplingError when a sample has a NaN or Inf, naming step and sample.
        frozen: promise that weights are not changed in place, which saves reading them at the start of each call.
        samples_ahead: how many samples the caller means to draw; only compile="auto" asks.
        compiled: a file with the network's code, from `fastddpm compile`; with compile=True, one that is not there is
            written. It is native code: use no file from somebody whose programs you would not run.
        norm: "fused" runs a `UNet`'s normalisations on CUDA as one kernel each, with the additions before them and the
            activation after them; no GPU has timed it, and the default, "torch", leaves them to torch.compile.

    Raises:
        TypeError: the model cannot be called, or the table is none.
        ValueError: an option is unknown, or does not fit the device.
        BackendUnavailable: backend="triton", and the kernels cannot run there.
    """

    def __init__(
        self,
        model: Model,
        table: Table,
        shape: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compile: bool | str = "auto",
        cuda_graph: bool | str = "auto",
        backend: str = "auto",
        null_class: int | None = None,
        self_condition: str | None = None,
        check_finite: bool = False,
        frozen: bool = False,
        samples_ahead: int = 1,
        compiled: str | os.PathLike[str] | None = None,
        norm: str = "torch",
    ) -> None:
        self.model, self.table = model, table
        self.options = resolve_options(
            model,
            table,
            shape,
            device=device,
            dtype=dtype,
            compile=compile,
            cuda_graph=cuda_graph,
            backend=backend,
            null_class=null_class,
            self_condition=self_condition,
            check_finite=check_finite,
            frozen=frozen,
            samples_ahead=samples_ahead,
            compiled=compiled,
            norm=norm,
        )
        self.shape, self.device = self.options.shape, self.options.device
        self._steps = StepPool(model, table, self.options, self.reverse_step)
        # Plain Python numbers, so that the loop reads nothing back from the device.
        self._timesteps: list[float] = table.timesteps.tolist()
        self._noisy: list[bool] = (table.rows[:, COLUMN["sigma"]] != 0).tolist()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a copy makes again: locks, buffers and graphs."""
        return {name: value for name, value in vars(self).items() if name != "_steps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._steps = StepPool(self.model, self.table, self.options, self.reverse_step)

    def __repr__(self) -> str:
        options = self.options
        how = [str(options.device), str(options.dtype).removeprefix("torch.")]
        how += ["triton" if options.uses_triton else "torch", "compiled" if options.compiles else "uncompiled"]
        how += ["CUDA graph"] if options.uses_graph else []
        model = type(self.model).__name__
        return f"Sampler({model}, {self.table.name!r} of {len(self.table)} steps, shape {self.shape}, {', '.join(how)})"

    @staticmethod
    def reverse_step(step: StaticStep) -> None:
        """The body of Algorithm 2's loop, captured once as a graph on CUDA: x_{t-1} ~ p_theta(x_{t-1} | x_t)."""
        m = step.predict()  # eps_theta(x_t, t)
        # x_{t-1} = mu_theta(x_t, t) + sigma_t z; the default sampler has sigma_t = 0, and draws x_T only
        step.update(m)
        step.next_row()
        step.paste()  # x_{t-1} ~ q(x_{t-1} | known) where data are known

    def _loop(self, step: StaticStep, request: Request, state: State | None = None) -> Iterator[StepResult[Any]]:
        """Algorithm 2 (Ho et al. 2020), or the rest of it from a state on."""
        origin = functools.cache(lambda: origin_of(self.model, self.table, self.options))
        step.load(request)  # x_T ~ N(0, I)
        first = 0 if state is None else state.restore(step)
        for i, t in enumerate(self._timesteps[first:], first):  # for t = T, ..., 1
            with explain(f"step {i} of {len(self._timesteps)} (t = {t})", step.key, self.options):
                if step.z is not None and request.draw is not None and self._noisy[i]:
                    step.z.copy_(request.draw(i))  # z ~ N(0, I), where the caller draws it
                self._steps.replay(step)  # `reverse_step`
            yield StepResult(i, t, step.x_t, step.x0, functools.partial(State.of, step, request, i + 1, origin))
        if step.first_bad is not None:
            raise_if_bad(step.first_bad.tolist(), self._timesteps, request)

    @overload
    def sample(
        self,
        *,
        callback: Callable[[StepResult[None]], None] | None = None,
        return_x0: Literal[False] = False,
        **arguments: Unpack[RequestArguments],
    ) -> Tensor: ...

    @overload
    def sample(
        self,
        *,
        callback: Callable[[StepResult[Tensor]], None] | None = None,
        return_x0: Literal[True],
        **arguments: Unpack[RequestArguments],
    ) -> tuple[Tensor, Tensor]: ...

    def sample(
        self,
        *,
        callback: Callable[[StepResult[Any]], None] | None = None,
        return_x0: bool = False,
        **arguments: Unpack[RequestArguments],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw samples: x_T ~ N(0, I), then one step per row of the table.

        Noise comes from exactly one of `seeds`, `seed` with `sample_ids`, `generator`, or `noise`.

        Args:
            seeds: one seed per sample; equal seeds give equal samples. An int is one sample.
            seed: one seed for all, told apart by `sample_ids`.
            sample_ids: one id per sample, with `seed`; default 0, 1, ... batch_size - 1.
            generator: a torch.Generator, or one per sample: torch.randn on its device, x_T first, then z for each step
                that adds noise, in diffusers' order (always in float32).
            noise: z for every step, [steps, B, ...], or a callable: step index -> [B, ...]. Needs `x_T`.
            x_T: the start [B, ...] instead of one from the noise source.
            init: data [B, ...], or one sample for all, in [-1, 1] to begin from: x_t ~ q(x_t | init) at the level of
                the table's first row (SDEdit, Meng et al. 2022). A table that begins part-way keeps more of them.
            mask: 1 where to draw, 0 where data are known: bool or numbers that broadcast to [B, ...]. The known part of
                x_t is drawn from q(x_t | known) after each step, and is the data themselves in the end.
            known: data [B, ...], or one sample for all, that count where the mask is 0; default `init`.
            batch_size: B, where nothing else tells.
            class_labels: an int for all samples or integers [B].
            guidance: weight w of classifier-free guidance, m = m_u + w (m_c - m_u) (Ho & Salimans 2022, with w = 1 + w'
                of their eq. 6), or one per row; 1.0 means none, and runs one network call per sample instead of two.
            guidance_interval: timesteps (low, high) outside of which it is 1 (Kynkäänniemi et al. 2024).
            guidance_rescale: phi of Lin et al. 2023, 0 to 1: how far m keeps the standard deviation of m_c.
            cond_fn: gradient of log p(y | x_t) by x, [B, ...], called as OpenAI's, ``cond_fn(x, t, **model_kwargs)``,
                with the conditional rows, class_labels too; the same function each time, for a step is prepared for it.
            cond_form: "mean" adds Sigma g to mu, "epsilon" takes sqrt(1 - alpha_bar) g from eps, before the clip
                (Dhariwal & Nichol 2021, Algorithms 1 and 2). Default "mean" where all rows but the last, which is not
                moved, add noise.
            model_kwargs: further keyword arguments of the model; tensors of B rows are repeated for guidance.
            null_kwargs: what some of them are in guidance's unconditional half: for each a number, a tensor that
                broadcasts to the argument's rows, or a function of them (``torch.zeros_like``).
            callback: called after each step with a `StepResult` of live tensors: clone what outlives the call. It may
                write into x_t (on a GPU not through ``.data``). Its x0 is None unless `return_x0`.
            return_x0: also return the last step's estimate of x_0.

        Returns:
            x, float32 [B, ...] on the sampler's device; or (x, x0).

        Raises:
            ValueError: arguments that contradict each other or do not fit.
            ModelOutputError: the model returned no prediction for x.
            SamplingError: a step failed; the original exception is its cause.
            torch.OutOfMemoryError: memory ran out; the sampler has freed its buffers and graphs, see `clear`.
        """
        x, x0 = self._draw(self._request("sample", arguments, x0_out=return_x0), callback, return_x0)
        return (x, x0) if return_x0 and x0 is not None else x

    def resume(
        self, state: State | str | os.PathLike[str], *, callback: Callable[[StepResult[None]], None] | None = None
    ) -> Tensor:
        """Go on with a run that stopped, to the same bits on the same machine with the same code of the network.

        Args:
            state: of a `StepResult`, or the file that it was saved to; all arguments of the run come with it.
            callback: as in `sample`.

        Raises:
            ValueError: the state is of another model, table or noise version, or the file is damaged.
        """
        if not isinstance(state, State):
            state = State.load(os.fspath(state))
        state.refuse_unless(origin_of(self.model, self.table, self.options))
        return self._draw(state.request, callback, False, state)[0]

    def _draw(self, request: Request, callback: Any, return_x0: bool, state: Any = None) -> tuple[Tensor, Any]:
        with self._steps.turn(), self._steps.lend(request) as step:
            for result in self._loop(step, request, state):
                if callback is not None:
                    version = step.x_t._version
                    callback(result if return_x0 else result._replace(x0=None))
                    # On a CPU NumPy may have written, which counts no versions; and a copy costs no launch.
                    if self.device.type == "cpu" or step.x_t._version != version:
                        step.feed_network()
            return step.x_t.clone(), None if step.x0 is None else step.x0.clone()

    def steps(self, **arguments: Unpack[RequestArguments]) -> Iterator[StepResult[Tensor]]:
        """Yield a `StepResult` of copies after each step; arguments as in `sample`."""
        return self._iterate(self._request("steps", arguments, x0_out=True))

    def _iterate(self, request: Request) -> Iterator[StepResult[Tensor]]:
        with self._steps.lend(request) as step:
            loop = self._loop(step, request)
            while True:
                with self._steps.turn():
                    live = next(loop, None)
                    if live is None:
                        return
                    x_t, x0, state = live.x_t.clone(), live.x0.clone(), live.state().itself
                yield live._replace(x_t=x_t, x0=x0, state=state)

    def warmup(self, *, return_x0: bool = False, **arguments: Unpack[RequestArguments]) -> None:
        """Compile and capture what a `sample` with these arguments needs, and run one step of it.

        A generator among the arguments advances; pass seeds instead. On CUDA, call it before other threads use the
        GPU: while a step is captured, PyTorch raises wherever the process waits for the device.
        """
        request = self._request("warmup", arguments, x0_out=return_x0)
        with self._steps.turn(), self._steps.lend(request) as step:
            next(self._loop(step, request), None)

    def settle(self, compiled: bool | None = None, **arguments: Unpack[RequestArguments]) -> bool:
        """Make ready what a `sample` with these arguments needs, and decide for this sampler's life how it runs.

        Later calls take nothing that is compiled in the background; for changed weights what was asked for is built.

        Args:
            compiled: the decision, where compile="auto" leaves it open; None decides by what is there.

        Returns:
            Whether the network runs compiled.
        """
        request = self._request("settle", arguments, x0_out=False)
        with self._steps.turn(), self._steps.lend(request) as step:
            fixed = self.options.strict_compile or self.options.want is Want.NEVER
            return self._steps.settle(step, None if fixed else compiled)

    def refresh(self) -> None:
        """Take the model anew at the next call: with ``frozen``, needed after weights were changed in place."""
        self._steps.refresh()

    def clear(self) -> None:
        """Free every batch size's buffers, captured graphs and memory pool; the next call builds them again."""
        self._steps.clear()

    def _request(self, function: str, arguments: RequestArguments, *, x0_out: bool) -> Request:
        refuse_unknown(function, arguments, RequestArguments.__annotations__)
        return resolve_request(self.table, self.options, x0_out=x0_out, **arguments)
