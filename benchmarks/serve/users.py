"""The clients of the load test, for locust: each asks again as soon as it has its answer, and checks the answer.

`python -m benchmarks.serve` runs this file; the environment variable SERVE_PLAN names the file with what to ask and the
answers that single requests got.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

from locust import HttpUser, task

PLAN: dict[str, Any] = json.loads(Path(os.environ["SERVE_PLAN"]).read_text(encoding="utf-8"))


class Client(HttpUser):
    """A client that asks one question after the other, under changing patches."""

    def on_start(self) -> None:
        """Draw from a sequence of its own."""
        self.draw = random.Random(id(self))

    @task
    def ask(self) -> None:
        """Ask, watch the stream, and compare the answer with the one that a single request got."""
        asked = self.draw.choice(PLAN["asked"])
        start, first, text = time.perf_counter(), None, ""
        error: Exception | None = None
        tokens = 0
        try:
            with self.client.post(
                "/v1/completions", json={**asked["body"], "stream": True}, stream=True, catch_response=True, timeout=600
            ) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    if line.startswith(b"data: {"):
                        chunk = json.loads(line[6:])
                        if "error" in chunk:
                            raise ValueError(chunk["error"]["message"])
                        grown = "".join(choice["text"] for choice in chunk["choices"])
                        tokens += bool(grown)
                        if grown and first is None:
                            first = time.perf_counter() - start
                        text += grown
                response.success()
            if asked.get("answer") is not None and text != asked["answer"]:
                raise ValueError(f"{asked['body']['model']} answered {text!r} instead of {asked['answer']!r}")
        except Exception as failure:
            error = failure
        fire = self.environment.events.request.fire
        common = {"request_type": "answer", "response_length": tokens, "exception": error, "context": {}}
        if first is not None:
            fire(name="first token", response_time=1000 * first, **common)
        fire(name="whole answer", response_time=1000 * (time.perf_counter() - start), **common)
