"""Two services behind nginx, as docker/nginx.conf has them: for more than one process can do.

    python -m bench.pair --port 8080 --services 8000 8001 --folder /tmp/pair [flags of `serve`]

They share one database. Plain HTTP, as no peer is asked by TLS.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
SITE = Path(__file__).parents[1] / "docker" / "nginx.conf"
POLL_S = 0.05
_LISTENER = r"listen 443 ssl;\s+ssl_certificate .*;\s+ssl_certificate_key .*;"


def site(listen: str, services: Sequence[int]) -> str:
    """The shipped configuration for services on these ports; `listen` stands for its listener and
    its certificate."""
    text = SITE.read_text()
    for shipped, port in zip((8000, 8001), services, strict=True):
        text = _replaced(f"127.0.0.1:{shipped}", f"127.0.0.1:{port}", text)
    return _replaced(_LISTENER, listen, text)


def _replaced(pattern: str, new: str, text: str) -> str:
    text, count = re.subn(pattern, new, text)
    assert count == 1, f"{SITE} has {count} times {pattern}"
    return text


def started(folder: Path, site: str) -> "subprocess.Popen[bytes]":
    """nginx with a site's configuration; what it writes goes to `folder`."""
    assert NGINX is not None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "site.conf").write_text(site)
    user = "user root;" if os.getuid() == 0 else ""  # else its workers couldn't read the folder
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body;\n"
        f"proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;\n"
        f"uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;\n"
        f"include {folder}/site.conf; }}"
    )
    command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pair", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--port", type=int, required=True, help="of nginx")
    parser.add_argument("--services", type=int, nargs=2, required=True, help="their ports")
    parser.add_argument("--folder", type=Path, required=True, help="for what nginx writes")
    arguments, flags = parser.parse_known_args(argv)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    serve = [sys.executable, "-m", "service", "serve", *flags]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for port in arguments.services:
            running.append(subprocess.Popen([*serve, "--port", str(port)]))
        while not all(map(_ready, arguments.services)):
            if not _all_run(running):
                return 1
            time.sleep(POLL_S)
        listen = f"listen 127.0.0.1:{arguments.port};"
        running.append(started(arguments.folder.resolve(), site(listen, arguments.services)))
        while _all_run(running):
            time.sleep(POLL_S)
        return 1  # what is left of it is no pair
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait()


def _all_run(processes: Sequence["subprocess.Popen[bytes]"]) -> bool:
    return all(process.poll() is None for process in processes)


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz") as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


if __name__ == "__main__":
    sys.exit(main())
