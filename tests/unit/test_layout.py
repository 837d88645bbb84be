"""What import-linter is told, and what the architecture page says, is one table."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def told() -> dict[str, set[str]]:
    """Folder -> folders that import-linter forbids it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rows = [
        contract
        for contract in project["tool"]["importlinter"]["contracts"]
        if len(contract["source_modules"]) == 1
    ]
    return {
        contract["source_modules"][0].removeprefix("tuneyard."): {
            name.removeprefix("tuneyard.")
            for name in contract["forbidden_modules"]
            if name.count(".") == 1
        }
        for contract in rows
    }


def said() -> dict[str, set[str]]:
    """Folder -> folders that the table in docs/architecture.md lets it import."""
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)/` \| .* \| (.+) \|$", page, re.MULTILINE)
    return {name: set(re.findall(r"\w+", may)) for name, may in rows}


def test_import_linter_holds_the_table_of_the_architecture_page() -> None:
    table = said()
    assert {"specs", "runners", "cli"} <= table.keys()
    for name, may in table.items():
        allowed = {each for each in may if each in table} | {name}
        assert told()[name] == table.keys() - allowed, name


def test_runners_know_no_database_no_broker_and_no_settings() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (runners,) = (
        contract["forbidden_modules"]
        for contract in project["tool"]["importlinter"]["contracts"]
        if contract["source_modules"] == ["tuneyard.runners"]
    )
    assert {"tuneyard.specs.settings", "tuneyard.store.remote", "sqlalchemy", "celery"} <= set(
        runners
    )
