"""The published recipes as data: each setting with where it is published. Needs no torch, so that help is fast.

To add a method, add a `Published` record to `OMNIGLOT` or `SINUSOID`. Its settings are options of
`metamom.experiments.recipes.Recipe`. A fact that several methods share is written once, above them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from metamom.experiments.published.record import BUDGETS, ROWS, Budget, Figure, Published, Row, Setting, Settings

__all__ = [
    "BUDGETS",
    "OMNIGLOT",
    "OPTIMIZERS",
    "ROWS",
    "SINUSOID",
    "STEP_SIZES",
    "Budget",
    "Figure",
    "Published",
    "Row",
    "Setting",
]

OPTIMIZERS = ("adam", "sgd", "composite")

# Papers and their code, as sources name them.
MAML = "Finn, Abbeel and Levine (2017), arXiv 1703.03400"
APPENDIX = f"{MAML}, appendix A.1"
SECTION_5_1 = f"{MAML}, section 5.1"
MAML_CODE = "the authors' code, github.com/cbfinn/maml, main.py"
META_SGD = "Li, Zhou, Chen and Li (2017), arXiv 1707.09835"
ANIL = "Raghu, Raghu, Bengio and Vinyals (2020), arXiv 1909.09157"
IMAML = "Rajeswaran, Finn, Kakade and Levine (2019), arXiv 1909.04630"
IMAML_CODE = "the authors' code, github.com/aravindr93/imaml_dev, examples/README.md"
PLUS = "Antoniou, Edwards and Storkey (2019), arXiv 1810.09502"
PLUS_CODE = "the authors' code, github.com/AntreasAntoniou/HowToTrainYourMAMLPytorch, experiment_config/omniglot_maml++"
# Reasons for values that no paper gives.
OURS = "our choice"
AS_MAML = "as MAML's, which the paper compares with"
EQUAL = f"{OURS}: MAML's, to compare on equal budgets"


def _as_in(setting: Setting, why: str) -> Setting:
    """The value of another recipe, and why it is taken."""
    return setting._replace(source=why)


def _by_row(*figures: Figure | None) -> dict[str, Figure]:
    """Published accuracies in the order of `ROWS`; ``None`` where the paper has none."""
    return {row: figure for row, figure in zip(ROWS, figures, strict=True) if figure is not None}


def _meta_sgd(inner_lr: float) -> dict[str, Setting]:
    """The adaptation of Meta-SGD from this step size."""
    return {
        "learn_inner_lr": Setting("entry", f"{META_SGD}, equation 2"),
        "inner_lr": Setting(inner_lr, f"{OURS}, for all entries; the paper draws them from [0.005, 0.1]"),
        "inner_steps": _ONE_STEP,
    }


# Settings that several records have.
_META_LR = Setting(0.001, f"{MAML_CODE}, meta_lr")
_FIRST_ORDER = Setting("first-order", f"{MAML}, section 5.2")
_ONE_STEP = Setting(1, f"{META_SGD}, which adapts in one step")
_SOLVED = Setting(1, "one solution of the proximal problem, as in training")
_FIVE = Setting(5, f"{PLUS_CODE}: number_of_training_steps_per_iter, number_of_evaluation_steps_per_iter")
_PARTS_OF_PLUS: Settings = {  # but for those of batch normalisation
    "optimizer": Setting("adam", f"{PLUS}, section 5"),
    "lr": Setting(0.001, f"{PLUS_CODE}: meta_learning_rate"),
    "schedule": Setting("cosine", f"{PLUS}, section 4, from 0.001; here to 0 instead of 0.00001"),
    "learn_inner_lr": Setting("tensor-step", f"{PLUS}, section 4: for each layer and step"),
    "inner_steps": _FIVE,
}
_MULTI_STEP = Setting(10 / 150, f"{PLUS_CODE}: multi_step_loss_num_epochs 10, of the paper's 150")

_OMNIGLOT_MAML = Published(
    title="MAML",
    paper=MAML,
    settings={"optimizer": Setting("adam", f"{MAML}, section 5.2; {MAML_CODE}"), "lr": _META_LR},
    iterations=Setting(60_000, APPENDIX),
    meta_batch={5: Setting(32, APPENDIX), 20: Setting(16, APPENDIX)},
    of_ways={
        5: {"inner_lr": Setting(0.4, APPENDIX), "inner_steps": Setting(1, APPENDIX)},
        20: {"inner_lr": Setting(0.1, APPENDIX), "inner_steps": Setting(5, APPENDIX)},
    },
    test_steps={5: Setting(3, APPENDIX), 20: Setting(5, APPENDIX)},
    figures=_by_row(Figure(98.7, 0.4), Figure(99.9, 0.1), Figure(95.8, 0.3), Figure(98.9, 0.2)),
)
_COMPARED_WITH_MAML = replace(  # on its budget
    _OMNIGLOT_MAML,
    iterations=_as_in(_OMNIGLOT_MAML.iterations, AS_MAML),
    meta_batch={ways: _as_in(tasks, AS_MAML) for ways, tasks in _OMNIGLOT_MAML.meta_batch.items()},
)

OMNIGLOT: Mapping[str, Published] = {
    "maml": _OMNIGLOT_MAML,
    "fomaml": replace(
        _OMNIGLOT_MAML,
        title="first-order MAML",
        settings={**_OMNIGLOT_MAML.settings, "estimator": _FIRST_ORDER},
        figures=_by_row(Figure(98.3, 0.5), Figure(99.2, 0.2), Figure(89.4, 0.5), Figure(97.9, 0.1)),
    ),
    "meta-sgd": replace(
        _COMPARED_WITH_MAML,
        title="Meta-SGD",
        paper=META_SGD,
        settings={**_OMNIGLOT_MAML.settings, **_meta_sgd(0.1)},
        of_ways={},
        test_steps={5: _ONE_STEP, 20: _ONE_STEP},
        figures=_by_row(Figure(99.53, 0.26), Figure(99.93, 0.09), None, None),
    ),
    "anil": replace(
        _COMPARED_WITH_MAML,
        title="ANIL",
        paper=ANIL,
        settings={
            **_OMNIGLOT_MAML.settings,
            "adapt": Setting(("head",), "the method: the body stays as it is in adaptation"),
        },
        support_passes={5: 1, 20: 1},
        figures=_by_row(None, None, Figure(96.2), Figure(98.0)),
    ),
    "imaml": Published(
        title="implicit MAML",
        paper=IMAML,
        settings={
            "optimizer": Setting("adam", f"{IMAML}, section 4"),
            "lr": Setting(0.001, f"{IMAML_CODE}: outer_lr"),
            "estimator": Setting("implicit", f"{IMAML}, section 3"),
        },
        iterations=Setting(20_000, f"{IMAML_CODE}: meta_steps, at least so many"),
        meta_batch={5: Setting(32, f"{IMAML_CODE}: task_mb_size"), 20: _COMPARED_WITH_MAML.meta_batch[20]},
        of_ways={
            5: {"proximal": Setting("2,iterations=16,cg_iterations=5", f"{IMAML_CODE}: lam, n_steps, cg_steps")},
            20: {"proximal": Setting("2,iterations=25,cg_iterations=5", f"{IMAML}, appendix: 25 steps")},
        },
        support_passes={5: 18, 20: 25},  # these two fit the time of the four rows
        class_passes={5: 63, 20: 28},
        test_steps={5: _SOLVED, 20: _SOLVED},
        figures=_by_row(Figure(99.5, 0.26), Figure(99.74, 0.11), Figure(96.18, 0.36), Figure(99.14, 0.1)),
    ),
    "maml++": Published(
        title="MAML++",
        paper=PLUS,
        settings={
            **_PARTS_OF_PLUS,
            "step_norms": Setting(True, f"{PLUS}, section 4: scale and offset for each step"),
            "inner_lr": Setting(0.1, f"{PLUS_CODE}: init_inner_loop_learning_rate"),
            "queries": Setting(1, f"{PLUS_CODE}: num_target_samples"),
        },
        iterations=Setting(75_000, f"{PLUS}, section 5: 150 epochs of 500 iterations"),
        meta_batch={5: Setting(16, f"{PLUS}, section 5"), 20: Setting(8, f"{PLUS}, section 5")},
        shares={
            "multi_step": _MULTI_STEP,
            "first_order_until": Setting(
                50 / 150, f"{PLUS}, section 4: 50 epochs; the authors' code has none on Omniglot"
            ),
        },
        test_steps={5: _FIVE, 20: _FIVE},
        figures=_by_row(Figure(99.47), Figure(99.93), Figure(97.65, 0.05), Figure(99.33, 0.03)),
    ),
}
"""The methods on Omniglot, by the name that ``--recipe`` gives them."""

_SINUSOID_MAML = Published(
    title="MAML",
    paper=MAML,
    settings={
        "optimizer": Setting("adam", SECTION_5_1),
        "lr": _META_LR,
        "inner_lr": Setting(0.01, SECTION_5_1),
        "inner_steps": Setting(1, SECTION_5_1),
        "shots": Setting(10, f"{SECTION_5_1}: one network, trained with 10 points, is tested with 5 and with 10"),
        "queries": Setting(10, f"{MAML_CODE}: as many as shots"),
    },
    iterations=Setting(70_000, MAML_CODE),
    meta_batch={None: Setting(25, MAML_CODE)},
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
        paper=META_SGD,
        settings={**{name: _SINUSOID_MAML.settings[name] for name in ("optimizer", "lr")}, **_meta_sgd(0.01)},
        iterations=_as_in(_SINUSOID_MAML.iterations, EQUAL),
        meta_batch={None: _as_in(_SINUSOID_MAML.meta_batch[None], EQUAL)},
        points=((5, 1, 0.46),),
        same_shots=True,
    ),
    "maml++": replace(
        _SINUSOID_MAML,
        title="MAML++",
        paper=PLUS,
        settings={
            **_SINUSOID_MAML.settings,
            **_PARTS_OF_PLUS,
            "positive_inner_lr": Setting(
                True, f"{OURS}: at Adam's 0.001, inner step sizes of 0.01 become negative and the loss overflows"
            ),
        },
        iterations=_as_in(_SINUSOID_MAML.iterations, f"{EQUAL}; the paper has no sinusoids"),
        shares={"multi_step": _MULTI_STEP},  # a first-order start diverges here (docs/results)
        points=(),
    ),
}
"""The methods on sinusoids, by the name that ``--recipe`` gives them."""

STEP_SIZES: Mapping[str, Mapping[str, Setting]] = {
    "omniglot": dict.fromkeys(("sgd", "composite"), Setting(0.5, f"{OURS}, docs/results/omniglot.md")),
    "sinusoid": dict.fromkeys(("sgd", "composite"), Setting(0.1, f"{OURS}, docs/results/sinusoids.md")),
}
"""γ of the outer optimizers that are not the papers', by task."""
