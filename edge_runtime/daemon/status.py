"""What the daemon says about itself: to the status page, to ``edgert ps``, to the metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from edge_runtime.cluster.report import ClusterReport

RequestState = Literal["queued", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        name: in the store.
        parameters: number of weights.
        quantization: the type that most weights have.
        context: tokens a request may have.
        sequences: requests computed together.
        threads: CPU threads.
        weight_bytes, kv_bytes: memory for weights (repacked or mapped) and for a full KV cache.
    """

    name: str
    parameters: int
    quantization: str
    context: int
    sequences: int
    threads: int
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """A request that waits or runs. Its text is not part of this.

    Attributes:
        seconds: since it arrived.
    """

    id: str
    client: str
    model: str
    state: RequestState
    prompt_tokens: int
    generated_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Status:
    """The daemon at one moment.

    Attributes:
        started: seconds since the epoch.
        ready, reason: whether a token was produced lately, and if not, why not.
        stopping: it finishes what runs and takes nothing new.
        requests: oldest first.
        queue_limit: requests that may wait.
        finished: outcome (``stop``, ``length``, ``cancelled`` or an error code) -> number of requests.
        prompt_tokens, generated_tokens: since the start.
        speed: tokens generated in each of the last 120 seconds, oldest first; the current one is left out.
        memory_bytes: resident memory of the daemon; memory_available_bytes: free on the device.
        temperature: of the processor in degrees Celsius; None where the device does not tell.
        cpu_percent: of all cores, since the last status.
        cluster: None where this device belongs to none.
        adapters: that are applied to the models in memory: model, name and kind of each.
    """

    version: str
    pid: int
    started: float
    ready: bool
    reason: str
    stopping: bool
    default_model: str
    models: tuple[LoadedModel, ...]
    requests: tuple[RequestStatus, ...]
    queue_limit: int
    finished: dict[str, int]
    prompt_tokens: int
    generated_tokens: int
    speed: tuple[int, ...]
    memory_bytes: int
    memory_available_bytes: int
    temperature: float | None
    cpu_percent: float
    cluster: ClusterReport | None = None
    adapters: tuple[dict[str, Any], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
