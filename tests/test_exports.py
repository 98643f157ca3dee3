"""Inspections for other programs: every column, to the last bit, and nothing that runs."""

import csv
import io
import json

import pytest
from conftest import record

from service import exports
from service.inspections import Found, Record


def rows(*found: Found) -> list[dict[str, str]]:
    text = (exports.head("csv") + exports.lines("csv", found)).decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_a_row_has_every_column_to_the_last_bit() -> None:
    score = 0.1 + 0.2
    (row,) = rows(Found(record(7, score=score, archived=True), "normal"))

    assert list(row) == [*Record._fields, "label"]
    assert float(row["score"]) == score
    assert row["at"] == "2026-11-26T12:00:07.000Z"
    assert (row["version"], row["archived"], row["label"]) == ("1", "true", "normal")


def test_what_is_null_is_an_empty_cell() -> None:
    (row,) = rows(Found(record(calibration=None, p_value=None), None))

    assert (row["calibration"], row["p_value"], row["label"]) == ("", "", "")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "＝1"])
def test_no_spreadsheet_runs_a_cell(text: str) -> None:
    (row,) = rows(Found(record(request_id=text, by=text), None))

    assert (row["request_id"], row["by"]) == (f"'{text}", f"'{text}")


def test_commas_quotes_and_line_ends_stay_in_their_cell() -> None:
    text = 'a,"b"\r\nc'
    first, second = rows(Found(record(1, by=text), None), Found(record(2), None))

    assert (first["by"], second["id"]) == (text, record(2).id)


def test_json_lines_have_one_inspection_each() -> None:
    found = [Found(record(1), None), Found(record(2), "anomalous")]

    lines = exports.lines("jsonl", found).decode().splitlines()

    assert exports.head("jsonl") == b""
    told = [json.loads(line) for line in lines]
    assert [(each["id"], each["label"]) for each in told] == [
        (record(1).id, None),
        (record(2).id, "anomalous"),
    ]
