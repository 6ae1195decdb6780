"""The table of the paper's experiments."""

from __future__ import annotations

import shutil

import pytest
from paper_runs import KEYS

from metamom.experiments.paper import published
from metamom.experiments.paper import table as tables
from metamom.experiments.paper.published import Curve, Setting
from metamom.experiments.paper.run import reproduce
from metamom.experiments.paper.table import table
from metamom.experiments.paper.training import Row


def test_names_of_files():
    for name, expected, seed in (
        ("MNIST_A_512512_penalty_0.0_e_200_N_100_SGD_lr_0.5_seed_1", ("mnist", 100, 0.5, "none", 1.0), "1"),
        ("MNIST_A_512512_penalty_0.0_e_200_N_20_SGDM_lr_0.05_beta_0.3_TopK_33500_seed_0",
         ("mnist", 20, 0.05, "topk:33500", 0.3), "0"),
        ("MNIST_A_512512_penalty_0.0_e_200_N_100_SGDM_lr_0.5_beta_0.1_ClipNorm_2.0",
         ("mnist", 100, 0.5, "clip:2", 0.1), None),
        ("FashionMNIST_A_ResNet18_penalty_0.0_e_300_N_100_SGD_lr_0.5_Norm",
         ("fashion", 100, 0.5, "normalize:tensor", 1.0), None),
    ):  # fmt: skip
        match = published.NAME.fullmatch(f"{name}.csv")
        assert published._named(match) == Setting(*expected)
        assert match["seed"] == seed
    assert published.NAME.fullmatch("MNIST_A_512512_penalty_0.1_e_200_N_100_SGD_lr_0.5_seed_1.csv") is None
    assert published._canonical("topk:1%", 11_181_642) == "topk:111816"
    assert published._canonical("topk:33500:all", 669_706) == "topk:33500"


def curve(beta: float, losses: list[float], accuracies: list[float], seed: int = 0) -> Curve:
    rows = [Row(loss, 0.0, 0.0, accuracy) for loss, accuracy in zip(losses, accuracies, strict=True)]
    return Curve(Setting("mnist", 100, 0.5, "none", beta), seed, rows)


def test_differences_over_as_many_epochs_as_said():
    ours, theirs = curve(1.0, [1.0] * 7, [0.5] * 7), curve(1.0, [1.0] * 4 + [1.5] + [2.0] * 5, [0.5] * 10)
    assert tables.largest_difference(ours.rows, theirs.rows, 4) == 0
    assert tables.largest_difference(ours.rows, theirs.rows, 5) == 0.5
    assert tables.largest_difference(ours.rows, theirs.rows, 7) == 1
    assert tables.largest_difference(ours.rows, theirs.rows, 8) is None
    assert tables._matched([ours], [theirs])[0].apart == (0.5, None)


def test_where_momentum_wins_is_judged_over_common_epochs():
    def said(sgd: list[float], momentum: list[float]) -> list[str]:
        curves = [curve(beta, accuracies, accuracies) for beta, accuracies in ((1.0, sgd), (0.1, momentum))]
        return tables._honest(tables._matched(curves, []))

    slow = [0.5] * 30 + [0.95] * 170  # 90 % after 31 epochs
    nothing, wins = ["There are no runs to compare momentum with SGD."], ["Momentum wins in every comparison."]
    assert said(slow, [0.5] * 10) == nothing
    assert said([0.5] * 10, slow) == nothing
    assert said(slow[:40], [0.5] * 20 + [0.95]) == wins
    assert said(slow, [0.5] * 20 + [0.95] * 180) == wins
    assert "it reaches 90% no sooner" in said(slow, [0.5] * 35)[-1]
    assert "ours): it ends 1.00 points lower." in said(slow, [0.95] * 20 + [0.94] * 180)[-1]
    assert said(slow[:100], [0.95] * 20 + [0.94] * 80) == wins  # who ends lower is open


@pytest.mark.usefixtures("small")
def test_the_table(tmp_path, capsys):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    for beta in (1.0, 0.5):
        reproduce("mnist", run_dir=ours / f"beta{beta}", **{**KEYS, "beta": beta})
        name = "SGD_lr_0.1" if beta == 1 else "SGDM_lr_0.1_beta_0.5"
        text = (ours / f"beta{beta}" / "metrics.csv").read_text()
        (theirs / f"MNIST_A_512512_penalty_0.0_e_200_N_6_{name}_TopK_20_seed_0.csv").write_text(text)
    path = table(theirs, ours)
    text = path.read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("| mnist")]
    assert len(lines) == 2
    assert all("| 0.0e+00 | — | 0 | 0 |" in line for line in lines)  # of 6 epochs, not of 10
    assert "There are no runs to compare momentum with SGD." in text
    assert "not in 6" in lines[0]
    assert (ours / "figures" / "mnist-n6-lr0.1-topk-20.png").stat().st_size > 10_000
    metrics = ours / "beta0.5" / "metrics.csv"
    metrics.write_text(metrics.read_text() + "6,2.1,0.")  # a run under way
    assert table(theirs, ours).read_text(encoding="utf-8") == text
    shutil.copytree(ours / "beta0.5", ours / "copy")
    with pytest.raises(ValueError, match=r"beta0\.5 and .*copy are runs with the same settings and seed"):
        table(theirs, ours)
    shutil.rmtree(ours / "copy")
    next(theirs.iterdir()).write_text("x")
    with pytest.raises(ValueError, match=r"seed_0\.csv holds no epochs: it is cut short or damaged"):
        table(theirs, ours)
    with pytest.raises(ValueError, match="none of the authors' results"):
        table(ours, ours)
    with pytest.raises(ValueError, match="no run of `metamom reproduce`"):
        table(theirs, theirs)
