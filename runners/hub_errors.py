"""What hubs answer, in sentences: which of it ends the job, which is tried again."""

import errno
from collections.abc import Sequence

from tuneyard.runners.failures import BadSpec, HubUnreachable

TOKENS = {
    "ModelScope": "MODELSCOPE_API_TOKEN_FILE",
    "Hugging Face": "HF_TOKEN_PATH",
}
"""Hub -> variable of the worker's environment that names the file of its token."""


class Absent(Exception):
    """A hub does not have the repository; another one may."""

    def __init__(self, hub: str, why: str = "") -> None:
        super().__init__(hub)
        self.hub, self.why = hub, why


def gated(hub: str, repo: str, page: str) -> BadSpec:
    """The hub wants a licence accepted, or a login."""
    return BadSpec(
        f"{hub} gives {repo} only to those who accepted its licence.",
        field="source",
        hint=(
            f"accept it at {page}, put a token of yours into a file and name the file by"
            f" {TOKENS[hub]} in the worker's environment"
        ),
    )


def no_revision(hub: str, repo: str, ref: str, names: Sequence[str]) -> BadSpec:
    """The repository is there, the revision is not."""
    known = f"it has {', '.join(names[:10])}" if names else "leave it out for the main branch"
    return BadSpec(f"{repo} on {hub} has no revision {ref!r}.", field="revision", hint=known)


def nowhere(repo: str, what: str, absent: Sequence[Absent]) -> BadSpec:
    """No hub has it."""
    hubs = " and ".join(each.hub for each in absent)
    why = "".join(each.why for each in absent)
    noun = "data set" if what == "dataset" else "model"
    other = "model" if what == "dataset" else "dataset"
    hint = f"look the id up on the hub's page; for a {other} say what: {other}"
    return BadSpec(f"There is no {noun} {repo} on {hubs}{why}.", field="source", hint=hint)


DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def of_the_disk(error: BaseException) -> bool:
    """Whether an error is this node's disk, and not the way to the hub."""
    return isinstance(error, OSError) and error.errno in DISK_ERRNOS


def unreachable(hub: str, reason: str) -> HubUnreachable:
    """The hub or the way to it is broken: it is tried again, and nobody is charged."""
    return HubUnreachable(
        f"{hub} could not be used: {reason[:400].rstrip('.')}.",
        field="source",
        hint="tried again by itself; HF_ENDPOINT or MODELSCOPE_ENDPOINT name a mirror",
    )
