"""Text to tokens and back, by libllama, which knows every published vocabulary.

libllama is given a checked copy of the vocabulary alone (see `vocabulary`), never the model file.
"""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_void_p
from pathlib import Path
from typing import Any, cast

import numpy as np

from edge_runtime.engine import ggml
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.vocabulary import Vocabulary, read_vocabulary
from edge_runtime.errors import ModelFileError, RequestError

# libllama needs about 80 bytes of memory for each byte of text.
_MAX_TEXT_BYTES = 1 << 22


class ModelParams(ctypes.Structure):
    """``struct llama_model_params``."""

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", POINTER(c_float)),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


_P = c_void_p
_TOKEN = c_int32
# function (without "llama_") -> (result type, argument types)
_SIGNATURES: ggml.Signatures = {
    "log_set": (None, (ggml.LOG_CALLBACK, _P)),
    "model_default_params": (ModelParams, ()),
    "model_load_from_file": (_P, (c_char_p, ModelParams)),
    "model_free": (None, (_P,)),
    "model_get_vocab": (_P, (_P,)),
    "vocab_n_tokens": (c_int32, (_P,)),
    "vocab_bos": (_TOKEN, (_P,)),
    "vocab_eos": (_TOKEN, (_P,)),
    "vocab_get_add_bos": (c_bool, (_P,)),
    "vocab_is_eog": (c_bool, (_P, _TOKEN)),
    "tokenize": (c_int32, (_P, c_char_p, c_int32, _P, c_int32, c_bool, c_bool)),
    "token_to_piece": (c_int32, (_P, _TOKEN, c_char_p, c_int32, c_int32, c_bool)),
}
_ERROR_LEVEL = 4

_loading = threading.Lock()
_functions: dict[str, Any] = {}
_complaints: deque[str] = deque(maxlen=16)


def _keep_errors(level: int, text: bytes, user_data: int) -> None:
    """Keeps libllama's first complaint for an error message; nothing is printed."""
    if level == _ERROR_LEVEL and text:
        _complaints.append(text.decode(errors="replace").strip().rpartition("vocabulary: ")[2])


_log = ggml.LOG_CALLBACK(_keep_errors)  # kept for as long as libllama may call it


def _libllama() -> dict[str, Any]:
    """libllama's functions, loaded when first needed, complaining to us. The caller holds `_loading`."""
    if not _functions:
        _functions.update(ggml.bind("llama", "llama_", _SIGNATURES))
    # Each time: another user of the library in this process may have taken the log over.
    _functions["log_set"](_log, None)
    return _functions


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path under which libllama can read `content`: in memory where the system has such files."""
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
        descriptor = os.memfd_create("vocabulary")
        try:
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(content)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
        return
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(content)
        file.flush()
        yield file.name


class Tokenizer:
    """The tokenizer of a model file. Its methods may be called from several threads at once.

    Attributes:
        n_vocab: tokens are numbered 0 .. n_vocab - 1.
        bos, eos: tokens for the beginning and the end of a text; None where the vocabulary has none.
        adds_bos: the model expects `bos` before a text.

    Raises:
        ModelFileError: the vocabulary is damaged, or libllama refuses it.
        UnsupportedModelError: a kind of vocabulary that is not SentencePiece or byte pairs.
    """

    def __init__(self, gguf: GGUFFile) -> None:
        self._model: int | None = None
        self._control_texts: list[str] | None = None
        self._vocabulary: Vocabulary = read_vocabulary(gguf)
        with _loading, _as_file(self._vocabulary.encoded) as path:
            self._llama = _libllama()
            _complaints.clear()
            params = self._llama["model_default_params"]()
            params.vocab_only = True
            self._model = self._llama["model_load_from_file"](path.encode(), params)
            reason = _complaints[0] if _complaints else "it does not say why"
        if not self._model:
            raise ModelFileError(
                f"{gguf.path}: libllama refuses the vocabulary ({reason}); choose another model"
            )
        self._vocab = self._llama["model_get_vocab"](self._model)
        self.n_vocab: int = self._llama["vocab_n_tokens"](self._vocab)
        self.bos = self._token("vocab_bos")
        self.eos = self._token("vocab_eos")
        self.adds_bos: bool = self.bos is not None and bool(self._llama["vocab_get_add_bos"](self._vocab))

    def _token(self, function: str) -> int | None:
        token = int(self._llama[function](self._vocab))
        return token if 0 <= token < self.n_vocab else None

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """The tokens of `text`.

        Args:
            add_bos: put the beginning-of-text token first, if the model expects one.
            parse_special: read control tokens written in the text (such as ``<|im_end|>``) as those
                tokens; text that comes from a user should not be.

        Raises:
            RequestError: more than 4 MiB of text, more than any context holds.
        """
        raw = _utf8(text)
        if len(raw) > _MAX_TEXT_BYTES:
            raise RequestError(
                f"the text has {len(raw)} bytes, at most {_MAX_TEXT_BYTES} can be cut into tokens; shorten it"
            )
        tokens = [self.bos] if add_bos and self.adds_bos and self.bos is not None else []
        stretch = self._vocabulary.longest_stretch
        if stretch is None or len(text) <= stretch:
            return tokens + self._encode(raw, parse_special)
        # libllama puts a blank before every text. From the second stretch on, a NUL takes it, which no
        # token but its byte's contains, and both are cut off again.
        mark = b"\0" if self._vocabulary.adds_space_prefix else b""
        n_mark = len(self._encode(mark, parse_special))
        for start, end in _cuts(text, stretch):
            part = _utf8(text[start:end])
            if start == 0:
                tokens += self._encode(part, parse_special)
            else:
                tokens += self._encode(mark + part, parse_special)[n_mark:]
        return tokens

    def _encode(self, raw: bytes, parse_special: bool) -> list[int]:
        # Seldom more tokens than bytes: only where a vocabulary spells a blank as three bytes.
        needed = len(raw) + 8
        while True:
            tokens = np.empty(needed, np.int32)
            found = self._llama["tokenize"](
                self._vocab, raw, len(raw), tokens.ctypes.data, needed, False, parse_special
            )
            if found >= 0:
                return cast(list[int], tokens[:found].tolist())
            needed = -found

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """What `token` stands for; a part of a character at times. Control tokens are empty unless `special`.

        Raises:
            RequestError: no token has this number.
        """
        self._check(token)
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._llama["token_to_piece"](self._vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of `tokens`; bytes that are no UTF-8 become replacement characters.

        The blank that `encode` puts before the text of some vocabularies is taken away again.

        Raises:
            RequestError: no token has one of these numbers.
        """
        raw = b"".join([self.token_bytes(token, special=special) for token in tokens])
        if self._vocabulary.adds_space_prefix and raw.startswith(b" "):
            raw = raw[1:]
        return raw.decode(errors="replace")

    def control_texts_in(self, text: str) -> list[str]:
        """Texts of control tokens (such as ``<|im_end|>``) that occur in `text`, longest first."""
        if self.encode(text, add_bos=False) == self.encode(text, add_bos=False, parse_special=True):
            return []
        if self._control_texts is None:  # seconds for the largest vocabularies, so only when it matters
            shown = ((t, self.token_bytes(t, special=True)) for t in range(self.n_vocab))
            found = {raw.decode() for t, raw in shown if raw and not self.token_bytes(t)}
            self._control_texts = sorted(found, key=len, reverse=True)
        return [control for control in self._control_texts if control in text]

    def is_end(self, token: int) -> bool:
        """Whether `token` ends an answer: end of text, of turn, of message."""
        self._check(token)
        return bool(self._llama["vocab_is_eog"](self._vocab, token))

    def _check(self, token: int) -> None:
        if not 0 <= token < self.n_vocab:
            raise RequestError(f"token {token} is out of range; the vocabulary has 0 to {self.n_vocab - 1}")

    def close(self) -> None:
        """Free the vocabulary; safe to call twice. The tokenizer must not be used any more."""
        if self._model:
            self._llama["model_free"](self._model)
            self._model = None


# Where a word surely ends in every rule for cutting text into words: blank or CJK punctuation after it.
_WORD_END = re.compile(r"[^\W_](?=[\s\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")


def _cuts(text: str, stretch: int) -> Iterator[tuple[int, int]]:
    """Stretches of at most `stretch` characters, (start, end), cut at ends of words wherever possible."""
    start = 0
    while len(text) - start > stretch:
        limit = start + stretch
        ends = [match.end() for match in _WORD_END.finditer(text, limit - stretch // 2, limit)]
        end = ends[-1] if ends else limit
        yield start, end
        start = end
    yield start, len(text)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which some JSON has
        return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()
