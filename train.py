"""Train an unconditional diffusion model: python train.py [CONFIG.yaml] [key=value ...]."""

import functools
import sys
from collections.abc import Sequence
from dataclasses import replace

from ilvr_lightning.config.load import describe, load_config, to_yaml
from ilvr_lightning.config.schema import Config
from ilvr_lightning.runtime.command import (
    command,
    launched_by_lightning,
    process_rank,
    report_errors_on_every_rank,
    say,
)

USAGE = """usage: python train.py [CONFIG.yaml] [key=value ...] [--print-config] [--help]

Trains on configs/toon32.yaml unless a recipe is named. Every key, its default and its meaning:
"""


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        for key, kind, meaning, default in describe():
            print(f"  {key}={default}\n      {meaning}{f' ({kind})' if kind else ''}")
        return 0
    config, name = load_config([a for a in argv if a != "--print-config"], default="configs/toon32.yaml")
    if "--print-config" in argv:
        print(to_yaml(config.plain()), end="")
        return 0
    train(config, name)
    return 0


def train(config: Config, name: str) -> None:
    """Config -> module, data, callbacks -> Trainer.fit."""
    print("loading ...", flush=True)
    import lightning.pytorch as pl

    from ilvr_lightning.atomic import check_writable, remove_partials, write_atomically
    from ilvr_lightning.checkpoints.finetune import load_weights_into
    from ilvr_lightning.checkpoints.load import read_run_config
    from ilvr_lightning.data.datamodule import ImageDataModule
    from ilvr_lightning.runtime.hardware import should_compile, use_channels_last
    from ilvr_lightning.runtime.launch import RankWatch
    from ilvr_lightning.runtime.signals import StopOnSignal
    from ilvr_lightning.runtime.trainer import blamed_on_settings, quiet, trainer_from
    from ilvr_lightning.training.calibration import Calibration
    from ilvr_lightning.training.checkpointing import AtomicCheckpointIO, SaveCheckpoints
    from ilvr_lightning.training.ema import EMA
    from ilvr_lightning.training.events import Events, mend_events
    from ilvr_lightning.training.grid import ILVRGrid
    from ilvr_lightning.training.log import TrainingLog
    from ilvr_lightning.training.memory import with_batch_size, within_memory
    from ilvr_lightning.training.module import DDPM
    from ilvr_lightning.training.run_folder import (
        forget_agreements,
        resolve_precision,
        resume_checkpoint,
        root_of,
        run_folder,
    )

    quiet()
    if launched_by_lightning() and process_rank():
        report_errors_on_every_rank()  # what the first process has passed may still go wrong here
    resume = resume_checkpoint(config, name)
    before, step = (None, None) if resume is None else read_run_config(resume)
    if resume is not None:
        say(f"resume       {resume}, step {step}")
    config = resolve_precision(config, before)
    folder = run_folder(config, name, resume)
    check_writable(root_of(config), "trainer.default_root_dir")
    data = ImageDataModule(config.data, config.seed, cache=root_of(config) / ".decoded")
    data.setup()
    config = with_batch_size(config, before, data)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    module = DDPM(config)
    if resume is not None:
        load_weights_into(module.network, resume, say=lambda line: None)  # a check that its network is this one
    elif config.init_from is not None:
        load_weights_into(module.network, config.init_from, config.diffusion, config.init_remake_head, say)
    grid, on_full_disk, stop = config.grid, config.checkpoint.on_full_disk, StopOnSignal()
    trainer = trainer_from(
        config.trainer,
        logger=Events(folder, step, on_full_disk),
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            RankWatch(),
            EMA(config.ema.decay),
            TrainingLog(),
            ILVRGrid(
                data.references(grid.references),
                config.grid_plan,
                factors=grid.factors,
                samples=grid.samples,
                folder=folder / "grids",
                seed=config.seed,
                every_n_epochs=grid.every_n_epochs,
                every_n_steps=grid.every_n_steps,
                batch_size=config.data.global_batch,
            ),
            Calibration(config.calibration.images, config.seed),
            stop,
            SaveCheckpoints(folder / "checkpoints", config.checkpoint.every_n_steps, on_full_disk),
        ],
    )
    data.check_batch_size(trainer)
    check_writable(folder / "checkpoints", "trainer.default_root_dir")
    device = trainer.strategy.root_device
    trainer.precision_plugin.convert_module(module)  # before a checkpoint is read into it, and the average is copied
    use_channels_last(module.network, device)
    if should_compile(config.compile, device):
        module.compile_training()
    if trainer.is_global_zero:
        recipe = to_yaml(replace(config, resume=None, init_from=None).plain())
        write_atomically(folder / "config.yaml", lambda partial: partial.write_text(recipe), durable=True)
        remove_partials(folder)
        mend_events(folder)
        print(
            f"data         {config.data.path}: {data.counts}, {config.data.size[0]}x{config.data.size[1]} px\n"
            f"network      {sum(p.numel() for p in module.network.parameters()):,} parameters\n"
            f"devices      {trainer.world_size} ({device.type}), global batch {config.data.batch_size}, "
            f"precision {trainer.precision}\n"
            f"run          {folder}\n"
            f"watch        tensorboard --logdir {folder} --samples_per_plugin images=1000",
            flush=True,
        )
    report_errors_on_every_rank()
    try:
        with stop.listening():
            fit = functools.partial(trainer.fit, module, datamodule=data, ckpt_path=resume, weights_only=True)
            within_memory(fit, module, trainer)
    except Exception as error:
        if trainer.global_step > (step or 0):
            say("")  # ends the progress bar's line
        raise blamed_on_settings(error, resume if trainer.global_step <= (step or 0) else None) from None
    finally:
        forget_agreements()
    if trainer.is_global_zero:
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.global_step == step:
            how = ", nothing was left to do"
        else:
            how = ", not validated" if loss is None else f", val/loss {float(loss):.4f}"
        print(
            f"done         step {trainer.global_step}{how}\n"
            f"sample       python sample.py --ref PICTURE --ckpt {folder / 'checkpoints' / 'last.ckpt'}"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
