"""Public data sets: link -> checked archive -> folder, whole or not at all.

    OUT.part/archive      what has arrived so far; a broken download goes on from there
    OUT.part/unpacked     what has been unpacked so far
    OUT                   unpacked, once all of it was

A link may die or serve something else: the SHA-256 says whether an archive is the right one.
"""

import contextlib
import hashlib
import http.client
import lzma
import shutil
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from training.errors import TrainingError
from training.progress import progress

CHUNK = 1 << 20  # bytes
TIMEOUT_S = 60  # without a single byte
GOES_ON = "the same command goes on from there"
ELSEWHERE = "--url takes the archive from elsewhere"


@dataclass(frozen=True)
class DataSet:
    title: str
    url: str
    sha256: str
    licence: str
    layout: str


NON_COMMERCIAL = "CC BY-NC-SA 4.0: not for commercial use"
DATA_SETS = {
    "mvtec-ad": DataSet(
        "MVTec AD, 15 categories (Bergmann et al., IJCV 2021)",
        "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/download/"
        "420938113-1629960298/mvtec_anomaly_detection.tar.xz",
        "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
        NON_COMMERCIAL,
        "mvtec",
    ),
    "visa": DataSet(
        "VisA, 12 categories (Zou et al., ECCV 2022)",
        "https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",
        "2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
        "CC BY 4.0 by its authors' LICENSE-DATASET (elsewhere stated as CC BY-NC-SA 4.0)",
        "visa",
    ),
    "btad": DataSet(
        "BTAD, 3 categories (Mishra et al., ISIE 2021)",
        "https://avires.dimi.uniud.it/papers/btad/btad.zip",
        "461c9387e515bfed41ecaae07c50cf6b10def647b36c9e31d239ab2736b10d2a",
        NON_COMMERCIAL,
        "btad",
    ),
    "vad": DataSet(
        "VAD, 1 category (Baitieva et al., CVPR 2024)",
        "https://eu.mydrive.ch/shares/90677/c42f2e42db42dd710153dbadc2160f88/download/"
        "453437487-1757245265/VAD.zip",
        "8655b46d9de19f1c50d3eb79567cc3504773979892281a669d0c36680050050a",
        NON_COMMERCIAL,
        "vad",
    ),
}


def fetch(data_set: DataSet, out: Path, url: str | None = None) -> None:
    """Download, check and unpack a data set to `out`, which must not exist or be empty.

    `url`, http(s) or file, replaces the data set's own. Raises TrainingError for a server that
    fails, an archive that isn't the right one, or one that would write outside `out`; then `out`
    isn't there, and only what a further call can go on from is kept.
    """
    check_empty(out)
    out, url = out.resolve(), url or data_set.url
    work = out.with_name(f"{out.name}.part")
    archive, unpacked = work / "archive", work / "unpacked"
    try:
        work.mkdir(parents=True, exist_ok=True)
        _download(url, archive)
        _check_digest(archive, data_set.sha256, url)
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir()
        try:
            _unpack(archive, unpacked)
        except BaseException:
            shutil.rmtree(unpacked, ignore_errors=True)
            raise
        if out.exists():
            out.rmdir()
        unpacked.rename(out)
        archive.unlink()
    except OSError as error:
        raise TrainingError(f"{work}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # not empty: there is something to go on from
            work.rmdir()


def check_empty(out: Path) -> None:
    """Raises TrainingError unless `out` doesn't exist or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"{out}: exists and is not an empty folder")


def _download(url: str, archive: Path) -> None:
    done = archive.stat().st_size if archive.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "skrd4ad"})
        if done:
            request.add_header("Range", f"bytes={done}-")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            _append(response, archive, done)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and done:
            return  # nothing follows: all of it is here, or the digest will tell
        raise TrainingError(f"{url}: HTTP {error.code} {error.reason}; {ELSEWHERE}") from None
    except (urllib.error.URLError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrainingError(f"{url}: {reason}; {ELSEWHERE}") from None
    except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise TrainingError(f"{url}: {error or type(error).__name__}; {GOES_ON}") from None


def _append(response: http.client.HTTPResponse, archive: Path, done: int) -> None:
    if response.status != 206:  # the whole of it, from a server that can't go on in the middle
        done = 0
    length = response.headers["Content-Length"]
    total = done + int(length) if length else None
    _check_space(archive.parent, int(length or 0))
    with (
        archive.open("ab" if done else "wb") as file,
        progress(total=total, initial=done, description="downloading", unit="B") as bar,
    ):
        while chunk := response.read(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
        done = file.tell()
    if total is not None and done < total:
        raise ConnectionError(f"broke off after {done:,} of {total:,} bytes")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TrainingError(f"{folder}: {needed:,} bytes are needed and {free:,} are free")


def _check_digest(archive: Path, sha256: str, url: str) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        archive.unlink()  # whatever it is, going on from it can't help
        raise TrainingError(
            f"{url}: the archive's SHA-256 is {found}, and must be {sha256}: it was deleted"
        )


def _unpack(archive: Path, folder: Path) -> None:
    try:
        if tarfile.is_tarfile(archive):
            _unpack_tar(archive, folder)
        else:
            _unpack_zip(archive, folder)
    except (
        *(tarfile.TarError, zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError),
        *(lzma.LZMAError, zlib.error, EOFError, RuntimeError),
    ) as error:
        raise TrainingError(f"{archive}: can't be unpacked: {error}") from error


def _unpack_tar(archive: Path, folder: Path) -> None:
    # As a stream: listing the members first would decompress gigabytes twice.
    with (
        tarfile.open(archive, "r|*") as tar,
        progress(total=None, description="unpacking", unit="B") as bar,
    ):
        for member in tar:
            # Refuses absolute names, `..`, links that lead out and devices.
            tar.extract(member, folder, filter="data")
            bar.update(member.size)


def _unpack_zip(archive: Path, folder: Path) -> None:
    root = folder.resolve()
    with zipfile.ZipFile(archive) as zipped:
        members = zipped.infolist()
        total = sum(member.file_size for member in members)
        _check_space(folder, total)
        with progress(total=total, description="unpacking", unit="B") as bar:
            for member in members:
                # `extract` would drop the dots in silence, and write a link's target as a file.
                inside = (root / member.filename).resolve().is_relative_to(root)
                if not inside or stat.S_ISLNK(member.external_attr >> 16):
                    raise TrainingError(f"{archive}: {member.filename!r} leads out of the archive")
                zipped.extract(member, folder)
                bar.update(member.file_size)
