"""Greedy continuations of many prompts at once by llama.cpp itself: a reference beside our engine."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

N_SEQUENCES = 64
N_BATCH = 4096


class LlamaCppContinuations:
    """Loads a GGUF with llama_cpp; `with` frees it."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        import llama_cpp

        self._llama = llama_cpp
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = N_BATCH * 2
        parameters.n_batch = parameters.n_ubatch = N_BATCH
        parameters.n_seq_max = N_SEQUENCES
        parameters.kv_unified = True
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))

    def __enter__(self) -> LlamaCppContinuations:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def encode(self, text: str) -> list[int]:
        raw = text.encode()
        tokens = (ctypes.c_int32 * (len(raw) + 8))()
        count = self._llama.llama_tokenize(self._vocab, raw, len(raw), tokens, len(tokens), True, True)
        return list(tokens[:count])

    def decode(self, tokens: Sequence[int]) -> str:
        pieces = b""
        buffer = ctypes.create_string_buffer(256)
        for token in tokens:
            length = self._llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
            pieces += buffer.raw[:length]
        return pieces.decode(errors="replace")

    def __call__(self, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """One greedy continuation of at most `max_tokens` tokens for each prompt, in order."""
        encoded = [self.encode(prompt) for prompt in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        texts = [""] * len(prompts)
        for start in range(0, len(by_length), N_SEQUENCES):
            chosen = by_length[start : start + N_SEQUENCES]
            for i, tokens in zip(
                chosen, self._continue([encoded[i] for i in chosen], max_tokens), strict=True
            ):
                texts[i] = self.decode(tokens)
        return texts

    def _continue(self, rows: list[list[int]], max_tokens: int) -> list[list[int]]:
        llama = self._llama
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
        pending = dict(enumerate(rows))
        positions = dict.fromkeys(pending, 0)
        written: list[list[int]] = [[] for _ in rows]
        for _ in range(max_tokens):
            logits = self._step(pending, positions)
            for sequence in list(pending):
                positions[sequence] += len(pending[sequence])
                token = int(logits[sequence].argmax())
                if llama.llama_vocab_is_eog(self._vocab, token):
                    del pending[sequence]
                    continue
                written[sequence].append(token)
                pending[sequence] = [token]
            if not pending:
                break
        return written

    def _step(self, pending: dict[int, list[int]], positions: dict[int, int]) -> dict[int, np.ndarray]:
        llama = self._llama
        total = sum(map(len, pending.values()))
        batch = llama.llama_batch_init(total, 0, 1)
        outputs: dict[int, int] = {}
        row = 0
        for sequence, tokens in pending.items():
            for offset, token in enumerate(tokens):
                batch.token[row] = token
                batch.pos[row] = positions[sequence] + offset
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = offset == len(tokens) - 1
                row += 1
            outputs[sequence] = row - 1
        batch.n_tokens = total
        status = llama.llama_decode(self._context, batch)
        llama.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {total} tokens returned {status}")
        return {
            sequence: np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, row), (self.n_vocab,))
            for sequence, row in outputs.items()
        }


# Kept for as long as the process lives, because libllama keeps its address.
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
