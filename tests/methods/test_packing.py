"""Rows without padding between them, under every way to tune: the same losses, or a reason."""

from pathlib import Path

import pytest
from support.tiny_models import ANIMALS, a_dataset, a_tiny_base
from support.tunings import PROMPTED, TUNINGS, tune_by

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

NOT_SHARED = {**dict.fromkeys(PROMPTED, "virtual tokens"), "qlora-int8": "products in 8 bits"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.mark.parametrize("name", TUNINGS)
def test_every_way_to_tune_learns_the_same_from_rows_that_share_a_row(
    tmp_path: Path, base: Path, name: str
) -> None:
    shared = tune_by(tmp_path, base, name)
    padded = tune_by(tmp_path, base, name, attention="padded")
    assert shared.code == padded.code == 0, shared.events
    said = [each["message"] for each in shared.of_type("warning") if each["code"] == "rows_padded"]
    if name in NOT_SHARED:
        assert NOT_SHARED[name] in said[0]
        assert shared.metric("loss") == padded.metric("loss")
    else:
        assert said == []
        assert shared.metric("loss") == pytest.approx(padded.metric("loss"), rel=1e-3)
        assert shared.metric("loss")[1] == pytest.approx(padded.metric("loss")[1], rel=1e-5)


PAIRS = [
    {"instruction": f"What does a {a} say?", "chosen": f"{a[::-1]}!" * (1 + i % 3), "rejected": "?"}
    for i, a in enumerate(ANIMALS)
]
LABELS = [
    {"instruction": row["instruction"], "output": row["chosen"], "kto_tag": bool(i % 3)}
    for i, row in enumerate(PAIRS)
]


@pytest.mark.parametrize("name", ["lora", "full"])
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_what_answers_are_compared_with_reads_shared_rows_alike(
    tmp_path: Path, base: Path, name: str, stage: str
) -> None:
    """The bare base under an adapter, and a second copy of the base beside a model tuned whole."""
    a_dataset(tmp_path / "rows.jsonl", PAIRS if stage == "dpo" else LABELS)
    shared = tune_by(tmp_path, base, name, stage=stage)
    padded = tune_by(tmp_path, base, name, stage=stage, attention="padded")
    assert shared.code == padded.code == 0, shared.events
    for measure in ("loss", "rewards/chosen", "rewards/rejected"):
        found, wanted = shared.metric(measure), padded.metric(measure)
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    assert shared.metric("loss")[6] != shared.metric("loss")[1]
