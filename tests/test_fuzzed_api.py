"""The whole OpenAPI, as schemathesis reads it: requests of every shape, and what their answers may
be."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import encoded, picture
from test_replicas import calibrate
from test_serve import Server, serve

from service.database import Database
from service.keys import Keys

__all__ = ["serve"]  # the fixture

PICTURE = encoded(picture())


@pytest.mark.parametrize(
    ("phases", "seconds"),
    [
        ("fuzzing,stateful", 45),
        pytest.param("examples,coverage,fuzzing,stateful", 900, marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_every_answer_is_what_the_openapi_says_and_none_is_a_failure_of_the_service(
    serve: Callable[..., Server], tmp_path: Path, phases: str, seconds: int
) -> None:
    server = serve()
    assert server.inspect(PICTURE).status_code == 200
    assert calibrate(server, 25).status_code == 201
    token = Keys(Database(f"sqlite:///{tmp_path / 'state.sqlite'}")).create("fuzz", "admin")

    ended = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli"]
        + ["--config-file", str(Path(__file__).with_name("schemathesis.toml"))]
        + ["run", f"http://127.0.0.1:{server.port}/openapi.json", "--phases", phases]
        # Uploads are zips, which it can't make; `test_intake` and `test_archives` do.
        + ["--exclude-operation-id", "upload_v1_models_post"]
        + ["--max-time", str(seconds), "--seed", "1", "--warnings", "off", "--no-color"],
        env=os.environ | {"SKRD4AD_TEST_KEY": token},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=seconds + 300,
    )

    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr
    assert " generated" in ended.stdout
    server.client.headers["X-API-Key"] = token
    assert server.client.get("/livez").status_code == 200
    log = server.log.read_text()
    assert "Traceback" not in log and "never retrieved" not in log
