"""Normal images -> checkpoint. The last epoch is the model; nothing is selected on test data."""

import contextlib
import logging
import math
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from service.bundle import NAME_PATTERN
from training import checkpoint as checkpoints
from training import data, datasets, distributed, files
from training.checkpoint import Checkpoint
from training.errors import TrainingError
from training.features import TeacherFeatures, teacher_features
from training.losses import Objective
from training.model import ReverseDistillation, from_settings, load_teacher
from training.progress import Progress, progress
from training.settings import Settings

log = logging.getLogger(__name__)


def train(
    settings: Settings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: threading.Event | None = None,
) -> Checkpoint:
    """Train, or go on with, the run `settings.folder`; returns it as it was last saved.

    Raises TrainingError for bad data, weights or settings, and where another process trains this
    run. Saves and returns early when `stop` is set, by default by SIGINT or SIGTERM. Of several
    processes (training/distributed) each computes its part of every batch.
    """
    device = choose_device(settings.device)
    settings = replace(settings, precision=choose_precision(settings.precision, device))
    if settings.batch_size < distributed.count():
        raise TrainingError(
            f"--batch-size {settings.batch_size} is divided among all processes: it must be at "
            f"least their number, {distributed.count()}"
        )

    torch.manual_seed(settings.seed)
    model = from_settings(settings)
    images, run = _resume(settings) if resume else _start(settings, overwrite, model)
    settings = run.settings
    distributed.require_same("images or checkpoints", f"{run.data_fingerprint} {run.step}")
    if run.finished:
        return run
    with _alone(settings.folder):
        return _optimise(run, model, images, device, resume, stop)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises TrainingError where another process trains this run; the first of several asks."""
    if not distributed.first():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with files.claimed(folder) as free:
        if not free:
            raise TrainingError(f"{folder}: another process is training this run")
        yield


def _optimise(
    run: Checkpoint,
    model: ReverseDistillation,
    images: np.ndarray,
    device: torch.device,
    resume: bool,
    stop: threading.Event | None,
) -> Checkpoint:
    settings = run.settings
    precision: torch.dtype = getattr(torch, settings.precision)
    if resume:
        checkpoints.load_weights(run, settings.folder, model)
    model.to(device).to(memory_format=torch.channels_last).train()
    trainable = [*model.bottleneck.parameters(), *model.decoder.parameters()]
    optimizer = torch.optim.Adam(
        trainable, lr=settings.lr, betas=(0.5, 0.999), weight_decay=settings.weight_decay
    )
    if resume:
        checkpoints.load_optimizer(run, settings.folder, optimizer)
    # float16 gradients underflow without scaling; other precisions pass through unchanged.
    scaler = torch.amp.GradScaler(
        device.type,
        init_scale=run.grad_scale or 65536.0,
        enabled=precision == torch.float16,
    )
    if not resume and distributed.first():
        checkpoints.save_teacher(settings.folder, model)
        checkpoints.save(run, model, optimizer)

    objective = distributed.parallel(Objective(model, settings), model.bottleneck, model.decoder)
    began = time.monotonic() - run.seconds
    batches = steps(len(run.trained), settings, run.step)
    with (
        _features(model, images, run, device, precision) as features,
        contextlib.nullcontext(stop) if stop else stop_on_signal() as stop,
        _progress(run) as bar,
    ):
        for indices in batches:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run)
            part = distributed.part(len(indices))
            pixels = torch.from_numpy(images[indices]).to(device)
            rng = np.random.default_rng([settings.seed, run.step, 1])
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                loss = objective(pixels, features[indices[part]], rng, part)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            _record(run, loss.item())
            run.seconds = time.monotonic() - began
            run.grad_scale = scaler.get_scale() if scaler.is_enabled() else None
            bar.update(len(indices))
            bar.set_postfix(epoch=f"{run.epoch}/{settings.epochs}", loss=f"{loss.item():.4f}")
            epoch_ended = run.step % run.steps_per_epoch == 0
            due = epoch_ended and (run.epoch % settings.save_every == 0 or run.finished)
            stopping = distributed.agreed(stop.is_set())
            if (due or stopping) and distributed.first():
                checkpoints.save(run, model, optimizer)
            if stopping:
                break
    return run


def _features(
    model: ReverseDistillation,
    images: np.ndarray,
    run: Checkpoint,
    device: torch.device,
    precision: torch.dtype,
) -> AbstractContextManager[TeacherFeatures]:
    settings = run.settings
    return teacher_features(
        model.teacher,
        images,
        device,
        precision,
        place=settings.feature_cache,
        memory_gb=settings.feature_memory_gb,
        folder=settings.folder,
    )


def batch_slices(count: int, batch_size: int) -> list[slice]:
    """An epoch's batches; a last one of a single image is left out: batch norm needs company."""
    slices = [slice(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    return slices[:-1] if count % batch_size == 1 and len(slices) > 1 else slices


def steps(count: int, settings: Settings, first: int) -> Iterator[np.ndarray]:
    """Image indices of every batch from step `first` on: a function of seed and step alone.

    That is what lets a run that was killed go on to the weights of one that was not.
    """
    slices = batch_slices(count, settings.batch_size)
    for epoch in range(first // len(slices), settings.epochs):
        order = np.random.default_rng([settings.seed, epoch]).permutation(count)
        done = first - epoch * len(slices) if epoch == first // len(slices) else 0
        for batch in slices[done:]:
            yield order[batch]


def learning_rate(run: Checkpoint) -> float:
    """Of the step to come: a function of the step alone, so that a resumed run has the same."""
    if run.settings.schedule == "constant":
        return run.settings.lr
    done = run.step / (run.settings.epochs * run.steps_per_epoch)
    return run.settings.lr * (1 + math.cos(math.pi * done)) / 2


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device cuda was asked for, but torch finds no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return distributed.cuda_device() if name == "cuda" else torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """float32 on the CPU, where runs are reproducible; bfloat16 or float16 on CUDA."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def _start(
    settings: Settings, overwrite: bool, model: ReverseDistillation
) -> tuple[np.ndarray, Checkpoint]:
    """Pixels of the images to train on, and a run at step 0 whose teacher is in `model`."""
    if (settings.folder / "checkpoint.json").exists() and not overwrite:
        raise TrainingError(
            f"{settings.folder} holds a run already: --resume goes on with it, "
            "--overwrite starts anew"
        )
    if not re.fullmatch(NAME_PATTERN, settings.name):
        raise TrainingError(f"--name {settings.name}: must match {NAME_PATTERN}, as export needs")
    root = Path(settings.data)
    category = datasets.read(root, settings.layout, settings.category)
    paths, groups = category.to_train_on(), category.groups(settings.group)
    # Before the images, which take minutes to read: a wrong file should be told at once.
    teacher = load_teacher(
        model.teacher, settings.backbone, settings.teacher_weights, settings.teacher_licence
    )
    loaded = data.load(paths, settings.image_size, strict=settings.strict, what="normal images")
    names = [str(path.relative_to(root)) for path in loaded.paths]
    # A copy of a trained image among the held-out ones would break the promised rate.
    originals = loaded.originals()
    kept = sorted(set(originals))
    if len(kept) < len(names):
        log.warning("left out %d copies of other pictures", len(names) - len(kept))
    together = [groups[loaded.paths[index]] for index in kept] if groups else None
    trained, held_out = data.hold_out(len(kept), settings.seed, together)
    originals_trained = {kept[i] for i in trained}
    run = Checkpoint(
        settings=replace(
            settings,
            layout=category.layout,
            category=category.name,
            embedding_planes=model.embedding_planes,
        ),
        teacher=teacher,
        trained={names[kept[i]]: loaded.digests[kept[i]] for i in trained},
        held_out={names[kept[i]]: loaded.digests[kept[i]] for i in held_out},
        copies={
            names[i]: loaded.digests[i]
            for i, original in enumerate(originals)
            if i != original and original in originals_trained
        },
        data_fingerprint=data.fingerprint(loaded.digests[index] for index in kept),
        steps_per_epoch=len(batch_slices(len(trained), settings.batch_size)),
    )
    log.info(
        "%s, layout %s: training on %d normal images, %d held out%s",
        root,
        category.layout,
        len(trained),
        len(held_out),
        f", of {len(set(together))} groups" if together else "",
    )
    if len(held_out) < 19:
        log.warning(
            "%d held-out images can't promise a false-positive rate below %.2g: 19 (of 100) are "
            "needed for 5 %%, 99 (of 660) for 1 %%",
            *(len(held_out), 1 / (len(held_out) + 1)),
        )
    return loaded.pixels[[kept[i] for i in trained]], run


def _resume(settings: Settings) -> tuple[np.ndarray, Checkpoint]:
    """The same as `_start` for a saved run, its images checked against the record."""
    run = checkpoints.read(settings.folder)
    run.settings = replace(
        settings,
        teacher_weights=run.settings.teacher_weights,
        layout=run.settings.layout,
        category=run.settings.category,
        precision=run.settings.precision,
        embedding_planes=run.settings.embedding_planes,
    )
    root = Path(settings.data)
    paths = [root / name for name in run.trained]
    if missing := next((path for path in paths if not path.is_file()), None):
        raise TrainingError(f"{missing}: no such file, but the run was trained on it")
    loaded = data.load(paths, settings.image_size, strict=True, what="normal images")
    changed = [
        name
        for name, digest in zip(run.trained, loaded.digests, strict=True)
        if run.trained[name] != digest
    ]
    if changed:
        raise TrainingError(f"images changed since the run began: {', '.join(changed[:5])}")
    return loaded.pixels, run


def _record(run: Checkpoint, loss: float) -> None:
    if not np.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss} at step {run.step}: lower --lr ({run.settings.lr})"
        )
    run.step += 1
    run.loss_sum += loss
    if run.step % run.steps_per_epoch == 0:
        run.losses.append(run.loss_sum / run.steps_per_epoch)
        run.loss_sum = 0.0


def _progress(run: Checkpoint) -> Progress:
    batches = batch_slices(len(run.trained), run.settings.batch_size)
    per_epoch = sum(batch.stop - batch.start for batch in batches)
    done = run.step * per_epoch // run.steps_per_epoch
    return progress(
        total=run.settings.epochs * per_epoch, initial=done, description=run.settings.name
    )


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Sets the event on SIGINT or SIGTERM, so that a step ends before the run is saved."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread alone
        return
    caught = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in caught}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
