"""The published recipes as data: each setting with where it is published. Needs no torch, so that help is fast.

To add a method, add a `Published` record to `OMNIGLOT` or `SINUSOID`. Its settings are options of
`metamom.experiments.recipes.Recipe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

Budget = Literal["short", "published"]
BUDGETS: tuple[Budget, ...] = ("short", "published")
OPTIMIZERS = ("adam", "sgd", "composite")


class Row(NamedTuple):
    """A column of the papers' tables: N-way K-shot tasks.

    Attributes:
        ways: classes of a task.
        shots: support images of a class.
    """

    ways: int
    shots: int


ROWS = {"5w1s": Row(5, 1), "5w5s": Row(5, 5), "20w1s": Row(20, 1), "20w5s": Row(20, 5)}


class Setting(NamedTuple):
    """A value and where it comes from: a place in a paper or its code, or why we chose it."""

    value: Any
    source: str


Settings = Mapping[str, Setting]


class Figure(NamedTuple):
    """A published accuracy in per cent, with the interval that its paper gives; ``None`` if it gives none."""

    mean: float
    halfwidth: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:g}" if self.halfwidth is None else f"{self.mean:g} ± {self.halfwidth:g}"


@dataclass(frozen=True)
class Published:
    """A method as its paper trained and tested it on one kind of tasks.

    Attributes:
        title: of the method.
        paper: where it was published.
        settings: options of a `Recipe`, for all rows.
        iterations: of the published budget.
        meta_batch: tasks an iteration in the published budget, by ways (``None`` for tasks without classes).
        of_ways: further options of a `Recipe`, by ways.
        shares: options of a `Recipe` that are numbers of iterations, as shares of all of them.
        support_passes: what an iteration costs, in passes of each support image, by ways; where it does not say, two
            for each inner step.
        test_steps: adaptation steps of the published figures, by ways.
        figures: the published accuracies, by row.
        points: published mean squared errors of sinusoids: ``(test shots, adaptation steps, error)``.
        same_shots: whether a network is trained on as many shots as it is tested on; otherwise the settings have the
            shots of training.
    """

    title: str
    paper: str
    settings: Settings
    iterations: Setting
    meta_batch: Mapping[int | None, Setting]
    of_ways: Mapping[int | None, Settings] = field(default_factory=dict)
    shares: Settings = field(default_factory=dict)
    support_passes: Mapping[int | None, int] = field(default_factory=dict)
    test_steps: Mapping[int | None, Setting] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    points: tuple[tuple[int, int, float], ...] = ()
    same_shots: bool = True

    def options(self, ways: int | None) -> dict[str, Any]:
        """The options of a `Recipe` for tasks of so many classes, without the meta-batch."""
        return {name: setting.value for name, setting in {**self.settings, **self.of_ways.get(ways, {})}.items()}

    def sources(self, ways: int | None) -> dict[str, str]:
        """Where each value comes from, by its name."""
        found = {**self.settings, **self.of_ways.get(ways, {}), **self.shares, "iterations": self.iterations}
        found |= {"meta_batch": self.meta_batch[ways]}
        if ways in self.test_steps:
            found["test_steps"] = self.test_steps[ways]
        return {name: setting.source for name, setting in found.items()}


MAML = "Finn, Abbeel and Levine (2017), arXiv 1703.03400"
APPENDIX = f"{MAML}, appendix A.1"
SECTION_5_1 = f"{MAML}, section 5.1"
AUTHORS_CODE = "the authors' code, github.com/cbfinn/maml, main.py"
AS_MAML = "as MAML's, which the paper compares with"
OURS = "our choice"

_OMNIGLOT_MAML = Published(
    title="MAML",
    paper=MAML,
    settings={
        "optimizer": Setting("adam", f"{MAML}, section 5.2; {AUTHORS_CODE}"),
        "lr": Setting(0.001, f"{AUTHORS_CODE}, meta_lr"),
    },
    iterations=Setting(60_000, APPENDIX),
    meta_batch={5: Setting(32, APPENDIX), 20: Setting(16, APPENDIX)},
    of_ways={
        5: {"inner_lr": Setting(0.4, APPENDIX), "inner_steps": Setting(1, APPENDIX)},
        20: {"inner_lr": Setting(0.1, APPENDIX), "inner_steps": Setting(5, APPENDIX)},
    },
    test_steps={5: Setting(3, APPENDIX), 20: Setting(5, APPENDIX)},
    figures={
        "5w1s": Figure(98.7, 0.4),
        "5w5s": Figure(99.9, 0.1),
        "20w1s": Figure(95.8, 0.3),
        "20w5s": Figure(98.9, 0.2),
    },
)
_FIRST_ORDER = Setting("first-order", f"{MAML}, section 5.2")
_META_SGD = "Li, Zhou, Chen and Li (2017), arXiv 1707.09835"
_ONE_STEP = Setting(1, f"{_META_SGD}, which adapts in one step")
_IMAML = "Rajeswaran, Finn, Kakade and Levine (2019), arXiv 1909.04630"
_IMAML_CODE = "the authors' code, github.com/aravindr93/imaml_dev, examples/README.md"
_SOLVED = Setting(1, "one solution of the proximal problem, as in training")
_PLUS = "Antoniou, Edwards and Storkey (2019), arXiv 1810.09502"
_PLUS_CODE = (
    "the authors' code, github.com/AntreasAntoniou/HowToTrainYourMAMLPytorch, experiment_config/omniglot_maml++"
)
_FIVE = Setting(5, f"{_PLUS_CODE}: number_of_training_steps_per_iter, number_of_evaluation_steps_per_iter")
_PARTS_OF_PLUS = {  # but for those of batch normalisation
    "optimizer": Setting("adam", f"{_PLUS}, section 5"),
    "lr": Setting(0.001, f"{_PLUS_CODE}: meta_learning_rate"),
    "schedule": Setting("cosine", f"{_PLUS}, section 4, from 0.001; here to 0 instead of 0.00001"),
    "learn_inner_lr": Setting("tensor-step", f"{_PLUS}, section 4: for each layer and step"),
    "inner_steps": _FIVE,
}
_SHARES_OF_PLUS = {
    "multi_step": Setting(10 / 150, f"{_PLUS_CODE}: multi_step_loss_num_epochs 10, of the paper's 150"),
    "first_order_until": Setting(50 / 150, f"{_PLUS}, section 4: 50 epochs; the authors' code has none on Omniglot"),
}

OMNIGLOT: Mapping[str, Published] = {
    "maml": _OMNIGLOT_MAML,
    "fomaml": replace(
        _OMNIGLOT_MAML,
        title="first-order MAML",
        settings={**_OMNIGLOT_MAML.settings, "estimator": _FIRST_ORDER},
        figures={
            "5w1s": Figure(98.3, 0.5),
            "5w5s": Figure(99.2, 0.2),
            "20w1s": Figure(89.4, 0.5),
            "20w5s": Figure(97.9, 0.1),
        },
    ),
    "meta-sgd": replace(
        _OMNIGLOT_MAML,
        title="Meta-SGD",
        paper=_META_SGD,
        settings={
            **_OMNIGLOT_MAML.settings,
            "learn_inner_lr": Setting("entry", f"{_META_SGD}, equation 2"),
            "inner_lr": Setting(0.1, f"{OURS}, for all entries; the paper draws them from [0.005, 0.1]"),
            "inner_steps": _ONE_STEP,
        },
        iterations=Setting(60_000, AS_MAML),
        meta_batch={5: Setting(32, AS_MAML), 20: Setting(16, AS_MAML)},
        of_ways={},
        test_steps={5: _ONE_STEP, 20: _ONE_STEP},
        figures={"5w1s": Figure(99.53, 0.26), "5w5s": Figure(99.93, 0.09)},
    ),
    "anil": replace(
        _OMNIGLOT_MAML,
        title="ANIL",
        paper="Raghu, Raghu, Bengio and Vinyals (2020), arXiv 1909.09157",
        settings={
            **_OMNIGLOT_MAML.settings,
            "adapt": Setting(("head",), "the method: the body stays as it is in adaptation"),
        },
        support_passes={5: 1, 20: 1},
        iterations=Setting(60_000, AS_MAML),
        meta_batch={5: Setting(32, AS_MAML), 20: Setting(16, AS_MAML)},
        figures={"20w1s": Figure(96.2), "20w5s": Figure(98.0)},
    ),
    "imaml": Published(
        title="implicit MAML",
        paper=_IMAML,
        settings={
            "optimizer": Setting("adam", f"{_IMAML}, section 4"),
            "lr": Setting(0.001, f"{_IMAML_CODE}: outer_lr"),
            "estimator": Setting("implicit", f"{_IMAML}, section 3"),
        },
        iterations=Setting(20_000, f"{_IMAML_CODE}: meta_steps, at least so many"),
        meta_batch={5: Setting(32, f"{_IMAML_CODE}: task_mb_size"), 20: Setting(16, AS_MAML)},
        of_ways={
            5: {"proximal": Setting("2,iterations=16,cg_iterations=5", f"{_IMAML_CODE}: lam, n_steps, cg_steps")},
            20: {"proximal": Setting("2,iterations=25,cg_iterations=5", f"{_IMAML}, appendix: 25 steps")},
        },
        support_passes={5: 65, 20: 90},  # 16 and 25 gradients, 5 Hessian-vector products, and the solver's own work
        test_steps={5: _SOLVED, 20: _SOLVED},
        figures={
            "5w1s": Figure(99.5, 0.26),
            "5w5s": Figure(99.74, 0.11),
            "20w1s": Figure(96.18, 0.36),
            "20w5s": Figure(99.14, 0.1),
        },
    ),
    "maml++": Published(
        title="MAML++",
        paper=_PLUS,
        settings={
            **_PARTS_OF_PLUS,
            "step_norms": Setting(True, f"{_PLUS}, section 4: scale and offset for each step"),
            "inner_lr": Setting(0.1, f"{_PLUS_CODE}: init_inner_loop_learning_rate"),
            "queries": Setting(1, f"{_PLUS_CODE}: num_target_samples"),
        },
        iterations=Setting(75_000, f"{_PLUS}, section 5: 150 epochs of 500 iterations"),
        meta_batch={5: Setting(16, f"{_PLUS}, section 5"), 20: Setting(8, f"{_PLUS}, section 5")},
        shares=_SHARES_OF_PLUS,
        test_steps={5: _FIVE, 20: _FIVE},
        figures={
            "5w1s": Figure(99.47),
            "5w5s": Figure(99.93),
            "20w1s": Figure(97.65, 0.05),
            "20w5s": Figure(99.33, 0.03),
        },
    ),
}
"""The methods on Omniglot, by the name that ``--recipe`` gives them."""

_SINUSOID_MAML = Published(
    title="MAML",
    paper=MAML,
    settings={
        "optimizer": Setting("adam", SECTION_5_1),
        "lr": Setting(0.001, f"{AUTHORS_CODE}, meta_lr"),
        "inner_lr": Setting(0.01, SECTION_5_1),
        "inner_steps": Setting(1, SECTION_5_1),
        "shots": Setting(10, f"{SECTION_5_1}: one network, trained with 10 points, is tested with 5 and with 10"),
        "queries": Setting(10, f"{AUTHORS_CODE}: as many as shots"),
    },
    iterations=Setting(70_000, AUTHORS_CODE),
    meta_batch={None: Setting(25, AUTHORS_CODE)},
    points=((10, 1, 0.35), (10, 9, 0.2), (5, 1, 0.7), (5, 9, 0.35)),
    same_shots=False,
)

SINUSOID: Mapping[str, Published] = {
    "maml": _SINUSOID_MAML,
    "fomaml": replace(
        _SINUSOID_MAML,
        title="first-order MAML",
        settings={**_SINUSOID_MAML.settings, "estimator": _FIRST_ORDER},
        points=(),
    ),
    "meta-sgd": replace(
        _SINUSOID_MAML,
        title="Meta-SGD",
        paper=_META_SGD,
        settings={
            **{name: _SINUSOID_MAML.settings[name] for name in ("optimizer", "lr")},
            "learn_inner_lr": Setting("entry", f"{_META_SGD}, equation 2"),
            "inner_lr": Setting(0.01, f"{OURS}, for all entries; the paper draws them from [0.005, 0.1]"),
            "inner_steps": _ONE_STEP,
        },
        iterations=Setting(70_000, f"{OURS}: MAML's, to compare on equal budgets"),
        meta_batch={None: Setting(25, f"{OURS}: MAML's, to compare on equal budgets")},
        points=((5, 1, 0.46),),
        same_shots=True,
    ),
    "maml++": replace(
        _SINUSOID_MAML,
        title="MAML++",
        paper=_PLUS,
        settings={
            **_SINUSOID_MAML.settings,
            **_PARTS_OF_PLUS,
            "positive_inner_lr": Setting(
                True, f"{OURS}: at Adam's 0.001, inner step sizes of 0.01 become negative and the loss overflows"
            ),
        },
        iterations=Setting(70_000, f"{OURS}: MAML's, to compare on equal budgets; the paper has no sinusoids"),
        shares={"multi_step": _SHARES_OF_PLUS["multi_step"]},  # a first-order start diverges here (docs/results)
        points=(),
    ),
}
"""The methods on sinusoids, by the name that ``--recipe`` gives them."""

STEP_SIZES: Mapping[str, Mapping[str, Setting]] = {
    "omniglot": {
        "sgd": Setting(0.5, f"{OURS}, docs/results/omniglot.md"),
        "composite": Setting(0.5, f"{OURS}, docs/results/omniglot.md"),
    },
    "sinusoid": {
        "sgd": Setting(0.1, f"{OURS}, docs/results/sinusoids.md"),
        "composite": Setting(0.1, f"{OURS}, docs/results/sinusoids.md"),
    },
}
"""γ of the outer optimizers that are not the papers', by task."""
