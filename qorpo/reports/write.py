"""`qorpo report`: from run folders to a file."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from qorpo.errors import RunError
from qorpo.reports.charts import png
from qorpo.reports.compare import as_dict as comparison_as_dict
from qorpo.reports.compare import comparison_page
from qorpo.reports.findings import verdict
from qorpo.reports.page import check_output, write_output
from qorpo.reports.run_files import read_run
from qorpo.reports.run_report import as_dict, run_page

ENDINGS = (".html", ".png", ".json")
NAME = "report.html"


def write_report(
    runs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> tuple[Path, list[str]]:
    """Write the report of one run, or the comparison of several, as .html, .png or .json.

    Returns:
        Where it is, and each run's verdict.

    Raises:
        RunError: where a folder holds no run, or the file can't be written.
    """
    folders = [Path(run).expanduser() for run in runs]
    if len(folders) > 1 and len({folder.resolve() for folder in folders}) < len(folders):
        raise RunError(f"{', '.join(map(str, folders))}: a run is given twice; give each once")
    path = Path(output).expanduser() if output else (folders[0] / NAME if len(folders) == 1 else Path(NAME))
    found = [read_run(folder) for folder in folders]
    check_output(path, ENDINGS)
    page = run_page(found[0]) if len(found) == 1 else comparison_page(found)
    if path.suffix == ".json":
        values = as_dict(found[0]) if len(found) == 1 else comparison_as_dict(found)
        content = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
    elif path.suffix == ".png":
        if not page.charts:
            raise RunError(f"{path}: nothing is there to draw yet; wait for the first steps, or give a .html")
        content = png(page.charts, "\n".join([page.title, page.verdict]))
    else:
        content = page.html().encode(errors="backslashreplace")
    write_output(path, content)
    if len(found) == 1:
        return path, [verdict(found[0])]
    return path, [f"{run.name}: {verdict(run)}" for run in found]
