"""`tuneyard status`: what runs in a home."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuneyard.local.home import Home, read_json
from tuneyard.local.supervisor import STATE


@dataclass(frozen=True)
class ChildStatus:
    """One process of a home."""

    name: str
    pid: int
    alive: bool
    uptime_s: float
    restarts: int


@dataclass(frozen=True)
class YardStatus:
    """All of a home. phase: stopped, starting, ready, stopping, or unsupervised."""

    home: str
    phase: str
    supervisor_pid: int | None
    url: str | None
    flower_url: str | None
    children: tuple[ChildStatus, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON shows it."""
        return asdict(self)


def status(root: Path) -> YardStatus:
    """Look at a home; nothing is asked over the network and nothing is changed."""
    home = Home(root.expanduser().absolute())
    supervisor, profile = home.holder(), read_json(home.profile)
    children = tuple(_child(home, name) for name in home.children())
    if supervisor is not None:
        phase = str(read_json(home.run(STATE)).get("phase", "starting"))
    else:
        phase = "unsupervised" if any(child.alive for child in children) else "stopped"
    return YardStatus(
        home=str(home.root),
        phase=phase,
        supervisor_pid=supervisor.pid if supervisor else None,
        url=profile.get("url"),
        flower_url=profile.get("flower_url"),
        children=children,
    )


def _child(home: Home, name: str) -> ChildStatus:
    record = home.record(name)
    if record is None:  # it was forgotten since it was listed
        return ChildStatus(name, 0, False, 0.0, 0)
    uptime_s = max(0.0, time.time() - record.started_at)
    return ChildStatus(name, record.pid, record.process.alive, uptime_s, record.restarts)
