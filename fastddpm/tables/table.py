"""Tables: a sampler written as one row of numbers per step.

A row turns the state x_t and the network's output m into the next state:

    x0     = a * x_t + b * m                        (clipped to [lo, hi] when `clip`)
    x_prev = c_x0 * x0 + c_xt * x_t [+ c_m * m] [+ c_1 * x0_1 [+ c_2 * x0_2 [+ c_3 * x0_3]]] + std * z
    std    = sigma, or sigma * exp(h0 + h1 * v) when `learned` (v: the network's second half)

x0_k is the x0 of k rows before, zeros where there is none. Rows are computed in float64 and rounded once to float32.
A row whose sigma is 0 adds no noise.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fastddpm.checks import number, one_of
from fastddpm.schedules.diffusion import check_clip_range
from fastddpm.schedules.schedule import Schedule
from fastddpm.schedules.sketch import curve

COLUMNS = ("a", "b", "lo", "hi", "c_x0", "c_xt", "c_m", "c_1", "sigma", "h0", "h1", "w", "c_2", "c_3")
K = len(COLUMNS)
# The columns of the older x0, the newest first.
HISTORY = ("c_1", "c_2", "c_3")
COLUMN = {name: i for i, name in enumerate(COLUMNS)}
# The weightings of the training loss, with the gamma that the paper settles on where there is one.
LOSS_WEIGHTINGS: dict[str, float | None] = {"uniform": None, "min-snr": 5.0, "p2": 1.0}


@dataclass(frozen=True, eq=False)
class Table:
    """Describe a sampler completely: one row per step, in the order of execution.

    Args:
        rows64: [R, K] float64, columns as in `COLUMNS`.
        timesteps: [R] int64 or float32, what the network is given at each step.
        name: the sampler's name, for messages and manifests.
        clip: x0 is clipped to [lo, hi].
        learned: the network returns 2C channels, and its second half sets the standard deviation.
        use_m: the term c_m * m is present.
        history: how many older x0 enter, 0..3: the terms c_1 * x0_1 to c_history * x0_history are present.
        estimate: what a * x_t + b * m is: "x_0", or "eps" for the solvers that interpolate eps. The rows keep it.
        levels: float64 [R + 1, 2], (c, s) of each state: c x_0 + s eps before row r is what data become there, and the
            last is what the last row leaves. Edits need them; None where they are not known.

    Raises:
        ValueError: a shape, dtype or value does not fit the above.
    """

    rows64: Tensor
    timesteps: Tensor
    name: str
    clip: bool = True
    learned: bool = False
    use_m: bool = False
    history: int = 0
    estimate: str = "x_0"
    levels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rows64.dim() != 2 or self.rows64.shape[1] != K or self.rows64.shape[0] == 0:
            raise ValueError(f"rows64 must have shape [R, {K}] with R >= 1, got {tuple(self.rows64.shape)}")
        if self.rows64.dtype != torch.float64:
            raise ValueError(f"rows64 must be float64, got {self.rows64.dtype}")
        if self.timesteps.shape != (len(self.rows64),) or self.timesteps.dtype not in (torch.int64, torch.float32):
            raise ValueError(
                f"timesteps must be int64 or float32 of shape [{len(self.rows64)}], got {self.timesteps.dtype} "
                f"of shape {tuple(self.timesteps.shape)}"
            )
        if self.history not in range(len(HISTORY) + 1):
            raise ValueError(f"history must lie in 0..{len(HISTORY)}, got {self.history!r}")
        if self.levels is not None and self.levels.shape != (len(self.rows64) + 1, 2):
            raise ValueError(f"levels must have shape [{len(self.rows64) + 1}, 2], got {list(self.levels.shape)}")
        bounds = torch.tensor([name in ("lo", "hi") for name in COLUMNS], device="cpu")
        bad = ~torch.where(bounds, ~self.rows.isnan(), self.rows.isfinite())
        if bad.any():
            r, k = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"row {r} of table {self.name!r}, at timestep {self.timesteps[r]:g}, has {COLUMNS[k]} = "
                f"{float(self.rows64[r, k])}, which is not finite in float32; the betas up to there are too large, or "
                "too small to change a float64"
            )

    def __len__(self) -> int:
        return len(self.rows64)

    def __repr__(self) -> str:
        """The head, and the columns that are not 0 of the first rows and the last."""
        names, shown = self._shown()
        head = f"{'row':>5}{'t':>8}" + "".join(f"{name:>12}" for name in names)
        rows = [f"{i:>5}{float(self.timesteps[i]):>8g}" + "".join(f"{x:>12.5g}" for x in row) for i, row in shown]
        gap = ["  ..."] if len(self) > len(shown) else []
        return "\n".join([self._title(), head, *rows[:-1], *gap, rows[-1]])

    def _repr_html_(self) -> str:
        names, shown = self._shown()
        cells = "".join(f"<th>{name}</th>" for name in ("row", "t", *names))
        rows = "".join(
            f"<tr><td>{i}</td><td>{float(self.timesteps[i]):g}</td>{''.join(f'<td>{x:.5g}</td>' for x in row)}</tr>"
            for i, row in shown
        )
        picture = curve(self.timesteps.tolist(), "t over the steps")
        return f"<code>{html.escape(self._title())}</code><br>{picture}<table><tr>{cells}</tr>{rows}</table>"

    def _title(self) -> str:
        flags = [name for name in ("clip", "learned") if getattr(self, name)]
        older = [f"{self.history} older x0"] if self.history else []
        steps = f"{len(self)} step{'s' if len(self) > 1 else ''}"
        return f"Table {self.name!r}: {', '.join([steps, *flags, *older])}"

    def _shown(self) -> tuple[list[str], list[tuple[int, list[float]]]]:
        used = [k for k in range(K) if COLUMNS[k] not in ("lo", "hi", "w") and self.rows64[:, k].any()]
        rows = sorted({*range(min(3, len(self))), len(self) - 1})
        return [COLUMNS[k] for k in used], [(i, self.rows64[i, used].tolist()) for i in rows]

    @cached_property
    def rows(self) -> Tensor:
        """[R, K] float32, contiguous: rows64 rounded once, to nearest even."""
        return self.rows64.to(torch.float32).contiguous()

    def column(self, name: str) -> Tensor:
        """Return one column, float64 [R]."""
        return self.rows64[:, COLUMN[name]]

    def with_guidance(self, w: float) -> Table:
        """Set the weight of classifier-free guidance, m = m_u + w (m_c - m_u) (Ho & Salimans 2022)."""
        rows64 = self.rows64.clone()
        rows64[:, COLUMN["w"]] = w
        return replace(self, rows64=rows64)


def make_rows(n_rows: int, clip_range: float | None = None, **columns: Tensor | float) -> Tensor:
    """Build float64 rows [R, K] from named columns; the others are 0, the bounds +-clip_range, the weight w 1.

    Raises:
        ValueError: clip_range is not a positive number.
    """
    check_clip_range(clip_range)
    bound = float("inf") if clip_range is None else float(clip_range)
    rows64 = torch.zeros(n_rows, K, dtype=torch.float64, device="cpu")
    for name, value in {"lo": -bound, "hi": bound, "w": 1.0, **columns}.items():
        rows64[:, COLUMN[name]] = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    return rows64


def level_rows(*alphas_cumprod: Tensor) -> Tensor:
    """Write alpha_bar of every state, in parts, as a table's `levels`: (sqrt(alpha_bar), sqrt(1 - alpha_bar))."""
    alpha_bar = torch.cat(alphas_cumprod)
    return torch.stack([alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()], dim=1)


def q_rows(schedule: Schedule) -> Tensor:
    """Tabulate q(x_t | x_0): (sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)) (Ho et al. 2020, eq. 4); float32 [T, 2]."""
    return level_rows(schedule.alphas_cumprod).to(torch.float32).contiguous()


def loss_rows(
    schedule: Schedule, prediction_type: str = "epsilon", weighting: str = "uniform", gamma: float | None = None
) -> Tensor:
    """Tabulate the target c_eps * eps + c_x0 * x_0 of a network and the weight of its squared error; float32 [T, 3].

    epsilon: eps;  x_0: x_0;  v: sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0   (Salimans & Ho 2022, section 4)

    A weighting, with SNR_t = alpha_bar_t / (1 - alpha_bar_t), is given for the error of eps and means the same
    whatever the network predicts: an error of x_0 counts SNR_t times as much there, one of v alpha_bar_t times.
        uniform: 1, for the target itself          (Ho et al. 2020, eq. 14)
        min-snr: min(SNR_t, gamma) / SNR_t         (Hang et al. 2023, arXiv:2303.09556; gamma = 5)
        p2:      1 / (1 + SNR_t)^gamma             (Choi et al. 2022, arXiv:2204.00227, with k = 1; gamma = 1)

    Raises:
        ValueError: a name is unknown, or gamma is not a positive number.
    """
    signal, noise = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    one, zero = torch.ones_like(signal), torch.zeros_like(signal)
    targets = {"epsilon": (one, zero), "x_0": (zero, one), "v": (signal, -noise)}
    one_of("prediction_type", prediction_type, targets)
    snr = signal**2 / noise**2
    gamma = check_weighting(weighting, gamma)
    weight = one
    if gamma is not None:
        of_eps = (gamma / snr).clamp(max=1.0) if weighting == "min-snr" else (1.0 + snr) ** -gamma
        weight = of_eps * {"epsilon": one, "x_0": snr, "v": signal**2}[prediction_type]
    return torch.stack([*targets[prediction_type], weight], dim=1).to(torch.float32).contiguous()


def check_weighting(weighting: str, gamma: float | None) -> float | None:
    """Return the gamma of a weighting: the one given, the paper's, or None where there is none.

    Raises:
        ValueError: the weighting is unknown, takes no gamma, or gamma is not a positive number.
    """
    usual = LOSS_WEIGHTINGS[one_of("loss weighting", weighting, LOSS_WEIGHTINGS)]
    if gamma is None:
        return usual
    if usual is None:
        raise ValueError(f"the {weighting} weighting has no gamma, got {gamma!r}; use min-snr or p2")
    return number("gamma", gamma, gt=0)


def q_step_rows(schedule: Schedule) -> Tensor:
    """Tabulate q(x_t | x_{t-1}): (sqrt(alpha_t), sqrt(beta_t)) (Ho et al. 2020, eq. 2); float32 [T, 2]."""
    return torch.stack([schedule.alphas.sqrt(), schedule.betas.sqrt()], dim=1).to(torch.float32).contiguous()
