"""A LLaMA GGUF as a differentiable torch module in full precision. Needs the ``train`` extra."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_runtime.engine.architecture import Hyperparameters
from edge_runtime.engine.dequantize import rows_as_floats
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.errors import UnsupportedModelError


class TorchLlama:
    """Weights as float32 tensors, and the forward pass from the embedding to logits.

    Raises:
        UnsupportedModelError: an architecture other than plain LLaMA.
    """

    def __init__(self, gguf: GGUFFile, hyperparameters: Hyperparameters) -> None:
        hp = hyperparameters
        if hp.qk_norm or hp.rope.neox or "rope_freqs.weight" in gguf.tensors:
            raise UnsupportedModelError("back-propagation in torch is there for plain LLaMA models alone")
        self.hyperparameters = hp
        self.weights = {
            name: torch.from_numpy(rows_as_floats(gguf, name)).reshape(tuple(reversed(record.shape)))
            for name, record in gguf.tensors.items()
        }
        frequency = hp.rope.freq_base ** (
            -torch.arange(0, hp.rope.n_dims, 2, dtype=torch.float64) / hp.rope.n_dims
        )
        angle = torch.outer(torch.arange(hp.n_ctx_train, dtype=torch.float64), frequency)
        self._cosine, self._sine = angle.cos().float()[:, None], angle.sin().float()[:, None]

    def embedded(self, tokens: Tensor) -> Tensor:
        """(batch, n_tokens) -> (batch, n_tokens, n_embd)."""
        return F.embedding(tokens, self.weights["token_embd.weight"])

    def layer(self, number: int, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One layer: its output and the input of ffn_down; `added` is added to the FFN's output."""
        x = x + self._attention(number, x)
        normed = self._norm(x, f"blk.{number}.ffn_norm.weight")
        gate, up = (self._linear(f"blk.{number}.ffn_{kind}", normed) for kind in ("gate", "up"))
        activation = F.silu(gate) * up
        output = self._linear(f"blk.{number}.ffn_down", activation)
        return x + output if added is None else x + output + added, activation

    def logits(self, x: Tensor) -> Tensor:
        """From the residual stream after the last layer."""
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        return F.linear(self._norm(x, "output_norm.weight"), head)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name], self.hyperparameters.norm_epsilon)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _rotated(self, x: Tensor) -> Tensor:
        """Neighbouring pairs of channels turned by their position; x: (batch, n_tokens, heads, dim)."""
        n_tokens, n_dims = x.shape[1], self.hyperparameters.rope.n_dims
        cosine, sine = self._cosine[:n_tokens], self._sine[:n_tokens]
        even, odd = x[..., 0:n_dims:2], x[..., 1:n_dims:2]
        turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)
        return torch.cat((turned, x[..., n_dims:]), dim=-1)

    def _attention(self, number: int, x: Tensor) -> Tensor:
        hp = self.hyperparameters
        batch, n_tokens, _ = x.shape
        normed = self._norm(x, f"blk.{number}.attn_norm.weight")
        q, k, v = (
            self._linear(f"blk.{number}.attn_{kind}", normed).view(batch, n_tokens, heads, hp.head_dim)
            for kind, heads in (("q", hp.n_head), ("k", hp.n_head_kv), ("v", hp.n_head_kv))
        )
        q, k = self._rotated(q), self._rotated(k)
        shared = hp.n_head // hp.n_head_kv
        q, k, v = (
            part.transpose(1, 2)
            for part in (q, k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=hp.attention_scale)
        return self._linear(f"blk.{number}.attn_output", mixed.transpose(1, 2).reshape(batch, n_tokens, -1))
