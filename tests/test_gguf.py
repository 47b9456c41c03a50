"""The GGUF reader: what it reads from sound files, and that it says what is wrong with others."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from model_damage import Parts, Tensor, scalar, string, strings, take_apart

from edge_runtime.engine import ggml
from edge_runtime.engine.gguf import GGML_TYPES, GGUFFile
from edge_runtime.errors import EdgeRuntimeError, ModelFileError, ModelNotFoundError, UnsupportedModelError
from models.synthetic import SyntheticModel, write_synthetic_gguf

STORIES = Path(__file__).parent.parent / "../shared/data/models/stories260K.gguf"
F32, F16, Q4_0 = 0, 1, 2


def parts(*tensors: Tensor, **pairs: bytes) -> Parts:
    encoded = [(key.replace("__", ".").encode(), value) for key, value in pairs.items()]
    return Parts(encoded, list(tensors))


def floats(name: str, *shape: int) -> Tensor:
    count = int(np.prod(shape))
    return Tensor(name.encode(), list(shape), F32, np.arange(count, dtype=np.float32).tobytes())


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Parts | bytes], Path]:
    def write(content: Parts | bytes) -> Path:
        path = tmp_path / "file.gguf"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


Write = Callable[[Parts | bytes], Path]


def refusal(path: Path, kind: type[EdgeRuntimeError] = ModelFileError) -> str:
    with pytest.raises(kind) as caught:
        GGUFFile(path)
    assert type(caught.value) is kind
    return str(caught.value)


# --- sound files --------------------------------------------------------------------------------


def test_metadata_of_every_type_is_read(write: Write) -> None:
    numbers = {kind: 7 if kind not in (6, 7, 12) else 1 for kind in (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12)}
    pairs = {f"number_{kind}": scalar(kind, value) for kind, value in numbers.items()}
    pairs["text"] = struct.pack("<I", 8) + string("größer".encode())
    pairs["words"] = strings([b"one", b"", "zwölf".encode()])
    pairs["reals"] = struct.pack("<IIQ3f", 9, 6, 3, 0.5, -1, 2)
    pairs["truths"] = struct.pack("<IIQ3B", 9, 7, 3, 0, 1, 1)
    with GGUFFile(write(parts(**pairs))) as gguf:
        assert [gguf.metadata[f"number_{kind}"] for kind in numbers] == list(numbers.values())
        assert gguf.metadata["number_7"] is True
        assert gguf.metadata["text"] == "größer"
        assert gguf.metadata["words"] == ["one", "", "zwölf"]
        np.testing.assert_array_equal(gguf.metadata["reals"], [0.5, -1, 2])
        np.testing.assert_array_equal(gguf.metadata["truths"], [False, True, True])
        assert len(gguf.metadata) == len(pairs)


def test_versions_2_and_3_are_read(write: Write) -> None:
    for version in (2, 3):
        file = parts(floats("a", 4))
        file.version = version
        with GGUFFile(write(file)) as gguf:
            assert gguf.version == version


def test_tensor_bytes_are_the_tensors_values(write: Write) -> None:
    with GGUFFile(write(parts(floats("a", 4, 3), floats("b", 5)))) as gguf:
        record = gguf.tensors["b"]
        assert (record.shape, record.type, record.size) == ((5,), F32, 20)
        assert record.offset % 32 == 0
        np.testing.assert_array_equal(np.frombuffer(gguf.tensor_bytes("b"), np.float32), np.arange(5))
        with pytest.raises(TypeError):
            gguf.tensor_bytes("a")[0] = 1


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_the_alignment_key_says_where_the_data_lies(write: Write, alignment: int) -> None:
    file = parts(floats("a", 2), floats("b", 3), general__alignment=scalar(4, alignment))
    file.alignment = alignment
    with GGUFFile(write(file)) as gguf:
        assert gguf.alignment == alignment
        assert gguf.tensors["b"].offset - gguf.tensors["a"].offset == alignment
        np.testing.assert_array_equal(np.frombuffer(gguf.tensor_bytes("b"), np.float32), [0, 1, 2])


def test_key_value_bytes_rebuild_the_file() -> None:
    if not STORIES.exists():
        pytest.skip(f"{STORIES} is not there")
    assert take_apart(STORIES).encode() == STORIES.read_bytes()


def test_the_table_of_types_is_ggmls() -> None:
    for number, kind in GGML_TYPES.items():
        assert ggml.type_name(number).decode().upper() == kind.name
        assert (ggml.blck_size(number), ggml.type_size(number)) == (kind.block_size, kind.block_bytes)


def test_closing_leaves_views_in_use_alone(write: Write) -> None:
    gguf = GGUFFile(write(parts(floats("a", 4))))
    view = np.frombuffer(gguf.tensor_bytes("a"), np.float32)
    gguf.close()
    gguf.close()
    np.testing.assert_array_equal(view, np.arange(4))


@pytest.mark.parametrize("n_tokens", [32_000, 128_000])
def test_large_vocabularies_open_fast(write: Write, n_tokens: int) -> None:
    tokens = strings([b"token%d" % number for number in range(n_tokens)])
    merges = strings([b"to ken%d" % number for number in range(2 * n_tokens)])
    path = write(parts(floats("a", 4), tokens=tokens, merges=merges))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        GGUFFile(path).close()
        seconds.append(time.process_time() - start)
    # 0.04 s for 384,000 strings on the machine this was written on; a loop that decodes takes 0.3 s.
    assert min(seconds) < 1e-6 * 3 * n_tokens


# --- typed getters ------------------------------------------------------------------------------


def test_getters_check_type_and_range(write: Write) -> None:
    pairs = {"count": scalar(4, 12), "text": struct.pack("<I", 8) + string(b"x"), "real": scalar(6, 0.5)}
    pairs |= {
        "nan": scalar(6, float("nan")),
        "words": strings([b"\xff"]),
        "bad": struct.pack("<I", 8) + string(b"\xff"),
    }
    with GGUFFile(write(parts(**pairs))) as gguf:
        assert gguf.get_int("count", minimum=1, maximum=12) == 12
        assert gguf.get_int("absent", 5) == 5
        assert gguf.get_float("real") == 0.5
        assert gguf.get_str("absent", "y") == "y"
        assert gguf.get_bool("absent", True) is True
        assert gguf.get_strings("words") == [b"\xff"]
        assert gguf.metadata["words"] == ["\ufffd"]
        for wrong, says in (
            (lambda: gguf.get_int("count", maximum=11), "count is 12; at most 11"),
            (lambda: gguf.get_int("text"), "text is string; an integer"),
            (lambda: gguf.get_int("absent"), "absent is nothing; an integer"),
            (lambda: gguf.get_float("nan"), "nan is nan"),
            (lambda: gguf.get_float("count"), "count is uint32"),
            (lambda: gguf.get_str("count"), "count is uint32; a string"),
            (lambda: gguf.get_str("bad"), "bad is not UTF-8"),
            (lambda: gguf.get_bool("count"), "count is uint32; a bool"),
            (lambda: gguf.get_array("count"), "count is uint32; an array"),
            (lambda: gguf.get_array("words"), "words is an array of 1 string; an array of numbers"),
            (lambda: gguf.get_strings("real"), "real is float32; an array of strings"),
            (lambda: gguf.tensor_bytes("absent"), "no tensor 'absent'"),
        ):
            with pytest.raises(ModelFileError, match=says):
                wrong()


# --- files that are none ------------------------------------------------------------------------


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "none.gguf", ModelNotFoundError)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert "no regular file" in refusal(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file_is_refused(write: Write) -> None:
    path = write(parts(floats("a", 4)))
    path.chmod(0)
    assert "cannot be opened" in refusal(path)


def test_a_path_with_nul_is_refused() -> None:
    assert "cannot be opened" in refusal(Path("a\0b"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0" + bytes(15)])
def test_a_file_shorter_than_a_header_is_refused(write: Write, content: bytes) -> None:
    assert f"has {len(content)} bytes" in refusal(write(content))


def test_another_format_is_refused(write: Write) -> None:
    assert "starts with b'<htm'" in refusal(write(b"<html>" + bytes(100)))


@pytest.mark.parametrize("version", [0, 1, 4, 2**31])
def test_other_versions_are_unsupported(write: Write, version: int) -> None:
    file = parts(floats("a", 4))
    file.version = version
    assert f"GGUF version {version}" in refusal(write(file), UnsupportedModelError)


def test_big_endian_files_are_named_so(write: Write) -> None:
    content = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    assert "big-endian" in refusal(write(content), UnsupportedModelError)


# --- damaged headers ----------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("count", [2**63, 2**64 - 1, 2**20])
def test_boundless_counts_are_refused(write: Write, which: int, count: int) -> None:
    file = parts(floats("a", 4))
    file.counts[which] = count
    assert f"{count}" in refusal(write(file))


def test_more_tensors_than_there_are_end_behind_the_file(write: Write) -> None:
    file = parts(floats("a", 4))
    file.counts[0] = 100
    refusal(write(file))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (struct.pack("<IQ", 8, 2**63), "ends behind"),
        (struct.pack("<IIQ", 9, 8, 2**60), "announces"),
        (struct.pack("<IIQ", 9, 4, 2**60), "ends behind"),
        (struct.pack("<IIQ", 9, 4, 2**62), "ends behind"),
        (struct.pack("<IIQ", 9, 9, 1), "arrays of arrays"),
        (struct.pack("<I", 13), "type 13"),
        (strings([b"a"])[:16] + struct.pack("<Q", 2**64 - 1), "ends"),
    ],
)
def test_values_that_do_not_fit_are_refused(write: Write, value: bytes, says: str) -> None:
    assert says in refusal(write(parts(key=value)))


def test_a_key_may_occur_only_once(write: Write) -> None:
    file = parts(key=scalar(4, 1))
    file.pairs *= 2
    assert "'key' occurs twice" in refusal(write(file))


@pytest.mark.parametrize("name", [b"", b"\xff", b"a\0b", b"k" * 70000])
def test_keys_must_be_text(write: Write, name: bytes) -> None:
    file = Parts([(name, scalar(4, 1))], [])
    assert "the name of key 0" in refusal(write(file))


@pytest.mark.parametrize("name", [b"", b"\xff", b"a\0b", b"n" * 64])
def test_tensor_names_must_be_text_of_63_bytes(write: Write, name: bytes) -> None:
    file = parts(Tensor(name, [4], F32, bytes(16)))
    assert "the name of tensor 0" in refusal(write(file))


@pytest.mark.parametrize("alignment", [0, 1, 4, 24, 33, 2**31])
def test_alignments_must_be_powers_of_two(write: Write, alignment: int) -> None:
    assert f"alignment is {alignment}" in refusal(write(parts(general__alignment=scalar(4, alignment))))


def test_a_header_cut_off_anywhere_is_refused(write: Write) -> None:
    whole = parts(floats("a", 4, 2), number=scalar(12, 1), words=strings([b"one", b"two"])).encode()
    for end in range(len(whole) - 1):
        refusal(write(whole[:end]))


# --- damaged tensors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "type_", "says"),
    [
        ([0], F32, "at least 1"),
        ([4, 0], F32, "at least 1"),
        ([2**40], F32, "the file ends at"),
        ([2**32, 2**32], F32, "the file ends at"),  # 2 ** 64 elements: 0 in 64 bits
        ([2**63, 2**63, 2**63, 2**63], F16, "the file ends at"),
        ([1, 1, 1, 1, 1], F32, "5 axes"),
        ([33], Q4_0, "multiple of 32"),
        ([1, 32], Q4_0, "multiple of 32"),
    ],
)
def test_impossible_shapes_are_refused(write: Write, shape: list[int], type_: int, says: str) -> None:
    assert says in refusal(write(parts(Tensor(b"a", shape, type_, bytes(64)))))


@pytest.mark.parametrize("type_", [4, 5, 31, 43, 2**32 - 1])
def test_unknown_types_are_unsupported(write: Write, type_: int) -> None:
    message = refusal(write(parts(Tensor(b"a", [32], type_, bytes(64)))), UnsupportedModelError)
    assert f"type {type_}" in message


def test_a_tensor_of_no_axes_is_one_number(write: Write) -> None:
    with GGUFFile(write(parts(Tensor(b"a", [], F32, bytes(4))))) as gguf:
        assert gguf.tensors["a"].shape == (1,)


@pytest.mark.parametrize(
    ("offset", "says"), [(4, "multiple of 32"), (2**63, "file ends"), (2**64 - 32, "file ends")]
)
def test_wrong_offsets_are_refused(write: Write, offset: int, says: str) -> None:
    tensor = floats("a", 4)
    tensor.offset = offset
    assert says in refusal(write(parts(tensor)))


def test_overlapping_tensors_are_refused(write: Write) -> None:
    first, second = floats("a", 16), floats("b", 16)
    second.offset = 32
    assert "'a' and 'b' overlap" in refusal(write(parts(first, second)))


def test_a_tensor_may_occur_only_once(write: Write) -> None:
    assert "'a' occurs twice" in refusal(write(parts(floats("a", 4), floats("a", 4))))


def test_a_file_cut_off_in_its_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_synthetic_gguf(path, SyntheticModel(n_embd=32, n_ff=32))
    content = path.read_bytes()
    path.write_bytes(content[:-32])
    assert "the file ends at" in refusal(path)
