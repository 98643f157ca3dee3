"""What counts as growth, and what a service under too much is asked."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import charts, endurance
from bench.endurance import Look, Overload, Soak
from bench.serving import write_pictures


def looks(megabytes: list[float]) -> list[Look]:
    return [Look(number / 10, mb, 20, 12, number) for number, mb in enumerate(megabytes)]


def test_growth_is_that_of_the_last_quarter_over_the_second() -> None:
    begun = [50.0, 90.0, 100.0, 100.0]  # settling is no growth
    soaked = Soak(looks([*begun, *[100.0] * 4, *[105.0] * 4, *[110.0, 110.0, 500.0, 110.0]]))

    assert soaked.growth("resident_mb") == pytest.approx(1.1)
    assert soaked.growth("files") == 1


def test_answers_that_nobody_should_get_are_told() -> None:
    soaked = Soak()
    for status in ("200", "429", "500", "lost", "200"):
        soaked.count(status)

    assert soaked.statuses == {"200": 2, "429": 1, "500": 1, "lost": 1}
    assert soaked.unexpected() == {"500": 1, "lost": 1}


def test_the_tables_tell_what_was_found() -> None:
    soaked = Soak(looks([100.0] * 8 + [110.0] * 8), {"200": 7, "429": 1})
    table = endurance.soak_table(soaked)
    assert "| MB | 1.100 | 100 | 110 |" in table
    assert "7 of 200, 1 of 429" in table

    pushed = Overload(10, 100, 9.5, {"200": 95, "429": 905}, 0, {"/livez": 3.2}, 0, (1, 2, 1), 9)
    table = endurance.overload_table(pushed)
    assert "| answers | 95 of 200, 905 of 429 |" in table
    assert "| images/s after over before | 0.90 |" in table
    assert json.dumps(asdict(pushed)) and json.dumps(asdict(soaked))


def test_the_plot_has_a_panel_for_each_series() -> None:
    drawn = charts.over_time("A soak", {"MB": [(0, 1), (1, 2)], "files <all>": [], "x": [(0, 0)]})

    assert drawn.count("<polyline") == 3
    assert "files &lt;all&gt;" in drawn and "nan" not in drawn


def test_a_service_is_soaked_and_pushed_for_real(tmp_path: Path) -> None:
    with endurance.service(tmp_path) as server:
        soaked = asyncio.run(endurance.soak(server, 0.05))
        pictures = write_pictures(tmp_path / "pictures", 512)
        pushed = asyncio.run(endurance.overload(server, 0.05, pictures, closed_s=1))
        bombs = asyncio.run(endurance.bombs(server, times=2))

    assert soaked.unexpected() == {}
    assert {"200", "201"} <= soaked.statuses.keys()
    assert soaked.looks[-1].files > 5
    assert pushed.statuses.keys() <= endurance.OVERLOADED and pushed.statuses["429"] > 0
    assert (pushed.probe_failures, pushed.without_retry_after) == (0, 0)
    assert [each.statuses for each in bombs] == [[413]] * 5
    assert max(each.grown_mb for each in bombs) < endurance.BOMB_MB
    rows = endurance.bombs_table(bombs).splitlines()
    assert rows[2].startswith("| PNG of 400 megapixels |") and "| 2 | 413 |" in rows[2]
