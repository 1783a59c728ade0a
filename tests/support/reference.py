"""GaLore with AdamW written straight from the paper in float64: slow, plain, and sharing no code with the package.

Source: GaLore (Zhao et al., 2024, arXiv:2403.03507), algorithm 2, with AdamW's decay before the update.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def _like(basis: Matrix, old: Matrix | None) -> Matrix:
    """The paper leaves the signs of singular vectors open; here they point where the old basis's point."""
    if old is None:
        return basis
    return np.stack([-p if p @ q < 0 else p for p, q in zip(basis.T, old.T, strict=True)], axis=1)


class ReferenceGaLore:
    """One matrix W (m × n) trained by GaLore."""

    def __init__(
        self,
        weight: Matrix,
        *,
        rank: int,
        gap: int,
        scale: float,
        proj_type: str,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.W = weight.astype(np.float64)
        self.rank, self.gap, self.scale = rank, gap, scale
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        tall = weight.shape[0] >= weight.shape[1]
        sides = {
            "std": ("right",) if tall else ("left",),
            "reverse_std": ("left",) if tall else ("right",),
            "left": ("left",),
            "right": ("right",),
            "full": ("left", "right"),
        }
        self.sides = sides[proj_type]
        self.t = 0
        self.P: Matrix | None = None
        self.Q: Matrix | None = None
        self.M: Matrix | float = 0.0
        self.V: Matrix | float = 0.0

    def step(self, gradient: Matrix) -> None:
        """One update of W from its gradient."""
        G = gradient.astype(np.float64)
        self.t += 1
        if (self.t - 1) % self.gap == 0:
            U, _, Vt = np.linalg.svd(G, full_matrices=False)
            self.P = _like(U[:, : self.rank], self.P) if "left" in self.sides else None
            self.Q = _like(Vt[: self.rank].T, self.Q) if "right" in self.sides else None
        R = G
        if self.P is not None:
            R = self.P.T @ R
        if self.Q is not None:
            R = R @ self.Q
        N = self.direction(R)
        if self.P is not None:
            N = self.P @ N
        if self.Q is not None:
            N = N @ self.Q.T
        self.W = (1 - self.lr * self.weight_decay) * self.W
        self.W = self.W - self.lr * self.scale * N

    def direction(self, R: Matrix) -> Matrix:  # noqa: N803
        """Adam's."""
        beta1, beta2 = self.betas
        self.M = beta1 * self.M + (1 - beta1) * R
        self.V = beta2 * self.V + (1 - beta2) * R**2
        m_hat = self.M / (1 - beta1**self.t)
        v_hat = self.V / (1 - beta2**self.t)
        return np.asarray(m_hat / (np.sqrt(v_hat) + self.eps))


class ReferenceMuon(ReferenceGaLore):
    """The same with Muon's direction of R.

    Sources: Muon (Jordan et al., 2024): five steps of Newton-Schulz on the momentum with Nesterov's look ahead;
    Moonlight (Liu et al., 2025, arXiv:2502.16982), equation 4: times 0.2 √max(rows, columns).
    """

    momentum = 0.95

    def direction(self, R: Matrix) -> Matrix:  # noqa: N803
        """Muon's."""
        self.M = self.momentum * self.M + (1 - self.momentum) * R
        X = self.momentum * self.M + (1 - self.momentum) * R
        X = X / np.linalg.norm(X)
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        return np.asarray(0.2 * max(R.shape) ** 0.5 * X)
