"""The models that serve: bundle, detector, batcher and active calibration of each."""

import asyncio
import logging
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from service import bundle as bundles
from service.batcher import Batcher
from service.bundle import Bundle
from service.calibration import Calibration
from service.detector import Detector
from service.errors import (
    BundleError,
    DatabaseAway,
    DeviceUnavailable,
    DigestMismatch,
    InferenceFailed,
    InvalidParameter,
    NotReady,
    UnknownModel,
)
from service.metrics import Metrics
from service.settings import Settings
from service.store import Graph, Store

log = logging.getLogger(__name__)


@dataclass
class Model:
    """One version of a model, loaded and warm."""

    bundle: Bundle
    detector: Detector
    batcher: Batcher
    own: Calibration | None  # its bundle's; None: an imported network came without
    trained: frozenset[str]  # digests of the files it was trained on
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)  # in force, by profile

    @property
    def graph(self) -> Graph:
        return Graph(self.name, self.bundle.version, self.bundle.digest)

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def calibration(self) -> Calibration | None:
        """What is in force where a request names no profile; None: nobody calibrated it yet."""
        return self.calibrations.get("") or self.own

    def calibration_for(self, profile: str) -> Calibration | None:
        """What is in force for a profile: its own, else the model's."""
        return self.calibrations.get(profile) or self.calibration

    @property
    def engine(self) -> str:
        """What scores depend on beside the graph."""
        return f"{self.detector.provider} in {self.detector.precision}"

    @property
    def image_size(self) -> tuple[int, int]:
        return self.bundle.manifest.image_size


class Registry:
    """The newest version of every model, loaded at start; another version when asked for.

    Of each model at most one other version stays loaded: the one asked for last.

    Raises BundleError or DeviceUnavailable at start: a service that can't serve all it was given
    doesn't start.
    """

    def __init__(self, settings: Settings, store: Store, metrics: Metrics) -> None:
        self._settings, self._store, self._metrics = settings, store, metrics
        # One thread for all models: they share one device, and a session has one caller at a time.
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._models: dict[tuple[str, int], Model] = {}
        self._newest: dict[str, int] = {}
        # One at a time: warming up, CUDA records, which memory for another model would spoil.
        self._loading = asyncio.Lock()
        self._taking_up = asyncio.Lock()
        self._database_up = True
        for name in bundles.names(settings.models):
            self._newest[name] = bundles.versions(settings.models, name)[-1]
            self._models[name, self._newest[name]] = self._load(name, self._newest[name])
            self._announce(self._models[name, self._newest[name]])
        if not self._models:
            log.warning("no bundle in %s (<name>/<version>/manifest.json)", settings.models)
        metrics.queue_size.set_function(lambda: sum(m.batcher.waiting for m in self.loaded()))
        metrics.in_progress.set_function(lambda: sum(m.batcher.places for m in self.loaded()))

    def loaded(self) -> list[Model]:
        return list(self._models.values())

    def serves(self, model: Model) -> bool:
        """Whether it answers where a request names no version."""
        return model.bundle.version == self._newest[model.name]

    def check_ready(self) -> None:
        """Raises NotReady where there is no model."""
        if not self._newest:
            raise NotReady(f"no model: there is no bundle in {self._settings.models}")

    def versions(self, name: str) -> list[int]:
        """The versions of a model on disk, ascending."""
        return bundles.versions(self._settings.models, name)

    async def get(self, name: str | None, version: int | None, digest: str | None = None) -> Model:
        """The model that a request names; the only one where it names none.

        Raises NotReady, InvalidParameter or UnknownModel, which list what there is, and
        DigestMismatch where its graph is not the one that the caller insists on.
        """
        self.check_ready()
        if name is None:
            if len(self._newest) > 1:
                raise InvalidParameter(f"several models are here, name one: {self._names()}")
            name = next(iter(self._newest))
        if name not in self._newest:
            raise UnknownModel(f"model {name!r} is none of: {self._names()}")
        key = (name, version or self._newest[name])
        model = self._models.get(key) or await self._load_once(*key)
        if digest not in (None, model.bundle.digest):
            raise DigestMismatch(
                f"{name} version {key[1]} has the digest {model.bundle.digest}, the request "
                f"insists on {digest}"
            )
        return model

    async def take_up(self, model: Model | None = None) -> None:
        """Take up the calibrations in force as the database has them, of one model or of all.

        One at a time and from the database alone, so that memory follows its order, whoever
        changed it; to the end, even where the caller leaves. Raises DatabaseAway.
        """
        await asyncio.shield(self._take_up([model] if model else self.loaded()))

    async def _take_up(self, models: list[Model]) -> None:
        async with self._taking_up:
            for model in models:
                before = model.calibrations
                model.calibrations = await asyncio.to_thread(self._in_force, model)
                if model.calibrations != before:
                    _tell_change(model, before)
                    self._publish(model, before)

    async def follow(self, stop: asyncio.Event) -> None:
        """Take up what other replicas activate, until `stop`.

        It isn't cancelled, since its thread would go on with a connection that nobody closes.
        """
        seen = None
        while not stop.is_set():
            try:
                stamp = await asyncio.to_thread(self._store.stamp)
                if stamp != seen:
                    await self.take_up()
                    seen = stamp
                self._tell_database(True)
            except DatabaseAway as error:
                self._tell_database(False, str(error))
            except Exception:
                log.exception("calibrations in force could not be read; trying again")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.sync_interval_s):
                    await stop.wait()

    def _tell_database(self, up: bool, reason: str = "") -> None:
        if up != self._database_up:
            self._database_up = up
            if up:
                log.info("the database answers again")
            else:
                log.error("%s; inspection goes on with what is in force", reason)
        self._metrics.database_up.set(up)

    def _in_force(self, model: Model) -> dict[str, Calibration]:
        known = {calibration.id: calibration for calibration in model.calibrations.values()}
        return {
            profile: known.get(id) or self._store.calibration(id)
            for profile, id in self._store.active(model.graph).items()
        }

    def close(self) -> None:
        self._device_thread.shutdown()

    async def _load_once(self, name: str, version: int) -> Model:
        """Load a version off the event loop; callers that ask meanwhile wait for the same load."""
        key = (name, version)
        versions = await asyncio.to_thread(self.versions, name)
        if version not in versions:
            raise UnknownModel(f"model {name!r} has no version {version}; there are {versions}")
        async with self._loading:
            if key in self._models:
                return self._models[key]
            try:
                model = await asyncio.to_thread(self._load, name, version)
            except DeviceUnavailable as error:  # out of memory, say: it may be had later
                raise NotReady(str(error)) from error
            for other in [k for k in self._models if k[0] == name and k[1] != self._newest[name]]:
                self._forget(other)
            self._models[key] = model
            self._announce(model)
            await self.take_up(model)  # what was activated while it was loaded
            return model

    def _forget(self, key: tuple[str, int]) -> None:
        """Drop a version; what is under way with it ends first, since each request holds it."""
        model = self._models.pop(key)
        self._metrics.model_info.remove(*_labels(model))

    def _load(self, name: str, version: int) -> Model:
        bundle = Bundle(self._settings.models / name / str(version))
        graph = bundle.read_graph()
        if (bundle.name, bundle.version) != (name, version):
            raise BundleError(
                f"{bundle.folder}: its manifest says {bundle.name} version {bundle.version}"
            )
        try:
            detector = Detector(
                graph,
                bundle.manifest.image_size,
                self._settings.device,
                self._settings.threads,
                self._settings.precision,
                self._settings.max_batch_size,
            )
        except BundleError as error:
            raise BundleError(f"{bundle.folder}: {error}") from error
        try:
            self._device_thread.submit(detector.warm_up).result()
        except InferenceFailed as error:  # no room on the device, most likely
            raise DeviceUnavailable(f"{bundle.folder}: {error}") from error
        batcher = Batcher(
            detector.run,
            self._device_thread,
            batch_size=detector.batch_size,
            max_queue=self._settings.max_queue,
            on_batch=self._metrics.batch_size.observe,
        )
        model = Model(
            bundle=bundle,
            detector=detector,
            batcher=batcher,
            own=bundle.default_calibration(),
            trained=frozenset(bundle.manifest.data.trained),
        )
        model.calibrations = self._in_force(model)
        log.info(
            "loaded %s version %d (%s) on %s in %s; %s",
            name,
            version,
            bundle.digest[:12],
            detector.provider,
            detector.precision,
            _threshold_of(model.calibration),
        )
        return model

    def _announce(self, model: Model) -> None:
        self._metrics.model_info.labels(*_labels(model)).set(1)
        detector = model.detector
        self._metrics.provider_info.labels(
            detector.provider, detector.precision, ",".join(map(str, detector.batch_sizes))
        ).set(1)
        self._publish(model)

    def _publish(self, model: Model, before: Iterable[str] = ()) -> None:
        """The newest version's thresholds, which are what requests get that name no version;
        `before` are the profiles that had one until now."""
        if not self.serves(model):
            return
        metrics = self._metrics
        for profile in {*before} - {"", *model.calibrations}:
            for gauge in (metrics.threshold, metrics.calibration_samples, metrics.calibration_made):
                gauge.remove(model.name, profile)
        for profile in {"", *model.calibrations}:
            labels, calibration = (model.name, profile), model.calibration_for(profile)
            metrics.threshold.labels(*labels).set(
                calibration.threshold if calibration else math.nan
            )
            metrics.calibration_samples.labels(*labels).set(
                calibration.samples if calibration else 0
            )
            if calibration and calibration.made:
                metrics.calibration_made.labels(*labels).set(calibration.made.timestamp())

    def _names(self) -> str:
        return ", ".join(self._newest)


def _tell_change(model: Model, before: Mapping[str, Calibration]) -> None:
    for profile in sorted({*before, *model.calibrations}):
        old, new = before.get(profile), model.calibrations.get(profile)
        if old != new:
            log.info(
                "%s version %d%s: %s, was %s",
                model.name,
                model.bundle.version,
                f", profile {profile}" if profile else "",
                _threshold_of(model.calibration_for(profile)),
                old.id if old else "without a calibration",
            )


def _threshold_of(calibration: Calibration | None) -> str:
    if calibration is None:
        return "no threshold yet: calibrate it, or give one with each request"
    return (
        f"threshold {calibration.threshold:.4f} from {calibration.id}, "
        f"{calibration.samples} samples"
    )


def _labels(model: Model) -> tuple[str, ...]:
    network = model.bundle.manifest.network
    return (
        model.name,
        str(model.bundle.version),
        model.bundle.digest,
        network.architecture,
        network.backbone,
    )
