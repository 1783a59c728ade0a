"""Fira, FRUGAL's residual, APOLLO, and Muon with a residual, straight from their papers in float64: no code is shared.

All but the last are AdamW on R, with its decay before the update; bases, and random projections, are handed in.

Sources: Fira (Chen et al., 2024, arXiv:2410.01623), equations 6 to 8; FRUGAL (Zmushko et al., 2024, arXiv:2411.07837),
algorithm 1; APOLLO (Zhu et al., 2024, arXiv:2412.05270), algorithm 1 and section 4.2; Muon (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon/) with the factor of Moonlight (Liu et al., 2025, arXiv:2502.16982);
NorMuon (Li et al., 2025, arXiv:2510.05491), algorithm 1, on rows or, where these are more, on columns, with the norm of
its authors' code.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

GAMMA = 1.01


class ReferenceResidual:
    """One matrix W (m × n), trained with its residual, or along its scaled gradient."""

    def __init__(
        self,
        weight: Matrix,
        *,
        option: str,
        lr: float,
        scale: float,
        residual_scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        residual_bits: int = 0,
    ) -> None:
        self.W = weight.astype(np.float64)
        self.option, self.lr, self.scale, self.residual_scale = option, lr, scale, residual_scale
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.t = 0
        self.M: Matrix | float = 0.0
        self.V: Matrix | float = 0.0
        self.limited_norm: float | None = None
        self.momentum = momentum
        self.buffer: Matrix | float = 0.0
        self.residual_bits = residual_bits
        # That of the residual: who knows how it is rounded puts that here between two steps.
        self.of_residual: Matrix | float = 0.0
        self.v: Matrix | float = 0.0

    def step(self, gradient: Matrix, left: Matrix | None, right: Matrix | None) -> None:
        """One update of W from its gradient, with the basis of either side that there is."""
        G, P, Q = gradient.astype(np.float64), left, right
        R = G if P is None else P.T @ G
        R = R if Q is None else R @ Q
        self.t += 1
        beta1, beta2 = self.betas
        self.M = beta1 * self.M + (1 - beta1) * R
        self.V = beta2 * self.V + (1 - beta2) * R**2
        if self.option in ("muon", "normuon"):
            M = self.momentum * self.buffer + (1 - self.momentum) * R
            self.buffer, D = M, (1 - self.momentum) * R + self.momentum * M
            S = G - self._back(R, P, Q)
            if self.residual_bits:
                self.of_residual = self.momentum * self.of_residual + (1 - self.momentum) * S
                S = (1 - self.momentum) * S + self.momentum * self.of_residual
            X = self._back(D, P, Q) + self.residual_scale * S
            update = 0.2 * max(X.shape) ** 0.5 * self._newton_schulz(X)
            if self.option == "normuon":
                update = self._lines_alike(update)
            self.W = (1 - self.lr * self.weight_decay) * self.W - self.lr * self.scale * update
            return
        N = (self.M / (1 - beta1**self.t)) / (np.sqrt(self.V / (1 - beta2**self.t)) + self.eps)
        if self.option in ("channel", "tensor"):
            axis = None if self.option == "tensor" else (0 if Q is None else 1)
            update = self._limit(self._ratio(N, R, axis) * G)
        else:
            S = G - self._back(R, P, Q)
            if self.option == "fira":
                axis = None if P is not None and Q is not None else (0 if Q is None else 1)
                S = self._limit(self._ratio(N, R, axis) * S)
            elif self.option == "sign":
                S = np.sign(S)
            update = self._back(N, P, Q) + self.residual_scale * S
        self.W = (1 - self.lr * self.weight_decay) * self.W - self.lr * self.scale * update

    @staticmethod
    def _newton_schulz(matrix: Matrix) -> Matrix:
        """Five steps of x ← ax + bx³ + cx⁵ on a matrix of norm 1."""
        X: Matrix = matrix / np.linalg.norm(matrix)
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        return X

    def _lines_alike(self, matrix: Matrix) -> Matrix:
        """Each row of O over the root of v, the mean of its squares over the steps, with the norm that O has."""
        axis = 1 if matrix.shape[0] >= matrix.shape[1] else 0
        self.v = 0.95 * self.v + 0.05 * (matrix**2).mean(axis=axis, keepdims=True)
        alike: Matrix = matrix / np.sqrt(self.v)
        alike *= np.linalg.norm(matrix) / np.linalg.norm(alike)
        return alike

    @staticmethod
    def _back(matrix: Matrix, left: Matrix | None, right: Matrix | None) -> Matrix:
        matrix = matrix if left is None else left @ matrix
        return matrix if right is None else matrix @ right.T

    @staticmethod
    def _ratio(direction: Matrix, low_rank: Matrix, axis: int | None) -> Matrix:
        """‖N_j‖ / ‖R_j‖, in the shape that multiplies G."""
        above = np.sqrt((direction**2).sum(axis=axis, keepdims=True))
        below = np.sqrt((low_rank**2).sum(axis=axis, keepdims=True))
        ratio: Matrix = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
        return ratio

    def _limit(self, term: Matrix) -> Matrix:
        """The term, no longer than γ times what it was the step before."""
        norm = float(np.linalg.norm(term))
        if self.limited_norm and norm > GAMMA * self.limited_norm:
            term = term * (GAMMA * self.limited_norm / norm)
        self.limited_norm = float(np.linalg.norm(term))
        return term
