"""Answers that other devices had a part in, of a real daemon that computes alone."""

from __future__ import annotations

import pytest

from edge_runtime.daemon.answer import Answer
from edge_runtime.daemon.requests import Chunk, ContributionCounts, GenerationRequest, Usage
from edge_runtime.daemon.service import Service

COUNTS = ContributionCounts(on_time=87.0, late=(9.5, 2.5), lost=0.25, recomputed=0.75, fell_back=True)


def answers_with(
    counts: ContributionCounts, service: Service, monkeypatch: pytest.MonkeyPatch
) -> list[GenerationRequest]:
    """Every answer of the service has these counts from now on.

    Returns:
        the requests, as the interfaces hand them to the service; they are added as they come.
    """
    asked: list[GenerationRequest] = []

    async def generate(request: GenerationRequest) -> Answer:
        asked.append(request)
        answer = Answer("demo", 5, lambda: None)
        answer.put(Chunk("Lindwell.", (3, 4)))
        answer.finish(Usage("stop", 1, 5, 2, 2, 0.1, 0.2, 0.3, counts))
        return answer

    monkeypatch.setattr(service, "generate", generate)
    return asked
