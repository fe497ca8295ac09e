"""A run's result, an adapter or a merged model taken to the hub, whole and with its card; private unless asked otherwise."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from qorpo.errors import RunError
from qorpo.manifest import MANIFEST, check_folder
from qorpo.recipe import load_recipe


def push(path: str | os.PathLike[str], repo: str, *, public: bool = False, api: Any = None) -> str:
    """Upload a folder's files as one commit; returns the repository's address.

    Args:
        path: a run's folder, of which the adapter (the model of full tuning) is taken; or an adapter's or model's own.
        repo: `owner/name`; made where it is not there.
        public: let everybody read a repository that is made for it.
        api: in place of huggingface_hub's `HfApi()`.

    Raises:
        RunError: where there is nothing to push, the name is none, the repository is public and `public` was not said,
            or the hub refuses. DamageError: where a file is not as it was written.
    """
    folder = result_of(Path(path).expanduser())
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise RunError(f"{repo!r}: no name of a repository ({error}); give owner/name") from error
    check_folder(
        folder, f"make it again, or remove {MANIFEST} if you changed it yourself", for_people=["README.md"]
    )
    api = api or HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo).private:
            raise RunError(
                f"{repo}: is there and public; give --public if all may read what you push, or another name"
            )
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Upload by qorpo")
    except RunError:
        raise
    except Exception as error:  # of whichever HTTP library is underneath
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RunError(
            f"{repo}: could not be pushed ({reason}); log in by `hf auth login`, then try again"
        ) from error
    return f"https://huggingface.co/{repo}"


def result_of(folder: Path) -> Path:
    """The folder of the files that others open; raises RunError where there is none."""
    if (folder / "recipe.yaml").is_file():
        name = "model" if load_recipe(folder / "recipe.yaml").tuning == "full" else "adapter"
        if not (folder / name).is_dir():
            raise RunError(f"{folder}: has no {name} yet; finish the run by --resume")
        return folder / name
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise RunError(f"{folder}: no run, adapter or model there; give a run's folder, or a merged model's")
    return folder
