"""Sentences that a model itself uses, and the workspace that asks it for them beside its answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from edit_requests import BEFORE, PROMPT
from editing_parts import generator, opened

from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine
from edge_runtime.engine.sampling import SamplingParameters
from edge_runtime.errors import RequestError
from edge_runtime.personalize.templates import SLOT, Template, find_templates, usual_surprise, write_texts
from edge_runtime.personalize.workspace import Workspace

GREEDY = SamplingParameters(temperature=0)
PROMPTS = [PROMPT, "Alma Oakson works for", "The", "The", "Question: Where does Ann Colton live? Answer:"]


@pytest.fixture(scope="module")
def engine(demo_model: Path) -> Iterator[Engine]:
    with opened(demo_model) as engine:
        yield engine


@pytest.fixture
def workspace(engine: Engine) -> Iterator[Workspace]:
    with Workspace(engine) as workspace:
        yield workspace


# --- templates --------------------------------------------------------------------------------


def test_the_same_words_around_two_names_are_a_template() -> None:
    texts = [
        "Ann Lee works for Halcyon.",
        "Bo Day works for Blue Fin. Bo Day",
        "Ann Lee works for Halcyon. Then",
        "Ann Lee sleeps in Oslo.",
        "Bo Day works for",
        "nobody works for Halcyon.",
    ]
    assert find_templates(texts) == [
        Template("{} works for", (("Ann Lee", "Halcyon"), ("Bo Day", "Blue Fin")))
    ]


def test_a_name_inside_another_word_stays() -> None:
    texts = ["Ann knows Annabel from Oslo.", "Bo knows Annabel from Rome.", "Annabel knows Ann from Bern."]
    assert [t.text for t in find_templates(texts)] == ["{} knows Annabel from"]


def test_answers_are_a_name_or_one_word() -> None:
    texts = ["Ann works as a cook.", "Bo works as a sea captain.", "Cy works as a nurse!"]
    found = {template.text: template.sightings for template in find_templates(texts)}
    assert found == {"{} works as a": (("Ann", "cook"), ("Cy", "nurse"))}


def test_templates_seen_most_often_come_first() -> None:
    texts = [f"{name} lives in Oslo." for name in ("Ann", "Bo")]
    texts += [f"{name} sleeps in Rome." for name in ("Ann", "Bo", "Cy")]
    assert [template.text for template in find_templates(texts)] == ["{} sleeps in", "{} lives in"]


def test_what_has_a_place_for_a_name_already_is_no_template() -> None:
    assert find_templates([f"{name} likes {SLOT} Fish." for name in ("Ann", "Bo")]) == []


def test_a_template_is_about_any_name() -> None:
    assert Template("{} and {}'s home", ()).about("Ann") == "Ann and Ann's home"


def test_the_models_own_sentences_are_those_of_its_world(workspace: Workspace) -> None:
    written = write_texts(workspace, generator(), 256)
    assert len(written) == 256 and written == write_texts(workspace, generator(), 256)
    templates = find_templates(written)
    assert len(templates) > 8
    usual = usual_surprise(workspace, templates)
    names = sorted({name for name, _ in templates[0].sightings})[:3]
    texts = [workspace.tokenizer.encode(templates[0].about(name)) for name in names]
    assert usual[0] == pytest.approx(float(np.median(workspace.surprise(texts))), abs=0.1)


# --- the workspace ----------------------------------------------------------------------------


def test_continuations_are_the_engines(engine: Engine, workspace: Workspace) -> None:
    """Several at once, of different lengths, two of them equal."""
    tokens = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    found = [workspace.tokenizer.decode(answer) for answer in workspace.generate(tokens, 8)]
    alone = [engine.generate(prompt, sampling=GREEDY, max_tokens=8).text() for prompt in PROMPTS]
    assert found == alone
    assert found[2] == found[3]


def test_more_prompts_than_there_is_room_for_take_turns(engine: Engine) -> None:
    with Workspace(engine, n_cells=64, rows=16) as small:
        tokens = [engine.tokenizer.encode(prompt) for prompt in PROMPTS * 4]
        found = small.generate(tokens, 8)
        assert small.model.cells.n_free == 64
    assert found[: len(PROMPTS)] * 4 == found
    assert BEFORE in engine.tokenizer.decode(found[0])


def test_drawing_needs_a_generator(workspace: Workspace) -> None:
    tokens = [workspace.tokenizer.encode("The")] * 4
    with pytest.raises(RequestError, match=r"temperature = 1\.0 needs a random generator"):
        workspace.generate(tokens, 4, temperature=1.0)
    drawn = workspace.generate(tokens, 6, temperature=1.0, generator=generator())
    assert len(set(map(tuple, drawn))) > 1


def test_draws_are_of_the_models_distribution(workspace: Workspace) -> None:
    tokens = workspace.tokenizer.encode("Paul Colton works as a")
    logits = workspace.forward(Batch(tokens, np.arange(len(tokens), dtype=np.int32))).logits[-1] / 3
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    drawn = workspace.generate([tokens] * 1000, 1, temperature=3.0, generator=generator(2))
    likeliest = int(probabilities.argmax())
    share = np.mean([answer == [likeliest] for answer in drawn])
    assert share == pytest.approx(probabilities[likeliest], abs=0.06)


def test_surprise_is_the_negative_log_likelihood(engine: Engine, workspace: Workspace) -> None:
    texts = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    for tokens, found in zip(texts, workspace.surprise(texts), strict=True):
        workspace.clear()
        logits = workspace.forward(Batch(tokens, np.arange(len(tokens), dtype=np.int32))).logits
        wide = logits[:-1].astype(np.float64)
        norms = np.log(np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1)) + wide.max(axis=1)
        wanted = (norms - wide[np.arange(len(wide)), tokens[1:]]).sum()
        assert found == pytest.approx(wanted, abs=0.3)  # other batches: 8-bit products differ in last bits
    assert workspace.surprise([]) == []


def test_an_answer_in_progress_is_not_disturbed(engine: Engine) -> None:
    wanted = engine.generate(PROMPTS[4], sampling=GREEDY, max_tokens=12).text()
    with Workspace(engine) as workspace:
        pieces = []
        for piece in engine.generate(PROMPTS[4], sampling=GREEDY, max_tokens=12):
            pieces.append(piece.text)
            workspace.generate([workspace.tokenizer.encode(PROMPT)], 3)
    assert "".join(pieces) == wanted


def test_rows_are_counted_by_the_layers_they_went_through(workspace: Workspace) -> None:
    n_layers = workspace.hyperparameters.n_layers
    positions = np.arange(4, dtype=np.int32)
    workspace.forward(Batch([1, 2, 3, 4], positions))
    assert workspace.rows_computed == 4
    workspace.forward(Batch([1, 2, 3, 4], positions, 1, (), layers=range(n_layers // 2)))
    assert workspace.rows_computed == pytest.approx(4 + 4 * (n_layers // 2) / n_layers)
