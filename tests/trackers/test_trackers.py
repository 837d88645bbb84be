"""The trackers' own packages, as `make test-trackers` installs them: what they keep of a run.

Nothing leaves this machine: wandb and swanlab have no key, MLflow's server is on 127.0.0.1.
"""

import json
import sqlite3
from pathlib import Path

import pytest
from support.attempts_by_hand import Ran, run_process
from support.tiny_models import a_dataset, a_tiny_base

from tuneyard.specs.runner import TRACKER_FILE
from tuneyard.store.folder import verify_folder

ARGUMENTS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "run_name": "tuny",
    "project": "yard",
    "swanlab_project": "yard",
    "val_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
}


@pytest.fixture(autouse=True)
def readable(monkeypatch) -> None:
    """MLflow reads folders only where it is told to."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": a_tiny_base(folder / "base"), "dataset": a_dataset(folder / "rows.jsonl")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, inputs) -> Ran:
    return tune(tmp_path_factory.mktemp("plain"), inputs)


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory, inputs) -> Ran:
    """Reported to all that is installed, without a key of any."""
    return tune(tmp_path_factory.mktemp("all"), inputs, report_to="all")


def tune(folder: Path, inputs: dict[str, Path], *, variables=None, **arguments) -> Ran:
    environment = {}
    if variables is not None:
        file = folder / "variables.json"
        file.write_text(json.dumps(variables))
        environment[TRACKER_FILE] = str(file)
    ran = run_process(
        folder, "finetune", inputs=inputs, arguments=ARGUMENTS | arguments, environment=environment
    )
    assert ran.code == 0, (ran.workdir / "log").read_text()
    return ran


def warnings(ran: Ran, code: str) -> list[str]:
    return [each["message"] for each in ran.of_type("warning") if each["code"] == code]


def test_all_trackers_at_once_change_no_bit_and_none_fails(everywhere, plain):
    assert warnings(everywhere, "tracker_failed") == []
    assert everywhere.adapter_sha256 == plain.adapter_sha256
    folders = {e["path"].partition("/")[0] for e in verify_folder(reports(everywhere))["files"]}
    assert folders == {"runs", "wandb", "mlruns", "swanlog", "trackio"}


def reports(ran: Ran) -> Path:
    return ran.workdir / "reports"


def test_without_a_key_a_run_is_kept_for_later_and_that_is_said(everywhere):
    said = warnings(everywhere, "tracker")
    assert sorted(each.split()[0] for each in said) == ["swanlab", "wandb"]
    assert all("is kept for" in each for each in said)


def test_wandbs_folder_holds_the_runs_history(everywhere):
    (record,) = reports(everywhere).glob("wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    assert all(name in content for name in (b"train/loss", b"eval/loss", b"learning_rate", b"yard"))


def test_mlflows_folder_holds_every_step(everywhere):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(reports(everywhere) / "mlruns").as_uri())
    check_mlflow(client, everywhere)


def check_mlflow(client, ran: Ran) -> None:
    experiment = client.get_experiment_by_name("yard")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("tuny", "FINISHED")
    assert run.data.params["max_steps"] == "3"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {each.step: each.value for each in history} == pytest.approx(ran.metric("loss"))
    assert run.data.metrics["eval_loss"] == pytest.approx(ran.metric("eval_loss")[3])


def test_trackios_database_holds_every_step(everywhere):
    (database,) = reports(everywhere).glob("trackio/*.db")
    with sqlite3.connect(database) as found:
        rows = found.execute("SELECT step, metrics FROM metrics ORDER BY step, id").fetchall()
    points = [(step, json.loads(text)) for step, text in rows]
    losses = {step: values["train/loss"] for step, values in points if "train/loss" in values}
    assert losses == pytest.approx(everywhere.metric("loss"))


def test_swanlabs_folder_holds_the_run(everywhere):
    (record,) = reports(everywhere).glob("swanlog/run-*/*.swanlab")
    assert b"train/loss" in record.read_bytes()


def test_a_variable_of_the_workers_says_where_to_report(tmp_path, inputs):
    from mlflow.tracking import MlflowClient

    uri = (tmp_path / "elsewhere").as_uri()
    ran = tune(tmp_path, inputs, report_to="mlflow", variables={"MLFLOW_TRACKING_URI": uri})
    check_mlflow(MlflowClient(tracking_uri=uri), ran)
    assert not reports(ran).exists()


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "swanlab"])
def test_a_server_that_is_not_there_costs_the_tracker_alone(tmp_path, inputs, plain, tracker):
    nowhere = "http://127.0.0.1:9"
    variables = {
        "WANDB_API_KEY": "a" * 40,
        "WANDB_BASE_URL": nowhere,
        "MLFLOW_TRACKING_URI": nowhere,
        "SWANLAB_API_KEY": "b" * 24,
        "SWANLAB_API_HOST": nowhere,
        "SWANLAB_WEB_HOST": nowhere,
    }
    ran = tune(tmp_path, inputs, report_to=tracker, variables=variables)
    assert ran.adapter_sha256 == plain.adapter_sha256
    assert len(warnings(ran, "tracker_failed")) == 1
    written = b"".join(
        (reports(ran) / e["path"]).read_bytes()
        for e in (verify_folder(reports(ran))["files"] if reports(ran).exists() else [])
    )
    assert b"a" * 40 not in written
    assert b"b" * 24 not in written
