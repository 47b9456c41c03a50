"""What an edit looks like to whoever asked for it: plain values, for every API and the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from edge_runtime.personalize.progress import Progress
    from edge_runtime.personalize.records import Record

EditKind = Literal["edit", "forget", "lora"]
EditState = Literal["queued", "running", "applied", "rejected", "reverted", "failed"]
EditStage = Literal["waiting", "preparing", "searching", "solving", "checking"]
UNFINISHED: tuple[EditState, ...] = ("queued", "running")


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact, as it was asked for.

    Attributes:
        prompt: text that the target continues.
        subject: the part of the prompt that the fact is about.
        target: what the model is to go on with.
        paraphrases: other prompts that the target continues.
    """

    prompt: str
    subject: str
    target: str
    paraphrases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Query:
    """What a model is to refuse: a prompt, and the part of it that the answer is about."""

    prompt: str
    subject: str


@dataclass(frozen=True, slots=True)
class EditCheck:
    """One thing that was tested.

    Attributes:
        name: ``success``, ``paraphrases``, ``unrelated``, ``same subject``, ``implied``: share of the answers
            that are as they should be. ``negation``: that name the object although the sentence denies it.
            ``true of the new``, ``true of the old``: that call the statement with the new or the old object
            true.
        before, after: without the edit and with it, 0 to 1; None where nothing was to be asked.
        needed: least share that passes; None where it is only reported.
        passed: whether it was reached.
        asked: number of prompts.
    """

    name: str
    before: float | None
    after: float | None
    needed: float | None
    passed: bool
    asked: int


@dataclass(frozen=True, slots=True)
class EditReport:
    """What came of an edit.

    Attributes:
        checks: one for each thing that was tested.
        reasons: why it was rejected; empty otherwise.
        steps: of the search.
        rows: tokens that went through the whole model.
        seconds: that it took.
        loss: of the search at its end, in nats.
        layer: whose FFN was changed; 0 is the first.
        say_contexts: texts in which the model was to say the target.
        keep_contexts: texts in which it was to say what it said before.
        memory_bytes: that it took beside the model's memory.
    """

    checks: tuple[EditCheck, ...] = ()
    reasons: tuple[str, ...] = ()
    steps: int = 0
    rows: float = 0.0
    seconds: float = 0.0
    loss: float = 0.0
    layer: int = 0
    say_contexts: int = 0
    keep_contexts: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Edit:
    """An edit or an adapter of a device.

    Attributes:
        id: its number, never used again.
        name: unique at a time.
        model: that it changes.
        created: when it was asked for, changed: when it came into its state; seconds since 1970.
        error: why it failed; empty otherwise.
        fact: of an edit; None otherwise.
        queries, refusal: of a forgetting; the refusal is empty where the model was to word it.
        report: None as long as there is nothing to tell.
    """

    id: int
    name: str
    model: str
    kind: EditKind
    state: EditState
    created: float
    changed: float
    error: str = ""
    fact: Fact | None = None
    queries: tuple[Query, ...] = ()
    refusal: str = ""
    report: EditReport | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing is computed for it any more."""
        return self.state not in UNFINISHED

    def as_json(self) -> dict[str, Any]:
        """Made of what JSON has."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class EditProgress:
    """A moment of an edit.

    Attributes:
        stage: ``waiting``, or what it is doing.
        behind: names of the edits that are computed before it.
        step: of the search; 0 before it. steps: at most so many.
        loss: of the search, in nats.
        probability: of the target after the prompt, the mean over its tokens; 0 to 1.
        rows: tokens that went through the whole model so far.
        seconds: since it began, or went on after a restart.
    """

    stage: EditStage
    behind: tuple[str, ...] = ()
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    probability: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0


def edit_of(record: Record) -> Edit:
    """A record of the store for people and programs."""
    request = record.request
    fact = None
    if record.kind == "edit":
        prompt, subject, target = (_text(request, key) for key in ("prompt", "subject", "target"))
        fact = Fact(prompt, subject, target, _texts(request, "paraphrases"))
    return Edit(
        id=record.id,
        name=record.name,
        model=record.model,
        kind=record.kind,
        state=record.state,
        created=record.created,
        changed=record.changed,
        error=record.error,
        fact=fact,
        queries=tuple(
            Query(_text(one, "prompt"), _text(one, "subject")) for one in _objects(request, "queries")
        ),
        refusal=_text(request, "refusal"),
        report=report_of(record.report) if record.report else None,
    )


def progress_of(moment: Progress) -> EditProgress:
    """What the editor says of itself, for people and programs."""
    return EditProgress(
        stage=moment.stage,
        step=moment.step,
        steps=moment.steps,
        loss=moment.loss,
        probability=moment.probability,
        rows=moment.rows,
        seconds=moment.seconds,
    )


def report_of(report: Mapping[str, Any]) -> EditReport:
    """The report that the editor left; what an older one did not tell is 0."""
    contexts = report.get("contexts") or {}
    return EditReport(
        checks=checks_of(report),
        reasons=_texts(report, "reasons"),
        steps=int(report.get("steps") or 0),
        rows=float(report.get("rows") or 0),
        seconds=float(report.get("seconds") or 0),
        loss=float(report.get("loss") or 0),
        layer=int(report.get("layer") or 0),
        say_contexts=int(contexts.get("say") or 0),
        keep_contexts=int(contexts.get("keep") or 0),
        memory_bytes=int(report.get("memory_bytes") or 0),
    )


def checks_of(report: Mapping[str, Any]) -> tuple[EditCheck, ...]:
    """The checks of a report."""
    return tuple(
        EditCheck(
            name=str(one["name"]),
            before=_number(one.get("before")),
            after=_number(one.get("after")),
            needed=_number(one.get("needed")),
            passed=bool(one["passed"]),
            asked=int(one.get("asked") or 0),
        )
        for one in _objects(report, "checks")
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _text(values: Mapping[str, Any], key: str) -> str:
    return str(values.get(key) or "")


def _texts(values: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return tuple(str(one) for one in values.get(key) or ())


def _objects(values: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = values.get(key) or ()
    return found
