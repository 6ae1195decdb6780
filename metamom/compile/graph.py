"""Compile a meta-gradient into one graph, and decide whether compiling pays off."""

from __future__ import annotations

import importlib.util
import math
import re
import threading
import time
import warnings
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from metamom.common.choices import CompileMode as CompileMode
from metamom.common.user_code import users_level
from metamom.compile.tracing import tracing
from metamom.compile.values import reading_refused
from metamom.nets import kernels
from metamom.nets.kernels.build import CompilerError, find_compiler, gist
from metamom.nets.products import enlarge_products

# Assumed speed-up for "auto". On two cores a compiled meta-gradient was 2.6 times (Conv4) to 10 times (an MLP) as fast
# as an eager one; see docs/performance/tried.md.
SPEED_UP = 2.5
FIRST_CALLS = 3  # eager calls to time before deciding
GRAPHS_KEPT = 16  # the most recently used ones
GRAPHS_TO_WONDER_AT = 8
_ONE_AT_A_TIME = threading.RLock()  # tracing replaces functions of PyTorch for all threads

Graph = Callable[..., tuple[Tensor, ...]]


def check_compiler(device: torch.device) -> None:
    """Check that graphs can be compiled for ``device``.

    Raises:
        CompilerError: with what is missing.
    """
    if device.type == "cpu":
        find_compiler()
    elif importlib.util.find_spec("triton") is None:
        raise CompilerError(
            f"compiling for {device.type} needs Triton. Install it (pip install triton), or run without compiling."
        )


@dataclass
class _Eager:
    """Statistics of eager calls, for "auto": their number, and the time of all but the first."""

    calls: int = 0
    seconds: float = 0.0


class Compiled:
    """A compiled function of tensors that differentiates inside. It is compiled once for each shape of its arguments.

    `torch.compile` cannot differentiate twice through a compiled graph. So the function is first traced to the
    operators that its derivatives consist of (`make_fx`), and TorchInductor compiles this derivative-free graph. On a
    CPU the graph contains metamom's own kernels.

    Args:
        function: maps tensors, numbers and dicts of tensors to a tuple of tensors. Numbers become constants, and the
            keys of dicts must not change. Tensors that are not arguments may change their values between calls, but not
            their shapes. The most recently used graphs are kept. Frequent recompilation gives one warning.
        mode: ``True`` compiles at the first call. ``"auto"`` runs the function eagerly until compiling pays off, that
            is, until the calls to come (`expected` if set, else as many as so far) would save more time than compiling
            takes. If compiling fails for any reason, it warns once and does not try again.
        cost: rough time to compile once, in seconds; for ``"auto"``.

    Raises:
        CompilerError: at the first call, if ``mode`` is ``True`` and there is no compiler, or TorchInductor fails.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        mode: CompileMode,
        cost: float,
    ) -> None:
        self.function = function
        self.mode = mode
        self.cost = cost
        self.expected: int | None = None
        self.compiled = 0
        self.graphs: dict[Any, Graph] = {}
        self.eager: dict[Any, _Eager] = {}

    def __call__(
        self, settings: Hashable, *args: Any, note: Callable[[Graph], None] | None = None
    ) -> tuple[Tensor, ...]:
        """Call the function.

        Args:
            settings: everything else that the function depends on; each new value causes a recompilation.
            args: the function's arguments.
            note: gets the graph, if one runs: a function of the tensors among the arguments. It can be called again,
                under `torch.no_grad`, in place of this function while nothing changes but values.
        """
        leaves: list[Any] = []
        for arg in args:
            leaves.extend(arg.values()) if isinstance(arg, dict) else leaves.append(arg)
        key = (settings, *[_kind(leaf) for leaf in leaves])
        graph = self.graphs.get(key)
        if graph is None:
            if self.mode == "auto" and not self._pays(key):
                return self._timed(key, args)
            try:
                with _ONE_AT_A_TIME:
                    graph = self.graphs.get(key)  # another thread may have compiled it
                    if graph is None:
                        graph = self._compile(args)
                        self._count()
            except Exception as error:  # of any kind, since the eager function has just worked and still does
                if self.mode != "auto":
                    raise
                said = error if isinstance(error, CompilerError) else f"{type(error).__name__}: {error}"
                warnings.warn(f'compile="auto" continues without compiling: {said}', stacklevel=users_level())
                self.cost = math.inf
                return self._timed(key, args)
        if next(reversed(self.graphs.values()), None) is not graph:
            self.graphs.pop(key, None)
            self.graphs[key] = graph  # most recently used, so the last to be dropped
            if len(self.graphs) > GRAPHS_KEPT:
                del self.graphs[next(iter(self.graphs))]
        with torch.no_grad():
            try:
                found = graph(*[leaf for leaf in leaves if isinstance(leaf, Tensor)])
            except RuntimeError:
                self.function(*args)  # its error says more about what is wrong with these arguments
                raise
        if note is not None:
            note(graph)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Leave out compiled graphs, which are tied to this process. A copy recompiles."""
        return {**self.__dict__, "graphs": {}, "eager": {}}

    def _count(self) -> None:
        """Warn once if the function is recompiled too often."""
        self.compiled += 1
        if self.compiled == GRAPHS_TO_WONDER_AT:
            warnings.warn(
                f"the meta-gradient has been compiled {self.compiled} times, which takes seconds each time: "
                "something that it depends on changes from call to call. Keep the shape of the batches fixed; change "
                "buffers and frozen parameters in place (buffer.copy_(...)); do not replace them, the loss, a module "
                "or a hook; or run without compiling.",
                stacklevel=users_level(),
            )

    def _pays(self, key: Any) -> bool:
        """Whether the calls to come would save more time than compiling takes."""
        watched = self.eager.setdefault(key, _Eager())
        if watched.calls < FIRST_CALLS:
            return False
        each = watched.seconds / (watched.calls - 1)
        to_come = watched.calls if self.expected is None else self.expected
        return to_come * each * (1 - 1 / SPEED_UP) > self.cost

    def _timed(self, key: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        watched = self.eager[key]
        began = time.perf_counter()
        result = self.function(*args)
        if result[0].is_cuda:  # only queued so far
            torch.cuda.synchronize(result[0].device)
        if watched.calls > 0:
            watched.seconds += time.perf_counter() - began
        watched.calls += 1
        return result

    def _compile(self, args: tuple[Any, ...]) -> Graph:
        # imported here, since they take as long to import as all of torch, and most runs do not compile
        from torch import _inductor as inductor
        from torch._guards import TracingContext
        from torch._guards import tracing as within
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx

        leaves, spec = pytree.tree_flatten(args)
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        check_compiler(tensors[0].device)

        def flat(*given: Tensor) -> tuple[Tensor, ...]:
            rest = iter(given)
            with reading_refused():
                return self.function(
                    *pytree.tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in leaves], spec)
                )

        finding = _find_vector_instructions() if tensors[0].device.type == "cpu" else None
        drawn = [tensors[0].device] if tensors[0].is_cuda else []
        try:
            # One mode for the shapes of all nodes: make_fx would create one for each, which takes half of its time.
            shapes = within(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))
            # a model may draw while it is traced
            with torch.random.fork_rng(devices=drawn), kernels.native(tensors[0].device), tracing(), shapes:
                graph = make_fx(flat)(*tensors)
        except Exception:
            self.function(*args)  # it sees values, so its error says more about what is wrong
            raise
        enlarge_products(graph)
        options = _options(graph, tensors[0].device)
        if finding is not None:
            finding.join()
        while True:
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=drawn):
                    compiled: Graph = inductor.compile(graph, list(tensors), options)
            except Exception as error:
                if not _forget_damaged(error):
                    cause = getattr(error, "inner_exception", error)
                    raise CompilerError(
                        f"TorchInductor cannot compile this meta-gradient: {type(cause).__name__}: "
                        f"{gist(str(cause))}. Check that the compiler works and the disk has space, or run without "
                        "compiling."
                    ) from error
            else:
                return compiled


def _find_vector_instructions() -> threading.Thread:
    """Start a thread that finds out which vector instructions the compiler supports, and return it.

    That takes seconds in other processes, in which this one can trace. TorchInductor keeps the answer for later.
    """
    from torch._inductor import codecache as codecache  # the thread must not import
    from torch._inductor import cpp_builder as cpp_builder
    from torch._inductor import cpu_vec_isa

    def find() -> None:
        with suppress(Exception):  # TorchInductor tries again later, and raises the error then
            cpu_vec_isa.valid_vec_isa_list()

    thread = threading.Thread(target=find, daemon=True)
    thread.start()
    return thread


def _options(graph: fx.GraphModule, device: torch.device) -> dict[str, Any]:
    """Options for TorchInductor. Also removes the metadata that tracing has left on nodes; Inductor adds its own."""
    own_kernels = False
    for node in graph.graph.nodes:
        node.meta.clear()
        own_kernels = own_kernels or getattr(node.target, "namespace", None) == "metamom"
    # Use C++ for the calls between kernels too. It can only call PyTorch's own operators.
    return {"cpp_wrapper": device.type == "cpu" and not own_kernels}


def _forget_damaged(error: Exception) -> bool:
    """Delete a library that TorchInductor could not load, if it is one of its own that an interrupt truncated.

    Returns:
        Whether it was deleted. Compiling again then rebuilds it.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    named = re.search(r"(\S+\.so): (file too short|invalid ELF header)", str(error))
    path = Path(named[1]) if named else None
    if path is None or not path.is_relative_to(cache_dir()) or not path.is_file():
        return False
    path.unlink()
    return True


def _kind(leaf: Any) -> Hashable:
    """The key of an argument for a compiled graph: a number itself, or everything about a tensor except its values."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    hashable: Hashable = leaf
    return hashable
