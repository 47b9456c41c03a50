"""A model's weights as ggml tensors: repacked for the CPU's fastest kernels, or left in the mapped file.

The CPU backend's repack buffer interleaves the rows of a matrix so that one pass serves eight of them.
What it takes is copied there, tensor by tensor, and the file's pages are given back at once, so that
memory never holds a model twice. Everything else stays in the file mapping.

Matrices that multiply the same vector and have one type are laid out as one: the vector is then quantized
once instead of two or three times. `attn_qkv` has its parts one after the other. `ffn_gate_up` takes
`INTERLEAVED` rows of gate, then as many of up, and so on: whatever group of neurons is chosen, its gate and
up lie side by side, and are read in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from edge_runtime.engine import ggml, memory
from edge_runtime.engine.architecture import Hyperparameters
from edge_runtime.engine.gguf import GGUFFile, TensorRecord
from edge_runtime.errors import OutOfMemoryError

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
# Neurons whose gate rows, then up rows, lie together in `ffn_gate_up`: the block of most quantizations.
INTERLEAVED = 32
_QKV = ("attn_q", "attn_k", "attn_v")
_GATE_UP = ("ffn_gate", "ffn_up")
_ATTENTION = (*_QKV, "attn_output")
_MULTIPLIED = (*_ATTENTION, *_GATE_UP, "ffn_down")


class TensorContext:
    """A ggml context for tensor descriptions (no values)."""

    def __init__(self, n_tensors: int) -> None:
        size = ggml.tensor_overhead() * n_tensors
        self.pointer: int = ggml.init(ggml.InitParams(size, None, True))
        if not self.pointer:
            raise OutOfMemoryError(f"no memory for {n_tensors} tensor descriptions ({size} bytes)")

    def free(self) -> None:
        """Free the descriptions; safe to call twice."""
        if self.pointer:
            ggml.free(self.pointer)
            self.pointer = 0


def address_of(values: memoryview) -> int:
    """Address of a read-only buffer's first byte."""
    return int(np.frombuffer(values, np.uint8).ctypes.data)


def allocate(buffer_type: int, size: int, purpose: str) -> int:
    """A ggml buffer of `size` bytes.

    Raises:
        OutOfMemoryError: the system refused; `purpose` says in the message what it was for.
    """
    buffer = ggml.backend_buft_alloc_buffer(buffer_type, size)
    if not buffer:
        raise OutOfMemoryError(
            f"{size / 1e6:.0f} MB for {purpose} could not be allocated; close other programs, choose a "
            'smaller model or quantization, or load with weights="mmap"'
        )
    return int(buffer)


class RepackedTypes:
    """Answers which matrices the repack buffer takes on this CPU."""

    def __init__(self) -> None:
        self.buffer_type = ggml.repack_buffer_type()
        self._known: dict[tuple[int, int], bool] = {}

    def takes(self, ggml_type: int, n_rows: int) -> bool:
        """Whether a matrix of this type with `n_rows` rows (ne[1]) can be repacked."""
        key = (ggml_type, n_rows)
        if self.buffer_type and key not in self._known:
            self._known[key] = self._probe(ggml_type, n_rows)
        return self._known.get(key, False)

    def _probe(self, ggml_type: int, n_rows: int) -> bool:
        # The backend decides by type and row count, given a tensor that lies in such a buffer.
        if n_rows < 2:
            return False
        width = int(ggml.blck_size(ggml_type))
        context = TensorContext(4)
        buffer = allocate(
            self.buffer_type or 0, int(ggml.row_size(ggml_type, width)) * n_rows + 64, "a probe"
        )
        try:
            matrix = ggml.new_tensor_2d(context.pointer, ggml_type, width, n_rows)
            ggml.backend_tensor_alloc(buffer, matrix, ggml.backend_buffer_get_base(buffer))
            vector = ggml.new_tensor_2d(context.pointer, ggml.TYPE_F32, width, 1)
            product = ggml.mul_mat(context.pointer, matrix, vector)
            device = ggml.backend_reg_dev_get(ggml.backend_cpu_reg(), 0)
            return bool(ggml.backend_dev_supports_op(device, product))
        finally:
            ggml.backend_buffer_free(buffer)
            context.free()


@dataclass(frozen=True, slots=True)
class _Placement:
    """Tensors of the file that are repacked as one matrix: `block` rows of each in turn, 0 for all rows."""

    name: str
    parts: tuple[TensorRecord, ...]
    block: int = 0

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


@dataclass(frozen=True, slots=True)
class _Copy:
    """One tensor on its way from the file to the repack buffer: `block` rows go to every `stride` bytes."""

    record: TensorRecord
    source: memoryview
    address: int
    block: int
    stride: int

    def run(self, buffer: int) -> int:
        """Copy, give the file's pages back, and return the number of bytes."""
        source = address_of(self.source)
        memory.read_ahead(source, self.record.size)
        width, n_rows = self.record.shape
        size = self.block * (self.record.size // n_rows)
        context = TensorContext(n_rows // self.block)
        for number in range(n_rows // self.block):
            rows = ggml.new_tensor_2d(context.pointer, self.record.type, width, self.block)
            ggml.backend_tensor_alloc(buffer, rows, self.address + number * self.stride)
            ggml.backend_tensor_set(rows, source + number * size, 0, size)
        context.free()
        if self.record.name != EMBEDDING:
            memory.drop_pages(source, self.record.size)
        return self.record.size


class Weights:
    """All weights of one model, by their GGUF names, plus the fused ones.

    Args:
        gguf: the open file; must stay open as long as this object lives.
        repack: False leaves every tensor in the mapped file.
        ffn, head: False leaves the FFNs' matrices, or the LM head, there.
        threads: used for repacking.
        progress: called with the share done, 0 .. 1.

    Raises:
        OutOfMemoryError: not enough memory for the repacked copy.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        hyperparameters: Hyperparameters,
        *,
        repack: bool = True,
        ffn: bool = True,
        head: bool = True,
        threads: int = 1,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self._gguf = gguf
        self._multiplied = _MULTIPLIED if ffn else _ATTENTION
        self._repacks_head = head
        self._tensors: dict[str, int] = {}
        self._repacked: set[str] = set()
        self._buffers: list[int] = []
        self._huge_pages: memory.HugePages | None = None
        self.repacked_bytes = 0
        self.repack_types = RepackedTypes() if repack else None
        placements = self._placements(hyperparameters) if repack else []
        self._context = TensorContext(len(gguf.tensors) + 4 * len(placements) + 8)
        try:
            self._map_file()
            if repack:
                self._read_ahead_mapped(placements)
            self._repack(placements, threads, progress or (lambda share: None))
        except BaseException:
            self.close()
            raise

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> int:
        return self._tensors[name]

    def get(self, name: str) -> int | None:
        """The tensor's pointer, or None where the model has no such tensor."""
        return self._tensors.get(name)

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors in the file."""
        return self._gguf.tensors.keys()

    def record(self, name: str) -> TensorRecord:
        """The tensor's type and shape in the file."""
        return self._gguf.tensors[name]

    def bytes_in_file(self, name: str) -> memoryview:
        """The tensor's values as they lie in the file."""
        return self._gguf.tensor_bytes(name)

    def is_repacked(self, name: str) -> bool:
        """Whether the tensor of this name lies in the repack buffer."""
        return name in self._repacked

    @property
    def mapped_bytes(self) -> int:
        """Bytes of weights that are read from the mapped file."""
        stays = (record for name, record in self._gguf.tensors.items() if name not in self._repacked)
        return sum(record.size for record in stays)

    def _placements(self, hyperparameters: Hyperparameters) -> list[_Placement]:
        found = []
        for layer in range(hyperparameters.n_layers):
            found += self._layer_placements(layer)
        tensors = self._gguf.tensors
        # A tied head multiplies with the embedding matrix; looking tokens up needs its plain form too.
        head = tensors.get(HEAD, tensors[EMBEDDING])
        if self._repacks_head and self._can_repack(head):
            found.append(_Placement(HEAD, (head,)))
        return found

    def _layer_placements(self, layer: int) -> list[_Placement]:
        tensors = self._gguf.tensors
        alone = {kind: tensors[f"blk.{layer}.{kind}.weight"] for kind in self._multiplied}
        alone = {kind: record for kind, record in alone.items() if self._can_repack(record)}

        def together(name: str, kinds: tuple[str, ...], block: int = 0) -> list[_Placement]:
            parts = tuple(alone.pop(kind) for kind in kinds)
            return [_Placement(f"blk.{layer}.{name}.weight", parts, block)]

        found = []
        if self._is_one_type(alone, _QKV):
            found += together("attn_qkv", _QKV)
        biased = any(f"blk.{layer}.{kind}.bias" in tensors for kind in _GATE_UP)
        if self._is_one_type(alone, _GATE_UP) and not alone["ffn_gate"].shape[1] % INTERLEAVED and not biased:
            found += together("ffn_gate_up", _GATE_UP, INTERLEAVED)
        found += [_Placement(record.name, (record,)) for record in alone.values()]
        return found

    @staticmethod
    def _is_one_type(repackable: Mapping[str, TensorRecord], kinds: Collection[str]) -> bool:
        types = {repackable[kind].type if kind in repackable else None for kind in kinds}
        return None not in types and len(types) == 1

    def _can_repack(self, record: TensorRecord) -> bool:
        assert self.repack_types is not None
        return len(record.shape) == 2 and self.repack_types.takes(record.type, record.shape[1])

    def _map_file(self) -> None:
        """Describe every tensor where it lies in the mapped file."""
        buffer = None
        for name, record in self._gguf.tensors.items():
            values = self._gguf.tensor_bytes(name)
            address = address_of(values)
            if buffer is None:
                self._base = address - record.offset
                last = max(self._gguf.tensors.values(), key=lambda tensor: tensor.offset)
                buffer = ggml.backend_cpu_buffer_from_ptr(self._base, last.offset + last.size)
                self._buffers.append(buffer)
            shape = (*record.shape, 1, 1)[:3]
            tensor = ggml.new_tensor_3d(self._context.pointer, record.type, *shape)
            ggml.backend_tensor_alloc(buffer, tensor, address)
            self._tensors[name] = tensor

    def _read_ahead_mapped(self, placements: list[_Placement]) -> None:
        """Let the kernel read what stays in the file while the rest is being repacked."""
        copied = {part.name for placement in placements for part in placement.parts}
        for name, record in self._gguf.tensors.items():
            if name not in copied and (".ffn_" not in name or "ffn_down" in self._multiplied):
                memory.read_ahead(self._base + record.offset, record.size)

    def _repack(self, placements: list[_Placement], threads: int, progress: Callable[[float], None]) -> None:
        if not placements or self.repack_types is None:
            return
        buffer_type = self.repack_types.buffer_type
        assert buffer_type is not None
        alignment = int(ggml.backend_buft_get_alignment(buffer_type))
        total = sum(-(-placement.size // alignment) * alignment for placement in placements)
        buffer = allocate(buffer_type, total, "repacked weights")
        self._buffers.append(buffer)
        self.repacked_bytes = total
        base = int(ggml.backend_buffer_get_base(buffer))

        copies = []
        offset = 0
        for placement in placements:
            copies += self._place(placement, buffer, base + offset)
            offset += -(-placement.size // alignment) * alignment

        done = 0
        with ThreadPoolExecutor(threads) as pool:
            for size in pool.map(lambda copy: copy.run(buffer), copies):
                done += size
                progress(done / total)
        self._huge_pages = memory.HugePages(base, total)

    def _place(self, placement: _Placement, buffer: int, address: int) -> list[_Copy]:
        """Describe a placement's matrix at `address`; returns what is to be copied where."""
        first = placement.parts[0]
        n_rows = sum(part.shape[1] for part in placement.parts)
        whole = ggml.new_tensor_2d(self._context.pointer, first.type, first.shape[0], n_rows)
        ggml.backend_tensor_alloc(buffer, whole, address)
        self._tensors[placement.name] = whole
        self._repacked.add(placement.name)
        copies = []
        for part in placement.parts:
            self._repacked.add(part.name)
            block = placement.block or part.shape[1]
            row = part.size // part.shape[1]
            stride = row * (len(placement.parts) * block if placement.block else block)
            copies.append(_Copy(part, self._gguf.tensor_bytes(part.name), address, block, stride))
            address += block * row
        return copies

    def close(self) -> None:
        """Free all buffers; the weights must not be used any more. Safe to call twice."""
        if self._huge_pages is not None:
            self._huge_pages.stop()
        for buffer in self._buffers:
            ggml.backend_buffer_free(buffer)
        self._buffers.clear()
        self._context.free()
