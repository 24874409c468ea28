"""One pretraining run from a configuration: puts the parts together and ends truthfully.

    processes -> layout -> resume? -> data -> engine -> tracker -> trainer -> exit code

| end                          | exit code | tracker  | checkpoint            |
|------------------------------|-----------|----------|-----------------------|
| all steps done               | 0         | FINISHED | last step             |
| SIGTERM / SIGUSR1 / Ctrl-C   | 128 + it  | KILLED   | step that was running |
| an error the user can act on | 2         | FAILED   | none                  |
| a rank hangs                 | 75        | FAILED   | none                  |
| anything else                | 1         | FAILED   | none                  |
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pltmoe.checkpoint import folders, store
from pltmoe.checkpoint.compatible import GATE, absent_tensors, check_resume, check_weights
from pltmoe.checkpoint.find import find_checkpoint
from pltmoe.checkpoint.integrity import check_files_together
from pltmoe.checkpoint.manifest import Manifest, read_manifest
from pltmoe.checkpoint.newest import leave_later, newest_intact
from pltmoe.config import RunConfig, deepspeed, write_config
from pltmoe.data.atomic import complete_file
from pltmoe.data.datasets import batches, build_datasets
from pltmoe.data.fingerprint import fingerprints_of
from pltmoe.data.tokenizer import load_tokenizer
from pltmoe.engines import build_engine
from pltmoe.engines.base import Batch, Engine
from pltmoe.errors import CheckpointError, EngineError
from pltmoe.parallel.groups import create_groups, destroy_groups
from pltmoe.parallel.layout import Layout, layout_for
from pltmoe.runtime import cpu, devices, distributed, seeds
from pltmoe.runtime.signals import StopRequest
from pltmoe.runtime.tokenizer_files import read_tokenizer
from pltmoe.runtime.versions import commit
from pltmoe.tracking import Tracker, build_tracker
from pltmoe.tracking.jsonl import writing
from pltmoe.tracking.store import usable_uri
from pltmoe.train.callbacks import Checkpointing, LogLine, Tracking, Validation
from pltmoe.train.consumed import Consumed
from pltmoe.train.ownership import run_folder
from pltmoe.train.startup import log_startup
from pltmoe.train.throughput import Throughput
from pltmoe.train.trainer import Outcome, Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins: ``folder`` with ``manifest`` to resume, or neither."""

    fingerprints: dict[str, str]
    """Of the training sources as they are now, by path."""
    folder: Path | None = None
    manifest: Manifest | None = None

    @property
    def step(self) -> int:
        """Optimizer steps already taken."""
        return self.manifest.step if self.manifest else 0

    def consumed(self, config: RunConfig) -> Consumed:
        """What has been read of the data, and will be."""
        return Consumed.of(config, self.manifest)


def pretrain(config: RunConfig) -> int:
    """Run on all processes of the launcher and return the exit code of this one.

    Raises:
        PLTMoEError: something the user can act on.
    """
    if not (torch.cuda.is_available() or cpu.is_standing_in()):
        raise EngineError(
            "there is no GPU here: call stand_in_for_cuda() of pltmoe.runtime.cpu before "
            "pltmoe.train.pretrain is imported, or run tools/pretrain.py, which does"
        )
    processes = distributed.processes_from_environment()
    distributed.start(processes)
    layout = layout_for(config, processes.world_size)
    groups = create_groups(layout)
    try:
        with StopRequest() as stop, run_folder(config.train.output_dir):
            seeds.seed_everything(config.train.seed, config.train.deterministic)
            start = _find_start(config)
            data = Data(config, layout, layout.coordinates(processes.rank).data, start)
            engine = build_engine(config, layout, groups)
            source = _load(config, engine, layout, start)
            log_startup(config, engine.capabilities, source)
            return _train(config, engine, data, start, stop)
    finally:
        destroy_groups()


class Data:
    """The sequences of a run; iterators over this rank's share."""

    def __init__(self, config: RunConfig, layout: Layout, data_rank: int, start: Start):
        """Build or reuse the index of the training and validation sequences.

        Ranks that share sequences (stages, tensor and context parallel) have one ``data_rank``.

        A resumed run asks for the order that was drawn at its beginning: another number of
        sequences would be another order.
        """
        self._config, self._layout, self._rank = config, layout, data_rank
        train = config.train
        planned = start.manifest.train_samples if start.manifest else 0
        self.train_samples = max(planned, start.consumed(config).sequences_after(train.steps))
        valid = train.eval_steps * train.global_batch_size if train.eval_interval else 0
        tokenizer = load_tokenizer(config.data.tokenizer)
        self._train, self._valid, _ = build_datasets(
            config, tokenizer, (self.train_samples, valid, 0)
        )

    def train_from(self, consumed_samples: int) -> Iterator[Batch]:
        """Return training batches that follow ``consumed_samples`` sequences of all ranks."""
        return self._batches(self._train, consumed_samples)

    def valid(self) -> Iterator[Batch]:
        """Return the validation batches from the first one."""
        return self._batches(self._valid, 0)

    def _batches(self, dataset: Any, consumed_samples: int) -> Iterator[Batch]:
        return batches(
            dataset,
            consumed_samples=consumed_samples,
            micro_batch_size=self._layout.micro_batch_size,
            dp_rank=self._rank,
            dp_size=self._layout.data_parallel_size,
            num_workers=self._config.data.num_workers,
        )


def _find_start(config: RunConfig) -> Start:
    """Prepare the output folder and look for a checkpoint in it; the same answer on all ranks."""
    distributed.on_main(store.check_torch)
    distributed.on_main(lambda: _prepare_folder(config))
    distributed.on_main(lambda: load_tokenizer(config.data.tokenizer).sha256)  # or says why not
    fingerprints = distributed.on_main(lambda: fingerprints_of(config.data.train))
    newest = newest_intact(config.train.output_dir, config.checkpoint.verify)
    if newest is None:
        return Start(fingerprints)
    folder, manifest = newest
    distributed.on_main(lambda: check_resume(folder, manifest, config, fingerprints))
    return Start(fingerprints, folder, manifest)


def _prepare_folder(config: RunConfig) -> None:
    """Delete what a crash left half-written in the output folder; look where MLflow is to be."""
    if config.tracking.mlflow_uri is not None:
        usable_uri(config.tracking.mlflow_uri)
    folder = config.train.output_dir
    try:
        folders.clean_unfinished(folder / "checkpoints")
    except OSError as error:
        raise CheckpointError(f"train.output_dir ({folder}): {error.strerror}") from error
    newest = folders.latest_checkpoint(folder)
    if newest is not None and not config.checkpoint.resume:
        raise CheckpointError(
            f"{newest} is there already, and checkpoint.resume is false: choose another "
            "train.output_dir, or delete it"
        )


def _load(config: RunConfig, engine: Engine, layout: Layout, start: Start) -> str:
    """Fill the engine from where the run starts, and say where that is."""
    if start.folder is not None and start.manifest is not None:
        keeps_scales = config.train.keeps_fp8_scales
        same_ranks = start.manifest.world_size == layout.world_size
        same_layout = same_ranks and start.manifest.config.parallel == config.parallel
        fits = {"random": same_ranks, "fp8_scales": keeps_scales and same_layout}
        parts = [part for part in start.manifest.contains if fits.get(part, True)]
        if keeps_scales and "fp8_scales" not in parts and distributed.is_main():
            logger.warning(
                "FP8 scales begin anew: %s has none for this layout; the next step is less "
                "exact than others", start.folder,
            )  # fmt: skip
        wanted = engine.placeholders(*parts, absent=absent_tensors(start.manifest, config))
        if strange := [part for part in parts if part not in wanted]:
            raise CheckpointError(
                f"{start.folder} holds {', '.join(strange)}, with which this code does not go on: "
                f"use the code that wrote it (commit {start.manifest.commit}), or start anew from "
                f"its weights with checkpoint.load_weights={start.folder}"
            )
        engine.restore(store.load_state(start.folder, wanted), start.step)
        return f"resumed from {start.folder} (step {start.step:,})"
    if (given := config.checkpoint.load_weights) is None:
        return f"new, seed {config.train.seed}"
    folder = distributed.on_main(lambda: find_checkpoint(given))
    manifest = distributed.on_main(lambda: read_manifest(folder))
    check_weights(folder, manifest, config)
    if config.checkpoint.verify:
        check_files_together(folder, manifest)
    absent = absent_tensors(manifest, config)
    engine.restore(store.load_state(folder, engine.placeholders("model", absent=absent)), 0)
    new = "new optimizer and gates" if GATE in absent else "new optimizer"
    return f"from {folder} (step {manifest.step:,} of {manifest.config.name}); {new}"


def _train(config: RunConfig, engine: Engine, data: Data, start: Start, stop: StopRequest) -> int:
    """Train with a tracker on rank 0 that is told how it ends."""
    layout, consumed = engine.capabilities.layout, start.consumed(config)
    if (folder := start.folder) is not None:
        distributed.on_main(lambda: leave_later(folder))
    tracker = distributed.main_only(lambda: _start_tracker(config, engine, start, consumed))
    saves = Checkpointing(
        lambda step: _manifest(config, layout, data, start, consumed, step),
        start.step,
        tracker.log if tracker is not None else None,
        distributed.main_only(lambda: read_tokenizer(config.data.tokenizer)),
    )
    trainer = Trainer(
        config,
        engine,
        data.train_from,
        [
            Validation(data.valid),
            LogLine(Throughput(config, layout.world_size, _peak_flops(config))),
            Tracking(tracker),
            saves,
        ],
        stop,
        consumed,
    )
    try:
        outcome = trainer.fit()
    except BaseException as error:
        _end_save(saves, trainer.step, error)
        if tracker is not None:
            tracker.finish("FAILED")
        raise
    finished = outcome is Outcome.FINISHED
    if tracker is not None:
        tracker.finish("FINISHED" if finished else "KILLED")
    logger.info(
        "%s at step %d: %s", "finished" if finished else "stopped", trainer.step, outcome.value
    )
    return 0 if finished else 128 + trainer.stop_signal


def _end_save(saves: Checkpointing, step: int, error: BaseException) -> None:
    """Complete a save that is under way where all ranks can; it is of a step that was good."""
    if not isinstance(error, EngineError):  # may be this rank's alone: the others do not come
        saves.abandon()
        return
    try:
        saves.complete(step)
    except CheckpointError as another:
        logger.warning("%s", another)


def _start_tracker(config: RunConfig, engine: Engine, start: Start, consumed: Consumed) -> Tracker:
    """Write config.yaml, now that everything fits, and open the run."""
    capabilities, folder = engine.capabilities, config.train.output_dir
    with writing(folder / "config.yaml") as path, complete_file(path) as temporary:
        write_config(config, temporary)
    if deepspeed.FILE not in capabilities.files:  # the job before may have had another engine
        with writing(folder / deepspeed.FILE) as path:
            path.unlink(missing_ok=True)
    for name, text in capabilities.files.items():
        with writing(folder / name) as path, complete_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    tags = {
        "model": config.name,
        "commit": commit(),
        "layout": str(capabilities.layout),
        "precision": capabilities.precision,
        "device": devices.device_name(),
        **config.tracking.tags,
    }
    tracker = build_tracker(config, config.train.output_dir, consumed.tokens_after)
    tracker.start(tags, resume_step=start.step if start.manifest else None)
    for name in capabilities.files:  # config.yaml is noted at the start
        tracker.artifact(folder / name)
    return tracker


def _manifest(
    config: RunConfig, layout: Layout, data: Data, start: Start, consumed: Consumed, step: int
) -> Manifest:
    return Manifest(
        config=config,
        step=step,
        tokens=consumed.tokens_after(step),
        consumed_samples=consumed.sequences_after(step),
        train_samples=data.train_samples,
        world_size=layout.world_size,
        precision=devices.precision_name(config.train.precision),
        data=start.fingerprints,
    )


def _peak_flops(config: RunConfig) -> float | None:
    dtype = devices.parameter_dtype(config.train.precision)
    return devices.peak_flops(devices.device_name(), dtype)
