"""Edits of the demo world, and how far the model follows them, by free generation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.personalize.request import EditRequest
from edge_runtime.personalize.workspace import Workspace
from models.demo.facts import Fact, Facts, Prompt

ANSWER_TOKENS = 14
_OTHERS = 40  # facts about other names
_SAME = 24  # wordings of the subject's other facts
_VERDICTS = 8
# Relation with two hops, and the one whose object it goes through.
_TWO_HOPS = {"home_country": "lives_in", "birth_country": "born_in", "work_city": "works_for"}


@dataclass(frozen=True, slots=True)
class WorldEdit:
    """One fact of the demo world and its new object."""

    fact: Fact
    target: str

    @property
    def request(self) -> EditRequest:
        """What the editor is told: one wording, and nothing else."""
        return EditRequest(self.fact.statements()[0].text, self.fact.subject, self.target)


def draw_edits(facts: Facts, count: int, seed: int = 0, *, one_each: bool = False) -> list[WorldEdit]:
    """Edits over all relations in turn.

    Args:
        one_each: no subject twice.
    """
    generator = random.Random(seed)
    one_hop = [name for name, wording in facts.relations.items() if wording.hops == 1]
    by_relation = {name: [f for f in facts.all_facts(hops=1) if f.relation == name] for name in one_hop}
    found: list[WorldEdit] = []
    used: set[str] = set()
    while len(found) < count:
        relation = one_hop[len(found) % len(one_hop)]
        fact = generator.choice(by_relation[relation])
        if one_each and fact.subject in used:
            continue
        used.add(fact.subject)
        targets = [item for item in facts.candidates(relation) if item != fact.object]
        found.append(WorldEdit(fact, generator.choice(targets)))
    return found


class Judge:
    """Asks a model for facts in every wording.

    Args:
        workspace: of the model; what is applied in it is what is judged.
    """

    def __init__(self, facts: Facts, workspace: Workspace) -> None:
        self._facts = facts
        self._workspace = workspace

    def right(self, prompts: Sequence[Prompt]) -> list[bool]:
        """Whether the model goes on with each prompt's answer, its full stop included."""
        tokenizer = self._workspace.tokenizer
        tokens = [tokenizer.encode(prompt.text, parse_special=True) for prompt in prompts]
        answers = [tokenizer.decode(a) for a in self._workspace.generate(tokens, ANSWER_TOKENS)]
        return [answer.startswith(p.answer) for answer, p in zip(answers, prompts, strict=True)]

    def figures(self, edit: WorldEdit, seed: int) -> dict[str, float]:
        """Share of right answers of each kind, as they should be after the edit."""
        asked = self._questions(edit, random.Random(seed))
        right = iter(self.right([prompt for prompts in asked.values() for prompt in prompts]))
        found = {kind: float(np.mean([next(right) for _ in ps])) for kind, ps in asked.items() if ps}
        found["negation, PP-PN"] = found["statements"] - found.pop("negated")
        return found

    def _questions(self, edit: WorldEdit, generator: random.Random) -> dict[str, list[Prompt]]:
        fact, facts = edit.fact, self._facts
        new = fact.replaced(edit.target)
        statements = new.statements()
        everything = list(facts.all_facts(hops=1))
        same = [f for f in everything if f.subject == fact.subject and f.relation != fact.relation]
        others = generator.sample([f for f in everything if f.subject != fact.subject], _OTHERS)
        wordings = [prompt for f in same for prompt in f.prompts()]
        verdicts = [new.true_or_false(), new.true_or_false(fact.object)]
        return {
            "success": statements[:1],
            "statements": statements,
            "paraphrases": [p for p in new.prompts() if p.text != statements[0].text],
            "unrelated": [f.statements()[0] for f in others],
            "same subject": generator.sample(wordings, min(_SAME, len(wordings))),
            "two hops": self._two_hops(edit),
            "negated": new.negations(),
            "fact check": [p for group in verdicts for p in group[:_VERDICTS]],
        }

    def _two_hops(self, edit: WorldEdit) -> list[Prompt]:
        document = self._facts.document
        for relation, first in _TWO_HOPS.items():
            if first == edit.fact.relation:
                second = document["employers" if relation == "work_city" else "cities"]
                return self._facts.fact(relation, edit.fact.subject).replaced(second[edit.target]).prompts()
        return []
