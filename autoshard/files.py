"""Files that are written whole or not at all."""

import os
import tempfile
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever reads it meanwhile sees the old one or the new one.

    Args:
        path: the file, in a folder that is there.
        text: what it holds from now on, in UTF-8.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as beside:
        written = Path(beside) / path.name
        written.write_text(text, encoding="utf-8", newline="\n")
        os.replace(written, path)
