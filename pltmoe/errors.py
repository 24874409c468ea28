"""Errors a user can cause. Each message says what is wrong, where, and what to do."""


class PLTMoEError(Exception):
    """Base of all errors that a user can act on; tools print one line, no traceback."""


class ConfigError(PLTMoEError):
    """The configuration is wrong: names the full path(s) and the value(s)."""


class DataError(PLTMoEError):
    """The corpus, tokenizer or an indexed dataset is unusable: names the file."""


class CheckpointError(PLTMoEError):
    """A checkpoint is missing, incomplete, or does not fit: names the folder and what differs."""


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint are missing or not what was written; an older one may do."""


class EngineError(PLTMoEError):
    """The machine or the process group cannot run what the configuration asks for."""


class RankError(EngineError):
    """One process cannot run where it was started: it tells so itself, whatever its rank."""


class ConversionError(PLTMoEError):
    """A model cannot be converted to or from Hugging Face: names the tensor or field."""
