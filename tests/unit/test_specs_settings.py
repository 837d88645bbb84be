"""Where settings come from, who reads them, and what is said when they cannot be had."""

import re
from pathlib import Path

import pytest
from pydantic import SecretStr

from tuneyard.specs.errors import InputError
from tuneyard.specs.settings import PREFIX, READ_BY, SCHEMES, Settings, load_settings

SECRETS = [
    name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)
]


def refused(environ: dict[str, str]) -> InputError:
    with pytest.raises(InputError) as caught:
        load_settings(environ)
    assert caught.value.code == "bad_setting"
    return caught.value


def test_every_secret_may_come_by_a_file_and_is_never_shown(tmp_path: Path) -> None:
    assert len(SECRETS) > 5
    secrets = {
        name: f"{SCHEMES[name][0]}://a-secret" if name in SCHEMES else f"a-secret: {name}"
        for name in SECRETS
    }
    for name, secret in secrets.items():
        (tmp_path / name).write_text(f"{secret}\n")
    files = {f"{PREFIX}{name.upper()}_FILE": str(tmp_path / name) for name in SECRETS}
    settings = load_settings(files)
    for name, secret in secrets.items():
        value = getattr(settings, name)
        assert isinstance(value, SecretStr)
        assert value.get_secret_value() == secret
    assert "a-secret" not in repr(settings)


def test_a_setting_that_is_no_secret_may_come_by_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "port").write_text("9000")
    assert load_settings({"TUNEYARD_API_PORT_FILE": str(tmp_path / "port")}).api_port == 9000


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda path: None, "which cannot be read: No such file or directory."),
        (lambda path: path.mkdir(), "which cannot be read: Is a directory."),
        (lambda path: path.write_text(" \n"), "which is empty."),
        (lambda path: path.write_bytes(b"\xff\xfe"), "which cannot be read: it is no UTF-8 text."),
    ],
)
def test_a_secret_that_cannot_be_had_is_a_sentence_with_the_setting(
    tmp_path: Path, made: object, reason: str
) -> None:
    file = tmp_path / "secret"
    assert callable(made)
    made(file)
    error = refused({"TUNEYARD_DATABASE_URL_FILE": str(file)})
    assert error.message == f"TUNEYARD_DATABASE_URL_FILE names {file}, {reason}"
    assert error.field == "database_url"
    assert error.hint


def test_a_value_and_a_file_for_one_setting_are_refused(tmp_path: Path) -> None:
    environ = {"TUNEYARD_BROKER_URL": "redis://x", "TUNEYARD_BROKER_URL_FILE": str(tmp_path)}
    assert refused(environ).field == "broker_url"


def test_a_file_wins_over_the_settings_file_and_is_judged_like_any_value(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("api_port: 9000\nlease_s: 30\n")
    (tmp_path / "port").write_text("a port")
    environ = {"TUNEYARD_SETTINGS": str(tmp_path / "settings.yaml")}
    assert load_settings(environ).lease_s == 30
    error = refused(environ | {"TUNEYARD_API_PORT_FILE": str(tmp_path / "port")})
    assert error.field == "api_port"


ROOT = Path(__file__).parents[2]
SOURCES = {
    "api": ["api/*.py", "store/*.py"],
    "scheduler": ["scheduler/*.py"],
    "worker": ["workers/*.py", "store/*.py"],
    "flower": ["local/dashboard.py"],
    "migrate": ["models/migration.py"],
}
DERIVED = {
    "store_root": {"store_url", "home"},
    "trusted_networks": {"trusted_proxies"},
    "hubs": {"hub_order"},
    "roots": {"node_roots"},
    "tracked_variables": {"tracker_variables"},
    "renew_every_s": {"lease_s"},
    "lease_margin_s": {"lease_s"},
    "lease_grace_s": {"lease_s"},
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("database_url", "zz"),
        ("database_url", "mysql://user:hush@x"),
        ("database_url", "postgresql://x:port/hush"),
        ("database_url", "postgresql://[hush/x"),
        ("broker_url", "zz"),
        ("broker_url", "amqp://user:hush@x"),
        ("log_level", "zz"),
        ("home", "relative"),
        ("node_roots", "relative"),
        ("api_port", "99999"),
        ("lease_s", "soon"),
    ],
)
def test_a_wrong_setting_is_named_with_its_mend_and_no_secret_is_told(
    name: str, value: str
) -> None:
    with pytest.raises(InputError, match=f"Setting {name}: ") as refused:
        load_settings({f"TUNEYARD_{name.upper()}": value})
    assert refused.value.field == name
    assert refused.value.hint is not None
    assert refused.value.hint.startswith(f"TUNEYARD_{name.upper()}: ")
    assert "hush" not in str(refused.value.as_dict())
    assert "Value error" not in refused.value.message


@pytest.mark.parametrize(
    "url", ["postgresql://h/db", "postgresql+psycopg://u:p@h:5432/db", "postgresql:///db?host=/run"]
)
def test_an_address_of_postgresql_is_taken_in_its_forms(url: str) -> None:
    assert load_settings({"TUNEYARD_DATABASE_URL": url}).database_url.get_secret_value() == url


@pytest.mark.parametrize("process", sorted(READ_BY))
def test_each_process_lists_the_settings_that_it_reads(process: str) -> None:
    source = "".join(p.read_text() for glob in SOURCES[process] for p in ROOT.glob(glob))
    read = set(re.findall(r"settings\.([a-z_]+)", source)) | {"log_level"}
    if "_role_password" in source:
        read |= {name for name in Settings.model_fields if name.endswith("_role_password")}
    for name in read & set(DERIVED):
        read |= DERIVED[name]
    assert read & set(Settings.model_fields) == READ_BY[process]
