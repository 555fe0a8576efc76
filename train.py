"""Train an unconditional diffusion model: python train.py CONFIG.yaml [key=value ...]."""

import sys
from collections.abc import Sequence

from ilvr_lightning.config.describe import settings_help
from ilvr_lightning.config.load import load_config, to_yaml
from ilvr_lightning.config.schema import Config
from ilvr_lightning.runtime.command import command, say


@command  # a mistake is one line and status 2; nothing up to here imports torch
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    if {"-h", "--help", "--help-all"} & set(argv):
        print(settings_help(every_key="--help-all" in argv))
        return 0
    config = load_config([a for a in argv if a not in ("--print-config", "--look")])
    if "--print-config" in argv:
        print(to_yaml(config.plain()), end="")
        return 0
    config.data.check_path()
    say("loading ...")
    if "--look" in argv:
        from ilvr_lightning.visual.look import look

        return look(config)
    train(config)
    return 0


def train(config: Config) -> None:
    """Run folder -> data -> model -> callbacks -> Trainer.fit."""
    from ilvr_lightning.checkpoints.finetune import load_weights_into
    from ilvr_lightning.data.datamodule import ImageDataModule
    from ilvr_lightning.runtime.signals import StopOnSignal
    from ilvr_lightning.runtime.trainer import make_trainer
    from ilvr_lightning.training import DDPM, EMA, Calibration, ILVRGrid, RunFolder, SaveCheckpoints, TrainingLog

    run = RunFolder.open(config)  # a new one, or the one to resume
    config = run.config  # with the precision that the run began in
    data = ImageDataModule(config.data, config.seed, cache=run.root / ".decoded")
    model = DDPM(config)  # its initial weights follow from config.seed
    load_weights_into(model.network, config.init_from, config.diffusion, config.init_remake_head, say)
    stop = StopOnSignal()  # finishes the step, saves, and ends with status 75
    trainer = make_trainer(
        config.trainer.arguments(),
        **run.parts(),
        callbacks=[
            EMA(config.ema.decay),
            TrainingLog(),
            ILVRGrid.of_config(config, data.references(config.grid.references), run.folder / "grids"),
            Calibration(config.calibration.images, config.seed),
            stop,
            SaveCheckpoints(run.folder / "checkpoints", config.checkpoint.every_n_steps),  # last: it saves the others
        ],
    )
    run.begin(trainer, data, model)
    with stop.listening(), run.explaining_errors(trainer):
        trainer.fit(model, datamodule=data, ckpt_path=run.resume_from, weights_only=True)
    say(run.summary(trainer))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
