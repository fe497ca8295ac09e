"""What goes to the hub, by a stand-in for its client that has HfApi's signatures."""

import inspect
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.tiny import short_recipe
from huggingface_hub import HfApi

import qorpo
from qorpo.errors import DamageError, RunError
from qorpo.training.push import push


class Hub:
    """Keeps what it is given; a repository is there or not, private or not."""

    def __init__(self, there=None):
        self.repos = {"me/there": there} if there is not None else {}
        self.files = {}

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.repos.setdefault(repo_id, private)

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.repos[repo_id])

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.files[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())


@pytest.fixture(scope="module")
def run(base, pairs_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("pushed") / "run"
    recipe = short_recipe(base, pairs_file, output)
    recipe["train"]["max_steps"] = 2
    qorpo.train(recipe)
    return output


def test_the_stand_in_takes_what_the_client_takes():
    for name in ("create_repo", "repo_info", "upload_folder"):
        own, theirs = (set(inspect.signature(getattr(each, name)).parameters) for each in (Hub, HfApi))
        assert own <= theirs, name


def test_a_runs_adapter_goes_with_its_card_into_a_private_repository(run):
    hub = Hub()
    assert push(run, "me/mine", api=hub) == "https://huggingface.co/me/mine"
    assert hub.repos == {"me/mine": True}
    assert hub.files["me/mine"] == sorted(path.name for path in (run / "adapter").iterdir())
    assert {"README.md", "adapter_model.safetensors", "tokenizer.json"} <= set(hub.files["me/mine"])


def test_public_has_to_be_said(run):
    hub = Hub()
    push(run, "me/mine", public=True, api=hub)
    assert hub.repos == {"me/mine": False}
    hub = Hub(there=False)
    with pytest.raises(RunError, match="is there and public; give --public"):
        push(run, "me/there", api=hub)
    assert not hub.files
    push(run, "me/there", public=True, api=hub)
    assert hub.files


def test_a_merged_model_goes_too(run, tmp_path):
    qorpo.merge(run, tmp_path / "merged", verify=False)
    hub = Hub()
    push(tmp_path / "merged", "me/merged", api=hub)
    assert "model.safetensors" in hub.files["me/merged"]


def test_damage_is_named_and_nothing_is_pushed(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    hub = Hub()
    with pytest.raises(DamageError, match="adapter_model"):
        push(copy, "me/mine", api=hub)
    assert not hub.repos


@pytest.mark.parametrize("name", ["mine", "me/mine/", "me me/mine", "a/b/c", "../x"])
def test_names_that_are_none_are_refused(run, name):
    with pytest.raises(RunError, match="give owner/name"):
        push(run, name, api=Hub())


def test_what_the_hub_says_is_one_message(run, command, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise ConnectionError("401 Client Error.\nUnauthorized")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    code, _, err = command("push", run, "me/mine")
    assert code == 2
    assert "me/mine: could not be pushed (401 Client Error. Unauthorized); log in" in err
    code, _, err = command("push", tmp_path, "me/mine")
    assert code == 2
    assert "no run, adapter or model there" in err


def test_the_command_says_where_it_is(run, command, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("qorpo.training.push.HfApi", lambda: hub)
    code, out, err = command("push", run, "me/mine", "--public")
    assert (code, out) == (0, "pushed: https://huggingface.co/me/mine (public)\n"), err
    assert hub.repos == {"me/mine": False}
