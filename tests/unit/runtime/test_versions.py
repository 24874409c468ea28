"""What made a run."""

import re
import subprocess

import torch

import pltmoe
from pltmoe.runtime import versions


def test_versions_name_what_is_installed():
    found = versions.versions()
    assert found["torch"] == torch.__version__.split("+")[0]
    assert found["pltmoe"] == pltmoe.__version__
    assert "python" in found and "megatron-core" in found


def test_commit_is_that_of_this_tree_and_says_when_it_is_changed(tmp_path, monkeypatch):
    package = tmp_path / "pltmoe"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(pltmoe, "__file__", str(package / "__init__.py"))
    assert versions.commit() == "unknown"
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "x"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert len(versions.commit()) == 12
    with monkeypatch.context() as patch:
        patch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
        assert len(versions.commit()) == 12, "a repository of another user, as in a container"
    dirty = set()
    for change in (b"changed", b"changed again", b"in Latin-1: \xe9"):
        (package / "__init__.py").write_bytes(change)
        dirty.add(versions.commit())
    assert len(dirty) == 3, "measured with other sources"
    assert all(re.fullmatch("[0-9a-f]{12}-dirty-[0-9a-f]{6}", commit) for commit in dirty)
    (tmp_path / ".git/index").write_bytes(b"damaged")
    assert versions.commit().endswith("-unknown"), "not known to be unchanged"
    monkeypatch.setenv("PLTMOE_COMMIT", "abc")
    assert versions.commit() == "abc", "sources that travelled without their repository"
