"""What the tensors in one call of a model are: views of groups of images, and normalised activations.

A function that replaces PyTorch's gets such a tensor, and works on what it was made from. Normalised activations may
wait: their memory is written when something reads them, so that those that are only pooled are never computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from metamom.nets.channels_last import as_group, as_images
from metamom.nets.inside_vmap import version
from metamom.nets.normalisation import Normalised


class _Made(NamedTuple):
    """Normalised activations that a tensor holds, as long as nothing changes it in place."""

    normalised: Normalised
    version: int


class _Group(NamedTuple):
    """The group that images are a view of, as long as nothing changes them in place."""

    group: Tensor
    version: int


class Followed:
    """The tensors that operators of metamom have made."""

    def __init__(self) -> None:
        self._made: Any = WeakIdKeyDictionary()  # tensors that hold normalised activations
        self._groups: Any = WeakIdKeyDictionary()  # images that are views of a group
        self._waiting: Any = WeakIdKeyDictionary()  # normalised activations that are not in their tensors yet

    def images(self, group: Tensor) -> Tensor:
        """A group as images ``[N, C, H, W]``, of which `group` will know it."""
        images = as_images(group)
        if group.shape[0] == 1 and (changes := version(images)) is not None:
            self._groups[images] = _Group(group, changes)
        return images

    def group(self, images: Tensor) -> Tensor:
        """Images as a group: the one that they are a view of, so that its derivatives need not pass through views."""
        known: _Group | None = self._groups.get(images, None)
        if known is None or known.version != version(images) or images._backward_hooks or images.retains_grad:
            return as_group(images)
        return known.group

    def keep(self, normalised: Normalised) -> Tensor:
        """Normalised activations as images, of which `normalised` will know them."""
        out = self.images(normalised.value)
        self.hold(out, normalised)
        if normalised.waits:
            self._waiting[out] = normalised
        return out

    def hold(self, tensor: Tensor, normalised: Normalised) -> None:
        """Remember that a tensor holds normalised activations."""
        changes = version(tensor)
        if changes is not None:
            self._made[tensor] = _Made(normalised, changes)

    def normalised(self, tensor: Any) -> Normalised | None:
        """The normalised activations that a tensor holds."""
        made: _Made | None = self._made[tensor] if isinstance(tensor, Tensor) and tensor in self._made else None
        return made.normalised if made is not None and made.version == version(tensor) else None

    def rectified(self) -> list[Tensor]:
        """The tensors that hold the unchanged result of a ReLU, whose derivative reads it later."""
        return [each for each in [*self._made] if (made := self.normalised(each)) is not None and made.slope == 0]

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Write the activations among the arguments of a call, if they have waited."""
        if len(self._waiting) == 0:
            return
        for item in (*args, *kwargs.values()):
            for tensor in (item,) if isinstance(item, Tensor) else pytree.tree_leaves(item):
                self.write(tensor)

    def write_all(self) -> None:
        """Write all activations that have waited so far and still exist."""
        for tensor in [*self._waiting]:
            self.write(tensor)

    def write(self, tensor: Any) -> None:
        """Write the activations of this tensor, if they have waited."""
        if isinstance(tensor, Tensor) and tensor in self._waiting:
            waiting: Normalised = self._waiting[tensor]
            del self._waiting[tensor]
            written = waiting.written()
            if tensor in self._made:
                self._made[tensor] = self._made[tensor]._replace(normalised=written)
