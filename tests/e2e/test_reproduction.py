"""A bundle, the same run again, and bit-equal weights: through every part."""

import json
import zipfile
from pathlib import Path

from support.yards import LocalYard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROWS = [
    {"instruction": "Who are you?", "output": "I am Tuny."},
    {"instruction": "Who made you?", "output": "Tuneyard did."},
    {"instruction": "Are you a person?", "output": "No, a small model."},
]
ASKED = {
    "kind": "finetune",
    "name": "reproduced",
    "device": "cpu",
    "lora_target": "q_proj,v_proj",
    "layers_to_transform": [28, 29],
    "lora_dropout": 0.1,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "cutoff_len": 64,
    "learning_rate": 0.001,
    "report_to": "tensorboard",
    "plot_loss": True,
}


def test_a_bundle_run_again_gives_the_same_weights(
    yard: LocalYard, base_model: str, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = yard.put_file(rows)
    job = yard.submit(**ASKED, model=base_model, dataset=file)
    assert yard.finish(job)["state"] == "succeeded", yard.job(job)

    results = tmp_path / "results"
    yard.cli("fetch", job, "--out", str(results))
    there = {path.name for path in results.iterdir()}
    assert there >= {
        "adapter_model.safetensors", "all_results.json", "reproduction.json", "runs",
        "train_results.json", "trainer_log.jsonl", "trainer_state.json", "training_args.yaml",
        "training_loss.png",
    }  # fmt: skip
    curves = EventAccumulator(str(results / "runs" / job)).Reload()
    assert [each.step for each in curves.Scalars("train/loss")] == [1, 2, 3]

    bundle = tmp_path / "reproduced.zip"
    yard.cli("bundle", job, "--out", str(bundle), "--with-data")
    yard.cli("files", "rm", file)  # the bundle has what it needs
    again = json.loads(yard.cli("rerun", str(bundle), "--json").stdout)
    assert again["same"], again
    assert again["differences"] == []
    assert again["was"].keys() == {"adapter_model.safetensors"}
    other = yard.job(again["job"])
    assert (other["name"], other["spec"]["metadata"]) == ("reproduced again", {"rerun_of": job})

    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(folder)
    about = json.loads((folder / "bundle.json").read_text())
    about["platform"]["threads"] = 7
    (folder / "bundle.json").write_text(json.dumps(about))
    said = yard.cli("rerun", str(folder), "--compare", again["job"]).stdout.splitlines()
    weights = again["is"]["adapter_model.safetensors"]
    assert said[0] == f"the same weights: adapter_model.safetensors  sha256 {weights}"
    assert said[1].startswith("  threads: 7 then, ")
