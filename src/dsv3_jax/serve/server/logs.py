"""One JSON object a line on standard error; never the text of a prompt or an answer."""

import json
import logging
import sys
import time
from typing import Any

LOGGER = logging.getLogger("dsv3_jax.serve")


class JsonFormatter(logging.Formatter):
    """`{"time", "level", "event", ...}`; other libraries' records have their `message`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
        }
        fields = getattr(record, "fields", None)
        line |= fields if fields is not None else {"event": "log", "logger": record.name}
        if fields is None:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Writes one event. Fields that are None are left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    LOGGER.log(level, event, extra={"fields": {"event": event, **given}})


def log_to_standard_error() -> None:
    """Sends these events, and uvicorn's warnings, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, level in (("dsv3_jax.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
