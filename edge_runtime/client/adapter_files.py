"""An adapter's files at the client's: found before they are sent, and in place once they came as a whole."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import BinaryIO

from edge_runtime.client.types import AdapterFormat
from edge_runtime.errors import AdapterFileError, RequestError

_GGUF = "adapter.gguf"
_PEFT = ("adapter_config.json", "adapter_model.safetensors")


def form_of(path: Path, form: AdapterFormat | None) -> AdapterFormat:
    """The form of an adapter: what is wanted, or what its path looks like.

    Raises:
        RequestError: there is no such form.
    """
    if form is None:
        return "gguf" if path.suffix.lower() == ".gguf" or path.is_file() else "peft"
    if form not in ("gguf", "peft"):
        raise RequestError("form is neither 'gguf' nor 'peft'")
    return form


def adapter_files(path: Path, form: AdapterFormat | None) -> dict[str, Path]:
    """The files of an adapter: what the daemon calls each, and where it is.

    Raises:
        AdapterFileError: one is missing.
    """
    files = {_GGUF: path} if form_of(path, form) == "gguf" else {name: path / name for name in _PEFT}
    for name, file in files.items():
        if not file.is_file():
            needed = "a GGUF file" if name == _GGUF else f"a folder with {' and '.join(_PEFT)}"
            raise AdapterFileError(f"{file} is not there; needed is {needed}")
    return files


class AdapterWriter:
    """Takes an adapter's files; leaving it without an error puts them in place.

    Args:
        path: a file, or for PEFT a folder.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, form: AdapterFormat) -> None:
        self._path = path
        self._form = form
        self._file: BinaryIO | None = None
        self._names: list[str] = []
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        self._folder = TemporaryDirectory(prefix=".edgert-", dir=path.absolute().parent)

    def take(self, name: str, content: bytes) -> None:
        """The next piece; with the name of the file that begins with it."""
        if name:
            self._close()
            if name != Path(name).name:
                raise AdapterFileError(f"the daemon sent a file of the name {name[:80]!r}")
            self._names.append(name)
            self._file = (Path(self._folder.name) / name).open("wb")
        if self._file is not None:
            self._file.write(content)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> AdapterWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        with self._folder as folder:
            if kind is not None:
                return
            for name in self._names:
                if self._form == "peft":
                    self._path.mkdir(exist_ok=True)
                target = self._path if self._form == "gguf" else self._path / name
                (Path(folder) / name).replace(target)
