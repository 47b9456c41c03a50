"""Does the engine compute what llama.cpp computes? Logits, texts and divergences on the same files.

Run as ``python -m benchmarks.correctness [--quick]``. Both sides get the same GGUF file, the same prompts in
batches of the same size, and flash attention. The bars:

- F32 and F16 files: no logit differs by more than 1e-3 of the logits' range, and 64 tokens of greedy text
  are the same.
- Quantized files, and BF16: the Kullback-Leibler divergence of our distribution from llama.cpp's, mean over
  the positions of all prompts, is at most twice that of llama.cpp without flash attention from llama.cpp with
  it. Where attention hardly matters both are rounding noise of F32, so the bar is never below 1e-10: logits
  that differ by a standard deviation s give about s^2 / 2, so that is s = 1.4e-5, some 15 units in the last
  place of a logit of 10.

The matrix crosses architectures, rope scalings, quantizations and odd shapes on random weights; trained
weights are those in ``models/demo`` and ``../shared/data/models``, requantized by llama.cpp.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Report
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.sampling import Sampler, SamplingParameters
from models.synthetic import RopeScaling, SyntheticModel, write_synthetic_gguf

Logits = NDArray[np.float32]

EXACT_TYPES = ("F32", "F16")
MAX_DELTA = 1e-3  # of the logits' range, in F32 and F16
MAX_KL_RATIO = 2.0
KL_FLOOR = 1e-10
GREEDY_TOKENS = 64
BATCH = 512
PROMPT_LENGTHS = (1, 7, 128, 600)
QUANTIZATIONS = tuple(
    """F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS""".split()  # noqa: SIM905
)
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

REPOSITORY = Path(__file__).resolve().parent.parent
STORIES = REPOSITORY.parent / "shared" / "data" / "models" / "stories260K.gguf"
DEMO = REPOSITORY / "models" / "demo" / "edge-demo-q8_0.gguf"


class LlamaCpp:
    """llama.cpp on one file, through its C interface.

    Args:
        flash: whether attention runs through the flash attention kernel.
        repack: whether weights are copied to the layout of the fastest kernels.
    """

    def __init__(
        self, path: Path, *, context: int, flash: bool = True, threads: int = 1, repack: bool = True
    ) -> None:
        self._c = _llama_cpp()
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


@dataclass(frozen=True)
class Case:
    """One file to compare on.

    Attributes:
        context: tokens that the model may hold; at least those of the longest prompt and its greedy text.
        prompts: token ids of each prompt.
    """

    name: str
    quantization: str
    path: Path
    context: int
    prompts: tuple[tuple[int, ...], ...]

    @property
    def exact(self) -> bool:
        """Whether the bar is that for F32 and F16."""
        return self.quantization in EXACT_TYPES


@dataclass
class Outcome:
    """What a case gave.

    Attributes:
        delta: largest difference of a logit, as a share of the logits' range in that position.
        same_text: tokens of greedy text that are the same, for each prompt that was continued.
        kl: divergence of ours from llama.cpp, mean over all positions.
        own_kl: divergence of llama.cpp without flash attention from llama.cpp with it.
        kl_by_length: prompt length -> (kl, own_kl).
    """

    name: str
    quantization: str
    exact: bool
    delta: float
    same_text: list[int]
    kl: float
    own_kl: float
    kl_by_length: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def kl_share(self) -> float:
        """The divergence as a share of what the bar allows."""
        return self.kl / max(MAX_KL_RATIO * self.own_kl, KL_FLOOR)

    @property
    def holds(self) -> bool:
        """Whether the case meets its bar."""
        if self.exact:
            return self.delta <= MAX_DELTA and all(same == GREEDY_TOKENS for same in self.same_text)
        return self.kl_share <= 1.0


def _llama_cpp() -> Any:
    import llama_cpp

    if not hasattr(_llama_cpp, "silenced"):
        callback = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
        llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        _llama_cpp.silenced = callback  # type: ignore[attr-defined]  # must outlive every call
    return llama_cpp


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


def divergences(logits: Logits, reference: Logits) -> NDArray[np.float64]:
    """KL(softmax(reference) || softmax(logits)) of each row, in float64 and nats."""
    ours, theirs = (_log_softmax(values) for values in (logits, reference))
    return (np.exp(theirs) * (theirs - ours)).sum(axis=1)  # type: ignore[no-any-return]


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # type: ignore[no-any-return]


def _agreeing(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=True))
    return next((index for index, (one, other) in pairs if one != other), len(first))


def compare(case: Case, *, threads: int = 1, repack: bool = True) -> Outcome:
    """Run all prompts of a case on the three sides."""
    ours = Ours(case.path, context=case.context, threads=threads, repack=repack)
    reference = LlamaCpp(case.path, context=case.context, threads=threads, repack=repack)
    plain = LlamaCpp(case.path, context=case.context, threads=threads, repack=repack, flash=False)
    deltas, same = [], []
    kl: dict[int, NDArray[np.float64]] = {}
    own_kl: dict[int, NDArray[np.float64]] = {}
    try:
        for prompt in case.prompts:
            mine, theirs = prompt_logits(ours, prompt), prompt_logits(reference, prompt)
            deltas.append(np.abs(mine - theirs).max(axis=1) / np.ptp(theirs, axis=1))
            kl[len(prompt)] = divergences(mine, theirs)
            own_kl[len(prompt)] = divergences(prompt_logits(plain, prompt), theirs)
            if len(prompt) > 1:
                sides = ((ours, mine), (reference, theirs))
                texts = [greedy(side, logits[-1], len(prompt), GREEDY_TOKENS) for side, logits in sides]
                same.append(_agreeing(*texts))
    finally:
        for side in (ours, reference, plain):
            side.close()
    return Outcome(
        case.name,
        case.quantization,
        case.exact,
        delta=_finite(np.concatenate(deltas).max()),
        same_text=same,
        kl=_finite(np.concatenate(list(kl.values())).mean()),
        own_kl=_finite(np.concatenate(list(own_kl.values())).mean()),
        kl_by_length={length: (float(kl[length].mean()), float(own_kl[length].mean())) for length in kl},
    )


def _finite(value: np.floating[Any]) -> float:
    """NaN, which passes every comparison with a bar or fails it by chance, as infinity."""
    return float(value) if math.isfinite(value) else math.inf


# --- random weights -------------------------------------------------------------------------------

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


# --- trained weights ------------------------------------------------------------------------------


def requantized(source: Path, file_type: str, target: Path) -> Path:
    """A copy of a file in another quantization, made by llama.cpp.

    Raises:
        RuntimeError: llama.cpp refuses, as for widths that no block size of that type divides.
    """
    c = _llama_cpp()
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
    c = _llama_cpp()
    prompt, count = "Once upon a time", 256
    with Engine.load(path) as engine:
        mine = engine.generate(prompt, sampling=SamplingParameters(temperature=0), max_tokens=count).text()
    llama = c.Llama(str(path), n_ctx=512, n_threads=1, flash_attn=True, verbose=False)
    answer = llama.create_completion(prompt, max_tokens=count, temperature=0.0)
    llama.close()
    return mine, answer["choices"][0]["text"]


# --- the benchmark --------------------------------------------------------------------------------


def quick_cases(folder: Path) -> Iterator[Case]:
    """A part of the matrix with each architecture, each type and each shape in it."""
    yield from random_cases(folder, quantizations=("F32", "Q4_0"), shapes=("ff172", "kv3"))
    yield from random_cases(folder, architectures=("llama",), shapes=("kv1",))
    yield from random_cases(folder, ("qwen2", "qwen3"), ("F16", "Q8_0", "Q4_K"), ("ff1376",))


def _summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """The worst of each quantization."""
    kinds = dict.fromkeys(outcome.quantization for outcome in outcomes)
    return {
        kind: {
            "cases": len(group),
            "delta": max(outcome.delta for outcome in group),
            "kl": max(outcome.kl for outcome in group),
            "own_kl": max(outcome.own_kl for outcome in group),
            "kl_share_of_bar": max(outcome.kl_share for outcome in group),
            "same_text": sum(same == GREEDY_TOKENS for outcome in group for same in outcome.same_text),
            "texts": sum(len(outcome.same_text) for outcome in group),
        }
        for kind in kinds
        if (group := [outcome for outcome in outcomes if outcome.quantization == kind])
    }


def _report_on(name: str, outcomes: Sequence[Outcome], report: Report) -> None:
    exact = [outcome for outcome in outcomes if outcome.exact]
    quantized = [outcome for outcome in outcomes if not outcome.exact]
    if exact:
        worst = max(outcome.delta for outcome in exact)
        report.at_most(f"{name}, F32 and F16: largest difference of a logit / range", worst, MAX_DELTA)
        same = all(tokens == GREEDY_TOKENS for outcome in exact for tokens in outcome.same_text)
        report.is_true(f"{name}, F32 and F16: same {GREEDY_TOKENS} greedy tokens", same)
    if quantized:
        share = max(outcome.kl_share for outcome in quantized)
        report.at_most(f"{name}, quantized: largest KL / max(2 x llama.cpp's own, {KL_FLOOR:g})", share, 1.0)
    report.details[name] = _summary(outcomes)


def _run(cases: Iterable[Case], report: Report) -> list[Outcome]:
    outcomes = []
    for case in cases:
        outcome = compare(case)
        outcomes.append(outcome)
        lengths = "  ".join(f"{n}: {kl:.1e} / {own:.1e}" for n, (kl, own) in outcome.kl_by_length.items())
        mark = "ok  " if outcome.holds else "MISS"
        report.note(
            f"{mark} {case.name}: delta {outcome.delta:.1e}, text {outcome.same_text}, KL / own: {lengths}"
        )
    return outcomes


def main() -> int:
    """Run the benchmark; exit status 0 where every bar holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a part of the matrix, about a minute")
    quick = parser.parse_args().quick
    report = Report("correctness")
    file_types = QUICK_FILE_TYPES if quick else tuple(FILE_TYPES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = quick_cases(folder) if quick else random_cases(folder)
        _report_on("random weights", _run(cases, report), report)
        for source in (STORIES, DEMO):
            if source.exists():
                outcomes = _run(trained_cases(source, folder, file_types, report), report)
                _report_on(source.stem, outcomes, report)
            else:
                report.note(f"{source} is absent; its part is left out")
    if STORIES.exists():
        mine, theirs = stories(STORIES)
        report.details["story"] = mine
        report.is_true("stories260K writes the same story as llama.cpp", mine == theirs)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
