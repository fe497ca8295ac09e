"""Where a plan runs code that is not qorpo's own: a model's, transformers' and PEFT's, on fake tensors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qorpo.errors import PlanError, QorpoError

_QORPO = str(Path(__file__).parents[1]) + os.sep


@contextmanager
def foreign_code() -> Iterator[None]:
    """What foreign code raises in here becomes a PlanError that names it; what a line of qorpo's raises stays as it is.

    Models raise errors of any kind on fake tensors (a branch on a value, an operator without shapes, a missing
    package), so the innermost line decides whose fault it is, and not the error's type.
    """
    try:
        yield
    except (QorpoError, MemoryError):
        raise
    except Exception as error:
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        file = trace.tb_frame.f_code.co_filename if trace else ""
        if file.startswith(_QORPO):
            raise
        text = (str(error).strip() or "no message").splitlines()[0]
        place = f"{Path(file).name}:{trace.tb_lineno}" if trace else "unknown"
        raise PlanError(f"{type(error).__name__} in {place}: {text}") from error
