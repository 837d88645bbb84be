"""Running the command within the test's process: fast, and with its real exit code."""

import sys
from dataclasses import dataclass

import pytest

from tuneyard.cli.main import main


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


class Command:
    """Runs ``tuneyard`` with a clean environment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> Done:
        self._monkeypatch.setattr(sys, "argv", ["tuneyard", *arguments])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = self._capsys.readouterr()
        return Done(int(left.value.code or 0), out, err)
