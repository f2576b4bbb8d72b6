"""Logs of a server: a JSON object on each line, with the id of the request that a line belongs to."""

from __future__ import annotations

import json
import logging
import time
import traceback
from contextvars import ContextVar
from typing import TextIO

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)

_LOGGERS = ("tp_runtime", "uvicorn")


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON. A record's attribute `fields`, a dictionary, adds fields to it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, object] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        request = REQUEST_ID.get()
        if request is not None:
            entry["request"] = request
        entry.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            entry["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(entry)


def log_as_json(stream: TextIO) -> None:
    """Write the logs of this project and of the HTTP server to a stream, a line of JSON each."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "tp_runtime" else logging.WARNING)
