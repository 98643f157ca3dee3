"""The models that serve: bundle, detector, batcher and active calibration of each."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from service import bundle as bundles
from service.batcher import Batcher
from service.bundle import Bundle
from service.calibration import Calibration
from service.detector import Detector
from service.errors import BundleError, InvalidParameter, NotReady, UnknownModel
from service.metrics import Metrics
from service.settings import Settings
from service.store import Store

log = logging.getLogger(__name__)


@dataclass
class Model:
    """One version of a model, loaded and warm."""

    bundle: Bundle
    detector: Detector
    batcher: Batcher
    calibration: Calibration

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def image_size(self) -> tuple[int, int]:
        return self.bundle.manifest.image_size


class Registry:
    """The newest version of every model, loaded at start; other versions when first asked for.

    Raises BundleError or DeviceUnavailable at start: a service that can't serve all it was given
    doesn't start.
    """

    def __init__(self, settings: Settings, store: Store, metrics: Metrics) -> None:
        self._settings, self._store, self._metrics = settings, store, metrics
        # One thread for all models: they share one device, and a session runs on one thread only.
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._models: dict[tuple[str, int], Model] = {}
        self._newest: dict[str, int] = {}
        self._loading: dict[tuple[str, int], asyncio.Lock] = {}
        for name in bundles.names(settings.models):
            self._newest[name] = bundles.versions(settings.models, name)[-1]
            self._models[name, self._newest[name]] = self._load(name, self._newest[name])
            self._publish(self._models[name, self._newest[name]])
        if not self._models:
            log.warning("no bundle in %s (<name>/<version>/manifest.json)", settings.models)
        metrics.queue_size.set_function(lambda: sum(m.batcher.waiting for m in self.loaded()))

    def loaded(self) -> list[Model]:
        return list(self._models.values())

    def versions(self, name: str) -> list[int]:
        """The versions of a model on disk, ascending."""
        return bundles.versions(self._settings.models, name)

    async def get(self, name: str | None, version: int | None) -> Model:
        """The model that a request names; the only one where it names none.

        Raises NotReady, InvalidParameter or UnknownModel, which list what there is.
        """
        if not self._newest:
            raise NotReady(f"no model: there is no bundle in {self._settings.models}")
        if name is None:
            if len(self._newest) > 1:
                raise InvalidParameter(f"several models are here, name one: {self._names()}")
            name = next(iter(self._newest))
        if name not in self._newest:
            raise UnknownModel(f"model {name!r} is none of: {self._names()}")
        key = (name, version or self._newest[name])
        if key not in self._models:
            await self._load_once(key)
        return self._models[key]

    def activate(self, model: Model, calibration: Calibration) -> None:
        """Make a stored calibration the one in force, from the next decision on."""
        model.calibration = calibration
        self._publish(model)

    def close(self) -> None:
        self._device_thread.shutdown()

    async def _load_once(self, key: tuple[str, int]) -> None:
        """Load a version off the event loop; callers that ask meanwhile wait for the same load."""
        name, version = key
        if version not in self.versions(name):
            raise UnknownModel(
                f"model {name!r} has no version {version}; there are {self.versions(name)}"
            )
        async with self._loading.setdefault(key, asyncio.Lock()):
            if key not in self._models:
                try:
                    self._models[key] = await asyncio.to_thread(self._load, name, version)
                except BundleError as error:
                    raise NotReady(str(error)) from error

    def _load(self, name: str, version: int) -> Model:
        bundle = Bundle(self._settings.models / name / str(version))
        if (bundle.name, bundle.version) != (name, version):
            raise BundleError(
                f"{bundle.folder}: its manifest says {bundle.name} version {bundle.version}"
            )
        try:
            detector = Detector(
                bundle.graph,
                bundle.manifest.image_size,
                self._settings.device,
                self._settings.threads,
            )
        except BundleError as error:
            raise BundleError(f"{bundle.folder}: {error}") from error
        self._device_thread.submit(detector.warm_up).result()
        stored = self._store.active(bundle.digest)
        batcher = Batcher(
            detector.run,
            self._device_thread,
            max_batch_size=self._settings.max_batch_size,
            max_queue=self._settings.max_queue,
            on_batch=self._metrics.batch_size.observe,
        )
        model = Model(
            bundle=bundle,
            detector=detector,
            batcher=batcher,
            calibration=stored.calibration if stored else bundle.default_calibration(),
        )
        network = bundle.manifest.network
        self._metrics.model_info.labels(
            name, version, bundle.digest, network.architecture, network.backbone
        ).set(1)
        self._metrics.provider_info.labels(detector.provider).set(1)
        log.info(
            "loaded %s version %d (%s) on %s; threshold %.4f from %s, %d samples",
            name,
            version,
            bundle.digest[:12],
            detector.provider,
            model.calibration.threshold,
            model.calibration.id,
            model.calibration.samples,
        )
        return model

    def _publish(self, model: Model) -> None:
        """The newest version's threshold, which is what requests get that name no version."""
        if model.bundle.version == self._newest[model.name]:
            self._metrics.threshold.labels(model.name).set(model.calibration.threshold)
            self._metrics.calibration_samples.labels(model.name).set(model.calibration.samples)

    def _names(self) -> str:
        return ", ".join(self._newest)
