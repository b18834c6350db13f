"""Weights packed for one CPU: the record beside them, which a runner reads and a build writes.

ONNX Runtime's int8 kernels read weights in an order of their own, which depends on the CPU. Packed at
load, that would be a private copy in each session. ``bundle/engines/ort-<version>-<cpu>/`` holds them
packed, in a file that all sessions map, and the step graphs that point into it; paths in these graphs
begin at the bundle's folder. A session packs each weight once more and takes the mapped one in its
place where both have one hash, so weights packed for another CPU would not be wrong, only not used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from l2c_export.core.bundle import WEIGHTS, Bundle, File, Manifest, digested, leaves_folder
from l2c_export.core.engines import ENGINES
from l2c_export.core.files import key_of, replacing, sha256
from l2c_export.errors import L2CError

_log = logging.getLogger(__name__)

PACKED = "weights.packed"
PACKED_RECORD = "packed.json"
FORMAT, VERSION = "l2c-packed", 1


@dataclass(frozen=True)
class PackedWeights:
    """What lies in a folder of packed weights.

    Attributes:
        version: Of ONNX Runtime.
        cpu: As :func:`l2c_export.core.cpu.cpu_target` names it.
        source: Digest of what they were made from; see :func:`packed_source`.
        packed_bytes: Of the packed weights, without the unpacked ones beside them.
        graphs: Name of each graph that reads them to its file.
        files: File name to size and digest, of everything in the folder but the record.
    """

    version: str
    cpu: str
    source: str
    packed_bytes: int
    graphs: dict[str, str]
    files: dict[str, File]

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return packed_folder(self.version, self.cpu)

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file.bytes for file in self.files.values())

    def check_file(self, bundle: Bundle, name: str) -> Path:
        """Path of a file, once it is compared with its digest.

        Raises:
            L2CError: It is missing or is not what was made.
        """
        path, entry = bundle.path / ENGINES / self.folder / name, self.files[name]
        again = f"pack the weights again: l2c-export engines {bundle.path} --backend ort"
        try:
            if path.stat().st_size == entry.bytes and sha256(path) == entry.sha256:
                return path
        except OSError as error:
            raise L2CError(f"cannot read {path}: {error.strerror}; {again}") from None
        raise L2CError(f"{path} does not match its digest; {again}")


def packed_folder(version: str, cpu: str) -> str:
    """Name of the folder for a version of ONNX Runtime and a CPU."""
    return f"ort-{version}-{cpu}"


def packable_graphs(manifest: Manifest) -> tuple[str, ...]:
    """Names of the graphs that run once a call, whose weights are worth packing."""
    return tuple(dict.fromkeys((*manifest.step_graphs(), manifest.uncached)))


def packed_source(manifest: Manifest, version: str, cpu: str) -> str:
    """Digest of what packed weights are made from: graphs, weights, ONNX Runtime and the CPU."""
    files = {graph: manifest.graphs[graph].file for graph in packable_graphs(manifest)}
    digests = {graph: manifest.files[name].sha256 for graph, name in files.items()}
    return key_of(VERSION, digests, manifest.files[WEIGHTS].sha256, version, cpu)


def find_packed(bundle: Bundle) -> list[PackedWeights]:
    """All packed weights in a bundle whose record is intact, stale ones too, by name."""
    records = sorted((bundle.path / ENGINES).glob(f"*/{PACKED_RECORD}"))
    return [packed for path in records if (packed := _read(path)) is not None]


def fitting_packed(bundle: Bundle, version: str, cpu: str) -> PackedWeights | None:
    """A bundle's packed weights for a version of ONNX Runtime and a CPU; None if none fit."""
    for packed in find_packed(bundle):
        misfit = packed_misfit(packed, bundle, version, cpu)
        if misfit is None:
            return packed
        _log.info("%s: %s", packed.folder, misfit)
    return None


def packed_misfit(packed: PackedWeights, bundle: Bundle, version: str, cpu: str) -> str | None:
    """Why packed weights are not used here; None where they are."""
    if packed.version != version:
        return f"packed by onnxruntime {packed.version}, this machine has {version}"
    if packed.cpu != cpu:
        return f"packed for {packed.cpu}, this CPU is {cpu}"
    if packed.source != packed_source(bundle.manifest, version, cpu):
        return f"packed from another bundle; pack again: l2c-export engines {bundle.path} --backend ort"
    return None


def write_packed(folder: Path, packed: PackedWeights) -> None:
    """Write ``packed.json``; the last act of a build."""
    with replacing(folder / PACKED_RECORD, durable=True) as temporary:
        temporary.write_text(_serialise(packed), encoding="utf-8")


def _serialise(packed: PackedWeights) -> str:
    return digested({"format": FORMAT, "version": VERSION, "packed": asdict(packed)})


def _read(path: Path) -> PackedWeights | None:
    """A record; None where there is none, or it is damaged or of another release."""
    try:
        text = path.read_text(encoding="utf-8")
        packed = _parse(json.loads(text)["packed"])
    except OSError:
        return None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        packed = None
    if packed is None or _serialise(packed) != text or not _is_sound(packed, path.parent.name):
        _log.warning("%s is damaged or of another release: its weights are not used", path)
        return None
    return packed


def _parse(data: Mapping[str, Any]) -> PackedWeights:
    return PackedWeights(
        **{**data, "files": {name: File(**entry) for name, entry in data["files"].items()}}
    )


def _is_sound(packed: PackedWeights, folder: str) -> bool:
    names: Iterable[str] = (PACKED, *packed.graphs.values())
    return packed.folder == folder and all(
        name in packed.files and not leaves_folder(name) for name in names
    )
