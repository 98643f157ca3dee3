"""A bundle that is sent: unpacked, checked and tried, and only then one of the models.

    zip ─► manifest, graph, golden picture ─► digests ─► written beside ─► loaded, checked ─► there

Whatever fails leaves nothing behind.
"""

import asyncio
import logging
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path

from service import archives, bundle
from service.bundle import GOLDEN_FILE, GRAPH_FILE, MANIFEST_FILE, Bundle, Manifest
from service.errors import (
    BundleError,
    BundleRefused,
    DeviceUnavailable,
    DigestMismatch,
    ModelsNotWritable,
    NotReady,
    Overloaded,
    TooLarge,
    VersionExists,
)
from service.model import Model
from service.registry import Registry
from service.settings import Settings

log = logging.getLogger(__name__)

_FILES = (MANIFEST_FILE, GRAPH_FILE, GOLDEN_FILE)
_MAX_SMALL_BYTES = 64 << 20  # of the manifest, and of the golden picture
_MEMBER = re.compile(rf"(?P<folder>[^/\\]+/)?(?P<file>{'|'.join(map(re.escape, _FILES))})")


class Intake:
    """Takes one bundle at a time."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry, self._settings = registry, settings
        self._taking = False

    async def take(self, chunks: AsyncIterator[bytes], digest: str | None, *, by: str) -> Model:
        """The model of a zipped bundle, which then lies in the models folder and is loaded. Another
        version that serves goes on, over the next start as well.

        Raises BundleRefused with the reason, what `archives.members` raises, DigestMismatch where
        the graph is not the one that the caller insists on, VersionExists, ModelsNotWritable,
        NotReady where there is no room for it, and Overloaded while another one is taken.
        """
        if self._taking:
            raise Overloaded("another bundle is being uploaded; one at a time")
        self._taking = True
        try:
            _check_writable(self._settings.models)
            files = await _unpacked(chunks, self._settings.max_bundle_bytes)
            manifest = await asyncio.to_thread(_checked, files)
            if digest not in (None, manifest.graph.sha256):
                raise DigestMismatch(
                    f"the bundle's graph has the digest {manifest.graph.sha256}, the request "
                    f"insists on {digest}"
                )
            return await self._try(manifest, files, by)
        finally:
            self._taking = False

    async def _try(self, manifest: Manifest, files: dict[str, bytes], by: str) -> Model:
        folder = self._settings.models / manifest.name / str(manifest.version)
        staging = await asyncio.to_thread(_staged, folder, manifest, files)
        files.clear()
        try:
            key = manifest.name, manifest.version
            model = await self._registry.try_out(partial(Bundle, staging), key)
            await self._registry.pin(manifest.name, by=by)
            await asyncio.to_thread(_publish, staging, folder)
        except DeviceUnavailable as error:
            raise NotReady(str(error)) from None
        except BundleError as error:
            raise BundleRefused(str(error).replace(f"{staging}", "the bundle")) from None
        finally:
            await asyncio.to_thread(_clean, staging)
        model.bundle = Bundle(folder)
        await self._registry.adopt(model)
        return model


def _check_writable(models: Path) -> None:
    """Before a large body is read for nothing; raises ModelsNotWritable."""
    if not os.access(models, os.W_OK | os.X_OK):
        raise _not_writable(models, "no permission, or a read-only file system")


def _not_writable(models: Path, reason: str) -> ModelsNotWritable:
    return ModelsNotWritable(
        f"{models}: {reason}: mount the models folder writable to upload bundles, or put them "
        "there by other means"
    )


async def _unpacked(chunks: AsyncIterator[bytes], limit: int) -> dict[str, bytes]:
    """The files of a bundle by name; raises BundleRefused for any other, TooLarge for too much."""
    files: dict[str, bytes] = {}
    folders = set[str]()

    def most(name: str) -> int:
        """Bytes that it may have; asked before it is unpacked."""
        found = _MEMBER.fullmatch(name)
        if found is None or found["folder"] in ("./", "../"):
            raise BundleRefused(
                f"{name!r} in the zip: only {', '.join(_FILES)} may be there, at the top or in one "
                "folder"
            )
        folders.add(found["folder"])
        if found["file"] in files or len(folders) > 1:
            raise BundleRefused(f"{name!r} in the zip: one bundle at a time")
        return limit if found["file"] == GRAPH_FILE else min(limit, _MAX_SMALL_BYTES)

    limits = archives.Limits(len(_FILES), most)
    async with aclosing(archives.members(chunks, limits)) as members:
        async for name, data in members:
            files[name.rpartition("/")[2]] = data
            total = sum(map(len, files.values()))
            if total > limit:
                raise TooLarge(f"the bundle has at least {total} bytes; the limit is {limit}")
    return files


def _checked(files: dict[str, bytes]) -> Manifest:
    """The manifest, when the other files are what it says."""
    for name in (MANIFEST_FILE, GRAPH_FILE):
        if name not in files:
            raise BundleRefused(f"the zip has no {name}, but {', '.join(files) or 'nothing'}")
    try:
        manifest = bundle.parse_manifest(MANIFEST_FILE, files[MANIFEST_FILE])
        bundle.check_digest(GRAPH_FILE, files[GRAPH_FILE], manifest.graph.sha256)
    except BundleError as error:
        raise BundleRefused(str(error)) from None
    if (manifest.golden is None) != (GOLDEN_FILE not in files):
        raise BundleRefused(
            f"{GOLDEN_FILE} is {'missing' if manifest.golden else 'there'}, but the manifest says "
            f"{'otherwise' if manifest.golden else 'nothing of it'}"
        )
    return manifest


def _staged(folder: Path, manifest: Manifest, files: dict[str, bytes]) -> Path:
    if folder.exists():
        raise VersionExists(
            f"{manifest.name} version {manifest.version} exists, and a version never changes: "
            "export it under a new one"
        )
    try:
        return bundle.stage(folder, manifest, files[GRAPH_FILE], files.get(GOLDEN_FILE))
    except OSError as error:
        with suppress(OSError):  # was there before, or isn't there
            folder.parent.rmdir()
        raise _not_writable(folder.parent, error.strerror or str(error)) from error


def _publish(staging: Path, folder: Path) -> None:
    try:
        bundle.publish(staging, folder)
    except (BundleError, OSError) as error:
        raise VersionExists(f"{folder}: somebody else wrote it meanwhile") from error


def _clean(staging: Path) -> None:
    """Nothing of a bundle that was refused stays, nor an empty folder of its model."""
    shutil.rmtree(staging, ignore_errors=True)
    with suppress(OSError):  # other versions are there
        staging.parent.rmdir()
