"""Pairs rows with columns at the least total cost."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

UNMATCHED = 1e6  # the cost of a pair that is never made


def assign(costs: NDArray[Any]) -> list[tuple[int, int]]:
    """Pairs of row and column with the least sum of costs, each used at most once. Pairs of UNMATCHED or more
    are left out.

    Kuhn's method with potentials, by shortest augmenting paths, O(rows² columns).
    """
    if costs.size == 0:
        return []
    if costs.shape[0] > costs.shape[1]:
        return [(row, column) for column, row in assign(costs.T)]
    rows, columns = costs.shape
    of_row, of_column = np.zeros(rows + 1), np.zeros(columns + 1)
    owner = np.zeros(columns + 1, int)  # each column's row, from 1. Column 0 stands for the row to place
    for row in range(1, rows + 1):
        owner[0], column = row, 0
        least, previous = np.full(columns + 1, np.inf), np.zeros(columns + 1, int)
        used = np.zeros(columns + 1, bool)
        while owner[column]:
            used[column] = True
            reduced = costs[owner[column] - 1] - of_row[owner[column]] - of_column[1:]
            better = ~used[1:] & (reduced < least[1:])
            least[1:][better], previous[1:][better] = reduced[better], column
            open_columns = np.where(used, np.inf, least)
            open_columns[0] = np.inf
            following = int(open_columns.argmin())
            step = open_columns[following]
            of_row[owner[used]] += step
            of_column[used] -= step
            least[~used] -= step
            column = following
        while column:
            owner[column] = owner[previous[column]]
            column = int(previous[column])
    pairs = [(int(owner[c]) - 1, c - 1) for c in range(1, columns + 1) if owner[c]]
    return sorted((row, column) for row, column in pairs if costs[row, column] < UNMATCHED)
