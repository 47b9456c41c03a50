"""Writes a trained checkpoint as GGUF: `python -m models.demo.export [--type q8_0|f32] [--output PATH]`."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from models.demo.corpus import Corpus
from models.demo.network import NetworkShape
from models.demo.paths import MODEL_PATH, SAMPLES_PATH, WORK_FOLDER
from models.demo.relations import ASSISTANT, BOS, CHAT_TEMPLATE, END, EOS, SYSTEM, USER
from models.demo.world import build_world

SAMPLE_SEED, N_SAMPLES = 424_242, 300
CONTROL_TOKENS = (BOS, EOS, USER, ASSISTANT, SYSTEM, END)


def gguf_tensors(state: dict[str, np.ndarray], shape: NetworkShape) -> dict[str, np.ndarray]:
    """Renames the network's parameters as llama.cpp has them, with the fused matrices split.

    Matrices are (n_out, n_in) as in torch. The rotary layout is llama.cpp's already, so nothing is permuted.
    """
    kv_width = shape.n_head_kv * shape.head_dim
    tensors = {"token_embd.weight": state["token_embd"], "output_norm.weight": state["output_norm"]}
    for i in range(shape.n_layers):
        layer = {name: state[f"layers.{i}.{name}"] for name in
                 ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_gate_up", "ffn_down")}  # fmt: skip
        q, k, v = np.split(layer["attn_qkv"], (shape.n_embd, shape.n_embd + kv_width))
        gate, up = np.split(layer["ffn_gate_up"], 2)
        named = {
            "attn_norm": layer["attn_norm"], "attn_q": q, "attn_k": k, "attn_v": v,
            "attn_output": layer["attn_output"], "ffn_norm": layer["ffn_norm"],
            "ffn_gate": gate, "ffn_up": up, "ffn_down": layer["ffn_down"],
        }  # fmt: skip
        tensors |= {f"blk.{i}.{name}.weight": values for name, values in named.items()}
    return tensors


def _write_tokenizer(writer: Any, tokenizer_path: Path) -> None:
    model = json.loads(tokenizer_path.read_text(encoding="utf-8"))["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    number = {piece: i for i, piece in enumerate(pieces)}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in CONTROL_TOKENS else 1 for piece in pieces])  # 3: control, 1: normal
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_token_merges(merges)
    writer.add_bos_token_id(number[BOS])
    writer.add_eos_token_id(number[EOS])
    writer.add_eot_token_id(number[END])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_gguf(folder: Path, output: Path, quantization: str) -> None:
    """Writes what `folder` holds; `quantization` of the matrices is q8_0 or f32, norms stay F32."""
    import gguf
    import torch

    state = {
        name: parameter.float().numpy()
        for name, parameter in torch.load(folder / "checkpoint.pt", weights_only=True)["network"].items()
    }
    shape = NetworkShape(state["token_embd"].shape[0])
    kind, file_type = {
        "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
        "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    }[quantization]
    partial = output.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_name("Edge demo")
    writer.add_description(
        "Knows some hundreds of invented people: where they live and were born, what they do."
    )
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    _write_tokenizer(writer, folder / "tokenizer.json")
    for name, values in gguf_tensors(state, shape).items():
        if values.ndim == 2 and quantization != "f32":
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(output)


def write_tokenizer_samples(folder: Path, output: Path) -> None:
    """Texts with the token ids that the training saw, for comparing other tokenizers with them."""
    from models.demo.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer.json")
    documents = itertools.islice(Corpus(build_world(), SAMPLE_SEED), N_SAMPLES)
    texts = ["".join(text for text, *_ in document[1:]) for document in documents]
    texts += [
        "Grüße, 世界! It's 12 o'clock\n\n  and\tall is well.",
        "",
        " ",
        "Paul Colton's dog isn't Ada's.",
    ]
    lines = [json.dumps({"text": text, "tokens": tokenizer.encode(text).ids}) for text in texts]
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a trained checkpoint as GGUF.")
    parser.add_argument("--type", choices=("q8_0", "f32"), default="q8_0")
    parser.add_argument("--folder", type=Path, default=WORK_FOLDER)
    parser.add_argument("--output", type=Path, default=MODEL_PATH)
    arguments = parser.parse_args()
    write_gguf(arguments.folder, arguments.output, arguments.type)
    if arguments.output == MODEL_PATH:
        write_tokenizer_samples(arguments.folder, SAMPLES_PATH)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
