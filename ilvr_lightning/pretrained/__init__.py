"""The former name of ilvr_lightning.checkpoints."""
