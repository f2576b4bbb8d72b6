"""Closing a stream: from any thread, at any time, once or often, it ends the stream and releases everything."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tp_runtime.errors import BusyError, PatchInUseError
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import KVCache
from tp_runtime.text import TextStream


class Gate:
    """Stops the model's runs from the `number`-th on, until `open` is set; `reached` says that one has stopped."""

    def __init__(self, model: PatchedModel, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open, self.runs = threading.Event(), threading.Event(), 0
        forward = model.graph.forward

        def wait_and_run(*args: Any, **options: Any) -> Any:
            self.runs += 1
            if self.runs >= number:
                self.reached.set()
                assert self.open.wait(60)
            return forward(*args, **options)

        monkeypatch.setattr(model.graph, "forward", wait_and_run)


@pytest.fixture
def cache(model: PatchedModel, patch: Patch) -> KVCache:
    model.load_patch(patch, "p")
    return model.new_cache("p")


def start(model: PatchedModel, cache: KVCache, count: int = 40) -> TextStream:
    return model.stream("Where is the cat?", patch="p", cache=cache, max_new_tokens=count)


def assert_released(model: PatchedModel, cache: KVCache) -> None:
    wanted = model.generate("Hi", patch="p", max_new_tokens=3)
    assert model.generate("Hi", patch="p", cache=cache, max_new_tokens=3) == wanted
    model.unload_patch("p")


@pytest.mark.parametrize("run", [1, 2, 5], ids=["in the prompt", "at the second token", "at the fifth token"])
def test_close_in_another_thread_ends_the_stream_at_the_next_token(
    model: PatchedModel, cache: KVCache, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(model, run, monkeypatch)
    stream = start(model, cache)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(list, stream)
        assert gate.reached.wait(60)
        stream.close()
        stream.close()
        assert not reading.done() and stream.finish_reason is None
        with pytest.raises(PatchInUseError):
            model.unload_patch("p")  # the run goes on
        gate.open.set()
        chunks = reading.result(60)
    assert gate.runs == run  # the run that was going on was the last one
    assert len(stream.token_ids) == run - 1 and stream.finish_reason == "closed"
    assert "".join(chunks) in model.codec.decode(stream.token_ids)
    assert list(stream) == []
    assert_released(model, cache)


def test_close_in_another_thread_between_two_chunks_ends_the_stream(model: PatchedModel, cache: KVCache) -> None:
    stream = start(model, cache)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(stream.close).result(60)
    assert next(stream, None) is None and stream.finish_reason == "closed"
    assert_released(model, cache)


def test_threads_that_close_together_all_return(model: PatchedModel, cache: KVCache) -> None:
    stream = start(model, cache)
    next(stream)
    meet = threading.Barrier(4)

    def close() -> None:
        meet.wait(30)
        stream.close()

    with ThreadPoolExecutor(4) as pool:
        for closing in [pool.submit(close) for _ in range(4)]:
            closing.result(60)
    assert next(stream, None) is None and stream.finish_reason == "closed"
    assert_released(model, cache)


def test_closing_while_chunks_are_read_never_raises_and_always_releases(model: PatchedModel, patch: Patch) -> None:
    """The close comes at many different places of the loop, because nothing makes it wait."""
    model.load_patch(patch, "p")
    for count in range(30):
        cache, go = model.new_cache("p"), threading.Event()
        stream = start(model, cache)

        def read(stream: TextStream = stream, go: threading.Event = go, count: int = count) -> None:
            for number, _chunk in enumerate(stream):
                if number == count % 3:
                    go.set()
            go.set()

        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read)
            assert go.wait(60)
            stream.close()
            reading.result(60)
        assert stream.finish_reason in ("closed", "length") and cache.uses.first() is None
    model.unload_patch("p")


def test_a_second_reader_is_refused_at_once_and_the_first_goes_on(
    model: PatchedModel, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = model.generate("Where is the cat?", patch="p", max_new_tokens=6)
    gate = Gate(model, 2, monkeypatch)
    stream = start(model, cache, 6)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit("".join, stream)
        assert gate.reached.wait(60)
        with pytest.raises(BusyError) as error:
            next(stream)
        assert error.value.field == "stream"
        gate.open.set()
        assert reading.result(60) == wanted
    assert stream.finish_reason == "length"


def close_in_decoder(model: PatchedModel, monkeypatch: pytest.MonkeyPatch, stream: Callable[[], TextStream]) -> None:
    """Let the decoder of the streams that are made from now on close a stream."""
    decode = model.codec.decode

    def decode_and_close(*args: Any, **options: Any) -> str:
        stream().close()
        return decode(*args, **options)

    monkeypatch.setattr(model.codec, "decode", decode_and_close)


def test_close_from_within_a_run_of_the_same_thread_ends_the_stream(
    model: PatchedModel, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler or a callback runs further down in the thread that reads."""
    close_in_decoder(model, monkeypatch, lambda: stream)
    stream = start(model, cache)
    assert list(stream) == [] and stream.finish_reason == "closed" and len(stream.token_ids) == 1
    monkeypatch.undo()
    assert_released(model, cache)


def test_close_from_within_a_run_of_another_stream_ends_the_stream(
    model: PatchedModel, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = start(model, cache)
    next(stream)
    close_in_decoder(model, monkeypatch, lambda: stream)
    other = start(model, model.new_cache("p"))
    next(other)
    assert list(stream) == [] and stream.finish_reason == "closed"
    other.close()
    monkeypatch.undo()
    assert_released(model, cache)


def test_a_request_on_the_cache_of_a_stream_that_has_begun_is_busy_at_once(model: PatchedModel, cache: KVCache) -> None:
    wanted = model.generate("Where is the cat?", patch="p", max_new_tokens=40)
    early, stream = start(model, cache), start(model, cache)
    chunks = [next(stream)]
    assert stream.finish_reason is None  # at the last chunk everything is released already
    for use in (lambda: model.generate("Hi", patch="p", cache=cache), lambda: next(early), lambda: start(model, cache)):
        with pytest.raises(BusyError) as error:
            use()
        assert error.value.field == "cache"
    assert "".join([*chunks, *stream]) == wanted
    assert_released(model, cache)


def test_close_before_the_beginning_ends_the_stream(model: PatchedModel, cache: KVCache) -> None:
    stream = start(model, cache)
    stream.close()
    stream.close()
    assert list(stream) == [] and stream.finish_reason == "closed" and stream.token_ids == []
    assert_released(model, cache)


def test_close_after_the_end_changes_nothing(model: PatchedModel, cache: KVCache) -> None:
    stream = start(model, cache, 3)
    list(stream)
    stream.close()
    assert stream.finish_reason == "length"
    assert_released(model, cache)


def test_close_inside_the_loop_ends_the_loop(model: PatchedModel, cache: KVCache) -> None:
    stream, chunks = start(model, cache), []
    for chunk in stream:
        chunks.append(chunk)
        stream.close()
    assert len(chunks) == 1 and stream.finish_reason == "closed"
    assert_released(model, cache)


def test_a_with_block_closes_the_stream_also_if_its_reader_fails(model: PatchedModel, cache: KVCache) -> None:
    with pytest.raises(ZeroDivisionError) as error, start(model, cache) as stream:
        for _chunk in stream:
            raise ZeroDivisionError
    assert stream.finish_reason == "closed"
    assert_released(model, cache)
    del error


@pytest.mark.parametrize("fails", ["the run", "the decoder", "the patch"])
def test_a_stream_that_fails_releases_everything_while_its_error_is_kept(
    model: PatchedModel, cache: KVCache, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise ValueError("as the generator's own error")

    place = {"the run": (model.graph, "forward"), "the decoder": (model.codec, "decode")}
    stream = start(model, cache)
    monkeypatch.setattr(*place.get(fails, (model._patches, "by_name")), fail)
    if fails == "the decoder":
        stream = start(model, cache)  # a stream takes its decoder when it is made
    with pytest.raises(ValueError, match="own error") as error:
        list(stream)
    monkeypatch.undo()
    assert_released(model, cache)
    stream.close()
    assert error.value.args and next(stream, None) is None


def test_a_dropped_stream_releases_everything_also_from_a_cycle(model: PatchedModel, cache: KVCache) -> None:
    class Owner:
        def __init__(self, stream: TextStream) -> None:
            self.stream, self.me = stream, self

        def __del__(self) -> None:
            self.stream.close()

    owner = Owner(start(model, cache))
    next(owner.stream)
    del owner
    gc.collect()
    assert_released(model, cache)


@pytest.mark.parametrize("read", [list, next], ids=["to the end", "in part"])
def test_the_cache_of_a_stream_can_be_used_once_it_is_read_or_closed(
    model: PatchedModel, cache: KVCache, read: Callable[[Iterator[str]], Any]
) -> None:
    stream = start(model, cache, 5)
    read(stream)
    stream.close()
    assert_released(model, cache)
