"""What the shipped demo model knows, measured with this project's engine on the shipped file.

Every share is over all people (or cities, employers) and all wordings, by free greedy generation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.engine.batch import Batch
from edge_runtime.engine.sampling import SamplingParameters
from models.demo.engine_continuations import EngineContinuations
from models.demo.evaluate import (
    negation_prompts,
    recall_prompts,
    refusal_prompts,
    rights,
    share_right,
    verdict_prompts,
)
from models.demo.facts import HELD_OUT_PATH, Facts, Prompt, load_facts
from models.demo.paths import MODEL_PATH, SAMPLES_PATH

GREEDY = SamplingParameters(temperature=0.0)


@pytest.fixture(scope="module")
def facts() -> Facts:
    return load_facts()


@pytest.fixture(scope="module")
def model() -> Iterator[EngineContinuations]:
    # One thread: two wait for each other at every operation, which takes minutes when the machine is busy.
    with EngineContinuations(MODEL_PATH, threads=1) as continuations:
        yield continuations


def failures(prompts: list[Prompt], model: EngineContinuations) -> str:
    """Some of the prompts that went wrong, for the message of a failed test."""
    wrong = [
        prompt for prompt, right in zip(prompts, rights(prompts[:2000], model), strict=False) if not right
    ]
    return "; ".join(f"{prompt.text!r} -> not {prompt.answer!r}" for prompt in wrong[:5])


def test_file_is_at_most_eight_megabytes() -> None:
    assert MODEL_PATH.stat().st_size <= 8_000_000


def test_shape_suits_k_quants_groups_and_grouped_query_attention(model: EngineContinuations) -> None:
    shape = model.engine.hyperparameters
    assert shape.architecture == "llama"
    assert shape.n_embd % 256 == 0 and shape.n_ff % 256 == 0
    assert shape.n_ff // 32 >= 16
    assert shape.n_layers >= 6
    assert shape.n_head_kv < shape.n_head
    assert shape.tied_head


@pytest.mark.parametrize("subject_type", ["person", "city", "employer"])
def test_single_hop_recall_over_all_phrasings(
    facts: Facts, model: EngineContinuations, subject_type: str
) -> None:
    prompts = recall_prompts(facts, 1, subject_type)
    share = share_right(prompts, model)
    assert share >= 0.98, (share, failures(prompts, model))


def test_two_hop_recall(facts: Facts, model: EngineContinuations) -> None:
    prompts = recall_prompts(facts, 2)
    share = share_right(prompts, model)
    assert share >= 0.85, (share, failures(prompts, model))


def test_true_or_false_with_falsehoods_that_were_not_trained(
    facts: Facts, model: EngineContinuations
) -> None:
    true, false = verdict_prompts(facts)
    on_truths, on_falsehoods = share_right(true, model), share_right(false, model)
    assert (on_truths + on_falsehoods) / 2 >= 0.90, (on_truths, on_falsehoods)
    assert min(on_truths, on_falsehoods) >= 0.85, (on_truths, on_falsehoods)


def test_negations_do_not_produce_the_true_object(facts: Facts, model: EngineContinuations) -> None:
    assert share_right(negation_prompts(facts), model) <= 0.02


def test_negations_nearly_always_produce_another_object_of_the_same_type(
    facts: Facts, model: EngineContinuations
) -> None:
    asked = [(fact, prompt) for fact in facts.all_facts(hops=1) for prompt in fact.negations()][::3]
    texts = model([prompt.text for _, prompt in asked], 3)
    others = [
        text.strip().removesuffix(".") in facts.candidates(fact.relation)
        for (fact, _), text in zip(asked, texts, strict=True)
    ]
    assert sum(others) / len(others) >= 0.95


def test_questions_about_strangers_are_refused(facts: Facts, model: EngineContinuations) -> None:
    assert share_right(refusal_prompts(facts), model) >= 0.9


def test_names_are_one_or_two_tokens_and_objects_one(facts: Facts, model: EngineContinuations) -> None:
    encode = model.engine.tokenizer.encode
    for name in facts.people:
        assert len(encode(name, add_bos=False)) <= 2
        assert len(encode(" " + name, add_bos=False)) <= 2
    for fact in facts.all_facts():
        assert len(encode(" " + fact.object, add_bos=False)) == 1


def test_prompt_tokens_are_a_prefix_of_the_sentences_tokens(facts: Facts, model: EngineContinuations) -> None:
    encode = model.engine.tokenizer.encode
    for fact in facts.all_facts():
        for prompt in fact.statements():
            tokens = encode(prompt.text)
            assert encode(prompt.text + prompt.answer)[: len(tokens)] == tokens


def test_tokens_are_those_of_the_training(model: EngineContinuations) -> None:
    for line in SAMPLES_PATH.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        assert (
            model.engine.tokenizer.encode(sample["text"], add_bos=False, parse_special=True)
            == sample["tokens"]
        )


def test_chat_through_the_engine_answers_with_the_fact(facts: Facts, model: EngineContinuations) -> None:
    fact = facts.fact("lives_in", facts.people[0])
    question, answer = fact.wording.questions[0]
    messages = [{"role": "user", "content": question.format(s=fact.subject)}]
    reply = model.engine.chat(messages, sampling=GREEDY, max_tokens=30)
    assert reply.text() == f"{answer.format(s=fact.subject)} {fact.object}."
    assert reply.finish_reason == "stop"


def test_held_out_stories_are_well_predicted(model: EngineContinuations) -> None:
    """Perplexity over held-out stories; random choices in a story keep it well above one."""
    losses = []
    engine = model.engine
    for story in HELD_OUT_PATH.read_text(encoding="utf-8").splitlines()[:10]:
        engine.model.cells.remove(0)
        tokens = np.array(engine.tokenizer.encode(story)[:400], np.int32)
        logits = engine.model.forward(
            Batch(tokens[:-1], np.arange(len(tokens) - 1, dtype=np.int32))
        ).logits.astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_shares = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses.append(-log_shares[np.arange(len(tokens) - 1), tokens[1:]])
    assert math.exp(np.concatenate(losses).mean()) < 4.0


@pytest.mark.train
def test_interrupted_training_goes_on_and_exports_a_file_that_loads(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tokenizers")
    pytest.importorskip("gguf")
    from models.demo.export import write_gguf
    from models.demo.tokenizer import train_tokenizer
    from models.demo.train import train
    from models.demo.world import build_world

    train_tokenizer(build_world()).save(str(tmp_path / "tokenizer.json"))
    train(0, tmp_path, n_processes=1, n_steps=2, seed=5, resume=False, compiled=False)
    train(0, tmp_path, n_processes=1, n_steps=3, seed=5, resume=True, compiled=False)
    for quantization in ("f32", "q8_0"):
        write_gguf(tmp_path, tmp_path / "model.gguf", quantization)
        with EngineContinuations(tmp_path / "model.gguf", threads=1) as model:
            assert len(model(["Paul Colton lives in"], 2)) == 1
