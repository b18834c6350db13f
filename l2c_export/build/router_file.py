"""Router files: the released pickles, read without running code, and a safe format of our own.

The safe format is safetensors with ``logits`` (calls, slots) float32 and ``routed`` (calls,) uint8,
both in call order (row 0 is the noisiest call), and this metadata, all strings: ``format`` =
"l2c-router", ``version`` = "1", ``family``, ``sampler``, ``slots`` (JSON list of slot names) and
``training`` (JSON object). PyTorch is imported for pickles only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from l2c_export.build.safe_load import check_file, load_pickle
from l2c_export.core.files import replacing
from l2c_export.core.schedule import Router
from l2c_export.errors import L2CError

FORMAT, VERSION = "l2c-router", "1"
SAMPLERS = {"dit": "ddim", "uvit": "dpm-solver-2s"}
"""The sampler that the released routers of each model family were trained for."""

_MAX_BYTES = 64 << 20  # a router is a few thousand numbers; this stops a model given as a router
_MAX_SLOTS = 65536
_MAX_TEXT = 200


def read_router(path: Path, family: str) -> Router:
    """Read a router and bring it into call order.

    Args:
        path: A released ``.pt``/``.pth`` file, or our safetensors.
        family: Model family that it is wanted for: ``"dit"`` or ``"uvit"``.

    Raises:
        L2CError: The file cannot be read, asks for code, or is not a router of that family.
    """
    if family not in SAMPLERS:
        raise L2CError(f"no routers for model family {family!r}; known: {', '.join(SAMPLERS)}")
    if check_file(path, "router") > _MAX_BYTES:
        raise L2CError(f"router {path} is larger than {_MAX_BYTES >> 20} MiB; that is not a router")
    data = path.read_bytes()
    source: dict[str, Any] = {"file": path.name, "sha256": hashlib.sha256(data).hexdigest()}
    if data[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safe(path, data, family, source)
    return _read_released(path, data, family, source)


def write_router(
    path: Path,
    router: Router,
    *,
    family: str,
    slots: Sequence[str],
    training: Mapping[str, Any],
) -> None:
    """Write the safe format; the file appears whole or not at all, the same bytes for the same router.

    Args:
        path: Where; its folder must exist.
        router: In call order. Rows of calls that are not routed are stored as zeros.
        family: Model family, ``"dit"`` or ``"uvit"``.
        slots: The model's slot names, in execution order.
        training: How it was trained: names to strings, numbers, booleans or None.

    Raises:
        L2CError: The router is not one, or the file cannot be written.
    """
    _check(router, str(path))
    if len(slots) != router.logits.shape[1]:
        raise L2CError(f"{path}: {router.logits.shape[1]} scores a call for {len(slots)} slots")
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "family": family,
        "sampler": router.sampler,
        "slots": json.dumps(list(slots)),
        "training": json.dumps(dict(training), sort_keys=True, allow_nan=False),
    }
    logits = np.where(router.routed[:, None], router.logits, 0).astype("<f4")
    data = _serialize({"logits": logits, "routed": router.routed.astype(np.uint8)}, metadata)
    if not path.parent.is_dir():
        raise L2CError(f"cannot write router {path}: there is no folder {path.parent}")
    try:
        with replacing(path, durable=True) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise L2CError(f"cannot write router {path}: {error.strerror}") from None


def _serialize(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Safetensors with sorted metadata; the library's order changes from process to process."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    at, types = 0, {"<f4": "F32", "|u1": "U8"}
    for name, array in tensors.items():
        span = [at, at := at + array.nbytes]
        dtype = types[array.dtype.str]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in tensors.values())


def _check(router: Router, where: str) -> None:
    """Refuse what cannot be a router, whatever file it came from."""
    logits, routed = router.logits, router.routed
    if logits.ndim != 2 or not logits.size or routed.shape != logits.shape[:1]:
        raise L2CError(
            f"{where}: router logits {logits.shape} and routed {routed.shape} must be "
            "(calls, slots) and (calls,)"
        )
    if routed[0]:
        raise L2CError(f"{where} routes the first call, which has nothing to reuse")
    bad = np.flatnonzero(routed & ~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise L2CError(f"{where} has scores that are not finite in routed call {bad[0]}")


# Our own format ---------------------------------------------------------------------------------


def _read_safe(path: Path, data: bytes, family: str, source: dict[str, Any]) -> Router:
    try:
        tensors = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise L2CError(f"router {path} is damaged or no safetensors file: {error}") from None
    metadata = _check_metadata(path, header.get("__metadata__") or {}, family)
    if set(tensors) != {"logits", "routed"}:
        raise L2CError(f"router {path} holds {_some(tensors)}; it must hold 'logits' and 'routed'")
    logits, routed = tensors["logits"], tensors["routed"]
    if logits.dtype != np.float32:
        raise L2CError(f"router {path}: 'logits' is {logits.dtype}, it must be float32")
    if routed.dtype not in (np.uint8, np.bool_) or (routed > 1).any():
        raise L2CError(f"router {path}: 'routed' must hold 0 and 1 as uint8 or bool")
    source |= {"format": FORMAT, "training": metadata["training"]}
    slots = tuple(metadata["slots"])
    router = Router(logits, routed.astype(bool), metadata["sampler"], source, slots)
    _check(router, f"router {path}")
    if len(slots) != logits.shape[1]:
        raise L2CError(
            f"router {path} names {len(slots)} slots, but a call has {logits.shape[1]} scores"
        )
    return router


def _check_metadata(path: Path, metadata: Mapping[str, str], family: str) -> dict[str, Any]:
    """The metadata with its JSON decoded."""
    if metadata.get("format") != FORMAT:
        raise L2CError(
            f"{path} is safetensors but not a router of ours (metadata format is "
            f"{metadata.get('format')!r}, not {FORMAT!r})"
        )
    if metadata.get("version") != VERSION:
        raise L2CError(
            f"router {path} has version {metadata.get('version')!r}, this release reads {VERSION!r}; "
            "install a matching l2c-export"
        )
    if missing := [key for key in ("family", "sampler", "slots", "training") if key not in metadata]:
        raise L2CError(f"router {path}: the metadata lacks {', '.join(missing)}")
    if metadata["family"] != family:
        raise L2CError(f"router {path} is for {metadata['family']!r} models, not {family!r}")
    try:
        slots, training = json.loads(metadata["slots"]), json.loads(metadata["training"])
    except ValueError as error:
        raise L2CError(f"router {path}: the metadata is not JSON: {error}") from None
    if not isinstance(slots, list) or not all(isinstance(name, str) for name in slots):
        raise L2CError(f"router {path}: metadata 'slots' must be a list of names")
    if not isinstance(training, dict):
        raise L2CError(f"router {path}: metadata 'training' must be an object")
    return {"sampler": metadata["sampler"], "slots": slots, "training": _plain(training)}


# The released files -----------------------------------------------------------------------------


def _read_released(path: Path, data: bytes, family: str, source: dict[str, Any]) -> Router:
    content = load_pickle(path, data)
    options: Any = {}
    if isinstance(content, Mapping) and "routers" in content:
        options = content.get("args") or {}
        content = content["routers"]
    if not isinstance(content, Mapping):
        raise L2CError(f"{path} is not a router: it holds a {type(content).__name__}, not a state dict")
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    options = options if isinstance(options, Mapping) else {}
    training = _plain({key: value for key, value in options.items() if key in _RECIPE})
    model = training.get("model")
    if family != "dit" and isinstance(model, str) and model.startswith("DiT"):
        raise L2CError(f"router {path} was trained for {model!r}, which is no {family!r} model")
    rows = _rows(path, content)
    routed, rank = (_dit_order if family == "dit" else _uvit_order)(path, len(rows))
    logits = np.zeros(rows.shape, np.float32)
    logits[routed] = rows[rank[routed]]  # the other rows are untrained noise: never read
    source |= {"format": f"l2c-released-{family}", "training": training}
    router = Router(logits, routed, SAMPLERS[family], source)
    _check(router, f"router {path}")
    return router


def _rows(path: Path, content: Mapping[Any, Any]) -> NDArray[np.float32]:
    """(rows, slots): the vectors ``"0.prob"``, ``"1.prob"`` … of a state dict."""
    import torch

    known = [f"{row}.prob" for row in range(len(content))]
    if surplus := [key for key in content if not re.fullmatch(r"(0|[1-9]\d*)\.prob", str(key))]:
        raise L2CError(
            f"{path} is not a router: its keys should be '0.prob' …, it has {_some(surplus)}"
        )
    if missing := [key for key in known if key not in content]:
        raise L2CError(f"router {path} lacks {_some(missing)} of {len(content)} rows")
    if not known:
        raise L2CError(f"router {path} has no rows")
    for key in known:
        value = content[key]
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise L2CError(f"router {path}: '{key}' is {kind}, it must be a vector of float numbers")
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.ndim != 1 or not 0 < len(value) <= _MAX_SLOTS:
            raise L2CError(f"router {path}: '{key}' {tuple(value.shape)} is no vector of scores")
        if value.shape != content["0.prob"].shape:
            raise L2CError(
                f"router {path}: '{key}' has shape {tuple(value.shape)}, "
                f"'0.prob' {tuple(content['0.prob'].shape)}; all rows must be of one width"
            )
    return np.stack([content[key].detach().float().numpy() for key in known])


Order = tuple[NDArray[np.bool_], NDArray[np.int64]]
"""(calls,) which calls are routed, and (calls,) the row that a call reads."""


def _dit_order(path: Path, calls: int) -> Order:
    """Rows ascend in t, so call e reads row calls-1-e; even rows are cache calls."""
    if calls % 2:
        raise L2CError(f"router {path} has {calls} rows; DiT routers need an even number of calls")
    rank = np.arange(calls)[::-1].copy()
    return rank % 2 == 0, rank


def _uvit_order(path: Path, calls: int) -> Order:
    """Row i is the start of solver step i; a step makes two calls, and the first step is full."""
    if calls % 2 or calls < 4:
        raise L2CError(
            f"router {path} has {calls} rows; U-ViT routers need an even number of calls, 4 or more"
        )
    call = np.arange(calls)
    return (call % 2 == 0) & (call > 0), call // 2


_RECIPE = {
    *("model", "image_size", "num_classes", "num_sampling_steps", "l1", "lr", "epochs", "max_steps"),
    *("global_batch_size", "global_seed", "ste_threshold"),
}
"""What a released router's options say of the training; the others are paths of its machine."""


def _plain(options: Mapping[Any, Any]) -> dict[str, Any]:
    """The options that JSON can hold."""
    plain: dict[str, Any] = {}
    for key, value in options.items():
        short = isinstance(value, str) and len(value) <= _MAX_TEXT
        number = isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
        if isinstance(key, str) and (short or number or value is None):
            plain[key] = value
    return plain


def _some(names: Sequence[Any] | Mapping[Any, Any]) -> str:
    """Up to three names, and how many there are."""
    shown = [repr(str(name))[:60] for name in names]
    rest = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return ", ".join(shown[:3]) + rest
