"""Deployment profiles: what a target asks of a bundle and its engines, a TOML file in ``profiles/``."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from l2c_export.core.precision import PRECISIONS
from l2c_export.errors import L2CError, UnsupportedError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(__file__).resolve().parents[1]

_NUMBERS = {"threads", "max_graphs", "optimization_level"}
_SWITCHES = {"tf32"}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Profile:
    """A row of ``profiles/*.toml``; what an option says goes before it.

    Attributes:
        description: What the target is, in a line.
        backend: Runtime backend.
        precision: Of the graphs; a name of :data:`l2c_export.core.precision.PRECISIONS`.
        batch: Latents in one call, ``"N"`` or ``"LO-HI"``.
        threads: For each call; None leaves it to the backend.
        max_graphs: At most so many step graphs; None for as many as the schedule has.
        per: What gets an engine: ``"graph"`` or ``"sublayer"``; None for each step graph.
        target: Compute capabilities that engines are built for, such as ``"sm86,sm89"``; None for
            portable engines (rtx), or for the GPU that builds them (trt).
        max_vram: Device memory that a session may need, such as ``"8G"``; None for any.
        optimization_level: Of the engine builder, 0 to 5; None for its own.
        workspace: Scratch memory that a kernel may take while engines are built; None for any.
        tf32: Whether float32 products may be rounded to TF32.
        calibration: File for a precision that wants one, as seen from where the command is run.
    """

    description: str
    backend: str = "ort"
    precision: str = "float32"
    batch: str = "1"
    threads: int | None = None
    max_graphs: int | None = None
    per: str | None = None
    target: str | None = None
    max_vram: str | None = None
    optimization_level: int | None = None
    workspace: str | None = None
    tf32: bool = False
    calibration: str | None = None


def parse_bytes(text: str) -> int:
    """Bytes from ``"8G"``, ``"512M"`` or a plain number; units are powers of 1024.

    Raises:
        L2CError: It is something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise L2CError(f"{text!r} is not an amount of memory such as 8G or 512M")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def profile_folder() -> Path:
    """Where the shipped profiles are: in the wheel, or beside the package in a checkout."""
    inside = PACKAGE / "profiles"
    return inside if inside.is_dir() else PACKAGE.parent / "profiles"


def profile_names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.stem for path in profile_folder().glob("*.toml"))


def read_profile(name: str) -> Profile:
    """Read a shipped profile by its name, or a TOML file by its path.

    Raises:
        L2CError: There is no such profile, or it has unknown keys or values of the wrong kind.
        UnsupportedError: It asks for what this release does not make.
    """
    shipped = profile_folder() / f"{name}.toml"
    path = shipped if name in profile_names() else Path(name)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        known = ", ".join(profile_names())
        raise L2CError(f"profile {name!r} is neither a file nor one of: {known}") from None
    except (ValueError, RecursionError) as error:
        raise L2CError(f"profile {path} is not TOML: {error}") from None
    profile = _checked(data, path)
    if profile.precision not in PRECISIONS:
        raise UnsupportedError(
            f"profile {path}: precision {profile.precision!r}; "
            f"this release has: {', '.join(PRECISIONS)}"
        )
    return profile


def _checked(data: dict[str, Any], path: Path) -> Profile:
    kinds: dict[str, type] = {field.name: str for field in fields(Profile)}
    kinds |= dict.fromkeys(_NUMBERS, int) | dict.fromkeys(_SWITCHES, bool)
    words = {int: "a whole number", bool: "true or false", str: "text in quotes"}
    if unknown := sorted(set(data) - set(kinds)):
        raise L2CError(
            f"profile {path}: unknown key(s) {', '.join(unknown)}; known: {', '.join(kinds)}"
        )
    for key, value in data.items():
        if type(value) is not kinds[key]:
            raise L2CError(f"profile {path}: {key} is {value!r}; it must be {words[kinds[key]]}")
    if "description" not in data:
        raise L2CError(f"profile {path} lacks a description")
    for key in ("max_vram", "workspace"):
        if key in data:
            try:
                parse_bytes(data[key])
            except L2CError as error:
                raise L2CError(f"profile {path}: {key}: {error}") from None
    return Profile(**data)
