"""Which server the command talks to, and as whom."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tuneyard.client import Client
from tuneyard.specs.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
HomeOption = Annotated[
    Path | None, typer.Option("--home", help="Folder of this machine's Tuneyard.")
]


def home_folder(home: Path | None = None) -> Path:
    """--home, else $TUNEYARD_HOME, else ~/.tuneyard."""
    return (home or Path(os.environ.get("TUNEYARD_HOME") or "~/.tuneyard")).expanduser().absolute()


def connect() -> Client:
    """The server of TUNEYARD_URL and TUNEYARD_API_KEY, else of the profile that `up` wrote.

    A profile's key goes to the profile's server alone. Raises: InputError.
    """
    url, key = os.environ.get("TUNEYARD_URL"), os.environ.get("TUNEYARD_API_KEY")
    if url and key:
        return Client(url, key)
    profile = _profile(home_folder() / "profile.json")
    if url and url.rstrip("/").removesuffix("/api/v1") != str(profile["url"]).rstrip("/"):
        raise InputError(
            f"There is no API key for {url}.",
            code="no_api_key",
            hint="set TUNEYARD_API_KEY; the profile's key belongs to another server",
        )
    return Client(str(profile["url"]), key or str(profile["api_key"]))


def _profile(path: Path) -> Mapping[str, Any]:
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        profile = None
    if not isinstance(profile, dict) or not {"url", "api_key"} <= set(profile):
        raise InputError(
            f"No server is known: there is no usable {path}.",
            code="no_profile",
            hint="run `tuneyard up`, or set TUNEYARD_URL and TUNEYARD_API_KEY",
        )
    return profile
