"""Weights of an int8 bundle, packed as ONNX Runtime's kernels on this machine's CPU read them.

ONNX Runtime packs while it makes a session, and writes what it packed beside the graph that it saves.
That graph is its own, with fused operators; only the packed weights are taken from it, under the key by
which a session finds them, and the step graphs of the bundle are made to point at them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import onnx
import onnxruntime as ort  # type: ignore[import-untyped]

from l2c_export.core.bundle import WEIGHTS, Bundle, File
from l2c_export.core.cpu import cpu_target
from l2c_export.core.engines import ENGINES
from l2c_export.core.files import remove_partial, replacing, sha256
from l2c_export.core.packed import (
    PACKED,
    PACKED_RECORD,
    PackedWeights,
    fitting_packed,
    packable_graphs,
    packed_folder,
    packed_source,
    write_packed,
)
from l2c_export.engines.build import own
from l2c_export.errors import L2CError, UnsupportedError

Progress = Callable[[str, int, int], None]

_DUMP = ".l2c-dump"
_PAGE = 4096
_ENTRY = "prepacked_"  # "prepacked_0" … in a tensor's external data are "key|offset;length;checksum|…"

_Blob = tuple[str, list[tuple[int, ...]]]
"""A packed weight: ONNX Runtime's key, and offset, length and checksum of each of its parts."""


class PackedBuild:
    """Packs the weights of one bundle: first what that will cost, then they themselves.

    Attributes:
        bundle: The bundle.
        version: Of ONNX Runtime.
        cpu: This machine's, as :func:`l2c_export.core.cpu.cpu_target` names it.
        products: Bytes of the weights that will be packed, which take as much again packed.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Check the bundle.

        Raises:
            L2CError: The bundle is not what was built.
            UnsupportedError: Packing gains nothing for its precision.
        """
        manifest = bundle.manifest
        if manifest.precision != "int8":
            raise UnsupportedError(
                f"{bundle.path} is {manifest.precision}: a CPU gains nothing from packing its weights; "
                "run it as it is, or build with --precision int8"
            )
        self.bundle = bundle
        self.version, self.cpu = ort.__version__, cpu_target()
        self.path = bundle.path / ENGINES / packed_folder(self.version, self.cpu)
        self.graphs = packable_graphs(manifest)
        bundle.check_files({WEIGHTS, *(manifest.graphs[graph].file for graph in self.graphs)})
        self.products = sum(_products(bundle, self.graphs).values())

    def run(self, progress: Progress = lambda *_: None) -> PackedWeights:
        """Pack what is not there yet.

        Raises:
            L2CError: ONNX Runtime fails, another build is at work, or the folder cannot be written.
            UnsupportedError: This ONNX Runtime packs nothing on this machine.
        """
        with own(self.bundle.path):
            made = self._kept() or self._pack(progress)
            progress("packed weights", len(self.graphs), len(self.graphs))
            return made

    def _kept(self) -> PackedWeights | None:
        """What an earlier build made, if it is whole."""
        if old := fitting_packed(self.bundle, self.version, self.cpu):
            with suppress(L2CError):
                for name in old.files:
                    old.check_file(self.bundle, name)
                return old
        return None

    def _pack(self, progress: Progress) -> PackedWeights:
        self.path.mkdir(parents=True, exist_ok=True)
        remove_partial(self.path)
        (self.path / PACKED_RECORD).unlink(missing_ok=True)
        graphs, packed_bytes = self._write(progress)
        files = {name: self.path / name for name in (PACKED, *graphs.values())}
        made = PackedWeights(
            self.version,
            self.cpu,
            packed_source(self.bundle.manifest, self.version, self.cpu),
            packed_bytes,
            graphs,
            {name: File(path.stat().st_size, sha256(path)) for name, path in files.items()},
        )
        write_packed(self.path, made)
        for stale in {*self.path.iterdir()} - {*files.values(), self.path / PACKED_RECORD}:
            stale.unlink()
        return made

    def _write(self, progress: Progress) -> tuple[dict[str, str], int]:
        """Write the file of weights and the graphs; their names, and the bytes of packed weights."""
        graphs: dict[str, str] = {}
        with (
            replacing(self.path / PACKED) as path,
            path.open("wb") as file,
            (self.bundle.path / WEIGHTS).open("rb") as weights,
        ):
            packing = _PackedFile(file, weights, (self.path / PACKED).relative_to(self.bundle.path))
            for i, graph in enumerate(self.graphs):
                progress(graph, i, len(self.graphs))
                with _dump(self.bundle.file(graph), self.path / _DUMP) as (optimised, data):
                    model = packing.pointed(self.bundle.file(graph), optimised, data)
                if model is not None:
                    graphs[graph] = self.bundle.manifest.graphs[graph].file
                    with replacing(self.path / graphs[graph]) as temporary:
                        temporary.write_bytes(model.SerializeToString(deterministic=True))
            if not packing.packed_bytes:
                raise UnsupportedError(f"onnxruntime {self.version} packs no weights on {self.cpu}")
        return graphs, packing.packed_bytes


class _PackedFile:
    """The file in the making: weights and their packed forms, each from the beginning of a page.

    Both are in one file because external data in ONNX has one location for a tensor and all that is
    stored with it; the weight itself is what a session packs to find the packed form.
    """

    def __init__(self, file: BinaryIO, weights: BinaryIO, location: Path) -> None:
        self._file, self._weights, self._location = file, weights, location.as_posix()
        self._offsets: dict[str, int] = {}
        self._entries: dict[tuple[str, str], str] = {}
        self.packed_bytes = 0

    def pointed(self, path: Path, optimised: onnx.ModelProto, data: BinaryIO) -> onnx.ModelProto | None:
        """A graph of the bundle that points at packed weights; None where it has none to point at.

        Args:
            path: Of the graph.
            optimised: The graph that ONNX Runtime made of it.
            data: Its weights.
        """
        found = {
            tensor.name: blobs for tensor in optimised.graph.initializer if (blobs := _blobs(tensor))
        }
        model = onnx.load(path, load_external_data=False)
        used = False
        for tensor in model.graph.initializer:
            if tensor.name in found and tensor.external_data:
                entries = [self._blob(tensor.name, blob, data) for blob in found[tensor.name]]
                self._point(tensor, entries)
                used = True
        return model if used else None

    def _point(self, tensor: onnx.TensorProto, entries: list[str]) -> None:
        external = {entry.key: entry for entry in tensor.external_data}
        if tensor.name not in self._offsets:
            self._weights.seek(int(external["offset"].value))
            self._offsets[tensor.name] = self._put(self._weights.read(int(external["length"].value)))
        external["location"].value = self._location
        external["offset"].value = str(self._offsets[tensor.name])
        for i, value in enumerate(entries):
            tensor.external_data.add(key=f"{_ENTRY}{i}", value=value)

    def _blob(self, name: str, blob: _Blob, data: BinaryIO) -> str:
        """The entry of a packed weight, which is written where no graph before had it."""
        key, parts = blob
        if (name, key) not in self._entries:
            entry = [key]
            for offset, length, checksum in parts:
                data.seek(offset)
                entry.append(f"{self._put(data.read(length))};{length};{checksum}")
                self.packed_bytes += length
            self._entries[name, key] = "|".join(entry)
        return self._entries[name, key]

    def _put(self, data: bytes) -> int:
        self._file.write(bytes(-self._file.tell() % _PAGE))
        offset = self._file.tell()
        self._file.write(data)
        return offset


def _blobs(tensor: onnx.TensorProto) -> list[_Blob]:
    """What ONNX Runtime packed of a weight, in the order of its keys."""
    entries = (e.value.split("|") for e in tensor.external_data if e.key.startswith(_ENTRY))
    return [
        (key, [tuple(map(int, part.split(";"))) for part in parts]) for key, *parts in sorted(entries)
    ]


@contextmanager
def _dump(graph: Path, folder: Path) -> Iterator[tuple[onnx.ModelProto, BinaryIO]]:
    """What ONNX Runtime makes of a graph, and its weights with the packed ones among them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(folder / "graph.onnx")
    for key, value in {
        "session.optimized_model_external_initializers_file_name": "weights",
        "session.optimized_model_external_initializers_min_size_in_bytes": "0",
        "session.save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(key, value)
    try:
        try:
            ort.InferenceSession(str(graph), options, ["CPUExecutionProvider"], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's own exceptions have no other common class
            said = " ".join(str(error).split())
            raise L2CError(f"onnxruntime {ort.__version__} cannot pack {graph}: {said}") from None
        with (folder / "weights").open("rb") as data:
            yield onnx.load(folder / "graph.onnx", load_external_data=False), data
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _products(bundle: Bundle, graphs: Iterable[str]) -> dict[str, int]:
    """Name to bytes of the weights that are multiplied in int8."""
    sizes: dict[str, int] = {}
    for graph in graphs:
        model = onnx.load(bundle.file(graph), load_external_data=False).graph
        multiplied = {node.input[1] for node in model.node if node.op_type == "MatMulInteger"}
        sizes |= {t.name: math.prod(t.dims) for t in model.initializer if t.name in multiplied}
    return sizes
