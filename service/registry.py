"""The models that serve: which version of each is active, and which ones are in memory."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from service import bundle as bundles
from service.bundle import Bundle, Manifest
from service.calibration import Calibration
from service.completion import pause, to_end
from service.errors import (
    BundleError,
    DatabaseAway,
    DigestMismatch,
    InvalidParameter,
    ModelInUse,
    NotReady,
    ServiceError,
    Uncalibrated,
    UnknownModel,
)
from service.loader import Loader
from service.loads import Loads
from service.metrics import Metrics
from service.model import Key, Model, tell_threshold
from service.refusals import Refusals
from service.residents import Residents
from service.rollouts import Candidate, Rollout, Rollouts, Tally
from service.settings import Settings
from service.shadow import Shadow, Shadows
from service.store import Graph, Store

log = logging.getLogger(__name__)

_SILENT_S = 15.0  # beyond the interval, after which a database that hangs is told as away


@dataclass(frozen=True)
class RolledOut:
    """A version that serves from now on."""

    model: Model
    replaced: Graph | None
    left: list[str]  # profiles with a calibration of what was replaced, and none of this


@dataclass(frozen=True)
class Listed:
    """A version on disk, and what it is here."""

    name: str
    version: int
    versions: list[int]  # of the model, on disk
    manifest: Manifest | None  # None: it can't be read
    error: str | None
    model: Model | None  # None: not loaded
    active: bool
    shadow: bool


class Registry:
    """One version of every model is active: the one that was activated last, by whichever replica,
    else the newest at start. It answers where a request names no version; any other version on disk
    is loaded when it is asked for.

    Raises BundleError or DeviceUnavailable at start: a service that can't serve all it was given
    doesn't start. Where another graph than was activated lies on disk, that model is not served,
    and the service not ready, until it is put right.
    """

    def __init__(
        self, settings: Settings, store: Store, rollouts: Rollouts, metrics: Metrics
    ) -> None:
        self._settings, self._store, self._metrics = settings, store, metrics
        self._rollouts = rollouts
        self._loader = Loader(settings, metrics)
        self._residents = Residents(settings.max_loaded_models)
        self._active: dict[str, Graph] = {}
        self._shadows = Shadows(
            rollouts, self._loader.device_thread, metrics, settings.max_image_pixels
        )
        self._refused = Refusals(settings.sync_interval_s)
        self._refused_shadows = Refusals(settings.sync_interval_s)
        self._loads = Loads(self._load, settings.max_queue)
        self._rolling_out: Counter[str] = Counter()
        self._changes: dict[str, asyncio.Task[None]] = {}
        self._loading = asyncio.Lock()
        self._following = asyncio.Lock()
        self._taking_up = asyncio.Lock()
        self._database_up, self._database_seen = True, time.monotonic()
        self._published: dict[str, set[str]] = {}  # profiles that gauges tell
        wanted = rollouts.wanted()
        for name in bundles.names(settings.models):
            self._choose(name, wanted)
        self._lacking = sorted(self._refused)
        for name in list(self._active)[: settings.max_loaded_models or None]:
            self._load_at_start(name)
        if not self._active:
            log.warning("no bundle in %s (<name>/<version>/manifest.json)", settings.models)
        metrics.database_up.set_function(self._database_answers)
        metrics.queue_size.set_function(lambda: sum(m.batcher.waiting for m in self.loaded()))
        metrics.in_progress.set_function(lambda: sum(m.batcher.places for m in self.loaded()))

    def loaded(self) -> list[Model]:
        return self._residents.all()

    def refusals(self, name: str) -> list[str]:
        """Why something else serves, or is tried beside it, than the database wants."""
        found = (self._refused.reason(name), self._refused_shadows.reason(name))
        return [reason for reason in found if reason]

    def check_alive(self) -> None:
        """Raises NotReady where the device doesn't come back."""
        hung_s = self._loader.hung_s
        if hung_s is not None:
            raise NotReady(
                f"the device has not come back for {hung_s:.0f} s; the limit is "
                f"{self._settings.hang_timeout_s:g} s"
            )

    def check_ready(self) -> None:
        """Raises NotReady where there is no model, one that can't be served since the start, or a
        device that doesn't come back."""
        self.check_alive()
        self._check_any()
        for name in self._lacking:
            if name not in self._active:
                raise NotReady(self._refused.reason(name) or f"{name} is not served")

    def _check_any(self) -> None:
        if not self._active and not self._refused:
            raise NotReady(f"no model: there is no bundle in {self._settings.models}")

    def serves(self, model: Model) -> bool:
        """Whether it answers where a request names no version."""
        return self._serves(*model.key)

    def _serves(self, name: str, version: int) -> bool:
        active = self._active.get(name)
        return active is not None and active.version == version

    def names(self) -> list[str]:
        return sorted({*self._active, *self._refused})

    def versions(self, name: str) -> list[int]:
        """The versions of a model on disk, ascending."""
        return bundles.versions(self._settings.models, name)

    async def get(self, name: str | None, version: int | None, digest: str | None = None) -> Model:
        """The model that a request names; the only one where it names none, and its active version.

        Waits where it must be loaded first. Raises NotReady, InvalidParameter or UnknownModel,
        which list what there is, Overloaded where too many wait for it, and DigestMismatch where
        its graph is not the one that the caller insists on, or that was activated.
        """
        self._check_any()
        if name is None:
            names = self.names()
            if len(names) > 1:
                raise InvalidParameter(f"several models are here, name one: {', '.join(names)}")
            (name,) = names
        await self._check_name(name)
        wanted = digest
        if version is None:
            active = self._active_graph(name)
            version, wanted = active.version, digest or active.digest
        model = await self._loaded((name, version))
        if wanted not in (None, "", model.bundle.digest):
            raise DigestMismatch(
                f"{name} version {version} has the digest {model.bundle.digest}, "
                f"{'the request insists on' if digest else 'activated was'} {wanted}"
            )
        return model

    def _active_graph(self, name: str) -> Graph:
        if name not in self._active:
            raise DigestMismatch(self._refused.reason(name) or f"{name} is not served")
        return self._active[name]

    async def _check_name(self, name: str) -> None:
        """Raises UnknownModel; a model may have been put there since the start."""
        if name in self._active or name in self._refused:
            return
        if await asyncio.to_thread(self.versions, name):
            try:
                await self._follow_rollouts()
            except DatabaseAway as error:
                self._tell_database(False, str(error))
        if name not in self.names():
            raise UnknownModel(f"model {name!r} is none of: {', '.join(self.names())}")

    async def listed(self, name: str | None = None) -> list[Listed]:
        """Every version on disk, newest first, of one model or of all; raises UnknownModel."""
        if name is not None:
            await self._check_name(name)
        names = [name] if name else await asyncio.to_thread(bundles.names, self._settings.models)
        found = await asyncio.to_thread(lambda: [(name, self.versions(name)) for name in names])
        models = {model.key: model for model in self.loaded()}
        tried = self._shadows.tried()

        def read(name: str, version: int, versions: list[int]) -> Listed:
            key, manifest, error = (name, version), None, None
            if model := models.get(key):
                manifest = model.bundle.manifest
            else:
                try:
                    manifest = Bundle(self._folder(name, version)).manifest
                except BundleError as refusal:
                    error = str(refusal)
                else:
                    if (manifest.name, manifest.version) != key:
                        error = f"its manifest says {manifest.name} version {manifest.version}"
            serves = self._serves(name, version)
            return Listed(name, version, versions, manifest, error, model, serves, key in tried)

        return await asyncio.to_thread(
            lambda: [read(name, v, versions) for name, versions in found for v in versions[::-1]]
        )

    # What is active

    def _choose(self, name: str, wanted: Rollout) -> None:
        """What a model begins to serve with here."""
        newest = self.versions(name)[-1]
        graph = wanted.active.get(name) or Graph(name, newest, "")
        if reason := self._lacks(graph):
            self._refused.add(name, graph, reason)
        else:
            self._set_active(graph)

    def _lacks(self, graph: Graph) -> str | None:
        """What of an activated graph is not on disk; a graph without a digest may be any."""
        if not graph.digest:
            return None
        found = self.versions(graph.model)
        told = (
            f"{graph.model}: version {graph.version} should be used, with the digest {graph.digest}"
        )
        remedy = "put that bundle back, or activate a version that is here"
        if graph.version not in found:
            return f"{told}; here are the versions {found}: {remedy}"
        try:
            digest = Bundle(self._folder(graph.model, graph.version)).digest
        except BundleError as error:
            return f"{told}; {error}: {remedy}"
        return f"{told}, here it has {digest}: {remedy}" if digest != graph.digest else None

    def _set_active(self, graph: Graph) -> None:
        before = self._active.get(graph.model)
        if before is not None:
            self._metrics.model_active.remove(graph.model, str(before.version))
        self._active[graph.model] = graph
        self._metrics.model_active.labels(graph.model, str(graph.version)).set(1)

    def _load_at_start(self, name: str) -> None:
        graph = self._active[name]
        asked = self._asked(name, graph.version)
        model = self._loader.load(*asked, aside=False).result()  # nobody serves yet
        model.calibrations = self._in_force(model)
        self._keep(model)

    async def activate(self, name: str, version: int, *, by: str) -> RolledOut:
        """Let a version serve, once it is loaded, warm and checked.

        Raises as `get`, BundleError, or NotReady where there is no room for it: then nothing
        changes.
        """
        with self._roll_out(name):
            model = await self._had(name, version)
            serving = self._active.get(name)
            pinned = await asyncio.to_thread(self._pinned, serving)
            write = partial(self._rollouts.activate, model.graph, by=by, serving=pinned)
            await self._change(name, write)
        return await self._rolled_out(model, pinned)

    async def roll_back(self, name: str, *, by: str) -> RolledOut:
        """Let serve what did before the last activation that still stands, as `activate` does.

        Raises NothingToRollBack as well; again and again it goes back one step each.
        """
        await self._check_name(name)
        with self._roll_out(name):
            to = await asyncio.to_thread(self._rollouts.previous, name)
            model = await self._had(name, to.version, to.digest)
            serving = self._active.get(name)
            await self._change(name, partial(self._rollouts.roll_back, to, by=by))
        return await self._rolled_out(model, serving)

    async def _rolled_out(self, model: Model, replaced: Graph | None) -> RolledOut:
        before = await asyncio.to_thread(self._store.active, replaced) if replaced else {}
        return RolledOut(model, replaced, sorted(before.keys() - model.calibrations.keys() - {""}))

    async def _had(self, name: str, version: int, digest: str | None = None) -> Model:
        """A version that every start would find as it is; raises as `get`."""
        model = await self.get(name, version, digest)
        if reason := await asyncio.to_thread(self._lacks, model.graph):  # changed since it loaded
            raise DigestMismatch(reason)
        return model

    def _pinned(self, serving: Graph | None) -> Graph | None:
        """With its digest, which a graph that was only found on disk has not; None: damaged."""
        if serving is None or serving.digest:
            return serving
        with suppress(BundleError):
            bundle = Bundle(self._folder(serving.model, serving.version))
            return Graph(serving.model, serving.version, bundle.digest)
        return None

    async def pin(self, name: str, *, by: str) -> None:
        """Keep what serves where nobody decided yet: the next start would take the newest."""
        serving = await asyncio.to_thread(self._pinned, self._active.get(name))
        if serving is not None:
            await asyncio.to_thread(self._rollouts.pin, serving, by=by)

    async def _change(self, name: str, write: Callable[[], None]) -> None:
        """Write what is decided of a model and take it up, even where the caller leaves."""

        async def change() -> None:
            await asyncio.to_thread(write)
            await self._take_up_now(name)

        await to_end(change())

    async def _take_up_now(self, name: str) -> None:
        """Take up what is wanted of a model now, whatever was refused a moment ago."""
        async with self._following:
            pass  # what was read before this was decided has begun what it is to change
        await self._changed(name)
        self._refused.hurry(name)
        self._refused_shadows.hurry(name)
        await self._follow_rollouts()
        await self._changed(name)

    async def _changed(self, name: str) -> None:
        if name in self._changes:
            await self._changes[name]

    async def _follow_rollouts(self) -> None:
        """Begin to take up what the database wants of the models that are on disk here.

        One at a time, so that nobody acts on what was read before a newer change was taken up.
        """
        async with self._following:
            wanted = await asyncio.to_thread(self._rollouts.wanted)
            for name in await asyncio.to_thread(bundles.names, self._settings.models):
                if name not in self._active and name not in self._refused:
                    self._choose(name, wanted)
                graph, candidate = wanted.active.get(name), wanted.shadows.get(name)
                if name not in self._changes and self._is_due(name, graph, candidate):
                    task = asyncio.create_task(self._take_up_rollout(name, graph, candidate))
                    self._changes[name] = task
                    task.add_done_callback(partial(self._end_change, name))

    def _end_change(self, name: str, task: "asyncio.Task[None]") -> None:
        del self._changes[name]

    def _is_due(self, name: str, graph: Graph | None, candidate: Candidate | None) -> bool:
        """Whether something else is wanted than is here, and was not refused just now."""
        return (
            self._is_due_to_serve(name, graph) is not None
            or self._is_due_as_shadow(name, candidate) is not None
            or (candidate is None and self._shadows.of(name) is not None)
        )

    def _is_due_to_serve(self, name: str, graph: Graph | None) -> Graph | None:
        same = graph is None or graph == self._active.get(name)
        return graph if not same and self._refused.is_due(name, graph) else None

    def _is_due_as_shadow(self, name: str, candidate: Candidate | None) -> Candidate | None:
        shadow = self._shadows.of(name)
        same = candidate is None or (shadow is not None and shadow.candidate == candidate)
        return candidate if not same and self._refused_shadows.is_due(name, candidate) else None

    async def _take_up_rollout(
        self, name: str, graph: Graph | None, candidate: Candidate | None
    ) -> None:
        with self._roll_out(name):
            if due := self._is_due_to_serve(name, graph):
                try:
                    self._swap(await self._wanted(due))
                except Exception as error:
                    self._refused.add(name, due, _told(error))
            if candidate is None:
                self._refused_shadows.forget(name)
                await self._shadows.end(name)
            elif self._is_due_as_shadow(name, candidate):
                try:
                    model = await self._wanted(candidate.graph)
                    await self._shadows.begin(candidate, model)
                    self._refused_shadows.forget(name)
                except Exception as error:
                    self._refused_shadows.add(name, candidate, _told(error))

    async def _wanted(self, graph: Graph) -> Model:
        """The model with this very graph; raises as `get`."""
        if reason := await asyncio.to_thread(self._lacks, graph):
            raise DigestMismatch(reason)
        return await self.get(graph.model, graph.version, graph.digest)

    def _swap(self, model: Model) -> None:
        """From the next request on this version answers; the one before goes when it has answered
        those that it began."""
        before = self._active.get(model.name)
        self._set_active(model.graph)
        self._refused.forget(model.name)
        if self._residents.get(model.key) is None:  # unloaded since it was loaded for this
            self._keep(model)
        if before is not None and (model.name, before.version) not in {
            model.key,
            *self._shadows.tried(),
        }:
            self._drop((model.name, before.version))
        self._publish(model)
        if before is None or before.version != model.bundle.version:
            log.info(
                "%s version %d serves, was %s; %s",
                *model.key,
                before.version if before else "none",
                tell_threshold(model.calibration),
            )

    # What is tried beside it

    def shadow_of(self, model: Model) -> Shadow | None:
        """What is to score the same images as this model, if that serves."""
        return self._shadows.of(model.name) if self._serves(*model.key) else None

    async def set_shadow(self, name: str, version: int, *, by: str) -> None:
        """Let a version score what the active one answers, once it is loaded, warm and checked.

        Raises as `get`, ModelInUse for the active version, and Uncalibrated for one that has no
        threshold to decide by.
        """
        with self._roll_out(name):
            model = await self._had(name, version)
            if self._serves(name, version):
                raise ModelInUse(f"{name} version {version} is active: nothing to compare it with")
            if model.calibration is None:
                raise Uncalibrated(
                    f"model {name}/{version} has no threshold: calibrate it with "
                    f"POST /v1/calibrate?model={name}&version={version} first"
                )
            await self.pin(name, by=by)
            await self._change(name, partial(self._rollouts.set_shadow, model.graph, by=by))

    async def end_shadow(self, name: str, *, by: str) -> None:
        """Raises UnknownModel where there is none."""
        _, until, _ = await self.shadow(name)
        if until is not None:
            raise UnknownModel(f"model {name!r} has no shadow since {until:%Y-%m-%d %H:%M:%S} UTC")
        await self._change(name, partial(self._rollouts.end_shadow, name, by=by))

    async def shadow(self, name: str) -> tuple[Candidate, datetime | None, dict[str, Tally]]:
        """What is tried beside a model, or was last and until when, and what all replicas counted
        of it, by outcome.

        Raises UnknownModel where nothing ever was.
        """
        await self._check_name(name)
        last = await asyncio.to_thread(self._rollouts.last_shadow, name)
        if last is None:
            raise UnknownModel(f"model {name!r} has no shadow")
        await self._shadows.store_counts()
        candidate, until = last
        return candidate, until, await asyncio.to_thread(self._rollouts.counts, candidate.id)

    # What is in memory

    async def unload(self, name: str, version: int) -> None:
        """Free a version once it has answered what it began; it is loaded anew when asked for.

        Raises UnknownModel, or ModelInUse for the active one.
        """
        await self._check_name(name)
        if version not in await asyncio.to_thread(self.versions, name):
            raise self._no_version(name, version)
        if self._serves(name, version):
            raise ModelInUse(f"{name} version {version} is active: activate another one first")
        if (name, version) in self._shadows.tried():
            raise ModelInUse(
                f"{name} version {version} is tried beside the active one: end that first, with "
                f"DELETE /v1/models/{name}/shadow"
            )
        self._drop((name, version))

    async def adopt(self, model: Model) -> None:
        """Keep a model that was loaded, with what is in force for it."""
        model.calibrations = await asyncio.to_thread(self._in_force, model)
        self._keep(model)
        await self.take_up(model)  # what was activated meanwhile

    async def try_out(self, bundle: Callable[[], Bundle], key: Key) -> Model:
        """A model of a bundle that is not in its place yet; raises as `Loader.load`."""
        async with self._loading:
            return await self._load_beside(bundle, key)

    @contextmanager
    def _roll_out(self, name: str) -> Iterator[None]:
        """Meanwhile the version that serves stays in memory beside the one that is loaded."""
        self._rolling_out[name] += 1
        try:
            yield
        finally:
            self._rolling_out[name] -= 1
            if not self._rolling_out[name]:  # callers may name anything: nothing stays of it
                del self._rolling_out[name]
            self._trim()

    async def _loaded(self, key: Key) -> Model:
        """The model, loaded off the event loop where it isn't; raises as `Loads.get`."""
        return self._residents.use(key) or await self._loads.get(key)

    async def _load(self, key: Key) -> Model:
        name, version = key
        if version not in await asyncio.to_thread(self.versions, name):
            raise self._no_version(name, version)
        async with self._loading:
            await asyncio.to_thread(self._store.stamp)  # away: it would be loaded for nothing
            model = await self._load_beside(*self._asked(name, version))
            await self.adopt(model)
        return model

    async def _load_beside(self, bundle: Callable[[], Bundle], key: Key) -> Model:
        """Once what was unloaded has gone, all of it where the number of models is limited: they
        may be large. For no longer than a request may take, which holds its model that long."""
        held = 0 if self._residents.limit else 1
        most, wait_s = len(self.loaded()) + held, self._settings.request_timeout_s
        if not await self._loader.wait_for_room(most, wait_s):
            log.warning("%d models are in memory: some are held for long", self._loader.alive)
        return await asyncio.wrap_future(self._loader.load(bundle, key))

    def _asked(self, name: str, version: int) -> tuple[Callable[[], Bundle], Key]:
        return partial(Bundle, self._folder(name, version)), (name, version)

    def _folder(self, name: str, version: int) -> Path:
        return self._settings.models / name / str(version)

    def _no_version(self, name: str, version: int) -> UnknownModel:
        return UnknownModel(
            f"model {name!r} has no version {version}; there are {self.versions(name)}"
        )

    def _keep(self, model: Model) -> None:
        self._residents.add(model)
        self._metrics.model_info.labels(*_labels(model)).set(1)
        detector = model.detector
        self._metrics.provider_info.labels(
            detector.provider, detector.precision, ",".join(map(str, detector.batch_sizes))
        ).set(1)
        self._publish(model)
        self._trim()

    def _trim(self) -> None:
        active = {name: graph.version for name, graph in self._active.items()}
        for key in self._residents.surplus(active, self._kept()):
            self._drop(key)

    def _kept(self) -> set[Key]:
        """What is never unloaded to make room."""
        return self._shadows.tried() | {
            (name, self._active[name].version) for name in self._rolling_out if name in self._active
        }

    def _drop(self, key: Key) -> None:
        """Forget a version; it is freed when what is under way with it, and holds it, has ended."""
        if model := self._residents.drop(key):
            self._metrics.model_info.remove(*_labels(model))
            log.info("unloading %s version %d", *key)

    # What is in force

    async def take_up(self, model: Model | None = None) -> None:
        """Take up the calibrations in force as the database has them, of one model or of all.

        One at a time and from the database alone, so that memory follows its order, whoever
        changed it; to the end, even where the caller leaves. Raises DatabaseAway.
        """
        models = self.loaded()
        if model is not None:  # and the same anew, where it was unloaded and loaded meanwhile
            models = [model, *(m for m in models if m.key == model.key and m is not model)]
        await to_end(self._take_up(models))

    async def _take_up(self, models: list[Model]) -> None:
        async with self._taking_up:
            for model in models:
                before = model.calibrations
                model.calibrations = await asyncio.to_thread(self._in_force, model)
                if model.calibrations != before:
                    _tell_change(model, before)
                    self._publish(model)

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
                await self._shadows.store_counts()
                await self._follow_rollouts()
                self._tell_database(True)
            except DatabaseAway as error:
                self._tell_database(False, str(error))
            except Exception:
                log.exception("what is in force could not be read; trying again")
            await pause(stop, self._settings.sync_interval_s)

    def _tell_database(self, up: bool, reason: str = "") -> None:
        if up != self._database_up:
            self._database_up = up
            if up:
                log.info("the database answers again")
            else:
                log.error("%s; inspection goes on with what is in force", reason)
        if up:
            self._database_seen = time.monotonic()

    def _database_answers(self) -> bool:
        """A server that hangs raises nothing: what counts is when it answered last."""
        silent_s = time.monotonic() - self._database_seen
        return self._database_up and silent_s < self._settings.sync_interval_s + _SILENT_S

    def _in_force(self, model: Model) -> dict[str, Calibration]:
        known = {calibration.id: calibration for calibration in model.calibrations.values()}
        return {
            profile: known.get(id) or self._store.calibration(id)
            for profile, id in self._store.active(model.graph).items()
        }

    def _publish(self, model: Model) -> None:
        """The active version's thresholds, which are what requests get that name no version."""
        if not self.serves(model):
            return
        metrics, profiles = self._metrics, {"", *model.calibrations}
        for profile in self._published.get(model.name, set()) - profiles:
            for gauge in (metrics.threshold, metrics.calibration_samples, metrics.calibration_made):
                with suppress(KeyError):
                    gauge.remove(model.name, profile)
        for profile in profiles:
            labels, calibration = (model.name, profile), model.calibration_for(profile)
            threshold = calibration.threshold if calibration else math.nan
            metrics.threshold.labels(*labels).set(threshold)
            metrics.calibration_samples.labels(*labels).set(
                calibration.samples if calibration else 0
            )
            if calibration and calibration.made:
                metrics.calibration_made.labels(*labels).set(calibration.made.timestamp())
        self._published[model.name] = profiles

    async def close(self) -> bool:
        """Give up what is being loaded, and end the threads; False where one doesn't come back."""
        changes = list(self._changes.values())
        for task in changes:
            task.cancel()
        await asyncio.gather(*changes, return_exceptions=True)
        await self._loads.close()
        await self._shadows.close()
        return await asyncio.to_thread(self._loader.close)


def _told(error: Exception) -> str:
    """Why something was not taken up: once in full where it is no refusal of ours."""
    if isinstance(error, ServiceError):
        return str(error)
    log.error("a version could not be taken up", exc_info=error)
    return f"{type(error).__name__}: {error}"


def _tell_change(model: Model, before: Mapping[str, Calibration]) -> None:
    for profile in sorted({*before, *model.calibrations}):
        old, new = before.get(profile), model.calibrations.get(profile)
        if old != new:
            log.info(
                "%s version %d%s: %s, was %s",
                *model.key,
                f", profile {profile}" if profile else "",
                tell_threshold(model.calibration_for(profile)),
                old.id if old else "without a calibration",
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
