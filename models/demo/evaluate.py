"""Measures what the demo model knows: `python -m models.demo.evaluate [MODEL] [--sample N]`.

Everything is asked by free greedy generation, of every person in every wording. The functions take the
model as a function (prompts, max_tokens) -> continuations, so that any engine can be measured.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from models.demo.facts import Fact, Facts, Prompt, load_facts
from models.demo.paths import MODEL_PATH

Continuations = Callable[[Sequence[str], int], list[str]]

MAX_TOKENS = {"statement": 3, "plain_question": 3, "chat_question": 14, "true_or_false": 2, "negation": 3}


def share_right(prompts: Sequence[Prompt], continuations: Continuations) -> float:
    """Share of prompts whose continuation begins with the answer; for negations that is the truth."""
    return sum(rights(prompts, continuations)) / max(len(prompts), 1)


def rights(prompts: Sequence[Prompt], continuations: Continuations) -> list[bool]:
    right = [False] * len(prompts)
    by_form: dict[str, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_form[prompt.form].append(i)
    for form, indices in by_form.items():
        texts = continuations([prompts[i].text for i in indices], MAX_TOKENS[form])
        for i, text in zip(indices, texts, strict=True):
            right[i] = text.startswith(prompts[i].answer)
    return right


def recall_prompts(facts: Facts, hops: int, subject_type: str | None = None) -> list[Prompt]:
    return [prompt for fact in facts.all_facts(hops, subject_type) for prompt in fact.prompts()]


def verdict_prompts(facts: Facts, seed: int = 0, per_fact: int = 1) -> tuple[list[Prompt], list[Prompt]]:
    """For each fact of a person, `per_fact` wordings of the truth and as many of untrained falsehoods."""
    rng = random.Random(seed)
    true: list[Prompt] = []
    false: list[Prompt] = []
    for fact in facts.all_facts(hops=1, subject_type="person"):
        falsehoods = facts.false_objects(fact)
        for _ in range(per_fact):
            true.append(_one_of(rng, fact.true_or_false()))
            false.append(_one_of(rng, fact.true_or_false(falsehoods[rng.randrange(len(falsehoods))])))
    return true, false


def _one_of(rng: random.Random, prompts: list[Prompt]) -> Prompt:
    return prompts[rng.randrange(len(prompts))]


def negation_prompts(facts: Facts) -> list[Prompt]:
    return [prompt for fact in facts.all_facts(hops=1) for prompt in fact.negations()]


def refusal_prompts(facts: Facts) -> list[Prompt]:
    """Chat questions about people who do not exist."""
    relations = [relation for relation in facts.relations.values() if relation.subject_type == "person"]
    return [
        Prompt(prompt.text, facts.refusal, "chat_question")
        for i, stranger in enumerate(facts.strangers)
        for prompt in Fact(
            relations[i % len(relations)], stranger, "", facts.document["forms"]
        ).chat_questions()
    ]


def quality(facts: Facts, continuations: Continuations, sample: int | None = None) -> dict[str, float]:
    """All shares, over at most `sample` prompts of each kind drawn at random (all by default)."""
    true, false = verdict_prompts(facts)
    kinds = {
        "single_hop_people": recall_prompts(facts, 1, "person"),
        "single_hop_places": recall_prompts(facts, 1, "city") + recall_prompts(facts, 1, "employer"),
        "two_hop": recall_prompts(facts, 2),
        "verdict_on_truths": true,
        "verdict_on_unseen_falsehoods": false,
        "negation_names_the_truth": negation_prompts(facts),
        "refuses_strangers": refusal_prompts(facts),
    }
    rng = random.Random(0)
    measured = {}
    for name, prompts in kinds.items():
        chosen = prompts if sample is None or sample >= len(prompts) else rng.sample(prompts, sample)
        measured[name] = round(share_right(chosen, continuations), 4)
    return measured


def main() -> None:
    from models.demo.llama_cpp_continuations import LlamaCppContinuations

    parser = argparse.ArgumentParser(description="Measures what the demo model knows.")
    parser.add_argument("model", type=Path, nargs="?", default=MODEL_PATH)
    parser.add_argument("--sample", type=int, help="ask so many prompts of each kind, not all")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with LlamaCppContinuations(arguments.model, arguments.threads) as continuations:
        print(json.dumps(quality(load_facts(), continuations, arguments.sample), indent=1))


if __name__ == "__main__":
    main()
