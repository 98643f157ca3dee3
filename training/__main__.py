"""The command line of training: `python -m training <command> --help`."""

import argparse
import io
import logging
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from service.errors import ServiceError
from training import files
from training.errors import TrainingError
from training.fetch import DATA_SETS
from training.flags import (
    add_axes,
    add_data,
    add_device,
    add_settings,
    image_size,
    natural,
    positive,
    read_plan,
)
from training.settings import ARCHITECTURES, BACKBONES, ImportFormat, Settings

if TYPE_CHECKING:
    from service.bundle import Bundle
    from training.checkpoint import Checkpoint

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for chatty in ("onnxscript", "onnx_ir", "torch.onnx", "httpx2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Ends like Ctrl-C, so that a rehearsal doesn't leave its service behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments) or 0)
    except (TrainingError, ServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_export(commands)
    _add_import(commands)
    _add_evaluate(commands)
    _add_report(commands)
    _add_rehearse(commands)
    _add_benchmark(commands)
    _add_synthetic(commands)
    _add_fetch_data(commands)
    return parser


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "train",
        help="normal images -> checkpoint",
        description="Train on normal images alone; writes MODELS/NAME/checkpoint.",
        # Only flags that were given appear, so that --resume can tell them from defaults.
        argument_default=argparse.SUPPRESS,
    )
    add_settings(parser)
    add = parser.add_argument
    add("--resume", action="store_true", help="go on with the run that was interrupted")
    add("--overwrite", action="store_true", help="start anew where a run exists")
    parser.set_defaults(command=_train)


def _train(arguments: argparse.Namespace) -> int:
    from training import checkpoint as checkpoints
    from training import distributed
    from training.train import train

    given = vars(arguments)
    resume, overwrite = given.pop("resume", False), given.pop("overwrite", False)
    given.pop("command")
    settings = _settings(given, resume)
    try:
        with distributed.processes():
            run = train(settings, resume=resume, overwrite=overwrite)
            if distributed.first():
                print(_outcome(run), flush=True)
    except KeyboardInterrupt:  # before the first step
        if (settings.folder / "checkpoint.json").exists() and distributed.first():
            print(_outcome(checkpoints.read(settings.folder)), flush=True)
        raise
    return 0 if run.finished else INTERRUPTED


def _outcome(run: "Checkpoint") -> str:
    given = run.settings.models
    models = "" if given == "models" else f" --models {shlex.quote(given)}"
    if not run.finished:
        return (
            f"stopped at epoch {run.epoch} of {run.settings.epochs}, saved in "
            f"{run.settings.folder}; go on with:\n"
            f"  python -m training train --name {run.settings.name}{models} --resume"
        )
    return (
        f"trained {run.settings.epochs} epochs, last loss {run.losses[-1]:.4f}; next:\n"
        f"  python -m training export --name {run.settings.name}{models}"
    )


def _settings(given: dict[str, object], resume: bool) -> Settings:
    if "image_size" in given:
        given["image_size"] = image_size(given["image_size"])  # type: ignore[arg-type]
    if "data" in given:
        given["data"] = str(given["data"])
    elif not resume:
        raise TrainingError("--data is needed: a data set, or a folder of normal images")
    asked = Settings(**{"data": ""} | given)  # type: ignore[arg-type]
    if not resume:
        return replace(asked, **ARCHITECTURES[asked.architecture] | given)
    from training import checkpoint as checkpoints

    run = checkpoints.read(asked.folder)
    saved = run.settings
    if "epochs" in given and asked.epochs < saved.epochs:
        raise TrainingError(
            f"--resume: --epochs {asked.epochs} is fewer than the run's {saved.epochs} "
            f"({run.epoch} are done); `export --unfinished` takes it as it is"
        )
    # What may differ: where files lie, what computes, and how long to go on.
    free = {"data", "models", "device", "epochs", "save_every", "strict"}
    free |= {"feature_cache", "feature_memory_gb"}
    for name, value in given.items():
        found = name in ("layout", "precision") and value == "auto"  # what was found is recorded
        if name not in free and not found and value != getattr(saved, name):
            raise TrainingError(
                f"--resume: {name} {value} contradicts the run's {getattr(saved, name)}"
            )
    return replace(saved, **{name: value for name, value in given.items() if name in free})  # type: ignore[arg-type]


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "export",
        help="checkpoint -> bundle",
        description="Fuse teacher, bottleneck and decoder into one checked ONNX graph; writes the "
        "bundle MODELS/NAME/VERSION.",
    )
    add = parser.add_argument
    _add_target(parser)
    add("--data", type=Path, help="where the run's data lie now, if they were moved")
    add("--unfinished", action="store_true", help="export a run that was interrupted as it is")
    parser.set_defaults(command=_export)


def _add_target(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that writes a bundle."""
    add = parser.add_argument
    add("--name", required=True, help="the model's name: a product or a view")
    add("--models", type=Path, default=Path("models"), help="default: models")
    add("--version", type=positive, help="default: one more than the newest")
    add(
        "--weights",
        choices=("float32", "float16"),
        default="float32",
        help="how weights are stored; float16 halves the file (default: float32)",
    )
    add(
        "--precision",
        choices=("float32", "float16"),
        default="float32",
        help="what the network computes in; float16 is for GPUs, and stores weights so, too "
        "(default: float32)",
    )


def _export(arguments: argparse.Namespace) -> int:
    from training.export import export

    bundle = export(
        arguments.models,
        arguments.name,
        version=arguments.version,
        weights=arguments.weights,
        precision=arguments.precision,
        data_folder=arguments.data,
        unfinished=arguments.unfinished,
    )
    _tell(bundle)
    return 0


def _tell(bundle: "Bundle") -> None:
    """What was written, and what its threshold promises."""
    calibration, graph = bundle.default_calibration(), bundle.manifest.graph
    print(
        f"wrote {bundle.folder}: {len(bundle.read_graph()) / 1e6:.1f} MB, opset {graph.opset}, "
        f"difference from torch {graph.parity:.1e}; a running service reads it at its next start"
    )
    if graph.weight_rounding:
        print(f"float16 changes scores by at most {graph.weight_rounding:.1e} of their value")
    if calibration is None:
        print("no threshold: calibrate it (POST /v1/calibrate), or import again with --normals")
        return
    print(
        f"default threshold {calibration.threshold:.4f} at a false-positive rate of "
        f"{calibration.target_fpr:.3g}, from {calibration.samples} held-out normal images"
    )
    if calibration.target_fpr > 0.01:
        print("that is the finest rate they allow: 0.01 needs 99 held-out images")


def _add_import(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "import",
        help="checkpoint of a public code -> bundle",
        description="Turn a checkpoint that RD4AD, SK-RD4AD, DRD or anomalib wrote into the bundle "
        "MODELS/NAME/VERSION, without training.",
    )
    add = parser.add_argument
    add("--format", choices=get_args(ImportFormat), required=True, help="the code that wrote it")
    add("--checkpoint", type=Path, required=True, metavar="FILE", help=".pth, or anomalib's .ckpt")
    add("--backbone", choices=tuple(BACKBONES), required=True, help="the network's teacher")
    add(
        "--teacher-weights",
        metavar="hub|FILE",
        help="default: torchvision's ImageNet weights by timm; anomalib's .ckpt holds its own",
    )
    add("--teacher-licence", metavar="TEXT", default="", help="recorded where none is stated")
    _add_target(parser)
    add(
        "--image-size",
        type=positive,
        nargs="+",
        metavar=("H", "W"),
        help="default: the .ckpt's; 256 256 for a .pth",
    )
    add(
        "--normals",
        type=Path,
        metavar="DIR",
        help="pictures of normal parts that were not trained on, for the default threshold",
    )
    parser.set_defaults(command=_import)


def _import(arguments: argparse.Namespace) -> int:
    from training.importers import import_checkpoint

    bundle = import_checkpoint(
        arguments.checkpoint,
        arguments.format,
        arguments.backbone,
        arguments.models,
        arguments.name,
        teacher_weights=arguments.teacher_weights,
        teacher_licence=arguments.teacher_licence,
        size=image_size(arguments.image_size) if arguments.image_size else None,
        normals=arguments.normals,
        version=arguments.version,
        weights=arguments.weights,
        precision=arguments.precision,
    )
    _tell(bundle)
    return 0


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "evaluate",
        help="bundle + labelled images -> metrics",
        description="Score a data set's test images through the serving code. Without --category "
        "and --layout they are read as the bundle's own data were.",
    )
    add = parser.add_argument
    add("--bundle", type=Path, required=True, metavar="DIR", help="models/NAME/VERSION")
    add_data(parser, "a data set with labelled test images")
    add_device(parser)
    add("--json", type=Path, metavar="FILE", help="write everything here as well")
    add("--strict", action="store_true", help="fail on an unreadable image instead of skipping it")
    parser.set_defaults(command=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from training.evaluate import evaluate, table

    _check_json(arguments.json)
    report = evaluate(
        arguments.bundle,
        arguments.data,
        layout=arguments.layout,
        category=arguments.category,
        device=arguments.device,
        precision=arguments.precision,
        strict=arguments.strict,
    )
    _write_json(arguments.json, report.as_dict())
    print(table(report))
    return 0


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report",
        help="bundle + labelled images -> one HTML file",
        description="Evaluate a bundle and write what there is to know about it as one HTML file.",
    )
    add = parser.add_argument
    add("--bundle", type=Path, required=True, metavar="DIR", help="models/NAME/VERSION")
    add_data(parser, "a data set with labelled test images")
    add(
        "--out", type=Path, metavar="FILE", help="default: NAME-VERSION.html; replaced if it exists"
    )
    add("--worst", type=positive, default=8, metavar="N", help="misses, false alarms (default: 8)")
    add_device(parser)
    add("--strict", action="store_true", help="fail on an unreadable image instead of skipping it")
    parser.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from training.evaluate import table
    from training.report import write_report

    out, report = write_report(
        arguments.bundle,
        arguments.data,
        arguments.out,
        layout=arguments.layout,
        category=arguments.category,
        device=arguments.device,
        precision=arguments.precision,
        worst=arguments.worst,
        strict=arguments.strict,
    )
    print(table(report))
    print(f"wrote {out}: {out.stat().st_size / 1e3:.0f} kB")
    return 0


def _add_rehearse(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "rehearse",
        help="bundle + labelled images -> the real service's answers over HTTP",
        description="Evaluate a bundle, start the service with it, calibrate over HTTP with the "
        "held-out normal images, inspect every test image over HTTP, and compare.",
    )
    add = parser.add_argument
    add("--bundle", type=Path, required=True, metavar="DIR", help="models/NAME/VERSION")
    add_data(parser, "the data it was trained on")
    add("--normals", type=Path, metavar="DIR", help="where held-out images lie, if not in --data")
    add("--target-fpr", type=float, help="default: 0.01, or the finest the held-out images allow")
    add_device(parser)
    add("--pictures", type=Path, metavar="DIR", help="save overlays of some test images here")
    add("--json", type=Path, metavar="FILE", help="write everything here as well")
    parser.set_defaults(command=_rehearse)


def _rehearse(arguments: argparse.Namespace) -> int:
    from training import evaluate, rehearsal

    _check_json(arguments.json)
    result = rehearsal.rehearse(
        arguments.bundle,
        arguments.data,
        layout=arguments.layout,
        category=arguments.category,
        normals=arguments.normals,
        target_fpr=arguments.target_fpr,
        device=arguments.device,
        precision=arguments.precision,
        pictures=arguments.pictures,
    )
    _write_json(arguments.json, result.as_dict())
    print(evaluate.table(result.evaluation))
    print(rehearsal.table(result))
    if arguments.pictures:
        print(f"pictures in {arguments.pictures}")
    return 0


def _add_benchmark(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "benchmark",
        help="many runs -> one table",
        description="Train, export and evaluate every combination of the settings given, each "
        "with one or several values; a row a run, and tables over seeds. Started again, it goes "
        "on; started twice at once, the runs are shared out.",
    )
    add = parser.add_argument
    add("plan", type=Path, nargs="?", metavar="PLAN.toml", help="settings by their flags' names")
    add("--out", type=Path, required=True, metavar="DIR", help="rows and tables; read again")
    add("--keep", action="store_true", help="keep checkpoints and bundles in DIR/models")
    add_axes(parser)
    parser.set_defaults(command=_benchmark)


def _benchmark(arguments: argparse.Namespace) -> int:
    from training.benchmark import benchmark

    given = vars(arguments)
    plan, out, keep = given.pop("plan"), given.pop("out"), given.pop("keep")
    given.pop("command")
    grids = read_plan(plan, given) if plan else [given]
    if not all(grid.get("data") for grid in grids):
        raise TrainingError("a benchmark needs --data, or data in each grid of its plan")
    try:
        print(benchmark(grids, out, keep=keep))
    except KeyboardInterrupt:
        print(f"stopped; rows are in {out}, and the same command goes on", flush=True)
        raise
    return 0


def _add_synthetic(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "synthetic",
        help="draw a labelled data set of a procedural part",
        description="Draw normal and defective pictures of a procedural part, MVTec layout.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    add("--train", type=positive, default=200, help="normal images to train on (default: 200)")
    add("--test-normal", type=positive, default=40, help="default: 40")
    add("--test-per-defect", type=positive, default=8, help="default: 8")
    add("--size", type=positive, default=512, help="side of each picture (default: 512)")
    add("--seed", type=natural, default=0)
    parser.set_defaults(command=_synthetic)


def _synthetic(arguments: argparse.Namespace) -> int:
    from training.synthetic import write_dataset

    write_dataset(
        arguments.out,
        train=arguments.train,
        test_normal=arguments.test_normal,
        test_per_defect=arguments.test_per_defect,
        size=arguments.size,
        seed=arguments.seed,
    )
    print(f"wrote {arguments.out}")
    return 0


def _add_fetch_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "fetch-data",
        help="download a public data set",
        description="Download, check and unpack a public data set, after its licence was accepted.",
    )
    add = parser.add_argument
    add("data_set", choices=DATA_SETS, metavar="NAME", help=", ".join(DATA_SETS))
    add("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    add("--url", help="take the same archive from here: http(s):// or file://")
    add("--yes", action="store_true", help="accept the licence without being asked")
    parser.set_defaults(command=_fetch_data)


def _fetch_data(arguments: argparse.Namespace) -> int:
    from training import datasets, fetch

    data_set, out = DATA_SETS[arguments.data_set], arguments.out
    fetch.check_empty(out)
    print(f"{data_set.title}\nfrom {arguments.url or data_set.url}\nlicence: {data_set.licence}")
    if not arguments.yes:
        _accept_licence()
    fetch.fetch(data_set, out, arguments.url)
    # Some archives hold the data set's folders, others one folder around them.
    folders = [out, *sorted(folder for folder in out.iterdir() if folder.is_dir())]
    found = {folder: datasets.categories(folder, data_set.layout) for folder in folders}
    folder = next((folder for folder in folders if found[folder]), out)
    category = f" --category {'|'.join(found[folder])}" if len(found[folder]) > 1 else ""
    print(f"wrote {out}; read it with --data {folder} --layout {data_set.layout}{category}")
    return 0


def _accept_licence() -> None:
    try:
        answer = input("Accept this licence and download? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise TrainingError("the licence was not accepted (y, or --yes): nothing was downloaded")


def _check_json(path: Path | None) -> None:
    if path:
        files.check_writable(path, "--json")


def _write_json(path: Path | None, record: dict[str, object]) -> None:
    if path:
        files.write_json(path, record, "--json")


if __name__ == "__main__":
    sys.exit(main())
