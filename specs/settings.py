"""Settings of every process, read once in each ``main()`` and passed in.

Sources, the first that has a value wins: environment (``TUNEYARD_`` + the field's name in upper
case), the YAML or JSON file that ``TUNEYARD_SETTINGS`` names, the default here. Any setting, and
every secret of a server, may come by a file of its own:
``TUNEYARD_DATABASE_URL_FILE=/run/secrets/db`` fills ``database_url``.
"""

import json
import os
import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tuneyard.specs.base_models import RemoteCode
from tuneyard.specs.errors import InputError
from tuneyard.specs.prefix import CLEAN, clean_prefix
from tuneyard.specs.sources import HUB_NAMES

PREFIX = "TUNEYARD_"
FILE_SUFFIX = "_FILE"
SCHEMES = {
    "database_url": ("postgresql", "postgresql+psycopg"),
    "broker_url": ("redis", "rediss"),
}
_OF_TRACKERS = re.compile(
    r"(WANDB|MLFLOW|SWANLAB|TRACKIO)_[A-Z0-9_]+"
    r"|(HTTPS?|ALL|NO)_PROXY|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|SSL_CERT_FILE"
)
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

READ_BY: Mapping[str, frozenset[str]] = {
    process: frozenset(("log_level", *names.split()))
    for process, names in {
        "api": """home database_url store_url store_endpoint store_region store_access_key
            store_secret_key broker_url api_host api_port api_threads max_body_bytes max_file_bytes
            root_path trusted_proxies trust_remote_code flower_url session_secret session_s
            hub_order node_roots lease_s""",
        "scheduler": "database_url broker_url lease_s tick_s retry_backoff_s",
        "worker": """home database_url store_url store_endpoint store_region store_access_key
            store_secret_key store_patience_s max_file_bytes broker_url lease_s poll_s stop_grace_s
            retry_backoff_s stall_s node_name cpu_slots fake_gpus runner_python disk_floor_bytes
            cache_max_bytes hub_order node_roots keep_runners gateway_host gateway_port
            gateway_url tracker_variables""",
        "flower": "broker_url flower_url",
        "migrate": """database_url api_role_password worker_role_password scheduler_role_password
            first_api_key""",
    }.items()
}
"""Process -> the settings that it reads, as its help lists them."""


class Settings(BaseModel):
    """Every setting, with its unit, default and a sentence; docs/reference/settings.md shows it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path = Field(
        default_factory=lambda: Path.home() / ".tuneyard",
        description="Folder of this machine's state: profile, logs, node cache, work folders.",
    )
    database_url: SecretStr = Field(
        default=SecretStr("postgresql://127.0.0.1:5432/tuneyard"),
        description="PostgreSQL as this process sees it; each process has a role of its own.",
    )
    broker_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"),
        description="Valkey or Redis that carries the hints; it holds no truth.",
    )
    store_url: str = Field(
        default="",
        description=(
            "Root of files and artifacts: a folder, or a URL such as s3://bucket/prefix."
            " Empty: HOME/store."
        ),
    )
    store_endpoint: str = Field(
        default="", description="URL of an S3-compatible server. Empty: Amazon's."
    )
    store_region: str = Field(default="", description="Region of the bucket, where it has one.")
    store_access_key: SecretStr | None = Field(
        default=None,
        description="Access key of an s3:// store. Unset: found as AWS's own tools find it.",
    )
    store_secret_key: SecretStr | None = Field(
        default=None, description="The secret that belongs to store_access_key."
    )
    store_patience_s: float = Field(
        default=120.0,
        ge=0.0,
        description=(
            "For so many seconds a worker asks a store that is away; then the attempt is lost,"
            " uncharged."
        ),
    )
    api_role_password: SecretStr | None = Field(
        default=None, description="`migrate` gives the role tuneyard_api this password."
    )
    worker_role_password: SecretStr | None = Field(
        default=None, description="`migrate` gives the role tuneyard_worker this password."
    )
    scheduler_role_password: SecretStr | None = Field(
        default=None, description="`migrate` gives the role tuneyard_scheduler this password."
    )
    first_api_key: SecretStr | None = Field(
        default=None,
        description="`migrate` makes sure that this key exists, for a team named `default`.",
    )

    api_host: str = Field(default="127.0.0.1", description="Address that the API listens on.")
    api_port: int = Field(default=8800, ge=0, le=65535, description="Port of the API; 0: any free.")
    api_threads: int = Field(
        default=10, ge=1, le=200, description="Requests that may use the database at one time."
    )
    max_body_bytes: int = Field(
        default=2 * 1024**2, ge=1024, description="Largest body of a request that is not a file."
    )
    max_file_bytes: int = Field(
        default=8 * 1024**3, ge=1024, description="Largest file that may be uploaded, in bytes."
    )
    root_path: str = Field(
        default="", description="Path prefix that the API is seen under, as in `/proxy/8800`."
    )
    trusted_proxies: str = Field(
        default="127.0.0.1, ::1",
        description="Addresses and networks, parted by commas, of proxies whose X-Forwarded-Prefix"
        " and X-Forwarded-Proto are heeded.",
    )
    gateway_host: str = Field(
        default="127.0.0.1", description="Address that a worker's gateway listens on."
    )
    gateway_port: int = Field(
        default=0, ge=0, le=65535, description="Port of a worker's gateway; 0: any free."
    )
    gateway_url: str = Field(
        default="",
        description="Where the API reaches this worker's gateway. Empty: host (or, where that is"
        " every address, the host's name) and port.",
    )
    trust_remote_code: RemoteCode = Field(
        default="refused",
        description="What a spec with trust_remote_code: true meets: refused, or ignored with a"
        " note. Code of a model's own is never run.",
    )
    flower_url: str = Field(
        default="",
        description="Where Flower listens; the API shows it at /flower. Empty: not at all.",
    )
    session_secret: SecretStr | None = Field(
        default=None,
        description="What logins at /flower are signed with, the same for every API. Empty: one"
        " of this process, whose logins end with it.",
    )
    session_s: float = Field(
        default=8 * 3600.0, ge=1.0, description="Seconds until a login at /flower ends."
    )

    lease_s: float = Field(
        default=60.0, ge=2.0, le=3600.0, description="Seconds that a node holds an attempt for."
    )
    stop_grace_s: float = Field(
        default=60.0, ge=0.0, description="Seconds from SIGTERM to SIGKILL when a person cancels."
    )
    tick_s: float = Field(
        default=0.5, gt=0.0, le=60.0, description="Longest pause of the scheduler between looks."
    )
    poll_s: float = Field(
        default=2.0, gt=0.0, le=60.0, description="Longest pause of a worker between looks."
    )
    retry_backoff_s: float = Field(
        default=5.0, ge=0.0, description="Pause before a charged retry; doubles each time."
    )

    stall_s: float = Field(
        default=1800.0,
        gt=0.0,
        description="A runner that writes nothing for so many seconds is ended and tried again.",
    )

    node_name: str = Field(default="", description="This node's name. Empty: the host's name.")
    cpu_slots: int = Field(
        default=1, ge=0, le=1024, description="CPU slots of this node; they split its cores."
    )
    fake_gpus: int = Field(
        default=0, ge=0, le=64, description="GPUs to pretend, for tests and benchmarks only."
    )
    runner_python: str = Field(
        default="", description="Interpreter with torch that runs jobs. Empty: this one."
    )
    disk_floor_bytes: int = Field(
        default=1024**3, ge=0, description="A node claims nothing while less is free, in bytes."
    )
    cache_max_bytes: int | None = Field(
        default=None, ge=0, description="Size of this node's cache at most, in bytes; unset: none."
    )
    hub_order: str = Field(
        default="modelscope,huggingface",
        description="Hubs in the order in which a source without a hub is looked for, by commas.",
    )
    node_roots: str = Field(
        default="",
        description="Folders of the nodes below which node:/… may lie, by commas. Empty: none.",
    )
    tracker_variables: str = Field(
        default="",
        description="Variables of this worker's environment that trackers of fine-tunes get, by"
        " commas, as in `WANDB_API_KEY, MLFLOW_TRACKING_URI`. Empty: none, so that nothing is"
        " sent.",
    )
    keep_runners: bool = Field(
        default=False, description="On SIGTERM leave runners to the next worker (systemd)."
    )
    log_level: str = Field(default="INFO", description="Least severe level that is logged.")

    @property
    def store_root(self) -> Path | None:
        """The store's folder on this machine; None for a store elsewhere."""
        if not self.store_url:
            return self.home / "store"
        scheme, _, path = self.store_url.rpartition("://")
        return Path(path) if scheme in ("", "file") else None

    @property
    def trusted_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The networks of ``trusted_proxies``."""
        return _networks(self.trusted_proxies)

    @property
    def renew_every_s(self) -> float:
        """Seconds between two renewals of a lease."""
        return self.lease_s / 6

    @property
    def lease_margin_s(self) -> float:
        """Seconds before the lease's end at which the guard has killed everything."""
        return max(self.lease_s / 6, 0.3)

    @property
    def hubs(self) -> list[str]:
        """hub_order, read."""
        return [each.strip() for each in self.hub_order.split(",") if each.strip()]

    @property
    def roots(self) -> list[str]:
        """node_roots, read."""
        return [each.strip() for each in self.node_roots.split(",") if each.strip()]

    @property
    def tracked_variables(self) -> list[str]:
        """tracker_variables, read."""
        return [each.strip() for each in self.tracker_variables.split(",") if each.strip()]

    @property
    def lease_grace_s(self) -> float:
        """Seconds between SIGTERM and SIGKILL when a lease runs out."""
        return min(30.0, self.lease_s / 3)

    @field_validator("root_path")
    @classmethod
    def _root_path_is_clean(cls, text: str) -> str:
        prefix = clean_prefix(text)
        if prefix is None:
            raise ValueError(
                f"{text[:100]!r} is no path prefix: it is to look like /proxy/8800, with letters,"
                " digits and . _ ~ @ - between slashes, and not to begin our own paths (/api)"
            )
        return prefix

    @field_validator("trusted_proxies")
    @classmethod
    def _trusted_proxies_are_networks(cls, text: str) -> str:
        _networks(text)
        return text

    @field_validator("flower_url")
    @classmethod
    def _flower_url_is_plain(cls, text: str) -> str:
        url = urlsplit(text)
        _ = url.port
        plain = url.scheme == "http" and url.hostname and not (url.query or url.fragment)
        path = url.path.rstrip("/")
        if text and (not plain or "@" in url.netloc or (path and not CLEAN.fullmatch(path))):
            raise ValueError(f"{text[:100]!r} is not an address like http://127.0.0.1:5555")
        return text.rstrip("/")

    @field_validator("store_url")
    @classmethod
    def _store_can_be_shared(cls, url: str) -> str:
        scheme, _, path = url.rpartition("://")
        if "@" in path.partition("/")[0]:
            raise ValueError("keys do not belong in a URL: set store_access_key, store_secret_key")
        if scheme == "memory":
            raise ValueError("memory:// is no store: no other process sees what is in it")
        if url and scheme in ("", "file") and not path.startswith("/"):
            raise ValueError(f"a folder must be an absolute path, not {path!r}")
        if scheme not in ("", "file") and not path.strip("/"):
            raise ValueError(f"{url} names no bucket: write {scheme}://bucket/prefix")
        return url.rstrip("/") if scheme not in ("", "file") else url

    @model_validator(mode="after")
    def _keys_are_a_pair(self) -> "Settings":
        if (self.store_access_key is None) != (self.store_secret_key is None):
            raise ValueError("store_access_key and store_secret_key are set together or not at all")
        return self

    @field_validator("database_url", "broker_url")
    @classmethod
    def _is_an_address(cls, value: SecretStr, info: ValidationInfo) -> SecretStr:
        schemes = SCHEMES[str(info.field_name)]
        try:
            parts = urlsplit(value.get_secret_value())
            known = parts.scheme in schemes and (parts.port or parts.hostname or True)
        except ValueError:  # a port that is none, a bracket too many
            known = False
        if not known:  # the value may hold a password: it is not repeated
            raise ValueError(f"must be an address like {schemes[0]}://host:port/name")
        return value

    @field_validator("log_level")
    @classmethod
    def _is_a_level(cls, value: str) -> str:
        if value.upper() not in LEVELS:
            raise ValueError(f"must be one of {', '.join(LEVELS)}")
        return value

    @model_validator(mode="after")
    def _home_is_absolute(self) -> "Settings":
        if not self.home.is_absolute():
            raise ValueError(f"home must be an absolute path, not {str(self.home)!r}")
        return self

    @model_validator(mode="after")
    def _hubs_are_known(self) -> "Settings":
        unknown = [each for each in self.hubs if each not in HUB_NAMES]
        if unknown or not self.hubs:
            raise ValueError(f"hub_order lists {', '.join(HUB_NAMES)}, not {self.hub_order!r}")
        return self

    @model_validator(mode="after")
    def _variables_are_trackers(self) -> "Settings":
        for name in self.tracked_variables:
            if not _OF_TRACKERS.fullmatch(name):
                raise ValueError(
                    f"tracker_variables lists names such as WANDB_API_KEY or HTTPS_PROXY,"
                    f" not {name[:60]!r}"
                )
        return self

    @model_validator(mode="after")
    def _roots_are_absolute(self) -> "Settings":
        for root in self.roots:
            if not root.startswith("/") or ".." in root.split("/"):
                raise ValueError(f"node_roots lists absolute paths, not {root!r}")
        return self


def load_settings(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Read the settings. Raises: InputError that names the setting and what it should be."""
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    if settings_file := environ.get(PREFIX + "SETTINGS"):
        values |= _from_file(Path(settings_file))
    for name in Settings.model_fields:
        if (value := _from_environment(environ, name)) is not None:
            values[name] = value
    values |= {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        name = str(first["loc"][0]) if first["loc"] else reason.partition(" ")[0]
        known = Settings.model_fields.get(name)
        hint = f"{PREFIX}{name.upper()}: {known.description}" if known else _NAMES
        raise InputError(
            f"Setting {name}: {reason}.", code="bad_setting", field=name, hint=hint
        ) from None


def _from_environment(environ: Mapping[str, str], name: str) -> str | None:
    """A setting's variable, or the content of the file that its variable with _FILE names."""
    variable = PREFIX + name.upper()
    value, file = environ.get(variable), environ.get(variable + FILE_SUFFIX)
    if not file:
        return value or None
    if value:
        raise InputError(
            f"{variable} and {variable}{FILE_SUFFIX} are both set.",
            code="bad_setting",
            field=name,
            hint="keep one of the two",
        )
    content = _read(Path(file), variable + FILE_SUFFIX, field=name).strip()
    if not content:
        raise InputError(
            f"{variable}{FILE_SUFFIX} names {file}, which is empty.",
            code="bad_setting",
            field=name,
            hint="write the value into that file, and nothing else",
        )
    return content


def _networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """Raises: ValueError that names the part which is no address."""
    return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())


_NAMES = "`tuneyard api --help`, and those of scheduler, worker and migrate, list the settings"


def _from_file(path: Path) -> dict[str, Any]:
    text = _read(path, PREFIX + "SETTINGS")
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{path} cannot be read as settings: {error}", code="bad_setting"
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings: name: value lines are expected.")
    return values


def _read(path: Path, variable: str, *, field: str | None = None) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise InputError(
            f"{variable} names {path}, which cannot be read: {reason}.",
            code="bad_setting",
            field=field,
            hint="the file must be there and readable for the user of this process",
        ) from None
