"""What counts as running out of memory: of a card, or of the host. Each library says it in words of its own.

Imports nothing, so that every part of qorpo can ask.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from qorpo.errors import QorpoError, RunError

_SAYS_SO = re.compile(
    "|".join(
        (
            r"\bout of memory\b",  # torch's allocator, CUDA's and HIP's runtime and driver, NCCL, Triton, bitsandbytes, MPS
            r"ERROR_OUT_OF_MEMORY\b",  # CUDA_ERROR_OUT_OF_MEMORY
            r"\bcudaErrorMemoryAllocation\b",
            r"\bCU[A-Z]+_(STATUS_)?ALLOC_FAILED\b",  # CUBLAS_STATUS_…, CUDNN_STATUS_…, CUSOLVER_STATUS_…, CUFFT_…
            r"\bCUDNN_STATUS_\w*(DEVICE|HOST)_ALLOCATION_FAILED\b",
            r"\bDefaultCPUAllocator: not enough memory\b",  # on Windows; elsewhere by the next
            r"\b(can't|cannot|unable to|failed to) allocate memory\b",  # ENOMEM's words among them
            r"\bstd::bad_alloc\b",
        )
    ),
    re.IGNORECASE,
)

# Faults of a program's own: what was being handled when they were raised is no excuse for them.
_FAULTS = (TypeError, AttributeError, NameError, AssertionError, LookupError)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from or wraps, says that a card's or the host's memory ran out.

    Triton's `OutOfResources` (a kernel asks for more shared memory than a multiprocessor has) is none: it fails alike
    however much memory is free. Neither is a QorpoError, which has its advice already, nor an interruption.
    """
    return _shortage(error, set()) is not None


def shortage_of(error: BaseException) -> str:
    """The line in which an error says that memory ran out."""
    found = _shortage(error, set())
    lines = str(found if found is not None else error).strip().splitlines()
    return next(
        (line.strip() for line in lines if _SAYS_SO.search(line)), lines[0] if lines else "MemoryError"
    )


def _shortage(error: BaseException | None, seen: set[int]) -> BaseException | None:
    if error is None or id(error) in seen or isinstance(error, QorpoError | KeyboardInterrupt | SystemExit):
        return None
    seen.add(id(error))
    if _is_one(error):
        return error
    # An ExceptionGroup's, and those of torch.distributed.checkpoint's CheckpointException: {rank: (error, traceback)}.
    wrapped = list(getattr(error, "exceptions", ()))
    wrapped += [failure[0] for failure in getattr(error, "failures", {}).values()]
    if not isinstance(error, _FAULTS):
        wrapped += [error.__cause__, None if error.__suppress_context__ else error.__context__]
    return next((found for each in wrapped if (found := _shortage(each, seen)) is not None), None)


def _is_one(error: BaseException) -> bool:
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    ):  # torch's, without importing it
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    # The messages of a program's faults, and of bad values, quote what they were given.
    return not isinstance(error, (*_FAULTS, ValueError)) and _SAYS_SO.search(str(error)) is not None


@contextmanager
def advised(advice: str) -> Iterator[None]:
    """Ends the block with this advice where memory runs out in it.

    Raises:
        RunError: then, in place of the library's error.
    """
    try:
        yield
    except BaseException as error:  # CheckpointException is no Exception
        if not is_out_of_memory(error):
            raise
        raise RunError(f"out of memory ({shortage_of(error)}); {advice}") from error
