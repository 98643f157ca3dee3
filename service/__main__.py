"""The command line of the service: `python -m service <command> --help`."""

import argparse
import ctypes
import gc
import logging
import math
import os
import resource
import signal
import socket
import ssl
import sys
from typing import Any

import uvicorn

from service import key_commands
from service import settings as service_settings
from service.app import create_app
from service.errors import ServiceError, SettingsError
from service.protocol import LimitedProtocol
from service.server import Server
from service.settings import Settings

log = logging.getLogger(__name__)

# Longer than proxies keep theirs, so that they close first, and never send into a closed one.
KEEP_ALIVE_S = 75
# By malloc.h's numbers of M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX. What is mapped costs
# a page fault for every 4 KB: 3 megapixels and more, whose decoding takes much longer.
_MALLOC_OPTIONS = {-3: 8 << 20, -1: 64 << 20, -8: 2}


def main(argv: list[str] | None = None) -> int:
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        return int(command(**arguments))
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="start the service",
        description="Start the service. Every flag is also an environment variable, "
        "SKRD4AD_<FLAG>; the flag wins.",
        argument_default=argparse.SUPPRESS,
    )
    # One flag for each setting; values are checked by Settings, wherever they came from.
    for name, field in Settings.model_fields.items():
        serve.add_argument(
            f"--{name.replace('_', '-')}",
            metavar=name.rsplit("_", 1)[-1].upper(),
            help=field.description
            if field.default is None
            else f"{field.description} Default: {field.default}",
        )
    serve.set_defaults(command=_serve)
    key_commands.add(commands)
    return parser


def _serve(**overrides: object) -> int:
    settings = service_settings.load(**overrides)
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    _allow_many_files()
    return_memory()
    listener = _bind(settings.host, settings.port)  # a taken port fails before models load
    tls = _tls(settings)
    app = create_app(settings)
    # What is there now stays; without this the collector looks through all of it again and again,
    # a quarter of the event loop's time under load.
    gc.collect()
    gc.freeze()
    protocol = type("Protocol", (LimitedProtocol,), {"timeout_s": settings.receive_timeout_s})
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # `middleware` writes one line for each request, with its id
        server_header=False,
        http=protocol,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout_s),
        **tls,
    )
    host, port = listener.getsockname()[:2]
    scheme = "https" if tls else "http"
    log.info("listening on %s://%s:%d (API at /docs)", scheme, host, port)
    # uvicorn shuts down in order, then raises the signal again for whoever had it before: nobody,
    # so that an orderly stop exits with 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    Server(config, app, settings.shutdown_delay_s).run(sockets=[listener])
    if app.state.hangs:  # the interpreter would wait for the device's thread, and nothing is lost
        log.error("the device doesn't come back: ending without it")
        logging.shutdown()
        os._exit(1)
    return 0


def _tls(settings: Settings) -> dict[str, Any]:
    """What uvicorn needs for HTTPS; raises SettingsError where the files are none."""
    if not (settings.tls_certificate and settings.tls_key):
        return {}
    for name in ("tls_certificate", "tls_key"):
        if not os.path.isfile(getattr(settings, name)):  # not told: it may be the key itself
            raise SettingsError(f"SKRD4AD_{name.upper()} names no file that is there")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # With a password no one is asked for one, and an encrypted key fails.
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password="")
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"SKRD4AD_TLS_CERTIFICATE and SKRD4AD_TLS_KEY can't be used together: {error} (the key "
            "must be that of the certificate, and not encrypted)"
        ) from None
    return {"ssl_certfile": settings.tls_certificate, "ssl_keyfile": settings.tls_key}


def _allow_many_files() -> None:
    """Each connection is an open file, and the usual soft limit of 1024 is for programs that use
    select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def return_memory() -> None:
    """Memory of large pictures goes back to the system with them, and all threads share two heaps.
    glibc by itself would raise its limits to the largest picture that it saw freed, and have heaps
    that grow for every thread. What the environment says stays in force."""
    told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if sys.platform == "linux" and not told:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc
            for option, value in _MALLOC_OPTIONS.items():
                libc.mallopt(option, value)


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that refuses connections until the server listens on it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(f"can't listen on {host} port {port}: {error.strerror}") from None
    return listener


if __name__ == "__main__":
    sys.exit(main())
