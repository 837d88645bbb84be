"""Pipelines by the command line, against recorded answers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import Command
from support.recorded_api import Answer, RecordedApi, a_file, a_job, events, ids, moved, page
from support.recorded_api import recorded_api as recording

PIPELINE = "pipe_" + "0" * 31 + "1"
TUNE, ASK = ids("job", 2)
FILE, *_ = ids("file", 1)
RECIPE = """
pipeline:
  - name: tune
    kind: finetune
    model: smollm2-135m-instruct
    dataset: data.jsonl
  - name: ask
    kind: inference
    model: {from: tune}
    prompts:
      - Who are you?
"""


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedApi]:
    with recording() as api:
        for name, value in api.env.items():
            monkeypatch.setenv(name, value)
        api.on("GET", "/files", page())
        known = a_file(FILE, name="data.jsonl", sha256="0")
        api.on("POST", "/files", Answer(known, 201))
        api.on("GET", f"/files/{FILE}", known)
        jobs = [a_job(TUNE, name="tune"), a_job(ASK, name="ask", state="blocked")]
        api.on("POST", "/jobs", Answer({"id": PIPELINE, "jobs": jobs}, 201))
        api.on("GET", f"/pipelines/{PIPELINE}", {"id": PIPELINE, "jobs": jobs})
        yield api


@pytest.fixture
def tuneyard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path / "home"))
    (tmp_path / "data.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (tmp_path / "steps.yaml").write_text(RECIPE)
    return Command(monkeypatch, capsys)


def ending(api: RecordedApi, job: str, state: str) -> None:
    api.on(
        "GET", f"/jobs/{job}/events", events(moved(1, "submit", "queued"), moved(2, state, state))
    )
    api.on("GET", f"/jobs/{job}", a_job(job, state=state))
    api.on("GET", f"/jobs/{job}/artifacts", page())


def test_a_pipelines_files_are_uploaded_and_overrides_name_their_step(
    tuneyard: Command, api: RecordedApi
) -> None:
    done = tuneyard("submit", "steps.yaml", "--set", "tune.lora_rank=16")
    assert done.code == 0
    assert done.out.splitlines()[:2] == [f"{TUNE}  tune  queued", f"{ASK}  ask  blocked"]
    assert f"tuneyard watch {PIPELINE}" in done.out
    (sent,) = [asked.json for asked in api.asked if asked.path == "/jobs"]
    tune, ask = sent["pipeline"]
    assert (tune["dataset"], tune["lora_rank"]) == (FILE, 16)
    assert ask["model"] == {"from": "tune"}


@pytest.mark.parametrize("override", ["lora_rank=16", "tone.lora_rank=16"])
def test_an_override_of_no_step_is_your_input_and_lists_them(
    tuneyard: Command, api: RecordedApi, override: str
) -> None:
    done = tuneyard("submit", "steps.yaml", "--set", override)
    assert done.code == 2
    assert "tune, ask" in done.err
    assert api.asked == []


def test_a_mistake_in_a_step_is_named_before_anything_travels(
    tuneyard: Command, api: RecordedApi, tmp_path: Path
) -> None:
    (tmp_path / "steps.yaml").write_text(RECIPE.replace("from: tune", "from: tone"))
    done = tuneyard("submit", "steps.yaml")
    assert done.code == 2
    assert "pipeline[1].model" in done.err
    assert "did you mean tune?" in done.err
    assert api.asked == []


@pytest.mark.parametrize(("last", "code"), [("succeeded", 0), ("failed", 1)])
def test_waiting_and_watching_follow_each_step_and_end_with_the_worst(
    tuneyard: Command, api: RecordedApi, last: str, code: int
) -> None:
    ending(api, TUNE, "succeeded")
    ending(api, ASK, last)
    for words in (("submit", "steps.yaml", "--wait"), ("watch", PIPELINE)):
        done = tuneyard(*words)
        assert done.code == code
        assert [line for line in done.out.splitlines() if line.endswith(")")] == [
            "tune  (finetune)",
            "ask  (finetune)",
        ]


def test_a_pipeline_is_shown_and_cancelled_by_its_id(tuneyard: Command, api: RecordedApi) -> None:
    jobs = [a_job(TUNE, state="cancelling"), a_job(ASK, state="cancelled")]
    api.on("POST", f"/pipelines/{PIPELINE}/cancel", {"id": PIPELINE, "jobs": jobs})
    assert TUNE in tuneyard("show", PIPELINE).out
    done = tuneyard("cancel", PIPELINE)
    assert done.out.splitlines() == [f"{TUNE}  cancelling", f"{ASK}  cancelled"]
