"""The thread of the batch: whatever fails, every ticket ends, and no place stays taken."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tp_runtime.errors import RequestError
from tp_runtime.model import PatchedModel
from tp_runtime.serve.ticket import Asked, DrainingError, QueueFullError, Ticket, TimedOutError
from tp_runtime.serve.worker import Worker

from .conftest import wait_until

LONG = {"max_new_tokens": 400, "min_new_tokens": 400, "patch": None}
SHORT = {"max_new_tokens": 3, "min_new_tokens": 3, "patch": None}


def with_worker(model: PatchedModel, test: Callable[[Worker], Any], **options: Any) -> Any:
    """Run a test in an event loop, with a worker that has started."""
    worker = Worker(model, **{"rows": 2, "queue": 2, "timeout": 60.0, **options})

    async def run() -> Any:
        worker.start()
        try:
            return await test(worker)
        finally:
            await asyncio.to_thread(worker.drain, 0.01)

    done = asyncio.run(run())
    assert worker.running == worker.waiting == worker._reserved == 0
    return done


async def submit(worker: Worker, *options: dict[str, Any]) -> list[Ticket]:
    deadline = worker.reserve(len(options))
    asked = [Asked("Hi", own) for own in options]
    return await asyncio.to_thread(worker.submit, asked, "base", deadline, asyncio.get_running_loop())


def test_tickets_end_with_their_results(model: PatchedModel) -> None:
    async def test(worker: Worker) -> None:
        tickets = await submit(worker, SHORT, {**SHORT, "patch": "pirate"})
        texts = [(await ticket.result()).text for ticket in tickets]
        assert texts == [model.generate("Hi", **SHORT), model.generate("Hi", **{**SHORT, "patch": "pirate"})]
        assert worker.running == worker.waiting == 0

    with_worker(model, test)


@pytest.mark.usefixtures("slow")
def test_a_cancelled_ticket_leaves_before_its_next_token_and_may_be_cancelled_again(model: PatchedModel) -> None:
    async def test(worker: Worker) -> None:
        (ticket,) = await submit(worker, LONG)
        await anext(ticket.pieces())
        had = len(ticket.completion.token_ids)
        ticket.cancel()
        ticket.cancel()
        result = await ticket.result()
        assert result.finish_reason == "closed" and len(result.token_ids) <= had + 1  # a step was running
        ticket.cancel()
        (other,) = await submit(worker, SHORT)
        assert len((await other.result()).token_ids) == 3

    with_worker(model, test)


def test_places_are_all_reserved_or_none(model: PatchedModel) -> None:
    async def test(worker: Worker) -> None:
        worker.reserve(3)
        with pytest.raises(QueueFullError):
            worker.reserve(2)
        worker.reserve(1)
        with pytest.raises(RequestError, match="more answers than the server has places"):
            worker.reserve(5)
        worker.release(4)
        worker.reserve(4)
        worker.release(4)

    with_worker(model, test)


def test_a_request_of_which_one_answer_is_refused_adds_none(model: PatchedModel) -> None:
    async def test(worker: Worker) -> None:
        with pytest.raises(RequestError):
            await submit(worker, LONG, {**LONG, "stop": 3})
        assert worker.running == worker.waiting == 0 and not worker._batch._completions

    with_worker(model, test)


def test_a_request_whose_time_is_over_before_it_is_encoded_adds_none(model: PatchedModel) -> None:
    async def test(worker: Worker) -> None:
        with pytest.raises(TimedOutError):
            await submit(worker, LONG)
        assert not worker._batch._completions

    with_worker(model, test, timeout=-1.0)


def fail_steps(monkeypatch: pytest.MonkeyPatch, worker: Worker, *failures: BaseException) -> None:
    """Let the next steps of the worker's batch fail, one with each failure."""
    step, left = worker._batch.step, list(failures)

    def failing() -> Any:
        if left:
            raise left.pop()
        return step()

    monkeypatch.setattr(worker._batch, "step", failing)


@pytest.mark.parametrize("failure", [ValueError, MemoryError, SystemExit])
def test_a_step_that_fails_twice_ends_its_requests_and_the_next_ones_run(
    model: PatchedModel, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    async def test(worker: Worker) -> None:
        fail_steps(monkeypatch, worker, failure("x"), failure("x"))
        (ticket,) = await submit(worker, SHORT)
        with pytest.raises(RuntimeError, match="a step of the model failed"):
            await ticket.result()
        (other,) = await submit(worker, SHORT)
        assert len((await other.result()).token_ids) == 3

    with_worker(model, test)


def test_a_step_that_fails_once_is_tried_again(model: PatchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(worker: Worker) -> None:
        fail_steps(monkeypatch, worker, ValueError("x"))
        (ticket,) = await submit(worker, SHORT)
        assert (await ticket.result()).text == model.generate("Hi", **SHORT)

    with_worker(model, test)


@pytest.mark.usefixtures("slow")
def test_an_answer_that_cannot_be_read_fails_alone(model: PatchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(worker: Worker) -> None:
        one, two = await submit(worker, LONG, SHORT)

        def broken() -> bool:
            raise ValueError("x")

        monkeypatch.setattr(one, "advance", broken)
        with pytest.raises(RuntimeError, match="could not be read"):
            await one.result()
        assert len((await two.result()).token_ids) == 3

    with_worker(model, test)


def test_metrics_that_fail_stop_nothing(model: PatchedModel) -> None:
    def broken(_ticket: Ticket, _error: Exception | None) -> None:
        raise ValueError("x")

    async def test(worker: Worker) -> None:
        for _ in range(2):
            (ticket,) = await submit(worker, SHORT)
            await ticket.result()

    with_worker(model, test, ended=broken)


@pytest.mark.usefixtures("slow")
def test_a_thread_that_ends_takes_its_tickets_with_it(model: PatchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(worker: Worker) -> None:
        (ticket,) = await submit(worker, LONG)

        def broken(*_args: Any) -> Any:
            raise ValueError("x")

        monkeypatch.setattr(worker, "_advance", broken)
        with pytest.raises(RuntimeError, match="the thread of the batch failed"):
            await ticket.result()
        assert not worker.accepting
        with pytest.raises(DrainingError):
            worker.reserve(1)

    with_worker(model, test)


def test_a_ticket_whose_loop_is_closed_ends_and_harms_no_other(model: PatchedModel) -> None:
    async def test(worker: Worker) -> None:
        closed = asyncio.new_event_loop()
        closed.close()
        deadline = worker.reserve(1)
        await asyncio.to_thread(worker.submit, [Asked("Hi", SHORT)], "base", deadline, closed)
        (ticket,) = await submit(worker, SHORT)
        await ticket.result()
        await asyncio.to_thread(wait_until, lambda: not worker.running)

    with_worker(model, test)


@pytest.mark.usefixtures("slow")
def test_draining_ends_what_runs_and_refuses_what_comes(model: PatchedModel) -> None:
    async def test(worker: Worker) -> None:
        (ticket,) = await submit(worker, {**LONG, "max_new_tokens": 20, "min_new_tokens": 20})
        assert ticket.completion.finish_reason is None
        assert await asyncio.to_thread(worker.drain, 60.0)
        assert len((await ticket.result()).token_ids) == 20
        with pytest.raises(DrainingError):
            worker.reserve(1)
        assert await asyncio.to_thread(worker.drain, 60.0)

    with_worker(model, test)


@pytest.mark.usefixtures("slow")
def test_draining_stops_what_takes_too_long(model: PatchedModel) -> None:
    async def test(worker: Worker) -> None:
        (ticket,) = await submit(worker, LONG)
        assert not await asyncio.to_thread(worker.drain, 0.01)
        with pytest.raises(DrainingError):
            await ticket.result()

    with_worker(model, test)


def test_a_request_that_is_encoded_while_the_worker_drains_gets_an_answer_or_an_error(
    model: PatchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(worker: Worker) -> None:
        add, go = worker._batch.add, threading.Event()

        def slow(*args: Any, **options: Any) -> Any:
            go.wait(60)
            return add(*args, **options)

        monkeypatch.setattr(worker._batch, "add", slow)
        adding = asyncio.create_task(submit(worker, SHORT))
        await asyncio.to_thread(wait_until, lambda: worker._reserved)
        draining = asyncio.create_task(asyncio.to_thread(worker.drain, 60.0))
        await asyncio.to_thread(wait_until, lambda: worker._draining)
        go.set()
        (ticket,) = await adding
        assert len((await ticket.result()).token_ids) == 3
        assert await draining
        worker.__init__(model, 2, 2, 60.0)  # type: ignore[misc]  # the same, but the drain does not wait
        worker.start()
        go.clear()
        monkeypatch.setattr(worker._batch, "add", slow)
        adding = asyncio.create_task(submit(worker, SHORT))
        await asyncio.to_thread(wait_until, lambda: worker._reserved)
        assert not await asyncio.to_thread(worker.drain, 0.01)
        go.set()
        with pytest.raises(DrainingError):
            await adding

    with_worker(model, test)


def test_many_threads_submit_and_cancel_while_the_batch_steps(model: PatchedModel) -> None:
    async def test(worker: Worker) -> None:
        async def one(number: int) -> None:
            while True:
                try:
                    (ticket,) = await submit(worker, {**SHORT, "patch": (None, "pirate", "french")[number % 3]})
                    break
                except QueueFullError:
                    await asyncio.sleep(0.001)
            if number % 4 == 0:
                ticket.cancel()
            result = await ticket.result()
            assert number % 4 == 0 or len(result.token_ids) == 3

        await asyncio.gather(*(one(number) for number in range(60)))

    with_worker(model, test, rows=3, queue=5)
