"""The whole path on the built-in digits, in one process: prepare, train, promote, draw."""

from __future__ import annotations

import io

import biggan
from biggan.commands import run_command
from biggan.data.preparation import Preparation, prepare
from biggan.pixels import sheet
from biggan.promotion import class_columns
from biggan.storage import Folder, storage_root

NAME = "digits"
PICTURE = "digits.png"


def main() -> None:
    """Train digits and save a picture of them; what is done already is not done again."""
    prepare(Preparation(source="digits", resolution=16, channels=1), NAME)
    result = biggan.train(biggan.presets.digits(), name="quickstart")
    promotion = biggan.promote(run="quickstart", name=NAME)
    print(f"run quickstart: {result.stop_reason}; {NAME}@best: {promotion.reason}")
    G = biggan.load_generator(f"{NAME}@best")
    images, columns = class_columns(G)
    picture = io.BytesIO()
    sheet(images, columns, min_side=64).save(picture, "PNG")
    root = Folder(storage_root())
    root.write_bytes(PICTURE, picture.getvalue())
    print(f"picture: {root / PICTURE}")
    print("serve it: make serve")


if __name__ == "__main__":
    run_command(main)
