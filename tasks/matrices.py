"""Matrices and vectors of tasks: checks of given symmetric ones, and random ones drawn by counter.

Legend: T tasks, n given tasks, d entries of a vector.
"""

from __future__ import annotations

import numpy as np

from metamom.rng import DrawCoordinates, Floats, Purpose, normals, uniforms
from metamom.tasks.checks import check_range


def symmetric(name: str, matrices: Floats) -> Floats:
    """Check that matrices ``[n, d, d]`` are symmetric, and return them.

    Raises:
        ValueError: if one isn't symmetric to 1e-6 of its largest entry (which float32 numbers can achieve).
    """
    gap = np.abs(matrices - matrices.swapaxes(1, 2)).max(axis=(1, 2))
    if (gap > 1e-6 * np.abs(matrices).max(axis=(1, 2))).any():
        raise ValueError(f"{name} must be symmetric; entries differ from their mirror images by {gap.max()}.")
    return matrices


def square_root(name: str, matrices: Floats) -> Floats:
    """The symmetric square roots R = R^T >= 0, R² = A, of symmetric matrices A >= 0, ``[n, d, d]``.

    Raises:
        ValueError: for a matrix with a negative eigenvalue (below -1e-6 of the largest).
    """
    eigenvalues, vectors = np.linalg.eigh(symmetric(name, matrices))
    if (eigenvalues[:, 0] < -1e-6 * np.abs(eigenvalues).max(axis=1)).any():
        raise ValueError(f"{name} must be positive semidefinite; got the eigenvalue {eigenvalues.min()}.")
    return from_spectrum(np.sqrt(eigenvalues.clip(min=0)), vectors)


def from_spectrum(eigenvalues: Floats, vectors: Floats) -> Floats:
    """``V diag(λ) V^T`` of eigenvalues ``[T, d]`` and orthonormal columns V ``[T, d, d]``."""
    product: Floats = (vectors * eigenvalues[:, None, :]) @ vectors.swapaxes(1, 2)
    return product


def products(points: Floats, vectors: Floats) -> Floats:
    """Multiply each task's points by its vector, ``[T, P, d], [T, d] -> [T, P]``.

    This avoids BLAS. Its order of summation, and so the last bit, depends on a task's memory address, and thus on which
    other tasks are drawn with it.
    """
    sums: Floats = (points * vectors[:, None, :]).sum(axis=2)
    return sums


def check_spectrum(spectrum: tuple[float, float] | None, *, given: Floats | None, name: str) -> None:
    """Refuse an invalid range of eigenvalues, or a range together with given matrices."""
    if spectrum is None:
        return
    low, _ = check_range("spectrum", spectrum)
    if low < 0:
        raise ValueError(f"spectrum must be a finite range (low, high) with 0 <= low <= high; got {spectrum}.")
    if given is not None:
        raise ValueError(f"{name} gives the matrices, spectrum draws them; got both. Leave one out.")


def drawn_vectors(seed: int, tasks: DrawCoordinates, dim: int) -> Floats:
    """Draw a standard normal vector for each task, ``[T, d]``."""
    return gaussians(uniforms(seed, tasks, Purpose.TASK, even(dim)), dim)


def drawn_spectra(seed: int, tasks: DrawCoordinates, dim: int, spectrum: tuple[float, float]) -> tuple[Floats, Floats]:
    """Draw each task's eigenvalues ``[T, d]``, uniform in a range, and eigenvectors ``[T, d, d]``, a uniform rotation.

    The random numbers come after those of `drawn_vectors`.

    Reference:
        Mezzadri, "How to generate random matrices from the classical compact groups" (2007), section 5.
    """
    low, high = spectrum
    start, entries = even(dim), even(dim * dim)
    u = uniforms(seed, tasks, Purpose.TASK, start + entries + dim)
    square = gaussians(u[:, start : start + entries], dim * dim).reshape(-1, dim, dim)
    q, r = np.linalg.qr(square)
    signs = np.where(np.diagonal(r, axis1=1, axis2=2) < 0, -1.0, 1.0)  # these make Q unique and uniform
    return low + (high - low) * u[:, start + entries :], q * signs[:, None, :]


def even(count: int) -> int:
    """The number of uniform numbers for ``count`` normal ones, which come in pairs."""
    return count + count % 2


def gaussians(uniform: Floats, count: int) -> Floats:
    """Convert uniform numbers to ``count`` standard normal ones, ``[T, even(count)] -> [T, count]``."""
    return normals(uniform)[:, :count]
