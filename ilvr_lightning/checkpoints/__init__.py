"""Checkpoints: found, read, described, loaded and exported. Each family of files is a module of families/."""
