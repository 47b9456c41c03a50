"""The running daemon, for the verbs that talk to it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edge_runtime.errors import EdgeRuntimeError, ModelNotFoundError, UnauthenticatedError, UnavailableError

if TYPE_CHECKING:
    from edge_runtime.client import Client, ContributionCounts, Mode, ModelDescription, Stream
    from edge_runtime.daemon.runtime_file import RunningDaemon
    from edge_runtime.engine.sampling import SamplingParameters

_SECONDS = 10.0  # a daemon on a busy small board answers within this
_OF_LOADING = ("threads", "context", "weights")  # options that say nothing to a model that is loaded
_USUAL_CONTEXT = 4096  # what the daemon gives a model at most unless its settings say otherwise

local_option = click.option(
    "--local", is_flag=True, help="Load the model here, even if a daemon runs that could answer."
)


def running_daemon() -> RunningDaemon | None:
    """The daemon of this user's home folder, else the system's; None where none runs."""
    from edge_runtime.daemon.runtime_file import find
    from edge_runtime.model_store.paths import home

    return find(home())


def needed_daemon() -> RunningDaemon:
    """As :func:`running_daemon`.

    Raises:
        UnavailableError: none runs.
    """
    found = running_daemon()
    if found is None:
        from edge_runtime.model_store.paths import home

        raise UnavailableError(f"no daemon runs for {home()}; `edgert serve` starts one")
    return found


def daemon_for(context: click.Context) -> RemoteEngine | None:
    """The running daemon in an engine's place, if it can do what this command line asks; see `client_for`.

    Raises:
        EdgeRuntimeError: the daemon refuses, or does not answer.
    """
    found = client_for(context)
    if found is None:
        return None
    client, model, description = found
    return RemoteEngine(client, model, description, context.params["mode"], context.params["quality"])


def client_for(context: click.Context) -> tuple[Client, str, ModelDescription] | None:
    """The running daemon, if it can do what this command line asks, and the model that it is asked for.

    None where no daemon runs, with ``--local``, with options that only make sense when a model is loaded, and
    where the model is a file or one that only this user's store has. The model's name is empty where the
    command line names none: it is the daemon's own default then.

    Raises:
        EdgeRuntimeError: the daemon refuses, or does not answer.
    """
    asked = context.params
    sources = {name: context.get_parameter_source(name) for name in asked}
    if asked["local"] or any(sources.get(name) is ParameterSource.COMMANDLINE for name in _OF_LOADING):
        return None
    # Without a wish it is the daemon's own model that answers: it is in memory.
    model = "" if sources["model"] is ParameterSource.DEFAULT else str(asked["model"])
    if os.sep in model or model.lower().endswith(".gguf"):
        return None
    running = running_daemon()
    if running is None or not running.grpc:
        return None
    from edge_runtime.client import Client

    client = Client.local()
    try:
        return client, model, client.models.describe(model)
    except ModelNotFoundError:
        client.close()
        if not model:
            raise
        return None  # loading it here finds it, or says what there is
    except BaseException:
        client.close()
        raise


class RemoteEngine:
    """The daemon in an engine's place.

    Args:
        client: closed with this.
        model: name in the daemon's store; empty for its default.
        description: of this model.
        mode, quality: of every answer; None for the daemon's settings.

    Attributes:
        chat_template: something, where the model has one, else None; what it is only the daemon needs.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        description: ModelDescription,
        mode: Mode | None = None,
        quality: float | None = None,
    ) -> None:
        self._client = client
        self._model = model
        self._mode = mode
        self._quality = quality
        self._context: int | None = None
        self._trained = description.context
        self.chat_template: object | None = True if description.chat_template else None

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    @property
    def context(self) -> int:
        """Tokens a request may have; a guess until the model is in the daemon's memory."""
        if self._context is None:
            status = self._client.status()
            name = self._model or status.default_model
            self._context = next((one.context for one in status.models if one.name == name), None)
        return self._context or min(self._trained, _USUAL_CONTEXT)

    @property
    def title(self) -> str:
        """The model and who runs it, for people."""
        return f"{self._model or self._client.status().default_model} of the running daemon"

    def generate(
        self,
        prompt: str,
        *,
        sampling: SamplingParameters,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        adapters: Mapping[str, float] | None = None,
    ) -> RemoteAnswer:
        """Continue a prompt, as the engine does.

        Raises:
            EdgeRuntimeError: the daemon refuses.
        """
        options = self._options(sampling, max_tokens, stop, adapters)
        return RemoteAnswer(self._client.generate(prompt, **options))

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        sampling: SamplingParameters,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        adapters: Mapping[str, float] | None = None,
    ) -> RemoteAnswer:
        """Answer a conversation, as the engine does.

        Raises:
            EdgeRuntimeError: the daemon refuses.
        """
        turns: Any = [dict(message) for message in messages]
        options = self._options(sampling, max_tokens, stop, adapters)
        return RemoteAnswer(self._client.chat(turns, **options))

    def _options(
        self,
        sampling: SamplingParameters,
        max_tokens: int | None,
        stop: Sequence[str],
        adapters: Mapping[str, float] | None,
    ) -> Any:
        return {
            "model": self._model,
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": sampling.seed,
            "stop": tuple(stop),
            "mode": self._mode,
            "quality": self._quality,
            "adapters": adapters,
        }


class RemoteAnswer:
    """An answer of the daemon, with what the engine's own answers tell.

    Counts and times are those of the end; before it they are 0. A stream that was closed has no end.
    """

    origin = "answered by the daemon"

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._tokens = 0
        self.model = stream.model
        self.prompt_tokens = stream.prompt_tokens

    def __iter__(self) -> Iterator[Any]:
        for chunk in self._stream:
            self._tokens += len(chunk.tokens)
            yield chunk

    def close(self) -> None:
        """Stop it; the daemon frees its place."""
        self._stream.close()

    @property
    def finish_reason(self) -> str | None:
        """``stop`` or ``length``; None before the end."""
        return self._stream.usage.finish_reason if self._stream.usage else None

    @property
    def seed(self) -> int:
        """Of the random draws."""
        return self._stream.usage.seed if self._stream.usage else 0

    @property
    def reused_tokens(self) -> int:
        """Of the prompt, that were in the daemon's KV cache already."""
        return self._stream.usage.reused_tokens if self._stream.usage else 0

    @property
    def generated_tokens(self) -> int:
        """So far."""
        return self._stream.usage.generated_tokens if self._stream.usage else self._tokens

    @property
    def prefill_seconds(self) -> float:
        """Until the first token, without waiting in the queue."""
        return self._stream.usage.prefill_seconds if self._stream.usage else 0.0

    @property
    def decode_seconds(self) -> float:
        """After it."""
        return self._stream.usage.decode_seconds if self._stream.usage else 0.0

    @property
    def contributions(self) -> ContributionCounts | None:
        """Of the daemon's other devices; None before the end, and where it computed alone."""
        return self._stream.usage.contributions if self._stream.usage else None


def fetch_status(running: RunningDaemon) -> dict[str, Any]:
    """How the daemon fares, as ``/api/status`` tells it.

    Raises:
        UnavailableError: it cannot be reached. UnauthenticatedError: it wants a token that this user lacks.
    """
    if not running.http:
        return _status_over_grpc()
    import json
    import urllib.error
    import urllib.request

    request = urllib.request.Request(f"{running.url}/api/status")
    token = _own_token()
    if token:
        request.add_header("authorization", f"Bearer {token}")
    # Without the proxies of the environment: the daemon is on this device.
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if running.tls:
        import ssl

        context = ssl.create_default_context(cafile=running.ca or None)
        handlers.append(urllib.request.HTTPSHandler(context=context))
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(error.code, running) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise UnavailableError(f"the daemon at {running.url} does not answer: {why}") from error


def _own_token() -> str:
    from edge_runtime.model_store.paths import home

    try:
        return (home() / "token").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _refusal(code: int, running: RunningDaemon) -> EdgeRuntimeError:
    if code in (401, 403):
        return UnauthenticatedError(
            f"the daemon (process {running.pid}) wants a token, and this user has none that it takes; run "
            "this as the daemon's user"
        )
    return UnavailableError(
        f"the daemon at {running.url} answers with HTTP {code}; `edgert logs` may say why"
    )


def _status_over_grpc() -> dict[str, Any]:
    from dataclasses import asdict

    from edge_runtime.client import Client

    with Client.local(_SECONDS) as client:
        return asdict(client.status())
