from edge_runtime.v1 import inference_pb2 as _inference_pb2
from edge_runtime.v1 import models_pb2 as _models_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RequestState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REQUEST_STATE_UNSPECIFIED: _ClassVar[RequestState]
    REQUEST_STATE_QUEUED: _ClassVar[RequestState]
    REQUEST_STATE_PREFILL: _ClassVar[RequestState]
    REQUEST_STATE_DECODE: _ClassVar[RequestState]

class MemberState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MEMBER_STATE_UNSPECIFIED: _ClassVar[MemberState]
    MEMBER_STATE_HERE: _ClassVar[MemberState]
    MEMBER_STATE_WORKS: _ClassVar[MemberState]
    MEMBER_STATE_IDLE: _ClassVar[MemberState]
    MEMBER_STATE_PAUSED: _ClassVar[MemberState]
    MEMBER_STATE_EXPELLED: _ClassVar[MemberState]
    MEMBER_STATE_GONE: _ClassVar[MemberState]
REQUEST_STATE_UNSPECIFIED: RequestState
REQUEST_STATE_QUEUED: RequestState
REQUEST_STATE_PREFILL: RequestState
REQUEST_STATE_DECODE: RequestState
MEMBER_STATE_UNSPECIFIED: MemberState
MEMBER_STATE_HERE: MemberState
MEMBER_STATE_WORKS: MemberState
MEMBER_STATE_IDLE: MemberState
MEMBER_STATE_PAUSED: MemberState
MEMBER_STATE_EXPELLED: MemberState
MEMBER_STATE_GONE: MemberState

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("version", "pid", "started", "ready", "reason", "stopping", "default_model", "models", "requests", "queue_limit", "finished", "prompt_tokens", "generated_tokens", "speed", "memory_bytes", "memory_available_bytes", "temperature", "cpu_percent", "cluster")
    class FinishedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MODEL_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPEED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    CPU_PERCENT_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    version: str
    pid: int
    started: float
    ready: bool
    reason: str
    stopping: bool
    default_model: str
    models: _containers.RepeatedCompositeFieldContainer[_models_pb2.LoadedModel]
    requests: _containers.RepeatedCompositeFieldContainer[Request]
    queue_limit: int
    finished: _containers.ScalarMap[str, int]
    prompt_tokens: int
    generated_tokens: int
    speed: _containers.RepeatedScalarFieldContainer[int]
    memory_bytes: int
    memory_available_bytes: int
    temperature: float
    cpu_percent: float
    cluster: ClusterStatus
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., started: _Optional[float] = ..., ready: bool = ..., reason: _Optional[str] = ..., stopping: bool = ..., default_model: _Optional[str] = ..., models: _Optional[_Iterable[_Union[_models_pb2.LoadedModel, _Mapping]]] = ..., requests: _Optional[_Iterable[_Union[Request, _Mapping]]] = ..., queue_limit: _Optional[int] = ..., finished: _Optional[_Mapping[str, int]] = ..., prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., speed: _Optional[_Iterable[int]] = ..., memory_bytes: _Optional[int] = ..., memory_available_bytes: _Optional[int] = ..., temperature: _Optional[float] = ..., cpu_percent: _Optional[float] = ..., cluster: _Optional[_Union[ClusterStatus, _Mapping]] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("id", "client", "model", "state", "prompt_tokens", "generated_tokens", "seconds")
    ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    id: str
    client: str
    model: str
    state: RequestState
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    def __init__(self, id: _Optional[str] = ..., client: _Optional[str] = ..., model: _Optional[str] = ..., state: _Optional[_Union[RequestState, str]] = ..., prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("name", "is_founder", "fingerprint", "address", "members", "models")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IS_FOUNDER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    name: str
    is_founder: bool
    fingerprint: str
    address: str
    members: _containers.RepeatedCompositeFieldContainer[ClusterMember]
    models: _containers.RepeatedCompositeFieldContainer[PartitionedModel]
    def __init__(self, name: _Optional[str] = ..., is_founder: bool = ..., fingerprint: _Optional[str] = ..., address: _Optional[str] = ..., members: _Optional[_Iterable[_Union[ClusterMember, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[PartitionedModel, _Mapping]]] = ...) -> None: ...

class ClusterMember(_message.Message):
    __slots__ = ("name", "address", "state", "reason", "version", "machine", "lent_bytes", "threads", "temperature", "battery", "round_trip_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    LENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    BATTERY_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    state: MemberState
    reason: str
    version: str
    machine: str
    lent_bytes: int
    threads: int
    temperature: float
    battery: float
    round_trip_seconds: float
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[_Union[MemberState, str]] = ..., reason: _Optional[str] = ..., version: _Optional[str] = ..., machine: _Optional[str] = ..., lent_bytes: _Optional[int] = ..., threads: _Optional[int] = ..., temperature: _Optional[float] = ..., battery: _Optional[float] = ..., round_trip_seconds: _Optional[float] = ...) -> None: ...

class PartitionedModel(_message.Message):
    __slots__ = ("model", "plan", "reason", "mode", "quality", "calibrated", "transport", "round_trips", "predicted_seconds", "measured_seconds", "alone_seconds", "nodes", "layers", "syncs", "on_time", "late", "lost", "recomputed", "tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    CALIBRATED_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIPS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEASURED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ALONE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SYNCS_FIELD_NUMBER: _ClassVar[int]
    ON_TIME_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    plan: int
    reason: str
    mode: _inference_pb2.Mode
    quality: float
    calibrated: bool
    transport: str
    round_trips: int
    predicted_seconds: float
    measured_seconds: float
    alone_seconds: float
    nodes: _containers.RepeatedCompositeFieldContainer[NodeShare]
    layers: _containers.RepeatedCompositeFieldContainer[LayerTimes]
    syncs: _containers.RepeatedScalarFieldContainer[int]
    on_time: float
    late: _containers.RepeatedScalarFieldContainer[float]
    lost: float
    recomputed: float
    tokens: int
    def __init__(self, model: _Optional[str] = ..., plan: _Optional[int] = ..., reason: _Optional[str] = ..., mode: _Optional[_Union[_inference_pb2.Mode, str]] = ..., quality: _Optional[float] = ..., calibrated: bool = ..., transport: _Optional[str] = ..., round_trips: _Optional[int] = ..., predicted_seconds: _Optional[float] = ..., measured_seconds: _Optional[float] = ..., alone_seconds: _Optional[float] = ..., nodes: _Optional[_Iterable[_Union[NodeShare, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[LayerTimes, _Mapping]]] = ..., syncs: _Optional[_Iterable[int]] = ..., on_time: _Optional[float] = ..., late: _Optional[_Iterable[float]] = ..., lost: _Optional[float] = ..., recomputed: _Optional[float] = ..., tokens: _Optional[int] = ...) -> None: ...

class NodeShare(_message.Message):
    __slots__ = ("name", "groups", "share", "head_slices", "weight_bytes", "bytes_per_second", "round_trip_seconds", "jitter_seconds", "loss", "copies", "sent", "received", "repeats", "bad", "forged")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    HEAD_SLICES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    JITTER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    REPEATS_FIELD_NUMBER: _ClassVar[int]
    BAD_FIELD_NUMBER: _ClassVar[int]
    FORGED_FIELD_NUMBER: _ClassVar[int]
    name: str
    groups: int
    share: float
    head_slices: int
    weight_bytes: int
    bytes_per_second: float
    round_trip_seconds: float
    jitter_seconds: float
    loss: float
    copies: int
    sent: int
    received: int
    repeats: int
    bad: int
    forged: int
    def __init__(self, name: _Optional[str] = ..., groups: _Optional[int] = ..., share: _Optional[float] = ..., head_slices: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., bytes_per_second: _Optional[float] = ..., round_trip_seconds: _Optional[float] = ..., jitter_seconds: _Optional[float] = ..., loss: _Optional[float] = ..., copies: _Optional[int] = ..., sent: _Optional[int] = ..., received: _Optional[int] = ..., repeats: _Optional[int] = ..., bad: _Optional[int] = ..., forged: _Optional[int] = ...) -> None: ...

class LayerTimes(_message.Message):
    __slots__ = ("compute_seconds", "wait_seconds", "transfer_seconds", "groups")
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    compute_seconds: float
    wait_seconds: float
    transfer_seconds: float
    groups: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, compute_seconds: _Optional[float] = ..., wait_seconds: _Optional[float] = ..., transfer_seconds: _Optional[float] = ..., groups: _Optional[_Iterable[int]] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShutdownResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
