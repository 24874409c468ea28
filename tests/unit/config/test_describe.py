"""Models in words."""

import pytest

from pltmoe.config import model_from_dict
from pltmoe.config.describe import describe_model, variant
from tests.configs import LOOP_ROWS, MOE

PLT2 = MOE | LOOP_ROWS["5 plt2"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (LOOP_ROWS["1 vanilla"], "vanilla"),
        (LOOP_ROWS["2 loop"], "loop-2"),
        (LOOP_ROWS["4 shared kv"], "loop-2 + CLP + shared KV"),
        (PLT2, "PLT-2"),
        (PLT2 | {"moe_loop_routing": "shared"}, "PLT-2, shared routing"),
        ({"num_loops": 3, "moe_loop_routing": "shared"}, "loop-3, shared routing"),
    ],
)
def test_a_model_has_the_name_of_its_row(changes, name):
    assert variant(model_from_dict(MOE | changes)) == name


def test_a_line_names_what_happens_between_the_loops():
    line = describe_model(model_from_dict(PLT2 | {"moe_loop_routing": "shared"}))
    assert line.startswith("2 x ") and "G-SWA" in line and line.endswith(", shared routing")
