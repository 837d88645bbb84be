"""The documentation: each command runs in tests/e2e/test_docs.py, or is held against what reads it.

Of a block that cannot run here a shell says what it would start; each of these is then read by the
command's own parser, looked up in the Makefile, the API's routes, the extras, or on the disk.
"""

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import pytest
import yaml
from support.docs import (
    LANGUAGES,
    PAGES,
    REASONS,
    ROOT,
    Command,
    all_blocks,
    blocks,
    code_spans,
    commands,
    missing_line,
    not_run,
    parse,
    text_of,
    without_fences,
)

from tuneyard.api.app import create_app
from tuneyard.specs.jobs import read_spec
from tuneyard.specs.pipelines import read_pipeline
from tuneyard.specs.settings import FILE_SUFFIX, PREFIX, Settings

TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
NOT_RUN = not_run()
OF_CLIENTS = {"TUNEYARD_URL", "TUNEYARD_API_KEY"}


@pytest.fixture(scope="module")
def routes() -> list[tuple[str, re.Pattern[str]]]:
    """Method and path of every route."""
    with TemporaryDirectory() as home:
        paths = create_app(Settings(home=Path(home))).openapi()["paths"]
    return [
        (method.upper(), re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path))))
        for path, methods in paths.items()
        for method in methods
    ]


@pytest.mark.parametrize("page", PAGES)
def test_all_code_of_a_page_stands_in_fences_of_a_known_language(page: str) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES
    prose = without_fences(page)
    assert "```" not in prose
    assert re.findall(r"^(?: {4}|\t).*", prose, re.MULTILINE) == []


def test_each_block_of_commands_runs_or_says_why_not() -> None:
    found = [block for block in all_blocks() if block.language == "bash"]
    assert {block.name for block in found if block.reason not in (None, *REASONS)} == set()
    assert {block.reason for block in found} - {None} == REASONS
    marks = sum(text_of(page).count("<!-- not run:") for page in PAGES)
    assert marks == sum(block.reason is not None for block in found)
    assert sum(block.runs for block in found) > 15


def test_every_how_to_and_the_tutorial_has_commands() -> None:
    for page in PAGES:
        if page.startswith("docs/howto/") or page in ("README.md", "docs/tutorial.md"):
            assert any(block.language == "bash" for block in blocks(page)), page


@pytest.mark.parametrize("command", NOT_RUN, ids=lambda command: command.line)
def test_a_command_that_does_not_run_is_one_that_its_program_takes(
    command: Command, routes: list[tuple[str, re.Pattern[str]]]
) -> None:
    program, *rest = command.words
    match program:
        case "tuneyard":
            parse(rest)
            check_recipe(rest)
        case "make":
            assert set(rest) <= TARGETS
        case "curl":
            check_request(rest, routes)
        case "pip":
            check_install(rest)
        case "python" | "sh":
            check_script(rest)
        case _:
            # Compose reads its lines in tests/integration/test_compose.py.
            assert program in ("docker", "git", "sudo")


def check_recipe(words: list[str]) -> None:
    """An example that is submitted is there, and what it says is a job or a pipeline."""
    if words[0] != "submit" or not words[1].startswith("examples/"):
        return
    document = yaml.safe_load((ROOT / words[1]).read_text(encoding="utf-8"))
    if "pipeline" in document:
        read_pipeline(document)
    else:
        read_spec(document)


def check_request(words: list[str], routes: list[tuple[str, re.Pattern[str]]]) -> None:
    """The address is one of ours, and takes the method."""
    if "--unix-socket" in words:
        return  # a runner's
    (url,) = [word for word in words if word.startswith("http")]
    path = urlsplit(url).path
    sends = {"-d", "-F", "--data"} & set(words)
    method = words[words.index("-X") + 1] if "-X" in words else "POST" if sends else "GET"
    if "/flower/" not in path:
        path = path[path.index("/api/v1") :]
        assert any(method == each and at.fullmatch(path) for each, at in routes), path


def check_install(words: list[str]) -> None:
    """The extras are ours."""
    known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for extras in re.findall(r"tuneyard\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(known)


def check_script(words: list[str]) -> None:
    """The module or the file is there."""
    words = [word for word in words if word != "-P"]
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None
    else:
        assert (ROOT / words[0]).is_file()


def test_settings_that_are_put_into_the_environment_are_settings() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | OF_CLIENTS
    composed = "".join(file.read_text() for file in ROOT.glob("docker-compose*.yml"))
    known |= set(re.findall(r"\$\{(TUNEYARD_\w+)", composed)) | {f"{PREFIX}SETTINGS", f"{PREFIX}X"}
    for page in PAGES:
        for name in re.findall(rf"\b({PREFIX}[A-Z0-9_]+)\b", text_of(page)):
            assert {name, name.removesuffix(FILE_SUFFIX)} & known, f"{page}: {name}"


def test_what_the_readme_leaves_to_the_tutorial_runs_there() -> None:
    there = [c.words for block in blocks("docs/tutorial.md") if block.runs for c in commands(block)]
    # Installing, starting and stopping are what the tests do before and after.
    around = {("make", "setup"), ("tuneyard", "up"), ("tuneyard", "down")}
    left = [c for c in NOT_RUN if c.block.reason == "run by the tutorial"]
    left = [command for command in left if command.words[:2] not in around]
    assert len(left) > 8
    for command in left:
        same = [words for words in there if words[:2] == command.words[:2]]
        assert any(set(command.words) <= set(words) for words in same), command.line


@pytest.mark.parametrize("page", PAGES)
def test_a_command_in_a_sentence_is_one_that_tuneyard_takes(page: str) -> None:
    for span in code_spans(page):
        if re.fullmatch(r"tuneyard [a-z].*", span) and "|" not in span:
            said = objection([word for word in shlex.split(span)[1:] if word != "…"])
            # A sentence may leave out what the one beside it names.
            assert re.fullmatch("(Missing|no command is named).*|", said), f"{page}: {span}"
        elif re.fullmatch(r"make [a-z0-9-]+", span):
            assert span.split()[1] in TARGETS, f"{page}: {span}"


def objection(words: list[str]) -> str:
    """What the command says against a line; nothing where it takes it."""
    try:
        parse(words)
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def test_the_example_of_every_command_is_one_that_it_takes() -> None:
    page = text_of("docs/reference/cli.md")
    examples = re.findall(r"^Example: `(.*)`$", page, re.MULTILINE)
    assert len(examples) == page.count("\n## `tuneyard ") > 25
    for example in examples:
        words = shlex.split(example)
        parse(words[words.index("tuneyard") + 1 :])


def test_a_command_that_is_not_there_would_be_noticed() -> None:
    with pytest.raises(KeyError):
        parse(["sheduler"])
    with pytest.raises(Exception, match="No such option"):
        parse(["keys", "create", "vision", "--rool", "member"])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_what_is_there(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences(page)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_page_names_are_there(page: str) -> None:
    files = {file.name: file.read_text() for file in (ROOT / "tests").glob("**/*.py")}
    for name, test in re.findall(r"`[^`]*?(test_\w+\.py)(?:::(\w+))?`", text_of(page)):
        assert name in files, f"{page}: {name}"
        assert f"def {test}" in files[name], f"{page}: {test}"
    for test in re.findall(r"`…::(\w+)`", text_of(page)):
        assert any(f"def {test}(" in text for text in files.values()), f"{page}: {test}"


def anchors(path: Path) -> set[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    kept = ("".join(c for c in h.lower() if c.isalnum() or c in "-_ ") for h in headings)
    return {heading.replace(" ", "-") for heading in kept}


def test_missing_lines_are_found_in_their_order() -> None:
    assert missing_line("a…\nc\n", "abc\n  c\n") is None
    assert missing_line("c\na…\n", "abc\nc\n") == "a…"
    assert missing_line("a\n", "ab\n") == "a"


# Troubleshooting ---------------------------------------------------------------------------------

TROUBLE = re.findall(r"^## (.*)$", text_of("docs/troubleshooting.md"), re.MULTILINE)
MESSAGES = [span for heading in TROUBLE for span in re.findall(r"`([^`]+)`", heading)]


def test_every_heading_of_the_troubleshooting_has_a_message() -> None:
    assert len(MESSAGES) >= len(TROUBLE) > 25
    assert [heading for heading in TROUBLE if "`" not in heading] == []


HOLE = "\0"


def texts_of_the_code() -> set[str]:
    """Every text in the code; HOLE is where an f-string puts something in."""
    folders = ("api", "checks", "cli", "client", "local", "models", "runners", "scheduler", "specs")
    files = [f for name in (*folders, "store", "workers") for f in (ROOT / name).glob("**/*.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    return {text for tree in trees for text in texts(tree)}


def texts(node: ast.AST) -> Iterator[str]:
    """Texts below a node; of an f-string the whole and not its pieces."""
    match node:
        case ast.JoinedStr(values=values):
            yield "".join(v.value if isinstance(v, ast.Constant) else HOLE for v in values)
        case ast.Constant(value=str(text)):
            yield text.strip()
        case _:
            for child in ast.iter_child_nodes(node):
                yield from texts(child)


CODE = texts_of_the_code()


@pytest.mark.parametrize("message", MESSAGES)
def test_a_heading_of_the_troubleshooting_is_what_the_code_says(message: str) -> None:
    assert any(says(text, message) for text in CODE)


def test_what_the_code_does_not_say_is_noticed() -> None:
    for message in (
        "The wheel is gone.",
        "… is not a thing that it says",
        "It waits for Tuesday.",
    ):
        assert not any(says(text, message) for text in CODE)


def says(text: str, message: str) -> bool:
    """Whether a text of the code may be read as this, or holds it; … in the message is anything."""
    filled = re.compile(".+?".join(map(re.escape, text.split(HOLE))), re.DOTALL)
    if len(letters(text)) >= 10 and (filled.fullmatch(message) or filled.fullmatch(f"{message}.")):
        return True
    if 2 * len(letters(text)) >= len(letters(message)) > 0 and filled.search(message):
        return True
    return re.search(".*".join(map(re.escape, message.split("…"))), text) is not None


def letters(text: str) -> str:
    """What is left of a text without spaces and signs."""
    return re.sub(r"[\W\d_]", "", text)
