"""One place for each kind of thing: what is added in one file is found everywhere (CONTRIBUTING.md, "To add ...")."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from problems import assert_close, mlp, randomised, regression_batch
from torch import Tensor
from torch.nn import functional as F

from metamom import MAML, cli
from metamom.bias import BiasOperator, parse, spelling
from metamom.bias.coordinates import Coordinates
from metamom.bias.spec import spec_help, spellings
from metamom.maml import estimators
from metamom.maml.estimators import ESTIMATORS, Record, memoryless_estimators

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def halving() -> Iterator[type[BiasOperator]]:
    """An operator, in the way of those in `metamom.bias`."""
    spelling.load_all()

    @spelling.spelled(
        "halving",
        "half of it, TIMES times",
        spelling.Row("`halving:2`", "`Halving(2)`", "1 − (1 − 2⁻ᵗ)²", "4d"),
        argument="TIMES",
        number=int,
    )
    class Halving(BiasOperator):
        def __init__(self, times: int) -> None:
            self.times = times

        def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
            return rows * 0.5**self.times

        @property
        def spec(self) -> str:
            return f"halving:{self.times}"

    yield Halving
    del spelling.SPELLINGS["halving"]


def test_an_operator(halving, capsys):
    assert parse("halving:2") == halving(2)
    assert "halving:TIMES" in spellings()
    assert "  halving:TIMES        half of it, TIMES times" in spec_help()
    assert "| `halving:2` | `Halving(2)` |" in spelling.operator_table()
    with pytest.raises(SystemExit):
        cli.main(["train", "sinusoid", "--help"])
    assert "halving:TIMES" in capsys.readouterr().out
    batch, learner = regression_batch(tasks=2), MAML(randomised(mlp()), F.mse_loss)
    learner.backward(batch, bias="clip:1e9+halving:1")
    expected = learner.meta_gradient(batch).grads
    assert_close({n: 2 * p.grad for n, p in learner.model.named_parameters()}, {n: g[0] for n, g in expected.items()})


def test_the_readme_has_the_table_of_operators():
    assert spelling.operator_table() in README


def test_an_estimator(monkeypatch, tmp_path, capsys):
    """Half the first-order gradient: by a weight of a half."""
    term = estimators._Term(0.5, (estimators._Adaptation((0,), (0,)),))
    record = Record((term,), "half of first-order", derivatives="none", biased=True)
    monkeypatch.setitem(ESTIMATORS, "half-order", record)
    assert "half-order" in memoryless_estimators()
    batch, model = regression_batch(tasks=2), randomised(mlp())
    half, first = (
        MAML(model, F.mse_loss, estimator=name).meta_gradient(batch).grads for name in ("half-order", "first-order")
    )
    assert_close({name: 2 * g for name, g in half.items()}, first)
    with pytest.raises(SystemExit):
        cli.main(["train", "sinusoid", "--help"])
    assert "half-order" in capsys.readouterr().out
    run = ["train", "sinusoid", "--iterations", "2", "--estimator", "half-order", "--run-dir", str(tmp_path / "run")]
    assert cli.main(run) == 0
    assert cli.main(["evaluate", str(tmp_path / "run"), "--tasks", "4"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["train", "sinusoid", "--estimator", "no-order"])
    assert "half-order" in capsys.readouterr().err
    assert torch.isfinite(next(model.parameters())).all()
