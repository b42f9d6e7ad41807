"""The RPCs of AdminService, which change the server's models at run time."""

from __future__ import annotations

import re
from typing import Protocol

from januslens.v1 import admin_pb2, admin_pb2_grpc
from januslens_server.access.callers import NAME
from januslens_server.errors import InvalidRequest, PermissionDenied
from januslens_server.models.registry import Registry
from januslens_server.rpc.call import ADMIN_NAME, Call, Context, current_caller
from januslens_server.rpc.encode import load_model_response

# Names of branches, tags and commits. The hub library joins them to paths in its cache.
REVISION = re.compile(r"(?!.*(\.\.|//))[\w][\w./-]{0,199}", re.ASCII)


class ModelChanges(Protocol):
    """Loads and unloads models in every process of the server."""

    async def load(self, name: str, source: str, revision: str) -> None:
        """Add a model and begin to load it.

        Raises `PermissionDenied` if the source is not allowed, `ModelExists`, `InvalidRequest` if
        there are too many models, and `ServerDraining`.
        """

    async def unload(self, name: str) -> None:
        """Remove a model; return when its requests have finished and its memory is free.

        Raises `ModelNotFound`, `ModelLoading` while it loads, and `ServerDraining`.
        """


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """The RPCs of `admin.proto`, which documents their effects and errors."""

    def __init__(self, registry: Registry, changes: ModelChanges) -> None:
        """Apply `changes`; `registry` has the states of the models."""
        self._registry = registry
        self._changes = changes

    async def LoadModel(
        self, request: admin_pb2.LoadModelRequest, context: Context
    ) -> admin_pb2.LoadModelResponse:
        """Begin to load a model, and return its state."""
        async with Call("LoadModel", context, ADMIN_NAME) as call:
            name = request.model
            if not NAME.fullmatch(name):
                raise InvalidRequest(
                    "model", f"invalid name {name!r}; expected 1 to 64 letters, digits, _ . : -"
                )
            if not request.source or not request.source.isprintable():
                raise InvalidRequest(
                    "source",
                    "source is empty or has characters that cannot be printed; expected the path "
                    "of a folder, or a hub id",
                )
            if request.revision and not REVISION.fullmatch(request.revision):
                raise InvalidRequest(
                    "revision",
                    f"invalid revision {request.revision!r}; expected a branch, tag or commit of a "
                    "hub model",
                )
            _check_scope(name)
            call.note(model=name, source=request.source)
            await self._changes.load(name, request.source, request.revision)
            return load_model_response(self._registry.status(name))

    async def UnloadModel(
        self, request: admin_pb2.UnloadModelRequest, context: Context
    ) -> admin_pb2.UnloadModelResponse:
        """Remove a model, and return when its memory is free."""
        async with Call("UnloadModel", context, ADMIN_NAME) as call:
            if not request.model:
                raise InvalidRequest("model", "model is empty; expected the name of a model")
            _check_scope(request.model)
            call.note(model=request.model)
            await self._changes.unload(request.model)
            return admin_pb2.UnloadModelResponse()


def _check_scope(model: str) -> None:
    if not current_caller().may_use(model):
        raise PermissionDenied(f"model {model!r} is not permitted for this caller")
