"""Statistics for edits, measured on real models by forward passes alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from editing_parts import generator, opened

from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine
from edge_runtime.engine.graph import Capture
from edge_runtime.errors import RequestError, UnsupportedModelError
from edge_runtime.personalize.preparing import prepare
from edge_runtime.personalize.progress import Cancelled, Progress
from edge_runtime.personalize.statistics import (
    EditStatistics,
    load_statistics,
    save_statistics,
    statistics_path,
)
from edge_runtime.personalize.templates import find_templates, usual_surprise, write_texts
from edge_runtime.personalize.workspace import Workspace
from models.synthetic import SyntheticModel, write_synthetic_gguf

TEXTS = 128


@pytest.fixture(scope="module")
def engine(demo_model: Path) -> Iterator[Engine]:
    with opened(demo_model) as engine:
        yield engine


@pytest.fixture(scope="module")
def measured(engine: Engine) -> tuple[EditStatistics, list[Progress]]:
    told: list[Progress] = []
    return prepare(engine, told.append, texts=TEXTS, layers=[0, 4]), told


def test_the_layer_with_the_better_trials_is_chosen(measured: tuple[EditStatistics, list[Progress]]) -> None:
    found, _ = measured
    assert set(found.layer_losses) == {0, 4}
    assert found.layer == min(found.layer_losses, key=lambda layer: found.layer_losses[layer])
    assert len(set(found.layer_losses.values())) == 2


def test_progress_is_told_to_the_end(measured: tuple[EditStatistics, list[Progress]]) -> None:
    _, told = measured
    assert {moment.stage for moment in told} == {"preparing"}
    steps = [moment.step for moment in told]
    assert steps == list(range(told[-1].steps + 1))
    for measure in ("rows", "seconds"):
        values = [getattr(moment, measure) for moment in told]
        assert values == sorted(values) and values[-1] > values[0] >= 0


def test_sentences_are_the_models_own(
    engine: Engine, measured: tuple[EditStatistics, list[Progress]]
) -> None:
    found, _ = measured
    assert found.templates and len(found.usual) == len(found.templates)
    with Workspace(engine) as workspace:
        written = write_texts(workspace, generator(), TEXTS)
        assert written == write_texts(workspace, generator(), TEXTS)
        assert written != write_texts(workspace, generator(1), TEXTS)
        assert list(found.templates) == find_templates(written)
        np.testing.assert_allclose(found.usual, usual_surprise(workspace, found.templates), atol=0.2)
    assert found.sentences
    assert all(sentence in written and sentence.endswith(".") for sentence in found.sentences)


def test_kept_keys_are_ordinary_ones(engine: Engine, measured: tuple[EditStatistics, list[Progress]]) -> None:
    """Their mean square, in any direction, is that of keys of text that the model writes."""
    found, _ = measured
    assert found.keys.dtype == np.float16
    assert np.isfinite(found.keys).all()
    capture = Capture("ffn_activation", found.layer)
    keys = []
    with Workspace(engine) as workspace:
        for text in write_texts(workspace, generator(9), 64):
            tokens = workspace.tokenizer.encode(text)
            workspace.clear()
            batch = Batch(tokens, np.arange(len(tokens), dtype=np.int32), 0, (), capture=[capture])
            keys.append(workspace.forward(batch).captured[capture][1:])
    others = np.concatenate(keys).astype(np.float64)
    kept = found.keys.astype(np.float64)
    strongest = np.linalg.eigh(others.T @ others)[1][:, -8:]
    for direction in strongest.T:
        ratio = ((kept @ direction) ** 2).mean() / ((others @ direction) ** 2).mean()
        assert 0.3 < ratio < 3
    assert (kept**2).mean() == pytest.approx((others**2).mean(), rel=0.5)


def test_what_was_measured_is_loaded_again(
    engine: Engine, measured: tuple[EditStatistics, list[Progress]], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.symlink_to(engine.gguf.path)
    with opened(path) as other:
        save_statistics(measured[0], other.gguf)
        assert statistics_path(path).parent == tmp_path
        found = load_statistics(other.gguf)
    assert (found.layer, found.templates) == (measured[0].layer, measured[0].templates)


def test_cancelled_between_two_layers(engine: Engine) -> None:
    def cancel(progress: Progress) -> None:
        if progress.step == 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        prepare(engine, cancel, texts=8, layers=[0])


# --- models of random weights -----------------------------------------------------------------


def random_model(path: Path, **shape: object) -> Path:
    write_synthetic_gguf(path / "model.gguf", SyntheticModel(n_ctx=256, **shape))  # type: ignore[arg-type]
    return path / "model.gguf"


@pytest.mark.parametrize("layers", [[], [1], [-1], [0, 1]])
def test_layers_that_no_later_token_reads_are_refused(tmp_path: Path, layers: list[int]) -> None:
    with (
        opened(random_model(tmp_path)) as engine,
        pytest.raises(RequestError, match=r"cannot be made in layers \[.*possible are 0 to 0"),
    ):
        prepare(engine, texts=4, layers=layers)


def test_a_model_of_one_layer_cannot_be_prepared(tmp_path: Path) -> None:
    with (
        opened(random_model(tmp_path, n_layers=1)) as engine,
        pytest.raises(UnsupportedModelError, match="one layer"),
    ):
        prepare(engine, texts=4)


def test_a_model_without_sentences_says_that_a_layer_can_be_named(tmp_path: Path) -> None:
    with opened(random_model(tmp_path, n_layers=3)) as engine:
        with pytest.raises(UnsupportedModelError, match="no two sentences of one form"):
            prepare(engine, texts=4)
        found = prepare(engine, texts=8, layers=[1])
    assert (found.layer, found.templates, found.layer_losses) == (1, (), {})


def test_a_model_that_puts_nothing_before_a_text_can_be_prepared(tmp_path: Path) -> None:
    path = random_model(tmp_path, architecture="qwen2", biases=True, pre_tokenizer="qwen2")
    without = path.read_bytes().replace(ADDS_BOS + b"\1", ADDS_BOS + b"\0")
    path.write_bytes(without)
    with opened(path) as engine:
        assert engine.tokenizer.encode("") == []
        assert len(prepare(engine, texts=8).keys) > 8


ADDS_BOS = b"tokenizer.ggml.add_bos_token\7\0\0\0"


def test_keys_beyond_float16_are_brought_into_it(tmp_path: Path) -> None:
    path = random_model(tmp_path)
    with opened(path) as engine:
        plain = prepare(engine, texts=8, layers=[0]).keys
        scale_norm(path, engine, 1e4)
    with opened(path) as engine:
        large = prepare(engine, texts=8, layers=[0]).keys
    assert np.isfinite(large).all()
    assert np.abs(large).max() > 1000 * np.abs(plain).max()


def scale_norm(path: Path, engine: Engine, factor: float) -> None:
    """Make layer 0's FFN input, and so its keys, that much larger; their square in all."""
    record = engine.gguf.tensors["blk.0.ffn_norm.weight"]
    values = np.frombuffer(engine.gguf.tensor_bytes("blk.0.ffn_norm.weight"), np.float32)
    content = path.read_bytes()
    old = values.tobytes()
    assert content.count(old) >= 1 and record.type == 0
    place = content.index(old)
    path.write_bytes(content[:place] + (values * np.float32(factor)).tobytes() + content[place + len(old) :])
