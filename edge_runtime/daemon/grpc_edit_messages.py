"""Edits as messages of the gRPC API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_runtime.personalize.edit_report import Edit, EditCheck, EditReport, edit_of
from edge_runtime.v1 import personalization_pb2 as pb

if TYPE_CHECKING:
    from edge_runtime.personalize.progress import Progress
    from edge_runtime.personalize.records import Record

_KINDS = {"edit": pb.EDIT_KIND_EDIT, "forget": pb.EDIT_KIND_FORGET, "lora": pb.EDIT_KIND_LORA}
_STATES = {
    "queued": pb.EDIT_STATE_QUEUED,
    "running": pb.EDIT_STATE_RUNNING,
    "applied": pb.EDIT_STATE_APPLIED,
    "rejected": pb.EDIT_STATE_REJECTED,
    "reverted": pb.EDIT_STATE_REVERTED,
    "failed": pb.EDIT_STATE_FAILED,
}
_STAGES = {
    "preparing": pb.EDIT_STAGE_PREPARING,
    "searching": pb.EDIT_STAGE_SEARCHING,
    "solving": pb.EDIT_STAGE_SOLVING,
    "checking": pb.EDIT_STAGE_CHECKING,
}


def edit_message(record: Record) -> pb.Edit:
    """A record of the store."""
    edit = edit_of(record)
    return pb.Edit(
        id=edit.id,
        name=edit.name,
        model=edit.model,
        kind=_KINDS[edit.kind],
        state=_STATES[edit.state],
        created=edit.created,
        changed=edit.changed,
        error=edit.error,
        fact=_fact(edit),
        forgotten=_forgotten(edit),
        report=None if edit.report is None else _report(edit.report),
    )


def _fact(edit: Edit) -> pb.EditedFact | None:
    fact = edit.fact
    if fact is None:
        return None
    return pb.EditedFact(
        prompt=fact.prompt, subject=fact.subject, target=fact.target, paraphrases=fact.paraphrases
    )


def _forgotten(edit: Edit) -> pb.ForgottenQueries | None:
    if edit.kind != "forget":
        return None
    queries = [pb.ForgetQuery(prompt=one.prompt, subject=one.subject) for one in edit.queries]
    return pb.ForgottenQueries(queries=queries, refusal=edit.refusal)


def _report(report: EditReport) -> pb.EditReport:
    return pb.EditReport(
        checks=map(check_message, report.checks),
        reasons=report.reasons,
        steps=report.steps,
        rows=report.rows,
        seconds=report.seconds,
        loss=report.loss,
        layer=report.layer,
        say_contexts=report.say_contexts,
        keep_contexts=report.keep_contexts,
        memory_bytes=report.memory_bytes,
    )


def check_message(check: EditCheck) -> pb.EditCheck:
    """One thing that was tested."""
    return pb.EditCheck(
        name=check.name,
        before=check.before,
        after=check.after,
        needed=check.needed,
        passed=check.passed,
        asked=check.asked,
    )


def step_message(progress: Progress) -> pb.EditStep:
    """A moment of an edit."""
    return pb.EditStep(
        stage=_STAGES[progress.stage],
        step=progress.step,
        steps=progress.steps,
        loss=progress.loss,
        probability=progress.probability,
        rows=progress.rows,
        seconds=progress.seconds,
    )
