"""Ten thousand pictures that nobody should send: each is decoded or refused, and nothing else."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from conftest import encoded, picture
from hostile import FORMATS, mutations, seeds
from hypothesis import given
from hypothesis import strategies as st
from test_serve import Server, serve

from bench.processes import resident_mb
from service import image
from service.errors import ServiceError

__all__ = ["serve"]  # the fixture

ROOT = Path(__file__).parents[1]
SIZE = (64, 96)
REFUSED = {400, 413, 415}
RENDERED = ("heatmap", "overlay", "mask", "none")
STRANGE = {
    "TIFF I": 415,
    "TIFF F": 415,
    "GIF animated": 415,
    "PNG of no pixels": 400,
    "PNG of 400 megapixels": 413,
    "PNG of 4 gigapixels": 413,
    "nothing": 400,
}


@pytest.mark.parametrize("name", seeds())
def test_every_kind_of_picture_is_decoded_or_refused_for_what_it_is(name: str) -> None:
    try:
        pixels, _ = image.decode_to(seeds()[name], SIZE)
    except ServiceError as error:
        assert error.status == STRANGE.get(name), error
    else:
        assert name not in STRANGE
        assert (pixels.shape, pixels.dtype) == ((*SIZE, 3), "uint8")


def test_ten_thousand_damaged_pictures_are_decoded_or_refused_by_name(
    capfd: pytest.CaptureFixture[str],
) -> None:
    outcomes: Counter[int] = Counter()
    for what, data in mutations(10_000):
        try:
            pixels, _ = image.decode_to(data, SIZE)
        except ServiceError as error:
            assert error.status in REFUSED, (what, error)
            assert str(error), what
            outcomes[error.status] += 1
        else:
            assert (pixels.shape, pixels.dtype) == ((*SIZE, 3), "uint8"), what
            outcomes[200] += 1
    capfd.readouterr()  # what libjpeg and libpng say to nobody

    assert set(outcomes) == {200, *REFUSED}, outcomes  # else the mutator has lost its bite


@given(
    st.sampled_from(sorted(set(seeds()) - {"PNG of 400 megapixels"})).map(seeds().__getitem__),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8), st.integers(0, 8)), max_size=5),
)
def test_whatever_is_spliced_into_a_picture_it_is_decoded_or_refused(
    data: bytes, splices: list[tuple[float, bytes, int]]
) -> None:
    for at, inserted, removed in splices:
        place = round(at * len(data))
        data = data[:place] + inserted + data[place + removed :]
    try:
        pixels, _ = image.decode_to(data, SIZE)
    except ServiceError as error:
        assert error.status in REFUSED and str(error)
    else:
        assert (pixels.shape, pixels.dtype) == ((*SIZE, 3), "uint8")


@pytest.mark.parametrize(
    "count", [500, pytest.param(10_000, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_damaged_pictures_leave_the_service_as_it_was(
    serve: Callable[..., Server], count: int
) -> None:
    server = serve()
    client = server.client

    def send(seed: int) -> set[int]:
        return {
            inspect(client, data, render=RENDERED[number % 4])
            for number, (_, data) in enumerate(mutations(count, seed))
        }

    # As a camera's would. glibc keeps the memory of what is below 8 MB for the next picture: with
    # none but tiny ones, each damaged one that is larger than all before it would add to that.
    for format in FORMATS:
        large = encoded(picture(size=(1600, 1600)), format)
        assert {inspect(client, large, render=render) for render in RENDERED} == {200}
    statuses = send(1)
    settled = resident_mb(server.process.pid)
    statuses |= send(2)

    assert statuses <= {200, *REFUSED}
    assert resident_mb(server.process.pid) < 1.05 * settled
    log = server.log.read_text()
    assert "Traceback" not in log and " ERROR " not in log


def inspect(client: httpx2.Client, data: bytes, render: str) -> int:
    headers = {"Content-Type": "image/png"}
    answer = client.post(f"/v1/inspect?render={render}", content=data, headers=headers)
    if answer.status_code != 200:
        assert answer.json()["type"].startswith("urn:skrd4ad:problem:")
    return answer.status_code


@pytest.mark.parametrize("name", ["PNG of 400 megapixels", "PNG of 4 gigapixels"])
def test_a_bomb_is_refused_without_being_unpacked(tmp_path: Path, name: str) -> None:
    (tmp_path / "bomb").write_bytes(seeds()[name])
    code = (
        "import resource, sys; from service import image; from service.errors import TooLarge\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "data, before = open(sys.argv[1], 'rb').read(), peak()\n"
        "try: image.decode_to(data, (64, 96))\n"
        "except TooLarge: print(peak() - before)"
    )

    grown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bomb")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )

    assert int(grown.stdout) < 50 * 1024  # KiB
