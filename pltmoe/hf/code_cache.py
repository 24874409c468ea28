"""Where transformers copies the code of an exported model, and imports it from."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pltmoe.errors import ConversionError


def check_code_cache(fields: Mapping[str, Any]) -> None:
    """Look whether a model with these fields of ``config.json`` can be loaded, before the work.

    Raises:
        ConversionError: it brings its code, and the user's cache cannot be written.
    """
    if "auto_map" not in fields:
        return
    from transformers.utils import HF_MODULES_CACHE  # takes seconds

    try:
        Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=HF_MODULES_CACHE):
            return
    except OSError as error:
        raise ConversionError(
            f"{HF_MODULES_CACHE}: cannot be written ({error.strerror}); transformers copies the "
            "code of a model there: set HF_HOME to a folder that you may write"
        ) from error
