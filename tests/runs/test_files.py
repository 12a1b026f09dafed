"""Whatever lies where a file should be, reading it ends, and soon, without filling the memory."""

import json

import pytest

from tests.runs.foreign import EVERY, NO_FILE, text
from vitkd.runs.files import is_bounded, parse_yaml, read_limited, read_mapping, read_plain, read_rows


@pytest.mark.parametrize("parse", [json.loads, parse_yaml])
@pytest.mark.parametrize("become", EVERY.values(), ids=EVERY)
def test_what_is_no_run_s_file_is_refused(become, parse, tmp_path):
    become(tmp_path / "file")

    assert read_mapping(tmp_path / "file", parse) == {}


def test_what_a_run_writes_is_read(tmp_path):
    values = {"a": [1, 2.5, None, True, "é", {"b": 2**70}], "c": {}, "": -1}
    (tmp_path / "file").write_text(json.dumps(values))

    assert read_plain(tmp_path / "file") == values
    assert read_plain(tmp_path / "file", parse_yaml) == values


def test_a_limit_is_kept_to_the_byte(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 9)

    assert read_limited(tmp_path / "file", 9) == b"x" * 9
    with pytest.raises(OSError, match="longer than 8 bytes"):
        read_limited(tmp_path / "file", 8)


def test_values_count_as_often_as_they_appear():
    shared = ["x"] * 1000

    assert is_bounded([shared] * 90)
    assert not is_bounded([shared] * 110)


ROWS = ["step,a,b", "1,0.5,", "2,,1e-300", "3,nan,-inf"]
GARBAGE = {
    "noise": b"\xff\xfe\x00,\x80,7",
    "a quote": b'"',
    "a quote in a cell": b'4,"0.5,1',
    "words": b"four,five,six",
    "a cell too many": b"4,1,2,3",
    "a cell too few": b"4,1",
    "nothing": b"",
    "no step": b",1,2",
    "a step before the first": b"-4,1,2",
    "a step of 401 digits": b"1" + b"0" * 400 + b",1,2",
    "a cell that never ends": b"4," + b"1" * 200_000 + b",x",
}


@pytest.mark.parametrize("place", [1, 2, 4])
@pytest.mark.parametrize("line", GARBAGE.values(), ids=GARBAGE)
def test_a_line_that_is_no_row_takes_no_other_with_it(line, place, tmp_path):
    lines = [row.encode() for row in ROWS]
    lines.insert(place, line)
    (tmp_path / "file").write_bytes(b"\r\n".join(lines) + b"\r\n4,0.")

    rows, bad = read_rows(tmp_path / "file")

    assert [",".join(row.values()) for row in rows] == ROWS[1:]
    assert bad == 1


@pytest.mark.parametrize("header", [b"", b"a,b,c", b"\xff\xfe", b"step"])
def test_without_its_header_a_file_has_no_rows(header, tmp_path):
    text(header + b"\n1,0.5,\n")(tmp_path / "file")

    assert read_rows(tmp_path / "file") == ([], 1 + (header != b"step"))


@pytest.mark.parametrize("become", NO_FILE.values(), ids=NO_FILE)
def test_curves_that_are_no_file(become, tmp_path):
    become(tmp_path / "file")

    with pytest.raises(OSError, match="file"):
        read_rows(tmp_path / "file")
