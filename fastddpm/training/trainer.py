"""Training by Algorithm 1 of Ho et al. 2020, such that an interrupted run continues to the same bits.

Nothing of a step depends on a generator's state: the images of step n are a function of (seed, n), and the timestep,
the noise and the class dropout of image k are functions of (seed, k, n). So a checkpoint needs the weights, their
average, the optimiser's moments and n, and on the CPU (same thread count) a resumed run equals an uninterrupted one.

Of the processes that torchrun starts each takes a share of a step's images, and DistributedDataParallel adds up their
gradients; timesteps and noise are those of one process, and a checkpoint is resumed by any number of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastddpm.data.datasets import Dataset
from fastddpm.errors import FastDDPMError
from fastddpm.machine.interrupts import interruptible
from fastddpm.machine.ranks import ALONE, Ranks, join_ranks
from fastddpm.noise import v1 as noise
from fastddpm.sampling.network import Model
from fastddpm.schedules.schedule import Schedule
from fastddpm.training.checkpoint import load_checkpoint, save_checkpoint
from fastddpm.training.config import TrainConfig
from fastddpm.training.ema import EMA
from fastddpm.training.folder import TrainingRun, export, network, open_run
from fastddpm.training.log import TrainLog
from fastddpm.training.loss import ddpm_loss
from fastddpm.training.shards import gathered, shard
from fastddpm.unet.unet import UNet


class DivergenceError(FastDDPMError):
    """The loss or its gradient is no longer finite; the message names the step and the last good checkpoint."""


@dataclass
class Trainer:
    """Everything that a training step touches.

    Attributes:
        net: the network, its float32 weights in `model`; `net` is `model` or its compiled form.
        ranks: the processes that share a step.
    """

    config: TrainConfig
    data: Dataset
    model: UNet
    net: Model
    ema: EMA
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    ranks: Ranks = ALONE

    def step(self, n: int) -> float:
        """Take gradient step n and return its loss.

        Raises:
            DivergenceError: loss or gradient is not finite; the weights are those before the step.
        """
        config, ranks = self.config, self.ranks
        k = batch_indices(config.seed, n, len(self.data), config.batch)
        # For dropout.
        torch.manual_seed((config.seed * 0x9E3779B97F4A7C15 + n + ranks.rank * 0xD1B54A32D192ED03) % 2**63)
        loss = 0.0
        net = self.net if isinstance(self.net, DistributedDataParallel) else None
        parts = k.tensor_split(ranks.world)[ranks.rank].chunk(config.accumulate)
        for part in parts:
            # The parts' gradients add up; with those of the last part the ranks'.
            with net.no_sync() if net is not None and part is not parts[-1] else contextlib.nullcontext():
                partial = self.loss(part, n) * (len(part) / len(k))
                # DistributedDataParallel divides by the number of ranks.
                (partial * ranks.world).backward()
            loss += partial.item()
        own, loss = loss, ranks.reduced(loss)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            first = ranks.reduced(ranks.rank if not math.isfinite(own) else -1, largest=True)
            where = f" on rank {first:.0f}" if ranks.world > 1 and first >= 0 else ""
            raise DivergenceError(f"loss {loss}{where}, gradient norm {norm} at step {n}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, n)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(n)
        return loss

    def loss(self, k: Tensor, n: int) -> Tensor:
        """Loss of images k ([B] int64) at step n: lines 2 to 5 of Algorithm 1; t and eps are drawn for (seed, k, n)."""
        config, device = self.config, next(self.model.parameters()).device
        x_0, condition = self.data.x_0(k).to(device), self.data.condition
        if condition is not None:
            condition = drop(condition[k], 0.0, config.class_dropout, config.seed, k, n).to(device)
        if config.flip:
            mirrored = (_uniform(config.seed, k, n)[:, 1] < 0.5).to(device)[:, None, None, None]
            x_0 = torch.where(mirrored, x_0.flip(3), x_0)
            condition = None if condition is None else torch.where(mirrored, condition.flip(3), condition)
        options = config.loss_options() | ({} if condition is None else {"condition": condition})
        labels = None
        if self.data.labels is not None:
            labels = self.data.labels[k]
            if (null := self.model.config.null_class) is not None:
                labels = drop(labels, null, config.class_dropout, config.seed, k, n)
            labels = labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            return ddpm_loss(
                self.net, x_0, self.schedule, seed=config.seed, step=n, sample_ids=k, class_labels=labels, **options
            )


def learning_rate(config: TrainConfig, n: int) -> float:
    """Return the rate of step n: a linear warm-up, a constant, and a linear descent over the last part of the run."""
    warm = (n + 1) / config.warmup if n < config.warmup else 1.0
    descent = max(1.0, config.decay * config.steps)
    return config.lr * min(warm, 1.0, (config.steps - n) / descent)


def batch_indices(seed: int, n: int, n_images: int, batch: int) -> Tensor:
    """Return the images of step n, [batch] int64: each epoch is a permutation that (seed, epoch) determines."""
    epoch, place = divmod(n, n_images // batch)
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch]))
    order = generator.permutation(n_images)
    return torch.from_numpy(order[place * batch : (place + 1) * batch].astype(np.int64))


def drop(given: Tensor, null: float, p: float, seed: int, k: Tensor, n: int) -> Tensor:
    """Replace rows by ``null`` with probability p (Ho & Salimans 2022, Algorithm 1); image k and step n decide."""
    dropped = _uniform(seed, k, n)[:, 0] < p
    return torch.where(dropped.reshape(-1, *(1,) * (given.dim() - 1)), null, given)


def _uniform(seed: int, k: Tensor, n: int) -> Tensor:
    """Two numbers in [0, 1] for each image, [B, 2] float64, from the part of stream 3 that no timestep uses."""
    z = noise.normals(torch.tensor([seed], device="cpu"), k, torch.tensor([n], device="cpu"), noise.STREAM_TIMESTEPS, 8)
    return torch.special.ndtr(z[:, 4:6].double())


@dataclass(frozen=True)
class TrainResult:
    """What `train` reached: gradient steps taken so far, the last loss, and the signal that stopped it, if any."""

    steps: int
    loss: float
    signal: int | None = None


def train(config: TrainConfig, *, quiet: bool = False) -> TrainResult:
    """Train a network, leaving checkpoints, a log and finally the model in ``config.out``.

    SIGINT and SIGTERM end it after the current step with a checkpoint; a second one ends it at once. Processes that
    torchrun started train the network together.

    Raises:
        FileExistsError, NotADirectoryError, BlockingIOError, ValueError: see `open_run`.
        DivergenceError: the loss became infinite or NaN.
    """
    ranks = join_ranks(dataclasses.asdict(config))
    with torch.random.fork_rng(), open_run(config, ranks) as run, ranks.connected():
        torch.manual_seed(config.seed)
        return _train(run, build_trainer(config, run.data, run.build_model(), ranks), quiet)


def _train(run: TrainingRun, trainer: Trainer, quiet: bool) -> TrainResult:
    config, model, ema, ranks = run.config, trainer.model, trainer.ema, trainer.ranks
    state: dict[str, Any] = {"step": 0, "log": {}}
    if run.has_checkpoint:
        state = load_checkpoint(run.out, model, ema, trainer.optimizer)
    n, loss, stopped = state["step"], math.nan, 0
    saved = n
    with interruptible() as interrupt, contextlib.ExitStack() as stack:
        log = None
        if ranks.rank == 0:
            log = stack.enter_context(contextlib.closing(TrainLog(config, run.out, n, state["log"], quiet=quiet)))

        def save() -> None:
            nonlocal saved
            if n != saved:
                ours = {"step": n, "log": log.state() if log else {}}
                save_checkpoint(run.out, model, ema, trainer.optimizer, ours, ranks)
                saved = n

        # Ranks that hear of a signal at different steps stop after the same one.
        while n < config.steps and not (stopped := int(ranks.reduced(interrupt.signal or 0, largest=True))):
            try:
                loss = trainer.step(n)
            except DivergenceError as error:
                raise DivergenceError(f"{error}; {run.last_checkpoint()}; try a lower --lr") from None
            n += 1
            if log:
                log.add(n - 1, loss, learning_rate(config, n - 1))
            # The picture first: a run that is killed while drawing it draws it again.
            if config.sample_every and n % config.sample_every == 0:
                average = gathered(ema.weights, ranks)
                if log:
                    log.picture(n, network(model, average).to(config.resolved_device()), trainer.data)
            if config.save_every and n % config.save_every == 0:
                save()
        save()
        export(run.out, model, ema, ranks)
    return TrainResult(n, loss, stopped or interrupt.signal)


def build_trainer(config: TrainConfig, data: Dataset, model: UNet, ranks: Ranks = ALONE) -> Trainer:
    """Put model, average, optimiser and schedule on the device, ready for step 0."""
    device, sharded = config.resolved_device(), config.fsdp and ranks.world > 1
    if sharded:
        shard(model, device, ranks)
    else:
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
    )
    compiled = device.type == "cuda" and not sharded if config.compile == "auto" else config.compile
    net = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    if ranks.world > 1 and not sharded:
        devices = [device] if device.type == "cuda" else None
        net = DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True)
    ema = EMA(model, config.ema)
    return Trainer(config, data, model, net, ema, optimizer, config.diffusion().schedule(), ranks)


__all__ = ["DivergenceError", "TrainConfig", "TrainResult", "Trainer", "train"]
