"""Tells one model's file from another's."""

from __future__ import annotations

import hashlib

from edge_runtime.engine.gguf import GGUFFile

_SAMPLE_BYTES = 4096  # of each tensor


def model_identity(gguf: GGUFFile) -> str:
    """Hexadecimal SHA-256 of a file's header and of the beginning of each tensor.

    Cheap, and different for two trainings of one architecture; not proof against forgery.
    """
    digest = hashlib.sha256()
    with gguf.path.open("rb") as file:
        left = min((tensor.offset for tensor in gguf.tensors.values()), default=0)
        while left and (content := file.read(min(left, 1 << 20))):
            digest.update(content)
            left -= len(content)
    for name in gguf.tensors:
        digest.update(gguf.tensor_bytes(name)[:_SAMPLE_BYTES])
    return digest.hexdigest()
