"""Aliases for modules under their earlier names: ``metamom.layers``, in version 0.1, is ``metamom.nets.layers``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_ROOMS = {
    "common": "allocator averaged checks files flag_types intervals numbers reading schema",
    "maml": "autocast estimators inner_step metrics selection tracking vmap_errors",
    "maml.checks": "batch_checks loss_readings misfits model_checks unused",
    "maml.running": "run_by_task swapping",
    "maml.under_vmap": "draws functions_by_task",
    "nets": "kernels kernels.build kernels.reference layers products",
    "server": "accumulator aggregate robust",
    "training": "checkpoints contents interrupts plan progress restore",
    "diagnostics": "sources",
    "cli": "flags",
}
_ROOMS_OF_MAML = {
    "checks": "batch_checks carried_over class_scores hooks loss_readings loss_state misfits model_checks "
    "not_finite pairings unused",
    "fast_paths": "at_once fingerprint in_turn last_step settled",
    "implicit": "conjugate_gradients lbfgs perturbed proximal proximal_adaptation proximal_step solves",
    "learners": "boil kinds protomaml prototypes reptile",
    "normalisation": "norm norm_modes step_norms",
    "running": "loop_preferred one_task plain_autograd run_by_task swapping vectorize",
    "steps": "federation following hessian local_steps server_step training_loss",
    "under_vmap": "attention_by_task batched drawing_functions draws embeddings_by_task filled_by_task "
    "functions_by_task layouts_by_task losses_by_task written_losses",
}
_SHARED = ("figures", "parts", "peak", "processes")
MOVED = {f"metamom.{name}": f"metamom.{room}.{name}" for room, names in _ROOMS.items() for name in names.split()} | {
    "metamom.checkpoint_ensemble": "metamom.ensemble",
    "metamom.chunks": "metamom.maml.chunking",
    "metamom.compiled": "metamom.compile.graph",
    "metamom.counter": "metamom.rng",
    "metamom.differences": "metamom.maml.finite_differences",
    "metamom.learner_options": "metamom.maml.options",
    "metamom.run_directory": "metamom.training.directory",
    "metamom.slope": "metamom.diagnostics.power_law",
    "metamom.start": "metamom.maml.task_weights",
    "metamom.step_sizes": "metamom.maml.inner_lr",
    "metamom.watch": "metamom.training.stall",
    **{
        f"metamom.maml.{name}": f"metamom.maml.{room}.{name}"
        for room, names in _ROOMS_OF_MAML.items()
        for name in names.split()
    },
    **{f"metamom.experiments.{name}": f"metamom.experiments.shared.{name}" for name in _SHARED},
}


class _Finder(MetaPathFinder, Loader):
    """Finds a module under its old name. It is the same module object as under the new name."""

    def __init__(self) -> None:
        self.specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(MOVED[spec.name])
        self.specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which the import under the old name has replaced."""
        assert module.__spec__ is not None
        module.__spec__ = self.specs.pop(module.__spec__.name)


def install() -> None:
    """Make modules importable under their old names."""
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
