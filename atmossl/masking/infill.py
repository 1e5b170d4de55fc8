"""Fills places that are hidden at every step from the places around them (harmonic infill)."""

from functools import lru_cache

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from atmossl.geometry import latitude_edges


def laplacian(
    latitude: Float[np.ndarray, " lat"], num_lon: int, lon_spacing: float, *, periodic: bool
) -> scipy.sparse.csr_matrix:
    """Graph Laplacian [cell, cell] of the five-point stencil on the sphere, times the cells' areas.

    latitude, lon_spacing: degrees. A link's weight is the length of the common edge over the
    distance of the centres. There is no link across a pole, nor beyond the longitudes that are not
    `periodic`.
    """
    shape = (len(latitude), num_lon)
    cell = np.arange(shape[0] * shape[1]).reshape(shape)
    edges = np.deg2rad(latitude_edges(latitude)) if len(latitude) > 1 else np.array([0.0, 1.0])
    height, width = np.diff(edges), np.deg2rad(lon_spacing)
    east = np.repeat(height / (width * np.cos(np.deg2rad(latitude))), num_lon).reshape(shape)
    north = np.repeat(width * np.cos(edges[1:-1]) / np.diff(np.deg2rad(latitude)), num_lon)
    closed = slice(None) if periodic else slice(-1)
    links = [
        (cell[:, closed].ravel(), np.roll(cell, -1, axis=1)[:, closed].ravel(),
         east[:, closed].ravel()),
        (cell[:-1].ravel(), cell[1:].ravel(), north),
    ]  # fmt: skip
    rows, columns, weights = (np.concatenate(parts) for parts in zip(*links, strict=True))
    one_way = scipy.sparse.coo_matrix((weights, (rows, columns)), (cell.size, cell.size))
    both = (one_way + one_way.T).tocsr()
    return (scipy.sparse.diags(np.asarray(both.sum(axis=1)).ravel()) - both).tocsr()


def solve_hidden(
    matrix: scipy.sparse.csr_matrix,
    hidden: Bool[np.ndarray, " cell"],
    fields: Float[np.ndarray, "field cell"],
) -> Float[np.ndarray, "field hidden"]:
    """Solve for the hidden cells such that the Laplacian is 0 there; all other cells are given.

    Source: Bertalmio et al. (2000), Image inpainting, section 2, for the linear case.
    """
    solve = scipy.sparse.linalg.factorized(matrix[hidden][:, hidden].tocsc())
    return -solve(matrix[hidden][:, ~hidden] @ fields[:, ~hidden].T).T


@lru_cache(maxsize=8)
def _laplacian(
    latitude: tuple[float, ...], num_lon: int, lon_spacing: float, periodic: bool
) -> scipy.sparse.csr_matrix:
    return laplacian(np.array(latitude), num_lon, lon_spacing, periodic=periodic)


def fill_from_surroundings(
    fields: Float[Tensor, "variable level time lat lon"],
    shown: Bool[Tensor, "*variable level lat lon"],
    *,
    lat: Float[Tensor, "lat"],
    lon_spacing: float,
    periodic: bool,
) -> Float[Tensor, "variable level time lat lon"]:
    """Fill the places that are not shown, at every step, from the places around: the mean over
    the shown longitudes of the latitude, plus the smoothest surface through the departures of
    the shown places from it. A field without a shown place stays as it is. lat, lon_spacing:
    degrees."""
    if bool(shown.all()):
        return fields
    num_fields = fields.shape[0] * fields.shape[1]
    hidden = (~shown).expand(*fields.shape[:2], *fields.shape[-2:]).reshape(num_fields, -1)
    flat = rearrange(fields, "variable level time lat lon -> (variable level) time (lat lon)")
    values = flat.double().numpy().copy()
    latitudes = tuple(lat.double().tolist())
    matrix = _laplacian(latitudes, fields.shape[-1], lon_spacing, periodic)
    alike: dict[bytes, list[int]] = {}  # fields that hide the same places
    for number, inside in enumerate(hidden.numpy()):
        if inside.any() and not inside.all():
            alike.setdefault(inside.tobytes(), []).append(number)
    for rows in alike.values():
        inside = hidden[rows[0]].numpy()
        around = rearrange(values[rows], "field time cell -> (field time) cell")
        means = _means_by_row(around, inside.reshape(fields.shape[-2:]), latitudes)
        solution = solve_hidden(matrix, inside, around - means) + means[:, inside]
        values[np.ix_(np.array(rows), np.arange(fields.shape[2]), np.flatnonzero(inside))] = (
            rearrange(solution, "(field time) cell -> field time cell", field=len(rows))
        )
    return torch.from_numpy(values).to(fields).view_as(flat).reshape(fields.shape)


def _means_by_row(
    fields: Float[np.ndarray, "field cell"],
    hidden: Bool[np.ndarray, "lat lon"],
    latitudes: tuple[float, ...],
) -> Float[np.ndarray, "field cell"]:
    """The mean over the shown longitudes at every cell. Between rows that show some longitudes
    it is linear in latitude; beyond them it is that of the nearest such row."""
    shown = ~hidden.reshape(1, *hidden.shape)
    grids = fields.reshape(-1, *hidden.shape)
    counts = shown.sum(axis=-1)
    means = np.where(shown, grids, 0.0).sum(axis=-1) / counts.clip(1)
    has_values, lat = counts[0] > 0, np.array(latitudes)
    if not has_values.all():
        means = np.stack([np.interp(lat, lat[has_values], row[has_values]) for row in means])
    return np.repeat(means, hidden.shape[1], axis=1)
