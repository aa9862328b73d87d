import contextlib
import json
import os
import sys
import time

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from refusals import refusal

from g2kit.formats import strict_json
from g2kit.formats.errors import FileIOError, FormatError, G2Error, LimitError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def refused(data: bytes, error: type[G2Error], *parts: str, **limits: int) -> None:
    where = "dir/config.json"
    refusal(lambda: strict_json.loads(data, where=where, **limits), error, f"{where}: ", *parts)


@given(VALUES)
def test_reads_what_json_writes(value):
    for ascii_only in (True, False):
        data = json.dumps(value, ensure_ascii=ascii_only).encode()
        assert strict_json.loads(data, where="x") == value


@given(st.text('{}[]",:\\ u0d8tn1e-', max_size=60).map(str.encode))
@example(b'{"a\\\\": [[1]]}')
def test_agrees_with_json_or_refuses(data):
    try:
        expected = json.loads(data)
    except (ValueError, RecursionError):
        with pytest.raises(G2Error):
            strict_json.loads(data, where="x")
        return
    try:
        assert strict_json.loads(data, where="x") == expected
    except FormatError as e:
        why = str(e)
    else:
        return
    assert any(s in why for s in ("twice", "not finite", "surrogate"))


@pytest.mark.parametrize("inner", ["", '"[[[["', '"\\"[[[["', '"\\\\"', '"]]]]",{"k[[":[]}'])
def test_depth_is_counted_outside_strings(inner):
    deepest = 3 if "{" in inner else 1
    data = b"[" * 5 + inner.encode() + b"]" * 5
    depth = 5 + deepest - 1
    strict_json.loads(data, where="x", max_depth=depth)
    refused(data, LimitError, f"nests {depth} deep, at most {depth - 1}", max_depth=depth - 1)


def test_depth_is_counted_across_blocks():
    data = b'["' + b"[" * (1 << 20) + b'",' + b"[" * 3 + b"]" * 3 + b"]"
    assert strict_json.loads(data, where="x", max_values=2 << 20)[1] == [[[]]]
    refused(data, LimitError, "nests 4 deep", max_depth=3, max_values=2 << 20)


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_100_000_levels(opening):
    refused(opening * 100_000, LimitError, "nests 100000 deep, at most 64")


def test_depth_does_not_lean_on_the_recursion_limit():
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    try:
        refused(b"[" * 10**6, LimitError, "nests 1000000 deep")
    finally:
        sys.setrecursionlimit(before)


def test_recursion_error_of_a_nearly_full_stack():
    met = set()

    def deep(n):
        if n:
            return deep(n - 1)
        return strict_json.loads(b"[" * 60 + b"]" * 60, where="dir/config.json")

    for n in range(sys.getrecursionlimit(), 0, -1):
        try:
            deep(n)
        except (LimitError, RecursionError) as e:  # RecursionError: full before loads parsed
            met.add(type(e))
        else:
            break
    assert LimitError in met


def test_invalid_utf8_names_the_byte():
    refused(b'{"a": "\xff"}', FormatError, "not UTF-8: byte 0xff at byte 7")


def test_invalid_json_names_line_and_column():
    refused(b'{\n  "a": 1,\n}', FormatError, "not JSON: ", "line 3, column 1", "Fix: ")
    refused(b"", FormatError, "line 1, column 1")
    refused(b"{} {}", FormatError, "Extra data at line 1, column 4")
    refused(b"\xef\xbb\xbf{}", FormatError, "BOM")


def test_doubled_keys_at_any_level():
    refused(b'{"a": 1, "b": 2, "a": 1}', FormatError, 'key "a" appears twice')
    refused(b'[{"x": {"q\\n": 1, "q\\u000a": 2}}]', FormatError, 'key "q\\n" appears twice')


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_not_finite(number):
    refused(f"[{number}]".encode(), FormatError, f"number {number} is not finite")


def test_long_integer():
    refused(b"1" * 5_000_000, LimitError, "a number has 5000000 digits")


def test_half_a_surrogate_pair():
    refused(b'["\\ud83d"]', FormatError, "\\ud83d, half of a surrogate pair")
    assert strict_json.loads(b'["\\ud83d\\ude00", "\\\\ud83d"]', where="x") == ["😀", "\\ud83d"]


def test_too_many_values_is_refused_before_they_are_built():
    data = b"[" + b"{}," * 10_000_000 + b"{}]"
    start = time.process_time()
    refused(data, LimitError, "20000002 separators, at most 8000000")
    assert time.process_time() - start < 2


def test_strings_of_quotes_take_no_time():
    start = time.process_time()
    refused(b'"' * 30_000_000, FormatError, "Extra data")
    assert time.process_time() - start < 2


def test_load(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": [1, 2.5, "\xc3\xa9"]}')
    assert strict_json.load(path) == strict_json.load_object(path) == {"a": [1, 2.5, "é"]}
    path.write_bytes(b"[1]")
    with pytest.raises(FormatError, match=r"a\.json: the top level must be .* found an array"):
        strict_json.load_object(path)


def test_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as f:
        f.truncate(1 << 30)
    with pytest.raises(LimitError, match="has 1073741824 bytes, at most 67108864"):
        strict_json.load(path)
    path.write_bytes(b"[]")
    with pytest.raises(LimitError, match="has 2 bytes, at most 1"):
        strict_json.load(path, limit=1)


def test_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(FileIOError, match="not a regular file"):
            strict_json.load(path)
    with pytest.raises(FileIOError, match="cannot open"):
        strict_json.load(tmp_path / "absent.json")


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_any_bytes(data):
    with contextlib.suppress(G2Error):
        strict_json.loads(data, where="x")
