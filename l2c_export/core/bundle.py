"""The bundle: a folder whose manifest, ``l2c.json``, is the program that a runner executes.

The manifest says for each call which graph runs, at which timestep, which buffers are bound to which
slots, and the coefficients of the sampler's update. It refuses unknown versions and anything that is
not byte for byte what was written; every file it lists is checked against its digest before use.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from l2c_export.core.files import replacing, sha256
from l2c_export.core.sampler_call import Update, update_fault
from l2c_export.errors import L2CError, UnsupportedError

MANIFEST = "l2c.json"
WEIGHTS = "weights.safetensors"
FORMAT = "l2c-bundle"
VERSION = 2

CONDITIONING = "conditioning"
"""Name of the graph that does not depend on x, of its output, and of the step graphs' input."""

Dimension = int | str
"""A size, ``"batch"`` (latents), ``"rows"`` (latents, times two with guidance), ``"n"`` (any), or one
of these times a number: ``"rows*256"``."""


@dataclass(frozen=True)
class Value:
    """A graph's input or output."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]

    @classmethod
    def of(cls, value: Any) -> Value:
        """The same of an ``onnx_ir.Value`` that has a type."""
        sizes = tuple(d if isinstance(d, int) else str(d) for d in value.shape or ())
        return cls(str(value.name), str(value.dtype.numpy()), sizes)

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with numbers for the names of its dimensions."""
        parts = [("", d) if isinstance(d, int) else multiple(d) for d in self.shape]
        return tuple(times * sizes[name] if name else times for name, times in parts)


def multiple(dimension: str) -> tuple[str, int]:
    """Name and factor of a dimension that varies."""
    name, _, times = dimension.partition("*")
    return name, int(times or 1)


@dataclass(frozen=True)
class Graph:
    """An ONNX file and its interface, in order."""

    file: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True)
class ProgramCall:
    """One call of the program.

    Attributes:
        graph: Name of the step graph.
        timestep: What the network is told.
        update: What becomes of the latent and of what the sampler keeps, see
            :data:`l2c_export.core.sampler_call.Update`.
        reads: Slot to the buffer bound as its input.
        writes: Slot to the buffer bound as its output.
    """

    graph: str
    timestep: float
    update: Update
    reads: dict[str, int]
    writes: dict[str, int]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, computed inside the graphs.

    Attributes:
        scale: The default scale.
        channels: Leading latent channels that are guided.
        null_label: The label of the unconditional rows.
    """

    scale: float
    channels: int
    null_label: int


@dataclass(frozen=True)
class Slots:
    """The cache slots: all have one shape and dtype."""

    names: tuple[str, ...]
    shape: tuple[int, ...]  # of one row
    dtype: str


@dataclass(frozen=True)
class File:
    """A file of the bundle; ``key`` is the content key of what it was made from."""

    bytes: int
    sha256: str
    key: str = ""


@dataclass(frozen=True)
class Manifest:
    """Everything that a runner needs to know.

    Attributes:
        generator: Name and version of the program that wrote it.
        preset: The model's name, if it has one.
        model: The model's configuration.
        weights: Where the weights came from.
        schedule: How the schedule was made, and what it removes.
        sampler: Name of the sampler; its numbers are in the calls.
        stochastic: Whether calls draw noise.
        latent: (C, H, W) of one latent, float32.
        classes: Labels are 0 to ``classes`` - 1.
        batch: Smallest and largest number of latents in one call.
        guidance: None where the graphs have no guidance: one row a latent instead of two.
        precision: A name of :data:`l2c_export.core.precision.PRECISIONS`.
        slots: The cache slots.
        buffers: Number of cache buffers.
        full: The uncut graph's name: every slot is an output, nothing is split off.
        uncached: Name of the step graph that computes everything and writes nothing.
        graphs: Name to graph.
        calls: The program, noisiest call first.
        files: File name to size and digest, for every file but the manifest.
    """

    generator: str
    preset: str | None
    model: dict[str, Any]
    weights: dict[str, Any]
    schedule: dict[str, Any]
    sampler: str
    stochastic: bool
    latent: tuple[int, ...]
    classes: int
    batch: tuple[int, int]
    guidance: Guidance | None
    precision: str
    slots: Slots
    buffers: int
    full: str
    uncached: str
    graphs: dict[str, Graph]
    calls: tuple[ProgramCall, ...]
    files: dict[str, File] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of a call for each latent."""
        return 2 if self.guidance else 1

    @property
    def random_weights(self) -> bool:
        """Whether the weights are random: good for benchmarks, not for pictures."""
        return self.weights.get("kind") == "random"

    def step_graphs(self) -> tuple[str, ...]:
        """Names of the graphs that the calls use, in the order of their first use."""
        return tuple(dict.fromkeys(call.graph for call in self.calls))


@dataclass(frozen=True)
class Bundle:
    """A folder and its manifest."""

    path: Path
    manifest: Manifest

    def file(self, graph: str) -> Path:
        """Path of a graph's ONNX file."""
        return self.path / self.manifest.graphs[graph].file

    def check_files(self, names: Iterable[str] | None = None) -> None:
        """Compare files with their digests, the largest beside the others.

        Raises:
            L2CError: A file is missing or is not what was built.
        """
        chosen = list(self.manifest.files if names is None else names)
        chosen.sort(key=lambda name: -self.manifest.files[name].bytes)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(self._check_file, chosen))

    def _check_file(self, name: str) -> None:
        entry, path = self.manifest.files[name], self.path / name
        try:
            size = path.stat().st_size
            same = size == entry.bytes and sha256(path) == entry.sha256
        except OSError as error:
            raise L2CError(f"bundle {self.path}: cannot read {name}: {error.strerror}") from None
        if size != entry.bytes:
            raise L2CError(
                f"bundle {self.path}: {name} has {size} bytes, the manifest says {entry.bytes}; "
                "copy or build the bundle again"
            )
        if not same:
            raise L2CError(
                f"bundle {self.path}: {name} does not match its digest; copy or build the bundle again"
            )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``l2c.json``; the last act of a build."""
    with replacing(folder / MANIFEST, durable=True) as temporary:
        temporary.write_text(_serialise(manifest), encoding="utf-8")


def _serialise(manifest: Manifest) -> str:
    return digested({"format": FORMAT, "version": VERSION, **asdict(manifest)})


def digested(data: dict[str, Any]) -> str:
    """JSON text whose last entry, ``digest``, is the SHA-256 of the text without it."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(data | {"digest": digest}, indent=1, ensure_ascii=False) + "\n"


def parse_values(entries: Iterable[Mapping[str, Any]]) -> tuple[Value, ...]:
    """Inputs or outputs, from their JSON."""
    return tuple(Value(v["name"], v["dtype"], tuple(v["shape"])) for v in entries)


def read_bundle(path: Path) -> Bundle:
    """Read and check a bundle's manifest; the other files are checked by :meth:`Bundle.check_files`.

    Raises:
        L2CError: There is no bundle, or the manifest was damaged or edited.
        UnsupportedError: Its version is not this release's.
    """
    path = Path(path)
    manifest = path / MANIFEST
    try:
        text = manifest.read_bytes().decode()
        data = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise L2CError(
            f"{path} is not a bundle: there is no {manifest}; make one with: l2c-export build"
        ) from None
    except OSError as error:
        raise L2CError(f"cannot read {manifest}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise L2CError(f"{manifest} is damaged: {error}; copy or build the bundle again") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise L2CError(f"{manifest} is not an l2c-export manifest (format {FORMAT!r})")
    if data.get("version") != VERSION:
        raise UnsupportedError(
            f"{manifest}: manifest version {data.get('version')!r}, this release reads {VERSION}; "
            "build the bundle again or install a matching l2c-export"
        )
    try:
        parsed = _parse(data)
        intact = _serialise(parsed) == text
        if intact:
            _check_program(parsed, str(manifest))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise L2CError(f"{manifest} is damaged ({error!r}); copy or build the bundle again") from None
    if not intact:
        raise L2CError(
            f"{manifest} does not match its own digest: it was damaged or edited; "
            "copy or build the bundle again"
        )
    return Bundle(path, parsed)


def _parse(data: Mapping[str, Any]) -> Manifest:
    plain = {k: v for k, v in data.items() if k not in {"format", "version", "digest"}}
    slots, guidance = data["slots"], data["guidance"]
    return Manifest(
        **plain
        | {
            "latent": tuple(data["latent"]),
            "batch": tuple(data["batch"]),
            "guidance": Guidance(**guidance) if guidance else None,
            "slots": Slots(tuple(slots["names"]), tuple(slots["shape"]), slots["dtype"]),
            "graphs": {
                name: Graph(g["file"], parse_values(g["inputs"]), parse_values(g["outputs"]))
                for name, g in data["graphs"].items()
            },
            "calls": tuple(ProgramCall(**call) for call in data["calls"]),
            "files": {name: File(**entry) for name, entry in data["files"].items()},
        }
    )


def leaves_folder(name: str) -> bool:
    """Whether a name is not that of a file in a bundle's folder or below it."""
    parts = name.split("/")  # "" where the name begins with a slash, or two stand together
    return any(part in ("", ".", "..") for part in parts) or any(sign in name for sign in "\\:\0")


def _check_program(manifest: Manifest, where: str) -> None:
    """Refuse a program that a runner could not execute as written."""

    def refuse(what: str) -> None:
        raise L2CError(f"{where}: {what}; build the bundle again")

    for name in manifest.files:
        if leaves_folder(name):
            refuse(f"file name {name!r} leaves the bundle")
    for name, graph in manifest.graphs.items():
        if graph.file not in manifest.files:
            refuse(f"graph {name} names the unlisted file {graph.file!r}")
    for name in (manifest.full, manifest.uncached, CONDITIONING, *manifest.step_graphs()):
        if name not in manifest.graphs:
            refuse(f"there is no graph {name!r}")
    if len(manifest.batch) != 2 or not 1 <= manifest.batch[0] <= manifest.batch[1]:
        refuse(f"batch {manifest.batch} is no range")
    if not manifest.calls:
        refuse("the program has no calls")
    held: dict[str, int] = {}
    histories: set[str] = set()
    for i, call in enumerate(manifest.calls):
        if fault := update_fault(call.update, histories, manifest.stochastic):
            refuse(f"call {i} {fault}")
        histories |= call.update.keys()
        if not math.isfinite(call.timestep):
            refuse(f"call {i} has a timestep that is no finite number")
        if unknown := sorted((set(call.reads) | set(call.writes)) - set(manifest.slots.names)):
            refuse(f"call {i} names unknown slots {unknown}")
        if not all(0 <= b < manifest.buffers for b in (*call.reads.values(), *call.writes.values())):
            refuse(f"call {i} names a buffer that does not exist")
        if set(call.reads.values()) & set(call.writes.values()):
            refuse(f"call {i} reads and writes one buffer")
        if len(set(call.writes.values())) != len(call.writes):
            refuse(f"call {i} writes two slots into one buffer")
        graph = manifest.graphs[call.graph]
        for bound, values in ((call.reads, graph.inputs), (call.writes, graph.outputs)):
            if set(bound) != {value.name for value in values} & set(manifest.slots.names):
                refuse(f"call {i} binds {sorted(bound)}, which are not the slots of {call.graph}")
        for slot, buffer in call.reads.items():
            if held.get(slot) != buffer:
                refuse(f"call {i} reads slot {slot} from buffer {buffer}, which does not hold it")
        held = {s: b for s, b in held.items() if b not in call.writes.values()} | call.writes
