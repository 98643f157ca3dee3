"""API keys: kept as hashes, one of each name in force, taken up while the service runs."""

import asyncio
import hashlib
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import PostgreSql

from service import database as tables
from service import keys as module
from service.database import Database
from service.errors import DatabaseAway, SettingsError, Unauthorized
from service.keys import Key, Keyring, Keys, hashed, read

TOKEN = "t" * 40


@pytest.fixture
def keys(database: Database) -> Keys:
    return Keys(database)


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"# who may do what\n\nline-3 inspect {TOKEN}\n")
    return file


def find(keyring: Keyring, token: str) -> Key:
    return asyncio.run(keyring.find(token))


def refused(keyring: Keyring, token: str) -> str:
    with pytest.raises(Unauthorized) as raised:
        find(keyring, token)
    return str(raised.value)


# The table


def test_of_a_token_only_the_hash_is_kept(keys: Keys, database: Database) -> None:
    token = keys.create("line-3", "inspect")

    with database.read() as connection:
        rows = connection.execute(sa.select(tables.keys)).all()
    assert [row.hash for row in rows] == [hashlib.sha256(token.encode()).hexdigest()]
    assert token not in str(rows)
    assert token not in repr(keys.all())
    assert token.startswith("skrd4ad_") and len(token) > 40


def test_tokens_differ(keys: Keys) -> None:
    assert keys.create("a", "inspect") != keys.create("b", "inspect")


def test_a_key_comes_back_with_all_that_was_said_of_it(keys: Keys) -> None:
    expires = datetime(2100, 1, 1, tzinfo=UTC)
    before = datetime.now(UTC)
    token = keys.create("line-3", "calibrate", expires=expires, max_rate=2.5)

    (key,) = keys.all()

    assert key == Key("line-3", "calibrate", hashed(token), key.created, expires, None, 2.5)
    assert key.created is not None and before <= key.created <= datetime.now(UTC)


def test_a_name_is_free_again_once_its_key_is_revoked(keys: Keys) -> None:
    keys.create("line-3", "inspect")
    with pytest.raises(SettingsError, match="there is a key line-3 already"):
        keys.create("line-3", "admin")

    keys.revoke("line-3")
    keys.create("line-3", "admin")

    old, new = keys.all()
    assert (old.scope, new.scope) == ("inspect", "admin")
    assert old.revoked is not None and new.revoked is None


def test_what_is_not_there_or_revoked_can_not_be_revoked(keys: Keys) -> None:
    with pytest.raises(SettingsError, match="no key line-3"):
        keys.revoke("line-3")
    keys.create("line-3", "inspect")
    keys.revoke("line-3")
    with pytest.raises(SettingsError, match="revoked already"):
        keys.revoke("line-3")


@pytest.mark.parametrize(
    ("scope", "may"),
    [
        ("inspect", {"inspect"}),
        ("calibrate", {"inspect", "calibrate"}),
        ("admin", {"inspect", "calibrate", "admin"}),
    ],
)
def test_a_higher_scope_may_what_lower_ones_may(scope: module.Scope, may: set[str]) -> None:
    assert {asked for asked in module.SCOPES if Key("a", scope).may(asked)} == may


# The ring


def test_without_a_key_nobody_needs_one_and_with_the_first_everybody_does(keys: Keys) -> None:
    keyring = Keyring(keys, None)
    assert not keyring.closed

    token = keys.create("line-3", "inspect")
    keyring.look()

    assert keyring.closed
    assert find(keyring, token).name == "line-3"


def test_revoking_the_last_key_opens_nothing(keys: Keys) -> None:
    token = keys.create("line-3", "inspect")
    keyring = Keyring(keys, None)

    keys.revoke("line-3")
    keyring.look()

    assert keyring.closed
    assert Keyring(keys, None).closed
    assert "line-3 was revoked at 2" in refused(keyring, token)


def test_a_key_is_revoked_by_whoevers_clock(keys: Keys, database: Database) -> None:
    token = keys.create("line-3", "inspect")
    late = datetime.now(UTC) + timedelta(hours=1)
    with database.write() as connection:
        connection.execute(tables.keys.update().values(revoked=late))

    assert "was revoked" in refused(Keyring(keys, None), token)


def test_a_key_expires_by_itself(keys: Keys) -> None:
    keyring = Keyring(keys, None)
    token = keys.create("line-3", "inspect", expires=datetime.now(UTC) + timedelta(hours=1))
    late = keys.create("line-4", "inspect", expires=datetime.now(UTC) - timedelta(hours=1))
    keyring.look()

    assert find(keyring, token).name == "line-3"
    assert "line-4 expired at 2" in refused(keyring, late)
    assert keyring.closed


@pytest.mark.parametrize("token", ["", "short", "x" * 64, "x" * 100_000, "ü" * 64])
def test_what_is_no_token_is_refused(keys: Keys, token: str) -> None:
    keys.create("line-3", "inspect")

    assert refused(Keyring(keys, None), token) == "there is no such key"


def test_part_of_a_token_and_its_hash_are_none(keys: Keys) -> None:
    token = keys.create("line-3", "inspect")
    keyring = Keyring(keys, None)

    for near in (token[:-1], token + "x", token.swapcase(), hashed(token)):
        assert refused(keyring, near) == "there is no such key"


def test_a_key_that_was_made_a_moment_ago_is_found(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_AGAIN_S", 0.0)
    keyring = Keyring(keys, None)

    token = keys.create("line-3", "inspect")

    assert find(keyring, token).name == "line-3"


def test_guesses_that_come_together_look_once_and_wait_no_longer(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.create("line-3", "inspect")
    keyring = Keyring(keys, None)
    monkeypatch.setattr(module, "_LOOK_AGAIN_S", 0.0)
    looks: list[None] = []

    def slowly() -> None:
        looks.append(None)
        time.sleep(0.3)

    monkeypatch.setattr(keyring, "look", slowly)

    async def guess() -> None:
        results = await asyncio.gather(
            *(keyring.find("x" * 64) for _ in range(50)), return_exceptions=True
        )
        assert all(isinstance(result, Unauthorized) for result in results)

    asyncio.run(guess())

    assert len(looks) == 1


def test_guesses_keep_the_database_no_busier_than_the_interval(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.create("line-3", "inspect")
    keyring = Keyring(keys, None)
    monkeypatch.setattr(module, "_LOOK_AGAIN_S", 3600.0)
    keyring._looked = float("-inf")
    looks: list[None] = []
    monkeypatch.setattr(keyring, "look", lambda: looks.append(None))

    for _ in range(20):
        refused(keyring, "x" * 64)

    assert len(looks) == 1


def test_changes_are_taken_up_while_it_runs(keys: Keys) -> None:
    async def scene() -> None:
        keyring, stop = Keyring(keys, None), asyncio.Event()
        following = asyncio.create_task(keyring.follow(stop, 0.01))
        token = await asyncio.to_thread(keys.create, "line-3", "inspect")
        await until(lambda: keyring.closed)
        assert (await keyring.find(token)).revoked is None
        await asyncio.to_thread(keys.revoke, "line-3")
        await until(lambda: keyring._stored[0].revoked is not None)
        with pytest.raises(Unauthorized):
            await keyring.find(token)
        stop.set()
        await following

    asyncio.run(scene())


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_known_keys_stay_in_force_while_the_database_is_away(postgresql: PostgreSql) -> None:
    async def scene() -> None:
        stop = asyncio.Event()
        keys = Keys(Database(postgresql.new_database()))
        token = keys.create("line-3", "inspect")
        keyring = Keyring(keys, None)
        postgresql.stop()
        try:
            following = asyncio.create_task(keyring.follow(stop, 0.01))
            with pytest.raises(DatabaseAway):
                await asyncio.to_thread(keyring.look)
            assert (await keyring.find(token)).name == "line-3"
            with pytest.raises(Unauthorized):
                await keyring.find("x" * 64)
            stop.set()
            await following
        finally:
            postgresql.start()

    asyncio.run(scene())


# The file


def test_keys_of_a_file_count_beside_those_of_the_database(keys: Keys, keys_file: Path) -> None:
    keyring = Keyring(keys, keys_file)
    assert keyring.closed
    assert find(keyring, TOKEN) == Key("line-3", "inspect", hashed(TOKEN))

    token = keys.create("boss", "admin")
    keyring.look()

    assert find(keyring, token).name == "boss"


def test_a_file_may_come_from_windows(keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(f"\ufeffline-3 inspect {TOKEN}\r\n".encode())

    assert find(Keyring(keys, tmp_path / "keys"), TOKEN).name == "line-3"


def test_a_line_that_is_gone_is_a_key_that_is_gone(keys: Keys, keys_file: Path) -> None:
    keyring = Keyring(keys, keys_file)

    keys_file.write_text("")
    keyring.look()

    assert keyring.closed
    assert refused(keyring, TOKEN) == "there is no such key"


def test_a_file_that_breaks_leaves_its_keys_and_holds_up_no_revocation(
    keys: Keys, keys_file: Path
) -> None:
    token = keys.create("boss", "admin")
    keyring = Keyring(keys, keys_file)

    keys_file.unlink()
    keys.revoke("boss")
    with pytest.raises(SettingsError, match="No such file"):
        keyring.look()

    assert find(keyring, TOKEN).name == "line-3"
    assert "revoked" in refused(keyring, token)


def test_a_broken_file_is_told_once(
    keys: Keys, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        keyring, stop = Keyring(keys, keys_file), asyncio.Event()
        keys_file.write_text("nonsense")
        following = asyncio.create_task(keyring.follow(stop, 0.001))
        await until(lambda: caplog.messages)
        await asyncio.sleep(0.1)
        stop.set()
        await following

    asyncio.run(scene())

    (told,) = caplog.messages
    assert "line 1: has 1 words" in told and "stay in force" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"line-3 {TOKEN}", "line 1: has 2 words, not name, scope and token"),
        (
            f"\nline-3 root {TOKEN}",
            "line 2: the second word is none of the scopes inspect, calibrate, admin",
        ),
        (f"-x admin {TOKEN}", "line 1: the first word is no name"),
        (f"anonymous admin {TOKEN}", "line 1: the first word is no name"),
        ("line-3 admin short-secret", "the token of line-3 has 12 characters; it must have 32"),
        (f"line-3 admin {'ü' * 40}", "of ASCII"),
        (f"a admin {TOKEN}\nb admin {TOKEN}", "the token of a is there twice"),
        (f"a admin {TOKEN}\na admin {TOKEN}x", "the name of a is there twice"),
        (b"\xff", "can't decode"),
        (f"line-3 {TOKEN} admin", "line 1: the second word is none"),
        (f"{TOKEN} admin line-3", "line 1: the first word is no name"),
        (f"line-3 admin '{TOKEN}'", "the token of line-3 is in quotes"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_line_and_without_its_secrets(
    tmp_path: Path, text: str | bytes, told: str
) -> None:
    file = tmp_path / "keys"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(SettingsError) as raised:
        read(file)

    assert told in str(raised.value)
    assert TOKEN not in str(raised.value) and "short-secret" not in str(raised.value)


def test_a_file_closes_the_service_even_where_it_is_empty(keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n")

    assert Keyring(keys, tmp_path / "keys").closed


def test_a_line_that_goes_while_the_database_is_away_is_a_key_that_goes(
    keys: Keys, keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyring = Keyring(keys, keys_file)

    def away() -> list[Key]:
        raise DatabaseAway("away")

    monkeypatch.setattr(keys, "all", away)
    keys_file.write_text("")
    with pytest.raises(DatabaseAway):
        keyring.look()

    assert refused(keyring, TOKEN) == "there is no such key"


def test_a_file_that_is_refused_changes_nothing(keys: Keys, keys_file: Path) -> None:
    keyring = Keyring(keys, keys_file)

    keys_file.write_text(f"new admin {'n' * 40}\nnew admin {'m' * 40}\n")
    with pytest.raises(SettingsError):
        keyring.look()

    assert find(keyring, TOKEN).name == "line-3"
    assert refused(keyring, "n" * 40) == "there is no such key"
