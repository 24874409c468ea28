"""MLflow's server or database: its address, patience, and errors, without importing mlflow."""

import logging
import os
import re
from pathlib import Path

from pltmoe.config import without_password
from pltmoe.errors import ConfigError

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def usable_uri(uri: str) -> str:
    """Return the URI with a SQLite path made absolute; its parent directory exists afterwards.

    Raises:
        ConfigError: not a server or database, or the directory cannot be made.
    """
    if "://***@" in uri or "=***" in uri:
        raise ConfigError(
            f"{uri}: the password is not stored; give the whole address (--uri, --mlflow-uri, "
            "tracking.mlflow_uri=...), or one without a password, and MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD in the environment"
        )
    scheme = uri.partition("://")[0].partition("+")[0]
    if "://" not in uri or scheme not in ("http", "https", "databricks", *_DATABASES):
        raise ConfigError(
            f"tracking.mlflow_uri ({without_password(uri)!r}): expected http://HOST:PORT of a "
            "server, or sqlite:////ABSOLUTE/PATH/mlflow.db (MLflow no longer tracks into plain "
            "directories)"
        )
    if scheme != "sqlite":
        return uri
    path = sqlite_path(uri)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"tracking.mlflow_uri ({uri!r}): {path.parent} cannot be made ({error.strerror}); "
            "name a path where you may write"
        ) from None
    return f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path:
    """Return the absolute path of a ``sqlite:///`` URI.

    Raises:
        ConfigError: the URI names no file.
    """
    name = re.sub(r"^sqlite(\+\w+)?:///", "", uri).partition("?")[0]
    if not name or name.startswith("sqlite:") or name == ":memory:":
        raise ConfigError(
            f"tracking.mlflow_uri ({uri!r}) names no file: write sqlite:////ABSOLUTE/PATH/mlflow.db"
        )
    return Path(name).absolute()


def artifact_location(uri: str, experiment: str) -> str | None:
    """Return where a new experiment's artefacts go; None lets a server decide.

    Without a server MLflow would put them under the current directory, wherever that is.
    """
    if not uri.startswith("sqlite"):
        return None
    folder = experiment.replace("/", "_")
    return (sqlite_path(uri).parent / "mlflow_artifacts" / folder).as_uri()


def run_link(server: str, experiment_id: str, run_id: str | None = None) -> str:
    """Return the page of an experiment or a run, in the UI's model-training view.

    MLflow 3.17 chooses between its GenAI and its model-training view by ``workflowType`` in the
    address or, without it, by what this browser used last: GenAI at first.
    """
    page = f"{server.rstrip('/')}/#/experiments/{experiment_id}"
    page += "" if run_id is None else f"/runs/{run_id}"
    return f"{page}?workflowType=machine_learning"


def quick_to_fail() -> None:
    """Set MLflow's request settings (unless the user did): short time-outs, retries are ours."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    for noisy in ("alembic", "mlflow", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def one_line(error: Exception, longest: int = 300) -> str:
    """Return an error's text on one line, without the password of the address it may quote.

    Of a long one the middle is left out: that a proxy did not answer stands at the end.
    """
    text = without_password(" ".join(str(error).split())) or type(error).__name__
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"
