"""Writes docs/api.md from the code itself: ``python docs/write_api_reference.py``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, is_typeddict

from api_reference import docstring_text, http_text, proto_text

from edge_runtime import client, errors
from edge_runtime.cluster.report import ClusterReport, NodeShare, PartitionReport
from edge_runtime.daemon import config_file, status
from edge_runtime.daemon.grpc_boundary import METHOD_SCOPES
from edge_runtime.daemon.http_protocol import MAX_CONNECTIONS
from edge_runtime.daemon.metrics import Metrics
from edge_runtime.daemon.requests import Usage
from edge_runtime.error_catalog import CATALOG, INTERNAL, Answer
from edge_runtime.grpc_guard import PACKAGE

PAGE = Path(__file__).with_name("api.md")
PROTOS = Path(__file__).parent.parent / "proto" / "edge_runtime" / "v1"

_HEAD = """\
# API reference

Written by `make reference` from the code, the .proto files and their comments; a test compares them.
[The tutorial of the daemon](daemon.md) shows how to use all this.

- [Tokens and scopes](#tokens-and-scopes)
- [Errors](#errors)
- [HTTP](#http)
- [gRPC](#grpc)
- [Python client](#python-client)
- [Metrics](#metrics)
- [Settings](#settings)

## Tokens and scopes

On loopback no token is needed, unless `server.require_token` is set; a caller without one may do everything.
Beyond loopback every call needs one, and TLS. Both APIs take it as `authorization: Bearer TOKEN`. A token
that is sent is checked in any case. `admin` includes the other scopes. An address that fails too often has to
wait (`overloaded`).
"""

_ERRORS = """\
## Errors

HTTP answers `{"error": {"message", "type", "param", "code"}}`; `code` and `type` are in the table, `param`
names the parameter at fault or is null. A gRPC status carries the code in its trailing metadata as
`edgert-code`. The Python client raises the class. `overloaded` says when another try makes sense:
`Retry-After` in seconds over HTTP, `retry-after-ms` over gRPC, `retry_after` in Python. Messages are for
people and may change; codes stay.
"""

_ONLY_HTTP = {
    "invalid_request": "the body is not JSON, or the request is not HTTP",
    "method_not_allowed": "the path does not take this method",
    "not_found": "there is nothing at this path",
    "too_large": "the body is larger than `server.max_body_bytes`",
    "unsupported_media_type": "the body is not declared as `application/json`, or is compressed",
}

_HTTP = """\
## HTTP

`/v1` has the form of OpenAI's API, so that its clients work with `base_url="http://127.0.0.1:8420/v1"`.
Parameters that would change the answer and are not supported are refused, not ignored; an unknown one is
refused with the name of the nearest. A parameter that is null counts as absent.
"""

_STREAMS = """\
With `stream`, the answer comes as server-sent events: `data: ` and one JSON object each, at the end
`data: [DONE]`. An error after the beginning is the last event, `{"error": ...}`, without `[DONE]`. Closing
the connection cancels the request, streamed or not. Beside OpenAI's fields,
`usage.prompt_tokens_details.cached_tokens` says how much of the prompt was in the KV cache, and
`usage.contributions`, where the model is spread over several devices, what became of their contributions:
the fields of [ContributionCounts](#contributioncounts), of all choices together.
"""

# What the code does not say of a parameter in words. Those of sampling are told by the client's docstring.
_MEANINGS = {
    "messages": "the conversation, oldest first; 1 to 4096",
    "messages[].role": "`system` (or `developer`), `user` or `assistant`",
    "messages[].content": "text, or an array of parts of type `text`",
    "messages[].content[].type": "`text`",
    "messages[].content[].text": "follows the part before",
    "prompt": "text, an array of up to 64 texts, token ids, or an array of such arrays; one choice each",
    "input": "text, an array of up to 256 texts, token ids, or an array of such arrays; one vector each",
    "max_tokens": "tokens to generate at most; default: until the model ends or the context is full",
    "max_completion_tokens": "newer name of `max_tokens`",
    "top_logprobs": "alternatives beside each token; needs `logprobs`",
    "model": "name in the store; default: the daemon's default model",
    "seed": "the same seed and the same request give the same text; default: drawn anew",
    "stop": "text, or an array of up to 16, at which the answer ends",
    "timeout": "seconds until the request is given up; not part of OpenAI's API",
    "stream": "send the answer as it comes; default false",
    "stream_options": "needs `stream`",
    "stream_options.include_usage": "one more event at the end with `usage`; default false",
    "adapters": "which of those that are applied to answer with: an array of names, or of objects with "
    "`name` and `strength`; `[]`: none; default: all, with strength 1; not part of OpenAI's API",
    "adapters[].name": "as `edgert edits list` shows it",
    "adapters[].strength": "what its changes are multiplied by: -10 to 10, default 1",
    "subject": "the part of the prompt that the fact is about, such as `Ann Lee`",
    "target": "what the model is to go on with, such as `Oslo`",
    "paraphrases": "array of up to 32 other prompts with the subject that the same target continues",
    "name": "what to call the edit; default: `edit-` and its number",
    "force": "apply it even if it fails its checks; default false",
    "steps": "of the search at most; default: the editor's own limit",
    "encoding_format": "`float` (default) or `base64`: little-endian float32",
    "dimensions": "refused unless it is the width of the model's vectors",
    "repeat_penalty": "another name of `repetition_penalty`",
    "repeat_last_n": "another name of `penalty_window`",
}
# Those that mean something else in one of the bodies.
_OWN_MEANINGS = {
    ("/v1/chat/completions", "logprobs"): "report the log-probability of each token; default false",
    ("/v1/completions", "logprobs"): "report log-probabilities, and so many alternatives beside each token",
    ("/v1/completions", "max_tokens"): "tokens to generate at most; default: 16",
    ("/v1/edits", "prompt"): "text that the target continues, such as `Ann Lee lives in`",
    ("/v1/edits", "seconds"): "that the edit may take at most; default: no limit",
}
_ROUTES = {
    "POST /v1/chat/completions": "answers a conversation",
    "POST /v1/completions": "continues one or several prompts",
    "POST /v1/embeddings": "one vector of length 1 for each input",
    "GET /v1/models": "the models of the store",
    "GET /v1/models/{name}": "one of them",
    "GET /v1/edits": "every edit and adapter, oldest first, with what each is doing",
    "POST /v1/edits": "queues an edit and answers 202 with it; see [Personalization](#personalization)",
    "GET /v1/edits/{name}": "one of them, by name or number: the fields of [Edit](#edit)",
    "DELETE /v1/edits/{name}": "deletes one that is not applied; answers with what it was",
    "POST /v1/edits/{name}/apply": "applies one that was rejected or undone; the body is `{}`",
    "POST /v1/edits/{name}/revert": "undoes one that is applied; the body is `{}`",
    "POST /v1/edits/{name}/cancel": "ends one that waits or runs; the body is `{}`",
    "GET /healthz": "200 while the process answers",
    "GET /readyz": "200 if a token was produced lately and requests are taken, else 503 and the reason",
    "GET /metrics": "numbers for Prometheus, see [Metrics](#metrics)",
    "GET /api/status": "how the daemon fares; whose other requests are, only `admin` sees",
    "GET /": "the status page, which holds no data itself",
}

_TYPES = """\
### Values

Frozen dataclasses, unless another kind is named.
"""


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _first_line(of: object) -> str:
    text = docstring_text.parse(of).paragraphs[0]
    return text[0].lower() + text[1:].rstrip(".")


# --- scopes and errors ----------------------------------------------------------------------------


def _scopes() -> Iterator[str]:
    by_scope: dict[str, list[str]] = {}
    for method, scope in METHOD_SCOPES.items():
        by_scope.setdefault(scope or "none", []).append(method.rpartition(".")[2].replace("/", "."))
    for route in http_text.routes():
        by_scope.setdefault(route.scope or "none", []).append(_shown_path(route))
    rows = [(_code(scope) if scope != "none" else scope, ", ".join(map(_code, names)))
            for scope, names in sorted(by_scope.items())]  # fmt: skip
    yield table(("scope", "needed for"), rows)


def _errors() -> Iterator[str]:
    yield _ERRORS
    everything = {**CATALOG, errors.EdgeRuntimeError: INTERNAL}
    rows = [_error_row(kind, answer) for kind, answer in everything.items()]
    yield table(("code", "class", "HTTP", "gRPC", "type", "exit code", "meaning"), rows)
    found = http_text.codes_of_http()
    if found.keys() != _ONLY_HTTP.keys():
        raise ValueError(f"codes of HTTP: {sorted(found)} in the code, {sorted(_ONLY_HTTP)} explained here")
    yield (
        f"Over HTTP, `overloaded` is 503 where {MAX_CONNECTIONS} connections are open already. HTTP has "
        "these codes beside, of type `invalid_request_error`:\n"
    )
    yield table(
        ("code", "HTTP", "meaning"),
        [(_code(code), ", ".join(map(str, sorted(found[code]))), text) for code, text in _ONLY_HTTP.items()],
    )


def _error_row(kind: type[errors.EdgeRuntimeError], answer: Answer) -> tuple[str, ...]:
    meaning = _first_line(kind) if kind in CATALOG else "a defect; the daemon's log says more"
    codes = (_code(kind.code), _code(kind.__name__), str(answer.http), _code(answer.grpc))
    return (*codes, _code(answer.openai_type), str(kind.exit_code), meaning)


# --- HTTP -----------------------------------------------------------------------------------------


def _http() -> Iterator[str]:
    yield _HTTP
    found = [_shown_path(route) for route in http_text.routes()]
    if set(found) != set(_ROUTES):
        raise ValueError(f"routes: {found} in the code, {list(_ROUTES)} explained here")
    yield table(("request", "answer"), [(_code(one), _ROUTES[one]) for one in found])
    yield _STREAMS
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/edits"):
        yield from _parameters(path)
    yield "### GET /api/status\n"
    yield "The daemon at this moment, with `scopes`, those of the caller, beside it.\n"
    for kind in (status.Status, status.LoadedModel, status.RequestStatus):
        if kind is not status.Status:
            yield f"`{kind.__name__}`: {docstring_text.parse(kind).paragraphs[0]}\n"
        yield _fields(kind)


def _shown_path(route: http_text.Endpoint) -> str:
    return f"{route.method} {route.path.replace(':path', '')}"


def _parameters(path: str) -> Iterator[str]:
    yield f"### POST {path}\n"
    everything = http_text.parameters(path)
    used = [one for one in everything if one.use == "used"]
    yield table(
        ("parameter", "value", "meaning"), [(_code(one.name), one.type, _meaning(path, one)) for one in used]
    )
    refused: dict[str, list[str]] = {}
    for one in everything:
        if one.use.startswith("refused: "):
            refused.setdefault(one.use.removeprefix("refused: "), []).append(_code(one.name))
    if refused:
        reasons = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in refused.items())
        yield f"Refused, unless the value asks for nothing: {reasons}.\n"
    ignored = ", ".join(_code(one.name) for one in everything if one.use == "ignored")
    if ignored:
        yield f"Taken, and without effect: {ignored}.\n"


def _meaning(path: str, parameter: http_text.Parameter) -> str:
    options = docstring_text.parse(client.GenerationOptions).items("Attributes")
    own = _OWN_MEANINGS.get((path, parameter.name))
    found = own or _MEANINGS.get(parameter.name) or options.get(parameter.name)
    if found is None:
        raise ValueError(f"{path}: nothing says what {parameter.name} means")
    return found.rstrip(".")


# --- gRPC -----------------------------------------------------------------------------------------


def _grpc() -> Iterator[str]:
    files = [proto_text.read(path) for path in _protos()]
    yield "## gRPC\n"
    yield (
        f"Package `{PACKAGE}`; the files are in [proto/](../proto/edge_runtime/v1). The standard services "
        "`grpc.health.v1.Health` and `grpc.reflection.v1alpha.ServerReflection` are there as well.\n"
    )
    for file in files:
        for service in (block for block in file.blocks if block.kind == "service"):
            yield f"### {service.name}\n"
            yield f"{file.comment}\n"
            rows = [
                (_code(one.name), _linked(one.takes), _linked(one.type), one.comment)
                for one in service.members
            ]
            yield table(("method", "takes", "answers", "meaning"), rows)
        for block in file.blocks:
            if block.kind != "service":
                yield from _message(block)


def _protos() -> list[Path]:
    """The files, those first that are used most."""
    first = ("inference", "models", "personalization", "daemon")
    order = {name: place for place, name in enumerate(first)}
    return sorted(PROTOS.glob("*.proto"), key=lambda path: (order.get(path.stem, len(order)), path.stem))


def _message(block: proto_text.Block) -> Iterator[str]:
    yield f"#### {block.name}\n"
    if block.comment:
        yield f"{block.comment}\n"
    if not block.members:
        yield "It has no fields.\n"
    elif block.kind == "enum":
        yield table(("value", "meaning"), [(_code(one.name), one.comment) for one in block.members])
    else:
        for name, comment in block.choices.items():
            names = ", ".join(_code(one.name) for one in block.members if one.choice == name)
            yield f"`{name}` is one of {names}.{f' {comment}' if comment else ''}\n"
        rows = [(_code(one.name), _linked(one.type), one.comment) for one in block.members]
        yield table(("field", "type", "meaning"), rows)


def _linked(kind: str) -> str:
    label, _, name = kind.rpartition(" ")
    if not name[:1].isupper():
        return _code(kind)
    return f"{label} [{name}](#{name.lower().replace('.', '')})".strip()


# --- Python ---------------------------------------------------------------------------------------


def _python() -> Iterator[str]:
    yield "## Python client\n"
    yield "`from edge_runtime.client import Client`\n"
    yield docstring_text.parse(client).markdown() + "\n"
    for kind in (client.Client, client.Models, client.Stream, client.Edits, client.EditStream):
        yield from _class(kind)
    for counterpart in (
        client.AsyncClient,
        client.AsyncModels,
        client.AsyncStream,
        client.AsyncEdits,
        client.AsyncEditStream,
    ):
        yield from _same_for_asyncio(counterpart)
    yield _TYPES
    for name in sorted(client.__all__):
        kind = getattr(client, name)
        if dataclasses.is_dataclass(kind) or is_typeddict(kind):
            yield f"#### {name}\n"
            kind_of = "A dictionary. " if is_typeddict(kind) else ""
            yield kind_of + docstring_text.parse(kind).paragraphs[0] + "\n"
            yield _fields(kind)
        elif not inspect.isclass(kind):
            yield f"#### {name}\n"
            yield f"`{_annotation(kind)}`\n"


def _class(kind: type) -> Iterator[str]:
    yield f"### {kind.__name__}\n"
    if kind is client.Client:
        yield f"```python\n{_signature(kind.__name__, kind.__init__)}\n```\n"
    yield docstring_text.parse(kind).markdown() + "\n"
    for name, method in _methods(kind):
        yield f"#### {kind.__name__}.{name}\n"
        yield f"```python\n{_signature(name, method)}\n```\n"
        yield docstring_text.parse(method).markdown() + "\n"


def _same_for_asyncio(kind: type) -> Iterator[str]:
    """A class whose methods are documented already, under the names without ``Async``."""
    yield f"### {kind.__name__}\n"
    yield docstring_text.parse(kind).markdown() + "\n"
    yield f"As {kind.__name__.removeprefix('Async')}:\n"
    yield "```python\n" + "\n".join(_signature(name, method) for name, method in _methods(kind)) + "\n```\n"


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(kind).items():
        function = value.__func__ if isinstance(value, classmethod) else value
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function


def _signature(name: str, function: Any) -> str:
    """As the source has it, without its own object, and with short names of types."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1:]
    shown = [one.replace(annotation=_Plain(one.annotation)) for one in parameters]
    gives = signature.return_annotation
    text = str(signature.replace(parameters=shown, return_annotation=_Plain(gives)))
    text = text.removesuffix(" -> None") if function.__name__ == "__init__" else text
    if function.__name__ == "__init__":
        return name + text
    # Of an asynchronous generator the call itself is not awaited.
    return f"{'async ' if inspect.iscoroutinefunction(function) else ''}def {name}{text}"


class _Plain:
    """An annotation that is written as it is, not as a string in quotes."""

    def __init__(self, annotation: Any) -> None:
        self._text = re.sub(r"\btypes\.|Unpack\[(\w+\.)?(\w+)\]", r"\2", str(annotation))

    def __repr__(self) -> str:
        return self._text


def _fields(kind: type) -> str:
    """The fields of a dataclass or a typed dictionary; those that explain themselves have no words."""
    said = docstring_text.parse(kind).items("Attributes")
    for name, text in list(said.items()):
        own, *others = re.split(r"; (\w+): ", text)
        if set(others[::2]) <= kind.__annotations__.keys():  # "memory: ...; free: ..." tells of two
            said |= {name: own, **dict(zip(others[::2], others[1::2], strict=True))}
    unknown = said.keys() - kind.__annotations__.keys()
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(sorted(unknown))}, which its docstring explains")
    rows = [
        (_code(name), _code(_annotation(hint)), said.get(name, "").rstrip("."))
        for name, hint in kind.__annotations__.items()
    ]
    return table(("field", "type", "meaning"), rows)


def _annotation(hint: Any) -> str:
    """A type's name; of a forward reference or an alias its text."""
    text = hint if isinstance(hint, str) else getattr(hint, "__forward_arg__", str(hint))
    return text.replace("typing.", "")


# --- metrics and settings -------------------------------------------------------------------------


def _metrics() -> Iterator[str]:
    yield "## Metrics\n"
    yield (
        "`GET /metrics` has them in the text format of Prometheus. A histogram has `_bucket`, `_sum` and "
        "`_count`.\n"
    )
    page = _example_of_metrics()
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", page, re.MULTILINE))
    rows = []
    for name, meaning in re.findall(r"^# HELP (\w+) (.*)$", page, re.MULTILINE):
        found = re.search(rf"^{name}\{{(.*)\}} ", page, re.MULTILINE)
        labels = re.findall(r'(\w+)="', found[1]) if found else []
        rows.append((_code(name), kinds[name], ", ".join(map(_code, labels)), meaning))
    yield table(("name", "type", "labels", "meaning"), rows)


def _example_of_metrics() -> str:
    """The page of a daemon that has spread a model over two devices, and has answered a request."""
    model = status.LoadedModel("", 0, "", 0, 0, 0, 0, 0)
    node = NodeShare("", 0, 0.0, 0, 0)
    spread = _filled(PartitionReport, nodes=(node, node), tokens=1)
    cluster = _filled(ClusterReport, models=(spread,))
    now = _filled(status.Status, models=(model,), temperature=0.0, cluster=cluster)
    metrics = Metrics()
    metrics.finished("stop", Usage("stop", 0, 0, 0, 0, 0.0, 0.0, 0.0))
    return metrics.render(now)[0].decode()


def _filled(kind: type[Any], **values: Any) -> Any:
    return kind(**{field.name: _nothing(field) for field in dataclasses.fields(kind)} | values)


def _nothing(field: dataclasses.Field[Any]) -> Any:
    by_type = {"str": "", "bool": False, "int": 0, "float": 0.0, "dict[str, int]": {}}
    return by_type.get(str(field.type), ())


def _settings() -> Iterator[str]:
    yield "## Settings\n"
    yield (
        "In `edgert.toml` of the home folder, else `/etc/edgert/edgert.toml`; `edgert config path` says "
        "which. Above the file stand the variables, above these the options of `edgert serve`. "
        "`EDGERT_MODEL` is short for `EDGERT_MODEL_DEFAULT`, `EDGERT_THREADS` for `EDGERT_MODEL_THREADS`.\n"
    )
    rows = [
        (_code(known.key), _code(config_file.toml_value(known.default)), known.needed, known.explanation)
        for known in config_file.SETTINGS.values()
    ]
    yield table(("key", "default", "value", "meaning"), rows)
    example = next(iter(config_file.SETTINGS.values()))
    yield f"The variable of `{example.key}` is `{example.variable}`, and so on.\n"


def reference() -> str:
    """The page."""
    parts = [_HEAD, *_scopes(), *_errors(), *_http(), *_grpc(), *_python(), *_metrics(), *_settings()]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
