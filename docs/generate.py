"""Write the pages that are derived from code: python docs/generate.py [--check]

docs/states.md from specs/states.py and specs/exits.py; docs/reference/settings.md and specs.md from
specs/, api.md from the API's own OpenAPI document, cli.md from the command itself. With --check
nothing is written and a stale page fails.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer

from tuneyard.api.access import LOOKING, OPEN_PATHS
from tuneyard.api.app import DESCRIPTION, ERRORS, create_app
from tuneyard.api.app import PAGES as SHOWN
from tuneyard.api.problems import ROUTING
from tuneyard.cli import main as command_line
from tuneyard.specs.errors import InputError, TuneyardError, Unavailable
from tuneyard.specs.exits import ExitCode, RunnerEnd, judge
from tuneyard.specs.jobs import describe_fields
from tuneyard.specs.settings import FILE_SUFFIX, PREFIX, READ_BY, Settings
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


# The command -------------------------------------------------------------------------------------


def cli_page() -> str:
    """Every command with its arguments, options and example, as --help has them."""
    lines = ["# Commands", "", "Generated from the command itself by `make docs`.", ""]
    lines += [f"Exit codes: {_after_colon(command_line.__doc__)}", ""]
    lines += ["`-h` or `--help` after any of them shows what stands here.", ""]
    commands = dict(_commands(typer.main.get_command(command_line.app), "tuneyard"))
    lines += ["| command | what it does |", "| --- | --- |"]
    for name, command in commands.items():
        sentence = command.help.partition("\n")[0]
        lines.append(f"| [`{name}`](#{_anchor(name)}) | {_cell(sentence)} |")
    for name, command in commands.items():
        lines += ["", *_command_lines(name, command)]
    return "\n".join(lines) + "\n"


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    for part, each in getattr(command, "commands", {}).items():
        yield from _commands(each, f"{name} {part}")
    if not hasattr(command, "commands"):
        yield name, command


def _command_lines(name: str, command: Any) -> Iterator[str]:
    text, _, example = command.help.partition("Example: ")
    yield from (f"## `{name}`", "", " ".join(text.split()), "")
    yield from (f"Example: `{example.strip()}`", "")
    yield from ("| argument or option | what it is |", "| --- | --- |")
    with command.make_context(name, [], resilient_parsing=True) as context:
        for shown, sentence in (each.get_help_record(context) for each in command.params):
            plain = shown.replace(" range>", ">").replace("|", "\\|")
            yield f"| `{plain}` | {' '.join(_cell(sentence).split())} |"
    if settings := [key for key in Settings.model_fields if key in READ_BY.get(command.name, ())]:
        names = ", ".join(f"`{PREFIX}{key.upper()}`" for key in settings)
        yield from ("", f"Reads the [settings](settings.md) {names}.")


def _after_colon(text: str | None) -> str:
    return " ".join((text or "").partition("exit codes ")[2].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _anchor(heading: str) -> str:
    """As pages are shown: letters, digits, - and _ are left, spaces become -."""
    kept = (c for c in heading.lower() if c.isalnum() or c in "-_ ")
    return "".join(kept).replace(" ", "-")


# The API -----------------------------------------------------------------------------------------

WITHOUT_A_KEY, ANY_KEY, WRITERS = "anybody", "viewer", "member"
ANSWERED = (
    "tuneyard.api.",
    "tuneyard.models.serving",
    "tuneyard.specs.documents",
    "tuneyard.specs.errors",
    "tuneyard.store.shelves",
)
"""Where the errors are that a request may be answered with."""


def api_page() -> str:
    """Every route: who may, parameters, body, answers, errors; then what answers hold."""
    with TemporaryDirectory() as home:
        document = create_app(Settings(home=Path(home))).openapi()
    routes = [
        (method.upper(), path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    lines = [
        "# HTTP API",
        "",
        "Generated from the API's OpenAPI document by `make docs`. A running",
    ]
    lines += ["API shows the same at `/docs`, and as JSON at `/openapi.json`.", DESCRIPTION]
    lines += [
        f"Who may: **{WITHOUT_A_KEY}** without a key; **{ANY_KEY}**: whoever has a key;"
        f" **{WRITERS}**: a key of the role member or admin; **admin**: an administrator's alone."
        " What is another team's is not there (404).",
        "",
        "| route | who may | what it does |",
        "| --- | --- | --- |",
    ]
    for method, path, operation in routes:
        link = f"[`{method} {path}`](#{_anchor(f'{method} {path}')})"
        sentence = operation["description"].partition("\n")[0]
        lines.append(f"| {link} | {_who(method, path)} | {_cell(sentence)} |")
    lines += [*_shown_lines(), "", *_error_lines()]
    lines += ["", "## Routes"]
    for method, path, operation in routes:
        lines += ["", *_route_lines(method, path, operation)]
    lines += ["", "## What is answered"]
    for name, schema in document["components"]["schemas"].items():
        lines += ["", *_schema_lines(name, schema)]
    return "\n".join(lines) + "\n"


def _who(method: str, path: str) -> str:
    if path in OPEN_PATHS:
        return WITHOUT_A_KEY
    return ANY_KEY if method in LOOKING else WRITERS


def _shown_lines() -> Iterator[str]:
    """Pages for browsers, which are not in the OpenAPI document."""
    routes: list[Any] = [route for router in SHOWN for route in router.routes]
    for route in routes:
        path, methods = route.path.replace(":path", ""), sorted(route.methods - {"HEAD"})
        who = WITHOUT_A_KEY if path in OPEN_PATHS else "admin"
        sentence = (route.endpoint.__doc__ or "").partition("\n")[0]
        yield f"| `{' '.join(methods)} {path}` | {who} | {sentence} |"


def _error_lines() -> Iterator[str]:
    """Errors that have a class of their own; others have the code of what was wrong."""
    yield from ("## Errors", "", "| status | code | what it says |", "| --- | --- | --- |")
    rows = {(status, code, said) for status, (code, said, _) in ROUTING.items()}
    for error in _answered(TuneyardError):
        rows.add((error.http_status, error.code, (error.__doc__ or "").partition("\n")[0]))
    for status, code, said in sorted(rows):
        yield f"| {status} | `{code}` | {said} |"
    yield "| 500 | `internal` | Something went wrong on our side; the log has it. |"
    common = ", ".join(str(status) for status in ERRORS)
    yield from ("", f"Any route with a key may answer {common}; more stands with each.")
    yield "A 422 has the code of what was wrong, such as `unknown_field` or `out_of_range`."


def _answered(error: type[TuneyardError]) -> Iterator[type[TuneyardError]]:
    for each in error.__subclasses__():
        is_answered = issubclass(each, InputError | Unavailable) or each.http_status == 502
        if each.__module__.startswith(ANSWERED) and is_answered:
            yield each
        yield from _answered(each)


def _route_lines(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### `{method} {path}`", "", operation["description"], "")
    answers, refusals = _answers(operation["responses"])
    more = "" if path in OPEN_PATHS or not refusals else f" Also refused: {'; '.join(refusals)}."
    yield f"Who may: {_who(method, path)}. Answers {'; '.join(answers)}.{more}"
    if rows := [_parameter_row(each) for each in operation.get("parameters", ())]:
        yield from (
            "",
            "| parameter | in | type | default | what it is |",
            "| --- " * 5 + "|",
            *rows,
        )
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield from ("", f"Body: `{kind}`.", *_body_lines(content))


def _answers(responses: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What succeeds, and what is refused beside what any route refuses."""
    answers, refusals = [], []
    for status, response in sorted(responses.items()):
        if status < "400":
            kinds = response.get("content", {})
            shown = [_type(each["schema"]) for each in kinds.values() if each.get("schema")]
            shown = [text for text in shown if "[" in text] or [f"`{kind}`" for kind in kinds]
            shown += [f"or `{kind}`" for kind in kinds if kind == "text/event-stream"]
            answers.append(f"{status} {' '.join(shown) or response['description'].rstrip('.')}")
        elif int(status) not in ERRORS:
            refusals.append(f"{status} {response['description'].rstrip('.')}")
    return answers, refusals


def _parameter_row(parameter: Mapping[str, Any]) -> str:
    schema = parameter["schema"]
    default = "required" if parameter["required"] else _default_of(schema)
    cells = [f"`{parameter['name']}`", parameter["in"], _type(schema), default]
    return f"| {' | '.join(cells)} | {_cell(_about(parameter | schema))} |".replace("  ", " ")


def _body_lines(content: Mapping[str, Any]) -> Iterator[str]:
    fields = content["schema"].get("properties", {})
    if fields:
        yield from ("", "| field | type | default | what it is |", "| --- " * 4 + "|")
    for name, schema in fields.items():
        needed = name in content["schema"].get("required", ())
        default = "required" if needed else _default_of(schema)
        yield f"| `{name}` | {_type(schema)} | {default} | {_about(schema)} |".replace("  ", " ")
    for example in content.get("examples", {}).values():
        yield from ("", f"{example['summary']}:", "", "```json", _json(example["value"]), "```")


def _schema_lines(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {name}", "", schema.get("description", ""), "")
    yield from ("| field | type | what it is |", "| --- | --- | --- |")
    for field, each in schema["properties"].items():
        yield f"| `{field}` | {_type(each)} | {_cell(_about(each))} |".replace("  ", " ")


def _about(schema: Mapping[str, Any]) -> str:
    examples = [f"`{_json(each)}`" for each in schema.get("examples", ())]
    sentence = schema.get("description", "")
    return f"{sentence} e.g. {', '.join(examples)}".strip() if examples else sentence


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words; views are links to what they hold."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{_anchor(name)})"
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{each}`" for each in schema.get("enum") or [schema["const"]])
    kind = str(schema.get("format") or schema.get("type", "anything"))
    if kind == "array":
        return f"list of {_type(schema['items'])}"
    if isinstance(values := schema.get("additionalProperties"), dict):
        return f"object of {_type(values)}"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None:
        return kind
    return f"{kind}, from {low}" + (f" to {high}" if high and high < 2**62 else "")


def _default_of(schema: Mapping[str, Any]) -> str:
    value = schema.get("default")
    return "" if value in (None, "") else f"`{_json(value)}`"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


PAGES = {
    "states.md": states_page,
    "reference/settings.md": settings_page,
    "reference/specs.md": specs_page,
    "reference/api.md": api_page,
    "reference/cli.md": cli_page,
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
