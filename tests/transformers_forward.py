"""LLaMA, Qwen2 and Qwen3 as the transformers library computes them, in torch, on its layout of the weights.

Written from that library's modelling code, to hold exported PEFT adapters against: the halves of a head are
rotated, and the weights of a GGUF are brought into that order by the inverse of llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edge_runtime.engine.architecture import Hyperparameters, read_hyperparameters
from edge_runtime.engine.gguf import GGUFFile

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def state_of(path: Path) -> dict[str, Tensor]:
    """The weights of a GGUF under the names and in the order of the transformers library, float32."""
    with GGUFFile(path) as model:
        hyperparameters = read_hyperparameters(model)
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
        stem, kind = tensor.name.rsplit(".", 1)
        if stem in _OTHERS:
            state[f"{_OTHERS[stem]}.{kind}"] = values
            continue
        _, layer, name = stem.split(".")
        if hyperparameters.architecture == "llama" and name in ("attn_q", "attn_k"):
            heads = hyperparameters.n_head if name == "attn_q" else hyperparameters.n_head_kv
            values = torch.cat([halves(head) for head in values.chunk(heads)])
        state[f"model.layers.{layer}.{_NAMES[name]}.{kind}"] = values
    return state


def halves(head: Tensor) -> Tensor:
    """Rows of one head: the even ones, then the odd ones."""
    return torch.cat([head[0::2], head[1::2]])


def logits_of(path: Path, state: Mapping[str, Tensor], tokens: list[int]) -> np.ndarray:
    """(n_tokens, n_vocab)."""
    with GGUFFile(path) as model:
        hyperparameters = read_hyperparameters(model)
    norm = hyperparameters.norm_epsilon
    x = state["model.embed_tokens.weight"][torch.tensor(tokens)]
    for layer in range(hyperparameters.n_layers):
        of = f"model.layers.{layer}."
        normed = F.rms_norm(x, x.shape[-1:], state[of + "input_layernorm.weight"], norm)
        x = x + _attention(state, of + "self_attn.", normed, hyperparameters)
        normed = F.rms_norm(x, x.shape[-1:], state[of + "post_attention_layernorm.weight"], norm)
        gate = F.silu(normed @ state[of + "mlp.gate_proj.weight"].T)
        up = normed @ state[of + "mlp.up_proj.weight"].T
        x = x + (gate * up) @ state[of + "mlp.down_proj.weight"].T
    x = F.rms_norm(x, x.shape[-1:], state["model.norm.weight"], norm)
    return (x @ state.get("lm_head.weight", state["model.embed_tokens.weight"]).T).numpy()


def _attention(state: Mapping[str, Tensor], of: str, x: Tensor, hp: Hyperparameters) -> Tensor:
    def projected(name: str, heads: int) -> Tensor:
        y = F.linear(x, state[f"{of}{name}_proj.weight"], state.get(f"{of}{name}_proj.bias"))
        y = y.view(len(x), heads, hp.head_dim)
        if hp.qk_norm and name != "v":
            y = F.rms_norm(y, (hp.head_dim,), state[f"{of}{name}_norm.weight"], hp.norm_epsilon)
        return y.transpose(0, 1)

    q, k = (rotated(projected(name, heads), hp) for name, heads in (("q", hp.n_head), ("k", hp.n_head_kv)))
    v = projected("v", hp.n_head_kv)
    k, v = (y.repeat_interleave(hp.n_head // hp.n_head_kv, dim=0) for y in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(0, 1).reshape(len(x), -1) @ state[f"{of}o_proj.weight"].T


def rotated(x: Tensor, hp: Hyperparameters) -> Tensor:
    """`apply_rotary_pos_emb` of (heads, n_tokens, head_dim): the halves of a head are a plane."""
    frequency = hp.rope.freq_base ** (-torch.arange(0, hp.head_dim, 2, dtype=torch.float64) / hp.head_dim)
    angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), frequency).repeat(1, 2).float()
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()
