"""The documentation is true: commands, answers, tables and links."""

import argparse
import importlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from service.app import create_app
from service.errors import ServiceError
from service.metrics import Metrics
from service.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of the service as `make serve` starts it, with the shipped bundles."""
    state = tmp_path_factory.mktemp("state")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "serve", "--port", str(port), "--models", "models"]
        + ["--device", "cpu", "--database-url", f"sqlite:///{state}/readme.sqlite"],
        cwd=ROOT,
    )
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < deadline, "the service didn't start"
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                break
        except httpx2.TransportError:
            time.sleep(0.1)
    yield port
    process.terminate()
    assert process.wait(30) == 0


def run_shell(command: str, port: int, folder: Path) -> str:
    """Runs a documented curl in a scratch folder that has the examples."""
    shutil.copytree(ROOT / "examples", folder / "examples", dirs_exist_ok=True)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.replace(":8000", f":{port}")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_readmes_curl_gives_the_readmes_answer(demo: int, tmp_path: Path) -> None:
    curl = next(b for b in code_blocks(README, "bash") if "curl" in b and "inspect" in b)
    shown = json.loads(code_blocks(README, "json")[0].replace("...", ""))

    answer = json.loads(run_shell(curl, demo, tmp_path))

    assert list(answer) == list(shown)
    for exact in ("model", "image", "decision", "calibration", "threshold_source"):
        assert answer[exact] == shown[exact], exact
    for number in ("score", "threshold", "p_value"):
        assert answer[number] == pytest.approx(shown[number], rel=2e-3), number
    assert len(answer["regions"]) >= 1
    assert set(shown["regions"][0]) == set(answer["regions"][0])
    assert answer["heatmap"].startswith(shown["heatmap"])


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("command", [b for b in code_blocks(API, "bash") if "v1/inspect" in b])
def test_the_curls_of_the_api_page_work(demo: int, tmp_path: Path, command: str) -> None:
    run_shell(command.replace("curl", "curl --fail"), demo, tmp_path)


def test_the_examples_are_decided_as_their_names_say(demo: int) -> None:
    for name in ("normal", "anomalous"):
        data = (ROOT / "examples" / f"{name}.png").read_bytes()
        answer = httpx2.post(
            f"http://127.0.0.1:{demo}/v1/inspect",
            content=data,
            headers={"Content-Type": "image/png"},
            timeout=60,
        )
        assert answer.json()["decision"] == name


def test_the_shipped_models_stay_under_forty_megabytes() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "models"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    files = [ROOT / f for f in listed] or [f for f in (ROOT / "models").rglob("*") if f.is_file()]

    assert sum(f.stat().st_size for f in files) < 40e6


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_in_the_operations_page_as_it_is_in_the_code(name: str) -> None:
    field = Settings.model_fields[name]
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    shown = "" if default is None else f"`{default}` "

    row = f"| `SKRD4AD_{name.upper()}` | {shown}| {field.description} |"
    assert row in OPERATIONS


def test_every_metric_is_in_the_operations_page_as_it_is_in_the_code() -> None:
    for metric in Metrics().registry.collect():
        name = metric.name + ("_total" if metric.type == "counter" else "")
        assert f"| `{name}` | {metric.type} | {metric.documentation} |" in OPERATIONS


def test_every_route_is_in_the_api_page(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    app = create_app(
        Settings(models=tmp_path / "models", database_url=f"sqlite:///{tmp_path}/s.sqlite")
    )

    for path, methods in app.openapi()["paths"].items():
        for method, route in methods.items():
            assert f"`{method.upper()} {path}`" in API
            for parameter in route.get("parameters", ()):
                assert f"`{parameter['name']}`" in API or f"?{parameter['name']}=" in API


def test_every_status_of_an_error_is_in_the_api_page() -> None:
    kinds = [ServiceError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    refusals = {kind.status for kind in kinds}

    assert {400, 401, 403, 404, 409, 413, 415, 422, 429, 500, 503, 504} <= refusals
    for status in refusals:
        assert f"| {status} |" in API


def test_every_command_and_flag_of_training_is_in_its_page() -> None:
    from training.__main__ import _parser

    (commands,) = (
        action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    for name, parser in commands.choices.items():
        section = re.search(rf"\n## {name}\n(.*?)(?=\n## |\Z)", TRAINING, flags=re.DOTALL)
        assert section, f"no section on {name}"
        for action in parser._actions:
            for flag in action.option_strings:
                if flag not in ("-h", "--help"):
                    assert flag in section[1], f"{name} {flag}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_documented_commands_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = DOCS[path]

    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert target in targets, f"make {target}"
    for block in code_blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
                words.pop(0)
            python = bool(words) and words[0] in ("python", ".venv/bin/python")
            if python and words[1] == "-m" and words[2] in ("service", "training"):
                check_flags(words[2], words[3:])


def check_flags(package: str, words: list[str]) -> None:
    parser = importlib.import_module(f"{package}.__main__")._parser()
    try:
        parser.parse_args(words)
    except SystemExit:
        pytest.fail(f"python -m {package} {' '.join(words)} is refused")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", DOCS[path]):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_changelog_and_the_package_have_the_same_version() -> None:
    from service import __version__

    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == __version__
