"""The samplers' names: what each is called elsewhere, what it costs, and when to use it."""

from __future__ import annotations

import re
from typing import NamedTuple

from fastddpm.checks import nearest, shown


class SamplerName(NamedTuple):
    """A sampler as the user meets it.

    Attributes:
        name: how it is written here.
        aliases: what it is called elsewhere; hyphens, underscores, spaces and capitals do not matter.
        stochastic: whether it draws noise along the way.
        calls: network calls a step.
        use: when to use it, in a line.
    """

    name: str
    aliases: tuple[str, ...]
    stochastic: bool
    calls: int
    use: str


NAMES = (
    SamplerName("ddpm", ("ancestral", "DDPMScheduler"), True, 1, "Ho et al.; every timestep, or 100 and more"),
    SamplerName("ddim", ("DDIMScheduler",), False, 1, "20 to 100 steps; eta adds noise"),
    SamplerName("fast", (), False, 1, "UniPC of 8 steps, or 10 with guidance"),
    SamplerName("tuned", (), False, 1, "fitted to this model by `fastddpm tune`; 5 steps"),
    SamplerName(
        "unipc3", ("unipc", "uni_pc", "unipc_bh2", "UniPCMultistepScheduler"), False, 1, "5 to 20 steps, no guidance"
    ),
    SamplerName("unipc2", ("uni_pc_2",), False, 1, "5 to 20 steps with guidance"),
    SamplerName(
        "dpm++2m",
        ("dpm++", "dpm-solver++", "dpmpp_2m", "dpmsolver_multistep", "DPMSolverMultistepScheduler"),
        False,
        1,
        "8 to 25 steps; robust with guidance",
    ),
    SamplerName("dpm++3m", ("dpmpp_3m",), False, 1, "10 to 25 steps, no guidance"),
    SamplerName("dpm++2m_sde", ("dpmpp_2m_sde", "sde-dpmsolver++"), True, 1, "15 to 50 steps, with noise"),
    SamplerName("dpm++3m_sde", ("dpmpp_3m_sde",), True, 1, "20 to 50 steps, with noise"),
    SamplerName("sa_solver", ("sa", "SASolverScheduler"), True, 1, "7 to 50 steps; tau sets how much noise"),
    SamplerName("deis", ("deis3", "DEISMultistepScheduler"), False, 1, "8 to 20 steps; does not clip x_0"),
    SamplerName("ipndm", ("ipndm4", "IPNDMScheduler"), False, 1, "5 to 15 steps, spacing karras; does not clip"),
    SamplerName("heun", ("edm", "HeunDiscreteScheduler"), False, 2, "20 steps (39 calls) and more"),
    SamplerName("euler", ("k_euler", "EulerDiscreteScheduler"), False, 1, "DDIM by k-diffusion's name"),
    SamplerName(
        "euler_a", ("euler_ancestral", "k_euler_a", "EulerAncestralDiscreteScheduler"), True, 1, "20 to 50 steps"
    ),
)


def _key(name: str) -> str:
    return re.sub(r"[-_ ]|scheduler$", "", name.lower()).replace("dpmpp", "dpm++")


_BY_KEY = {_key(alias): entry.name for entry in NAMES for alias in (entry.name, *entry.aliases)}


def canonical(name: str) -> str:
    """Return the name of a sampler here, from any of its names.

    Raises:
        ValueError: there is none; the message has the nearest.
    """
    found = _BY_KEY.get(_key(name)) if isinstance(name, str) else None
    if found is None:
        spellings = [alias for entry in NAMES for alias in (entry.name, *entry.aliases)]
        near = nearest(name, spellings)
        hint = "" if near is None else f" (did you mean {near!r}?)"
        raise ValueError(f"unknown sampler {shown(name)}{hint}; choose one of {', '.join(e.name for e in NAMES)}")
    return found


def listing() -> str:
    """Return a line for each sampler, and one with its other names, at most 80 columns wide.

    The names of diffusers' classes are understood too, and not listed.
    """
    lines = []
    for entry in NAMES:
        kind = "stochastic" if entry.stochastic else "deterministic"
        lines.append(f"  {entry.name:<12} {kind:<13} {entry.calls}  {entry.use}")
        others = [alias for alias in entry.aliases if not alias.endswith("Scheduler")]
        if others:
            lines.append(f"    = {', '.join(others)}")
    return "\n".join(lines)
