"""Edits' messages to values and back, for both clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

from edge_runtime.client.adapter_files import adapter_files, form_of
from edge_runtime.client.types import AdapterFormat, EditEvaluation, EditOptions, PrepareProgress
from edge_runtime.client.wire import built
from edge_runtime.errors import RequestError
from edge_runtime.personalize.edit_report import (
    Edit,
    EditCheck,
    EditKind,
    EditProgress,
    EditReport,
    EditStage,
    EditState,
    Fact,
    Query,
)
from edge_runtime.v1 import personalization_pb2 as pb

_KINDS: dict[int, EditKind] = {
    pb.EDIT_KIND_EDIT: "edit",
    pb.EDIT_KIND_FORGET: "forget",
    pb.EDIT_KIND_LORA: "lora",
}
_STATES: dict[int, EditState] = {
    pb.EDIT_STATE_QUEUED: "queued",
    pb.EDIT_STATE_RUNNING: "running",
    pb.EDIT_STATE_APPLIED: "applied",
    pb.EDIT_STATE_REJECTED: "rejected",
    pb.EDIT_STATE_REVERTED: "reverted",
    pb.EDIT_STATE_FAILED: "failed",
}
_STAGES: dict[int, EditStage] = {
    pb.EDIT_STAGE_PREPARING: "preparing",
    pb.EDIT_STAGE_SEARCHING: "searching",
    pb.EDIT_STAGE_SOLVING: "solving",
    pb.EDIT_STAGE_CHECKING: "checking",
}
_FORMATS = {"gguf": pb.ADAPTER_FORMAT_GGUF, "peft": pb.ADAPTER_FORMAT_PEFT}
_PIECE_BYTES = 1 << 18


# --- to messages ------------------------------------------------------------------------------


def apply_request(
    prompt: str, subject: str, target: str, paraphrases: Sequence[str], options: EditOptions
) -> pb.ApplyRequest:
    """A request for an edit.

    Raises:
        RequestError: a value that its field cannot hold.
        TypeError: an option that there is not.
    """
    if isinstance(paraphrases, str):
        raise RequestError("paraphrases is one text; give a list of them")
    message = built(
        pb.ApplyRequest,
        prompt=prompt,
        subject=subject,
        target=target,
        paraphrases=list(paraphrases),
        **_options(options),
    )
    return cast(pb.ApplyRequest, message)


def forget_request(
    queries: Iterable[tuple[str, str]], refusal: str | None, options: EditOptions
) -> pb.ForgetRequest:
    """A request for a forgetting.

    Raises:
        RequestError: a value that its field cannot hold, or queries that are no pairs.
        TypeError: an option that there is not.
    """
    parts = []
    for query in queries:
        if isinstance(query, str) or len(query) != 2:
            raise RequestError("a query needs a prompt and the subject in it: (prompt, subject)")
        parts.append(built(pb.ForgetQuery, prompt=query[0], subject=query[1]))
    message = built(pb.ForgetRequest, queries=parts, refusal=refusal, **_options(options))
    return cast(pb.ForgetRequest, message)


def _options(options: EditOptions) -> EditOptions:
    unknown = sorted(set(options) - set(EditOptions.__annotations__))
    if unknown:
        known = ", ".join(sorted(EditOptions.__annotations__))
        raise TypeError(f"no such option: {', '.join(unknown)}; there are {known}")
    return options


def import_requests(
    path: Path, name: str, model: str, form: AdapterFormat | None
) -> Iterator[pb.ImportRequest]:
    """An adapter's files as messages.

    Args:
        path: a GGUF file, or a folder with PEFT's two.
        form: None: what the path looks like.

    Raises:
        AdapterFileError: a file is missing.
    """
    files = adapter_files(path, form)  # here, not when the first message is sent: gRPC would hide the error
    header = built(pb.ImportHeader, name=name, model=model, format=_FORMATS[form_of(path, form)])

    def messages() -> Iterator[pb.ImportRequest]:
        yield pb.ImportRequest(header=header)
        for called, file in files.items():
            with file.open("rb") as content:
                begins = called
                while (piece := content.read(_PIECE_BYTES)) or begins:
                    yield pb.ImportRequest(file=begins, content=piece)
                    begins = ""

    return messages()


def export_request(names: Sequence[str], path: Path, form: AdapterFormat | None) -> pb.ExportRequest:
    """A request for adapters as files."""
    chosen = _FORMATS[form_of(path, form)]
    return cast(pb.ExportRequest, built(pb.ExportRequest, names=names, format=chosen))


# --- from messages ----------------------------------------------------------------------------


def edit(message: pb.Edit) -> Edit:
    """An edit or an adapter."""
    fact, forgotten = message.fact, message.forgotten
    return Edit(
        id=message.id,
        name=message.name,
        model=message.model,
        kind=_KINDS.get(message.kind, "edit"),
        state=_STATES.get(message.state, "queued"),
        created=message.created,
        changed=message.changed,
        error=message.error,
        fact=Fact(fact.prompt, fact.subject, fact.target, tuple(fact.paraphrases))
        if message.HasField("fact")
        else None,
        queries=tuple(Query(one.prompt, one.subject) for one in forgotten.queries),
        refusal=forgotten.refusal,
        report=_report(message.report) if message.HasField("report") else None,
    )


def edits(message: pb.ListEditsResponse) -> tuple[Edit, ...]:
    """All of them."""
    return tuple(edit(one) for one in message.edits)


def _report(message: pb.EditReport) -> EditReport:
    return EditReport(
        checks=tuple(check(one) for one in message.checks),
        reasons=tuple(message.reasons),
        steps=message.steps,
        rows=message.rows,
        seconds=message.seconds,
        loss=message.loss,
        layer=message.layer,
        say_contexts=message.say_contexts,
        keep_contexts=message.keep_contexts,
        memory_bytes=message.memory_bytes,
    )


def check(message: pb.EditCheck) -> EditCheck:
    """One thing that was tested."""
    return EditCheck(
        name=message.name,
        before=message.before if message.HasField("before") else None,
        after=message.after if message.HasField("after") else None,
        needed=message.needed if message.HasField("needed") else None,
        passed=message.passed,
        asked=message.asked,
    )


def progress(message: pb.ApplyProgress) -> EditProgress:
    """A moment of an edit."""
    step = message.step
    return EditProgress(
        stage=_STAGES.get(step.stage, "waiting"),
        behind=tuple(message.behind),
        step=step.step,
        steps=step.steps,
        loss=step.loss,
        probability=step.probability,
        rows=step.rows,
        seconds=step.seconds,
    )


def evaluation(message: pb.EvaluateResponse) -> EditEvaluation:
    """What an edit's checks found."""
    return EditEvaluation(message.name, tuple(check(one) for one in message.checks))


def prepare_progress(message: pb.PrepareModelResponse) -> PrepareProgress:
    """How far a model's preparation is."""
    return PrepareProgress(message.share, message.layer if message.HasField("layer") else None)
