"""What happens around a step, one concern per file. The trainer calls them in the given order."""

from pltmoe.train.callbacks.base import Callback
from pltmoe.train.callbacks.checkpointing import Checkpointing
from pltmoe.train.callbacks.log_line import LogLine
from pltmoe.train.callbacks.tracking import Tracking
from pltmoe.train.callbacks.validation import Validation

__all__ = ["Callback", "Checkpointing", "LogLine", "Tracking", "Validation"]
