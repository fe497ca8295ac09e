"""Names and links that lead out of a model's folder: nothing elsewhere is read or copied without a word.

The hub's cache keeps a snapshot's files as links into its `blobs`; those are the model's own.
"""

import logging
from pathlib import Path
from typing import Any

from qorpo.errors import ModelError

logger = logging.getLogger(__name__)


def check_name(folder: Path, name: Any) -> None:
    """A file of weights that an index names: a link out of the folder is said.

    Raises:
        ModelError: for a name that leads out of the folder.
    """
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(
            f"{folder}: its index names {name!r}, which is not in the folder; fetch the model again"
        )
    if where := leads_out(folder / name, folder):
        logger.warning("%s: is a link out of the model's folder; read from %s", folder / name, where)


def check_copied(path: Path, folder: Path) -> None:
    """Raises ModelError for a file that would be copied into the output and is a link out of the folder."""
    if where := leads_out(path, folder):
        raise ModelError(
            f"{path}: is a link to {where}, out of the model's folder; put the file itself there, or remove the link"
        )


def leads_out(path: Path, folder: Path) -> Path | None:
    """Where a path really is, if that is neither in the folder nor among the blobs of the hub's cache."""
    real = path.resolve()
    is_blob = real.parent.name == "blobs" and real.parents[1].name.startswith("models--")
    return None if is_blob or real.is_relative_to(folder.resolve()) else real
