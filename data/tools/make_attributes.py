"""Writes the attributes of every bundled picture: `python data/tools/make_attributes.py toon animals`.

`attributes.json` beside a set's images holds, for each part of its drawings, the names of its shapes ("" where the part
is missing) and, for each split, the position of the picture's shape among them, in the order of the rows. It makes the
truth available without the packages that draw.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import make_sets


def attributes(name: str, counts: dict[str, int]) -> dict[str, Any]:
    """The content of attributes.json for the first `counts` pictures of each split."""
    parts = {split: [make_sets.drawing(name, split, i).parts for i in range(n)] for split, n in counts.items()}
    shapes = {
        part: sorted({each[part] for rows in parts.values() for each in rows}, key=lambda shape: (len(shape), shape))
        for part in parts["train"][0]
    }
    codes = {
        split: {part: [names.index(each[part]) for each in rows] for part, names in shapes.items()}
        for split, rows in parts.items()
    }
    return {"shapes": shapes, **codes}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=sorted(make_sets.COUNTS))
    for name in parser.parse_args(arguments).sets:
        path = make_sets.HERE / name / "attributes.json"
        path.write_text(json.dumps(attributes(name, make_sets.COUNTS[name]), separators=(",", ":")) + "\n")
        print(f"{path.relative_to(make_sets.HERE.parent)}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
