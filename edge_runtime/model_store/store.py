"""The models on this device: one GGUF file each, and beside it a record of where it came from."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import ModelFileError, ModelNotFoundError, RequestError
from edge_runtime.model_store.files import (
    CHUNK,
    Progress,
    exclusive,
    move_into_place,
    no_progress,
    read_json,
    sha256_of,
    sync_folder,
    write_json,
)
from edge_runtime.model_store.paths import (
    CALIBRATION_SUFFIX,
    DEMO_NAME,
    EDITS_SUFFIX,
    demo_model_path,
    home,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that can be named.

    Attributes:
        source: ``hf:...``, an address, ``file:...``, or ``built in``; empty where nobody recorded it.
        sha256: of the file as it was stored, empty where unknown.
        added: Unix time, 0 where unknown.
    """

    name: str
    path: Path
    source: str
    sha256: str
    added: float


class ModelStore:
    """Models in ``<home>/models``.

    Args:
        folder: the home folder, by default :func:`paths.home`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.home = folder or home()
        self.models = self.home / "models"
        self.downloads = self.home / "downloads"

    def __iter__(self) -> Iterator[StoredModel]:
        """Every model: the built-in one first, then by name."""
        demo: list[StoredModel] = []
        with contextlib.suppress(ModelNotFoundError):  # an installation without it is a sound one
            demo.append(self.get(DEMO_NAME))
        yield from demo
        if self.models.is_dir():
            for path in sorted(self.models.glob("*.gguf")):
                if _NAME.fullmatch(path.stem) and path.stem != DEMO_NAME:
                    yield self._read(path.stem)

    def get(self, name: str) -> StoredModel:
        """The model of a name.

        Raises:
            ModelNotFoundError: there is none.
        """
        if name == DEMO_NAME:
            return StoredModel(DEMO_NAME, demo_model_path(), "built in", "", 0.0)
        if not _NAME.fullmatch(name) or not self._file(name).is_file():
            raise ModelNotFoundError(f"no model named {name!r} in {self.models}{self._hint(name)}")
        return self._read(name)

    def resolve(self, text: str) -> StoredModel:
        """A model by name, or a file by path.

        Raises:
            ModelNotFoundError: neither.
        """
        looks_like_path = os.sep in text or text.lower().endswith(".gguf")
        path = Path(text).expanduser()
        is_stored = bool(_NAME.fullmatch(text)) and self._file(text).is_file()
        if not looks_like_path and (text == DEMO_NAME or is_stored):
            return self.get(text)
        if path.is_file():
            return StoredModel(path.stem, path, f"file:{path.resolve()}", "", 0.0)
        if looks_like_path:
            what = "is a folder, not a model file" if path.is_dir() else "does not exist"
            raise ModelNotFoundError(f"{text} {what}{self._hint(path.stem)}")
        return self.get(text)

    def add(self, name: str, path: Path, *, source: str, sha256: str, replace: bool = False) -> StoredModel:
        """Move a finished, synced file of the same file system into the store.

        Raises:
            RequestError: no valid name, or one in use.
        """
        check_name(name)
        self.models.mkdir(parents=True, exist_ok=True)
        with exclusive(self.home / "store.lock", wait=True):
            if not replace:
                self.check_free(name)
            record = {"source": source, "sha256": sha256, "added": time.time()}
            # The record goes first: a file without its record would look like one that somebody put there.
            write_json(self._record(name), record)
            move_into_place(path, self._file(name))
        return self._read(name)

    def add_file(
        self,
        name: str,
        path: Path,
        *,
        copy: bool = False,
        replace: bool = False,
        progress: Progress = no_progress,
    ) -> StoredModel:
        """Put a file of the user's into the store: a hard link where possible, else a copy.

        Raises:
            ModelFileError, UnsupportedModelError: not a model that the engine runs.
            RequestError: no valid name, or one in use.
        """
        from edge_runtime.model_store.summary import check_model

        check_name(name)
        if not replace:
            self.check_free(name)
        check_model(path)
        self.downloads.mkdir(parents=True, exist_ok=True)
        arriving = self.downloads / f"{name}.{os.getpid()}.import"
        try:
            if copy or not _link(path, arriving):
                _copy(path, arriving, progress)
            digest = sha256_of(arriving, progress)
            return self.add(name, arriving, source=f"file:{path.resolve()}", sha256=digest, replace=replace)
        finally:
            arriving.unlink(missing_ok=True)

    def remove(self, name: str) -> StoredModel:
        """Delete a model, its record, and what was measured of it.

        Raises:
            ModelNotFoundError: there is none.
            RequestError: the built-in model.
        """
        self.check_removable(name)
        with exclusive(self.home / "store.lock", wait=True):
            model = self.get(name)
            model.path.unlink()
            self._record(name).unlink(missing_ok=True)
            for suffix in (CALIBRATION_SUFFIX, EDITS_SUFFIX):
                model.path.with_name(name + suffix).unlink(missing_ok=True)
            sync_folder(self.models)
        return model

    def check_removable(self, name: str) -> None:
        """Refuse to remove what cannot be.

        Raises:
            ModelNotFoundError: there is no such model.
            RequestError: the built-in model.
        """
        if name == DEMO_NAME:
            raise RequestError("the demo model is part of the program and cannot be removed")
        self.get(name)

    def check_free(self, name: str) -> None:
        """Refuse a name that is in use.

        Raises:
            RequestError: it is.
        """
        if self._file(name).exists():
            raise RequestError(
                f"a model named {name!r} is in the store already; "
                "choose another name with --name, or pass --replace"
            )

    def _file(self, name: str) -> Path:
        return self.models / f"{name}.gguf"

    def _record(self, name: str) -> Path:
        return self.models / f"{name}.json"

    def _read(self, name: str) -> StoredModel:
        record = read_json(self._record(name))
        added = record.get("added", 0.0)
        return StoredModel(
            name,
            self._file(name),
            str(record.get("source", "")),
            str(record.get("sha256", "")),
            float(added) if isinstance(added, int | float) else 0.0,
        )

    def _hint(self, name: str) -> str:
        names = [model.name for model in self]
        close = difflib.get_close_matches(name, names, n=1)
        if close:
            return f"; did you mean {close[0]!r}?"
        return "; `edgert models list` shows what there is, `edgert models pull` fetches more"


def check_name(name: str) -> None:
    """Refuse a name that is no plain file name.

    Raises:
        RequestError: it is not, or it is the built-in model's.
    """
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{name!r} is no model name; use letters, digits, '.', '_' and '-', at most 128, "
            "a letter or a digit first"
        )
    if name == DEMO_NAME:
        raise RequestError(f"{DEMO_NAME!r} is the built-in model's name; choose another with --name")


def name_of(file_name: str) -> str:
    """The store name that a file gets by default."""
    stem = file_name[: -len(".gguf")] if file_name.lower().endswith(".gguf") else file_name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:128] or "model"


def _link(path: Path, target: Path) -> bool:
    try:
        os.link(path.resolve(), target)
    except OSError:
        return False  # another file system, or one without links
    return True


def _copy(path: Path, target: Path, progress: Progress) -> None:
    size, done = path.stat().st_size, 0
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise RequestError(
            f"{path} has {size / 1e6:.0f} MB, but {free / 1e6:.0f} MB are free in {target.parent}; "
            "remove models (edgert models rm) or set EDGERT_HOME to a folder on a larger disk"
        )
    with path.open("rb") as original, target.open("wb") as file:
        while chunk := original.read(CHUNK):
            file.write(chunk)
            done += len(chunk)
            progress(done, size)
        file.flush()
        os.fsync(file.fileno())
    if done != size:
        raise ModelFileError(f"{path} changed while it was copied ({done} of {size} bytes); try again")
