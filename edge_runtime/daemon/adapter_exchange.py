"""Adapters as files: written for other programs, read from them, and cut into pieces for a stream."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edge_runtime.errors import AdapterFileError, RequestError
from edge_runtime.model_store.identity import model_identity

if TYPE_CHECKING:
    from edge_runtime.engine.adapters import LowRank
    from edge_runtime.personalize.records import Record
    from edge_runtime.personalize.store import AdapterStore

AdapterFormat = Literal["gguf", "peft"]

GGUF_NAME = "adapter.gguf"
PIECE_BYTES = 1 << 18
MAX_BYTES = 1 << 30  # of all files of an adapter


def names_of(form: AdapterFormat) -> tuple[str, ...]:
    """The files of an adapter."""
    from edge_runtime.personalize.peft import CONFIG_NAME, WEIGHTS_NAME

    return (GGUF_NAME,) if form == "gguf" else (CONFIG_NAME, WEIGHTS_NAME)


def check_one_model(records: Sequence[Record]) -> None:
    """Whether adapters can be one file.

    Raises:
        RequestError: there is none, or they are of different models.
    """
    if not records:
        raise RequestError("no edit is named; give the names or numbers of those to export")
    if len({record.identity for record in records}) > 1:
        models = ", ".join(dict.fromkeys(record.model for record in records))
        raise RequestError(f"these change different models ({models}); export those of each model apart")


def write_adapters(
    store: AdapterStore, records: Sequence[Record], model: Path, form: AdapterFormat, folder: Path
) -> list[Path]:
    """Write adapters of one model, added up, as one; returns the files.

    Args:
        model: the file of their model.
        folder: that the files of :func:`names_of` are put into.

    Raises:
        RequestError: one was not solved, or the file is of another model.
    """
    from edge_runtime.engine.gguf import GGUFFile
    from edge_runtime.personalize.lora_gguf import write_lora_gguf
    from edge_runtime.personalize.peft import write_peft

    check_one_model(records)
    changes: list[LowRank] = []
    for record in records:
        own = store.changes(record.id)
        if not own:
            raise RequestError(
                f"{record.name} is {record.state} and has changed nothing; there is no adapter"
            )
        changes += own
    with GGUFFile(model) as gguf:
        if model_identity(gguf) != records[0].identity:
            raise RequestError(f"{records[0].model} is another file now than when {records[0].name} was made")
        if form == "gguf":
            name = "+".join(record.name for record in records)
            write_lora_gguf(folder / GGUF_NAME, changes, gguf, name)
        else:
            write_peft(folder, changes, gguf)
    return [folder / name for name in names_of(form)]


def read_adapter(
    store: AdapterStore, name: str, model: tuple[str, Path], form: AdapterFormat, folder: Path
) -> Record:
    """Keep the adapter whose files are in a folder, and apply it.

    Args:
        model: its name, and its file.

    Raises:
        AdapterFileError: the files are damaged or of another model. RequestError: the name cannot be used.
    """
    from edge_runtime.engine.gguf import GGUFFile
    from edge_runtime.personalize.lora_gguf import read_lora_gguf
    from edge_runtime.personalize.peft import read_peft

    with GGUFFile(model[1]) as gguf:
        try:
            changes = read_lora_gguf(folder / GGUF_NAME, gguf) if form == "gguf" else read_peft(folder, gguf)
        except AdapterFileError as error:  # where it lies for a moment helps nobody
            raise AdapterFileError(str(error).replace(f"{folder}{os.sep}", "")) from None
        return store.import_adapter(name, model[0], model_identity(gguf), changes, {"format": form})


# --- streams ------------------------------------------------------------------------------------


def pieces_of(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Files in pieces: the name with the first piece of each, then empty."""
    for path in files:
        name = path.name
        with path.open("rb") as file:
            while (piece := file.read(PIECE_BYTES)) or name:
                yield name, piece
                name = ""


class Gathering:
    """Takes in the pieces of an adapter's files.

    Args:
        folder: that the files are put into.
        names: that they have; each must come once.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder = folder
        self._missing = list(names)
        self._file: Path | None = None
        self._size = 0

    def take(self, name: str, content: bytes) -> None:
        """The next piece.

        Args:
            name: of the file that begins with it; empty where it goes on.

        Raises:
            AdapterFileError: a file that does not belong to such an adapter, or too much of it.
        """
        if name:
            if name not in self._missing:
                wanted = ", ".join(self._missing) or "no further one"
                raise AdapterFileError(f"a file {name[:80]!r} came; wanted is {wanted}")
            self._missing.remove(name)
            self._file = self._folder / name
            self._file.write_bytes(b"")
        if self._file is None:
            raise AdapterFileError("content came before the name of its file")
        self._size += len(content)
        if self._size > MAX_BYTES:
            raise AdapterFileError(f"the adapter has more than {MAX_BYTES} bytes; it is too large")
        with self._file.open("ab") as file:
            file.write(content)

    def end(self) -> None:
        """Nothing more comes.

        Raises:
            AdapterFileError: a file is missing.
        """
        if self._missing:
            raise AdapterFileError(f"the adapter ended without {', '.join(self._missing)}")
