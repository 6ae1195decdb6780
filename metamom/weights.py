"""Weights in files of their own: safetensors with a card next to them, and state dicts of others."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metamom.common.files import write_atomically
from metamom.common.numbers import counted
from metamom.common.weights import MOST, differences

WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which training scripts keep the state of a model


def save_weights(model: nn.Module, path: str | Path, card: Mapping[str, Any] | None = None) -> Path:
    """Write a model's ``state_dict`` as safetensors, with its names, and a card next to it: ``NAME.json``.

    Args:
        model: the model.
        path: of the file, ``NAME.safetensors``.
        card: JSON values that describe the weights; no card if ``None``.

    Returns:
        The path.

    Raises:
        ValueError: for another suffix, a state that holds something other than tensors, and a file in the card's place.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"weights are written as safetensors: name the file {path.stem}.safetensors; got {path.name!r}."
        )
    described = path.with_suffix(".json")
    if card is not None and described.exists() and not path.exists():  # somebody else's
        raise ValueError(
            f"{described} exists and is not the card of {path}: it would be overwritten. Use another name."
        )
    state = model.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"safetensors holds tensors; the model's state has {', '.join(odd)}, which are none.")
    write_tensors(path, state)
    if card is not None:
        write_atomically(described, (json.dumps(card, indent=2, default=str) + "\n").encode())
    return path


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name as safetensors."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    # copies, since the format has no tensors that share memory
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_atomically(path, save(own, metadata={"format": "pt"}))  # the library's own files are the user's alone


def load_weights(model: nn.Module, file: str | Path, *, skip: Iterable[str] = ()) -> nn.Module:
    """Load weights into a model, in place, all of them or none. No code from the file is run.

    Args:
        model: has the same names and shapes.
        file: safetensors, or a state dict from `torch.save`, alone or as ``"state_dict"`` or ``"model"`` of a
            checkpoint.
        skip: names of parameters, buffers or modules that keep their own values, such as ``["head"]`` for a classifier
            of other classes. The file may have others of these names, or none.

    Returns:
        The same model.

    Raises:
        ValueError: for a file that cannot be read, names and shapes that differ (one error lists all of them), and
            weights that are not finite.

    Example:
        >>> load_weights(model, "conv4.safetensors", skip=["head"])  # doctest: +SKIP
    """
    given = read_weights(file)
    skip = [skip] if isinstance(skip, str) else list(skip)
    own = model.state_dict()
    unknown = [name for name in skip if not any(_within(each, name) for each in own)]
    if unknown:
        raise ValueError(f"the model has no {', '.join(unknown)} to skip; it has {', '.join(own)}.")

    def kept(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x for name, x in state.items() if not any(_within(name, each) for each in skip)}

    wanted, found = kept(own), kept(given)
    for name in wanted.keys() - found.keys():
        if name.endswith("num_batches_tracked"):  # which older files lack
            found[name] = own[name]
    if differ := differences(wanted, found):
        raise ValueError(
            f"the weights in {file} do not fit the model. In the file, {'; '.join(differ)}. Name what may differ, such "
            'as the head: skip=["head"].'
        )
    _check_finite(file, model, found)
    model.load_state_dict({**own, **found})
    return model


def _check_finite(file: str | Path, model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Refuse NaN, and infinity in parameters; a buffer such as an attention mask may hold infinity.

    Raises:
        ValueError: naming the tensors.
    """
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    odd = []
    for name, x in found.items():
        bad = x.isnan() if name not in learned else ~x.isfinite()
        if bad.any():
            odd.append(f"{name} ({counted(int(bad.sum()), 'value')} of {x.numel():,})")
    if odd:
        others = f" and {len(odd) - MOST} more" * (len(odd) > MOST)
        raise ValueError(
            f"the weights in {file} are not finite: {', '.join(odd[:MOST])}{others}. Use a file from "
            "before its training diverged."
        )


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU; see `load_weights`.

    Raises:
        ValueError: for a file that cannot be read as weights.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds something other than tensors, or is damaged, and reading it could run code: save the "
            "state_dict of the model alone, torch.save(model.state_dict(), FILE)."
        ) from error
    except Exception as error:  # of zip archives, pickles and safetensors, of any type
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as weights ({type(error).__name__}: {why}).") from error
    for name in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{path} holds no weights: wanted tensors by name, as model.state_dict() has them.")
    if all(str(name).startswith("module.") for name in state):  # of DistributedDataParallel
        return {str(name).removeprefix("module."): x for name, x in state.items()}
    return {str(name): x for name, x in state.items()}


def _within(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")
