"""journal.py: whole lines are believed, everything from the first broken one on is not."""

import json
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2kit.formats import journal as j
from g2kit.formats.errors import FileIOError
from g2kit.formats.journal import Journal

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3),
    max_leaves=8,
)
records = st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=6)


@given(records, st.binary(max_size=40))
def test_what_is_appended_is_read_and_a_tail_is_not(rows, tail):
    data = b"".join(j.encode(r) for r in rows)
    assert j.decode(data) == (rows, len(data))
    assert j.decode(data + tail.replace(b"\n", b"")) == (rows, len(data))
    assert j.decode(data + b"\0" * 512) == (rows, len(data))


@given(records.filter(bool), st.data())
def test_a_broken_line_ends_it(rows, draw):
    lines = [j.encode(r) for r in rows]
    k = draw.draw(st.integers(0, len(lines) - 1))
    at = draw.draw(st.integers(0, len(lines[k]) - 1))
    bad = bytearray(lines[k])
    bad[at] ^= draw.draw(st.integers(1, 255))
    data = b"".join([*lines[:k], bytes(bad), *lines[k + 1 :]])
    assert j.decode(data) == (rows[:k], len(b"".join(lines[:k])))


def test_a_checksummed_line_that_is_no_object_ends_it():
    for text in (b"[1]", b"1", b"{", b"[" * 100_000):
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        assert j.decode(line) == ([], 0)


def test_appending_replaces_a_broken_tail(tmp_path):
    path = tmp_path / "journal"
    first = Journal(path)
    assert first.records == []
    for k in range(3):
        first.append({"k": k})
    first.close()
    first.close()
    data = path.read_bytes()
    path.write_bytes(data.replace(b'{"k":1}', b'{"k":7}'))
    second = Journal(path)
    assert second.records == [{"k": 0}]
    second.append({"new": 1})
    second.close()
    assert path.read_bytes() == j.encode({"k": 0}) + j.encode({"new": 1})
    second = Journal(path)
    second.forget()
    assert second.records == []
    second.append({"afresh": True})
    assert path.read_bytes() == j.encode({"afresh": True})
    second.close()


def test_odd_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    path.mkdir()
    with pytest.raises(FileIOError, match="cannot read the journal"):
        Journal(path)
    other = tmp_path / "other"
    other.write_bytes(j.encode({"a": 1}))
    (tmp_path / "link").symlink_to(other)
    with pytest.raises(FileIOError, match="cannot read the journal"):
        Journal(tmp_path / "link")
    monkeypatch.setattr(j, "MAX_BYTES", 4)
    with pytest.raises(FileIOError, match="it has 17 bytes, the limit is 4"):
        Journal(other)


def test_lines_are_plain_json_after_the_checksum(tmp_path):
    path: Path = tmp_path / "journal"
    journal = Journal(path)
    journal.append({"b": 1, "a": "ü\n"})
    journal.close()
    crc, _, text = path.read_bytes().rstrip(b"\n").partition(b" ")
    assert len(crc) == 8
    assert json.loads(text) == {"b": 1, "a": "ü\n"}
