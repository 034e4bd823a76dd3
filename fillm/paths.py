"""Paths as somebody types them."""

import os
from pathlib import Path

from fillm.errors import RunFolderError


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with `~` in full; of a user there is not, as it is."""
    return Path(os.path.expanduser(path))


def out_path(out: str | os.PathLike[str]) -> Path:
    """The absolute path of `--out`, links followed.

    Raises:
        RunFolderError: it is empty, has a name that is not UTF-8 (which no file of a run could record), or a link
            that leads back to itself.
    """
    told = os.fsdecode(out)
    if not told:
        raise RunFolderError("--out: is empty; name a folder")
    try:
        told.encode()
    except UnicodeEncodeError:
        raise RunFolderError(f"--out {told!r}: is not UTF-8; name another folder") from None
    try:
        return expanded(told).resolve()
    except (OSError, RuntimeError) as error:  # until python 3.13 the latter, of links in a circle
        raise RunFolderError(f"--out {told}: leads nowhere ({error}); name another folder") from None
