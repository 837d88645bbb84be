"""What a download's runner gets of the worker's own access to the hubs; no other runner does.

Mirrors, proxies and time limits go by environment; tokens by a file that only this account reads,
whatever way they came to the worker. They never stand in a spec, an event or a runner's environ.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tuneyard.specs.settings import Settings

PREFIXES = ("HF_", "HUGGINGFACE_", "MODELSCOPE_")
OTHERS = (
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip

OURS = frozenset(
    {
        # Tokens go by file, below.
        "HF_TOKEN", "HF_TOKEN_FILE", "HF_TOKEN_PATH", "HUGGINGFACE_HUB_TOKEN",
        "MODELSCOPE_API_TOKEN", "MODELSCOPE_API_TOKEN_FILE", "MODELSCOPE_SDK_TOKEN",
        # The clients write beside the attempt; their caches are looked through, see places().
        "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "MODELSCOPE_CACHE",
        "HF_HUB_OFFLINE",
    }
)  # fmt: skip

Environment = Mapping[str, str]


def hub_environment(environ: Environment, home: Path) -> dict[str, str]:
    """The variables that a download's runner gets besides those of every runner."""
    passed = {
        name: value
        for name, value in environ.items()
        if (name.startswith(PREFIXES) and name not in OURS) or name.upper() in OTHERS
    }
    passed["HF_HUB_OFFLINE"] = "0"
    for variable, found in (
        ("HF_TOKEN_PATH", _huggingface_token(environ)),
        ("MODELSCOPE_API_TOKEN_FILE", _modelscope_token(environ)),
    ):
        if isinstance(found, Path):
            passed[variable] = str(found)
        elif found:
            passed[variable] = str(private_file(home / "tokens" / variable.lower(), found))
    return passed


def _huggingface_token(environ: Environment) -> Path | str | None:
    """A file of the token where there is one; the token itself where only that was given."""
    for name in ("HF_TOKEN_PATH", "HF_TOKEN_FILE"):
        if environ.get(name):
            return Path(environ[name])
    for name in ("HF_TOKEN", "HUGGINGFACE_HUB_TOKEN"):
        if environ.get(name):
            return environ[name]
    login = _huggingface_home(environ) / "token"
    return login if login.is_file() else None


def _modelscope_token(environ: Environment) -> Path | str | None:
    if environ.get("MODELSCOPE_API_TOKEN_FILE"):
        return Path(environ["MODELSCOPE_API_TOKEN_FILE"])
    return environ.get("MODELSCOPE_API_TOKEN") or environ.get("MODELSCOPE_SDK_TOKEN")


def private_file(path: Path, token: str) -> Path:
    """A file that this account alone reads."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(token)
    os.rename(aside, path)
    return path


def places(settings: Settings, environ: Environment) -> dict[str, Any]:
    """Arguments of a download that say where things are on this node."""
    cache = settings.home / "cache"
    return {
        "hubs": hub_order(settings, environ),
        "cache": str(cache),
        "caches": [str(path) for path in _client_caches(environ) if path.is_dir()],
        "node_roots": settings.roots,
        "disk_floor_bytes": settings.disk_floor_bytes,
        "copied": _on_one_disk(cache, settings.store_root),
    }


def hub_order(settings: Settings, environ: Environment) -> list[str]:
    """The setting, unless LLaMA-Factory's USE_MODELSCOPE_HUB says which hub comes first."""
    said = environ.get("USE_MODELSCOPE_HUB", "").strip().lower()
    if not said:
        return settings.hubs
    first = "huggingface" if said in ("0", "false", "no", "off") else "modelscope"
    return sorted(settings.hubs, key=lambda hub: hub != first)


def _client_caches(environ: Environment) -> Iterator[Path]:
    """Where the hubs' own clients keep what this account has downloaded before."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            yield Path(environ[name])
    yield _huggingface_home(environ)
    yield Path(environ.get("MODELSCOPE_CACHE") or _account(environ) / ".cache" / "modelscope")


def _huggingface_home(environ: Environment) -> Path:
    caches = environ.get("XDG_CACHE_HOME") or _account(environ) / ".cache"
    return Path(environ.get("HF_HOME") or Path(caches, "huggingface"))


def _account(environ: Environment) -> Path:
    return Path(environ.get("HOME") or "/nonexistent")


def _on_one_disk(one: Path, other: Path | None) -> bool:
    """A store elsewhere takes nothing from this node's disk."""
    if other is None:
        return False
    try:
        return one.stat().st_dev == other.stat().st_dev
    except OSError:
        return False
