"""What qorpo writes to disk: each file and folder whole or not at all, and each run owned by one process.

A file or folder is written beside its place under a name of qorpo's own, flushed, then renamed. A kill at any moment
leaves the old one, or the new one, and a leftover that `sweep` removes. `qorpo.manifest` notices damage that comes later.
"""

import contextlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from qorpo.errors import RunError
from qorpo.failed_write import failed_write

logger = logging.getLogger(__name__)

UNFINISHED = ".qorpo-unfinished"
REPLACED = ".qorpo-replaced"
LOCK = ".lock"
MOST_ATTEMPTS = 100


# --- files ---


def write_text(path: Path, text: str) -> None:
    """`write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; it is on disk when this returns."""
    unfinished = unfinished_of(path)
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        flush(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_note(path: Path) -> dict[str, Any] | None:
    """A JSON object that explains a run and decides nothing; None, with a warning, where it is missing or torn."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        reason = "it is no JSON object"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
    logger.warning("%s: can't be read (%s), and is left out", path, reason)
    return None


def flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on disk before going on."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and its renames last without it
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- folders ---


def make_folder(path: Path) -> list[Path]:
    """Make a folder and those it stands in, on disk; returns the ones that were made, from the inmost.

    Raises:
        OSError: where it can't be made; no folder is left of it then.
    """
    path = path.absolute()
    made = [each for each in (path, *path.parents) if not each.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        for each in made:
            flush(each.parent)
    except OSError:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise
    return made


@contextmanager
def whole_folder(path: Path, *, replace: bool = False, wait: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes its name `path` once the block has ended well and all is on disk.

    Args:
        path: its place. What stands there is kept until the new one is whole.
        replace: a folder that stands there is replaced; else only an empty one may.
        wait: for another process that is writing the same folder.

    Raises:
        RunError: where another process is writing it, without `wait`. OSError: where it can't be written; nothing is
            left of it then.
    """
    path = path.absolute()
    unfinished = unfinished_of(path)
    with _owned(unfinished, wait):
        try:
            yield unfinished
            mode = unfinished.stat().st_mode & 0o666
            for entry in [*unfinished.rglob("*"), unfinished]:
                if entry.is_file() and not entry.is_symlink():
                    entry.chmod(mode)  # some libraries make files that the owner alone may read
                flush(entry)
            _put(unfinished, path, replace)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _put(unfinished: Path, path: Path, replace: bool) -> None:
    if path.exists() and not replace:
        path.rmdir()  # only an empty folder goes
    replaced = _beside(path, REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    try:
        unfinished.rename(path)
        flush(path.parent)
    except OSError:
        if not unfinished.exists():
            path.rename(unfinished)  # a name that may not be on disk is none
        if replaced.exists():
            replaced.rename(path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _owned(folder: Path, wait: bool) -> Iterator[None]:
    """An empty folder that this process alone fills."""
    attempts = iter(range(MOST_ATTEMPTS))
    while True:
        try:
            make_folder(folder)
            descriptor = _lock(folder, wait)
        except (FileExistsError, FileNotFoundError):  # another process renamed or swept it in between
            if next(attempts, None) is None:
                raise
            continue
        if descriptor is None:
            raise RunError(f"{folder}: another process is writing it; wait for it to end")
        if descriptor < 0 or _is_at(folder, descriptor):
            break
        _unlock(descriptor)  # whoever had it gave it its final name meanwhile
    try:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        yield
    finally:
        _unlock(descriptor)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what a kill left in a folder, and only what qorpo made; a folder that was being replaced comes back.

    Args:
        name: of what was being written; all by default.
    """
    if not folder.is_dir():
        return
    for leftover in sorted(folder.glob(f".{name}{REPLACED}")):
        path = leftover.with_name(leftover.name[1 : -len(REPLACED)])
        if path.exists():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.rename(path)
    for leftover in folder.glob(f".{name}{UNFINISHED}"):
        if not leftover.is_dir():
            leftover.unlink(missing_ok=True)
            continue
        with contextlib.suppress(FileNotFoundError):  # swept by another process
            descriptor = _lock(leftover)
            if descriptor is not None:
                shutil.rmtree(leftover, ignore_errors=True)
                _unlock(descriptor)


def is_leftover(path: Path) -> bool:
    """Whether a file or folder is what a kill left of one that qorpo was writing."""
    return path.name.startswith(".") and path.name.endswith((UNFINISHED, REPLACED))


def remove_folder(folder: Path) -> None:
    """Remove a folder; a kill while its files go leaves no half of it that looks whole."""
    doomed = unfinished_of(folder)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def unfinished_of(path: Path) -> Path:
    """Where a file or folder is written before it takes its name."""
    return _beside(path, UNFINISHED)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


@contextmanager
def output_folder(output: Path) -> Iterator[Path]:
    """A folder to fill for a command's `--output`, as `whole_folder`.

    Raises:
        RunError: where it can't be written, such as on a full disk; nothing is left of it then.
    """
    try:
        with whole_folder(output) as folder:
            yield folder
    except BaseException as error:
        if (failed := failed_write(error)) is None:
            raise
        raise RunError(
            f"--output {output}: could not be written ({failed.reason}); nothing is left of it; {failed.remedy}, "
            "then try again"
        ) from error


# --- owners ---


class Lock:
    """One owner at a time of a folder, held through the operating system: a death releases it.

    `.lock` in the folder says who holds it, and goes with the lock. Works between processes of one machine, and of
    several where their file system shares locks. A process that has a folder may take it again.
    """

    _held: ClassVar[dict[Path, int]] = {}  # this process's, by the lock's file

    def __init__(self, folder: Path):
        self.path = folder.absolute() / LOCK
        self._made: list[Path] = []
        self._descriptor: int | None = None

    def take(self) -> None:
        """Raises RunError where another process has it, and says which. OSError: where the folder can't be made."""
        if self.path in self._held:
            return
        self._made = make_folder(self.path.parent)
        while True:
            self.path.touch()
            descriptor = _lock(self.path)
            if descriptor is None:
                raise RunError(
                    f"{self.path.parent}: in use by {self._holder()}; wait for it to end, or stop it, then try again"
                )
            if descriptor < 0 or _is_at(self.path, descriptor):
                break
            _unlock(descriptor)  # whoever had it let go of it meanwhile, and removed the file
        self._descriptor = self._held[self.path] = descriptor
        with contextlib.suppress(OSError):  # who has it is for a message alone
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            held = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
            self.path.write_text(json.dumps(held) + "\n", encoding="utf-8")

    def release(self) -> None:
        """Let go of it; nothing is left of the lock, nor of a folder that was made for it alone."""
        if self._descriptor is None or self.path not in self._held:  # a forked child's
            return
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            for folder in self._made:
                folder.rmdir()
        _unlock(self._descriptor)
        del self._held[self.path]
        self._descriptor = None

    def __enter__(self) -> "Lock":
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _holder(self) -> str:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return f"process {found['process']} on {found['host']} since {found['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"


@contextmanager
def owned_file(path: Path) -> Iterator[None]:
    """A file that is there and that this process alone writes.

    Raises:
        RunError: where another process has it.
    """
    descriptor = _lock(path)
    if descriptor is None:
        raise RunError(f"{path}: another process is writing it; wait for it to end")
    try:
        yield
    finally:
        _unlock(descriptor)


def recover(folder: Path) -> None:
    """Put a folder that is to be read in order after a kill, as `sweep` does, unless its owner is alive."""
    if folder.is_dir() and any(map(is_leftover, folder.iterdir())):
        with contextlib.suppress(OSError, RunError), Lock(folder):
            sweep(folder)


def _lock(path: Path, wait: bool = False) -> int | None:
    """A descriptor that holds the file or folder until it is closed; None where another process has it.

    `wait`: until no other has it. -1 where the system or file system has no such locks: then nothing is held.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return -1
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            os.close(descriptor)
            return None
        logger.info("%s: another process is writing it; waiting for it to end", path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        os.close(descriptor)
        return -1
    _held.add(descriptor)
    return descriptor


def _unlock(descriptor: int) -> None:
    if descriptor in _held:  # not where there are no locks, nor in a child
        _held.remove(descriptor)
        os.close(descriptor)


_held: set[int] = set()


def _let_go_in_child() -> None:
    """A forked child would hold the locks on for as long as it lives, also past its parent's death."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()
    Lock._held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
