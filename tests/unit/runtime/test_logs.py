"""One format; rank 0 alone tells the story."""

import logging
import warnings

import pytest

from pltmoe.runtime.logs import configure_logging, log_block


@pytest.fixture
def root():
    """Put logging back as pytest had it."""
    logger = logging.getLogger()
    before = logger.handlers[:], logger.level
    with warnings.catch_warnings():
        yield logger
    logger.handlers[:], logger.level = before


def test_rank_zero_informs_and_others_warn_only(root, capsys):
    configure_logging(0)
    logging.getLogger("pltmoe.x").info("hello")
    configure_logging(1)
    logging.getLogger("pltmoe.x").info("quiet")
    logging.getLogger("pltmoe.x").warning("loud")
    lines = capsys.readouterr().err.splitlines()
    assert [line[9:] for line in lines] == ["rank 0 INFO hello", "rank 1 WARNING loud"]


def test_a_block_is_one_record_of_aligned_rows(caplog):
    with caplog.at_level(logging.INFO):
        log_block(logging.getLogger("x"), "run a", [("device", "CPU"), ("layout", "EP1 x DP1")])
    assert caplog.messages == ["run a\n  device  CPU\n  layout  EP1 x DP1"]
