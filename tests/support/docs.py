"""The documentation as data: its pages, their fenced blocks, and the commands that stand in them.

A ``bash`` block runs in tests/e2e/test_docs.py as it stands, unless a comment before it says why
it cannot: ``<!-- not run: needs Docker -->``. A ``text`` block right after one that runs is what it
prints, line by line, with … for whatever varies.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer

from tuneyard.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")))
LANGUAGES = {"bash", "text", "json", "yaml", "nginx", "mermaid"}
REASONS = {
    "needs Docker",
    "needs a GPU",
    "needs a bucket",
    "needs a file of yours",
    "needs a hub",
    "needs a proxy",
    "needs another machine",
    "run by the tutorial",
    "starts or stops what the tests share",
    "takes minutes",
}
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
STUBS = ["tuneyard", "docker", "make", "curl", "pip", "git", "sudo", "sh", "python", "python3"]
TOOLS = ("cat", "ls", "mkdir")
BASH = shutil.which("bash") or "/bin/bash"
STUB = f"""#!{BASH}
settings=()
for name in "${{!TUNEYARD_@}}"; do settings+=("$name=${{!name}}"); done
printf '%s\\0' $# "${{0##*/}}" "$@" "${{settings[@]}}" > "$RECORDED/$$"
"""
"""Notes the number of its arguments, its name, they, and the settings, in a file of its own: a
block may start commands side by side.
"""


@dataclass(frozen=True)
class Block:
    """A fenced block. prints: the text block right after it, if there is one."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None
    prints: str | None = None

    @property
    def name(self) -> str:
        """Where it stands."""
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether the end-to-end test runs it."""
        return self.language == "bash" and self.reason is None


@dataclass(frozen=True)
class Command:
    """One command of a block as a shell reads it: its words, and the settings around it."""

    block: Block
    words: tuple[str, ...]
    env: Mapping[str, str]

    @property
    def line(self) -> str:
        """It in one line, to name a test by."""
        return f"{self.block.name} {' '.join(self.words)}"[:150]


def text_of(page: str) -> str:
    """A page's text."""
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """The fenced blocks of a page, in order."""
    text = text_of(page)
    found = list(FENCE.finditer(text))
    return tuple(
        Block(
            page,
            text.count("\n", 0, match.start()) + 1,
            match["language"],
            match["text"],
            match["reason"],
            _printed(text, match, later),
        )
        for match, later in zip_longest(found, found[1:])
    )


def _printed(text: str, match: re.Match[str], later: re.Match[str] | None) -> str | None:
    is_next = later is not None and not text[match.end() : later.start()].strip()
    return later["text"] if later is not None and is_next and later["language"] == "text" else None


def all_blocks() -> list[Block]:
    """The fenced blocks of all pages."""
    return [block for page in PAGES for block in blocks(page)]


def without_fences(page: str) -> str:
    """A page's prose, its lines where they stood."""
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), text_of(page))


def code_spans(page: str) -> list[str]:
    """What stands between backticks in a page's prose."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", without_fences(page))


@cache
def commands(block: Block) -> tuple[Command, ...]:
    """What a shell would start for a block. Nothing is started: each command is noted instead."""
    with TemporaryDirectory() as folder:
        here = Path(folder)
        env = _shell(here)
        argv = [BASH, "-uc", block.text]
        done = subprocess.run(argv, cwd=here, env=env, capture_output=True, text=True, timeout=20)
        # A file that a real command would have made is not there; all else is a mistake.
        wrong = re.search(r"command not found|unbound variable|syntax error", done.stderr)
        assert wrong is None, f"{block.name}: {done.stderr}"
        files = sorted((here / "recorded").iterdir(), key=lambda file: file.stat().st_mtime_ns)
        noted = [file.read_text().split("\0")[:-1] for file in files]
    return tuple(_command(block, each) for each in noted)


def _command(block: Block, noted: list[str]) -> Command:
    end = int(noted[0]) + 2
    settings = dict(setting.split("=", 1) for setting in noted[end:])
    return Command(block, tuple(noted[1:end]), settings)


def _shell(here: Path) -> dict[str, str]:
    """An environment in which every command that the docs may use is a stub."""
    (here / "bin").mkdir()
    (here / "stub").write_text(STUB)
    (here / "stub").chmod(0o755)
    for name in STUBS:
        (here / "bin" / name).symlink_to(here / "stub")
    for name in TOOLS:
        (here / "bin" / name).symlink_to(f"/bin/{name}")
    (here / ".venv" / "bin").mkdir(parents=True)
    (here / ".venv" / "bin" / "activate").touch()
    (here / "recorded").mkdir()
    address = {"URL": "http://127.0.0.1:8800/api/v1", "KEY": "ty-key", "JOB": "job_1"}
    return address | {
        "PATH": str(here / "bin"),
        "HOME": "/home/you",
        "RECORDED": f"{here}/recorded",
    }


def not_run() -> list[Command]:
    """The commands of all blocks that no test runs, in an order that no shell decides."""
    kept = [block for block in all_blocks() if block.reason is not None]
    return [c for block in kept for c in sorted(commands(block), key=lambda c: list(c.words))]


def parse(words: Sequence[str]) -> None:
    """Read a command line as `tuneyard` does; a word that it does not know raises an error."""
    command: Any = typer.main.get_command(app)
    words = list(words)
    while hasattr(command, "commands"):
        assert words, "no command is named"
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words).close()


def script(page: str) -> Iterator[tuple[Block, str]]:
    """The blocks of a page that run, each with the text that a shell gets for it."""
    for number, block in enumerate(block for block in blocks(page) if block.runs):
        yield block, f"printf '\\n%s\\n' '{mark(number)}'\n{block.text}"


def mark(number: int) -> str:
    """A line that says in a page's output where that of a block begins."""
    return f"==== block {number} ===="


def missing_line(printed: str, output: str) -> str | None:
    """The first of the lines that an output does not have, in that order; … is anything."""
    left = iter(output.splitlines())
    for line in printed.splitlines():
        pattern = ".*".join(re.escape(part) for part in line.strip().split("…"))
        if line.strip() and not any(re.fullmatch(pattern, each.strip()) for each in left):
            return line
    return None
