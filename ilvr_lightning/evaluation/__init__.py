"""Measures of samples as papers report them: python -m ilvr_lightning.evaluation."""
