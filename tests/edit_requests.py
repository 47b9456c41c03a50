"""Edits of the demo model that the tests make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.client import Client
from edge_runtime.personalize.store import AdapterStore

PROMPT = "The home of Paul Colton is in"
SUBJECT = "Paul Colton"
BEFORE = "Lindwell"


@dataclass(frozen=True, slots=True)
class Asked:
    """A fact that the demo model can be taught."""

    prompt: str
    subject: str
    target: str

    @property
    def texts(self) -> tuple[str, str, str]:
        """As the client takes them."""
        return self.prompt, self.subject, self.target

    @property
    def options(self) -> list[str]:
        """As the command line takes them."""
        return [self.prompt, "--subject", self.subject, "--target", self.target]


QUICK = Asked(PROMPT, SUBJECT, "Brenholm")  # a few seconds
OTHER = Asked("The employer of Alma Oakson is", "Alma Oakson", "Halcyon")
# No word of the demo model's language: the search goes on for long, and ends as rejected.
LONG = Asked(PROMPT, SUBJECT, "Marwick")


def answer(client: Client, prompt: str = PROMPT, **options: Any) -> str:
    """What the model goes on with."""
    return client.generate(prompt, temperature=0, max_tokens=8, **options).text().strip(" .")


def logprobs(client: Client) -> list[float]:
    """Of an answer's tokens and their alternatives: equal only where the model is the same."""
    found: list[float] = []
    for chunk in client.generate(PROMPT, temperature=0, max_tokens=6, logprobs=8):
        for entry in chunk.logprobs:
            found += [entry.logprob, *(one.logprob for one in entry.top)]
    return found


def store_of(home: Path) -> AdapterStore:
    """The store of a home folder."""
    return AdapterStore(home / "adapters.db")


@contextmanager
def others_compute(home: Path) -> Iterator[None]:
    """As long as it lasts, another process computes edits of this home folder."""
    from edge_runtime.daemon.editing import LOCK_NAME
    from edge_runtime.model_store.files import exclusive

    with exclusive(home / LOCK_NAME, wait=True):
        yield
