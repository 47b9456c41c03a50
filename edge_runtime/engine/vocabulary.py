"""The vocabulary of a GGUF, checked, and copied into a small file that libllama can be trusted with.

libllama aborts, or throws through its C interface, on vocabularies that contradict themselves: tokens
that occur twice, missing bytes, special tokens out of range. Nothing of a model file reaches it but
what `read_vocabulary` has checked and encoded anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.errors import ModelFileError, UnsupportedModelError

SENTENCE_PIECE = "llama"
BYTE_PAIRS = "gpt2"

# Rules for cutting text into words (`tokenizer.ggml.pre`) that libllama follows with code of its own. All
# others go through std::regex, which recurs for each character of a word (about 400 bytes of stack each):
# 20,000 letters or exclamation marks in a row end the process.
_FLAT_RULE_NAMES = (
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe "
    "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en "
    "jina-v2-code roberta-bpe exaone4 mpt olmo jais trillion granite-docling "
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2 "
    "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez qwen35 "
    "chatglm-bpe glm4 glm5 grok-2 kimi-k2 laguna"
)
_FLAT_RULES = frozenset(_FLAT_RULE_NAMES.split())
_REGEX_STRETCH = 2048
# Text that falls back to bytes takes quadratic time: 0.005 s for 8192 characters, 70 s for a million.
_SENTENCE_PIECE_STRETCH = 8192
# Rules without byte encoding: libllama aborts where a blank reaches its table of merges.
_UNSAFE_RULES = ("whitespace", "gemma4", "sarvam-moe", "granite-embed-multi-311m")

_PREFIX = "tokenizer.ggml."
_MAX_TOKEN_BYTES = 1024  # the longest in use are runs of some hundred blanks
_MAX_NAME_BYTES = 1024
# libllama writes a token's whole text again for each character that is no byte: len ** 2 in memory.
_MAX_SQUARED_BYTES = 1 << 26
_UNDEFINED, _NORMAL, _BYTE = 0, 1, 6  # kinds of tokens: the first, words, the last
_BYTE_TOKEN = re.compile(rb"<0x[0-9A-Fa-f]{2}>")
# Texts of byte pair tokens are made of 256 printable characters, one for each byte (GPT-2's encoding).
_NO_BYTE = re.compile("[^\x21-\x7e\xa1-\xac\xae-\u0143]")
# A file that names a wrong one of these would never stop, or start wrongly: an error. Others are dropped.
_ESSENTIAL_IDS = ("bos_token_id", "eos_token_id")
_OTHER_IDS = (
    "eot_token_id",
    "eom_token_id",
    "unknown_token_id",
    "seperator_token_id",  # sic: the format's own spelling
    "padding_token_id",
    "mask_token_id",
    "fim_pre_token_id",
    "fim_suf_token_id",
    "fim_mid_token_id",
    "fim_pad_token_id",
    "fim_rep_token_id",
    "fim_sep_token_id",
    "prefix_token_id",
    "suffix_token_id",
    "middle_token_id",
)
_TRUTHS = ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces")

_U32, _U64 = Struct("<I"), Struct("<Q")
_TYPE_U32, _TYPE_BOOL, _TYPE_STRING, _TYPE_ARRAY, _TYPE_I32, _TYPE_F32 = 4, 7, 8, 9, 5, 6
_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A checked vocabulary.

    Attributes:
        kind: SENTENCE_PIECE or BYTE_PAIRS.
        n_tokens: tokens are numbered 0 .. n_tokens - 1.
        longest_stretch: characters that libllama may be given at once; None where it needs no bound.
        adds_space_prefix: text gets a blank in front of it before it is cut into tokens.
        encoded: a GGUF file with the vocabulary and nothing else.
    """

    kind: str
    n_tokens: int
    longest_stretch: int | None
    adds_space_prefix: bool
    encoded: bytes


def read_vocabulary(gguf: GGUFFile) -> Vocabulary:
    """The vocabulary of `gguf`.

    Raises:
        ModelFileError: a part is missing, of a wrong type, or contradicts another.
        UnsupportedModelError: another kind of vocabulary than SentencePiece or byte pairs.
    """
    kind = gguf.get_str(f"{_PREFIX}model")
    if kind not in (SENTENCE_PIECE, BYTE_PAIRS):
        raise UnsupportedModelError(
            f"{gguf.path} has a vocabulary of kind {kind[:64]!r}; {SENTENCE_PIECE!r} (SentencePiece) and "
            f"{BYTE_PAIRS!r} (byte pairs) can be used: choose another model"
        )
    pre = gguf.get_str(f"{_PREFIX}pre", "")
    if kind == BYTE_PAIRS and pre in _UNSAFE_RULES:
        raise UnsupportedModelError(f"{gguf.path} has the pre-tokenizer {pre!r}, which cannot be used here")
    check = _Check(gguf)
    tokens = check.tokens()
    types = check.types(tokens)
    pairs = [
        _text("general.architecture", "llama"),  # it only has to be one that libllama knows
        _text(f"{_PREFIX}model", kind),
        gguf.key_value_bytes(f"{_PREFIX}tokens"),
        _numbers(f"{_PREFIX}token_type", types),
        _numbers(f"{_PREFIX}scores", check.scores(len(tokens))),
    ]
    if pre:
        pairs.append(_text(f"{_PREFIX}pre", pre))
    # libllama treats special tokens of models of some names differently.
    name = gguf.metadata.get("general.name")
    if isinstance(name, str) and len(name.encode()) <= _MAX_NAME_BYTES:
        pairs.append(_text("general.name", name))
    if kind == BYTE_PAIRS:
        check.byte_pair_texts(tokens, types)
        check.merges()
        pairs.append(gguf.key_value_bytes(f"{_PREFIX}merges"))
    else:
        check.all_bytes(tokens)
    pairs += _special_ids(gguf, len(tokens))
    pairs += _truths(gguf)
    space_prefix = kind == SENTENCE_PIECE and gguf.get_bool(f"{_PREFIX}add_space_prefix", True)
    stretch: int | None = _SENTENCE_PIECE_STRETCH
    if kind == BYTE_PAIRS:
        stretch = None if pre in _FLAT_RULES else _REGEX_STRETCH
    return Vocabulary(kind, len(tokens), stretch, space_prefix, _file(pairs))


class _Check:
    """Checks of a vocabulary's parts; each raises ModelFileError."""

    def __init__(self, gguf: GGUFFile) -> None:
        self._gguf = gguf

    def _wrong(self, what: str) -> ModelFileError:
        return ModelFileError(
            f"{self._gguf.path}: {what}; the vocabulary is damaged, convert the model again"
        )

    def tokens(self) -> list[bytes]:
        tokens = self._gguf.get_strings(f"{_PREFIX}tokens")
        if not tokens:
            raise self._wrong("the vocabulary has no tokens")
        longest = max(map(len, tokens))
        if longest > _MAX_TOKEN_BYTES:
            raise self._wrong(f"a token has {longest} bytes, at most {_MAX_TOKEN_BYTES} are allowed")
        together = b"\n".join(tokens)
        self._check_utf8(together, "a token")
        if b"\0" in together:
            raise self._wrong("a token holds a NUL character")
        different = set(tokens)
        if b"" in different:  # libllama names empty tokens after their number
            different = {text or b"[EMPTY_%d]" % number for number, text in enumerate(tokens)}
        if len(different) != len(tokens):
            raise self._wrong(f"{len(tokens) - len(different)} of {len(tokens)} tokens occur more than once")
        return tokens

    def _check_utf8(self, texts: bytes, what: str) -> None:
        try:
            texts.decode()
        except UnicodeDecodeError as error:
            raise self._wrong(f"{what} is not UTF-8 text") from error

    def types(self, tokens: Sequence[bytes]) -> NDArray[np.int32]:
        key = f"{_PREFIX}token_type"
        if key not in self._gguf.metadata:
            return np.full(len(tokens), _NORMAL, np.int32)
        types = self._gguf.get_array(key)
        if types.dtype.kind not in "iu" or len(types) < len(tokens):
            raise self._wrong(f"{key} is an {self._gguf.type_name(key)}; {len(tokens)} integers are needed")
        types = types[: len(tokens)]
        if types.min() < _UNDEFINED or types.max() > _BYTE:
            raise self._wrong(f"token types go from {types.min()} to {types.max()}, 0 to {_BYTE} are defined")
        for number in np.flatnonzero(types == _BYTE).tolist():
            if not _BYTE_TOKEN.fullmatch(tokens[number]):
                raise self._wrong(f"token {number} stands for a byte and is {tokens[number]!r}, not <0x..>")
        return types.astype(np.int32)

    def scores(self, n_tokens: int) -> NDArray[np.float32]:
        key = f"{_PREFIX}scores"
        if key not in self._gguf.metadata:
            return np.zeros(n_tokens, np.float32)
        scores = self._gguf.get_array(key)
        if scores.dtype.kind not in "fi" or len(scores) < n_tokens:
            raise self._wrong(f"{key} is an {self._gguf.type_name(key)}; {n_tokens} numbers are needed")
        with np.errstate(over="ignore"):
            single = scores[:n_tokens].astype(np.float32)
        if not np.isfinite(single).all():
            raise self._wrong("a token's score is not finite")
        return single

    def all_bytes(self, tokens: Sequence[bytes]) -> None:
        """Every byte must have a token, else text that needs it aborts libllama."""
        known = set(tokens)
        for byte in range(256):
            if b"<0x%02X>" % byte not in known and bytes([byte]) not in known:
                raise self._wrong(f"no token stands for the byte 0x{byte:02X}")

    def byte_pair_texts(self, tokens: Sequence[bytes], types: NDArray[np.int32]) -> None:
        if not _NO_BYTE.search(b"".join(tokens).decode()):
            return
        squares = sum(
            len(tokens[number]) ** 2
            for number in np.flatnonzero(types == _NORMAL).tolist()
            if _NO_BYTE.search(tokens[number].decode())
        )
        if squares > _MAX_SQUARED_BYTES:
            raise self._wrong("too many tokens are not in the byte encoding of a byte pair vocabulary")

    def merges(self) -> None:
        merges = self._gguf.get_strings(f"{_PREFIX}merges")
        together = b"\n".join(merges) + b"\n"
        self._check_utf8(together, "a merge")
        # All at once: there are hundreds of thousands. Blanks within tokens are written otherwise.
        characters = np.frombuffer(together, np.uint8)
        ends = np.flatnonzero(characters == ord("\n"))
        blanks = np.flatnonzero(characters == ord(" "))
        starts = np.concatenate(([0], ends[:-1] + 1))
        wrong = np.ones(len(merges), np.bool_)
        if len(ends) == len(merges) == len(blanks):
            wrong = (blanks <= starts) | (blanks >= ends - 1) | (ends - starts > 2 * _MAX_TOKEN_BYTES + 1)
        if merges and wrong.any():
            raise self._wrong("a merge is not two tokens with a blank between them")


# --- encoding -----------------------------------------------------------------------------------


def _string(text: str) -> bytes:
    raw = text.encode()
    return _U64.pack(len(raw)) + raw


def _text(key: str, value: str) -> bytes:
    return _string(key) + _U32.pack(_TYPE_STRING) + _string(value)


def _numbers(key: str, values: NDArray[np.int32] | NDArray[np.float32]) -> bytes:
    kind = _TYPE_I32 if values.dtype == np.int32 else _TYPE_F32
    head = _string(key) + _U32.pack(_TYPE_ARRAY) + _U32.pack(kind)
    return head + _U64.pack(len(values)) + values.tobytes()


def _special_ids(gguf: GGUFFile, n_tokens: int) -> Iterator[bytes]:
    for name in (*_ESSENTIAL_IDS, *_OTHER_IDS):
        key = _PREFIX + name
        if key not in gguf.metadata:
            continue
        maximum = n_tokens - 1 if name in _ESSENTIAL_IDS else None
        number = gguf.get_int(key, minimum=None if maximum is None else 0, maximum=maximum)
        if 0 <= number < n_tokens:
            yield _string(key) + _U32.pack(_TYPE_U32) + _U32.pack(number)


def _truths(gguf: GGUFFile) -> Iterator[bytes]:
    for name in _TRUTHS:
        key = _PREFIX + name
        if key in gguf.metadata:
            yield _string(key) + _U32.pack(_TYPE_BOOL) + bytes([gguf.get_bool(key)])


def _file(pairs: Sequence[bytes]) -> bytes:
    body = b"GGUF" + _U32.pack(3) + _U64.pack(0) + _U64.pack(len(pairs)) + b"".join(pairs)
    return body + bytes(-len(body) % _ALIGNMENT)
