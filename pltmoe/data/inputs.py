"""Files that a run reads: are they there, and usable, before it waits for a machine?"""

from pltmoe.config.run import RunConfig
from pltmoe.data.indexed import bin_path, idx_path
from pltmoe.data.tokenizer import load_tokenizer
from pltmoe.data.verify import verify_vocabulary
from pltmoe.errors import DataError
from pltmoe.runtime.tokenizer_files import tokenizer_files


def check_inputs(config: RunConfig) -> None:
    """Look for the tokenizer and both files of every dataset; does the model fit the tokenizer?

    What is in the datasets is not looked at.

    Raises:
        DataError: all files that are missing, with the fields that name them; a file that is no
            tokenizer, or one with more pieces than ``model.vocab_size``.
    """
    data = config.data
    named = [(path, "data.tokenizer") for path in tokenizer_files(data.tokenizer).values()]
    for field, sources in (("data.train", data.train), ("data.valid", data.valid)):
        for source in sources:
            named += [(bin_path(source.path), field), (idx_path(source.path), field)]
    missing = [f"{path} ({field})" for path, field in named if not path.exists()]
    if missing:
        raise DataError(
            f"{config.name}: no such file: {', '.join(missing)}. Make them with "
            "tools/train_tokenizer.py and tools/preprocess_data.py, and name them: "
            "data.tokenizer=FILE 'data.train=[{path: PREFIX}]'"
        )
    verify_vocabulary(config, load_tokenizer(data.tokenizer))
