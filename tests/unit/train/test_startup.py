"""What the start-up block says before anything has run."""

from pathlib import Path

from pltmoe.engines.base import Capabilities
from pltmoe.parallel.layout import layout_for
from pltmoe.train.startup import startup_rows
from tests.configs import run_config
from tests.unit.data.datasets import counting_documents, write_dataset


def said_of_data(folder: Path, weights: list[float]) -> list[str]:
    """Return the rows about data sources of these weights: 2,040 tokens each."""
    train = [
        {"path": str(write_dataset(folder / f"part{i}", counting_documents())), "weight": weight}
        for i, weight in enumerate(weights)
    ]
    data = {"tokenizer": "t.model", "train": train, "sequence_length": 16, "split": [1, 0, 0]}
    config = run_config(data=data, train={"output_dir": "r", "steps": 10, "global_batch_size": 2})
    rows = startup_rows(config, Capabilities(layout_for(config, 1), "fp32", {}), "new")
    return [text.removeprefix(f"{folder}/") for name, text in rows if name == "data"]


def test_says_how_often_the_text_of_each_source_is_read(tmp_path: Path) -> None:
    few = said_of_data(tmp_path, [1, 3])
    assert few == [
        "part0: 25.0% of the sequences, 0.0392 times through 2,040 tokens",
        "part1: 75.0% of the sequences, 0.118 times through 2,040 tokens",
    ]


def test_of_many_sources_those_that_are_repeated_most(tmp_path: Path) -> None:
    many = said_of_data(tmp_path, [*range(1, 19), 29])
    assert [text.split(":")[0] for text in many[:3]] == ["part18", "part17", "part16"]
    assert len(many) == 17
    assert many[-1] == "3 more, each at most 0.00235 times through its text"
