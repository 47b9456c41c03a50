"""Talk to a running daemon: :class:`Client`, and :class:`AsyncClient` for asyncio.

Errors are those of :mod:`edge_runtime.errors`, as if the engine ran in this process. Neither the engine nor
numpy is imported.
"""

from edge_runtime.client.aio import AsyncClient, AsyncModels, AsyncStream
from edge_runtime.client.edit_wire import EditOptions
from edge_runtime.client.edits import Edits, EditStream
from edge_runtime.client.sync import Client, Models, Stream
from edge_runtime.client.types import (
    Alternative,
    Chunk,
    ContributionCounts,
    EditEvaluation,
    Embeddings,
    FinishReason,
    GenerationOptions,
    LoadedModel,
    Message,
    Mode,
    Model,
    ModelDescription,
    PrepareProgress,
    PullProgress,
    RequestState,
    RequestStatus,
    Status,
    TokenLogprob,
    Usage,
)
from edge_runtime.cluster.report import (
    ClusterReport,
    LayerReport,
    MemberReport,
    MemberState,
    NodeShare,
    PartitionReport,
)
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

__all__ = [
    "Alternative",
    "AsyncClient",
    "AsyncModels",
    "AsyncStream",
    "Chunk",
    "Client",
    "ClusterReport",
    "ContributionCounts",
    "Edit",
    "EditCheck",
    "EditEvaluation",
    "EditKind",
    "EditOptions",
    "EditProgress",
    "EditReport",
    "EditStage",
    "EditState",
    "EditStream",
    "Edits",
    "Embeddings",
    "Fact",
    "FinishReason",
    "GenerationOptions",
    "LayerReport",
    "LoadedModel",
    "MemberReport",
    "MemberState",
    "Message",
    "Mode",
    "Model",
    "ModelDescription",
    "Models",
    "NodeShare",
    "PartitionReport",
    "PrepareProgress",
    "PullProgress",
    "Query",
    "RequestState",
    "RequestStatus",
    "Status",
    "Stream",
    "TokenLogprob",
    "Usage",
]
