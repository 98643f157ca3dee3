"""The command line of the service: `python -m service <command> --help`."""

import argparse
import logging
import sys

import uvicorn

from service import settings as service_settings
from service.app import create_app
from service.errors import ServiceError
from service.settings import Settings

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        return int(command(service_settings.load(**arguments)))
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
            help=f"{field.description} Default: {field.default}",
        )
    serve.set_defaults(command=_serve)
    return parser


def _serve(settings: Settings) -> int:
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # `middleware` writes one line for each request, with its id
        server_header=False,
    )
    log.info("listening on http://%s:%d (API at /docs)", settings.host, settings.port)
    uvicorn.Server(config).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
