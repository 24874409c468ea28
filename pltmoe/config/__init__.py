"""The run as one typed tree. See run.py for the sections, rules.py for what must fit together."""

from pltmoe.config.load import (
    config_from_dict,
    config_to_dict,
    load_config,
    model_from_dict,
    without_password,
    write_config,
)
from pltmoe.config.model import ModelConfig
from pltmoe.config.run import DataConfig, RunConfig

__all__ = [
    "DataConfig",
    "ModelConfig",
    "RunConfig",
    "config_from_dict",
    "config_to_dict",
    "load_config",
    "model_from_dict",
    "without_password",
    "write_config",
]
