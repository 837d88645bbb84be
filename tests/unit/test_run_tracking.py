"""Trackers follow a run; none of them can fail it, delay it, or learn what it may not."""

import json
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.attempts_by_hand import Ran, run_here
from support.tiny_models import a_dataset, a_tiny_base
from support.yards import wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tuneyard.runners import tracking
from tuneyard.runners.failures import Stopped
from tuneyard.runners.finetune import finetune
from tuneyard.runners.training import Trainer
from tuneyard.specs.errors import SpecRejected
from tuneyard.specs.exits import ExitCode
from tuneyard.specs.jobs import read_spec
from tuneyard.specs.runner import TRACKER_FILE
from tuneyard.specs.settings import load_settings
from tuneyard.store.folder import verify_folder
from tuneyard.workers.tracker_access import tracker_environment

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ARGUMENTS = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.01}
MEASURED = {"val_size": 2, "eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": a_tiny_base(folder / "base"), "dataset": a_dataset(folder / "rows.jsonl")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, inputs) -> Ran:
    return tune(tmp_path_factory.mktemp("plain"), inputs)


def tune(
    folder: Path, inputs: Mapping[str, Path], *, resume: Path | None = None, **arguments: object
) -> Ran:
    return run_here(
        folder,
        finetune,
        inputs=inputs,
        resume=resume and str(resume),
        arguments=ARGUMENTS | arguments,
    )


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> its points, as tensorboard itself reads them."""
    read = EventAccumulator(str(folder))
    read.Reload()
    tags = read.Tags()["scalars"]
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in tags}


def failures(ran: Ran) -> list[str]:
    found = ran.of_type("warning")
    return [each["message"] for each in found if each["code"] == "tracker_failed"]


# What arrives ------------------------------------------------------------------------------------


def test_tensorboard_reads_what_the_run_measured(tmp_path, inputs, plain):
    ran = tune(tmp_path, inputs, report_to="tensorboard", run_name="tuny", **MEASURED)
    reports = ran.workdir / "reports"
    assert verify_folder(reports)["kind"] == "reports"
    found = curves(reports / "runs" / "tuny")
    assert dict(found["train/loss"]) == pytest.approx(ran.metric("loss"))
    assert dict(found["eval/loss"]) == pytest.approx(ran.metric("eval_loss"))
    assert {"train/learning_rate", "train/grad_norm", "train/epoch"} <= found.keys()
    assert failures(ran) == []
    assert ran.of_type("result") == [ran.events[-1]]


def test_as_often_is_reported_as_is_logged(tmp_path, inputs):
    ran = tune(tmp_path, inputs, report_to="tensorboard", logging_steps=3)
    found = curves(ran.workdir / "reports" / "runs" / "job_by_hand")
    assert [step for step, _ in found["train/loss"]] == [3, 4]  # and always the last
    losses = ran.metric("loss")
    means = {3: sum(losses[step] for step in (1, 2, 3)) / 3, 4: losses[4]}
    assert dict(found["train/loss"]) == pytest.approx(means)


def test_a_resumed_run_is_reported_whole(tmp_path, inputs):
    first = tune(tmp_path, inputs, max_steps=2, lr_scheduler_type="constant", save_steps=2)
    checkpoint = first.workdir / first.of_type("checkpoint")[0]["path"]
    ran = tune(
        tmp_path,
        inputs,
        lr_scheduler_type="constant",
        report_to="tensorboard",
        resume=checkpoint,
    )
    assert min(ran.metric("loss")) == 3
    found = curves(ran.workdir / "reports" / "runs" / "job_by_hand")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4]


def test_the_result_does_not_depend_on_who_follows(tmp_path, inputs, plain):
    ran = tune(tmp_path, inputs, report_to="tensorboard")
    assert ran.adapter_sha256 == plain.adapter_sha256
    told = {"training_args.yaml", "tuneyard.json"}  # what was asked stands in them
    outputs = [verify_folder(each.workdir / "output")["files"] for each in (ran, plain)]
    one, other = ([e for e in files if e["path"] not in told] for files in outputs)
    assert one == other
    assert not (plain.workdir / "reports").exists()


# What goes wrong ---------------------------------------------------------------------------------

NOTHING = "def log(*_, **__): pass\nfinish = log\n"
A_RUN = "def init(**_):\n    import sys\n    return sys.modules['wandb']\n"
SLEEP = "open('here', 'w').close(); import time; time.sleep(600)"
SETTINGS = "Settings = dict\n"
FAULTS = {
    "its import": ("raise RuntimeError('built for another Python')", "another Python"),
    "its start": (
        "def init(**_): raise ValueError('bad key ' + __import__('os').environ['WANDB_API_KEY'])",
        "ValueError: bad key …",
    ),
    "an exit": ("def init(**_): raise SystemExit(0)", "SystemExit"),
    "a call": (
        A_RUN + "def log(*_, step, **__): assert step < 2, 'no more steps'\n",
        "no more steps",
    ),
    "a crash": ("def init(**_):\n    import os; os.abort()", "signal 6"),
    "the network": (
        "def init(**_):\n    import socket; socket.create_connection(('127.0.0.1', CLOSED), 5)",
        "ConnectionRefusedError",
    ),
}
HANGS = {
    "its import": SLEEP,
    "its start": f"def init(**_):\n    {SLEEP}",
    "a call": f"{A_RUN}def log(*_, **__):\n    {SLEEP}",
    "its end": f"{A_RUN}{NOTHING}def finish():\n    {SLEEP}\nopen('here', 'w').close()",
    "a server that is silent": (
        "def init(**_):\n    import socket; open('here', 'w').close()\n"
        "    socket.create_connection(('127.0.0.1', OPEN)).recv(1)"
    ),
    "a child of its own": (
        "import subprocess, sys\n"
        f'def init(**_):\n    subprocess.Popen([sys.executable, "-c", "{SLEEP}"]).wait()'
    ),
}


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, str]]:
    """A port that nobody listens on, and one on which nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield {"OPEN": str(silent.getsockname()[1]), "CLOSED": str(closed.getsockname()[1])}


@pytest.fixture
def a_wandb(tmp_path, monkeypatch, ports):
    """Put a package `wandb` of this source where runners find it; the worker passes a key."""

    def install(source: str) -> None:
        folder = tmp_path / "packages"
        folder.mkdir()
        for name, port in ports.items():
            source = source.replace(name, port)
        (folder / "wandb.py").write_text(SETTINGS + source)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        variables = tmp_path / "trackers.json"
        variables.write_text('{"WANDB_API_KEY": "the-key"}')
        monkeypatch.setenv(TRACKER_FILE, str(variables))

    return install


@pytest.mark.parametrize("what", FAULTS)
def test_a_tracker_that_fails_is_one_warning_and_the_same_result(
    tmp_path, inputs, plain, a_wandb, what
):
    source, expected = FAULTS[what]
    a_wandb(source)
    ran = tune(tmp_path, inputs, report_to="wandb")
    assert ran.code == ExitCode.DONE
    assert ran.adapter_sha256 == plain.adapter_sha256
    (said,) = failures(ran)
    assert expected in said
    assert "the-key" not in (ran.workdir / "events.jsonl").read_text()


@pytest.mark.parametrize("what", HANGS)
def test_a_tracker_that_hangs_is_left_behind(tmp_path, inputs, plain, a_wandb, monkeypatch, what):
    def once_it_hangs(reporters: list[tracking.Reporter]) -> None:
        wait_for((reporters[0].files / "here").exists, within_s=30, what="the hang")
        finish_all(reporters)

    finish_all = tracking._finish_all
    monkeypatch.setattr(tracking, "_finish_all", once_it_hangs)
    monkeypatch.setattr(tracking, "FINISH_S", 0.5)
    a_wandb(HANGS[what])
    began = time.monotonic()
    ran = tune(tmp_path, inputs, report_to="wandb")
    assert time.monotonic() - began < 60  # of 600
    assert ran.adapter_sha256 == plain.adapter_sha256
    (said,) = failures(ran)
    assert "had not finished 0.5 s after the run" in said


def test_a_run_that_is_stopped_waits_for_no_tracker(tmp_path, inputs, a_wandb, monkeypatch):
    def stop(trainer: Trainer) -> None:
        wait_for((trainer.workdir / HERE).exists, within_s=30, what="the hang")
        raise Stopped(at_checkpoint=True)

    monkeypatch.setattr(Trainer, "train", stop)
    monkeypatch.setattr(tracking, "FINISH_S", 300.0)
    a_wandb(HANGS["its start"])
    began = time.monotonic()
    ran = tune(tmp_path, inputs, report_to="wandb")
    assert time.monotonic() - began < 60
    assert ran.code == ExitCode.STOPPED_AT_CHECKPOINT
    assert failures(ran) == []


HERE = ".trackers/wandb/files/here"


def test_one_tracker_that_fails_leaves_the_others_alone(tmp_path, inputs, a_wandb):
    a_wandb("def init(**_): raise ValueError('no')")
    ran = tune(tmp_path, inputs, report_to=["wandb", "tensorboard"])
    assert len(failures(ran)) == 1
    assert "train/loss" in curves(ran.workdir / "reports" / "runs" / "job_by_hand")


def test_a_package_that_is_missing_is_said_where_it_was_named(tmp_path, inputs):
    ran = tune(tmp_path, inputs, report_to="mlflow", use_swanlab=True)
    assert ran.code == ExitCode.DONE
    said = failures(ran)
    assert [each.split()[0] for each in said] == ["mlflow", "swanlab"]
    assert all("not installed" in each for each in said)


def test_all_means_those_that_are_there(tmp_path, inputs):
    ran = tune(tmp_path, inputs, report_to="all")
    assert failures(ran) == []
    assert (ran.workdir / "reports" / "runs").is_dir()


def test_a_run_that_fails_has_told_its_tracker_until_then(tmp_path, inputs):
    ran = tune(tmp_path, inputs, report_to="tensorboard", learning_rate=10.0, max_grad_norm=0,
               max_steps=200)  # fmt: skip
    assert ran.code == ExitCode.LOSS_NOT_FINITE
    files = ran.workdir / ".trackers" / "tensorboard" / "files"
    assert len(curves(files / "runs" / "job_by_hand")["train/loss"]) == len(ran.metric("loss"))


# What a tracker may know -------------------------------------------------------------------------


def test_files_that_hold_a_key_are_not_kept(tmp_path, inputs, a_wandb):
    a_wandb(
        A_RUN
        + NOTHING
        + "open('config', 'w').write('api_key: the-key')\n"
        + "open('kept', 'w').write('steps')\n"
        + "import os; os.symlink('/etc/passwd', 'link')\n"
    )
    ran = tune(tmp_path, inputs, report_to="wandb")
    assert failures(ran) == []
    assert [e["path"] for e in verify_folder(ran.workdir / "reports")["files"]] == ["kept"]


def test_a_worker_hands_on_what_its_setting_names_by_a_file_of_its_own(tmp_path):
    environ = {"WANDB_API_KEY": "k", "WANDB_MODE": "offline", "DATABASE_URL": "secret"}
    asked, quiet = {"report_to": "wandb"}, {"report_to": "none", "use_swanlab": False}
    silent = load_settings({}, home=tmp_path)
    assert tracker_environment(environ, silent, asked) == {}
    telling = load_settings({}, home=tmp_path, tracker_variables="WANDB_API_KEY, MLFLOW_TOKEN")
    assert tracker_environment(environ, telling, quiet) == {}
    (file,) = tracker_environment(environ, telling, asked).values()
    assert json.loads(Path(file).read_text()) == {"WANDB_API_KEY": "k"}
    assert Path(file).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["TUNEYARD_DATABASE_URL", "PATH", "wandb_api_key"])
def test_only_a_trackers_variables_can_be_handed_on(tmp_path, name):
    with pytest.raises(Exception, match=f"WANDB_API_KEY or HTTPS_PROXY, not '{name}'"):
        load_settings({}, home=tmp_path, tracker_variables=f"WANDB_MODE,{name}")


# What a spec may say -----------------------------------------------------------------------------

FINETUNE = {"kind": "finetune", "model": "m", "dataset": "file_" + "0" * 32}


@pytest.mark.parametrize(
    ("said", "code", "hint"),
    [
        ({"report_to": "wanddb"}, "bad_choice", "wandb"),
        ({"report_to": ["tensorboard", "neptune"]}, "not_supported_yet", "tensorboard"),
        ({"report_to": "none,wandb"}, "conflicting_fields", "leave none out"),
        ({"swanlab_mode": "nowhere"}, "bad_choice", "local"),
        ({"swanlab_api_key": "SECRET"}, "not_supported_yet", "tracker_variables"),
    ],
)
def test_a_tracker_that_cannot_be_is_refused_at_submission(said, code, hint):
    with pytest.raises(SpecRejected) as refused:
        read_spec(FINETUNE | said)
    (problem,) = refused.value.problems
    assert problem.code == code
    assert problem.field == next(iter(said))
    assert hint in (problem.hint or "")
    assert "SECRET" not in problem.message


def test_llama_factorys_words_for_trackers_are_understood():
    spec, notes = read_spec(
        FINETUNE
        | {"report_to": "tensorboard", "run_name": "tuny", "plot_loss": "yes", "project": "p"}
        | {"use_swanlab": True, "swanlab_mode": "local", "logging_dir": "runs"}
    )
    assert [note.field for note in notes] == ["logging_dir"]
    assert spec.arguments().items() >= {"report_to": "tensorboard", "plot_loss": True}.items()
