"""`python -m service keys`: made, listed and revoked beside a service that runs."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import encoded, picture
from test_serve import Server, run_service, serve, wait_for

from service.__main__ import main
from service.database import Database
from service.keys import Keys, hashed

__all__ = ["serve"]  # the fixture


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'state.sqlite'}"


def run(url: str, *arguments: str) -> int:
    return main(["keys", *arguments, "--database-url", url])


def created(capsys: pytest.CaptureFixture[str], url: str, *arguments: str) -> str:
    assert run(url, "create", *arguments) == 0
    return capsys.readouterr().out.strip()


def test_the_token_alone_goes_to_standard_output_and_is_told_to_be_kept(
    capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert run(url, "create", "--name", "line-3", "--scope", "inspect") == 0

    told = capsys.readouterr()
    assert re.fullmatch(r"skrd4ad_[\w-]{43}\n", told.out)
    path = url.removeprefix("sqlite:///")
    assert f"key line-3 is in {path} (a new database); keep its token" in told.err
    assert "can't be shown again; it is the first key there" in told.err
    assert told.out.strip() not in told.err
    (key,) = Keys(Database(url)).all()
    assert (key.name, key.scope, key.hash) == ("line-3", "inspect", hashed(told.out.strip()))

    assert run(url, "create", "--name", "line-4", "--scope", "inspect") == 0
    told = capsys.readouterr()
    assert "first key" not in told.err and "a new database" not in told.err


@pytest.mark.parametrize(
    ("text", "hours"), [("90d", 90 * 24), ("12h", 12), ("0.5d", 12), ("2100-01-01T00:00Z", None)]
)
def test_a_key_can_expire(
    capsys: pytest.CaptureFixture[str], url: str, text: str, hours: float | None
) -> None:
    created(capsys, url, "--name", "a", "--scope", "admin", "--expires", text)

    (key,) = Keys(Database(url)).all()

    expected = datetime(2100, 1, 1, tzinfo=UTC)
    if hours is not None:
        expected = datetime.now(UTC) + timedelta(hours=hours)
    assert key.expires is not None and abs(key.expires - expected) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--expires", "tomorrow"), "'tomorrow' is no moment; 90d is"),
        (("--expires", "2100-01-01"), "has no time zone"),
        (("--expires", "2001-01-01T00:00Z"), "is past"),
        (("--expires", "-1d"), "is past"),
        (("--expires", "nand"), "is no moment"),
        (("--expires", "1e300d"), "is no moment"),
        (("--expires", "9999-12-31T23:59-05:00"), "is no moment"),
        (("--scope", "root"), "invalid choice: 'root'"),
    ],
)
def test_arguments_that_are_none_are_refused(
    capsys: pytest.CaptureFixture[str], url: str, arguments: tuple[str, str], told: str
) -> None:
    name, value = arguments
    with pytest.raises(SystemExit):
        run(url, "create", "--name", "a", "--scope", "admin", f"{name}={value}")

    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--name", "a b", "--scope", "admin"), "--name 'a b' is no name"),
        (("--name", "anonymous", "--scope", "admin"), "--name 'anonymous' is no name"),
        (("--name", "a\n", "--scope", "admin"), "--name 'a\\n' is no name"),
        (("--name", "a", "--scope", "admin", "--max-rate", "1e-310"), "--max-rate 1e-310 is no"),
        (("--name", "a", "--scope", "admin", "--max-rate", "0"), "--max-rate 0 is no rate"),
        (("--name", "a", "--scope", "admin", "--max-rate", "nan"), "--max-rate nan is no rate"),
    ],
)
def test_what_no_key_can_have_is_refused_before_the_database_is_touched(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, url: str, arguments: tuple[str], told: str
) -> None:
    assert run(url, "create", *arguments) == 1

    assert f"error: {told}" in capsys.readouterr().err
    assert not (tmp_path / "state.sqlite").exists()


def test_a_list_has_all_but_the_tokens(capsys: pytest.CaptureFixture[str], url: str) -> None:
    tokens = [
        created(capsys, url, "--name", "line-3", "--scope", "inspect", "--max-rate", "30"),
        created(
            capsys, url, "--name", "boss", "--scope", "admin", "--expires", "2100-01-01T00:00Z"
        ),
    ]
    assert run(url, "revoke", "--name", "line-3") == 0
    capsys.readouterr()

    assert run(url, "list") == 0

    told = capsys.readouterr().out
    head, first, second = (line.split() for line in told.splitlines())
    assert head == ["NAME", "SCOPE", "CREATED", "EXPIRES", "REVOKED", "MAX", "RATE"]
    assert (first[:2], first[3], first[5]) == (["line-3", "inspect"], "-", "30/s")
    assert first[4].startswith("20") and second[4] == "-"
    assert second[3] == "2100-01-01T00:00:00Z"
    assert not any(token in told or hashed(token) in told for token in tokens)


@pytest.mark.parametrize("arguments", [("list",), ("revoke", "--name", "line-3")])
def test_a_database_that_is_not_there_is_not_made(
    capsys: pytest.CaptureFixture[str], url: str, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    assert run(url, *arguments) == 1

    assert f"there is no database {tmp_path / 'state.sqlite'}" in capsys.readouterr().err
    assert not (tmp_path / "state.sqlite").exists()


def test_revoking_what_is_not_there_fails(capsys: pytest.CaptureFixture[str], url: str) -> None:
    Database(url).close()
    assert run(url, "revoke", "--name", "line-3") == 1
    assert "error: there is no key line-3" in capsys.readouterr().err


def test_a_key_closes_a_running_service_and_is_taken_back_in_it(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve()
    url = f"sqlite:///{tmp_path / 'state.sqlite'}"
    data = encoded(picture())
    assert server.inspect(data).status_code == 200

    token = command(url, "create", "--name", "line-3", "--scope", "inspect").strip()

    wait_for(lambda: server.inspect(data).status_code == 401, "still open")
    server.client.headers["Authorization"] = f"Bearer {token}"
    assert server.inspect(data).status_code == 200
    command(url, "revoke", "--name", "line-3")
    wait_for(lambda: server.inspect(data).status_code == 401, "still in force")
    log = server.log.read_text()
    assert token not in log and "by=line-3" in log


def command(url: str, *arguments: str) -> str:
    ended = run_service("keys", *arguments, SKRD4AD_DATABASE_URL=url)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
