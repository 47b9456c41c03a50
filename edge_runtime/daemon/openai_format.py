"""Answers in the form of OpenAI's API."""

from __future__ import annotations

import base64
import codecs
import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from edge_runtime.daemon.requests import Chunk, ContributionCounts, Embeddings, TokenLogprob, Usage
from edge_runtime.model_store.store import StoredModel

_IMPOSSIBLE = -9999.0  # the field's stand-in for minus infinity, which JSON cannot write
_OWNER = "edgert"


def usage_json(usages: Iterable[Usage]) -> dict[str, Any]:
    """What one or several answers took together; ``contributions`` only where other devices had a part."""
    counted = list(usages)
    prompt = sum(usage.prompt_tokens for usage in counted)
    generated = sum(usage.generated_tokens for usage in counted)
    together: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(usage.reused_tokens for usage in counted)},
    }
    contributions = [usage.contributions for usage in counted if usage.contributions is not None]
    if contributions:
        together["contributions"] = _contributions_json(contributions)
    return together


def _contributions_json(counts: Sequence[ContributionCounts]) -> dict[str, Any]:
    """Sums, without what adding fractions leaves in their last digits."""
    late = zip_longest(*(one.late for one in counts), fillvalue=0.0)
    return {
        "on_time": round(sum(one.on_time for one in counts), 6),
        "late": [round(sum(by), 6) for by in late],
        "lost": round(sum(one.lost for one in counts), 6),
        "recomputed": round(sum(one.recomputed for one in counts), 6),
        "fell_back": any(one.fell_back for one in counts),
    }


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Log-probabilities as chats have them."""
    content = [
        _chat_token(one.raw, one.logprob)
        | {"top_logprobs": [_chat_token(raw, logprob) for _, raw, logprob in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_token(raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}


class CompletionLogprobs:
    """Log-probabilities as completions have them; it counts the characters before each token."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def json(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Of the next tokens."""
        offsets = []
        for one in logprobs:
            offsets.append(self._characters)
            self._characters += len(self._decoder.decode(one.raw))
        return {
            "tokens": [_completion_token(one.raw) for one in logprobs],
            "token_logprobs": [_finite(one.logprob) for one in logprobs],
            "top_logprobs": [_alternatives(one) for one in logprobs],
            "text_offset": offsets,
        }


def _alternatives(one: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens and the chosen one. Of two with the same text the likelier counts."""
    found: dict[str, float] = {}
    for _, raw, logprob in (*one.top, (one.token, one.raw, one.logprob)):
        found.setdefault(_completion_token(raw), _finite(logprob))
    return found


def _completion_token(raw: bytes) -> str:
    """A token's text; part of a character is spelled out, for these texts are keys and must differ."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _IMPOSSIBLE


def chat_choice(chunks: Sequence[Chunk], usage: Usage, with_logprobs: bool) -> dict[str, Any]:
    """A whole answer of a chat."""
    return {
        "index": 0,
        "message": {"role": "assistant", "content": _text(chunks), "refusal": None},
        "logprobs": chat_logprobs(_logprobs(chunks)) if with_logprobs else None,
        "finish_reason": usage.finish_reason,
    }


def completion_choice(
    index: int, chunks: Sequence[Chunk], usage: Usage, with_logprobs: bool
) -> dict[str, Any]:
    """A whole continuation of a prompt."""
    return {
        "index": index,
        "text": _text(chunks),
        "logprobs": CompletionLogprobs().json(_logprobs(chunks)) if with_logprobs else None,
        "finish_reason": usage.finish_reason,
    }


def _text(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def _logprobs(chunks: Sequence[Chunk]) -> list[TokenLogprob]:
    return [one for chunk in chunks for one in chunk.logprobs]


def embeddings_json(found: Embeddings, model: str, as_base64: bool) -> dict[str, Any]:
    """Vectors as numbers, or as little-endian float32 in base64, which the clients prefer."""
    rows = []
    for index, vector in enumerate(found.vectors):
        embedding: object = vector
        if as_base64:
            embedding = base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
        rows.append({"object": "embedding", "index": index, "embedding": embedding})
    usage = {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
    return {"object": "list", "data": rows, "model": model, "usage": usage}


def model_json(model: StoredModel) -> dict[str, Any]:
    """A model in a list."""
    return {"id": model.name, "object": "model", "created": int(model.added), "owned_by": _OWNER}
