"""What a caller of a server meets: a refusal, or no server."""

from collections.abc import Mapping
from typing import Any

from tuneyard.specs.errors import TuneyardError


class Refused(TuneyardError):
    """The server refused."""

    code = "refused"

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        super().__init__(
            str(error.get("message") or f"The server answered {status}."),
            code=str(error.get("code") or self.code),
            field=error.get("field"),
            line=error.get("line"),
            hint=error.get("hint"),
        )
        self.status = status
        self.details: list[Mapping[str, Any]] = list(error.get("details") or [])

    def naming(self, names: Mapping[str, str]) -> "Refused":
        """The same refusal in the caller's words: each key of ``names`` becomes its value."""
        error = _reworded(self.as_dict() | {"details": self.details}, names)
        return Refused(self.status, error)


class Unreachable(TuneyardError):
    """The server cannot be reached, or cannot answer right now."""

    code = "unreachable"


def _reworded(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for before, after in names.items():
            value = value.replace(before, after)
        return value
    if isinstance(value, Mapping):
        return {key: _reworded(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_reworded(inner, names) for inner in value]
    return value
