"""The driver's mailbox: nothing is lost or out of order, nobody waits longer than needed."""

import asyncio

from orpo_ray.distributed.mailbox import Mailbox, Message

LONG_S = 30.0
"""Far more than any of these tests takes: what waits that long hangs."""


def line(text: str) -> Message:
    return Message("announce", text)


def test_messages_come_out_once_and_in_the_order_of_their_arrival() -> None:
    async def talk() -> None:
        mailbox = Mailbox()
        for text in "abc":
            await mailbox.post(line(text))
        assert [message.content for message in await mailbox.collect(LONG_S)] == ["a", "b", "c"]
        assert await mailbox.collect(0.0) == []
        await mailbox.post(line("d"))
        assert [message.content for message in await mailbox.collect(0.0)] == ["d"]

    asyncio.run(asyncio.wait_for(talk(), LONG_S / 2))


def test_who_collects_waits_for_the_first_message_and_not_for_a_second_one() -> None:
    async def talk() -> None:
        mailbox = Mailbox()
        waiting = asyncio.create_task(mailbox.collect(LONG_S))
        await asyncio.sleep(0)
        assert not waiting.done()
        await mailbox.post(line("a"))
        assert await waiting == [line("a")]
        # The news of the first message is over: the next one waits for its own.
        assert await mailbox.collect(0.01) == []

    asyncio.run(asyncio.wait_for(talk(), LONG_S / 2))


def test_who_collects_gets_nothing_when_the_time_is_up() -> None:
    async def talk() -> None:
        mailbox = Mailbox()
        assert await mailbox.collect(0.01) == []
        await mailbox.post(line("a"))
        assert await mailbox.collect(0.01) == [line("a")]

    asyncio.run(asyncio.wait_for(talk(), LONG_S / 2))


def test_no_message_is_lost_between_a_sender_in_haste_and_a_slow_reader() -> None:
    count = 200

    async def talk() -> None:
        mailbox = Mailbox()

        async def send() -> None:
            for number in range(count):
                await mailbox.post(Message("metrics", number))
                await asyncio.sleep(0)

        sending = asyncio.create_task(send())
        received: list[int] = []
        while len(received) < count:
            received += [message.content for message in await mailbox.collect(LONG_S)]
            await asyncio.sleep(0)
        await sending
        assert received == list(range(count))

    asyncio.run(asyncio.wait_for(talk(), LONG_S / 2))


def test_workers_hear_of_a_stop_whether_they_asked_before_or_after_it() -> None:
    async def talk() -> None:
        mailbox = Mailbox()
        early = asyncio.create_task(mailbox.wait_for_stop())
        await asyncio.sleep(0)
        assert not early.done()
        assert await mailbox.request_stop()
        await early
        await mailbox.wait_for_stop()

    asyncio.run(asyncio.wait_for(talk(), LONG_S / 2))


def test_who_asks_for_a_stop_learns_that_no_worker_listens_yet() -> None:
    async def talk() -> None:
        assert not await Mailbox().request_stop()

    asyncio.run(asyncio.wait_for(talk(), LONG_S / 2))


def test_waiting_for_a_stop_keeps_no_one_from_posting() -> None:
    async def talk() -> None:
        mailbox = Mailbox()
        waiting = [asyncio.create_task(mailbox.wait_for_stop()) for _ in range(3)]
        await mailbox.post(line("a"))
        assert await mailbox.collect(LONG_S) == [line("a")]
        assert not any(task.done() for task in waiting)
        await mailbox.request_stop()
        await asyncio.gather(*waiting)

    asyncio.run(asyncio.wait_for(talk(), LONG_S / 2))
