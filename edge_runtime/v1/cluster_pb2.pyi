from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SideMatrix(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIDE_MATRIX_UNSPECIFIED: _ClassVar[SideMatrix]
    SIDE_MATRIX_GATE: _ClassVar[SideMatrix]
    SIDE_MATRIX_UP: _ClassVar[SideMatrix]
    SIDE_MATRIX_DOWN_A: _ClassVar[SideMatrix]
    SIDE_MATRIX_DOWN_B: _ClassVar[SideMatrix]
    SIDE_MATRIX_HEAD: _ClassVar[SideMatrix]
SIDE_MATRIX_UNSPECIFIED: SideMatrix
SIDE_MATRIX_GATE: SideMatrix
SIDE_MATRIX_UP: SideMatrix
SIDE_MATRIX_DOWN_A: SideMatrix
SIDE_MATRIX_DOWN_B: SideMatrix
SIDE_MATRIX_HEAD: SideMatrix

class Member(_message.Message):
    __slots__ = ("name", "address")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("name", "signing_request", "address")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIGNING_REQUEST_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    signing_request: bytes
    address: str
    def __init__(self, name: _Optional[str] = ..., signing_request: _Optional[bytes] = ..., address: _Optional[str] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("certificate", "authority", "name", "members")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    authority: bytes
    name: str
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, certificate: _Optional[bytes] = ..., authority: _Optional[bytes] = ..., name: _Optional[str] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("caller",)
    CALLER_FIELD_NUMBER: _ClassVar[int]
    caller: Member
    def __init__(self, caller: _Optional[_Union[Member, _Mapping]] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("self", "version", "memory_bytes", "threads", "temperature", "battery", "members", "machine", "models")
    SELF_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    BATTERY_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    self: Member
    version: str
    memory_bytes: int
    threads: int
    temperature: float
    battery: float
    members: _containers.RepeatedCompositeFieldContainer[Member]
    machine: str
    models: _containers.RepeatedCompositeFieldContainer[WorkedModel]
    def __init__(self, self_: _Optional[_Union[Member, _Mapping]] = ..., version: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., threads: _Optional[int] = ..., temperature: _Optional[float] = ..., battery: _Optional[float] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., machine: _Optional[str] = ..., models: _Optional[_Iterable[_Union[WorkedModel, _Mapping]]] = ...) -> None: ...

class WorkedModel(_message.Message):
    __slots__ = ("model", "groups", "head_slices", "bytes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SLICES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    groups: int
    head_slices: int
    bytes: int
    def __init__(self, model: _Optional[str] = ..., groups: _Optional[int] = ..., head_slices: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class MeasureRequest(_message.Message):
    __slots__ = ("echo", "compute")
    ECHO_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    echo: bytes
    compute: ComputeProbe
    def __init__(self, echo: _Optional[bytes] = ..., compute: _Optional[_Union[ComputeProbe, _Mapping]] = ...) -> None: ...

class ComputeProbe(_message.Message):
    __slots__ = ("n_embd", "neurons", "gate_type", "down_type")
    N_EMBD_FIELD_NUMBER: _ClassVar[int]
    NEURONS_FIELD_NUMBER: _ClassVar[int]
    GATE_TYPE_FIELD_NUMBER: _ClassVar[int]
    DOWN_TYPE_FIELD_NUMBER: _ClassVar[int]
    n_embd: int
    neurons: int
    gate_type: int
    down_type: int
    def __init__(self, n_embd: _Optional[int] = ..., neurons: _Optional[int] = ..., gate_type: _Optional[int] = ..., down_type: _Optional[int] = ...) -> None: ...

class MeasureResponse(_message.Message):
    __slots__ = ("echo", "bytes_per_second")
    ECHO_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    echo: bytes
    bytes_per_second: float
    def __init__(self, echo: _Optional[bytes] = ..., bytes_per_second: _Optional[float] = ...) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("manifest", "layers", "head_slices", "sources", "plan")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SLICES_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    layers: _containers.RepeatedCompositeFieldContainer[LayerGroups]
    head_slices: _containers.RepeatedScalarFieldContainer[int]
    sources: _containers.RepeatedScalarFieldContainer[str]
    plan: int
    def __init__(self, manifest: _Optional[bytes] = ..., layers: _Optional[_Iterable[_Union[LayerGroups, _Mapping]]] = ..., head_slices: _Optional[_Iterable[int]] = ..., sources: _Optional[_Iterable[str]] = ..., plan: _Optional[int] = ...) -> None: ...

class LayerGroups(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, groups: _Optional[_Iterable[int]] = ...) -> None: ...

class PrepareProgress(_message.Message):
    __slots__ = ("cached_bytes", "fetched_bytes", "total_bytes", "ready", "loaded_bytes")
    CACHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    cached_bytes: int
    fetched_bytes: int
    total_bytes: int
    ready: bool
    loaded_bytes: int
    def __init__(self, cached_bytes: _Optional[int] = ..., fetched_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., ready: bool = ..., loaded_bytes: _Optional[int] = ...) -> None: ...

class PrepareAdaptersRequest(_message.Message):
    __slots__ = ("model", "plan", "version", "parts")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    plan: int
    version: int
    parts: _containers.RepeatedCompositeFieldContainer[SidePart]
    def __init__(self, model: _Optional[str] = ..., plan: _Optional[int] = ..., version: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[SidePart, _Mapping]]] = ...) -> None: ...

class SidePart(_message.Message):
    __slots__ = ("layer", "matrix", "rank", "content")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    MATRIX_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    layer: int
    matrix: SideMatrix
    rank: int
    content: bytes
    def __init__(self, layer: _Optional[int] = ..., matrix: _Optional[_Union[SideMatrix, str]] = ..., rank: _Optional[int] = ..., content: _Optional[bytes] = ...) -> None: ...

class PrepareAdaptersResponse(_message.Message):
    __slots__ = ("loaded_bytes",)
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    loaded_bytes: int
    def __init__(self, loaded_bytes: _Optional[int] = ...) -> None: ...

class FetchShardRequest(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class ShardChunk(_message.Message):
    __slots__ = ("content", "total_bytes")
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    total_bytes: int
    def __init__(self, content: _Optional[bytes] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("model", "session", "secret")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    model: str
    session: int
    secret: bytes
    def __init__(self, model: _Optional[str] = ..., session: _Optional[int] = ..., secret: _Optional[bytes] = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("datagram_port",)
    DATAGRAM_PORT_FIELD_NUMBER: _ClassVar[int]
    datagram_port: int
    def __init__(self, datagram_port: _Optional[int] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: int
    def __init__(self, session: _Optional[int] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ComputeRequest(_message.Message):
    __slots__ = ("session", "step", "layer", "n_rows", "inputs", "plan")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    N_ROWS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    session: int
    step: int
    layer: int
    n_rows: int
    inputs: bytes
    plan: int
    def __init__(self, session: _Optional[int] = ..., step: _Optional[int] = ..., layer: _Optional[int] = ..., n_rows: _Optional[int] = ..., inputs: _Optional[bytes] = ..., plan: _Optional[int] = ...) -> None: ...

class ComputeResponse(_message.Message):
    __slots__ = ("step", "layer", "n_rows", "sums", "compute_microseconds")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    N_ROWS_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MICROSECONDS_FIELD_NUMBER: _ClassVar[int]
    step: int
    layer: int
    n_rows: int
    sums: bytes
    compute_microseconds: int
    def __init__(self, step: _Optional[int] = ..., layer: _Optional[int] = ..., n_rows: _Optional[int] = ..., sums: _Optional[bytes] = ..., compute_microseconds: _Optional[int] = ...) -> None: ...
