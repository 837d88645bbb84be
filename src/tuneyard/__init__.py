"""Tuneyard: a job queue for teams that fine-tune language models on shared GPUs.

The code stands in the folders at the repository's root; each is linked into this package
(docs/decisions/0001-layout.md).
"""

from importlib.metadata import version

__version__ = version("tuneyard")
