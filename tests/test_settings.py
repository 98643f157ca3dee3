"""Every knob from the environment or a flag, checked at the door."""

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


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_listening_beyond_loopback_must_be_asked_for_in_so_many_words(host: str) -> None:
    with pytest.raises(SettingsError, match="SKRD4AD_ALLOW_ANONYMOUS=true"):
        settings.load(host=host)

    assert settings.load(host=host, allow_anonymous=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.9.1"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert settings.load(host=host).host == host


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
