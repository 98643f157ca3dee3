"""The measurement side by side: rows, what repeats them, and that everybody answers the same."""

import base64
import http.client
import io
import json
import shlex
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from test_serve import wait_for

from bench import graphs, pair, processes, report, servers, serving
from bench.load import picture_request
from bench.servers import KINDS, PAIR, PEERS, Server
from service import heatmap, image
from service.bundle import Bundle
from service.detector import Detector

ROOT = Path(__file__).parent.parent
SMALL = ["--seconds", "0.2", "--rounds", "1"]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # as make is


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def measured(folder: Path, *flags: str) -> list[report.Row]:
    out = folder / "out"
    assert serving.main([*SMALL, "--folder", str(folder), "--out", str(out), *flags]) == 0
    assert (out / "table.md").is_file()
    rows: list[report.Row] = json.loads((out / "rows.json").read_text())["rows"]
    return rows


def test_ours_and_the_engine_are_asked_the_same(folder):
    flags = ["--part", "load", "--only", "ours", "engine", "--graph", "light"]
    rows = measured(folder, *flags, "--clients", "1", "32")
    found = {(r["server"], r.get("render"), r.get("loop"), r.get("clients")) for r in rows}
    asked = [("none", "closed", 1), ("none", "closed", 32), ("none", "open", 32)]
    asked += [("heatmap", loop, clients) for _, loop, clients in asked]
    assert found == {("ours", None, None, None), *(("ours", *each) for each in asked)} | {
        ("engine", "none", "closed", 1),
        ("engine", "none", "closed", 32),
    }
    loads = [row for row in rows if row["part"] == "load"]
    assert all(row["images_per_s"] > 0 and not row["errors"] for row in loads)
    assert next(row for row in rows if row["part"] == "start")["ready_s"] > 0


def test_the_command_of_a_row_measures_that_row_alone(folder):
    rows = measured(
        folder,
        *("--part", "load", "--only", "ours", "--graph", "light"),
        *("--render", "heatmap", "--clients", "8"),
    )
    load = rows[-1]
    assert (load["render"], load["clients"]) == ("heatmap", 8)
    words = shlex.split(load["command"])
    assert words[:3] == ["python", "-m", "bench.serving"]
    again = measured(folder, *words[3:])
    same = ("part", "server", "graph", "render", "loop", "clients", "round", "command")
    assert [[row.get(key) for key in same] for row in again] == [
        [row.get(key) for key in same] for row in rows
    ]


@pytest.mark.parametrize("part, places", [("size", serving.SIDES), ("models", (1, 2))])
def test_growth_is_measured_at_every_place(folder, monkeypatch, part, places):
    monkeypatch.setattr(serving, "SIDES", places[:2])
    monkeypatch.setattr(serving, "MODELS", places)
    rows = measured(folder, "--part", part, "--seconds", "3")  # a busy machine answers in it, too
    assert [row[report.SCALED[part]] for row in rows] == list(places[:2])
    assert all(row["answered"] > 0 and not row["errors"] for row in rows)
    assert (folder / "out" / f"{part}.svg").is_file()


def test_versions_are_swapped_while_the_service_is_asked(folder):
    rows = measured(folder, "--part", "swap", "--graph", "light", "--seconds", "2")
    assert [(row["swapping"], row["round"]) for row in rows] == [(False, 0), (True, 0)]
    assert rows[0]["swaps"] == 0 and rows[1]["swaps"] > 0
    assert all(row["answered"] > 0 and not row["errors"] for row in rows)


def test_memory_is_told_after_every_thousand_mixed_requests(folder, monkeypatch):
    monkeypatch.setattr(serving, "MIXED", 60)
    monkeypatch.setattr(serving, "MIXED_ROUNDS", 2)
    (row,) = measured(folder, "--part", "memory")
    assert len(row["resident_mb"]) == 2 and min(row["resident_mb"]) > 10
    assert sum(row["statuses"].values()) == 120
    assert set(row["statuses"]) == {"200", "400"}  # some are damaged


def test_a_server_that_records_takes_turns_with_one_that_does_not(folder):
    rows = measured(folder, "--part", "trace", "--graph", "light", "--rounds", "2")
    turns = [(row["server"], row["round"]) for row in rows]
    assert turns == [("untraced", 0), ("traced", 0), ("traced", 1), ("untraced", 1)]
    assert rows[0]["command"] == "python -m bench.serving --part trace --graph light"
    for server in report.TRACED:
        with closing(sqlite3.connect(folder / "scratch" / f"{server}-light.sqlite")) as database:
            (count,) = database.execute("SELECT count(*) FROM inspections").fetchone()
        asked = sum(row["answered"] for row in rows if row["server"] == server)
        assert count > asked if server == "traced" else count == 0  # some to warm up


def test_of_everything_only_the_light_graph_records_and_swaps(tmp_path, capsys):
    whole = serving.Plan(serving.PARTS, [], ["light", "resnet18"], [], [], 1, None, tmp_path)
    assert serving.telling(whole) == ["light"]
    assert "--part trace swap --graph resnet18" in capsys.readouterr().err
    assert serving.telling(replace(whole, parts=["trace"])) == ["light", "resnet18"]


def test_a_peer_that_is_not_installed_is_left_out(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(servers, "ENVIRONMENTS", tmp_path)
    nowhere = {"ray": servers._peer("ray", "-m", "bench.peers.ray", "{port}")}
    monkeypatch.setattr(serving, "KINDS", KINDS | nowhere)
    monkeypatch.setattr(serving, "ENVIRONMENTS", tmp_path)
    flags = ["--part", "load", "anomalib", "--only", "ray", "engine", "--graph", "light"]
    rows = measured(folder, *flags, "--clients", "1", "--render", "none")
    assert {row["server"] for row in rows} == {"engine"}
    said = capsys.readouterr().err
    assert "ray is not installed" in said and "anomalib is not installed" in said


def test_a_server_that_does_not_start_is_told_with_what_it_said(tmp_path):
    nowhere = tmp_path / "nowhere" / "light" / "1"
    starting = servers.serving(KINDS["ours"], nowhere, tmp_path, b"")
    with pytest.raises(RuntimeError, match="(?s)ours doesn't answer:.*No such file"):
        starting.__enter__()


def test_a_server_that_accepts_and_stays_silent_is_given_up(folder, tmp_path, monkeypatch):
    light = graphs.write(folder / "models")[0]
    code = "import socket, sys, time; listening = socket.create_server(('127.0.0.1', {port})); "
    code += "print('here', flush=True); kept = listening.accept(); time.sleep(60)"

    def command(bundle: Path, port: int, folder: Path) -> list[str]:
        return [sys.executable, "-c", code.format(port=port)]

    monkeypatch.setattr(servers, "READY_S", 2.0)
    silent = servers.serving(
        servers.Kind("silent", command, {"none": "/"}), light.folder, tmp_path, b""
    )
    with pytest.raises(RuntimeError, match="(?s)silent doesn't answer:.*here"):
        silent.__enter__()


def test_what_was_measured_before_a_failure_is_written(folder, monkeypatch):
    monkeypatch.setattr(serving, "SIDES", (256, 512))
    asked = serving.Bench._ask

    def fails_later(bench: serving.Bench, *args: object, **options: object) -> report.Row:
        if bench.rows:
            raise RuntimeError("it has gone")
        return asked(bench, *args, **options)

    monkeypatch.setattr(serving.Bench, "_ask", fails_later)
    with pytest.raises(RuntimeError, match="it has gone"):
        measured(folder, "--part", "size")
    rows = json.loads((folder / "out" / "rows.json").read_text())["rows"]
    assert [row["side"] for row in rows] == [256]


def test_where_nothing_was_answered_no_open_loop_follows(folder, monkeypatch):
    asked = []

    def nothing(bench: serving.Bench, *args: object, rate: float | None = None) -> report.Row:
        asked.append(rate)
        nothing = {"images_per_s": 0.0, "answered": 0, "errors": {"lost": 9}}
        return nothing | {f"p{rank}_ms": None for rank in (50, 95, 99)}

    monkeypatch.setattr(serving.Bench, "_ask", nothing)
    flags = ["--part", "load", "--only", "ours", "--graph", "light", "--render", "none"]
    rows = measured(folder, *flags, "--clients", "32")
    assert asked == [None]
    assert [row["loop"] for row in rows if row["part"] == "load"] == ["closed"]
    assert "with errors in 1 | **no** |" in (folder / "out" / "table.md").read_text()


def test_a_paused_server_stands_still_and_goes_on_and_ends_for_good(folder, tmp_path):
    light = graphs.write(folder / "models")[0]
    with servers.serving(KINDS["ours"], light.folder, tmp_path, picture()) as server:
        server.pause()
        wait_for(lambda: states(server) == {"T"}, "not all of it stands still")
        server.resume()
        assert answer(server, "none")["decision"] == "normal"
        server.pause()
    assert processes.cpu_s(server.pid) == 0  # no such process


def test_of_everything_a_heatmap_is_measured_where_its_cost_shows(folder):
    plan = serving.Plan(
        ["load"], ["ours"], ["light"], serving.RENDERS, serving.CLIENTS, 1, 1, folder
    )
    everything = serving.Bench(plan)
    plain = [("none", clients) for clients in (1, 4, 8, 32)]
    assert everything._cells("light") == [*plain, ("heatmap", 1), ("heatmap", 32)]
    assert everything._cells("resnet18") == plain
    asked_for = serving.Bench(replace(plan, clients=[8]))
    assert asked_for._cells("resnet18") == [("none", 8), ("heatmap", 8)]


def test_two_of_ours_are_measured_where_the_graph_leaves_cores_idle(folder, monkeypatch):
    monkeypatch.setattr(pair, "NGINX", "nginx")
    asked = serving.Plan(["load"], ["ours", PAIR], ["light"], ["none"], [1], 1, 0.1, folder)
    bench = serving.Bench(asked)
    assert bench._takers("light") == ["ours", PAIR]
    assert bench._takers("resnet18") == ["ours"]
    alone = serving.Bench(replace(asked, only=[PAIR]))
    assert alone._takers("resnet18") == [PAIR]


@pytest.mark.parametrize("name", ["ours-cpu", PAIR, *PEERS])
def test_everybody_gives_the_answer_that_the_engine_does(folder, tmp_path, name):
    if not KINDS[name].installed():
        pytest.skip(f"{name} is not installed: {KINDS[name].install}")
    bundle = graphs.write(folder / "models")[1]
    detector = Detector(bundle.read_graph(), bundle.manifest.image_size, "cpu")
    pixels, _ = image.decode_to(picture(), bundle.manifest.image_size)
    (expected,) = detector.run(pixels[None])
    threshold = bundle.default_calibration().threshold

    with servers.serving(KINDS[name], bundle.folder, tmp_path, picture()) as server:
        plain, rendered = answer(server, "none"), answer(server, "heatmap")

    assert plain["score"] == rendered["score"] == pytest.approx(expected.score, rel=1e-4)
    assert plain["decision"] == ("anomalous" if expected.score >= threshold else "normal")
    assert not plain.get("heatmap")
    drawn = Image.open(io.BytesIO(base64.b64decode(rendered["heatmap"])))
    levels = heatmap.levels(expected.anomaly_map, threshold)
    assert np.abs(np.asarray(drawn).astype(int) - levels).max() <= 1


def picture() -> bytes:
    pixels = cv2.imread(str(ROOT / "examples" / "normal.png"))
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def answer(server: Server, render: str) -> dict:
    """The JSON of one inspection; BentoML's is a list of one."""
    kind = server.kind
    request = picture_request(server.url(render), picture(), "image/jpeg", kind.form_field)
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    connection.connect()
    connection.sock.sendall(request)
    response = http.client.HTTPResponse(connection.sock)
    response.begin()
    assert response.status == 200
    found = json.loads(response.read())
    connection.close()
    return found[0] if isinstance(found, list) else found


def states(server: Server) -> set[str]:
    return {processes._stat(pid)[0] for pid in processes.tree(server.pid)}


def test_every_model_of_a_models_folder_is_the_same_graph(folder, tmp_path):
    bundle = graphs.write(folder / "models")[0]
    first = serving.copied(bundle, tmp_path, ["a", "b"])
    assert (first.name, first.digest) == ("a", bundle.digest)
    assert Bundle(tmp_path / "b" / "1").manifest.name == "b"
