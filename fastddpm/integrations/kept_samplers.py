"""The samplers that a drop-in keeps between calls, and when a sampler that keeps being called gets compiled."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastddpm.sampling.network import Model
from fastddpm.sampling.options import weigh
from fastddpm.sampling.sampler import Sampler
from fastddpm.tables.table import Table

# A sampler holds buffers and captured graphs; two are enough to alternate between settings.
_MOST = 2


@dataclass
class _Kept:
    key: Any
    sampler: Sampler
    drawn: int = 0


class KeptSamplers:
    """Samplers of the last runs, the latest first.

    A caller that has drawn n samples is expected to draw as many again: with compile="auto" a sampler counts what it
    has drawn, this call included, and is made anew, compiled, once that much work repays the compilation.
    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self.kept: list[_Kept] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return (KeptSamplers, ())

    def get(
        self,
        key: Any,
        model: Model,
        table: Table,
        shape: Sequence[int],
        *,
        batch: int,
        device: torch.device,
        options: Mapping[str, Any],
    ) -> Sampler:
        """Return the sampler of an equal key, or make one.

        Args:
            key: what tells runs apart besides the options.
            model, table, shape, device: arguments of `Sampler`.
            batch: how many samples the caller is about to draw.
            options: further arguments of `Sampler`.
        """
        key = (key, dict(options))
        with self._lock, torch.inference_mode(False):
            kept = next((kept for kept in self.kept if kept.key == key), None)
            if kept is not None:
                self.kept.remove(kept)
            drawn = batch + (kept.drawn if kept else 0)
            if kept is None or self._repays(kept.sampler, drawn, options):
                sampler = Sampler(model, table, shape, device=device, **{"samples_ahead": drawn, **options})
                kept = _Kept(key, sampler)
            kept.drawn = drawn
            self.kept.insert(0, kept)
            for old in self.kept[_MOST:]:
                old.sampler.clear()
            del self.kept[_MOST:]
            return kept.sampler

    def clear(self) -> None:
        """Free all of them."""
        with self._lock:
            for kept in self.kept:
                kept.sampler.clear()
            self.kept.clear()

    @staticmethod
    def _repays(sampler: Sampler, drawn: int, options: Mapping[str, Any]) -> bool:
        """Whether a sampler made now would want compiled code more."""
        if options.get("compile", "auto") != "auto" or "samples_ahead" in options:
            return False
        want, _ = weigh(sampler.device, sampler.model, sampler.shape, drawn * len(sampler.table))
        return want > sampler.options.want
