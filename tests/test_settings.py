"""Every knob from the environment or a flag, checked at the door."""

from pathlib import Path

import pytest

from service import settings
from service.errors import SettingsError


def test_the_environment_sets_and_a_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKRD4AD_MAX_QUEUE", "5")
    monkeypatch.setenv("SKRD4AD_PORT", "9000")

    loaded = settings.load(port="9001")

    assert (loaded.max_queue, loaded.port) == (5, 9001)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "70000"),
        ("MAX_BATCH_SIZE", "-1"),
        ("DEVICE", "tpu"),
        ("REQUEST_TIMEOUT_S", "-1"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_variable_and_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"SKRD4AD_{name}", value)

    with pytest.raises(SettingsError, match=rf"SKRD4AD_{name}\) = '{value}'"):
        settings.load()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("MAX_QUEU", "SKRD4AD_MAX_QUEU is no setting; SKRD4AD_MAX_QUEUE is"),
        ("SERVICE_HOST", "SKRD4AD_SERVICE_HOST is no setting"),
    ],
)
def test_a_misspelt_variable_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, told: str
) -> None:
    """Else the default would be in force unseen."""
    monkeypatch.setenv(f"SKRD4AD_{name}", "3")

    with pytest.raises(SettingsError, match=told):
        settings.load()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("127.8.9.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.7", False),
        ("example.org", False),
    ],
)
def test_what_other_machines_reach_is_told_from_loopback(host: str, loopback: bool) -> None:
    assert settings.is_loopback(host) is loopback


def test_a_value_can_be_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("postgresql://user:secret@host/name\n")
    monkeypatch.setenv("SKRD4AD_DATABASE_URL_FILE", str(secret))

    assert settings.load().database_url == "postgresql://user:secret@host/name"
    assert settings.load(database_url="sqlite:///flag").database_url == "sqlite:///flag"

    monkeypatch.setenv("SKRD4AD_DATABASE_URL", "sqlite:///other")
    with pytest.raises(SettingsError, match="DATABASE_URL and SKRD4AD_DATABASE_URL_FILE are both"):
        settings.load()


def test_what_is_a_file_itself_is_in_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key would be taken for a path, and told in the error."""
    monkeypatch.setenv("SKRD4AD_TLS_KEY_FILE", "/run/secrets/key.pem")

    with pytest.raises(SettingsError, match="TLS_KEY_FILE is no setting; SKRD4AD_TLS_KEY is"):
        settings.load()


def test_a_file_that_can_not_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKRD4AD_DATABASE_URL_FILE", "/nowhere")

    with pytest.raises(SettingsError, match="DATABASE_URL_FILE = '/nowhere': .*No such file"):
        settings.load()


@pytest.mark.parametrize("name", ["tls_certificate", "tls_key"])
def test_half_of_what_tls_needs_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="SKRD4AD_TLS_CERTIFICATE and SKRD4AD_TLS_KEY"):
        settings.load(**{name: "file.pem"})


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"archive": "all", "trace": "false"}, "archive all with trace false"),
        ({"archive": "sampled"}, "archive sampled keeps nothing with archive_share 0"),
        ({"archive": "all", "archive_share": "0.1"}, "archive_share 0.1 means nothing"),
        ({"archive_share": "0.1"}, "with archive none: set SKRD4AD_ARCHIVE=sampled"),
    ],
)
def test_settings_of_the_archive_that_contradict_each_other_are_refused(
    overrides: dict[str, str], told: str
) -> None:
    with pytest.raises(SettingsError, match=told):
        settings.load(**overrides)


def test_a_share_of_the_images_can_be_archived() -> None:
    loaded = settings.load(archive="sampled", archive_share="0.01")

    assert (loaded.archive, loaded.archive_share) == ("sampled", 0.01)
