"""Checkpoints in: recognised by content, loaded strictly."""
