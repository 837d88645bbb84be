"""Made models: the same for the same arguments, and fit to be a base."""

from pathlib import Path

import pytest
from support.commands import Command
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuneyard.checks.models import model_facts
from tuneyard.runners.fixtures import write_tiny_llama


def test_a_tiny_llama_is_the_same_each_time_and_answers(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_tiny_llama(tmp_path / name, hidden=32, layers=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert model_facts(tmp_path / "one")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    messages = [{"role": "user", "content": "é?"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert said.shape[1] > ids["input_ids"].shape[1]
    assert "é?" in tokenizer.decode(said[0])


def test_a_folder_that_holds_something_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    tuneyard = Command(monkeypatch, capsys)
    done = tuneyard("fixtures", "tiny-llama", str(tmp_path))
    assert done.code == 2
    assert "is there already" in done.err
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_makes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tuneyard = Command(monkeypatch, capsys)
    done = tuneyard("fixtures", "tiny-llama", str(tmp_path / "tiny"), "--hidden", "16", "--json")
    assert done.code == 0, done.err
    assert (tmp_path / "tiny" / "config.json").is_file()
    assert tuneyard("fixtures", "tiny-llama", str(tmp_path / "x"), "--hidden", "17").code == 2
