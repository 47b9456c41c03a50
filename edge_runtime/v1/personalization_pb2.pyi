from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EditKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EDIT_KIND_UNSPECIFIED: _ClassVar[EditKind]
    EDIT_KIND_EDIT: _ClassVar[EditKind]
    EDIT_KIND_FORGET: _ClassVar[EditKind]
    EDIT_KIND_LORA: _ClassVar[EditKind]

class EditState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EDIT_STATE_UNSPECIFIED: _ClassVar[EditState]
    EDIT_STATE_QUEUED: _ClassVar[EditState]
    EDIT_STATE_RUNNING: _ClassVar[EditState]
    EDIT_STATE_APPLIED: _ClassVar[EditState]
    EDIT_STATE_REJECTED: _ClassVar[EditState]
    EDIT_STATE_REVERTED: _ClassVar[EditState]
    EDIT_STATE_FAILED: _ClassVar[EditState]

class EditStage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EDIT_STAGE_UNSPECIFIED: _ClassVar[EditStage]
    EDIT_STAGE_PREPARING: _ClassVar[EditStage]
    EDIT_STAGE_SEARCHING: _ClassVar[EditStage]
    EDIT_STAGE_SOLVING: _ClassVar[EditStage]
    EDIT_STAGE_CHECKING: _ClassVar[EditStage]

class AdapterFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_FORMAT_UNSPECIFIED: _ClassVar[AdapterFormat]
    ADAPTER_FORMAT_GGUF: _ClassVar[AdapterFormat]
    ADAPTER_FORMAT_PEFT: _ClassVar[AdapterFormat]
EDIT_KIND_UNSPECIFIED: EditKind
EDIT_KIND_EDIT: EditKind
EDIT_KIND_FORGET: EditKind
EDIT_KIND_LORA: EditKind
EDIT_STATE_UNSPECIFIED: EditState
EDIT_STATE_QUEUED: EditState
EDIT_STATE_RUNNING: EditState
EDIT_STATE_APPLIED: EditState
EDIT_STATE_REJECTED: EditState
EDIT_STATE_REVERTED: EditState
EDIT_STATE_FAILED: EditState
EDIT_STAGE_UNSPECIFIED: EditStage
EDIT_STAGE_PREPARING: EditStage
EDIT_STAGE_SEARCHING: EditStage
EDIT_STAGE_SOLVING: EditStage
EDIT_STAGE_CHECKING: EditStage
ADAPTER_FORMAT_UNSPECIFIED: AdapterFormat
ADAPTER_FORMAT_GGUF: AdapterFormat
ADAPTER_FORMAT_PEFT: AdapterFormat

class ApplyRequest(_message.Message):
    __slots__ = ("prompt", "subject", "target", "paraphrases", "model", "name", "force", "steps", "seconds")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PARAPHRASES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    subject: str
    target: str
    paraphrases: _containers.RepeatedScalarFieldContainer[str]
    model: str
    name: str
    force: bool
    steps: int
    seconds: float
    def __init__(self, prompt: _Optional[str] = ..., subject: _Optional[str] = ..., target: _Optional[str] = ..., paraphrases: _Optional[_Iterable[str]] = ..., model: _Optional[str] = ..., name: _Optional[str] = ..., force: bool = ..., steps: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("queries", "refusal", "model", "name", "force", "steps", "seconds")
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    queries: _containers.RepeatedCompositeFieldContainer[ForgetQuery]
    refusal: str
    model: str
    name: str
    force: bool
    steps: int
    seconds: float
    def __init__(self, queries: _Optional[_Iterable[_Union[ForgetQuery, _Mapping]]] = ..., refusal: _Optional[str] = ..., model: _Optional[str] = ..., name: _Optional[str] = ..., force: bool = ..., steps: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class ForgetQuery(_message.Message):
    __slots__ = ("prompt", "subject")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    subject: str
    def __init__(self, prompt: _Optional[str] = ..., subject: _Optional[str] = ...) -> None: ...

class FollowRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ApplyProgress(_message.Message):
    __slots__ = ("edit", "behind", "step")
    EDIT_FIELD_NUMBER: _ClassVar[int]
    BEHIND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    edit: Edit
    behind: _containers.RepeatedScalarFieldContainer[str]
    step: EditStep
    def __init__(self, edit: _Optional[_Union[Edit, _Mapping]] = ..., behind: _Optional[_Iterable[str]] = ..., step: _Optional[_Union[EditStep, _Mapping]] = ...) -> None: ...

class EditStep(_message.Message):
    __slots__ = ("stage", "step", "steps", "loss", "probability", "rows", "seconds")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    stage: EditStage
    step: int
    steps: int
    loss: float
    probability: float
    rows: float
    seconds: float
    def __init__(self, stage: _Optional[_Union[EditStage, str]] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., loss: _Optional[float] = ..., probability: _Optional[float] = ..., rows: _Optional[float] = ..., seconds: _Optional[float] = ...) -> None: ...

class Edit(_message.Message):
    __slots__ = ("id", "name", "model", "kind", "state", "created", "changed", "error", "fact", "forgotten", "report")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FACT_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    id: int
    name: str
    model: str
    kind: EditKind
    state: EditState
    created: float
    changed: float
    error: str
    fact: EditedFact
    forgotten: ForgottenQueries
    report: EditReport
    def __init__(self, id: _Optional[int] = ..., name: _Optional[str] = ..., model: _Optional[str] = ..., kind: _Optional[_Union[EditKind, str]] = ..., state: _Optional[_Union[EditState, str]] = ..., created: _Optional[float] = ..., changed: _Optional[float] = ..., error: _Optional[str] = ..., fact: _Optional[_Union[EditedFact, _Mapping]] = ..., forgotten: _Optional[_Union[ForgottenQueries, _Mapping]] = ..., report: _Optional[_Union[EditReport, _Mapping]] = ...) -> None: ...

class EditedFact(_message.Message):
    __slots__ = ("prompt", "subject", "target", "paraphrases")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PARAPHRASES_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    subject: str
    target: str
    paraphrases: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, prompt: _Optional[str] = ..., subject: _Optional[str] = ..., target: _Optional[str] = ..., paraphrases: _Optional[_Iterable[str]] = ...) -> None: ...

class ForgottenQueries(_message.Message):
    __slots__ = ("queries", "refusal")
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    queries: _containers.RepeatedCompositeFieldContainer[ForgetQuery]
    refusal: str
    def __init__(self, queries: _Optional[_Iterable[_Union[ForgetQuery, _Mapping]]] = ..., refusal: _Optional[str] = ...) -> None: ...

class EditReport(_message.Message):
    __slots__ = ("checks", "reasons", "steps", "rows", "seconds", "loss", "layer", "say_contexts", "keep_contexts", "memory_bytes")
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SAY_CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    checks: _containers.RepeatedCompositeFieldContainer[EditCheck]
    reasons: _containers.RepeatedScalarFieldContainer[str]
    steps: int
    rows: float
    seconds: float
    loss: float
    layer: int
    say_contexts: int
    keep_contexts: int
    memory_bytes: int
    def __init__(self, checks: _Optional[_Iterable[_Union[EditCheck, _Mapping]]] = ..., reasons: _Optional[_Iterable[str]] = ..., steps: _Optional[int] = ..., rows: _Optional[float] = ..., seconds: _Optional[float] = ..., loss: _Optional[float] = ..., layer: _Optional[int] = ..., say_contexts: _Optional[int] = ..., keep_contexts: _Optional[int] = ..., memory_bytes: _Optional[int] = ...) -> None: ...

class EditCheck(_message.Message):
    __slots__ = ("name", "before", "after", "needed", "passed", "asked")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    NEEDED_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    name: str
    before: float
    after: float
    needed: float
    passed: bool
    asked: int
    def __init__(self, name: _Optional[str] = ..., before: _Optional[float] = ..., after: _Optional[float] = ..., needed: _Optional[float] = ..., passed: bool = ..., asked: _Optional[int] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class CancelResponse(_message.Message):
    __slots__ = ("edit",)
    EDIT_FIELD_NUMBER: _ClassVar[int]
    edit: Edit
    def __init__(self, edit: _Optional[_Union[Edit, _Mapping]] = ...) -> None: ...

class ListEditsRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ListEditsResponse(_message.Message):
    __slots__ = ("edits",)
    EDITS_FIELD_NUMBER: _ClassVar[int]
    edits: _containers.RepeatedCompositeFieldContainer[Edit]
    def __init__(self, edits: _Optional[_Iterable[_Union[Edit, _Mapping]]] = ...) -> None: ...

class ShowRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ShowResponse(_message.Message):
    __slots__ = ("edit",)
    EDIT_FIELD_NUMBER: _ClassVar[int]
    edit: Edit
    def __init__(self, edit: _Optional[_Union[Edit, _Mapping]] = ...) -> None: ...

class RevertRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RevertResponse(_message.Message):
    __slots__ = ("edit",)
    EDIT_FIELD_NUMBER: _ClassVar[int]
    edit: Edit
    def __init__(self, edit: _Optional[_Union[Edit, _Mapping]] = ...) -> None: ...

class ReapplyRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ReapplyResponse(_message.Message):
    __slots__ = ("edit",)
    EDIT_FIELD_NUMBER: _ClassVar[int]
    edit: Edit
    def __init__(self, edit: _Optional[_Union[Edit, _Mapping]] = ...) -> None: ...

class RemoveEditRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RemoveEditResponse(_message.Message):
    __slots__ = ("edit",)
    EDIT_FIELD_NUMBER: _ClassVar[int]
    edit: Edit
    def __init__(self, edit: _Optional[_Union[Edit, _Mapping]] = ...) -> None: ...

class EvaluateRequest(_message.Message):
    __slots__ = ("names", "model")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    model: str
    def __init__(self, names: _Optional[_Iterable[str]] = ..., model: _Optional[str] = ...) -> None: ...

class EvaluateResponse(_message.Message):
    __slots__ = ("name", "checks")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    checks: _containers.RepeatedCompositeFieldContainer[EditCheck]
    def __init__(self, name: _Optional[str] = ..., checks: _Optional[_Iterable[_Union[EditCheck, _Mapping]]] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("names", "format")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    format: AdapterFormat
    def __init__(self, names: _Optional[_Iterable[str]] = ..., format: _Optional[_Union[AdapterFormat, str]] = ...) -> None: ...

class ExportResponse(_message.Message):
    __slots__ = ("file", "content")
    FILE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    file: str
    content: bytes
    def __init__(self, file: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class ImportRequest(_message.Message):
    __slots__ = ("header", "file", "content")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    header: ImportHeader
    file: str
    content: bytes
    def __init__(self, header: _Optional[_Union[ImportHeader, _Mapping]] = ..., file: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class ImportHeader(_message.Message):
    __slots__ = ("name", "model", "format")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    format: AdapterFormat
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., format: _Optional[_Union[AdapterFormat, str]] = ...) -> None: ...

class ImportResponse(_message.Message):
    __slots__ = ("edit",)
    EDIT_FIELD_NUMBER: _ClassVar[int]
    edit: Edit
    def __init__(self, edit: _Optional[_Union[Edit, _Mapping]] = ...) -> None: ...

class PrepareModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class PrepareModelResponse(_message.Message):
    __slots__ = ("share", "layer")
    SHARE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    share: float
    layer: int
    def __init__(self, share: _Optional[float] = ..., layer: _Optional[int] = ...) -> None: ...
