"""Asking a model: prompts about names, in its own sentences, and the first sentence of its answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from edge_runtime.engine.chat_prompt import chat_prompt
from edge_runtime.engine.chat_template import ChatTemplate
from edge_runtime.errors import ContextOverflowError
from edge_runtime.personalize.request import find_name
from edge_runtime.personalize.templates import Template
from edge_runtime.personalize.workspace import Workspace

ANSWER_TOKENS = 16
_PLAUSIBLE = 3.0  # nats by which a name may surprise more in a template than those that the model wrote there
_CLAIM_END = re.compile(r"[.!?](?=\s|$)|\n|$")
_QUESTION = re.compile(r"[^.:!?]*\?")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to be answered.

    Attributes:
        origin: request, paraphrase, template or chat.
        template: that it fills, if any.
    """

    text: str
    tokens: tuple[int, ...]
    origin: str
    template: Template | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """The first sentence of an answer, and what ended it: empty where the answer just stopped."""

    text: str
    end: str

    def replaced(self, old: str, new: str) -> str | None:
        """The claim, with its end, with another object in it; None if it does not end with the old one."""
        stem = self.text[: len(self.text) - len(old)]
        if not old or not self.text.endswith(old) or (stem and stem[-1].isalnum()):
            return None
        return stem + new + self.end


def first_claim(answer: str) -> Claim:
    """The first sentence of what the model said."""
    found = _CLAIM_END.search(answer)
    assert found is not None  # the end of the text always matches
    return Claim(answer[: found.start()], found.group().strip())


class Asker:
    """Asks the model of a workspace.

    Args:
        templates: sentences that it uses.
        usual: how surprising each is to it with the names it wrote them about, in nats.
    """

    def __init__(
        self,
        workspace: Workspace,
        templates: Sequence[Template],
        usual: Sequence[float],
        chat_template: ChatTemplate | None,
    ) -> None:
        self.workspace = workspace
        self.templates = templates
        self._usual = usual
        self._tokenizer = workspace.tokenizer
        self._chat_template = chat_template
        self._longest = workspace.hyperparameters.n_ctx_train - ANSWER_TOKENS

    def answers(self, prompts: Sequence[Prompt]) -> list[Claim]:
        """What the model says to each, as likely as can be."""
        found = self.workspace.generate([prompt.tokens for prompt in prompts], ANSWER_TOKENS)
        return [first_claim(self._tokenizer.decode(tokens)) for tokens in found]

    def plain(self, text: str, origin: str, template: Template | None = None) -> Prompt:
        """A text to be continued.

        Raises:
            ContextOverflowError: it leaves no room for an answer.
        """
        tokens = self._tokenizer.encode(text)
        if len(tokens) > self._longest:
            raise ContextOverflowError(
                f"{text[:60]!r}... has {len(tokens)} tokens; with an answer of {ANSWER_TOKENS} that is more "
                f"than the {self.workspace.hyperparameters.n_ctx_train} that the model was trained for: "
                "give the sentence with the fact alone"
            )
        return Prompt(text, tuple(tokens), origin, template)

    def fits(self, text: str) -> bool:
        """Whether a text leaves room for an answer."""
        return len(self._tokenizer.encode(text)) <= self._longest

    def about(self, name: str, chosen: Sequence[Template]) -> list[Prompt]:
        """The prompts of some templates about a name, questions also in a chat."""
        filled = [(template.about(name), template) for template in chosen]
        prompts = [self.plain(text, "template", template) for text, template in filled if self.fits(text)]
        asked = set()
        for prompt in list(prompts):
            question = _QUESTION.search(prompt.text)
            if question is None or self._chat_template is None:
                continue
            text = question.group().strip()
            if text not in asked and find_name(text, name):
                asked.add(text)
                prompts.append(self.chat(text, prompt.template))
        return prompts

    def chat(self, text: str, template: Template | None = None) -> Prompt:
        """A question in a chat, for a model that has a chat template."""
        assert self._chat_template is not None
        tokens = chat_prompt(self._chat_template, self._tokenizer, [{"role": "user", "content": text}])
        return Prompt(text, tuple(tokens), "chat", template)

    def plausible(self, name: str) -> list[Template]:
        """Templates that the model could have written about this name."""
        texts = [self._tokenizer.encode(template.about(name)) for template in self.templates]
        surprise = self.workspace.surprise(texts)
        return [
            template
            for template, found, usual in zip(self.templates, surprise, self._usual, strict=True)
            if found - usual < _PLAUSIBLE
        ]
