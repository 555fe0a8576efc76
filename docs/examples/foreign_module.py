"""ILVRGrid on a LightningModule that knows nothing of this project, around a network of diffusers."""

import lightning.pytorch as pl
import torch
from diffusers import UNet2DModel

from ilvr_lightning import Denoiser, ILVRGrid, ImageDataModule, NoiseSchedule


class MyModule(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.unet, self.schedule = UNet2DModel(32, block_out_channels=(32, 32, 64, 64)), NoiseSchedule.linear(1000)
        self.denoiser = Denoiser(lambda x, t: self.unet(x, t).sample, self.schedule, "eps")  # what ILVRGrid asks for

    def training_step(self, batch, batch_idx):
        x0, noise = batch["image"], torch.randn_like(batch["image"])
        t = torch.randint(1, 1001, (len(x0),), device=self.device)
        return (self.unet(self.schedule.q_sample(x0, t, noise), t - 1).sample - noise).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-4)


(data := ImageDataModule(path="images", image_size=32, batch_size=16)).setup()
pl.Trainer(max_steps=10_000, callbacks=[ILVRGrid(data.references(), factors=[4, 8])]).fit(MyModule(), datamodule=data)
