"""BLEU-4 and ROUGE are LLaMA-Factory's. lf_similarity.json: its own code's values of real rows."""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from tuneyard.runners.failures import BadSpec
from tuneyard.runners.similarity import _words, check_packages, mean_scores, scores

LF = json.loads((Path(__file__).parent / "lf_similarity.json").read_text(encoding="utf-8"))
NAMES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


@pytest.mark.parametrize("row", LF["rows"], ids=range(len(LF["rows"])))
def test_scores_of_chinese_and_english_rows_are_those_of_llamafactory(row):
    assert scores(row["said"], row["wanted"]) == {name: row[name] for name in NAMES}


def test_the_mean_over_rows_is_that_of_llamafactory():
    rows = [scores(row["said"], row["wanted"]) for row in LF["rows"]]
    assert mean_scores(rows) == pytest.approx(LF["mean"], rel=1e-12)


def test_an_answer_longer_than_pythons_stack_is_scored():
    text = " ".join(f"word{i}" for i in range(700))
    depth = sys.getrecursionlimit()
    assert scores(text, text)["rouge-l"] == 100.0
    assert sys.getrecursionlimit() == depth


def test_jiebas_dictionary_is_never_loaded_from_the_folder_for_temporary_files(
    tmp_path, monkeypatch
):
    """Anybody may write there: what lies there under jieba's name is not its dictionary."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "jieba.cache").write_bytes(b"not a dictionary")
    _words.cache_clear()
    assert list(_words().cut("我来到北京清华大学")) == ["我", "来到", "北京", "清华大学"]
    assert [path.name for path in tmp_path.iterdir()] == ["jieba.cache"]
    assert (tmp_path / "jieba.cache").read_bytes() == b"not a dictionary"


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("tuneyard.runners.similarity.find_spec", lambda name: None)
    with pytest.raises(BadSpec) as refused:
        check_packages()
    assert "jieba, nltk, rouge-chinese" in refused.value.message
    assert (refused.value.field, "tuneyard[metrics]" in refused.value.hint) == (
        "predict_with_generate",
        True,
    )
