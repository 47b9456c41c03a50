"""Files of trained weights, as they are and requantized by llama.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.correctness_comparison import GREEDY_TOKENS, PROMPT_LENGTHS, Case
from benchmarks.correctness_sides import LlamaCpp, silent_llama_cpp
from benchmarks.report import Report
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.engine import Engine
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.sampling import Sampler, SamplingParameters

REPOSITORY = Path(__file__).resolve().parent.parent
STORIES = REPOSITORY.parent / "shared" / "data" / "models" / "stories260K.gguf"
DEMO = REPOSITORY / "models" / "demo" / "edge-demo-q8_0.gguf"

# llama.cpp's file types. Files of K types hold tensors of neighbouring types too.
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_M": 12,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
}
QUICK_FILE_TYPES = ("F32", "F16", "Q8_0", "Q4_0", "Q4_K_M", "IQ4_XS")


def requantized(source: Path, file_type: str, target: Path) -> Path:
    """A copy of a file in another quantization, made by llama.cpp.

    Raises:
        RuntimeError: llama.cpp refuses, as for widths that no block size of that type divides.
    """
    c = silent_llama_cpp()
    parameters = c.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[file_type]
    parameters.allow_requantize = True
    parameters.nthread = 1
    if c.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp does not quantize {source.name} to {file_type}")
    return target


def written_by(path: Path, first: int, count: int) -> tuple[int, ...]:
    """Tokens that a model itself writes, drawn at temperature 1 with a fixed seed: a prompt it knows."""
    side = LlamaCpp(path, context=_rounded(count))
    sampler = Sampler(
        SamplingParameters(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1), side.n_vocab
    )
    tokens = [first]
    try:
        while len(tokens) < count:
            tokens.append(sampler.sample(side.step(tokens[-1:], len(tokens) - 1)[0]))
    finally:
        side.close()
    return tuple(tokens)


def trained_cases(source: Path, folder: Path, file_types: Sequence[str], report: Report) -> Iterator[Case]:
    """A trained file as it is and in other quantizations."""
    with GGUFFile(source) as gguf:
        n_ctx = read_hyperparameters(gguf).n_ctx_train
        first = gguf.get_int("tokenizer.ggml.bos_token_id", default=1, minimum=0, maximum=2**31)
    context = min(n_ctx, _rounded(PROMPT_LENGTHS[-1] + GREEDY_TOKENS))
    longest = min(PROMPT_LENGTHS[-1], context - GREEDY_TOKENS)
    text = written_by(source, first, longest)
    prompts = tuple(text[:length] for length in (*PROMPT_LENGTHS[:-1], longest))
    for file_type in file_types:
        target = folder / f"{source.stem}-{file_type}.gguf"
        try:
            path = requantized(source, file_type, target)
        except RuntimeError as fault:
            report.note(str(fault))
            continue
        yield Case(f"{source.stem} {file_type}", file_type, path, context, prompts)
        path.unlink()


def _rounded(length: int) -> int:
    return -(-length // 256) * 256


def stories(path: Path) -> tuple[str, str]:
    """Our greedy story and llama.cpp's, each by its own tokenizer and generation loop."""
    c = silent_llama_cpp()
    prompt, count = "Once upon a time", 256
    with Engine.load(path) as engine:
        mine = engine.generate(prompt, sampling=SamplingParameters(temperature=0), max_tokens=count).text()
    llama = c.Llama(str(path), n_ctx=512, n_threads=1, flash_attn=True, verbose=False)
    answer = llama.create_completion(prompt, max_tokens=count, temperature=0.0)
    llama.close()
    return mine, answer["choices"][0]["text"]
