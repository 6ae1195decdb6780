"""Error feedback of workers that average twice: EF21-SGD2M, and Clip21-SGD2M with noise for privacy."""

from __future__ import annotations

from torch import Tensor

from metamom.bias.checks import check_weight
from metamom.bias.clip import Clip, clip
from metamom.bias.compose import Compose
from metamom.bias.feedback import EF21, EF21SGDM
from metamom.bias.feedback_base import Rows
from metamom.bias.noise import GaussianNoise
from metamom.bias.spelling import Row, spelled, spelled_around
from metamom.common.checks import check_number
from metamom.common.numbers import short
from metamom.optim import momentum_update_


@spelled_around(
    "ef21-sgd2m",
    "EF21 of the workers' momentum, averaged twice",
    Row("`ef21-sgd2m(0.3):A`", "`EF21SGD2M(A, eta=0.3)`", "as EF21-SGDM, with momentum of the momentum", "A's"),
    argument="ETA",
)
class EF21SGD2M(EF21SGDM):
    """EF21 on the workers' momentum of their momentum.

    ``v_i <- (1 - eta) v_i + eta g_i``, ``u_i <- (1 - eta) u_i + eta v_i``, ``c_i = C(u_i - h_i)`` and
    ``h_i <- h_i + c_i``, all from zero. One gradient's noise moves what is compressed by ``eta^2``, instead of
    `EF21SGDM`'s ``eta``. The server has no momentum, ``beta = 1`` (`train` requires it).

    Args:
        operator: C, or its SPEC.
        eta: weight of the new value in both averages, 0 < eta <= 1; 1 is EF21.

    Raises:
        ValueError: for eta out of range.

    Reference:
        docs/theory/operators.md; Fatkhullin, Tyurin, Richtárik, "Momentum provably improves error feedback!", 2023,
        the double momentum version.
    """

    names = ("estimate", "momentum", "average")

    def _before(self, rows: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        momentum = momentum_update_(kept["momentum"], rows, self.eta)
        average = momentum_update_(kept["average"], momentum, self.eta)
        return average - kept["estimate"], {**kept, "momentum": momentum, "average": average}

    def __repr__(self) -> str:
        return f"EF21SGD2M({self.operator!r}, eta={self.eta!r})"

    @property
    def spec(self) -> str:
        """``ef21-sgd2m(ETA):SPEC``."""
        return super().spec.replace("ef21-sgdm", "ef21-sgd2m", 1)


@spelled(
    "clip21-sgd2m",
    "Clip21 with momentum on both sides",
    Row(
        "`clip21-sgd2m:1:eta=0.1:server=0.5`",
        "`Clip21SGD2M(1.0, eta=0.1, server=0.5)`",
        "as Clip21, with gradient noise; `:noise=` for privacy",
        "4d",
    ),
    argument="TAU",
    number=float,
    options=("eta", "server", "noise", "seed"),
)
class Clip21SGD2M(EF21):
    """Clip21 on the workers' momentum, with momentum of the server's estimates and optional noise.

    ``v_i <- (1 - eta) v_i + eta g_i``, worker i sends ``c_i = clip_tau(v_i - h_i) + N(0, sigma^2 I)`` and keeps
    ``h_i <- h_i + server * clip_tau(v_i - h_i)``; the server adds ``server * c_i`` to its estimate of worker i, and
    steps along their mean. All start at zero. Without noise the two estimates are the same.

    A message reveals the gradient only through a vector of norm tau plus noise. `metamom.bias.privacy_spent` gives the
    (epsilon, delta) of a run. The optimizer has no momentum, ``beta = 1`` (`train` requires it).

    Args:
        max_norm: tau > 0.
        eta: weight of the new gradient in the workers' momentum, 0 < eta <= 1.
        server: weight of the new message in the estimates, 0 < server <= 1; with ``eta=1, server=1`` it is Clip21.
        noise: sigma >= 0, the standard deviation of each entry of the noise.
        seed: seed of the noise. Whoever knows it can subtract the noise: for privacy, keep it secret.

    Raises:
        ValueError: for a number out of range.

    Reference:
        Islamov, Horváth, Lucchi, Richtárik, Gorbunov, "Double Momentum and Error Feedback for Clipping with Fast Rates
        and Differential Privacy", 2025, arXiv 2502.11682, algorithm 1 (its beta and beta-hat are eta and server).
    """

    carries_momentum = True

    def __init__(
        self, max_norm: float, eta: float = 0.1, server: float = 1.0, *, noise: float = 0.0, seed: int = 0
    ) -> None:
        self.eta = check_weight("Clip21SGD2M", "eta", eta, "the weight of the new value,")
        self.server = check_weight("Clip21SGD2M", "server", server, "the weight of the new value,")
        check_number("Clip21SGD2M's noise", noise)
        if not 0 <= noise < float("inf"):
            raise ValueError(f"Clip21SGD2M needs a standard deviation, noise >= 0 and finite; got {noise}.")
        inner = Clip(max_norm)
        added = GaussianNoise(noise or 1.0, seed=seed)  # checks the seed, also without noise
        super().__init__(Compose(inner, added) if noise else inner)
        self.max_norm = inner.max_norm
        self.noise, self.seed = float(noise), seed
        # the server's estimate of a noisy worker is not the worker's own
        self.names = ("estimate", "momentum", "received") if noise else ("estimate", "momentum")

    def _updated(self, before: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        return super()._updated(before, change * self.server)

    def _before(self, rows: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        momentum = momentum_update_(kept["momentum"], rows, self.eta)
        return momentum - kept["estimate"], {**kept, "momentum": momentum}

    def _after(self, wanted: Tensor, sent: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        if not self.noise:
            estimate = kept["estimate"].add_(sent, alpha=self.server)
            return estimate, {**kept, "estimate": estimate}
        estimate = kept["estimate"].add_(clip(wanted, self.max_norm), alpha=self.server)
        received = kept["received"].add_(sent, alpha=self.server)
        return received, {**kept, "estimate": estimate, "received": received}

    @property
    def _at_server(self) -> str:
        return "received" if self.noise else "estimate"

    def __repr__(self) -> str:
        given = [repr(self.max_norm), f"eta={self.eta!r}", f"server={self.server!r}"]
        given += [f"noise={self.noise!r}"] * bool(self.noise) + [f"seed={self.seed!r}"] * bool(self.seed)
        return f"Clip21SGD2M({', '.join(given)})"

    @property
    def spec(self) -> str:
        """``clip21-sgd2m:TAU``, then ``:eta=``, ``:server=``, ``:noise=`` and ``:seed=`` if set."""
        words = [f"eta={short(self.eta)}"] * (self.eta != 0.1)
        words += [f"server={short(self.server)}"] * (self.server != 1)
        words += [f"noise={short(self.noise)}"] * bool(self.noise) + [f"seed={self.seed}"] * bool(self.seed)
        return ":".join([f"clip21-sgd2m:{short(self.max_norm)}", *words])
