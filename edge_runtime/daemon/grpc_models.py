"""The Models service of the gRPC API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from edge_runtime.daemon.status import LoadedModel
from edge_runtime.errors import RequestError
from edge_runtime.model_store.pull import PullOptions
from edge_runtime.model_store.store import StoredModel
from edge_runtime.v1 import models_pb2 as pb
from edge_runtime.v1 import models_pb2_grpc

if TYPE_CHECKING:
    from edge_runtime.daemon.service import Service


class ModelsServicer(models_pb2_grpc.ModelsServicer):
    """Models of the store and in memory. Errors are raised as they are; the boundary translates them."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def List(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        """All models of the store."""
        loaded = {model.name for model in self._service.loaded()}
        models = [_model(model, model.name in loaded) for model in self._service.models()]
        return pb.ListModelsResponse(models=models)

    async def Describe(self, request: pb.DescribeModelRequest, context: Any) -> pb.DescribeModelResponse:  # noqa: N802
        """A model's header."""
        summary = await self._service.describe(request.name or self._service.config.model.default)
        return pb.DescribeModelResponse(
            title=summary.title,
            architecture=summary.architecture,
            parameters=summary.parameters,
            quantization=[
                pb.QuantizationShare(type=name, share=share) for name, share in summary.quantization.items()
            ],
            context=summary.context,
            layers=summary.layers,
            embedding=summary.embedding,
            vocabulary=summary.vocabulary,
            tokenizer=summary.tokenizer,
            chat_template=summary.chat_template,
            licence=summary.licence,
            size=summary.size,
        )

    async def Pull(self, request: pb.PullModelRequest, context: Any) -> AsyncIterator[pb.PullModelResponse]:  # noqa: N802
        """A model's way into the store."""
        options = PullOptions(
            name=request.name if request.HasField("name") else None,
            sha256=request.sha256 if request.HasField("sha256") else None,
            replace=request.replace,
        )
        async with aclosing(self._service.pull(request.source, options)) as steps:  # type: ignore[type-var]
            async for step in steps:
                yield pb.PullModelResponse(
                    done_bytes=step.done_bytes,
                    total_bytes=step.total_bytes,
                    notice=step.notice,
                    model=None if step.model is None else _model(step.model, False),
                )

    async def Load(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:  # noqa: N802
        """A model into memory."""
        loaded = await self._service.load(request.name or self._service.config.model.default)
        return pb.LoadModelResponse(model=loaded_model(loaded))

    async def Unload(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:  # noqa: N802
        """A model out of memory."""
        await self._service.unload(_named(request.name))
        return pb.UnloadModelResponse()

    async def Remove(self, request: pb.RemoveModelRequest, context: Any) -> pb.RemoveModelResponse:  # noqa: N802
        """A model out of the store."""
        await self._service.remove(_named(request.name))
        return pb.RemoveModelResponse()


def loaded_model(model: LoadedModel) -> pb.LoadedModel:
    """A model in memory as a message."""
    return pb.LoadedModel(
        name=model.name,
        parameters=model.parameters,
        quantization=model.quantization,
        context=model.context,
        sequences=model.sequences,
        threads=model.threads,
        weight_bytes=model.weight_bytes,
        kv_bytes=model.kv_bytes,
    )


def _model(model: StoredModel, loaded: bool) -> pb.Model:
    return pb.Model(
        name=model.name, source=model.source, sha256=model.sha256, added=model.added, loaded=loaded
    )


def _named(name: str) -> str:
    if not name:
        raise RequestError("no model is named; give its name, as the list of models shows it")
    return name
