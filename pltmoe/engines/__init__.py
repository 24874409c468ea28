"""Two ways to take a step behind one protocol (base.py); ``engine:`` in a configuration picks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pltmoe.config import RunConfig
from pltmoe.errors import EngineError

if TYPE_CHECKING:
    from pltmoe.engines.base import Engine

ENGINES = {
    "megatron": ("pltmoe.engines.megatron", "MegatronEngine"),
    "deepspeed": ("pltmoe.engines.deepspeed", "DeepSpeedEngine"),
}
"""Name in a configuration -> where it is; imported only when it is asked for."""


def build_engine(config: RunConfig, layout: Any, groups: Any) -> "Engine":
    """Build the engine that ``config.engine`` names.

    Raises:
        EngineError: its package is not installed.
        ConfigError: it cannot do what the configuration asks for.
    """
    module, name = ENGINES[config.engine]
    try:
        engine = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != config.engine:
            raise
        raise EngineError(
            f"engine is {config.engine}, but {error.name} is not installed: pip install "
            f"'pltmoe[{config.engine}]', or set engine=megatron"
        ) from error
    return engine(config, layout, groups)
