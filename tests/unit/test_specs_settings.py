"""Where settings come from, and what is said when they cannot be had."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from tuneyard.specs.errors import InputError
from tuneyard.specs.settings import PREFIX, Settings, load_settings

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
    secrets = {name: f"a secret: {name}" for name in SECRETS}
    secrets |= {"database_url": "postgresql://a secret@h/db", "broker_url": "redis://:a secret@h"}
    for name, secret in secrets.items():
        (tmp_path / name).write_text(f"{secret}\n")
    files = {f"{PREFIX}{name.upper()}_FILE": str(tmp_path / name) for name in SECRETS}
    settings = load_settings(files)
    for name in SECRETS:
        value = getattr(settings, name)
        assert isinstance(value, SecretStr)
        assert value.get_secret_value() == secrets[name]
    assert "a secret" not in repr(settings)


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
