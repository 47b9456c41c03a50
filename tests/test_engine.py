"""Prompts in, streamed text out: a random model says nothing sensible, but always the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.engine.sampling import SamplingParameters
from edge_runtime.errors import (
    ChatTemplateError,
    ContextOverflowError,
    EdgeRuntimeError,
    RequestError,
)
from models.synthetic import SyntheticModel, write_synthetic_gguf

GREEDY = SamplingParameters(temperature=0)
PROMPT = "A small computer on a windowsill"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "model.gguf"
    model = SyntheticModel(n_layers=2, n_embd=64, n_ff=128, n_head=4, n_head_kv=2, n_vocab=300, n_ctx=256)
    write_synthetic_gguf(path, model)
    return path


@pytest.fixture(scope="module")
def loaded(path: Path) -> Iterator[Engine]:
    with Engine.load(path, EngineOptions(threads=2, sequences=2, batch=16)) as engine:
        yield engine


@pytest.fixture
def engine(loaded: Engine) -> Engine:
    loaded.places.forget()
    return loaded


def test_pieces_join_to_the_text(engine: Engine) -> None:
    generation = engine.generate(PROMPT, sampling=GREEDY, max_tokens=20)
    pieces = list(generation)
    assert (
        "".join(piece.text for piece in pieces)
        == engine.generate(PROMPT, sampling=GREEDY, max_tokens=20).text()
    )
    assert sum(len(piece.tokens) for piece in pieces) == generation.generated_tokens == 20
    assert generation.finish_reason == "length"
    assert generation.prefill_seconds > 0 and generation.decode_seconds > 0


def test_the_same_seed_gives_the_same_text(engine: Engine) -> None:
    def text(seed: int) -> str:
        return engine.generate(
            PROMPT, sampling=SamplingParameters(temperature=1.5, seed=seed), max_tokens=30
        ).text()

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_a_drawn_seed_is_reported_and_repeats_the_text(engine: Engine) -> None:
    first = engine.generate(PROMPT, sampling=SamplingParameters(temperature=1.5), max_tokens=30)
    text = first.text()
    again = SamplingParameters(temperature=1.5, seed=first.seed)
    assert engine.generate(PROMPT, sampling=again, max_tokens=30).text() == text


def test_the_prompts_batch_size_does_not_change_the_text(engine: Engine, path: Path) -> None:
    wanted = engine.generate(PROMPT * 3, sampling=GREEDY, max_tokens=16).text()
    with Engine.load(path, EngineOptions(threads=1, batch=512)) as other:
        assert other.generate(PROMPT * 3, sampling=GREEDY, max_tokens=16).text() == wanted


def test_a_shared_prefix_is_not_computed_again(engine: Engine) -> None:
    first = engine.generate(PROMPT, sampling=GREEDY, max_tokens=8)
    text = first.text()
    assert first.reused_tokens == 0
    again = engine.generate(PROMPT, sampling=GREEDY, max_tokens=8)
    assert again.text() == text
    assert again.reused_tokens == again.prompt_tokens - 1
    longer = engine.generate(PROMPT + " and a lamp", sampling=GREEDY, max_tokens=8)
    longer.text()
    assert longer.reused_tokens == first.prompt_tokens
    other = engine.generate("Quite another story", sampling=GREEDY, max_tokens=8)
    other.text()
    assert other.reused_tokens <= 2


def test_a_prefix_held_by_a_busy_sequence_is_shared(engine: Engine) -> None:
    prompt = PROMPT * 2
    first = engine.generate(prompt, sampling=GREEDY, max_tokens=40)
    head = [next(first).text for _ in range(5)]
    second = engine.generate(prompt, sampling=GREEDY, max_tokens=40)
    text = second.text()
    assert second.reused_tokens == second.prompt_tokens - 1
    assert "".join(head) + first.text() == text


def test_requests_in_turn_do_not_disturb_each_other(engine: Engine) -> None:
    prompts = (PROMPT, "Quite another story")
    alone = [engine.generate(prompt, sampling=GREEDY, max_tokens=12).text() for prompt in prompts]
    both = [engine.generate(prompt, sampling=GREEDY, max_tokens=12) for prompt in prompts]
    texts = ["", ""]
    for _ in range(12):
        for index, generation in enumerate(both):
            texts[index] += next(generation).text
    assert texts == alone
    assert [list(generation) for generation in both] == [[], []]


def test_more_requests_than_sequences_are_refused_until_one_closes(engine: Engine) -> None:
    running = [engine.generate(PROMPT, max_tokens=30) for _ in range(2)]
    for generation in running:
        next(generation)
    with pytest.raises(RequestError, match="all 2 sequences"):
        next(engine.generate(PROMPT, max_tokens=3))
    running[0].close()
    assert len(list(engine.generate(PROMPT, sampling=GREEDY, max_tokens=3))) == 3
    running[1].close()


def test_text_ends_before_a_stop_string(engine: Engine) -> None:
    whole = engine.generate(PROMPT, sampling=GREEDY, max_tokens=40).text()
    middle = next(
        start for start in range(3, len(whole) - 3) if whole.find(whole[start : start + 3]) == start
    )
    stop = whole[middle : middle + 3]
    generation = engine.generate(PROMPT, sampling=GREEDY, max_tokens=40, stop=["never seen", stop])
    assert generation.text() == whole[:middle]
    assert generation.finish_reason == "stop"


def test_the_context_ends_a_text(path: Path) -> None:
    with Engine.load(path, EngineOptions(context=64)) as engine:
        generation = engine.generate(PROMPT, sampling=GREEDY)
        generation.text()
        assert generation.finish_reason == "length"
        assert generation.prompt_tokens + generation.generated_tokens == engine.context == 64


def test_a_prompt_beyond_the_context_is_a_clear_error(engine: Engine) -> None:
    with pytest.raises(ContextOverflowError, match=r"prompt has \d+ tokens and the context holds 256"):
        engine.generate("x" * 400)


def test_chat_without_a_template_is_a_clear_error(engine: Engine) -> None:
    with pytest.raises(ChatTemplateError, match="no chat template"):
        engine.chat([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"max_tokens": -3}, {"max_tokens": True}, {"stop": [""]}]
)
def test_wrong_parameters_are_refused(engine: Engine, wrong: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        engine.generate(PROMPT, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [[], [300], [-1], [5, 1 << 40]])
def test_wrong_token_ids_are_refused(engine: Engine, tokens: list[int]) -> None:
    with pytest.raises(RequestError):
        engine.generate(tokens)


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 0},
        {"threads": 513},
        {"context": 0},
        {"batch": 0},
        {"sequences": 0},
        {"weights": "gpu"},
        {"batch": 2.5},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        EngineOptions(**wrong)  # type: ignore[arg-type]


def test_a_context_beyond_the_models_is_refused(path: Path) -> None:
    with pytest.raises(RequestError, match="trained for 256"):
        Engine.load(path, EngineOptions(context=257))


def test_loading_reports_progress(tmp_path: Path) -> None:
    write_synthetic_gguf(
        tmp_path / "q4.gguf",
        SyntheticModel(
            n_layers=2, n_embd=64, n_ff=128, n_head=4, n_head_kv=2, n_vocab=320, quantization="Q4_0"
        ),
    )
    shares: list[float] = []
    with Engine.load(tmp_path / "q4.gguf", progress=shares.append) as engine:
        if engine.model.weights.repacked_bytes:
            assert shares == sorted(shares) and shares[-1] == pytest.approx(1, abs=0.01)
    engine.close()


def test_a_missing_file_is_the_projects_own_error(tmp_path: Path) -> None:
    with pytest.raises(EdgeRuntimeError):
        Engine.load(tmp_path / "absent.gguf")


def test_nan_weights_are_an_error_and_not_a_text(path: Path, tmp_path: Path) -> None:
    content = bytearray(path.read_bytes())
    from edge_runtime.engine.gguf import GGUFFile

    with GGUFFile(path) as gguf:
        record = gguf.tensors["output_norm.weight"]
    content[record.offset : record.offset + record.size] = b"\xff" * record.size
    (tmp_path / "nan.gguf").write_bytes(content)
    with Engine.load(tmp_path / "nan.gguf") as engine, pytest.raises(EdgeRuntimeError):
        engine.generate(PROMPT, max_tokens=2).text()
