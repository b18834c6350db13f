"""Deployment profiles: what a target asks of a bundle, one TOML file each in ``profiles/``."""

from __future__ import annotations

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
    """

    description: str
    backend: str = "ort"
    precision: str = "float32"
    batch: str = "1"
    threads: int | None = None
    max_graphs: int | None = None


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
    kinds = {f.name: int if f.name in {"threads", "max_graphs"} else str for f in fields(Profile)}
    if unknown := sorted(set(data) - set(kinds)):
        raise L2CError(
            f"profile {path}: unknown key(s) {', '.join(unknown)}; known: {', '.join(kinds)}"
        )
    for key, value in data.items():
        if type(value) is not kinds[key]:
            kind = "a whole number" if kinds[key] is int else "text in quotes"
            raise L2CError(f"profile {path}: {key} is {value!r}; it must be {kind}")
    if "description" not in data:
        raise L2CError(f"profile {path} lacks a description")
    return Profile(**data)
