"""The speed benchmark's meta-iteration in plain JAX: ``jit``, ``grad``, and ``vmap`` or ``lax.map``.

With ``vmap``, convolutions with per-task weights become grouped ones, which XLA computes slowly on a CPU. A loop over
the tasks with ``lax.map`` can be faster there.

Images are channels-last and kernels ``[H, W, C, C']``, JAX's own preference.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metamom.experiments.speed.rows import MetaRow

KERNEL_AXES, WEIGHT_AXES = (2, 3, 1, 0), (3, 2, 0, 1)  # torch's [C', C, H, W] to JAX's, and back


def prepare(device: torch.device) -> Any:
    """Import JAX for ``device``, with true float32 and without preallocated memory.

    Raises:
        ImportError: if it is not installed, or not for ``device``.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax: Any = importlib.import_module("jax")
    importlib.import_module("jax.experimental")
    backend = "gpu" if device.type == "cuda" else "cpu"
    try:
        jax.config.update("jax_default_device", jax.devices(backend)[0])
    except RuntimeError as error:
        raise ImportError(f"this JAX has no {backend} backend: {error}") from error
    jax.config.update("jax_default_matmul_precision", "highest")
    return jax


def peak_bytes(device: torch.device) -> int:
    """The peak memory of JAX's allocator on ``device``, a GPU."""
    statistics = prepare(device).devices("gpu")[0].memory_stats() or {}
    return int(statistics.get("peak_bytes_in_use", 0))


def contender(
    row: MetaRow, meta_lr: float, one_by_one: bool = False
) -> tuple[Callable[[], None], Callable[[], dict[str, Tensor]]]:
    """One meta-iteration, and the last one's meta-gradient.

    Args:
        row: the computation.
        meta_lr: step size of the plain gradient step.
        one_by_one: loop over the tasks with ``lax.map`` instead of ``vmap``.
    """
    jax = prepare(row.batch.support_x.device)
    predict, loss_fn = (_conv4, _cross_entropy) if row.has_convolutions else (_mlp, _mse)

    def task_loss(weights: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        for _ in range(row.inner_steps):
            gradient = jax.grad(lambda w: loss_fn(jax, predict(jax, w, support_x), support_y))(weights)
            if row.estimator == "first-order":
                gradient = jax.lax.stop_gradient(gradient)
            weights = jax.tree.map(lambda w, g: w - row.inner_lr * g, weights, gradient)
        return loss_fn(jax, predict(jax, weights, query_x), query_y)

    def meta_loss(weights: Any, batch: Any) -> Any:
        if one_by_one:
            return jax.lax.map(lambda task: task_loss(weights, *task), batch).mean()
        return jax.vmap(task_loss, in_axes=(None, 0, 0, 0, 0))(weights, *batch).mean()

    @jax.jit  # type: ignore[untyped-decorator]
    def step(weights: Any, batch: Any) -> Any:
        gradient = jax.grad(meta_loss)(weights, batch)
        return jax.tree.map(lambda w, g: w - meta_lr * g, weights, gradient), gradient

    def array(x: Tensor) -> Any:
        return jax.numpy.asarray(x.detach().cpu().numpy())

    double = row.batch.support_x.dtype == torch.float64
    with jax.experimental.enable_x64(double):
        weights = {n: array(p.permute(KERNEL_AXES) if p.dim() == 4 else p) for n, p in row.plain.named_parameters()}
        batch = tuple(array(x.movedim(2, -1) if x.dim() == 5 else x) for x in row.batch[:4])
    last: list[Any] = [weights, None]  # weights, gradient

    def iterate() -> None:
        with jax.experimental.enable_x64(double):
            last[:] = jax.block_until_ready(step(last[0], batch))

    def outcome() -> dict[str, Tensor]:
        gradient = {name: torch.tensor(jax.device_get(g)) for name, g in last[1].items()}
        return {name: g.permute(WEIGHT_AXES) if g.dim() == 4 else g for name, g in gradient.items()}

    return iterate, outcome


def _mlp(jax: Any, weights: Any, x: Any) -> Any:
    layers = sorted({name.partition(".")[0] for name in weights}, key=int)
    for layer in layers:
        x = x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
        if layer != layers[-1]:
            x = jax.nn.relu(x)
    return x


def _conv4(jax: Any, weights: Any, x: Any) -> Any:
    for block in range(4):
        x = jax.lax.conv_general_dilated(
            x,
            weights[f"features.{block}.0.weight"],
            window_strides=(2, 2),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        x = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
        x = jax.nn.relu(x * weights[f"features.{block}.1.weight"] + weights[f"features.{block}.1.bias"])
    return x.mean((1, 2)) @ weights["head.weight"].T + weights["head.bias"]


def _mse(jax: Any, predictions: Any, y: Any) -> Any:
    return jax.numpy.square(predictions - y).mean()


def _cross_entropy(jax: Any, scores: Any, y: Any) -> Any:
    return -jax.numpy.take_along_axis(jax.nn.log_softmax(scores), y[:, None], axis=1).mean()
