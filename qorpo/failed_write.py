"""A write that failed, in whatever words a library puts it: what the system said, and what a person can do."""

import errno
import os
import re
from typing import NamedTuple


class FailedWrite(NamedTuple):
    """Why a write failed, and what a person can do."""

    reason: str
    remedy: str


def failed_write(error: BaseException) -> FailedWrite | None:
    """What is behind an error that ended a write, in whatever words a library puts it; None where it is no such error."""
    cause = _system_error(error)
    if cause is None or cause.errno == errno.ENOMEM:  # memory's lack is no disk's
        return None
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "make room"
    elif cause.errno == errno.EIO:
        remedy = "have the disk checked"
    elif cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "make it writable"
    elif cause.errno in (errno.ENOENT, errno.ENOTDIR):
        remedy = "make its folder"
    elif cause.errno == errno.EFBIG:
        remedy = "raise the limit on a file's size (ulimit -f)"
    else:
        remedy = "fix that"
    return FailedWrite(cause.strerror or str(cause), remedy)


def _system_error(error: BaseException) -> OSError | None:
    """The system's own error inside one of a library's."""
    if isinstance(error, OSError):
        return error
    if type(error).__name__ == "CheckpointException":  # of torch.distributed.checkpoint: an error a rank
        found = (_system_error(each) for each, _ in error.failures.values())  # type: ignore[attr-defined]
        return next((each for each in found if each is not None), None)
    is_of_rust = (
        type(error) is Exception or type(error).__name__ == "SafetensorError"
    )  # of tokenizers, safetensors
    if is_of_rust and (number := re.search(r"\(os error (\d+)\)", str(error))):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    # torch.save into an open file; datasets, which goes on to close what it could not write
    is_aftermath = isinstance(error, RuntimeError) or (
        isinstance(error, ValueError) and "closed file" in str(error)
    )
    if is_aftermath and error.__context__ is not None:
        return _system_error(error.__context__)
    return None
