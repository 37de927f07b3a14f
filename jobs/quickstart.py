"""The whole path on the built-in digits, in one process: prepare, train, promote, draw."""

from __future__ import annotations

import io
import shlex
from dataclasses import dataclass

import biggan
from biggan.commands import parse, run_command
from biggan.data.preparation import Preparation, prepare
from biggan.pixels import sheet
from biggan.promotion import class_columns
from biggan.storage import Folder, storage_root

NAME = "digits"
PICTURE = "digits.png"


@dataclass(frozen=True)
class Quickstart:
    """Prepare the built-in digits, train on them, promote the best generator, and draw a picture.

    About 3 minutes on 2 CPU cores. What is done already is not done again.

    python jobs/quickstart.py
    """

    storage: str | None = None
    """Storage root, path or URI; by default $BIGGAN_STORAGE, else ./storage."""


def main() -> None:
    """Train digits and save a picture of them."""
    root = parse(Quickstart).storage
    prepare(Preparation(source="digits", resolution=16, channels=1), NAME, root)
    result = biggan.train(biggan.presets.digits(), name="quickstart", root=root)
    promotion = biggan.promote(run="quickstart", name=NAME, root=root)
    print(f"run quickstart: {result.stop_reason}; {NAME}@best: {promotion.reason}")
    G = biggan.load_generator(f"{NAME}@best", root=root)
    images, columns = class_columns(G)
    picture = io.BytesIO()
    sheet(images, columns, min_side=64).save(picture, "PNG")
    folder = Folder(storage_root(root))
    folder.write_bytes(PICTURE, picture.getvalue())
    print(f"picture: {folder / PICTURE}")
    given = f"BIGGAN_STORAGE={shlex.quote(root)} " if root else ""
    print(f"serve it: {given}make serve")


if __name__ == "__main__":
    run_command(main)
