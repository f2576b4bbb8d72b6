"""Two replicas on one machine: every route, patches that come and change, a replica that is killed, and none at all."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.committed import private_copy
from runtime_tests.patches import patch_for
from tp_runtime import PatchedModel
from tp_runtime.errors import RequestError
from tp_runtime.session import ModelFolder

ray = pytest.importorskip("ray")
httpx = pytest.importorskip("httpx")
serve = pytest.importorskip("ray.serve")
app = pytest.importorskip("tp_runtime.fleet").app

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}
FAST = {"upscale_delay_s": 0.2, "downscale_delay_s": 0.5, "metrics_interval_s": 0.2, "look_back_period_s": 0.5}


class Fleet:
    """A running fleet, its folders and a client."""

    def __init__(self, where: Path) -> None:
        self.model_dir = private_copy("tiny-llama", where)
        self.folder = ModelFolder.open(self.model_dir)
        self.patches = where / "patches"
        self.patches.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)

    def save(self, name: str, seed: int) -> None:
        patch_for(self.folder, seed, rank=3, scale=0.3).save(self.patches / f"{name}.safetensors")

    def run(self, **options: Any) -> None:
        serve.run(app(self.model_dir, self.patches, cpus=0.25, device="cpu", threads=1, **options))

    def ask(self, model: str, **more: Any) -> Any:
        return self.client.post("/v1/chat/completions", json={**BODY, "model": model, **more})

    def alone(self, name: str | None, seed: int) -> str:
        """Return the answer of a model without a fleet."""
        model = PatchedModel.from_pretrained(self.model_dir, "cpu", threads=1)
        patch = None if name is None else patch_for(self.folder, seed, rank=3, scale=0.3)
        return model.generate("hello", patch=patch, max_new_tokens=6)


def replicas() -> list[int]:
    """Return the processes of the replicas."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:  # the process has ended meanwhile
            continue
        if line.startswith(b"ray::ServeReplica:default:Replica"):
            found.append(int(entry.name))
    return found


def wait_for(count: int, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while len(replicas()) != count:
        assert time.monotonic() < end, f"{len(replicas())} replicas, not {count}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    made.save("one", 1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": made.port})
        made.run(replicas=(2, 2))
        yield made
    finally:
        made.client.close()
        serve.shutdown()
        ray.shutdown()


def test_a_fleet_answers_as_the_server_does(fleet: Fleet) -> None:
    listed = [card["id"] for card in fleet.client.get("/v1/models").json()["data"]]
    assert listed == ["tiny-llama", "one"]
    base, patched = fleet.ask("tiny-llama").json(), fleet.ask("one").json()
    assert base["choices"][0]["message"]["content"] == fleet.alone(None, 0)
    assert patched["choices"][0]["message"]["content"] == fleet.alone("one", 1)
    unknown = fleet.ask("nobody")
    assert unknown.status_code == 404 and unknown.json()["error"]["param"] == "model"
    with fleet.client.stream("POST", "/v1/chat/completions", json={**BODY, "model": "one", "stream": True}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"


def test_a_new_or_changed_patch_is_served_without_a_restart(fleet: Fleet) -> None:
    before = replicas()
    fleet.save("two", 2)
    assert fleet.ask("two").json()["choices"][0]["message"]["content"] == fleet.alone("two", 2)
    fleet.save("two", 3)
    wanted, end = fleet.alone("two", 3), time.monotonic() + 30
    while fleet.ask("two").json()["choices"][0]["message"]["content"] != wanted:
        assert time.monotonic() < end
        time.sleep(0.3)
    assert sorted(before) == sorted(replicas())


def test_a_killed_replica_loses_no_request_that_has_not_begun_to_answer(fleet: Fleet) -> None:
    wait_for(2)
    wanted = {name: fleet.alone(name, seed) for name, seed in (("one", 1), ("two", 3))}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(fleet.ask, name) for _ in range(24) for name in wanted]
        os.kill(replicas()[0], signal.SIGKILL)
        answers = [future.result() for future in asked]
    assert {answer.status_code for answer in answers} == {200}
    for number, answer in enumerate(answers):
        assert answer.json()["choices"][0]["message"]["content"] == wanted[("one", "two")[number % 2]]
    wait_for(2)  # Ray has replaced it


def test_an_idle_fleet_has_no_replica_and_comes_back_with_a_request(fleet: Fleet) -> None:
    fleet.run(replicas=(0, 2), autoscaling=FAST)
    wait_for(0)
    answer = fleet.ask("one")
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == fleet.alone("one", 1)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"replicas": (2, 1)}, "replicas"),
        ({"replicas": (0, 0)}, "replicas[1]"),
        ({"tries": 0}, "tries"),
        ({"patches_per_replica": 0}, "patches_per_replica"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as error:
        app(tmp_path, tmp_path, **options)
    assert error.value.field == field


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="model_dir"):
        app(tmp_path / "none", tmp_path)
