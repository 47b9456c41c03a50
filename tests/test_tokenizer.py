"""Tokens of real and synthetic vocabularies, held against llama-cpp-python on the same files."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from model_damage import Parts, scalar, string, strings, take_apart

from edge_runtime.engine import vocabulary
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.tokenizer import ModelParams, Tokenizer
from edge_runtime.errors import ModelFileError, RequestError, UnsupportedModelError
from models.synthetic import SyntheticModel, write_synthetic_gguf

DATA = Path(__file__).parent.parent / "../shared/data"
FILES = {
    "gpt-2": DATA / "tokenizers/ggml-vocab-gpt-2.gguf",
    "llama-spm": DATA / "tokenizers/ggml-vocab-llama-spm.gguf",
    "stories": DATA / "models/stories260K.gguf",
}
TEXTS = [
    "",
    " ",
    "   leading and trailing   ",
    "Hello, world! It's 12345 o'clock; they'll've gone.",
    "\n\n\tdef f(x):\n\t\treturn x ** 2  # square\r\n",
    "größer Übermut naïve façade, žluťoučký kůň",
    "Ελληνικά русский עברית العربية हिन्दी ไทย",
    "日本語の文章。中文句子\uff0c标点\uff01한국어 문장",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff",
    "a\0b\0\0c",
    "<s>[INST] not special </s> <|endoftext|> <unk><0x41>",
    "▁underlined▁blank",
    "x" * 500 + " " * 300 + "!" * 400,
    "".join(map(chr, range(1, 600))),
]


@pytest.fixture(scope="module", params=FILES)
def both(request: pytest.FixtureRequest) -> Iterator[tuple[Tokenizer, Any]]:
    """Our tokenizer and llama-cpp-python's for one vocabulary."""
    import llama_cpp

    path = FILES[request.param]
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with GGUFFile(path) as gguf:
        tokenizer = Tokenizer(gguf)
    oracle = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    yield tokenizer, oracle
    oracle.close()
    tokenizer.close()


@pytest.mark.parametrize("parse_special", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_llama_cpps(both: tuple[Tokenizer, Any], text: str, parse_special: bool) -> None:
    tokenizer, oracle = both
    wanted = oracle.tokenize(text.encode(), add_bos=False, special=parse_special)
    assert tokenizer.encode(text, add_bos=False, parse_special=parse_special) == wanted
    with_bos = oracle.tokenize(text.encode(), add_bos=True, special=parse_special)
    assert tokenizer.encode(text, parse_special=parse_special) == with_bos


def test_pieces_are_llama_cpps(both: tuple[Tokenizer, Any]) -> None:
    tokenizer, oracle = both
    assert tokenizer.n_vocab == oracle.n_vocab()
    for token in {*range(0, tokenizer.n_vocab, 7), *range(300), tokenizer.n_vocab - 1}:
        for special in (False, True):
            assert tokenizer.token_bytes(token, special=special) == piece(oracle, token, special)


def piece(oracle: Any, token: int, special: bool) -> bytes:
    import llama_cpp

    vocab = llama_cpp.llama_model_get_vocab(oracle._model.model)
    buffer = ctypes.create_string_buffer(1024)
    size = llama_cpp.llama_token_to_piece(vocab, token, buffer, 1024, 0, special)
    return buffer.raw[:size]


def test_special_tokens_are_llama_cpps(both: tuple[Tokenizer, Any]) -> None:
    tokenizer, oracle = both
    assert (tokenizer.bos, tokenizer.eos) == (oracle.token_bos(), oracle.token_eos())
    assert tokenizer.is_end(oracle.token_eos())
    assert not tokenizer.is_end(5)


@pytest.mark.parametrize("text", [text for text in TEXTS if "<" not in text])
def test_decoding_inverts_encoding(both: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, _ = both
    assert tokenizer.decode(tokenizer.encode(text)) == (
        text.replace("▁", " ") if tokenizer.n_vocab != 50257 else text
    )


def test_the_params_structure_is_llama_cpps() -> None:
    import llama_cpp

    theirs = llama_cpp.llama_cpp.llama_model_params
    assert ctypes.sizeof(ModelParams) == ctypes.sizeof(theirs)
    for ours, other in zip(ModelParams._fields_, theirs._fields_, strict=True):
        assert ours[0] == other[0]
        assert getattr(ModelParams, ours[0]).offset == getattr(theirs, ours[0]).offset


# --- special text -------------------------------------------------------------------------------


@pytest.fixture
def synthetic(tmp_path: Path) -> Iterator[Callable[..., Tokenizer]]:
    """Tokenizers of synthetic vocabularies, after changes to their pairs."""
    opened: list[Tokenizer] = []
    numbers = itertools.count()

    def make(pre: str | None = None, **pairs: bytes | None) -> Tokenizer:
        path = tmp_path / f"{next(numbers)}.gguf"
        write_synthetic_gguf(path, dataclasses.replace(BASE, pre_tokenizer=pre))
        parts = take_apart(path)
        parts.tensors = []
        for name, value in pairs.items():
            key = f"tokenizer.ggml.{name}".encode()
            parts.pairs = [pair for pair in parts.pairs if pair[0] != key]
            if value is not None:
                parts.pairs.append((key, value))
        path.write_bytes(parts.encode())
        with GGUFFile(path) as gguf:
            opened.append(Tokenizer(gguf))
        return opened[-1]

    yield make
    for tokenizer in opened:
        tokenizer.close()


BASE = SyntheticModel(n_embd=32, n_ff=32, n_layers=1, n_vocab=1200)
Make = Callable[..., Tokenizer]


@pytest.mark.parametrize("pre", [None, "qwen2"])
def test_control_tokens_are_read_only_when_asked(synthetic: Make, pre: str | None) -> None:
    tokenizer = synthetic(pre)
    assert tokenizer.encode("</s>", add_bos=False, parse_special=True) == [2]
    plain = tokenizer.encode("</s>", add_bos=False)
    assert 2 not in plain
    assert tokenizer.decode(plain) == "</s>"


def test_control_tokens_are_silent_unless_asked(synthetic: Make) -> None:
    tokenizer = synthetic()
    assert tokenizer.token_bytes(2) == b""
    assert tokenizer.token_bytes(2, special=True) == b"</s>"
    assert tokenizer.decode([1, *tokenizer.encode("hey", add_bos=False), 2]) == "hey"


def test_bos_is_added_only_if_the_model_wants_it(synthetic: Make) -> None:
    assert synthetic().encode("a")[0] == 1
    without = synthetic(add_bos_token=scalar(7, 0))
    assert not without.adds_bos
    assert without.encode("a") == without.encode("a", add_bos=False)


def test_a_vocabulary_without_bos_adds_none(synthetic: Make) -> None:
    # Byte pair vocabularies without the key have token 11 as the beginning, if there is one.
    tokens = strings([bytes([byte]) for byte in b"abcdefgh"])
    small = {"token_type": None, "scores": None, "unknown_token_id": None, "bos_token_id": None}
    tokenizer = synthetic("gpt-2", tokens=tokens, merges=strings([]), eos_token_id=None, **small)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.adds_bos) == (None, None, False)
    assert tokenizer.encode("abba") == [0, 1, 1, 0]


def test_half_a_surrogate_pair_becomes_a_replacement_character(synthetic: Make) -> None:
    tokenizer = synthetic()
    assert tokenizer.decode(tokenizer.encode("a\ud83d b")) == "a\ufffd b"


def test_bytes_that_are_no_text_are_replaced(synthetic: Make) -> None:
    tokenizer = synthetic()
    first_byte = 3  # the token of byte 0
    assert tokenizer.token_bytes(first_byte + 0xFF) == b"\xff"
    assert tokenizer.decode([first_byte + 0xFF]) == "\ufffd"


@pytest.mark.parametrize("token", [-1, 1200, 2**31])
def test_tokens_out_of_range_are_refused(synthetic: Make, token: int) -> None:
    tokenizer = synthetic()
    for function in (tokenizer.token_bytes, tokenizer.is_end, lambda token: tokenizer.decode([token])):
        with pytest.raises(RequestError, match="out of range"):
            function(token)


def test_a_vocabulary_of_bytes_alone_spells_everything(synthetic: Make) -> None:
    types = struct.pack("<IIQ259i", 9, 5, 259, 2, 3, 3, *[6] * 256)
    tokenizer = synthetic(tokens=words(), token_type=types, scores=None)
    text = " a   b" * 50
    # A blank is the three bytes of U+2581 here: more tokens than the text has bytes.
    assert len(tokenizer.encode(text)) > 2 * len(text)
    assert tokenizer.decode(tokenizer.encode(text)).replace("\u2581", " ") == " " + text


def test_tokenizers_may_be_used_from_several_threads(synthetic: Make) -> None:
    tokenizer = synthetic("qwen2")
    wanted = tokenizer.encode(TEXTS[3] * 50)
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: results.append(tokenizer.encode(TEXTS[3] * 50))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [wanted] * 8


# --- long texts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", [None, "qwen2", "tekken", "default", "deepseek-llm"])
@pytest.mark.parametrize("unit", ["a", "!?", " ", "日", "\n"])
def test_long_texts_without_words_take_linear_time(synthetic: Make, pre: str | None, unit: str) -> None:
    # Quadratic time would be 20 s for one of these, and unbounded recursion would end the process.
    tokenizer = synthetic(pre)
    text = unit * (500_000 // len(unit.encode()))
    start = time.process_time()
    tokens = tokenizer.encode(text)
    assert time.process_time() - start < 10
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("pre", ["tekken", "default", "deepseek-llm", "gpt-4o", "poro-chat", "seed-coder"])
def test_cutting_a_long_text_changes_no_token(synthetic: Make, pre: str) -> None:
    wikipedia = DATA / "text/wikitext2.test.txt"
    if not wikipedia.exists():
        pytest.skip(f"{wikipedia} is not there")
    tokenizer = synthetic(pre)
    prose = wikipedia.read_text(encoding="utf-8")[:14_000]
    chinese = "他们说\uff1a今天天气很好\uff0c我们去公园走走。" * 300
    for text in (prose, chinese, "snake_case_\n\nword1 \n 2nd  line\n" * 400):
        # 14,000 characters are few enough for libllama at once, and are cut in seven here.
        whole = tokenizer._encode(text.encode(), parse_special=False)
        assert tokenizer.encode(text, add_bos=False) == whole


@pytest.mark.parametrize("parse_special", [False, True])
def test_long_texts_have_llama_cpps_tokens(both: tuple[Tokenizer, Any], parse_special: bool) -> None:
    wikipedia = DATA / "text/wikitext2.test.txt"
    if not wikipedia.exists():
        pytest.skip(f"{wikipedia} is not there")
    tokenizer, oracle = both
    text = wikipedia.read_text(encoding="utf-8")[:100_000] + "<s> 1 2</s>" * 900
    wanted = oracle.tokenize(text.encode(), add_bos=True, special=parse_special)
    assert tokenizer.encode(text, parse_special=parse_special) == wanted


def test_more_text_than_any_context_holds_is_refused(synthetic: Make) -> None:
    with pytest.raises(RequestError, match="4194305 bytes, at most 4194304"):
        synthetic().encode("a" * 4194305)


# --- damaged vocabularies -----------------------------------------------------------------------


def words(*texts: bytes) -> bytes:
    return strings([b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256)), *texts])


FEW = {"token_type": None, "scores": None}


@pytest.mark.parametrize(
    ("pre", "pairs", "says"),
    [
        (None, {"model": None}, "model is nothing; a string"),
        (None, {"tokens": None}, "tokens is nothing"),
        (None, {"tokens": scalar(4, 3)}, "tokens is uint32"),
        (None, {"tokens": strings([]), **FEW}, "no tokens"),
        (None, {"tokens": words(b"a", b"b", b"a"), **FEW}, "1 of 262 tokens occur more than once"),
        (None, {"tokens": words(b"", b"[EMPTY_259]"), **FEW}, "more than once"),
        (None, {"tokens": words(b"\xff"), **FEW}, "a token is not UTF-8"),
        (None, {"tokens": words(b"a\0b"), **FEW}, "holds a NUL"),
        (None, {"tokens": words(b"x" * 1025), **FEW}, "1025 bytes, at most 1024"),
        (None, {"tokens": strings([b"a", b"b", b"c"]), **FEW}, "no token stands for the byte 0x00"),
        (None, {"token_type": struct.pack("<IIQ2i", 9, 5, 2, 1, 1)}, "1200 integers are needed"),
        (None, {"token_type": struct.pack("<IIQ1200i", 9, 5, 1200, *[7] * 1200)}, "go from 7 to 7"),
        (
            None,
            {"token_type": struct.pack("<IIQ1200i", 9, 5, 1200, *[6] * 1200)},
            "token 0 stands for a byte",
        ),
        (None, {"scores": struct.pack("<IIQ1f", 9, 6, 1, 1)}, "1200 numbers are needed"),
        (None, {"scores": struct.pack("<IIQ1200f", 9, 6, 1200, *[float("nan")] * 1200)}, "not finite"),
        (None, {"scores": struct.pack("<IIQ1200d", 9, 12, 1200, *[1e300] * 1200)}, "not finite"),
        (None, {"bos_token_id": scalar(4, 1200)}, "bos_token_id is 1200; 0 to 1199"),
        (None, {"eos_token_id": scalar(5, -1)}, "eos_token_id is -1"),
        (None, {"add_bos_token": scalar(4, 1)}, "add_bos_token is uint32; a bool"),
        ("gpt-2", {"merges": None}, "merges is nothing"),
        ("gpt-2", {"merges": strings([b"a b", b"ab"])}, "a merge is not two tokens"),
        ("gpt-2", {"merges": strings([b"a b c", b"ab"])}, "a merge is not two tokens"),
        ("gpt-2", {"merges": strings([b"a\nb c", b"a b"])}, "a merge is not two tokens"),
        ("gpt-2", {"merges": strings([b" a"])}, "a merge is not two tokens"),
        ("gpt-2", {"merges": strings([b"a "])}, "a merge is not two tokens"),
        ("gpt-2", {"merges": strings([b"\xff a"])}, "a merge is not UTF-8"),
        (
            "gpt-2",
            {"tokens": strings(["日".encode() * 340 + b"%d" % n for n in range(70)]), **FEW},
            "byte encoding",
        ),
    ],
)
def test_damaged_vocabularies_are_refused(
    synthetic: Make, pre: str | None, pairs: dict[str, bytes | None], says: str
) -> None:
    with pytest.raises(ModelFileError, match=says) as caught:
        synthetic(pre, **pairs)
    assert type(caught.value) is ModelFileError


@pytest.mark.parametrize("kind", [b"bert", b"t5", b"rwkv", b"plamo2", b"none", b"nonsense"])
def test_other_kinds_of_vocabularies_are_unsupported(synthetic: Make, kind: bytes) -> None:
    with pytest.raises(UnsupportedModelError, match=f"of kind '{kind.decode()}'"):
        synthetic(model=struct.pack("<I", 8) + string(kind))


@pytest.mark.parametrize("pre", ["whitespace", "gemma4"])
def test_rules_that_abort_libllama_are_unsupported(synthetic: Make, pre: str) -> None:
    with pytest.raises(UnsupportedModelError, match=pre):
        synthetic(pre)


def test_rules_that_libllama_does_not_know_are_named(synthetic: Make) -> None:
    with pytest.raises(ModelFileError, match="unknown pre-tokenizer type: 'nonsense'"):
        synthetic("nonsense")


def test_inessential_special_tokens_out_of_range_are_dropped(synthetic: Make) -> None:
    assert synthetic(padding_token_id=scalar(4, 2**32 - 1), unknown_token_id=scalar(5, -1)).encode("a")


def test_integers_of_other_widths_are_taken(synthetic: Make) -> None:
    tokenizer = synthetic(
        eos_token_id=scalar(10, 5), scores=struct.pack("<IIQ1200d", 9, 12, 1200, *range(1200))
    )
    assert tokenizer.eos == 5


def test_libllama_gets_the_vocabulary_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_synthetic_gguf(path, BASE)
    parts: Parts = take_apart(path)
    parts.pairs.append((b"tokenizer.chat_template", struct.pack("<I", 8) + string(b"x" * 5000)))
    parts.pairs.append((b"split.count", scalar(2, 9)))
    path.write_bytes(parts.encode())
    with GGUFFile(path) as gguf:
        copy = tmp_path / "copy.gguf"
        copy.write_bytes(vocabulary.read_vocabulary(gguf).encoded)
        Tokenizer(gguf).close()
    with GGUFFile(copy) as gguf:
        assert not gguf.tensors
        assert all(key.startswith(("tokenizer.ggml.", "general.")) for key in gguf.metadata)


def test_closing_twice_is_harmless(synthetic: Make) -> None:
    tokenizer = synthetic()
    tokenizer.close()
    tokenizer.close()
