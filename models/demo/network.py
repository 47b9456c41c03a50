"""The demo model as a torch module: a LLaMA decoder with grouped-query attention and a tied head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """Sizes of the network; the defaults are the shipped model's, but for the vocabulary."""

    n_vocab: int
    n_layers: int = 6
    n_embd: int = 256
    n_ff: int = 768
    n_head: int = 4
    n_head_kv: int = 2
    n_ctx: int = 512
    norm_epsilon: float = 1e-5
    rope_base: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def rotary_tables(shape: NetworkShape) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (n_ctx, head_dim / 2), of RoPE (Su et al. 2021)."""
    frequency = shape.rope_base ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
    angle = torch.outer(torch.arange(shape.n_ctx, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates neighbouring pairs of channels, llama.cpp's NORM layout.

    x: (batch, n_tokens, n_head, head_dim); cosine, sine: (n_tokens, 1, head_dim / 2).
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)


def visible_tokens(tokens: Tensor) -> Tensor:
    """Mask (batch, 1, n_tokens, n_tokens): a token sees itself and earlier ones of its document.

    A document begins with token 0, the beginning-of-text token. tokens: (batch, n_tokens).
    """
    document = (tokens == 0).cumsum(dim=1)
    position = torch.arange(tokens.shape[1])
    same_document = document[:, :, None] == document[:, None, :]
    return (same_document & (position[:, None] >= position[None, :]))[:, None]


class Layer(nn.Module):
    """Attention and gated FFN, each after an RMS norm and added to the residual stream."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.n_head_kv * shape.head_dim
        self.attn_norm = nn.Parameter(torch.ones(shape.n_embd))
        self.attn_qkv = nn.Parameter(torch.empty(shape.n_embd + 2 * kv_width, shape.n_embd))
        self.attn_output = nn.Parameter(torch.empty(shape.n_embd, shape.n_embd))
        self.ffn_norm = nn.Parameter(torch.ones(shape.n_embd))
        self.ffn_gate_up = nn.Parameter(torch.empty(2 * shape.n_ff, shape.n_embd))
        self.ffn_down = nn.Parameter(torch.empty(shape.n_embd, shape.n_ff))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, visible: Tensor) -> Tensor:
        """x: (batch, n_tokens, n_embd), returned in the same shape; visible: see `visible_tokens`."""
        shape = self.shape
        batch, n_tokens, _ = x.shape
        kv_width = shape.n_head_kv * shape.head_dim
        normed = F.rms_norm(x, (shape.n_embd,), self.attn_norm, shape.norm_epsilon)
        q, k, v = torch.split(F.linear(normed, self.attn_qkv), [shape.n_embd, kv_width, kv_width], dim=-1)
        q = rotate(q.view(batch, n_tokens, shape.n_head, shape.head_dim), cosine, sine).to(v.dtype)
        k = rotate(k.view(batch, n_tokens, shape.n_head_kv, shape.head_dim), cosine, sine).to(v.dtype)
        v = v.view(batch, n_tokens, shape.n_head_kv, shape.head_dim)
        shared_by = shape.n_head // shape.n_head_kv
        k, v = k.repeat_interleave(shared_by, dim=2), v.repeat_interleave(shared_by, dim=2)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible
        )
        x = x + F.linear(mixed.transpose(1, 2).reshape(batch, n_tokens, shape.n_embd), self.attn_output)
        normed = F.rms_norm(x, (shape.n_embd,), self.ffn_norm, shape.norm_epsilon)
        gate, up = F.linear(normed, self.ffn_gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.ffn_down)


class Network(nn.Module):
    """Token ids to logits."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, shape: NetworkShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Parameter(torch.empty(shape.n_vocab, shape.n_embd))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layers))
        self.output_norm = nn.Parameter(torch.ones(shape.n_embd))
        cosine, sine = rotary_tables(shape)
        self.register_buffer("cosine", cosine[:, None, :], persistent=False)
        self.register_buffer("sine", sine[:, None, :], persistent=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # What is added to the residual stream starts smaller, as in GPT-2.
                into_stream = name.endswith(("attn_output", "ffn_down"))
                deviation = 0.02 if name == "token_embd" else parameter.shape[1] ** -0.5
                deviation /= (2 * shape.n_layers) ** 0.5 if into_stream else 1.0
                nn.init.normal_(parameter, std=deviation, generator=generator)

    def hidden(self, tokens: Tensor, *after: int) -> list[Tensor]:
        """Normed hidden states (batch, n_tokens, n_embd) after so many layers, and after all of them."""
        n_tokens = tokens.shape[1]
        visible = visible_tokens(tokens)
        x = F.embedding(tokens, self.token_embd)
        states = []
        for i, layer in enumerate(self.layers):
            x = layer(x, self.cosine[:n_tokens], self.sine[:n_tokens], visible)
            if i + 1 in after:
                states.append(x)
        return [
            F.rms_norm(state, (self.shape.n_embd,), self.output_norm, self.shape.norm_epsilon)
            for state in (*states, x)
        ]

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (batch, n_tokens) of int64; returns logits (batch, n_tokens, n_vocab)."""
        return F.linear(self.hidden(tokens)[-1], self.token_embd)
