"""Goals, tables and plots of rows: compared within a round, and only of what was measured."""

import json
from xml.etree import ElementTree

import pytest

from bench import charts, report
from bench.report import Found, by_round, compared, goals, markdown, plots, worst_p99


def row(server: str, images_per_s: float, number: int = 0, **changed: object) -> report.Row:
    cell = {"part": "load", "server": server, "graph": "light", "render": "none", "round": number}
    cell |= {"loop": "closed", "clients": 32, "images_per_s": images_per_s, "command": "again"}
    figures = {"p50_ms": 5.0, "p95_ms": 8.0, "p99_ms": 9.0, "errors": {}, "load_cores": 0.1}
    figures |= {"answered": 1000, "late_ms": 0.7}
    return {**cell, **figures, "server_cores": 1.5, "server_mb": 200.0, **changed}


NOTHING = {"p50_ms": None, "p95_ms": None, "p99_ms": None, "errors": {"500": 7}, "answered": 0}


def goal(rows: list[report.Row], words: str) -> report.Goal:
    (found,) = [each for each in goals(rows) if words in each.name]
    return found


def test_a_slow_round_changes_no_ratio():
    rows = [row("ours", 300), row("ray", 200), row("bentoml", 100)]
    rows += [row("ours", 30, 1), row("ray", 10, 1), row("bentoml", 20, 1)]
    best = goal(rows, "light: images/s over the best peer's")
    assert best.found == Found([1.5, 1.5]) and best.met
    assert best.found.text() == "1.5 (1.5 to 1.5)"


def test_swapping_is_compared_with_the_same_load_without_it_in_each_round():
    usual = [row("ours", 9, n, part="swap", swapping=False, swaps=0, p99_ms=10) for n in (0, 1)]
    swapped = [
        row("ours", 8, n, part="swap", swapping=True, swaps=4, p99_ms=p99)
        for n, p99 in ((0, 15), (1, 19))
    ]
    words = "light: p99 while versions are swapped"
    assert goal(usual + swapped, words).found == Found([1.5, 1.9])
    assert goal(usual + swapped, words).met
    assert not [each for each in goals(usual) if words in each.name]
    lost = row("ours", 8, 2, part="swap", swapping=True, swaps=4, errors={"503": 1})
    assert not goal([*usual, *swapped, lost], words).met
    assert "| light, round 1 | 4 |" in markdown(usual + swapped)


def test_a_round_without_the_other_is_left_out():
    rows = [row("ours", 300), row("ours", 300, 1), row("ray", 150, 1), row("ray", 0, **NOTHING)]
    assert by_round(rows, "load", "images_per_s", server="ray") == {1: 150}
    assert compared(rows, "images_per_s", "ours", ["ray", "litserve"]) == Found([2])
    assert compared(rows, "images_per_s", "ours", ["litserve"]) is None


def test_the_engine_is_compared_in_throughput_and_in_milliseconds():
    rows = [row("ours", 90), row("engine", 100)]
    rows += [row("ours", 50, clients=1, p50_ms=9.5), row("engine", 60, clients=1, p50_ms=6.0)]
    assert not goal(rows, "light: images/s over the bare engine's").met  # 0.9 of 0.95
    beyond = goal(rows, "light: one client's p50")
    assert beyond.found == Found([3.5]) and not beyond.met and beyond.found.text(" ms") == "3.5 ms"


def test_p99_is_judged_at_the_load_where_it_compares_worst():
    rows = [row("ours", 1, clients=1, p99_ms=5), row("ray", 1, clients=1, p99_ms=10)]
    rows += [row("ours", 1, loop="open", p99_ms=12), row("ray", 1, loop="open", p99_ms=30)]
    rows += [row("bentoml", 1, loop="open", p99_ms=10), row("litserve", 1, clients=4, p99_ms=1)]
    assert worst_p99(rows, "ours", "light") == Found([1.2])
    assert worst_p99(rows, "ours", "resnet18") is None
    assert not goal(rows, "light: p99").met


def test_a_load_at_which_one_side_answered_too_little_has_no_p99_to_compare():
    rows = [row("ours", 1, p99_ms=5), row("ray", 1, p99_ms=10)]
    rows += [row("ours", 1, clients=1, p99_ms=30), row("ray", 1, clients=1, p99_ms=None)]
    rows += [row("ours", 1, clients=8, p99_ms=None), row("ray", 1, clients=8, p99_ms=1)]
    assert worst_p99(rows, "ours", "light") == Found([0.5])


@pytest.mark.parametrize("outage", [NOTHING, {"errors": {"lost": 1}}])
def test_a_round_in_which_ours_failed_misses_its_goals(outage):
    rows = [row("ours", 400), row("ray", 100), row("ours", 400, 1), row("ray", 100, 1)]
    assert goal(rows, "light: images/s over the best peer's").met
    rows.append(row("ours", 0 if outage == NOTHING else 400, 2, **outage))
    for words in ("light: images/s over the best peer's", "light: p99"):
        failed = goal(rows, words)
        assert failed.found.failed and not failed.met
        assert failed.found.text().endswith("with errors in 1")
    assert "with errors in 1 | **no** |" in markdown(rows)
    rows = [row("ours", 0, **NOTHING), row("ray", 100)]
    assert goal(rows, "light: images/s over the best peer's").found == Found([], failed=1)
    assert not goal(rows, "light: p99").met


def test_an_outage_of_a_peer_is_no_fault_of_ours():
    rows = [row("ours", 400), row("ray", 100), row("bentoml", 0, **NOTHING)]
    assert goal(rows, "light: images/s over the best peer's").met


def test_on_the_peers_provider_ours_is_the_one_that_was_told_to_use_it():
    rows = [row(name, rate, graph="resnet18") for name, rate in (("ours", 50), ("ray", 20))]
    assert goal(rows, "the peers' provider").found == Found([2.5])
    rows.append(row("ours-cpu", 30, graph="resnet18"))
    assert goal(rows, "the peers' provider").found == Found([1.5])
    assert goal(rows, "that it chooses").found == Found([2.5])


def test_two_services_are_told_beside_the_one_and_never_for_it():
    rows = [row("ours", 100), row("ray", 200), row("engine", 250)]
    named = "two services behind nginx"
    assert not [each for each in goals(rows) if named in each.name]
    rows.append(row("ours-pair", 300, p99_ms=4.5))
    found = {each.name: each for each in goals(rows)}
    assert [each.found for name, each in found.items() if named in name] == [
        Found([1.5]),
        Found([1.2]),
        Found([0.5]),
    ]
    assert goal(rows, "light: images/s over the best peer's").found == Found([0.5])


def test_each_graph_has_goals_whether_or_not_another_one_was_measured_on_two_devices():
    rows = [row("ours", 300), row("engine", 300), row("ray", 150)]
    rows += [row("ours", 50, graph="resnet18"), row("ours-cpu", 30, graph="resnet18")]
    rows.append(row("ray", 20, graph="resnet18"))
    assert goal(rows, "light: images/s over the bare engine's").found == Found([1])
    assert goal(rows, "light: images/s over the best peer's").found == Found([2])
    assert goal(rows, "light: p99").found == Found([1])
    assert goal(rows, "the peers' provider").found == Found([1.5])


def test_starts_and_memory_have_limits():
    rows = [{"part": "start", "server": "ours", "graph": "resnet18", "round": 0, "ready_s": 5.1}]
    resident = [100.0, 110.0, 104.0]
    rows.append({"part": "memory", "server": "ours", "graph": "light", "resident_mb": resident})
    rows[-1]["statuses"] = {"200": 9000, "400": 1000}
    assert not goal(rows, "start to first answer").met
    assert goal(rows, "resident memory").found == Found([1.04])
    assert goal(rows, "resident memory").met
    rows[-1]["statuses"]["500"] = 1
    assert not goal(rows, "resident memory").met


def test_recording_may_cost_three_percent():
    on, off = ({"part": "trace", "core_ms": ms} for ms in (5.2, 5.0))
    rows = [row("traced", 98, **on), row("untraced", 100, **off)]
    rows += [row("traced", 48, 1, **on), row("untraced", 50, 1, **off)]
    throughput = goal(rows, "light: images/s with every inspection recorded")
    assert throughput.found == Found([0.98, 0.96]) and throughput.met
    time = goal(rows, "light: processor time of an image with every inspection recorded")
    assert time.found == Found([1.04, 1.04]) and not time.met
    assert "| light | traced | 73 | 5 | 9 | 5.2 | 0.1 | 1.5 | 200 | `again` |" in markdown(rows)
    rows.append(row("traced", 20, 2, **on | {"errors": {"500": 1}}))
    assert not goal(rows, "light: images/s with every inspection recorded").met


def test_loads_that_were_measured_are_in_the_table_and_goals_that_were_not_say_so():
    assert markdown([]).strip() == ""
    text = markdown([row("ours", 123.4), row("ray", 100.0, errors={"500": 2})])
    assert (
        "| light, none | 32 clients | ours | 123 | 5 | 8 | 9 |  | 0.1 | 1.5 | 200 | 0 | `again` |"
        in text
    )
    assert "| ray | 100 | 5 | 8 | 9 |  | 0.1 | 1.5 | 200 | 2 | `again` |" in text
    assert "| start to first answer, demo bundle | <= 5 s | not measured |  |" in text
    assert "| >= 1.5 | 1.23 | **no** |" in text
    assert "| engine |" not in text


def test_how_late_the_generator_was_is_told_of_the_open_loop():
    text = markdown([row("ours", 100.0, loop="open")])
    assert "| 70 %, Poisson | ours | 100 | 5 | 8 | 9 | 0.7 |" in text


def test_a_row_in_which_nothing_was_answered_is_told_and_not_drawn():
    rows = [row("ours", 100.0), row("ray", 0.0, **NOTHING)]
    assert "| ray | 0 |  |  |  |" in markdown(rows)
    assert "0.0 images/s, errors {'500': 7}" in report.brief(rows[1])
    assert len(circles(plots(rows)["clients-light.svg"])) == 2  # of ours, in both panels
    assert circles(plots(rows[1:])["clients-light.svg"]) == []


def test_without_a_p99_throughput_is_drawn_all_the_same():
    drawn = plots([row("ours", 100.0, p99_ms=None), row("ours", 90.0, clients=1)])
    assert len(circles(drawn["clients-light.svg"])) == 2 + 1
    assert ">p99, ms<" in drawn["clients-light.svg"]


def test_where_no_point_has_a_p99_the_p95_is_drawn_and_said():
    drawn = plots([row("ours", n, clients=n, p99_ms=None) for n in (1, 4)])["clients-light.svg"]
    assert len(circles(drawn)) == 4 and ">p95, ms<" in drawn


def test_a_p99_that_some_rounds_lack_is_in_no_table():
    rows = [row("ours", 100.0), row("ours", 100.0, 1, p99_ms=None)]
    assert "| ours | 100 | 5 | 8 | 9 |" in markdown(rows[:1])
    assert "| ours | 100 | 5 | 8 |  |" in markdown(rows)


def test_every_growth_is_drawn():
    rows = [row("ours", 100.0, clients=n) for n in (1, 4, 8, 32)]
    rows += [row("ours", 100.0, part=part, **{key: 2}) for part, key in report.SCALED.items()]
    rows += [row("engine", 90.0, clients=n) for n in (1, 32)]
    drawn = plots(rows)
    assert set(drawn) == {"clients-light.svg", "size.svg", "batch.svg", "models.svg"}
    assert len(circles(drawn["clients-light.svg"])) == 2 * (4 + 2)
    assert "engine" in drawn["clients-light.svg"]


def test_results_are_written_with_the_machine_and_the_day(tmp_path):
    rows = [row("ours", 100.0)]
    report.write(tmp_path / "new", rows)
    record = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert record["rows"] == rows and "cores of" in record["hardware"]
    assert record["date"] in (tmp_path / "new" / "table.md").read_text()
    assert (tmp_path / "new" / "clients-light.svg").is_file()


def test_a_line_runs_through_its_points_in_order():
    svg = charts.lines("a < b", "clients", {"one": [(8, 20.0, 4.0), (1, 10.0, 2.0)], "two": []})
    assert "a &lt; b" in svg
    left, right = [
        [tuple(map(float, point.split(","))) for point in each.attrib["points"].split()]
        for each in ElementTree.fromstring(svg).iter()
        if each.tag.endswith("polyline") and each.attrib["points"]
    ]
    for (x0, y0), (x1, y1) in (left, right):
        assert x0 < x1 and y0 > y1  # both grow: upwards is less
    assert left[1][0] - left[0][0] == pytest.approx(right[1][0] - right[0][0], abs=0.2)


def circles(svg: str) -> list[ElementTree.Element]:
    return [each for each in ElementTree.fromstring(svg).iter() if each.tag.endswith("circle")]
