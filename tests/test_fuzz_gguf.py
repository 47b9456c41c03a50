"""Damaged model files must end in this project's own errors: no abort, no hang, no boundless allocation."""

from __future__ import annotations

import hashlib
import os
import selectors
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from model_damage import Case, Parts, damaged_file, take_apart

from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.tokenizer import Tokenizer
from models.synthetic import RopeScaling, SyntheticModel, write_synthetic_gguf

ROOT = Path(__file__).parent.parent
SECONDS = 60.0  # for one case, on a busy machine
TINY = {"n_embd": 32, "n_ff": 64, "n_head": 4, "n_head_kv": 2, "n_vocab": 262, "n_layers": 2, "n_ctx": 64}
BASES = (
    SyntheticModel(**TINY, rope_factors=True),  # type: ignore[arg-type]
    SyntheticModel(**TINY, quantization="Q4_0", rope_scaling=RopeScaling("yarn", 4.0, 32)),  # type: ignore[arg-type]
    SyntheticModel("qwen2", **TINY, biases=True, tied_head=True, pre_tokenizer="qwen2"),  # type: ignore[arg-type]
    SyntheticModel("qwen3", **TINY, quantization="Q8_0", head_dim=16, pre_tokenizer="default"),  # type: ignore[arg-type]
)
# The same cases in each run; `make test-slow` draws new ones.
repeatable = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),  # shrinking would start a process for each step; the case is saved instead
    suppress_health_check=list(HealthCheck),
)


class Worker:
    """A process that runs cases, started again after it ended."""

    def __init__(self, folder: Path) -> None:
        self.case = folder / "case.gguf"
        self.seen: Counter[str] = Counter()
        self._complaints = folder / "stderr.txt"
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with self._complaints.open("wb") as complaints:
            return subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "fuzz_worker.py"), str(self.case)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                env=environment,
            )

    def run(self, content: bytes, *, engine: bool) -> None:
        """Fails the test, with the case saved, unless it ends well or in an error of this project."""
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(len(content).to_bytes(8, "little") + bytes([engine]) + content)
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            ready = selector.select(SECONDS)
        line = process.stdout.readline().decode() if ready else ""
        if line.startswith(("ok", "refused")):
            self.seen[line.strip()] += 1
            return
        self.stop(kill=True)
        what = line.replace("\\n", "\n") if line else f"the process ended with {process.returncode}"
        what = what if ready else f"no answer within {SECONDS:.0f} s"
        saved = Path(tempfile.gettempdir()) / f"fuzz-{hashlib.sha256(content).hexdigest()[:12]}.gguf"
        saved.write_bytes(content)
        complaint = self._complaints.read_text(errors="replace")[-2000:]
        pytest.fail(f"{saved} (engine={engine}): {what}\n{complaint}", pytrace=False)

    def stop(self, *, kill: bool = False) -> None:
        """End the process: at once, or when it has read that there are no more cases."""
        if self._process is None:
            return
        if kill:
            self._process.kill()
        self._process.communicate()
        self._process = None


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Parts]:
    folder = tmp_path_factory.mktemp("bases")
    found = []
    for number, model in enumerate(BASES):
        path = folder / f"{number}.gguf"
        write_synthetic_gguf(path, model)
        found.append(take_apart(path))
    return found


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(tmp_path)
    yield worker
    worker.stop()


def fuzz(worker: Worker, bases: list[Parts], examples: int, *, engine: bool, repeat: bool = True) -> None:
    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        return damaged_file(draw, bases)

    @settings(repeatable, max_examples=examples, derandomize=repeat)
    @given(cases())
    def run(content: bytes) -> None:
        worker.run(content, engine=engine)

    run()
    # Unless both ends are reached often, the damage is too light or too heavy to show anything.
    refused = sum(count for answer, count in worker.seen.items() if answer.startswith("refused"))
    assert worker.seen["ok"] > examples // 100
    assert refused > examples // 4


def test_sound_files_pass(worker: Worker, bases: list[Parts]) -> None:
    for parts in bases:
        for engine in (False, True):
            worker.run(parts.encode(), engine=engine)
    assert worker.seen == {"ok": 2 * len(bases)}


def test_a_file_cut_off_anywhere_is_refused(worker: Worker, bases: list[Parts]) -> None:
    whole = bases[0].encode()
    header = whole.index(b"output_norm.weight")
    for end in [*range(64), *range(64, header, 97), *range(header, len(whole) - 1, 4099), len(whole) - 1]:
        worker.run(whole[:end], engine=False)
    assert worker.seen["ok"] == 0


def test_damaged_files_raise_only_own_errors(worker: Worker, bases: list[Parts]) -> None:
    fuzz(worker, bases, 2500, engine=False)


def test_the_engine_survives_damaged_files(worker: Worker, bases: list[Parts]) -> None:
    fuzz(worker, bases, 500, engine=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_more_damaged_files(worker: Worker, bases: list[Parts]) -> None:
    examples = int(os.environ.get("FUZZ_EXAMPLES", "20000"))
    fuzz(worker, bases, examples, engine=False, repeat=False)
    fuzz(worker, bases, examples // 4, engine=True, repeat=False)


@st.composite
def shapes(draw: st.DrawFn) -> SyntheticModel:
    """Models of odd shapes; some that no engine could run."""
    architecture = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    n_head_kv = draw(st.integers(1, 4))
    sound = draw(st.integers(0, 9)) > 0
    return SyntheticModel(
        architecture,
        n_layers=draw(st.integers(1, 3)),
        n_embd=draw(st.one_of(st.integers(1, 80), st.sampled_from([32, 64, 256]))),
        n_ff=draw(st.one_of(st.integers(1, 200), st.sampled_from([32, 64, 172, 256]))),
        n_head=n_head_kv * draw(st.integers(1, 5)) if sound else draw(st.integers(1, 9)),
        n_head_kv=n_head_kv,
        head_dim=2 * draw(st.integers(1, 65)) if sound else draw(st.integers(1, 140)),
        n_vocab=draw(st.integers(259, 330)),
        n_ctx=draw(st.integers(1, 700)),
        quantization=draw(st.sampled_from(["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "Q5_1"])),
        pure=draw(st.booleans()),
        tied_head=draw(st.booleans()),
        biases=draw(st.booleans()),
        all_biases=draw(st.booleans()),
        rope_factors=architecture == "llama" and draw(st.booleans()),
        rope_base=draw(st.sampled_from([1.0, 10000.0, 1e6])),
        norm_epsilon=draw(st.sampled_from([0.0, 1e-6, 1.0])),
        seed=draw(st.integers(0, 9)),
    )


def test_the_engine_runs_or_refuses_odd_shapes(worker: Worker, tmp_path: Path) -> None:
    path = tmp_path / "shape.gguf"

    @settings(repeatable, max_examples=150)
    @given(shapes())
    def run(model: SyntheticModel) -> None:
        write_synthetic_gguf(path, model)
        worker.run(path.read_bytes(), engine=True)

    run()
    assert worker.seen["ok"] > 50


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Tokenizer]]:
    folder, found = tmp_path_factory.mktemp("tokenizers"), []
    for number, model in enumerate((*BASES, SyntheticModel(**TINY, pre_tokenizer="tekken"))):  # type: ignore[arg-type]
        path = folder / f"{number}.gguf"
        write_synthetic_gguf(path, model)
        with GGUFFile(path) as gguf:
            found.append(Tokenizer(gguf))
    yield found
    for tokenizer in found:
        tokenizer.close()


PROMPTS = st.one_of(
    st.text(max_size=200),
    st.text(alphabet=" \n\t\0<s>/|'!?1äß日🙂", max_size=400),
    st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=3), st.integers(1, 20000)),
    st.text(alphabet=st.characters(categories=["Cs", "Ll", "Zs"]), max_size=50),
)


@settings(repeatable, max_examples=300)
@given(text=PROMPTS, parse_special=st.booleans())
def test_any_prompt_has_tokens(tokenizers: list[Tokenizer], text: str, parse_special: bool) -> None:
    for tokenizer in tokenizers:
        tokens = tokenizer.encode(text, add_bos=False, parse_special=parse_special)
        assert all(0 <= token < tokenizer.n_vocab for token in tokens)
        if not parse_special:
            clean = "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in text)
            assert tokenizer.decode(tokens) == clean
