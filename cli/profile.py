"""Which server the command talks to, and as whom."""

import json
import os
from pathlib import Path
from typing import Annotated

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
    """The server of TUNEYARD_URL and TUNEYARD_API_KEY, else of the profile that `up` wrote."""
    url, key = os.environ.get("TUNEYARD_URL"), os.environ.get("TUNEYARD_API_KEY")
    if url and key:
        return Client(url, key)
    path = home_folder() / "profile.json"
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
        return Client(url or profile["url"], key or profile["api_key"])
    except (OSError, ValueError, KeyError):
        raise InputError(
            f"No server is known: there is no usable {path}.",
            code="no_profile",
            hint="run `tuneyard up`, or set TUNEYARD_URL and TUNEYARD_API_KEY",
        ) from None
