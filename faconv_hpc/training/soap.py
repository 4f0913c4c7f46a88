"""SOAP: Adam in the basis in which the gradients of a matrix hang together least."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BETA1 = 0.9
REFRESH = 5  # updates between steps of the bases
DAMPING = 1e-3  # of the mean variance of rows or columns: directions without gradients keep their place
EPS = 1e-3  # of the root mean square of a matrix's denominators
SMALLEST, LARGEST = 4, 1024  # of a side: fewer have no basis worth it, more keep the plain one
ADAM, SIDES, BASES = ("exp_avg", "exp_avg_sq"), ("left", "right"), ("left_basis", "right_basis")
KEPT = (*ADAM, *SIDES, *BASES)
"""Of the state of a parameter, beside the count of its updates."""


def sides_of(shape: torch.Size) -> tuple[int, int]:
    """Of the bases of a parameter (n, ...), which is taken for a matrix (n, m); 0: that side has none."""
    rows = shape[0] if shape else 0
    columns = shape.numel() // rows if rows else 0
    if min(rows, columns) < SMALLEST:
        return 0, 0
    return rows * (rows <= LARGEST), columns * (columns <= LARGEST)


class Soap(torch.optim.Optimizer):
    """SOAP of Vyas and others (2024, arXiv 2409.11321), for parameters that are whole on every rank: ZeRO 0.

    With the gradient G (n, m) of a matrix, and means that decay by ``beta2``::

        L <- mean of G G^T        R <- mean of G^T G
        Q_L <- orthogonal part of (L + d_L) Q_L, every `REFRESH` updates from the first on; Q_R likewise
        M <- 0.9 M + 0.1 G        V <- mean of (Q_L^T G Q_R)^2
        W <- W - lr Q_L [ (Q_L^T M Q_R) / (1 - 0.9^t) / (sqrt(V / (1 - beta2^t)) + e) ] Q_R^T

    What is no matrix (a side below `SMALLEST`) has bases that are the identity: then that is Adam.

    Unlike in the paper bases begin as the identity and come nearer to the eigenvectors by subspace iteration, with a
    damping ``d`` of `DAMPING` times the mean of the diagonal; and ``e`` is `EPS` times the root mean square of the
    matrix's denominators. So the update is a continuous function of the gradients, and one in a direction that has
    hardly any more than rounding stays small. Still directions that hang together alike turn with the rounding of
    gradients: it comes further than with Adam, the more so the larger the matrix.

    Args:
        groups: of parameters, as torch's optimizers take them.
        beta2: decay of L, R and V.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float = 0.0, beta2: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self._beta2 = beta2

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have gradients."""
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    self._update(value, value.grad, group["lr"], group["weight_decay"])

    def _update(self, value: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state, beta2 = self.state[value], self._beta2
        for name in KEPT:
            if name not in state:
                state[name] = new_state(name, value)
        count = int(state.setdefault("step", torch.tensor(0.0))) + 1
        state["step"].fill_(count)
        value.mul_(1 - lr * weight_decay)
        matrix = _as_matrix(gradient, state)
        for side, basis, of in zip(SIDES, BASES, (matrix, matrix.mT), strict=True):
            if state[side].numel():
                state[side].lerp_(of @ of.mT, 1 - beta2)
                if count % REFRESH == 1:
                    state[basis].copy_(_nearer(state[basis], state[side]))
        left, right = (state[name] for name in BASES)
        mean, square = (state[name].view_as(matrix) for name in ADAM)
        mean.lerp_(matrix, 1 - BETA1)
        square.lerp_(_turned(matrix, left, right).square(), 1 - beta2)
        root = (square / (1 - beta2**count)).sqrt()
        root += EPS * root.square().mean().sqrt() + torch.finfo(root.dtype).tiny ** 0.5  # what squares can hold
        update = _turned(_turned(mean, left, right) / root, left.mT, right.mT)
        value.sub_(update.view_as(value), alpha=lr / (1 - BETA1**count))


def new_state(name: str, value: Tensor) -> Tensor:
    """What `Soap` begins with for a parameter: of `KEPT`, in its shape or in that of a side (n, n), (0, 0) for none."""
    if name in ADAM:
        return torch.zeros_like(value)
    rows, columns = sides_of(value.shape)
    side = rows if name.startswith("left") else columns
    return value.new_zeros(side, side) if name in SIDES else torch.eye(side, dtype=value.dtype, device=value.device)


def _as_matrix(gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    """(n, m); (1, all) of what has no bases."""
    return gradient.reshape(len(gradient) if any(state[side].numel() for side in SIDES) else 1, -1)


def _nearer(basis: Tensor, side: Tensor) -> Tensor:
    """A step of subspace iteration. Directions may change their signs, which no update sees."""
    moved = side @ basis + DAMPING * side.diagonal().mean() * basis
    found: Tensor = torch.linalg.qr(moved + torch.finfo(side.dtype).tiny * basis).Q
    return found


def _turned(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left^T matrix right``, where they are there."""
    matrix = left.mT @ matrix if left.numel() else matrix
    return matrix @ right if right.numel() else matrix
