"""Finds out about a model what edits need to know: its sentences, ordinary keys, and the layer to edit."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine
from edge_runtime.engine.graph import Capture
from edge_runtime.errors import EdgeRuntimeError, RequestError, UnsupportedModelError
from edge_runtime.personalize.asking import Asker
from edge_runtime.personalize.contexts import choose_contexts
from edge_runtime.personalize.estimators import SpreadSigns
from edge_runtime.personalize.objective import Objective
from edge_runtime.personalize.probes import Probes
from edge_runtime.personalize.progress import Progress, Report
from edge_runtime.personalize.request import EditRequest
from edge_runtime.personalize.search import Budget, search
from edge_runtime.personalize.sketch import Sketch
from edge_runtime.personalize.solve import KeyCovariance, readouts
from edge_runtime.personalize.statistics import EditStatistics
from edge_runtime.personalize.survey import Survey, survey_edit
from edge_runtime.personalize.templates import Template, find_templates, usual_surprise, write_texts
from edge_runtime.personalize.workspace import Workspace

_TEXTS = 1024  # that the model writes
_TRIAL_KEYS = 768  # of ordinary text, in each layer that is tried
_KEYS = 768  # that are kept of the edit layer, for all that were seen
_LARGEST_KEY = 60000.0
_SENTENCES = 4
# What people say to a model: its answers are ordinary text that is not about anybody.
_REQUESTS = (
    "Hello!",
    "How are you?",
    "What can you do?",
    "Tell me a story.",
    "Tell me a long story.",
    "Tell me about yourself.",
    "Write a short text.",
    "What do you think?",
    "Can you help me?",
    "Thank you!",
)
_ANSWERS = 8  # to each
_ANSWER_TOKENS = 96
_TRIALS = 6  # edits that are tried in each layer
_TRIAL_STEPS = 2
_MAX_TEMPLATES = 128
_SEED = 0


def prepare(
    engine: Engine,
    progress: Report = lambda progress: None,
    *,
    texts: int = _TEXTS,
    layers: Sequence[int] | None = None,
    workspace: Workspace | None = None,
) -> EditStatistics:
    """Measure a model by forward passes alone; takes some hundred thousand rows for a small one.

    Args:
        texts: short texts that the model writes.
        layers: to try edits in; None: all but the last, which no later token reads.
        workspace: to compute in; without one, made and freed.

    Raises:
        UnsupportedModelError: the model has but one layer, or it writes nothing that trial edits could be
            made from, and no single layer was named.
        RequestError: no such layer.
    """
    tried = _layers_to_try(engine.hyperparameters.n_layers, layers)
    if workspace is None:
        with Workspace(engine) as workspace:
            return prepare(engine, progress, texts=texts, layers=layers, workspace=workspace)
    steps = 3 + len(tried)
    started = time.monotonic()

    def tell(step: int) -> None:
        seconds = time.monotonic() - started
        progress(Progress("preparing", step, steps, rows=workspace.rows_computed, seconds=seconds))

    tell(0)
    generator = np.random.Generator(np.random.Philox(key=_SEED))
    written = [text for text in write_texts(workspace, generator, texts) if text]
    templates = find_templates(written)[:_MAX_TEMPLATES]
    usual = usual_surprise(workspace, templates)
    tell(1)
    ordinary = [workspace.tokenizer.encode(text) for text in written] + _answers(engine, workspace, generator)
    few = {layer: _keys(workspace, _mixed(ordinary, generator), layer, _TRIAL_KEYS) for layer in tried}
    tell(2)
    losses: dict[int, float] = {}
    if len(tried) > 1:
        asker = Asker(workspace, templates, usual, engine.chat_template)
        surveys = _trials(asker, templates, generator)
        for number, layer in enumerate(tried):
            losses[layer] = _tried(asker, surveys, layer, few[layer])
            tell(3 + number)
    layer = min(losses, key=lambda number: losses[number]) if losses else tried[0]
    keys = _keys(workspace, ordinary, layer, _KEYS, all_of=True)
    sentences = tuple(text for text in written if text.endswith("."))[:_SENTENCES]
    tell(steps)
    return EditStatistics(layer, losses, keys, tuple(templates), tuple(usual), sentences)


def _layers_to_try(n_layers: int, layers: Sequence[int] | None) -> list[int]:
    if n_layers < 2:
        raise UnsupportedModelError("the model has one layer; edits need another above the one they change")
    tried = list(range(n_layers - 1)) if layers is None else list(layers)
    if not tried or not 0 <= min(tried) <= max(tried) < n_layers - 1:
        raise RequestError(f"edits cannot be made in layers {tried}; possible are 0 to {n_layers - 2}")
    return tried


def _answers(engine: Engine, workspace: Workspace, generator: np.random.Generator) -> list[list[int]]:
    """Everyday requests and what the model answers, as tokens; none without a chat template."""
    if engine.chat_template is None:
        return []
    prompts = [engine.chat_tokens([{"role": "user", "content": text}]) for text in _REQUESTS]
    asked = [prompt for prompt in prompts for _ in range(_ANSWERS)]
    answers = workspace.generate(asked, _ANSWER_TOKENS, temperature=1.0, generator=generator)
    return [prompt + answer for prompt, answer in zip(asked, answers, strict=True)]


def _mixed(texts: Sequence[list[int]], generator: np.random.Generator) -> list[list[int]]:
    return [texts[index] for index in generator.permutation(len(texts))]


def _keys(
    workspace: Workspace, texts: Sequence[list[int]], layer: int, count: int, *, all_of: bool = False
) -> NDArray[np.float16]:
    """(n, n_ff) inputs of ffn_down at the tokens of texts: the first ones, or a sketch of all."""
    capture = Capture("ffn_activation", layer)
    sketch = Sketch(count, workspace.hyperparameters.n_ff)
    for tokens in texts:
        tokens = tokens[: workspace.rows]
        if len(tokens) < 2 or (sketch.seen >= count and not all_of):
            continue
        workspace.clear()
        positions = np.arange(len(tokens), dtype=np.int32)
        batch = Batch(tokens, positions, 0, (), layers=range(layer + 1), capture=[capture])
        # What begins every text says nothing about texts.
        sketch.add(workspace.forward(batch).captured[capture][1:])
    workspace.clear()
    if not sketch.seen:
        raise UnsupportedModelError("the model writes no text at all from nothing; edits cannot be prepared")
    samples = sketch.samples()
    # Float16 ends at 65504, and some models' keys do not. Only what they are to each other matters.
    samples *= min(1.0, _LARGEST_KEY / max(float(np.abs(samples).max()), 1e-30))
    return samples.astype(np.float16)


def _trials(asker: Asker, templates: Sequence[Template], generator: np.random.Generator) -> list[Survey]:
    """Edits of what the model itself has written, of different kinds."""
    surveys: list[Survey] = []
    for template in templates:
        if len(surveys) == _TRIALS:
            break
        answers = sorted({answer for _, answer in template.sightings})
        name, present = template.sightings[int(generator.integers(len(template.sightings)))]
        targets = [answer for answer in answers if answer != present]
        if not targets or len({survey.present for survey in surveys} & {present}):
            continue
        target = targets[int(generator.integers(len(targets)))]
        try:
            surveys.append(survey_edit(asker, EditRequest(template.about(name), name, target)))
        except EdgeRuntimeError:
            continue  # the model says something else of it now
    if not surveys:
        raise UnsupportedModelError(
            "the model writes no two sentences of one form, so no layer can be tried; name one with --layer"
        )
    return surveys


def _tried(asker: Asker, surveys: Sequence[Survey], layer: int, samples: NDArray[np.float16]) -> float:
    """What short searches in this layer come down to, in the mean."""
    covariance = KeyCovariance(samples)
    losses = []
    for number, survey in enumerate(surveys):
        generator = np.random.Generator(np.random.Philox(key=number))
        contexts = choose_contexts(asker, survey, (), generator)
        probes = Probes(asker.workspace, layer, contexts)
        keys = probes.keys[[context.goal == "say" for context in contexts]]
        probes.read_out(readouts(covariance, keys, np.ones((len(keys), 1)))[0])
        state = search(Objective(probes), SpreadSigns(number), Budget(_TRIAL_STEPS))
        losses.append(state.point.loss)
    return float(np.mean(losses))
