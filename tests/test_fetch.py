"""Downloads from a real server on this machine: whole and checked, or not at all."""

import hashlib
import http.server
import io
import re
import stat
import tarfile
import zipfile
from dataclasses import dataclass, field

import pytest
from conftest import listening
from training_fixtures import normal_picture, np, write_picture

from training import fetch
from training.__main__ import main
from training.errors import TrainingError
from training.fetch import DATA_SETS, DataSet


@dataclass
class Server:
    """Answers every path with `content`, in part where that is asked for; what it was asked."""

    content: bytes = b""
    status: int = 200  # of a whole answer
    cut: int | None = None  # bytes sent before the line goes dead
    ranges: bool = True
    claimed: int = 0  # bytes, where a larger size is announced than is sent
    asked: list[str | None] = field(default_factory=list)  # Range headers
    url: str = ""

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        asked = handler.headers["Range"]
        self.asked.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0
        if start and start >= len(self.content):
            handler.send_error(416)
            return
        body = self.content[start:]
        handler.send_response(206 if start else self.status)
        handler.send_header("Content-Length", str(self.claimed or len(body)))
        handler.end_headers()
        handler.wfile.write(body[: self.cut])


@pytest.fixture
def server():
    state = Server()

    with listening(state.answer) as port:
        state.url = f"http://127.0.0.1:{port}/set.archive"
        yield state


PICTURE = b"pixels " * 5000


def tar_of(files: dict[str, bytes], mode: str = "w:xz", links: dict[str, str] | None = None):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o444  # MVTec's files are read-only
            tar.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return content.getvalue()


def zip_of(files: dict[str, bytes], links: dict[str, str] | None = None):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, data in files.items():
            zipped.writestr(name, data)
        for name, target in (links or {}).items():
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            zipped.writestr(info, target)
    return content.getvalue()


FILES = {"bottle/train/good/000.png": PICTURE, "bottle/test/good/000.png": PICTURE, "readme": b"1"}


def data_set(server: Server, content: bytes | None = None) -> DataSet:
    """What is pinned is the content that was served when it was made, or another."""
    digest = hashlib.sha256(server.content if content is None else content).hexdigest()
    return DataSet("A set", server.url, digest, "CC0", "mvtec")


def files_below(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")} | {
        p.name: p.read_bytes() for p in folder.glob("readme")
    }


ARCHIVES = [tar_of(FILES), tar_of(FILES, "w"), tar_of(FILES, "w:gz"), zip_of(FILES)]


@pytest.mark.parametrize("content", ARCHIVES, ids=["tar.xz", "tar", "tar.gz", "zip"])
def test_an_archive_arrives_checked_and_unpacked_and_nothing_is_left_over(
    server, tmp_path, content
):
    server.content = content
    fetch.fetch(data_set(server), tmp_path / "sets" / "one")
    assert files_below(tmp_path / "sets" / "one") == FILES
    assert [p.name for p in (tmp_path / "sets").iterdir()] == ["one"]
    (tmp_path / "sets/one/bottle/train/good/000.png").write_bytes(b"writable")


def test_an_empty_folder_may_be_there_already(server, tmp_path):
    server.content = ARCHIVES[0]
    (tmp_path / "out").mkdir()
    fetch.fetch(data_set(server), tmp_path / "out")
    assert files_below(tmp_path / "out") == FILES


def test_a_folder_with_something_in_it_is_refused_before_anything_is_asked(server, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "file"):
        with pytest.raises(TrainingError, match="exists and is not an empty folder"):
            fetch.fetch(data_set(server), out)
    assert server.asked == [] and (tmp_path / "out/mine.txt").read_text() == "mine"


def test_another_file_than_the_pinned_one_is_deleted(server, tmp_path):
    server.content = ARCHIVES[0]
    with pytest.raises(TrainingError, match=f"SHA-256 is [0-9a-f]+, and must be {'0' * 64}"):
        fetch.fetch(DataSet("A set", server.url, "0" * 64, "CC0", "mvtec"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranges", [True, False], ids=["resumable", "from the start again"])
def test_a_download_that_breaks_off_is_gone_on_with(server, tmp_path, ranges):
    server.content, server.cut, server.ranges = ARCHIVES[1], 30_000, ranges
    whole = len(server.content)
    message = f"broke off after 30,000 of {whole:,} bytes; the same command goes on"
    with pytest.raises(TrainingError, match=message):
        fetch.fetch(data_set(server), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    server.cut = None
    fetch.fetch(data_set(server), tmp_path / "out")
    assert files_below(tmp_path / "out") == FILES
    assert server.asked == [None, "bytes=30000-"]


def test_an_archive_that_was_whole_already_is_not_asked_for_again(server, tmp_path):
    server.content = ARCHIVES[0]
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part/archive").write_bytes(server.content)
    (tmp_path / "out.part/unpacked/half").mkdir(parents=True)  # killed while it was unpacked
    fetch.fetch(data_set(server), tmp_path / "out")
    assert files_below(tmp_path / "out") == FILES and not (tmp_path / "out/half").exists()


def test_the_rest_of_another_file_is_noticed_and_the_next_call_starts_anew(server, tmp_path):
    server.content = ARCHIVES[0]
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part/archive").write_bytes(b"something else")
    with pytest.raises(TrainingError, match="SHA-256"):
        fetch.fetch(data_set(server), tmp_path / "out")
    fetch.fetch(data_set(server), tmp_path / "out")
    assert files_below(tmp_path / "out") == FILES


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_a_servers_refusal_is_told_and_leaves_nothing(server, tmp_path, status):
    server.status = status
    with pytest.raises(TrainingError, match=f"HTTP {status} .*--url takes the archive"):
        fetch.fetch(data_set(server), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/set.zip", "no url", "file:///no/such/file"])
def test_a_server_that_is_not_there_is_told(tmp_path, url):
    with pytest.raises(TrainingError, match=re.escape(url) + ".*--url takes the archive"):
        fetch.fetch(DataSet("A set", url, "0" * 64, "CC0", "mvtec"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_archive_that_the_disk_has_no_room_for_is_not_begun(server, tmp_path):
    server.content, server.claimed = ARCHIVES[0], 1 << 60
    with pytest.raises(TrainingError, match=f"{1 << 60:,} bytes are needed and .* are free"):
        fetch.fetch(data_set(server), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


EVIL = {"../evil.png": b"evil"}


@pytest.mark.parametrize(
    "content, message",
    [
        (tar_of(EVIL), "outside the destination"),
        (tar_of({"evil.png": b"evil"}, links={"out": "../.."}), "outside the destination"),
        (tar_of({}, links={"out": "/etc/passwd"}), "absolute path"),
        (zip_of(EVIL), "'../evil.png' leads out"),
        (zip_of({"a/../../evil.png": b"evil"}), "leads out"),
        (zip_of({}, links={"out": "../.."}), "'out' leads out"),
        (b"no archive at all", "can't be unpacked"),
        (ARCHIVES[3][:-30], "can't be unpacked"),
        (ARCHIVES[0][: len(ARCHIVES[0]) // 2], "can't be unpacked"),
    ],
)
def test_an_archive_that_leads_out_or_is_damaged_is_refused(server, tmp_path, content, message):
    server.content = content
    with pytest.raises(TrainingError, match=message):
        fetch.fetch(data_set(server), tmp_path / "sets" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["sets"]
    assert not list(tmp_path.rglob("evil.png"))
    assert [p.name for p in (tmp_path / "sets/out.part").iterdir()] == ["archive"]


def test_an_absolute_name_in_a_zip_is_refused(server, tmp_path):
    server.content = zip_of({f"{tmp_path}/evil.png": b"evil"})
    with pytest.raises(TrainingError, match="leads out"):
        fetch.fetch(data_set(server), tmp_path / "out")
    assert not (tmp_path / "evil.png").exists()


def test_the_same_archive_may_come_from_elsewhere(server, tmp_path):
    (tmp_path / "mirror.zip").write_bytes(ARCHIVES[3])
    server.content = ARCHIVES[3]
    fetch.fetch(data_set(server), tmp_path / "out", (tmp_path / "mirror.zip").as_uri())
    assert files_below(tmp_path / "out") == FILES and server.asked == []


# The command line


@pytest.fixture
def bottle(server, tmp_path, monkeypatch):
    """A small MVTec AD on the local server."""
    picture = write_picture(tmp_path / "a.png", normal_picture(np.random.default_rng(0)))
    server.content = zip_of({f"one/{k}/train/good/0.png": picture.read_bytes() for k in "ab"})
    monkeypatch.setitem(DATA_SETS, "mvtec-ad", data_set(server))
    return ["fetch-data", "mvtec-ad", "--out", str(tmp_path / "out")]


def test_the_licence_is_shown_and_the_way_to_read_the_set_named(bottle, server, tmp_path, capsys):
    assert main([*bottle, "--yes"]) == 0
    printed = capsys.readouterr().out
    assert "A set" in printed and "licence: CC0" in printed and server.url in printed
    assert f"--data {tmp_path / 'out' / 'one'} --layout mvtec --category a|b" in printed


@pytest.mark.parametrize("answer", ["y\n", " YES \n"])
def test_a_licence_can_be_accepted_in_words(bottle, tmp_path, monkeypatch, answer):
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert main(bottle) == 0
    assert (tmp_path / "out/one/a/train/good/0.png").is_file()


@pytest.mark.parametrize("answer", ["", "n\n", "\n", "maybe\n"])
def test_nothing_is_downloaded_unless_the_licence_is_accepted(
    bottle, server, tmp_path, monkeypatch, capsys, answer
):
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert main(bottle) == 1
    shown = capsys.readouterr()
    assert "licence: CC0" in shown.out and "nothing was downloaded" in shown.err
    assert server.asked == [] and not (tmp_path / "out").exists()


def test_every_public_set_has_a_link_a_digest_and_a_layout_that_is_read():
    from training.datasets import LAYOUTS

    for one in DATA_SETS.values():
        assert one.url.startswith("https://") and re.fullmatch("[0-9a-f]{64}", one.sha256)
        assert one.layout in LAYOUTS and one.licence
