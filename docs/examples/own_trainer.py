"""Every part in a Trainer of one's own: images in a folder, an average of the weights, a grid at each epoch's end."""

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from ilvr_lightning import DDPM, EMA, ILVRGrid, ImageDataModule, TrainingLog

data = ImageDataModule(path="images", image_size=32, batch_size=16)
data.setup()
model = DDPM(data={"image_size": 32, "batch_size": 16}, model={"channels": 32, "channel_mult": [1, 2, 2]})
grid = ILVRGrid(data.references(), factors=[4, 8], folder="grids")
trainer = pl.Trainer(max_steps=10_000, callbacks=[EMA(0.999), TrainingLog(), grid], logger=TensorBoardLogger("logs"))
trainer.fit(model, datamodule=data)
