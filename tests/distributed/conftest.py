"""The files of a tiny run, made once."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the configuration of a tiny run; a test that starts it says train.output_dir."""
    from tests.distributed.run_files import make_files  # imports Megatron: not before the stand-in

    return make_files(tmp_path_factory.mktemp("files"))
