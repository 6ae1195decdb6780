"""The messages that workers send instead of their gradients: encoding and decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from metamom.bias.checks import all_finite
from metamom.bias.coordinates import Coordinates, Sizes


class Codec(ABC):
    """Encodes and decodes an operator's messages: dense entries by default."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """This operator's SPEC on the command line."""

    @abstractmethod
    def _parts(self, d: int, sizes: Sizes | None) -> list[int]:
        """The lengths of the consecutive parts that the operator acts on."""

    @abstractmethod
    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        """Apply C to each row of ``[n, d]``: whole gradients, or their part for one parameter tensor."""

    @property
    def varies(self) -> bool:
        """Whether messages may be longer than `wire_bytes`."""
        return False

    def wire_bytes(self, d: int, element_size: int = 4, sizes: Sizes | None = None) -> int:
        """The size of one worker's message in bytes.

        Args:
            d: length of the gradient.
            element_size: bytes of one entry.
            sizes: as for a call.
        """
        return sum(self._wire_bytes(size, element_size) for size in self._parts(d, sizes))

    def decode(self, message: Tensor, d: int, dtype: torch.dtype, *, sizes: Sizes | None = None) -> Tensor:
        """Decode a message to ``C(g)`` ``[d]``, exactly.

        Raises:
            ValueError: for a message of the wrong length, or one that no gradient encodes to.
        """
        parts = self._parts(d, sizes)
        lengths = [self._wire_bytes(size, dtype.itemsize) for size in parts]
        if message.dtype is not torch.uint8 or message.shape != (sum(lengths),):
            raise self._misfit(message, f"{sum(lengths)} bytes", d, dtype)
        messages = torch.split(message, lengths)
        out = torch.cat([self._decode(m, size, dtype) for m, size in zip(messages, parts, strict=True)])
        if not all_finite(out):
            raise self._damaged("values that are infinite or NaN", d, dtype)
        return out

    def _messages(self, rows: Tensor, at: Coordinates, sizes: Sizes | None) -> list[Tensor]:
        """The messages of gradients ``[n, d]``."""
        each = [at._replace(workers=[worker]) for worker in at.workers]
        return [self._message(g, alone, sizes) for g, alone in zip(rows, each, strict=True)]

    def _decoded(
        self, messages: Sequence[Tensor], d: int, dtype: torch.dtype, sizes: Sizes | None, each: bool
    ) -> Tensor:
        """Decode messages: their sum ``[d]``, or ``each`` one, ``[n, d]``."""
        if each:
            return torch.stack([self.decode(message, d, dtype, sizes=sizes) for message in messages])
        total = torch.zeros(d, dtype=dtype, device=messages[0].device)
        for message in messages:
            self._add(total, message, sizes)
        return total

    def _message(self, gradient: Tensor, at: Coordinates, sizes: Sizes | None) -> Tensor:
        """The message of one gradient ``[d]``, whole or layer by layer."""
        parts = torch.split(gradient, self._parts(len(gradient), sizes))
        return torch.cat([self._encode(part, at._replace(tensor=i)) for i, part in enumerate(parts)])

    def _add(self, total: Tensor, message: Tensor, sizes: Sizes | None) -> None:
        """Add a decoded message to ``total [d]``."""
        total += self.decode(message, len(total), total.dtype, sizes=sizes)

    def _misfit(self, message: Tensor, wanted: str, d: int, dtype: torch.dtype) -> ValueError:
        return ValueError(
            f"{self.spec} sends {wanted} for {d} entries of {dtype}; got a message of {tuple(message.shape)} "
            f"{message.dtype}."
        )

    def _damaged(self, what: str, d: int, dtype: torch.dtype) -> ValueError:
        return ValueError(
            f"{self.spec} sends no such message for {d} entries of {dtype}: it holds {what}. It is damaged, or of "
            "another operator, size or dtype."
        )

    def _wire_bytes(self, d: int, element_size: int) -> int:
        """Bytes of dense entries, unless an operator sends less."""
        return d * element_size

    def _encode(self, part: Tensor, at: Coordinates) -> Tensor:
        return self._apply(part.unsqueeze(0), at)[0].contiguous().view(torch.uint8)

    def _decode(self, message: Tensor, d: int, dtype: torch.dtype) -> Tensor:
        return message.clone().view(dtype)
