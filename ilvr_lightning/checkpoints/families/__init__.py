"""The families of checkpoints that load: one module each, with one object FAMILY, and an entry in FAMILIES."""

from ilvr_lightning.checkpoints.families import adm, ddim, diffusers, native
from ilvr_lightning.checkpoints.families.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family for family in (native.FAMILY, adm.FAMILY, ddim.FAMILY, diffusers.FAMILY)
}
"""Every family by its name. Loading asks them in this order which one recognises a file."""


def what_loads() -> str:
    """A list of what loads, for the help and for refusals."""
    return "; ".join(family.loads for family in FAMILIES.values())


def export_formats() -> dict[str, Family]:
    """The families that `export --to` writes, by the name of their format."""
    return {family.export_name: family for family in FAMILIES.values() if family.export_name is not None}
