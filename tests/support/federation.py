"""Flower's nodes in this process: each message and each context is serialized on its way, as between machines."""

from __future__ import annotations

import copy
import random
from collections.abc import Collection, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class Nodes(Grid):
    """A grid of n nodes that run a client's app at once, and keep their contexts as Flower's engine does.

    Args:
        app: the client's app.
        n: the number of nodes.
        lose: rounds and clients whose replies do not arrive.
        forget: rounds before which clients lose their state.
    """

    def __init__(
        self,
        app: ClientApp,
        n: int,
        lose: Collection[tuple[int, int]] = (),
        forget: Collection[tuple[int, int]] = (),
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.app, self.lose, self.forget = app, lose, forget
        ids = [1000 + number for number in range(n)]
        random.Random(0).shuffle(ids)  # the server cannot tell a client's number from that of its node
        self.contexts = {
            node: Context(1, node, {"partition-id": number, "num-partitions": n}, RecordDict(), {})
            for number, node in enumerate(ids)
        }

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            context = copy.deepcopy(self.contexts[node])
            at = (message.content["config"]["server-round"], context.node_config.get("partition-id"))
            if at in self.forget:
                context.state = RecordDict()
            try:
                reply = self.app(copy.deepcopy(message), context)
            except Exception as error:  # noqa: BLE001  # as Flower's engine does
                replies.append(Message(Error(code=1, reason=str(error)), reply_to=message))
                continue
            self.contexts[node] = context
            if at not in self.lose:
                replies.append(copy.deepcopy(reply))
        return replies

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError
