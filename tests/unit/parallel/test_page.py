"""docs/parallelism.md says what is tested, and no more."""

from tests.distributed.layouts import TESTED, moved_table, table, trained_table
from tests.repository import REPOSITORY


def test_the_table_of_tested_layouts_is_the_list_that_is_tested():
    page = (REPOSITORY / "docs/parallelism.md").read_text()
    for tested in (table(), trained_table(), moved_table()):
        assert tested in page
    assert f"{len(TESTED)} combinations" in page
