"""What the service stands on, and under which licences."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGE = (ROOT / "docs" / "dependencies.md").read_text()
# Of what a licence says of itself; who adds a dependency with another one looks at it first.
ALLOWED = re.compile(
    "MIT|BSD|Apache|PSF-2.0|0BSD|Zlib|CC0-1.0|Unlicense|LGPL-3.0-only|MIT-CMU|Python Software",
    re.IGNORECASE,
)
UNTOLD = {"protobuf": "BSD-3-Clause", "flatbuffers": "Apache-2.0"}


def installed() -> dict[str, metadata.Distribution]:
    """All that the service needs, at any depth, as far as it is installed."""
    extras = PACKAGE["optional-dependencies"]
    waiting = [Requirement(text) for text in PACKAGE["dependencies"] + extras["cpu"]]
    found: dict[str, metadata.Distribution] = {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        wanted = [{"extra": extra} for extra in ("", *requirement.extras)]
        if name in found or (
            requirement.marker and not any(map(requirement.marker.evaluate, wanted))
        ):
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for text in found[name].requires or ():
            below = Requirement(text)
            if below.marker is None or any(map(below.marker.evaluate, wanted)):
                below.marker = None
                waiting.append(below)
    return found


def licence(distribution: metadata.Distribution) -> str:
    told = distribution.metadata
    classifiers = [c for c in told.get_all("Classifier", []) if c.startswith("License ::")]
    name = canonicalize_name(told["Name"])
    return (
        told["License-Expression"] or UNTOLD.get(name) or " ".join(classifiers) or told["License"]
    )


def test_every_package_that_the_service_needs_is_listed() -> None:
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \|$", PAGE, flags=re.MULTILINE)
    listed = {canonicalize_name(name) for row in rows for name in row.split(", ")}

    packages = installed()

    assert len(packages) > 25
    assert sorted(packages.keys() - listed) == []


def test_every_licence_allows_what_we_do() -> None:
    for name, distribution in installed().items():
        assert ALLOWED.search(licence(distribution) or ""), (name, licence(distribution))


def test_every_package_is_pinned() -> None:
    pinned = {
        canonicalize_name(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }

    assert sorted(installed().keys() - pinned) == []
