"""Every knob of the service, read from the environment (`SKRD4AD_*`) and overridden by flags."""

import difflib
import ipaddress
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.devices import Device, Precision
from service.errors import SettingsError

PREFIX = "SKRD4AD_"
_SECRETS = ("database_url",)  # which may be in a file


class Settings(BaseSettings):
    """Made once in `__main__` (or by a test) and handed to `create_app`; never at import."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8000, description="Port to listen on; 0 takes a free one."
    )
    models: Path = Field(Path("models"), description="Folder of bundles, `<name>/<version>/`.")
    device: Device = Field(
        "auto",
        description="`cuda`, `openvino`, `cpu`, or `auto`: CUDA where it loads, else OpenVINO "
        "where the CPU computes bfloat16 itself, else `cpu`.",
    )
    precision: Precision = Field(
        "auto",
        description="`float32`, `tf32` (CUDA), `bfloat16` (OpenVINO), or `auto`: bfloat16 on "
        "OpenVINO where the CPU has it, else the graph's own.",
    )
    threads: Annotated[int, Field(ge=0)] = Field(
        0, description="Threads that compute on the CPU; 0 is one per available core."
    )
    database_url: str = Field(
        "sqlite:///state/skrd4ad.sqlite",
        description="Where calibrations and inspections are kept: `sqlite:///file`, or "
        "`postgresql://user:password@host/name`, which several services may share.",
    )
    sync_interval_s: Annotated[float, Field(gt=0, le=60)] = Field(
        1.0, description="How often to look for what another service activated."
    )
    allow_anonymous: bool = Field(
        False,
        description="Listen beyond loopback although there is no API key, so that every caller may "
        "do everything.",
    )
    keys_file: Path | None = Field(
        None,
        description="File of API keys beside those of the database: lines of `name scope token`.",
    )
    open_metrics: bool = Field(False, description="Let `/metrics` be read without a key.")
    tls_certificate: Path | None = Field(
        None, description="PEM file of the certificate, and its chain, to serve HTTPS with."
    )
    tls_key: Path | None = Field(None, description="PEM file of the certificate's key.")
    max_batch_size: Annotated[int, Field(ge=0, le=256)] = Field(
        0,
        description="Most images in one run of the graph; 0 is 32 on CUDA, 8 on a CPU (`cpu`: "
        "a multiple of its threads near that).",
    )
    max_queue: Annotated[int, Field(ge=1)] = Field(
        64, description="Most inspections accepted and not yet answered; beyond it: 429."
    )
    hang_timeout_s: Annotated[float, Field(gt=0)] = Field(
        60.0,
        description="Longest time that the device may take for one batch; beyond it `/livez` is "
        "503, so that an orchestrator starts the service anew.",
    )
    request_timeout_s: Annotated[float, Field(gt=0)] = Field(
        30.0, description="Deadline of an inspection; beyond it: 504."
    )
    receive_timeout_s: Annotated[float, Field(gt=0)] = Field(
        30.0,
        description="How long a client may take to send a request's head, let a body stand still, "
        "or end one that was answered; then it is disconnected.",
    )
    shutdown_delay_s: Annotated[float, Field(ge=0, le=600)] = Field(
        3.0,
        description="After SIGTERM, how long to go on listening, with `/readyz` at 503, for "
        "whoever spreads requests to see it.",
    )
    shutdown_timeout_s: Annotated[float, Field(gt=0)] = Field(
        30.0,
        description="After that, how long what was accepted may take; then it is broken off: 503.",
    )
    calibration_timeout_s: Annotated[float, Field(gt=0)] = Field(
        900.0, description="Deadline of a calibration; beyond it: 504."
    )
    max_image_bytes: Annotated[int, Field(ge=1)] = Field(
        32 * 2**20, description="Largest body of an inspection; beyond it: 413."
    )
    max_image_pixels: Annotated[int, Field(ge=1)] = Field(
        50_000_000, description="Most pixels of one image, checked before decoding; beyond it: 413."
    )
    max_calibration_bytes: Annotated[int, Field(ge=1)] = Field(
        2 * 2**30, description="Largest body of samples; beyond it: 413."
    )
    max_calibration_images: Annotated[int, Field(ge=1)] = Field(
        2000, description="Most images in one request; beyond it: 400."
    )
    max_calibration_samples: Annotated[int, Field(ge=1)] = Field(
        100_000, description="Most samples of one calibration; beyond it: 422."
    )
    trace: bool = Field(True, description="Record every inspection in the database.")
    trace_max_pending: Annotated[int, Field(ge=1)] = Field(
        100_000,
        description="Most inspections kept in memory while the database is slow or away (about "
        "1 KB each); beyond it the oldest are dropped, and counted.",
    )
    trace_max_age_days: Annotated[float, Field(ge=0, le=36_500)] = Field(
        365.0, description="Recorded inspections that are older are removed; 0 keeps them."
    )
    trace_max_count: Annotated[int, Field(ge=0)] = Field(
        10_000_000, description="Of more recorded inspections the oldest are removed; 0: no limit."
    )
    archive: Literal["none", "anomalous", "all", "sampled"] = Field(
        "none", description="Images to keep: `none`, `anomalous`, `all` or `sampled`."
    )
    archive_folder: Path = Field(
        Path("state/images"), description="Folder of the archived images, for them alone."
    )
    archive_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Share of the images that `sampled` keeps, from 0 to 1."
    )
    archive_max_bytes: Annotated[int, Field(ge=1)] = Field(
        10 * 2**30, description="Most bytes in the archive; the oldest are removed before."
    )
    archive_max_age_days: Annotated[float, Field(ge=0, le=36_500)] = Field(
        90.0, description="Archived images that were not seen for longer are removed; 0 keeps them."
    )
    max_loaded_models: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Most models in memory, least recently used ones unloaded first; shadows and "
        "the one being loaded come on top. 0: every active version and one more of each model.",
    )
    max_bundle_bytes: Annotated[int, Field(ge=1)] = Field(
        2**30,
        description="Largest bundle that may be uploaded, packed or not; beyond it: 413. Until it "
        "is written, an upload may take twice as much memory.",
    )
    load_timeout_s: Annotated[float, Field(gt=0)] = Field(
        600.0,
        description="Deadline of what loads a model (upload, load, activate, roll back, shadow); "
        "beyond it: 504.",
    )
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = Field(
        "info", description="`debug`, `info`, `warning` or `error`."
    )


def load(**overrides: object) -> Settings:
    """Settings of the environment and `overrides`; raises SettingsError naming variable and value.

    `SKRD4AD_DATABASE_URL_FILE` names a file whose text is the value, as that may hold a password.
    """
    _refuse_unknown(os.environ)
    try:
        settings = Settings(**(_of_files(os.environ) | overrides))  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise SettingsError(
            f"--{name.replace('_', '-')} (SKRD4AD_{name.upper()}) = {first['input']!r}: "
            f"{first['msg']}"
        ) from None
    _refuse_contradictions(settings)
    return settings


def _of_files(environment: Mapping[str, str]) -> dict[str, object]:
    """Values that the environment has in files; raises SettingsError."""
    values: dict[str, object] = {}
    for name in _SECRETS:
        variable = f"{PREFIX}{name.upper()}"
        path = environment.get(f"{variable}_FILE")
        if path is None:
            continue
        if variable in environment:
            raise SettingsError(f"{variable} and {variable}_FILE are both set: leave one out")
        try:
            values[name] = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{variable}_FILE = {path!r}: {error}") from None
    return values


def _refuse_contradictions(settings: Settings) -> None:
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise SettingsError(
            "TLS needs both a certificate and its key: SKRD4AD_TLS_CERTIFICATE and SKRD4AD_TLS_KEY"
        )
    kind, share = settings.archive, settings.archive_share
    if kind != "none" and not settings.trace:
        raise SettingsError(
            f"archive {kind} with trace false: archived images are found by the recorded "
            "inspections; set SKRD4AD_TRACE=true or SKRD4AD_ARCHIVE=none"
        )
    if kind == "sampled" and not share:
        raise SettingsError(
            "archive sampled keeps nothing with archive_share 0: set SKRD4AD_ARCHIVE_SHARE=0.01, "
            "say"
        )
    if share and kind != "sampled":
        raise SettingsError(
            f"archive_share {share:g} means nothing with archive {kind}: set "
            "SKRD4AD_ARCHIVE=sampled, or leave the share out"
        )


def _near(name: str, known: set[str]) -> list[str]:
    """What it may have been meant for: itself, one that begins so, or else a similar one."""
    begun = sorted(each for each in known if each.startswith(name))
    return begun[:1] or difflib.get_close_matches(name, known, 1)


def _refuse_unknown(environment: Iterable[str]) -> None:
    """A misspelt variable would leave its default in force unseen."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    known |= {f"{PREFIX}{name.upper()}_FILE" for name in _SECRETS}
    for name in environment:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            plain = name.upper().removesuffix("_FILE")
            near = _near(plain, known)
            raise SettingsError(f"{name} is no setting" + (f"; {near[0]} is" if near else ""))


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
