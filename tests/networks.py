"""Engines that are plain ONNX networks, as a build for the backend ``ort`` writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from l2c_export.core.bundle import CONDITIONING, Bundle
from l2c_export.core.engine_archive import pack_plans
from l2c_export.core.engines import ENGINES, UPDATE, Engine, EngineSet, source_of, write_record
from l2c_export.engines.network import Network, engine_network, update_network


def write_networks(
    bundle: Bundle,
    *,
    backend: str = "ort",
    version: str = "opset20",
    targets: Iterable[str] = ("portable",),
    rows: int | None = None,
) -> Path:
    """Write a bundle's folder of engines; return it. ``rows`` limits those of the conditioning."""
    manifest = bundle.manifest
    names = dict.fromkeys((CONDITIONING, *manifest.step_graphs(), manifest.uncached))
    networks: dict[str, Network] = {UPDATE: update_network(manifest)}
    networks |= {name: engine_network(bundle, name) for name in names}
    low, high = manifest.batch
    most = high * manifest.rows * len(manifest.calls) if rows is None else rows
    made = EngineSet(
        backend=backend,
        version=version,
        targets=tuple(targets),
        options={},
        ranges={
            "batch": (low, high, high),
            "rows": (low * manifest.rows, high * manifest.rows, high * manifest.rows),
            "n": (1, most, most),
        },
        archive=("plans.xz", pack(bundle, networks, backend, version, targets)),
        engines=tuple(record(bundle, name, network) for name, network in networks.items()),
    )
    folder = bundle.path / ENGINES / made.folder
    write_record(folder, made)
    return folder


def pack(bundle: Bundle, networks: dict[str, Network], backend: str, version: str, targets):
    folder = bundle.path / ENGINES / f"{backend}-{version}-{'+'.join(targets)}"
    folder.mkdir(parents=True, exist_ok=True)
    return pack_plans(folder / "plans.xz", [network.model for network in networks.values()])


def record(bundle: Bundle, name: str, network: Network) -> Engine:
    return Engine(
        graph=name,
        key=name,
        source=source_of(bundle.manifest, name, bool(network.constants)),
        bytes=len(network.model),
        sha256=hashlib.sha256(network.model).hexdigest(),
        inputs=network.inputs,
        weights=network.weights,
        outputs=network.outputs,
        constants=tuple(value.name for value in network.constants),
    )
