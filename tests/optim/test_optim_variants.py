"""The variants of the momentum against plain loops, on problems with known gradients and Hessians."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from metamom import CompositeMomentum
from metamom.common.choices import FOLLOWING, VARIANTS
from metamom.optim.variants import extrapolated, transported_update

D, STEPS = 6, 8
BETAS = [0.3, 0.5, 0.2, 1.0, 0.7, 0.1, 0.4, 0.6]


def draws(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric matrices ``A_k``, vectors ``b_k`` and a start, in float64."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(STEPS, D, D, generator=g, dtype=torch.float64)
    b = torch.randn(STEPS, D, generator=g, dtype=torch.float64)
    return (A @ A.mT) / D, b, torch.randn(D, generator=g, dtype=torch.float64)


class Problem:
    """``1/2 w'Aw + b'w + scale sum w^4 / 4`` with other A and b in each step, over two parameters."""

    def __init__(self, scale: float = 0.1, *, one_matrix: bool = False) -> None:
        self.A, self.b, start = draws()
        if one_matrix:
            self.A = self.A[:1].expand_as(self.A)
        self.scale = scale
        self.params = [nn.Parameter(part.clone()) for part in start.split([2, 4])]
        self.start = start

    def loss(self, k: int) -> Tensor:
        w = torch.cat(list(self.params))
        return w @ self.A[k] @ w / 2 + self.b[k] @ w + self.scale * (w**4).sum() / 4

    def gradient(self, w: Tensor, k: int) -> Tensor:
        return self.A[k] @ w + self.b[k] + self.scale * w**3

    def hessian(self, w: Tensor, k: int) -> Tensor:
        return self.A[k] + torch.diag(3 * self.scale * w**2)

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach() for p in self.params])


def plain_loop(
    problem: Problem,
    variant: str,
    *,
    lr: float = 0.1,
    first_step: str = "zero",
    normalize: bool = False,
    sign: float = 1.0,
    decay: float = 0.0,
    betas: list[float] = BETAS,
) -> list[Tensor]:
    """The formulas of arXiv 2511.14501, on ``sign f(w) + decay/2 |w|^2``; the weights after each step."""

    def gradient(w: Tensor, k: int) -> Tensor:
        return sign * problem.gradient(w, k) + decay * w

    w, before, v = problem.start, problem.start, torch.zeros(D, dtype=torch.float64)
    found = []
    for k, beta in enumerate(betas):
        g = gradient(w + (1 - beta) / beta * (w - before) if variant == "igt" else w, k)
        if k == 0 and first_step == "gradient":
            v = g
        elif variant == "storm":
            v = g + (1 - beta) * (v - gradient(before, k))
        elif variant == "hessian":
            H = sign * problem.hessian(w, k) + decay * torch.eye(D, dtype=torch.float64)
            v = (1 - beta) * (v + H @ (w - before)) + beta * g
        else:
            v = (1 - beta) * v + beta * g
        before, w = w, w - lr * (v / v.norm() if normalize else v)
        found.append(w)
    return found


def closure_of(problem: Problem, optimizer: CompositeMomentum, k: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(k)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        graph = optimizer.variant == "hessian"
        for p, g in zip(params, torch.autograd.grad(loss, params, create_graph=graph), strict=True):
            p.grad = g
        return loss.detach()

    return closure


def run(problem: Problem, optimizer: CompositeMomentum, betas: list[float] = BETAS, first: int = 0) -> list[Tensor]:
    found = []
    for k, beta in enumerate(betas[first:], first):
        for group in optimizer.param_groups:
            group["beta"] = beta
        optimizer.step(closure_of(problem, optimizer, k))
        found.append(problem.weights)
    return found


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, k=k: f"step {k}: {text}")


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("first_step", ["zero", "gradient"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_trajectory_of_the_plain_loop(variant, first_step, normalize, foreach):
    problem = Problem()
    options = {"first_step": first_step, "normalize": normalize}
    optimizer = CompositeMomentum(problem.params, lr=0.1, variant=variant, foreach=foreach, **options)
    close(run(problem, optimizer), plain_loop(problem, variant, **options))


@pytest.mark.parametrize(("maximize", "decay"), [(True, 0.0), (False, 0.3), (True, 0.3)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_decay_is_a_part_of_the_function(variant, maximize, decay):
    """Also at the other points: the regularised function's trajectory."""
    problem = Problem()
    optimizer = CompositeMomentum(problem.params, lr=0.05, variant=variant, maximize=maximize, weight_decay=decay)
    close(run(problem, optimizer), plain_loop(problem, variant, lr=0.05, sign=-1.0 if maximize else 1.0, decay=decay))


@pytest.mark.parametrize("variant", VARIANTS)
def test_beta_1_is_plain_sgd_to_the_bit(variant):
    problem, twin = Problem(), Problem()
    run(problem, CompositeMomentum(problem.params, lr=0.1, variant=variant), [1.0] * STEPS)
    sgd = torch.optim.SGD(twin.params, lr=0.1)
    for k in range(STEPS):
        sgd.zero_grad()
        twin.loss(k).backward()
        sgd.step()
    assert torch.equal(problem.weights, twin.weights)


def test_heavy_ball_is_the_default_to_the_bit():
    problem, twin = Problem(), Problem()
    run(problem, CompositeMomentum(problem.params, lr=0.1, variant="heavy-ball"))
    run(twin, CompositeMomentum(twin.params, lr=0.1))
    assert torch.equal(problem.weights, twin.weights)


def test_storm_and_hessian_are_one_method_on_quadratics():
    problem, twin = Problem(scale=0.0), Problem(scale=0.0)
    ours = run(problem, CompositeMomentum(problem.params, lr=0.1, variant="storm"))
    close(ours, run(twin, CompositeMomentum(twin.params, lr=0.1, variant="hessian")))


@pytest.mark.parametrize("variant", FOLLOWING)
def test_on_a_quadratic_v_is_an_average_of_gradients_at_the_current_point(variant):
    """``f(w; xi_k) = 1/2 w'Aw + b_k'w``: the lag vanishes, ``v_k = A w_k + (the average of b_0, ..., b_k)``."""
    problem = Problem(scale=0.0, one_matrix=True)
    optimizer = CompositeMomentum(problem.params, lr=0.1, variant=variant, first_step="gradient")
    mean = problem.b[0]
    for k, beta in enumerate(BETAS):
        at = problem.weights
        for group in optimizer.param_groups:
            group["beta"] = beta
        optimizer.step(closure_of(problem, optimizer, k))
        mean = mean if k == 0 else (1 - beta) * mean + beta * problem.b[k]
        v = torch.cat([optimizer.state[p]["momentum"] for p in problem.params])
        torch.testing.assert_close(v, problem.A[0] @ at + mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_normalised_steps_have_length_lr(variant):
    problem = Problem()
    optimizer = CompositeMomentum(problem.params, lr=0.25, variant=variant, normalize=True)
    path = [problem.start, *run(problem, optimizer)]
    for a, b in itertools.pairwise(path):
        assert float((b - a).norm()) == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize("save", [True, False], ids=["saved", "copied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_state_goes_on_bit_for_bit(variant, save):
    whole = Problem()
    run(whole, CompositeMomentum(whole.params, lr=0.1, variant=variant))
    half = Problem()
    optimizer = CompositeMomentum(half.params, lr=0.1, variant=variant)
    run(half, optimizer, BETAS[:4])
    rest = Problem()
    with torch.no_grad():
        for p, q in zip(rest.params, half.params, strict=True):
            p.copy_(q)
    again = CompositeMomentum(rest.params, lr=0.5)
    state = optimizer.state_dict()
    if save:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    again.load_state_dict(copy.deepcopy(state))
    assert again.variant == variant
    run(rest, again, BETAS, first=4)
    assert torch.equal(rest.weights, whole.weights)


def test_closures_are_called_where_the_gradients_are_taken():
    problem = Problem()
    points: dict[str, list[Tensor]] = {}
    for variant in VARIANTS:
        problem = Problem()
        optimizer = CompositeMomentum(problem.params, lr=0.1, beta=0.25, variant=variant)
        optimizer.step(closure_of(problem, optimizer, 0))
        before, w, seen = problem.start, problem.weights, []
        inner = closure_of(problem, optimizer, 1)
        optimizer.step(lambda inner=inner, seen=seen, problem=problem: [seen.append(problem.weights), inner()][1])
        points[variant] = [x - w for x in seen]
        expected = {"igt": [3 * (w - before)], "storm": [before - w, torch.zeros_like(w)]}
        close(points[variant], expected.get(variant, [torch.zeros_like(w)]))


def test_a_closure_may_leave_the_gradients_uncleared():
    problem, twin = Problem(), Problem()
    optimizer = CompositeMomentum(problem.params, lr=0.1, variant="storm")
    for k, beta in enumerate(BETAS):
        optimizer.param_groups[0]["beta"] = beta
        optimizer.zero_grad()
        optimizer.step(lambda k=k: problem.loss(k).backward())
    run(twin, CompositeMomentum(twin.params, lr=0.1, variant="storm"))
    close([problem.weights], [twin.weights])


def test_random_layers_draw_the_same_at_both_points():
    """With the same dropout mask, STORM's change of a linear loss is zero."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.ones(50, dtype=torch.float64))
    optimizer = CompositeMomentum([p], lr=0.1, beta=0.5, variant="storm")

    def closure() -> float:
        optimizer.zero_grad()
        nn.functional.dropout(p, 0.5).sum().backward()
        return 0.0

    optimizer.step(closure)
    optimizer.evaluate(closure)
    assert optimizer._changes is not None
    assert not optimizer._changes[p].any()


def test_a_failing_closure_leaves_the_weights():
    problem = Problem()
    for variant in ("igt", "storm"):
        optimizer = CompositeMomentum(problem.params, lr=0.1, variant=variant)
        run(problem, optimizer, BETAS[:1])
        before = problem.weights

        def closure() -> float:
            raise RuntimeError("no data")

        with pytest.raises(RuntimeError, match="no data"):
            optimizer.step(closure)
        assert torch.equal(problem.weights, before)


def test_gradients_without_a_closure():
    for variant in ("igt", "storm"):
        problem = Problem()
        optimizer = CompositeMomentum(problem.params, lr=0.1, variant=variant)
        problem.loss(0).backward()
        with pytest.raises(ValueError, match=rf"variant='{variant}' takes gradients .* optimizer.step\(closure\)"):
            optimizer.step()
    optimizer = CompositeMomentum(problem.params, lr=0.1, variant="hessian")
    with pytest.raises(ValueError, match=r"call loss.backward\(create_graph=True\)"):
        optimizer.step()


def test_zero_grad_discards_what_was_evaluated():
    problem = Problem()
    optimizer = CompositeMomentum(problem.params, lr=0.1, variant="storm")
    optimizer.evaluate(closure_of(problem, optimizer, 0))
    optimizer.zero_grad()
    problem.loss(0).backward()
    with pytest.raises(ValueError, match="at two points"):
        optimizer.step()


def test_changes_computed_by_the_caller():
    problem = Problem()
    optimizer = CompositeMomentum(problem.params, lr=0.1, variant="hessian")
    for k, beta in enumerate(BETAS):
        optimizer.param_groups[0]["beta"] = beta
        optimizer.zero_grad()
        problem.loss(k).backward()
        previous = optimizer.previous()
        moved = [p.detach() - previous.get(p, p.detach()) for p in problem.params]
        change = problem.hessian(problem.weights, k) @ torch.cat(moved)
        optimizer.transport(dict(zip(problem.params, change.split([2, 4]), strict=True)))
        optimizer.step()
    close([problem.weights], plain_loop(problem, "hessian")[-1:])
    with pytest.raises(ValueError, match="only variants igt, storm, hessian change the momentum; got None"):
        CompositeMomentum(problem.params, lr=0.1).transport({})


@pytest.mark.parametrize("other", ["fused", "differentiable", "nesterov"])
@pytest.mark.parametrize("variant", FOLLOWING)
def test_options_that_exclude_each_other(variant, other):
    with pytest.raises(ValueError, match=f"variant='{variant}' has no form with {other}=True"):
        CompositeMomentum([nn.Parameter(torch.zeros(1))], lr=0.1, variant=variant, **{other: True})


def test_wrong_variants():
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    for wrong in ("svrg", 3, ["storm"]):
        with pytest.raises(ValueError, match="variant must be one of 'heavy-ball', 'igt', 'storm', 'hessian', or None"):
            CompositeMomentum([p], lr=0.1, variant=wrong)
    with pytest.raises(ValueError, match="take their gradient at one point"):
        CompositeMomentum([{"params": [p], "variant": "igt"}, {"params": [q]}], lr=0.1)
    optimizer = CompositeMomentum([p], lr=0.1)
    with pytest.raises(ValueError, match="at one point"):
        optimizer.add_param_group({"params": [q], "variant": "storm"})
    assert len(optimizer.param_groups) == 1


def test_a_state_without_the_previous_weights_is_refused():
    problem = Problem()
    optimizer = CompositeMomentum(problem.params, lr=0.1, variant="storm")
    run(problem, optimizer, BETAS[:2])
    state = optimizer.state_dict()
    del state["state"][1]["previous"]
    with pytest.raises(ValueError, match=r"no 'previous' of shape \(4,\) for parameter 1 of group 0"):
        CompositeMomentum(Problem().params, lr=0.1).load_state_dict(state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_that_only_makes_the_state(variant):
    """As torch.distributed.checkpoint takes one: with lr = 0 and zero gradients, without a closure."""
    problem, twin = Problem(), Problem()
    optimizer = CompositeMomentum(problem.params, lr=0.0, variant=variant)
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = {"momentum", "previous"} if variant in FOLLOWING else {"momentum"}
    assert all(set(optimizer.state[p]) == kept for p in problem.params)
    optimizer.param_groups[0]["lr"] = 0.1
    run(problem, optimizer)
    run(twin, CompositeMomentum(twin.params, lr=0.1, variant=variant))
    assert torch.equal(problem.weights, twin.weights)


def test_a_parameter_without_a_gradient_in_one_step():
    """w_prev are the weights of the last step for it too, so the momenta of the others follow exactly."""
    problem = Problem(scale=0.0)
    optimizer = CompositeMomentum(problem.params, lr=0.1, beta=0.5, variant="storm", first_step="gradient")
    first, second = problem.params
    for k in range(3):
        inner = closure_of(problem, optimizer, 0)

        def closure(inner=inner, k=k):
            inner()
            if k == 1:
                second.grad = None

        optimizer.step(closure)
    last = torch.cat([optimizer.previous()[p] for p in problem.params])
    assert not torch.equal(last, problem.weights)
    # from g_0, with exact changes of a fixed quadratic, v is the gradient at w
    v = optimizer.state[first]["momentum"]
    torch.testing.assert_close(v, problem.gradient(last, 0)[:2], rtol=1e-12, atol=1e-12)


def test_a_cycled_momentum_moves_the_point():
    """torch's schedulers put a momentum into the groups: IGT's point uses beta = 1 - momentum."""
    problem, twin = Problem(), Problem()
    optimizer = CompositeMomentum(problem.params, lr=0.1, variant="igt")
    for k, beta in enumerate(BETAS):
        optimizer.param_groups[0]["momentum"] = 1 - beta
        optimizer.step(closure_of(problem, optimizer, k))
    run(twin, CompositeMomentum(twin.params, lr=0.1, variant="igt"))
    close([problem.weights], [twin.weights])


def test_the_pure_rules():
    w, before = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert torch.equal(extrapolated(w, before, 1.0), w)
    assert torch.equal(extrapolated(w, before, 0.5), torch.tensor([2.0, 0.0]))
    v, g, c = torch.tensor([1.0]), torch.tensor([5.0]), torch.tensor([3.0])
    assert transported_update(v, g, 0.25, c).item() == 0.75 * 4 + 0.25 * 5
    assert v.item() == 1
    with pytest.raises(ValueError, match="beta"):
        transported_update(v, g, 0.0, c)
