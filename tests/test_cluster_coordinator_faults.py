"""Whatever workers and the network do, an exact generation goes on and gives what one device gives."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cluster_fixture import Clear, Spread, plan_of, spread
from dataplane_fixture import Floats, Relay

from edge_runtime.cluster.contributions import Contributions
from edge_runtime.cluster.exchange import RefusalReason, RefusedError
from edge_runtime.cluster.udp_worker import UdpWorker
from edge_runtime.cluster.worker_session import Request, WorkerSession

TOKENS = 96
THIRDS = (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def spreading(demo_model: Path) -> Iterator[Spread]:
    with spread(demo_model) as made:
        yield made


def generate(made: Spread, clear: Clear, count: int = TOKENS) -> Contributions:
    request = Contributions()
    assert made.greedy([clear.prompt], count, [request]) == [clear.tokens[:count]]
    return request


def account(request: Contributions) -> float:
    return request.on_time + sum(request.late) + request.lost + request.recomputed
