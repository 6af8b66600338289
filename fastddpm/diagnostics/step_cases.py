"""Calls of p_sample that ``fastddpm verify`` and the tests run: each setting alone, pairs of them, odd shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastddpm.noise.v1 import Counter
from fastddpm.ops.twins import Flags
from fastddpm.tables.table import COLUMN, K

TABLE_LENGTH = 6

SETTINGS: dict[str, dict[str, Any]] = {
    "clip": {"clip": True},
    "learned": {"learned": True},
    "guided": {"guided": True},
    "use_m": {"use_m": True},
    "history_1": {"history": 1},
    "history_2": {"history": 2},
    "history_3": {"history": 3},
    "x0_out": {"x0_out": torch.float32},
    "low_out": {"low_out": torch.float16},
    "low_nhwc": {"low_out": torch.float16, "low_layout": "channels_last"},
    "m_nhwc": {"m_layout": "channels_last"},
    "noise_given": {"noise": "given"},
    "noise_none": {"noise": "none"},
}
# A longer and a shorter history differ from that of two in the terms alone, which each shows by itself.
_PAIRED = [name for name in SETTINGS if name not in ("history_1", "history_3")]
PAIRS = [(a, b) for a, b in itertools.combinations(_PAIRED, 2) if not SETTINGS[a].keys() & SETTINGS[b].keys()]


@dataclass(frozen=True)
class StepCase:
    """One call of p_sample.

    Attributes:
        shape: of x_t.
        x, m: storage types of the state (and its history) and of the network's output.
        noise: "counter", "given" or "none".
        x0_out, low_out: storage types of the further outputs, None where they are not asked for.
        layout: of x_t: "contiguous", "channels_last", "expanded" along the batch, or "shifted" by one element.
        m_layout, low_layout: "contiguous", "channels_last" or "shifted".
        shared: one row and step for all samples instead of one each.
    """

    shape: tuple[int, ...] = (2, 3, 4, 4)
    x: torch.dtype = torch.float32
    m: torch.dtype = torch.float32
    flags: Flags = field(default_factory=Flags)
    noise: str = "counter"
    z: torch.dtype = torch.float32
    x0_out: torch.dtype | None = None
    low_out: torch.dtype | None = None
    layout: str = "contiguous"
    m_layout: str = "contiguous"
    low_layout: str = "contiguous"
    shared: bool = False
    in_place: bool = False

    def __str__(self) -> str:
        """Name what differs from the default."""
        values = {**self.flags._asdict(), **vars(self)}
        defaults = {**Flags()._asdict(), **vars(StepCase())}
        parts = [f"{name}={value}" for name, value in values.items() if value != defaults[name] and name != "flags"]
        return "-".join(parts).replace("torch.", "").replace("=True", "").replace(" ", "") or "plain"

    def but(self, **changes: Any) -> StepCase:
        """The same call with changes, of flags too."""
        flags = {name: changes.pop(name) for name in Flags._fields if name in changes}
        return replace(self, flags=self.flags._replace(**flags), **changes)


def step_case(*names: str, **changes: Any) -> StepCase:
    """The call with these settings and no other."""
    settings = {key: value for name in names for key, value in SETTINGS[name].items()}
    return StepCase().but(**settings | changes)


def setting_cases(**changes: Any) -> list[StepCase]:
    """No setting, each alone, and pairs."""
    return [step_case(*names, **changes) for names in [(), *((name,) for name in SETTINGS), *PAIRS]]


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "shifted":
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        return storage[1:].view(tensor.shape).copy_(tensor)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor.contiguous()


def make_rows(batch: int, shared: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A table with every column in use, whose last row has sigma = 0, and the samples' rows, which visit it."""
    rows = torch.randn(TABLE_LENGTH, K, generator=generator)
    rows[:, COLUMN["lo"]], rows[:, COLUMN["hi"]] = -0.75, 1.25
    rows[:, COLUMN["sigma"]].abs_()
    rows[-1, COLUMN["sigma"]] = 0.0
    row = torch.randint(0, TABLE_LENGTH, (1 if shared else batch,), generator=generator)
    if not shared and batch > 1:
        row[-1] = TABLE_LENGTH - 1
    return rows, row


def make_counter(batch: int, shared: bool, generator: torch.Generator, stream: int = 1) -> Counter:
    """Seeds over all 64 bits and ids over all 32, with the ends of both ranges."""
    count = 1 if shared else batch
    seed = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    ids = torch.randint(0, 2**32, (count,), generator=generator)
    if count:
        seed[0], ids[-1] = -(2**63), 2**32 - 1
    return Counter(seed, ids, torch.randint(0, 2**32, (1,), generator=generator), stream)


def inputs(
    case: StepCase,
    seed: int = 0,
    device: torch.device | str = "cpu",
    change: Callable[[Tensor, torch.Generator], Tensor] = lambda x, generator: x,
) -> dict[str, Any]:
    """Keyword arguments of ``ops.p_sample``, outputs poisoned with NaN; ``change`` edits x_t and m beforehand.

    On the meta device no values are drawn, however large the shape.
    """
    g = torch.Generator().manual_seed(seed)
    batch, channels, *plane = case.shape
    flags = case.flags
    m_shape = (batch * (1 + flags.guided), channels * (1 + flags.learned), *plane)

    def normal(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if torch.device(device).type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return change(torch.randn(shape, generator=g), g).to(device, dtype)

    def poisoned(dtype: torch.dtype | None, layout: str = "contiguous") -> Tensor | None:
        if dtype is None:
            return None
        return arrange(torch.empty(case.shape, dtype=dtype, device=device), layout).fill_(torch.nan)

    x_t = arrange(normal(case.shape, case.x), case.layout)
    m = arrange(normal(m_shape, case.m), case.m_layout)
    rows, row = (t.to(device) for t in make_rows(batch, case.shared, g))
    history = torch.randn(flags.history, *case.shape, generator=g).to(device, case.x) if flags.history else None
    noise: Counter | Tensor | None = None
    if case.noise == "counter":
        seeds, ids, step, stream = make_counter(batch, case.shared, g)
        step = step if case.shared else step + torch.arange(batch)
        noise = Counter(seeds.to(device), ids.to(device), step.to(device) % 2**32, stream)
    elif case.noise == "given":
        noise = torch.randn(case.shape, generator=g).to(device, case.z)
    return {
        "x_t": x_t,
        "m": m,
        "rows": rows,
        "row": row,
        "noise": noise,
        "history": history,
        "out": x_t if case.in_place else poisoned(case.x),
        "x0_out": poisoned(case.x0_out),
        "low_out": poisoned(case.low_out, case.low_layout),
        **{name: getattr(flags, name) for name in ("clip", "learned", "guided", "use_m")},
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree bit for bit; any NaN equals any other (payloads differ between machines)."""
    as_int = torch.int32 if a.dtype == torch.float32 else torch.int16
    nan = a.isnan() & b.isnan()
    bits_a, bits_b = (v.contiguous().view(as_int).masked_fill(nan, 0) for v in (a, b))
    return a.shape == b.shape and torch.equal(bits_a, bits_b)
