"""DDPM with a DataModule of one's own: batches are dicts with "image", (B, C, H, W) in [-1, 1]."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from ilvr_lightning import DDPM, EMA


class Discs(pl.LightningDataModule):
    def train_dataloader(self):
        y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
        discs = [(x**2 + y**2 < radius**2).float() * 2 - 1 for radius in torch.linspace(0.2, 0.9, 64)]
        return DataLoader([{"image": disc[None]} for disc in discs], batch_size=16, shuffle=True)


model = DDPM(data={"image_size": 32, "channels": 1}, model={"channels": 16, "channel_mult": [1, 2, 4]})
pl.Trainer(max_steps=1000, callbacks=[EMA(0.99)]).fit(model, datamodule=Discs())
