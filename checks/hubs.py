"""Asking a hub, for two seconds at most, whether it has what a download wants.

A plain no is said before a slot is taken. Whatever else it answers, or that it cannot be reached
from here, is no verdict: the node that downloads has its own way to the hub, and its own token.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Literal

import httpx

from tuneyard.specs.download import DownloadSpec
from tuneyard.specs.errors import InputError, SpecRejected
from tuneyard.specs.jobs import Note
from tuneyard.specs.problems import problem
from tuneyard.specs.sources import HUB_NAMES, ON_NODES, allowed_root, read_source

WITHIN_S = 2.0
ENDPOINTS = {
    "modelscope": ("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn"),
    "huggingface": ("HF_ENDPOINT", "https://huggingface.co"),
}

Answer = Literal["there", "absent", "no_revision", "unclear"]


def check_place(spec: DownloadSpec, roots: list[str]) -> list[InputError]:
    """Whether a path of the nodes lies where an admin allowed one, by its letters."""
    origin = read_source(spec.source)
    if origin.kind != "node" or allowed_root(origin.name, roots) is not None:
        return []
    message = f"{spec.source[:120]} does not lie below an allowed root of the nodes."
    return [problem("path_not_allowed", message, "source", ON_NODES)]


def ask_hubs(spec: DownloadSpec, hubs: Sequence[str], environ: Mapping[str, str]) -> list[Note]:
    """Notes on what could not be found out. Raises: SpecRejected where no hub has the source."""
    origin = read_source(spec.source)
    if origin.kind != "hub":
        return []
    asked = [origin.hub] if origin.hub else list(hubs)
    deadline = time.monotonic() + WITHIN_S
    answers: set[Answer] = set()
    for hub in asked:
        answer = _ask(hub, origin.name, spec, environ, deadline)
        if answer == "there":
            return []
        answers.add(answer)
    names = " and ".join(HUB_NAMES[hub] for hub in asked)
    if "no_revision" in answers and "unclear" not in answers:
        message = f"{origin.name} has no revision {spec.revision!r}."
        hint = "leave it out for the main branch"
        raise SpecRejected([problem("revision_not_found", message, "revision", hint)])
    if answers == {"absent"}:
        noun = "data set" if spec.what == "dataset" else "model"
        message = f"There is no {noun} {origin.name} on {names}."
        hint = "look the id up on the hub's page; what: dataset is for data sets"
        raise SpecRejected([problem("model_not_found", message, "source", hint)])
    message = f"whether {origin.name} is on {names} could not be asked; the download finds out"
    return [Note(field="source", message=message)]


def _ask(
    hub: str, repo: str, spec: DownloadSpec, environ: Mapping[str, str], deadline: float
) -> Answer:
    variable, usual = ENDPOINTS[hub]
    endpoint = (environ.get(variable) or usual).rstrip("/")
    if "://" not in endpoint:
        endpoint = f"https://{endpoint}"
    left = deadline - time.monotonic()
    if left <= 0:
        return "unclear"
    kind = f"{spec.what}s"
    try:
        if hub == "modelscope":
            # It is asked for the repository alone: what it answers to a revision is no standard.
            response = httpx.get(f"{endpoint}/api/v1/{kind}/{repo}", timeout=left)
        else:
            revision = spec.revision or "main"
            url = f"{endpoint}/api/{kind}/{repo}/revision/{revision}"
            response = httpx.get(url, timeout=left)
    except (httpx.HTTPError, httpx.InvalidURL):
        return "unclear"
    if response.status_code == 200:
        return "there" if "json" in response.headers.get("Content-Type", "") else "unclear"
    if response.status_code != 404:
        return "unclear"  # gated, private, or broken: the node's token decides
    wrong = response.headers.get("X-Error-Code") == "RevisionNotFound"
    return "no_revision" if wrong else "absent"
