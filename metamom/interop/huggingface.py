"""Models that can be saved for, and loaded from, the Hugging Face Hub."""

from __future__ import annotations

from typing import Any

from torch import nn


def with_hub(kind: type[nn.Module], **card: Any) -> Any:
    """A model class with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of huggingface_hub's mixin.

    Weights are safetensors under the model's own names, and ``config.json`` holds the arguments of the constructor.

    Args:
        kind: a class of models whose arguments are JSON values, such as `metamom.nets.Conv4`.
        **card: keywords of ``huggingface_hub.PyTorchModelHubMixin`` for the model card, such as ``license``.

    Returns:
        A subclass of ``kind`` and the mixin, with the same name.

    Raises:
        ImportError: without huggingface_hub.
        TypeError: for anything but a class of modules.

    Example:
        >>> model = with_hub(Conv4, license="mit")(ways=5)  # doctest: +SKIP
        >>> load_weights(model, "omniglot.safetensors").push_to_hub("me/omniglot-conv4")  # doctest: +SKIP
        >>> with_hub(Conv4).from_pretrained("me/omniglot-conv4")  # doctest: +SKIP
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"with_hub takes a class of models, such as metamom.nets.Conv4; got {kind!r:.60}.")
    try:
        from huggingface_hub import PyTorchModelHubMixin
    except ImportError as error:
        raise ImportError("the Hub needs huggingface_hub: pip install huggingface_hub") from error
    names = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind, PyTorchModelHubMixin), names, **card)
