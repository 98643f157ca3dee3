"""The command line of API keys: `python -m service keys <action> --help`."""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from service.database import Database, sqlite_file
from service.errors import SettingsError
from service.keys import NAMES, SCOPES, Keys, Scope, is_name
from service.settings import Settings, load

MIN_RATE = 1e-3  # requests a second: one in a quarter of an hour


def add(commands: Any) -> None:
    """Adds `keys` to a parser's commands."""
    keys = commands.add_parser(
        "keys",
        help="make, list and revoke API keys",
        description="API keys. Once there is one, every caller needs one.",
    )
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key; its token is printed, once")
    create.add_argument("--name", required=True, help="who will use it; recorded with all they do")
    create.add_argument(
        "--scope",
        required=True,
        choices=SCOPES,
        help="what it may do: inspect; calibrate as well; or admin, everything",
    )
    create.add_argument(
        "--expires",
        type=_later,
        metavar="WHEN",
        help="days or hours from now (90d, 12h), or a moment with its zone (2027-01-01T00:00Z)",
    )
    create.add_argument(
        "--max-rate", type=float, metavar="N", help="most requests a second, to one service"
    )
    listing = actions.add_parser("list", help="show all keys, without their tokens")
    revoke = actions.add_parser("revoke", help="take a key back, within a second")
    revoke.add_argument("--name", required=True)
    for action, command in ((create, _create_key), (listing, _list_keys), (revoke, _revoke_key)):
        action.add_argument(
            "--database-url",
            default=argparse.SUPPRESS,
            metavar="URL",
            help=Settings.model_fields["database_url"].description,
        )
        action.set_defaults(command=command)


def _later(text: str) -> datetime:
    """When a key expires; raises ArgumentTypeError."""
    try:
        if text[-1:] in ("d", "h"):
            count = float(text[:-1])
            moment = datetime.now(UTC) + timedelta(hours=count * (24 if text[-1] == "d" else 1))
        else:
            moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise argparse.ArgumentTypeError(f"{text!r} has no time zone: append Z, say")
        moment = moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no moment; 90d is, or 2027-01-01T00:00Z"
        ) from None
    if moment <= datetime.now(UTC):
        raise argparse.ArgumentTypeError(f"{text!r} is past")
    return moment


@contextmanager
def _keys(settings: Mapping[str, object], *, new: bool = False) -> Iterator[tuple[Keys, str]]:
    """The keys, and the database that they are in, without its password.

    Raises SettingsError where that isn't there: it may be another one than the service's. A `new`
    one is made, and said to be so.
    """
    url = load(**settings).database_url
    file = sqlite_file(url)
    there = file is None or file.exists()
    if file and not there and not new:
        raise SettingsError(
            f"there is no database {file.absolute()}: is it the one that the service uses?"
        )
    database = Database(url)
    try:
        shown = str(file.absolute()) if file else database.shown
        yield Keys(database), shown if there else f"{shown} (a new database)"
    finally:
        database.close()


def _create_key(
    name: str, scope: Scope, expires: datetime | None, max_rate: float | None, **settings: object
) -> int:
    if not is_name(name):
        raise SettingsError(f"--name {name!r} is no name for a key: {NAMES}")
    if max_rate is not None and not MIN_RATE <= max_rate < math.inf:
        raise SettingsError(
            f"--max-rate {max_rate:g} is no rate: requests a second, {MIN_RATE:g} or more"
        )
    with _keys(settings, new=True) as (keys, place):
        first = not keys.all()
        token = keys.create(name, scope, expires=expires, max_rate=max_rate)
    print(token)
    told = f"key {name} is in {place}; keep its token now, it can't be shown again"
    if first:
        told += "; it is the first key there: from now on a service that uses it wants one of all"
    print(told, file=sys.stderr)
    return 0


def _list_keys(**settings: object) -> int:
    with _keys(settings) as (keys, _):
        rows = [
            (key.name, key.scope, _shown(key.created), _shown(key.expires), _shown(key.revoked))
            + (f"{key.max_rate:g}/s" if key.max_rate else "-",)
            for key in keys.all()
        ]
    table = [("NAME", "SCOPE", "CREATED", "EXPIRES", "REVOKED", "MAX RATE"), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    return 0


def _revoke_key(name: str, **settings: object) -> int:
    with _keys(settings) as (keys, _):
        keys.revoke(name)
    return 0


def _shown(moment: datetime | None) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ") if moment else "-"
