"""Write the pages that are derived from code: python docs/generate.py [--check]

docs/states.md from specs/states.py and specs/exits.py; docs/reference/settings.md and specs.md from
specs/. With --check nothing is written and a stale page fails.
"""

import sys
from collections import defaultdict
from pathlib import Path

from tuneyard.specs.exits import ExitCode, RunnerEnd, judge
from tuneyard.specs.jobs import describe_fields
from tuneyard.specs.settings import FILE_SUFFIX, PREFIX, Settings
from tuneyard.specs.states import INITIAL, LIVE, TERMINAL, JobState, allowed_actions, moves

DOCS = Path(__file__).parent


def states_page() -> str:
    """The state diagram, what a person may ask in each state, and what ends mean."""
    arrows: dict[tuple[JobState, JobState], list[str]] = defaultdict(list)
    for source, event, target in sorted(moves()):
        arrows[source, target].append(event.value)
    lines = ["# States of a job", "", "Generated from `specs/states.py` by `make docs`.", ""]
    lines += ["```mermaid", "stateDiagram-v2"]
    lines += [f"    [*] --> {state}: submit" for state in sorted(INITIAL)]
    lines += [f"    {a} --> {b}: {', '.join(events)}" for (a, b), events in arrows.items()]
    lines += [f"    {state} --> [*]" for state in sorted(TERMINAL)]
    lines += ["```", "", "| state | kind | a person may |", "| --- | --- | --- |"]
    lines += [f"| {s} | {_kind(s)} | {', '.join(allowed_actions(s)) or '-'} |" for s in JobState]
    lines += ["", "## What a runner's end means", ""]
    lines += ["| exit | outcome | cause | charged | tried again |", "| --- " * 5 + "|"]
    ends = [(f"{code.value} {code.name.lower()}", RunnerEnd(code=code)) for code in ExitCode]
    ends += [("any other code", RunnerEnd(code=1)), ("a signal", RunnerEnd(signal=9))]
    ends += [("a signal, out of memory", RunnerEnd(signal=9, oom_killed=True))]
    ends += [("no exit.json", RunnerEnd())]
    for shown, end in ends:
        verdict = judge(end)
        row = [shown, verdict.outcome.value, verdict.cause or "-"]
        row += ["yes" if verdict.charged else "no", "yes" if verdict.retry else "no"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _kind(state: JobState) -> str:
    if state in TERMINAL:
        return "final"
    return "live: exactly one attempt" if state in LIVE else "waiting"


def settings_page() -> str:
    """Every setting with its default and sentence."""
    lines = ["# Settings", "", "Generated from `specs/settings.py` by `make docs`.", ""]
    lines += [
        f"Each may come by a file of its own: `{PREFIX}X{FILE_SUFFIX}=/run/secrets/x` fills `X`"
        " with what that file holds. So secrets reach a container.",
        f"`{PREFIX}SETTINGS` names a YAML or JSON file of `name: value` lines; the environment wins"
        " over it.",
        "",
    ]
    lines += ["| variable | default | what it is |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "`~/.tuneyard`" if name == "home" else f"`{_default(field.default)}`"
        lines.append(f"| `{PREFIX}{name.upper()}` | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def _default(value: object) -> object:
    reveal = getattr(value, "get_secret_value", None)
    return reveal() if reveal else ("" if value is None else value)


def specs_page() -> str:
    """Every field of every kind of job."""
    lines = ["# Fields of a job", "", "Generated from `specs/` by `make docs`.", ""]
    lines += ["| kind | field | type | default | range | what it is |", "| --- " * 6 + "|"]
    for row in describe_fields():
        cells = [row.kind, f"`{row.name}`", row.type, f"`{row.default}`", row.range, row.sentence]
        lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    return "\n".join(lines) + "\n"


PAGES = {
    "states.md": states_page,
    "reference/settings.md": settings_page,
    "reference/specs.md": specs_page,
}


def main() -> int:
    """Write the pages, or say which are stale."""
    stale = [name for name, page in PAGES.items() if _read(DOCS / name) != page()]
    if "--check" in sys.argv:
        for name in stale:
            print(f"docs/{name} is stale: run `make docs`")
        return 1 if stale else 0
    for name in stale:
        (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
