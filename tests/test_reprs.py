"""What objects show of themselves, in a shell and in a notebook."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

import fastddpm
from fastddpm import Sampler, Schedule, ddim_table, ddpm_table

SCHEDULE = Schedule.linear(1000)
TABLE = ddim_table(SCHEDULE, steps=50, eta=0.5)


def test_schedule_is_one_line() -> None:
    assert repr(SCHEDULE) == "Schedule(T = 1000, betas from 0.0001 to 0.02, alpha_bar_T = 4.036e-05)"


def test_table_shows_labelled_rows_and_only_columns_in_use() -> None:
    lines = repr(TABLE).splitlines()
    assert lines[0] == "Table 'ddim': 50 steps, clip"
    assert lines[1].split() == ["row", "t", "a", "b", "c_x0", "c_xt", "sigma"]
    assert lines[2].split()[:3] == ["0", "999", f"{float(TABLE.column('a')[0]):.5g}"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2", "...", "49"]
    assert len(repr(ddpm_table(Schedule.cosine(2))).splitlines()) == 4


def test_network_and_sampler_are_one_line() -> None:
    digits = fastddpm.load("digits")
    assert repr(digits) == (
        "UNet(x [B, 1, 32, 32], 1.71 M parameters, widths 16-32-64-96, 11 class embeddings, predicts v, T = 1000)"
    )
    sampler = Sampler(digits, TABLE, (1, 32, 32), device="cpu")
    assert repr(sampler) == "Sampler(UNet, 'ddim' of 50 steps, shape (1, 32, 32), cpu, float32, torch, uncompiled)"


@pytest.mark.parametrize("shown", [SCHEDULE, TABLE, Schedule.cosine(1), ddpm_table(Schedule.cosine(1))])
def test_notebooks_get_a_well_formed_picture(shown: Any) -> None:
    tree = ET.fromstring(f"<div>{shown._repr_html_()}</div>".replace("<br>", "<br/>"))
    (line,) = tree.findall(".//polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert 1 <= len(points) <= 250
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert all(0 <= x <= 240 and 0 <= y <= 60 for x, y in points)
