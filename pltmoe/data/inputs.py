"""Files that a run reads: are they there before it waits for a machine?"""

from pltmoe.config.run import RunConfig
from pltmoe.data.indexed import bin_path, idx_path
from pltmoe.errors import DataError


def check_inputs(config: RunConfig) -> None:
    """Look for the tokenizer and for both files of every dataset; what is in them is not looked at.

    Raises:
        DataError: all files that are missing, with the fields that name them.
    """
    data = config.data
    named = [(data.tokenizer, "data.tokenizer")]
    for field, sources in (("data.train", data.train), ("data.valid", data.valid)):
        for source in sources:
            named += [(bin_path(source.path), field), (idx_path(source.path), field)]
    missing = [f"{path} ({field})" for path, field in named if not path.is_file()]
    if missing:
        raise DataError(
            f"{config.name}: no such file: {', '.join(missing)}. Make them with "
            "tools/train_tokenizer.py and tools/preprocess_data.py, and name them: "
            "data.tokenizer=FILE 'data.train=[{path: PREFIX}]'"
        )
