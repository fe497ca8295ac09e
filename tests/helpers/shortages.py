"""Errors by which libraries say that memory ran out, in their own words, and such as only sound like it."""

import errno
import subprocess
from collections.abc import Callable

import torch
from torch.distributed.checkpoint.api import CheckpointException

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.12 GiB is free. "
    "Process 1 has 22.51 GiB memory in use."
)


def raised(
    error: BaseException, *, of: BaseException | None = None, while_handling: BaseException | None = None
):
    """The error as `raise error from of` leaves it, or as one raised in an except clause."""
    try:
        if while_handling is None:
            raise error from of
        try:
            raise while_handling
        except BaseException:
            raise error  # noqa: B904
    except BaseException as caught:
        return caught


class InductorError(RuntimeError):
    """As torch's compiler raises it."""


class GroupError(Exception):
    """As ExceptionGroup, which Python 3.10 lacks."""

    exceptions = (OSError("gone"), MemoryError())


class SafetensorError(Exception):
    """As safetensors raises it."""


SHORTAGES: dict[str, Callable[[], BaseException]] = {
    "torch's allocator": lambda: torch.OutOfMemoryError(CUDA),
    "torch's allocator without a word": lambda: torch.OutOfMemoryError(),
    "CUDA's runtime": lambda: torch.AcceleratorError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
        "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
    ),
    "CUDA's driver": lambda: RuntimeError("CUDA driver error: out of memory"),
    "CUDA's driver by its code": lambda: RuntimeError("cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN 8": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cuSOLVER": lambda: RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    "Triton": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
    "a kernel's compilation": lambda: InductorError("OutOfMemoryError: " + CUDA),
    "a compiler's process": lambda: InductorError("g++: fatal error: Cannot allocate memory\ncompilation terminated."),
    "NCCL": lambda: RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error\nCuda failure 2 'out of memory'"),
    "HIP": lambda: torch.OutOfMemoryError("HIP out of memory. Tried to allocate 64.00 MiB."),
    "bitsandbytes": lambda: RuntimeError("Error out of memory at line 123 in file /src/csrc/ops.cu"),
    "host memory, by torch": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "34359738368 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "host memory, by torch on Windows": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."
    ),
    "host memory, by Python": lambda: MemoryError(),
    "host memory, by numpy": lambda: MemoryError("Unable to allocate 128. GiB for an array with shape (17179869184,)"),
    "host memory, by the system": lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
    "host memory, by mmap": lambda: RuntimeError("unable to mmap 1024 bytes from file <w.safetensors>: Cannot allocate memory (12)"),
    "host memory, by safetensors": lambda: SafetensorError("Error while serializing: Cannot allocate memory (os error 12)"),
    "host memory, by C++": lambda: RuntimeError("std::bad_alloc"),
    "one that it was raised from": lambda: raised(ValueError("could not be read"), of=torch.OutOfMemoryError(CUDA)),
    "one that was being handled": lambda: raised(RuntimeError("failed"), while_handling=MemoryError()),
    "one of a group": lambda: GroupError(),
    "one of a sharded checkpoint's ranks": lambda: CheckpointException(
        "CheckpointException", {1: (torch.OutOfMemoryError(CUDA), None)}  # type: ignore[dict-item]
    ),
}  # fmt: skip

OTHERS: dict[str, Callable[[], BaseException]] = {
    "shared memory of a kernel": lambda: RuntimeError(
        "out of resource: shared memory, Required: 147456, Hardware limit: 101376. Reducing block sizes or `num_stages` may help."
    ),
    "shapes": lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x5 and 6x7)"),
    "an illegal access": lambda: torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "cuBLAS's other errors": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    "a full disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "a value that quotes it": lambda: ValueError("unknown key 'out of memory'"),
    "a process's failure": lambda: subprocess.CalledProcessError(1, "g++"),
    "a fault while one was handled": lambda: raised(TypeError("'NoneType'"), while_handling=torch.OutOfMemoryError(CUDA)),
    "an interruption while one was handled": lambda: raised(KeyboardInterrupt(), while_handling=MemoryError()),
    "nothing": lambda: None,  # type: ignore[return-value, dict-item]
}  # fmt: skip
