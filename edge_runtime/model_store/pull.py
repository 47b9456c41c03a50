"""Bring a model from the network into the store."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from edge_runtime.errors import DownloadError, ModelFileError, RequestError
from edge_runtime.model_store.download import Limits, download, key_of
from edge_runtime.model_store.files import Progress, exclusive, no_progress
from edge_runtime.model_store.source import parse_source
from edge_runtime.model_store.store import ModelStore, StoredModel, check_name, name_of


@dataclass(frozen=True, slots=True)
class PullOptions:
    """How to pull.

    Attributes:
        name: in the store; by default the file's.
        sha256: what the file must hash to.
        offline: use only what the store holds.
        replace: a model of the same name gives way once the new one is whole and sound.
    """

    name: str | None = None
    sha256: str | None = None
    offline: bool = False
    replace: bool = False
    limits: Limits | None = None

    def __post_init__(self) -> None:
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise RequestError("--sha256 needs 64 hexadecimal digits")


def pull(
    store: ModelStore,
    text: str,
    options: PullOptions,
    *,
    progress: Progress = no_progress,
    notice: Callable[[str], None] = lambda text: None,
) -> tuple[StoredModel, bool]:
    """Fetch a model unless the store has it.

    Returns:
        the model, and whether it was fetched now.

    Raises:
        DownloadError: it could not be fetched, another process is fetching it, or offline.
        ModelFileError, UnsupportedModelError: what arrived is no model that the engine runs.
        RequestError: the source or the name is not valid, or the name is in use.
    """
    from edge_runtime.model_store.summary import check_model

    source = parse_source(text)
    name = options.name or name_of(source.file_name)
    check_name(name)
    if not options.replace and (present := _present(store, source.text, name, options)):
        return present, False
    if options.offline or os.environ.get("EDGERT_OFFLINE", "0") not in ("", "0"):
        raise DownloadError(f"{source.text} is not in the store, and offline nothing is fetched")
    if not options.replace:
        store.check_free(name)
    try:
        with exclusive(store.downloads / f"{key_of(source)}.lock", wait=False):
            fetched = download(
                source,
                store.downloads,
                sha256=options.sha256,
                limits=options.limits,
                progress=progress,
                notice=notice,
            )
            try:
                check_model(fetched.path)
                model = store.add(
                    name, fetched.path, source=source.text, sha256=fetched.sha256, replace=options.replace
                )
            except ModelFileError as error:
                raise type(error)(f"{source.text} is no model to keep: {error}") from error
            finally:
                fetched.path.unlink(missing_ok=True)
    except BlockingIOError as error:
        raise DownloadError(f"another process is fetching {source.text}; wait for it, or stop it") from error
    return model, True


def _present(store: ModelStore, source: str, name: str, options: PullOptions) -> StoredModel | None:
    """The model, if the store has it from this very source with the right hash."""
    for model in store:
        same_name = options.name is None or model.name == name
        if model.source == source and same_name and options.sha256 in (None, model.sha256):
            return model
    return None
