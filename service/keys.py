"""API keys: made, listed and taken back in the database, or told in a file of somebody else's.

A token is shown once and kept as its SHA-256: 256 random bits can't be guessed, so that a slow hash
would protect nothing and cost every request.
"""

import asyncio
import hmac
import logging
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

import sqlalchemy as sa

from service import database
from service.completion import pause
from service.database import Database
from service.errors import DatabaseAway, SettingsError, Unauthorized

log = logging.getLogger(__name__)

Scope = Literal["inspect", "calibrate", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)  # each may do what those before it may
KEY_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
ANONYMOUS = "anonymous"  # who asks without one
PREFIX = "skrd4ad_"  # by which scanners of repositories and logs can tell a token
MIN_TOKEN, MAX_TOKEN = 32, 256  # characters
QUOTES = "\"'"
NAMES = f"up to 64 letters, digits, dots, dashes and underscores, and not {ANONYMOUS}"
_LOOK_AGAIN_S = 0.2  # between two looks for a key that was made a moment ago


@dataclass(frozen=True)
class Key:
    """Who may do what, until when, how often."""

    name: str
    scope: Scope
    hash: str = field(default="", repr=False)  # SHA-256 of the token, hexadecimal
    created: datetime | None = None  # None: told in a file
    expires: datetime | None = None
    revoked: datetime | None = None
    max_rate: float | None = None  # requests a second

    def may(self, scope: Scope) -> bool:
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


class Keys:
    """The table; every method raises DatabaseAway where the database is."""

    def __init__(self, db: Database) -> None:
        self._database = db

    def create(
        self,
        name: str,
        scope: Scope,
        *,
        expires: datetime | None = None,
        max_rate: float | None = None,
    ) -> str:
        """A new key's token, which nobody can be told again.

        Raises SettingsError where a key of that name is in force: what was done by whom must stay
        plain.
        """
        token = PREFIX + secrets.token_urlsafe(32)
        row = {"name": name, "scope": scope, "expires": expires, "max_rate": max_rate}
        row |= {"hash": hashed(token), "created": datetime.now(UTC)}
        try:
            with self._database.write() as connection:
                connection.execute(database.keys.insert().values(**row))
        except sa.exc.IntegrityError:
            raise SettingsError(
                f"there is a key {name} already: revoke it first, or take another name"
            ) from None
        return token

    def all(self) -> list[Key]:
        """Revoked and expired ones as well, oldest first."""
        columns = [column for column in database.keys.c if column.name != "id"]
        with self._database.read() as connection:
            rows = connection.execute(sa.select(*columns).order_by(database.keys.c.id))
            return [Key(**row) for row in rows.mappings()]

    def revoke(self, name: str) -> None:
        """Raises SettingsError where no key of that name is in force."""
        c = database.keys.c
        update = database.keys.update().where(c.name == name, c.revoked.is_(None))
        with self._database.write() as connection:
            if not connection.execute(update.values(revoked=datetime.now(UTC))).rowcount:
                raise SettingsError(f"there is no key {name}, or it is revoked already")


class Keyring:
    """The keys as of a moment ago; raises DatabaseAway or SettingsError where they can't be read.

    Once there was a key, revoked or not, or where a file of keys is named, every caller needs one.
    """

    def __init__(self, keys: Keys, file: Path | None) -> None:
        self._keys, self._file = keys, file
        self._stored: list[Key] = []
        self._filed: list[Key] = []
        self._closed, self._looked, self._told = file is not None, 0.0, ""
        self._looking_again = asyncio.Lock()
        self._looking = threading.Lock()  # so that no older look overwrites a newer one
        self.look()

    @property
    def closed(self) -> bool:
        """Whether callers need a key."""
        return self._closed

    def look(self) -> None:
        """Take up keys that were made or taken back; neither the database nor the file holds up
        the other's."""
        with self._looking:
            try:
                if self._file:
                    self._filed = read(self._file)
            finally:
                self._stored = self._keys.all()
                self._closed = self._closed or bool(self._stored)

    async def find(self, token: str) -> Key:
        """The key with this token; raises Unauthorized where there is none, or it is no longer in
        force."""
        key = self._match(token)
        if key is None:
            await self._look_again()
            key = self._match(token)
        if key is None:
            raise Unauthorized("there is no such key")
        if key.revoked is not None:
            raise Unauthorized(f"the key {key.name} was revoked at {_shown(key.revoked)}")
        if key.expires is not None and key.expires <= datetime.now(UTC):
            raise Unauthorized(f"the key {key.name} expired at {_shown(key.expires)}")
        return key

    async def follow(self, stop: asyncio.Event, interval_s: float) -> None:
        """Take up changes until `stop`; what was known stays in force while they can't be read."""
        while not stop.is_set():
            try:
                await asyncio.to_thread(self.look)
                self._told = ""
            except DatabaseAway:
                pass  # the registry tells it
            except SettingsError as error:
                if str(error) != self._told:
                    log.error("%s; the keys known so far stay in force", error)
                self._told = str(error)
            await pause(stop, interval_s)

    def _match(self, token: str) -> Key | None:
        if not MIN_TOKEN <= len(token) <= MAX_TOKEN:
            return None
        found, given = None, hashed(token)
        for key in self._stored + self._filed:  # all of them, so that the time says nothing
            if hmac.compare_digest(key.hash, given):
                found = key
        return found

    async def _look_again(self) -> None:
        """It may be new; but whoever guesses keeps the database no busier than this."""
        asked = time.monotonic()
        async with self._looking_again:
            if self._looked < asked and time.monotonic() - self._looked > _LOOK_AGAIN_S:
                with suppress(DatabaseAway, SettingsError):
                    await asyncio.to_thread(self.look)
                self._looked = time.monotonic()


def _shown(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def hashed(token: str) -> str:
    return sha256(token.encode()).hexdigest()


def read(file: Path) -> list[Key]:
    """Keys of a file with a line `name scope token` for each, empty lines and `#` left out.

    Raises SettingsError, which names file and line and never the token.
    """
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"keys file {file}: {error}") from None
    keys = [
        _of_line(line.split(), f"keys file {file}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    _refuse_twice(keys, file)
    return keys


def _of_line(words: list[str], place: str) -> Key:
    if len(words) != 3:
        raise SettingsError(f"{place}: has {len(words)} words, not name, scope and token")
    name, token = words[0], words[2]
    # Nothing of a line is told before it is sure not to be the token, in the wrong place.
    scope = next((scope for scope in SCOPES if scope == words[1]), None)
    if scope is None:
        raise SettingsError(f"{place}: the second word is none of the scopes {', '.join(SCOPES)}")
    if not is_name(name) or len(name) >= MIN_TOKEN:
        raise SettingsError(f"{place}: the first word is no name for a key: {NAMES}")
    if token[0] in QUOTES or token[-1] in QUOTES:
        raise SettingsError(f"{place}: the token of {name} is in quotes, which would belong to it")
    if not (MIN_TOKEN <= len(token) <= MAX_TOKEN and token.isascii()):
        raise SettingsError(
            f"{place}: the token of {name} has {len(token)} characters; it must have {MIN_TOKEN} "
            f"to {MAX_TOKEN}, of ASCII: `openssl rand -hex 32` makes a good one"
        )
    return Key(name, scope, hashed(token))


def _refuse_twice(keys: Sequence[Key], file: Path) -> None:
    """Who did what must stay plain."""
    for what in ("name", "hash"):
        counts = Counter(getattr(key, what) for key in keys)
        for key in keys:
            if counts[getattr(key, what)] > 1:
                told = "name" if what == "name" else "token"
                raise SettingsError(f"keys file {file}: the {told} of {key.name} is there twice")


def is_name(name: str) -> bool:
    """Whether a key can have it."""
    return re.fullmatch(KEY_NAME_PATTERN, name) is not None and name != ANONYMOUS
