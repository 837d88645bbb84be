"""`tuneyard fixtures`: models that are made rather than brought."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from tuneyard.cli.output import print_json, say
from tuneyard.cli.profile import Json
from tuneyard.specs.errors import InputError

MAKER = [sys.executable, "-P", "-m", "tuneyard.runners.fixtures"]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Make models for trying things where there is no hub.")
    group.command("tiny-llama")(tiny_llama)
    app.add_typer(group, name="fixtures")


def tiny_llama(
    folder: Annotated[Path, typer.Argument(help="A folder that is not there yet, or empty.")],
    hidden: Annotated[int, typer.Option(min=8, max=8192, help="Width, a multiple of 8.")] = 64,
    layers: Annotated[int, typer.Option(min=1, max=128, help="Number of layers.")] = 4,
    json: Json = False,
) -> None:
    """Write a Llama of random weights that speaks in bytes.

    Example: tuneyard fixtures tiny-llama ./tiny
    """
    if hidden % 8:
        raise InputError(f"--hidden {hidden} is no multiple of 8.", field="hidden")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        message, hint = f"{folder} is there already.", "name another folder"
        raise InputError(message, code="folder_taken", field="folder", hint=hint)
    # Its own process: torch is nothing that the command itself loads.
    shape = ["--hidden", str(hidden), "--layers", str(layers)]
    made = subprocess.run(
        [*MAKER, "tiny-llama", str(folder), *shape], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        reason = (made.stderr.strip().splitlines() or ["no reason given"])[-1]
        needs = "pip install 'tuneyard[runner]'" if "No module" in reason else None
        raise InputError(f"It could not be made: {reason}", code="not_made", hint=needs)
    if json:
        print_json({"folder": str(folder.resolve())})
    else:
        say(f"{folder} is a base model")
