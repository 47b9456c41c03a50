"""Settings of the daemon: one TOML file, above it the environment, above that the command line.

Reading them is :mod:`edge_runtime.daemon.config_file`'s subject.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["plain", "address", "path"]


def setting(
    default: Any,
    explanation: str,
    *,
    least: float | None = None,
    most: float | None = None,
    kind: Kind = "plain",
    empty: bool = False,
) -> Any:
    """A field with its explanation, which ``edgert config show --explain`` prints, and its limits.

    Args:
        least, most: of a number, both included.
        kind: of a text: an ``address`` is HOST:PORT; a ``path`` in a file is seen from that file's folder.
        empty: whether a text may be empty.
    """
    metadata = {"explanation": explanation, "least": least, "most": most, "kind": kind, "empty": empty}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where the daemon listens, and whom it answers."""

    http: str = setting(
        "127.0.0.1:8420",
        "address and port of the HTTP API and the status page; empty: none",
        kind="address",
        empty=True,
    )
    grpc: str = setting(
        "127.0.0.1:8421", "address and port of the gRPC API; empty: none", kind="address", empty=True
    )
    tls_certificate: str = setting(
        "", "PEM file of the server's certificate; needed beyond loopback", kind="path", empty=True
    )
    tls_key: str = setting("", "PEM file of its private key", kind="path", empty=True)
    require_token: bool = setting(
        False, "ask for a token on loopback too; beyond loopback it always is asked for"
    )
    shutdown_seconds: float = setting(
        20.0, "how long running requests may go on after SIGTERM", least=0, most=3600
    )
    max_body_bytes: int = setting(
        4 << 20, "largest HTTP body and gRPC message taken", least=1 << 10, most=1 << 30
    )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which model answers, and how it is loaded."""

    default: str = setting("demo", "model for requests that name none: of the store, or a GGUF file")
    preload: bool = setting(True, "load the default model at the start instead of with the first request")
    threads: int = setting(
        0, "CPU threads; 0: the physical cores, or one for a model below 32 MiB", least=0, most=512
    )
    context: int = setting(
        0,
        "tokens a request may have, prompt and answer; 0: the model's own, at most 4096",
        least=0,
        most=1 << 20,
    )
    sequences: int = setting(
        4, "requests computed together; each takes memory for its context", least=1, most=256
    )
    weights: Literal["repack", "mmap"] = setting(
        "repack", "repack: copied to the fastest layout; mmap: left in the file, for little memory"
    )
    kv_type: Literal["f16", "f32", "q8_0"] = setting("f16", "how keys and values are kept")
    max_loaded: int = setting(
        1, "models in memory at once; the one unused the longest gives way", least=1, most=64
    )


@dataclass(frozen=True, slots=True)
class SchedulingConfig:
    """How requests share the machine."""

    queue: int = setting(32, "requests that may wait; further ones are refused", least=1, most=10_000)
    prefill_chunk: int = setting(
        64, "prompt tokens computed between two tokens of running answers", least=1, most=4096
    )
    request_seconds: float = setting(
        600.0, "longest time a request may take, waiting included", least=0.1, most=86_400
    )
    ready_seconds: float = setting(
        60.0, "/readyz is green if a token was produced within this time", least=1, most=86_400
    )


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What is written down. Prompts and answers never are."""

    format: Literal["human", "json"] = setting("human", "one line of text, or one JSON object, an event")
    level: Literal["debug", "info", "warning", "error"] = setting("info", "least important events written")
    file: str = setting(
        "", "file that is written and rotated; empty: standard error", kind="path", empty=True
    )


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """This device's part in a cluster; without effect until it joined one."""

    listen: str = setting(
        "0.0.0.0:8422",
        "address and port for other members, and the same port for datagrams; mutual TLS, members only",
        kind="address",
    )
    address: str = setting(
        "", "HOST:PORT told to other members; empty: the address that they see", kind="address", empty=True
    )
    peers: str = setting(
        "", "HOST:PORT of members to look for, separated by commas; usually they are known", empty=True
    )
    discovery: bool = setting(False, "look for members by mDNS; needs the extra `discovery`")
    lend_memory_mb: int = setting(
        1024, "memory for weights of other members' models; 0: works for nobody", least=0, most=1 << 24
    )
    memory_mb: int = setting(
        0, "most memory for weights of this device's own models; 0: what is free", least=0, most=1 << 24
    )
    threads: int = setting(0, "CPU threads for other members; 0: the physical cores", least=0, most=512)
    transport: Literal["auto", "udp", "grpc"] = setting(
        "auto", "how single tokens travel; auto: datagrams where they get through"
    )
    mode: Literal["exact", "relaxed"] = setting(
        "exact",
        "for requests that do not say. exact: every contribution is waited for; relaxed: late ones are added "
        "when they come, as far as `quality` allows",
    )
    quality: float = setting(
        0.99, "of relaxed requests: 0.99 allows a perplexity 1 % worse", least=0.5, most=1
    )


@dataclass(frozen=True, slots=True)
class Config:
    """All settings."""

    server: ServerConfig = field(default_factory=ServerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    scheduling: SchedulingConfig = field(default_factory=SchedulingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    log: LogConfig = field(default_factory=LogConfig)
