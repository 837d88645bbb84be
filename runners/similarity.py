"""How near what a model said comes to what was wanted: BLEU-4 and ROUGE, in percent.

Source: behaviour of LLaMA-Factory 0.9.5, ComputeSimilarity in train/sft/metric.py: ROUGE's F over
jieba's words, BLEU over characters with smoothing method 3, each rounded to four places, then the
plain mean over rows.
"""

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

from tuneyard.runners.failures import BadSpec

PACKAGES = {"jieba": "jieba", "nltk": "nltk", "rouge_chinese": "rouge-chinese"}
"""Module -> the package that brings it; all are in the extra ``metrics``."""

ROUGE = ("rouge-1", "rouge-2", "rouge-l")
DEEP = 50_000


def check_packages() -> None:
    """Look for what scoring needs; nothing is imported. Raises: BadSpec that names the packages."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise BadSpec(
            f"BLEU and ROUGE need {', '.join(missing)} in the runner's environment.",
            field="predict_with_generate",
            hint="pip install 'tuneyard[metrics]' there, or leave predict_with_generate out",
        )


def mean_scores(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the scores of all rows; none for no rows."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def scores(said: str, wanted: str) -> dict[str, float]:
    """rouge-1, rouge-2, rouge-l and bleu-4 of one row."""
    found = {name: round(value * 100, 4) for name, value in _rouge(said, wanted).items()}
    return found | {"bleu-4": round(_bleu(said, wanted) * 100, 4)}


def _rouge(said: str, wanted: str) -> Mapping[str, float]:
    from rouge_chinese import Rouge

    texts = [" ".join(_words().cut(text)) for text in (said, wanted)]
    if not all(text.split() for text in texts):
        return dict.fromkeys(ROUGE, 0.0)
    with _deep():
        (row,) = Rouge().get_scores(*texts)
    return {name: float(row[name]["f"]) for name in ROUGE}


def _bleu(said: str, wanted: str) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that two texts have no four characters in common
        smooth = SmoothingFunction().method3
        return float(sentence_bleu([list(wanted)], list(said), smoothing_function=smooth))


@contextmanager
def _deep() -> Iterator[None]:
    """rouge-chinese walks back through the longest common sequence by one call a word."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, DEEP))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@cache
def _words() -> Any:
    """jieba with its own dictionary.

    It keeps a parsed one in the folder for temporary files, by a fixed name, and would load what
    anybody put there: it gets an empty folder instead.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its age
        import jieba
    jieba.setLogLevel(logging.WARNING)
    words = jieba.Tokenizer()
    with TemporaryDirectory() as folder:
        words.tmp_dir = folder
        words.initialize()
    return words
