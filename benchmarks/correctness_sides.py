"""The engine and llama.cpp on one file behind one form, which gives the logits of every position."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine, EngineOptions

Logits = NDArray[np.float32]

BATCH = 512


def silent_llama_cpp() -> Any:
    """The bindings, initialized once and without a log."""
    import llama_cpp

    if not hasattr(silent_llama_cpp, "silenced"):
        callback = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
        llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        silent_llama_cpp.silenced = callback  # type: ignore[attr-defined]  # must outlive every call
    return llama_cpp


class LlamaCpp:
    """llama.cpp on one file, through its C interface.

    Args:
        flash: whether attention runs through the flash attention kernel.
        repack: whether weights are copied to the layout of the fastest kernels.
    """

    def __init__(
        self, path: Path, *, context: int, flash: bool = True, threads: int = 1, repack: bool = True
    ) -> None:
        self._c = silent_llama_cpp()
        model_parameters = self._c.llama_model_default_params()
        model_parameters.use_extra_bufts = repack
        self._model = self._c.llama_model_load_from_file(str(path).encode(), model_parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        parameters = self._c.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        kind = "ENABLED" if flash else "DISABLED"
        parameters.flash_attn_type = getattr(self._c, f"LLAMA_FLASH_ATTN_TYPE_{kind}")
        self._context = self._c.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {path}")
        self.n_vocab: int = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model))
        self._batch = self._c.llama_batch_init(BATCH, 0, 1)

    def clear(self) -> None:
        """Forget all tokens."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), False)

    def step(self, tokens: Sequence[int], position: int) -> Logits:
        """Logits (n_tokens, n_vocab) of at most BATCH tokens from a position on."""
        for row, token in enumerate(tokens):
            self._batch.token[row] = token
            self._batch.pos[row] = position + row
            self._batch.n_seq_id[row] = 1
            self._batch.seq_id[row][0] = 0
            self._batch.logits[row] = True
        self._batch.n_tokens = len(tokens)
        status = self._c.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        values = self._c.llama_get_logits(self._context)
        return np.ctypeslib.as_array(values, shape=(len(tokens), self.n_vocab)).copy()

    def close(self) -> None:
        """Free the model."""
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)


class Ours:
    """The engine on one file, in the same form."""

    def __init__(self, path: Path, *, context: int, threads: int = 1, repack: bool = True) -> None:
        weights: Literal["repack", "mmap"] = "repack" if repack else "mmap"
        options = EngineOptions(context=context, threads=threads, batch=BATCH, weights=weights)
        self.engine = Engine.load(path, options)
        self.n_vocab = self.engine.hyperparameters.n_vocab

    def clear(self) -> None:
        """Forget all tokens."""
        self.engine.model.cells.remove(0)

    def step(self, tokens: Sequence[int], position: int) -> Logits:
        """Logits (n_tokens, n_vocab) of at most BATCH tokens from a position on."""
        positions = np.arange(position, position + len(tokens), dtype=np.int32)
        return self.engine.model.forward(Batch(list(tokens), positions)).logits

    def close(self) -> None:
        """Free the model."""
        self.engine.close()


Side = LlamaCpp | Ours


def prompt_logits(side: Side, prompt: Sequence[int]) -> Logits:
    """Logits (n_tokens, n_vocab) of a prompt, run from an empty cache."""
    side.clear()
    parts = [side.step(prompt[start : start + BATCH], start) for start in range(0, len(prompt), BATCH)]
    return np.concatenate(parts)


def greedy(side: Side, last: Logits, position: int, count: int) -> list[int]:
    """The likeliest tokens after a prompt whose last logits (n_vocab,) are given."""
    tokens = [int(last.argmax())]
    while len(tokens) < count:
        last = side.step(tokens[-1:], position + len(tokens) - 1)[0]
        tokens.append(int(last.argmax()))
    return tokens
