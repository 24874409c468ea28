"""Reading a run configuration: one YAML file, dotted overrides, one clear error."""

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pltmoe.config.model import ModelConfig
from pltmoe.config.rules import MODEL_RULES, broken_rules
from pltmoe.config.run import RunConfig
from pltmoe.errors import ConfigError


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read ``path``, apply overrides such as ``model.num_loops=3``, validate everything.

    Raises:
        ConfigError: unreadable file, unknown keys, wrong types, broken rules; all of them at once.
    """
    tree = _read_yaml(Path(path))
    for override in overrides or []:
        _apply_override(tree, override)
    return config_from_dict(tree, where=str(path))


def config_from_dict(tree: dict[str, Any], where: str = "config") -> RunConfig:
    """Validate a nested dict (``RunConfig`` dumped as JSON, or a parsed YAML file)."""
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, where, RunConfig)) from None
    if broken := broken_rules(config):
        raise ConfigError(f"{where}: " + "; ".join(broken))
    return config


def model_from_dict(tree: dict[str, Any], where: str = "model") -> ModelConfig:
    """Validate a model section on its own (tests, checkpoints, conversion)."""
    try:
        model = ModelConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, where, ModelConfig)) from None
    if broken := [message for rule in MODEL_RULES for message in rule(model)]:
        raise ConfigError(f"{where}: " + "; ".join(broken))
    return model


def config_to_dict(config: BaseModel) -> dict[str, Any]:
    """Return the configuration as plain JSON types; ``config_from_dict`` reads it back.

    It is written into folders and sent to MLflow, so a password in an address is left out.
    """
    tree = config.model_dump(mode="json")
    if isinstance(config, RunConfig) and config.tracking.mlflow_uri is not None:
        tree["tracking"]["mlflow_uri"] = without_password(config.tracking.mlflow_uri)
    return tree


def without_password(uri: str) -> str:
    """Return a URI that may be shown and stored: ``http://user:secret@host`` loses the secret.

    So does ``postgresql://user:se/cret@host``, which databases take, and ``?password=secret``.
    """
    of_database = r"(?<!http)(?<!https)://[^/:@]*:[^@\s]{0,999}@"
    uri = re.sub(rf"://[^/]*@|{of_database}", "://***@", uri)
    return re.sub(r"([?&]\w*(?:password|passwd|pwd)=)[^&\s]*", r"\1***", uri, flags=re.IGNORECASE)


def write_config(config: RunConfig, path: Path) -> None:
    """Write the complete configuration as YAML, every default spelled out."""
    path.write_text(
        yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True),
        encoding="utf-8",
    )


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error: plain YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a single word", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2001-99-99 looks like a date
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping with 'model', 'data', ... at the top")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override '{override}': expected section.key=value")
    node = tree
    for depth, key in enumerate(keys[:-1]):
        child = node.get(key) if isinstance(node, dict) else None
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            at = ".".join(keys[: depth + 1])
            raise ConfigError(f"override '{override}': {at} is a value ({child!r}), not a section")
        node = child
    try:
        node[keys[-1]] = yaml.load(text, Loader=_UniqueKeys)
    except yaml.reader.ReaderError:  # a configuration is stored as text: such a path cannot be
        raise ConfigError(
            f"override {override!r}: value is not UTF-8 text without control characters; rename "
            "the file or folder that it names"
        ) from None
    except (yaml.YAMLError, ValueError):  # ValueError: 2001-99-99 looks like a date
        raise ConfigError(f"override '{override}': value is not valid YAML") from None


def _explain(error: ValidationError, where: str, root: type[BaseModel]) -> str:
    problems = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(f"{path}: unknown key (value {item['input']!r}){_suggest(item, root)}")
        elif item["type"] == "missing":
            problems.append(f"{path}: required, but missing")
        else:
            problems.append(f"{path}: {item['msg']} (got {item['input']!r})")
    return f"{where}: " + "; ".join(problems)


def _suggest(item: Any, root: type[BaseModel]) -> str:
    section: Any = root
    for part in item["loc"][:-1]:
        if isinstance(part, int):  # list[Section]: the place in the list
            section = get_args(section)[0]
            continue
        field = getattr(section, "model_fields", {}).get(part)
        section = field.annotation if field else None
    key, known = str(item["loc"][-1]), getattr(section, "model_fields", {})
    close = [
        f"{name}.{key}"
        for name, field in known.items()
        if key in getattr(field.annotation, "model_fields", {})
    ]
    close = close or difflib.get_close_matches(key, known, 1)
    return f"; did you mean {' or '.join(close)}?" if close else ""
