"""Settings: what is wrong is a sentence that names the setting, and each has its readers."""

import re
from pathlib import Path

import pytest

from tuneyard.specs.errors import InputError
from tuneyard.specs.settings import READ_BY, Settings, load_settings

ROOT = Path(__file__).parents[2]
SOURCES = {
    "api": ["api/*.py"],
    "flower": ["local/dashboard.py"],
    "scheduler": ["scheduler/*.py"],
    "worker": ["workers/*.py"],
    "migrate": ["models/migration.py"],
}
DERIVED = {
    "store_root": {"store_url", "home"},
    "trusted_networks": {"trusted_proxies"},
    "hubs": {"hub_order"},
    "roots": {"node_roots"},
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
    if "open_store" in source:
        source += (ROOT / "store/remote.py").read_text()
    read = set(re.findall(r"settings\.([a-z_]+)", source)) | {"log_level"}
    if "_role_password" in source:
        read |= {name for name in Settings.model_fields if name.endswith("_role_password")}
    for name in read & set(DERIVED):
        read |= DERIVED[name]
    assert read & set(Settings.model_fields) == READ_BY[process]
