"""Every command of the documentation that can run here, as it stands, in its page's order.

A page is one shell in a folder with the examples, with a team and a home of its own; all pages
share the `tuneyard up` of this folder's tests.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.docs import PAGES, ROOT, blocks, mark, missing_line, script
from support.yards import LocalYard

from tuneyard.models.engine import administer
from tuneyard.models.keys import add_key, new_key

RUN = [page for page in PAGES if any(block.runs for block in blocks(page))]
ADDRESS = "http://127.0.0.1:8800"
"""Where `tuneyard up` listens; the tests' own listens wherever a port is free."""


@pytest.mark.parametrize("page", RUN)
def test_a_page_runs_as_it_is_written(
    page: str, yard: LocalYard, pages: Path, base_model: str
) -> None:
    here = pages / page.replace("/", "-")
    shutil.copytree(ROOT / "examples", here / "clone" / "examples")
    _write_profile(yard, here / ".tuneyard", team=page.lower().replace("/", "-"))
    # A refused request fails its page.
    (here / ".curlrc").write_text("fail-with-body\nnoproxy = *\n")
    env = {name: value for name, value in yard.env.items() if not name.startswith("TUNEYARD_")}
    env |= {"HOME": str(here), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    wanted = list(script(page))
    texts = [text.replace(ADDRESS, yard.profile["url"]) for _, text in wanted]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(["exec 2>&1", *texts])],
        cwd=here / "clone",
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=280,
    )
    printed = done.stdout
    assert done.returncode == 0, printed[-4000:]
    for number, (block, _) in enumerate(wanted):
        output = printed.partition(mark(number))[2].partition(mark(number + 1))[0]
        missing = missing_line(block.prints or "", output)
        assert missing is None, f"{block.name} does not print {missing!r}:\n{output}"


def _write_profile(yard: LocalYard, home: Path, *, team: str) -> None:
    """What `tuneyard up` writes, but for a team that no other page has."""
    key, postgres = new_key(), yard.home / "postgres"
    password, port = ((postgres / name).read_text().strip() for name in ("password", "port"))
    url = f"postgresql://postgres:{password}@127.0.0.1:{port}/tuneyard"
    with administer(url, "test") as tx:
        add_key(tx, team, key, name="docs", role="admin")
    home.mkdir()
    (home / "profile.json").write_text(json.dumps(yard.profile | {"api_key": key}))
