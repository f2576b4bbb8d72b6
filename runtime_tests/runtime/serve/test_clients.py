"""Clients that hang up, stall or come while the server ends: rows become free, and the process leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime_tests.runtime.pace import Pace
from tp_runtime.model import PatchedModel
from tp_runtime.serve import ServerSettings

from .conftest import CHAT, SECONDS, Running, running

LONG = {**CHAT, "max_tokens": 400, "min_tokens": 400}


def raw(server: Running, body: dict[str, Any], receives: int | None = None) -> socket.socket:
    """Send a request on a socket that buffers `receives` bytes of the answer, and do not read."""
    content = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    made = socket.socket()
    if receives is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
    made.connect((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    made.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return made


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_row(served: Running, stream: bool) -> None:
    connection = raw(served, {**LONG, "stream": stream, "n": 2})
    served.wait(lambda: served.worker.running == 2)
    tickets = list(served.worker._tickets)
    connection.close()
    served.wait(lambda: served.worker.running == 0)
    assert [ticket.completion.finish_reason for ticket in tickets] == ["closed", "closed"]


@pytest.mark.usefixtures("slow")
def test_a_client_that_hangs_up_while_it_waits_leaves_the_queue(model: PatchedModel) -> None:
    with running(model, ServerSettings(port=0, rows=1, queue=1)) as server:
        first = raw(server, LONG)
        server.wait(lambda: server.worker.running == 1)
        second = raw(server, LONG)
        server.wait(lambda: server.worker.waiting == 1)
        second.close()
        server.wait(lambda: server.worker.waiting == 0)
        assert server.worker.running == 1
        first.close()
        server.wait(lambda: server.worker.running == 0)


def test_a_client_that_takes_nothing_is_given_up(model: PatchedModel, caplog: pytest.LogCaptureFixture) -> None:
    def statuses() -> list[int]:
        return [record.fields["status"] for record in caplog.records if record.message == "request"]  # type: ignore[attr-defined]

    caplog.set_level("INFO", "tp_runtime.serve")
    with running(model, ServerSettings(port=0, stall=0.3)) as server:
        for listening in server.server.servers[0].sockets:  # connections inherit it, and the answer is larger
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = {**LONG, "stream": True, "logprobs": True, "top_logprobs": 20, "n": 4}
        with raw(server, body, receives=4096):
            server.wait(statuses)
            server.wait(lambda: server.worker.running == 0 and not server.server.server_state.tasks)
        with server.http() as http:
            assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert statuses() == [499, 200]


def test_a_server_that_drains_ends_what_runs_and_answers_503(model: PatchedModel, pace: Pace) -> None:
    pace.allow(1)
    with running(model, ServerSettings(port=0)) as server, server.http() as http, server.http() as other:
        body = {**CHAT, "max_tokens": 20, "min_tokens": 20, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.leave()
            server.wait(lambda: not server.worker.accepting)
            refused = other.post("/v1/chat/completions", json=CHAT)
            assert refused.status_code == 503 and refused.json()["error"]["field"] == "server"
            assert other.get("/ready").status_code == 503
            pace.allow(None)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        server.wait(lambda: server.server.should_exit)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_sigterm_drains_and_the_process_leaves_in_time_and_without_files(
    tiny_llama_export: Path, tmp_path: Path
) -> None:
    code = "import sys; from tp_runtime.cli import main; sys.exit(main())"
    options = ["--port", "0", "--drain", "30", "--device", "cpu", "--threads", "1"]
    work = tmp_path / "work"
    work.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(tiny_llama_export), *options],
        stderr=subprocess.PIPE,
        text=True,
        cwd=work,
        env={**os.environ, "TMPDIR": str(work), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stderr is not None
        url = ""
        for line in process.stderr:
            if line.startswith("serving "):
                url = line.split(" on ")[1].split()[0]
                break
        with httpx.Client(base_url=url, timeout=SECONDS) as http:
            body = {**LONG, "stream": True}
            with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert list(lines)[-2] == "data: [DONE]"
        assert process.wait(SECONDS) == 0
        logged = [json.loads(line) for line in process.stderr]
        assert any(line.get("path") == "/v1/chat/completions" and line["request"] for line in logged)
        left = {path.name for path in work.iterdir()}
        assert left <= {".ses"}  # ONNX Runtime's own, which it writes once into the folder for temporary files
    finally:
        process.kill()
        process.wait()
