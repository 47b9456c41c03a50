"""Files of random weights: the matrix of architectures, rope scalings, quantizations and odd shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.correctness_comparison import PROMPT_LENGTHS, Case
from models.synthetic import RopeScaling, SyntheticModel, write_synthetic_gguf

QUANTIZATIONS = tuple(
    """F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS""".split()  # noqa: SIM905
)

# Row widths are n_embd, n_ff and n_head * head_dim: a type whose block does not divide one of them falls back
# to another there. 172 is a multiple of 4 only, 1376 of 32.
SHAPES = {
    "ff172": SyntheticModel(
        n_layers=5, n_embd=256, n_ff=172, n_head=4, n_head_kv=1, head_dim=64, n_vocab=611, pure=True
    ),
    "ff1376": SyntheticModel(
        n_layers=2, n_embd=384, n_ff=1376, n_head=3, n_head_kv=3, head_dim=128, n_vocab=517
    ),
    "kv3": SyntheticModel(
        n_layers=2, n_embd=256, n_ff=1376, n_head=6, n_head_kv=3, head_dim=128, n_vocab=1003
    ),
    "kv1": SyntheticModel(
        n_layers=5, n_embd=256, n_ff=768, n_head=4, n_head_kv=1, head_dim=64, n_vocab=611, pure=True
    ),
}

_YARN = RopeScaling("yarn", factor=4.0, original_context=256)
ARCHITECTURES = {
    "llama": SyntheticModel(),
    "llama linear": SyntheticModel(rope_scaling=RopeScaling("linear", factor=4.0)),
    "llama yarn": SyntheticModel(rope_scaling=_YARN),
    "llama rope_freqs": SyntheticModel(rope_factors=True, rope_base=500_000.0),
    "llama biases": SyntheticModel(biases=True, all_biases=True),
    "qwen2": SyntheticModel("qwen2", biases=True, rope_base=1_000_000.0, norm_epsilon=1e-6),
    "qwen2 yarn": SyntheticModel("qwen2", biases=True, rope_scaling=_YARN),
    "qwen3": SyntheticModel("qwen3", rope_base=1_000_000.0, norm_epsilon=1e-6),
}

_RANDOM_CONTEXT = 1024


def random_cases(
    folder: Path,
    architectures: Sequence[str] = tuple(ARCHITECTURES),
    quantizations: Sequence[str] = QUANTIZATIONS,
    shapes: Sequence[str] = tuple(SHAPES),
) -> Iterator[Case]:
    """The matrix on random weights, tied and untied heads in turn."""
    cells = itertools.product(architectures, quantizations, shapes)
    for number, (architecture, quantization, shape) in enumerate(cells):
        # Rows of the matrix have an even number of shapes: shifted by one each, both heads meet each shape.
        tied = (number + number // len(shapes)) % 2 == 1
        kind, size = ARCHITECTURES[architecture], SHAPES[shape]
        if kind.architecture == "qwen2":  # whose heads together are as wide as the model in llama.cpp
            size = replace(size, n_embd=size.n_head * size.head_width)
        model = replace(
            size,
            architecture=kind.architecture,
            biases=kind.biases,
            all_biases=kind.all_biases,
            rope_scaling=kind.rope_scaling,
            rope_factors=kind.rope_factors,
            rope_base=kind.rope_base,
            norm_epsilon=kind.norm_epsilon,
            n_ctx=_RANDOM_CONTEXT,
            quantization=quantization,
            tied_head=tied,
            seed=number,
        )
        path = folder / f"random-{number}.gguf"
        write_synthetic_gguf(path, model)
        tokens = np.random.default_rng(number).integers(3, model.n_vocab, PROMPT_LENGTHS[-1])
        prompts = tuple(tuple(tokens[:length].tolist()) for length in PROMPT_LENGTHS)
        name = f"{architecture} {quantization} {shape} {'tied' if tied else 'untied'}"
        yield Case(name, quantization, path, _RANDOM_CONTEXT, prompts)
        path.unlink()


def quick_cases(folder: Path) -> Iterator[Case]:
    """A part of the matrix with each architecture, each type and each shape in it."""
    yield from random_cases(folder, quantizations=("F32", "Q4_0"), shapes=("ff172", "kv3"))
    yield from random_cases(folder, architectures=("llama",), shapes=("kv1",))
    yield from random_cases(folder, ("qwen2", "qwen3"), ("F16", "Q8_0", "Q4_K"), ("ff1376",))
