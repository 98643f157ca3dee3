"""Recorded inspections as files for other programs: CSV, and JSON Lines as in lists."""

import csv
import io
from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from service.inspections import Found, Record
from service.schemas import RecordedInspection

Format = Literal["csv", "jsonl"]
MEDIA_TYPES: dict[Format, str] = {"csv": "text/csv", "jsonl": "application/jsonl"}
COLUMNS = (*Record._fields, "label")
# Spreadsheets run text that begins like this (OWASP, CSV injection); theirs as East Asia types it.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def head(format: Format) -> bytes:
    """What comes before the first inspection."""
    return _csv([COLUMNS]) if format == "csv" else b""


def lines(format: Format, found: Sequence[Found]) -> bytes:
    if format == "csv":
        return _csv([[_cell(value) for value in (*each.record, each.label)] for each in found])
    return b"".join(
        RecordedInspection.of(each).model_dump_json().encode() + b"\n" for each in found
    )


def _csv(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)  # RFC 4180
    return text.getvalue().encode()


def _cell(value: object) -> object:
    """Floats to the last bit, moments as in JSON, and no text that a spreadsheet would run."""
    if isinstance(value, str) and value.startswith(_FORMULAS):
        return f"'{value}"
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, bool):
        return str(value).lower()
    return value
