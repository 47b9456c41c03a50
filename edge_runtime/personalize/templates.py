"""Sentences that a model itself uses, with the name they are about left open.

A model that is asked for nothing writes what it has learnt, about many names: "Ann Lee works for", "Question:
Where does Bo Day live? Answer:". The same words around two different names are a template. Filled with the
subject of an edit, they are paraphrases of it, or sentences about other things that must stay true, and the
model's own answer tells which. Nothing but the model is needed for that, and it costs forward passes once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.errors import UnsupportedModelError
from edge_runtime.personalize.request import replace_name
from edge_runtime.personalize.workspace import Workspace

SLOT = "{}"

# A name: words that begin with a capital, side by side.
_NAME = re.compile(r"[A-Z][\w'-]*(?: [A-Z][\w'-]*)*")
_SENTENCE_END = re.compile(r"[.!](?=\s|$)")
_ANSWER = re.compile(r"(?:(?: [A-Z][\w'-]*)+| \S+)$")
_MAX_SAMPLE_TOKENS = 24
_FILLERS = 2  # names that a template must have been seen with


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt about somebody, and whom the model wrote it about.

    Attributes:
        text: with SLOT where the name belongs.
        sightings: (name, what the model went on with), each as it was written.
    """

    text: str
    sightings: tuple[tuple[str, str], ...]

    def about(self, name: str) -> str:
        """The prompt about this name."""
        return self.text.replace(SLOT, name)


def write_texts(workspace: Workspace, generator: np.random.Generator, count: int) -> list[str]:
    """Texts that the model writes from nothing, as likely as it finds them.

    Raises:
        UnsupportedModelError: no token stands between two texts.
    """
    tokenizer = workspace.tokenizer
    # Qwen's models put nothing before a text, but saw texts one after the other, with this token between.
    between = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
    start = tokenizer.encode("") or ([] if between is None else [between])
    if not start:
        raise UnsupportedModelError("the model's vocabulary has no token that begins or ends a text")
    sampled = workspace.generate([start] * count, _MAX_SAMPLE_TOKENS, temperature=1.0, generator=generator)
    return [tokenizer.decode(tokens).strip() for tokens in sampled]


def find_templates(texts: Iterable[str]) -> list[Template]:
    """The templates of some texts, those seen most often first."""
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for text in texts:
        end = _SENTENCE_END.search(text)
        answer = _ANSWER.search(text[: end.start()]) if end else None
        if answer is None or SLOT in text:
            continue
        prompt = text[: answer.start()]
        for name in {match.group() for match in _NAME.finditer(prompt)}:
            found[replace_name(prompt, name, SLOT)].add((name, answer.group().strip()))
    templates = [Template(text, tuple(sorted(seen))) for text, seen in found.items()]
    varied = [t for t in templates if len({name for name, _ in t.sightings}) >= _FILLERS]
    return sorted(varied, key=lambda template: (-len(template.sightings), template.text))


def usual_surprise(workspace: Workspace, templates: Sequence[Template], examples: int = 3) -> list[float]:
    """How surprising, in nats, each template is to the model with names that it wrote it about; medians."""
    texts = [
        [t.about(name) for name in sorted({name for name, _ in t.sightings})[:examples]] for t in templates
    ]
    flat = [workspace.tokenizer.encode(text) for group in texts for text in group]
    values = iter(workspace.surprise(flat))
    return [float(np.median([next(values) for _ in group])) for group in texts]
