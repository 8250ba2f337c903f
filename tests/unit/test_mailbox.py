"""The driver's mailbox: nothing is lost or out of order, and all who ask hear of a stop."""

from orpo_ray.distributed.mailbox import Mailbox, Message


def line(text: str) -> Message:
    return Message("announce", text)


def test_messages_come_out_once_and_in_the_order_of_their_arrival() -> None:
    mailbox = Mailbox()
    mailbox.post(line("a"), line("b"))
    mailbox.exchange(line("c"))
    assert mailbox.collect() == [line("a"), line("b"), line("c")]
    assert mailbox.collect() == []
    mailbox.post(line("d"))
    assert mailbox.collect() == [line("d")]


def test_a_worker_hears_of_a_stop_whenever_it_asks_after_it() -> None:
    mailbox = Mailbox()
    assert not mailbox.exchange()
    mailbox.request_stop()
    assert mailbox.exchange()
    assert mailbox.exchange(line("a"))


def test_who_asks_for_a_stop_learns_whether_a_worker_listens() -> None:
    mailbox = Mailbox()
    mailbox.post(line("loading"))
    assert not mailbox.request_stop()
    mailbox.exchange()
    assert mailbox.request_stop()
