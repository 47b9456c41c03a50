"""Text from bytes: no split of the bytes changes what is shown, and stop strings are found across splits."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.engine.text_stream import MAX_STOP_LENGTH, MAX_STOP_STRINGS, TextStream
from edge_runtime.errors import RequestError


def until_stop(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        ending = [len(string) for string in stop if text[:end].endswith(string)]
        if ending:
            return text[: end - max(ending)], True
    return text, False


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


SMALL_TEXT = st.text(alphabet="abé€😀", max_size=40)
STOPS = st.lists(st.text(alphabet="abé€😀", min_size=1, max_size=5), max_size=4)


@given(st.binary(max_size=60), st.lists(st.integers(0, 1000), max_size=12))
def test_any_split_of_any_bytes_decodes_like_the_whole(data: bytes, cuts: list[int]) -> None:
    stream = TextStream()
    shown = "".join(stream.push(piece) for piece in pieces_of(data, cuts)) + stream.finish()
    assert shown == data.decode("utf-8", errors="replace")


@given(SMALL_TEXT, STOPS, st.lists(st.integers(0, 1000), max_size=12))
def test_stops_are_those_of_the_whole_text(text: str, stop: list[str], cuts: list[int]) -> None:
    stream = TextStream(stop)
    shown = "".join(stream.push(piece) for piece in pieces_of(text.encode(), cuts)) + stream.finish()
    assert (shown, stream.stopped) == until_stop(text, stop)


@given(SMALL_TEXT, STOPS)
def test_nothing_more_is_held_back_than_a_beginning_of_a_stop_string(text: str, stop: list[str]) -> None:
    stream = TextStream(stop)
    shown = ""
    for index, character in enumerate(text):
        shown += stream.push(character.encode())
        if stream.stopped:
            break
        held = text[len(shown) : index + 1]
        prefixes = {string[:length] for string in stop for length in range(len(string))}
        so_far = text[: index + 1]
        longest = max((prefix for prefix in prefixes if so_far.endswith(prefix)), key=len, default="")
        assert held == longest


def test_a_character_is_shown_with_its_last_byte() -> None:
    stream = TextStream()
    assert [stream.push(bytes([byte])) for byte in "€!".encode()] == ["", "", "€", "!"]


def test_invalid_bytes_are_replaced_at_once() -> None:
    stream = TextStream()
    assert stream.push(b"a\xff") == "a\ufffd"
    assert stream.push(b"\xe2\x82") == ""
    assert stream.push(b"b") == "\ufffdb"


def test_half_a_character_at_the_end_is_replaced() -> None:
    stream = TextStream(["stop"])
    assert stream.push(b"a\xe2\x82") == "a"
    assert stream.finish() == "\ufffd"


def test_a_stop_string_spans_pieces_and_hides_what_follows() -> None:
    stream = TextStream(["</s>"])
    assert [stream.push(piece) for piece in (b"one <", b"/s", b"> two", b"three")] == ["one ", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_a_false_start_of_a_stop_string_is_shown_after_all() -> None:
    stream = TextStream(["</s>"])
    assert stream.push(b"a </") == "a "
    assert stream.push(b"b>") == "</b>"
    assert not stream.stopped


def test_the_stop_string_complete_first_ends_the_text() -> None:
    stream = TextStream(["b", "abc"])
    assert (stream.push(b"xabc"), stream.stopped) == ("xa", True)


def test_of_stop_strings_that_end_together_the_longest_is_hidden() -> None:
    stream = TextStream(["c", "abc", "bc"])
    assert (stream.push(b"xabc"), stream.stopped) == ("x", True)


def test_what_was_held_back_comes_at_the_end_once() -> None:
    stream = TextStream(["stop"])
    assert stream.push(b"no sto") == "no "
    assert stream.finish() == "sto"
    assert stream.finish() == ""


def test_a_stop_string_may_end_with_a_replaced_character() -> None:
    stream = TextStream(["a\ufffd"])
    assert stream.push(b"xa\xe2") == "x"
    assert (stream.finish(), stream.stopped) == ("", True)


def test_time_is_linear_in_the_text() -> None:
    # Every character re-enters a long partial match: quadratic matching would take minutes here.
    stream = TextStream(["a" * 999 + "b"] * 16)
    start = time.perf_counter()
    for _ in range(100):
        stream.push(b"a" * 2000)
    assert time.perf_counter() - start < 10
    assert stream.finish() == "a" * 999


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ([""], "stop string 0 has 0 characters"),
        (["a" * (MAX_STOP_LENGTH + 1)], "1 to 1000"),
        (["a"] * (MAX_STOP_STRINGS + 1), "at most 16"),
        ("stop", "stop is a str"),
        ([b"stop"], "stop string 0 is a bytes"),
        ([None], "stop string 0 is a NoneType"),
        (None, "stop is a NoneType"),
    ],
)
def test_wrong_stop_strings_are_refused(stop: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TextStream(stop)  # type: ignore[arg-type]
