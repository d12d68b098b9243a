"""A recipe's picture: curves of training, figures of evaluation, and the embedding of the test images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from .evaluate import Evaluation

POINTS = 1000  # of an embedding


def draw(path: Path, title: str, logs: dict[str, list[dict[str, Any]]], found: dict[str, Evaluation]) -> None:
    """Draw the methods beside each other: their logs, figures and embeddings by name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {k: v for k, v in found.items() if v.embedding is not None}
    count = 2 + len(shown)
    columns = min(count, 4)
    grid = plt.subplots(-(-count // columns), columns, figsize=(4.6 * columns, 4.2 * -(-count // columns)))
    figure, axes = grid[0], np.ravel(grid[1])
    for name, log in logs.items():
        losses = pd.Series([record["loss"] for record in log])
        axes[0].plot(losses.ewm(span=max(len(losses) // 30, 1)).mean(), label=name, lw=1.6)
    axes[0].set(title="training loss, smoothed", xlabel="step")
    axes[0].legend(frameon=False, fontsize=8)
    table = pd.DataFrame({name: evaluation.figures for name, evaluation in found.items()})
    table = table[table.abs().max(axis=1) <= 1]  # shares, not times or bytes
    table.plot.barh(ax=axes[1], legend=False, width=0.8)
    axes[1].set(title="on test data, encoder frozen")
    axes[1].invert_yaxis()
    for axis, (name, evaluation) in zip(axes[2:], shown.items(), strict=False):
        points, labels = embed(evaluation)
        axis.scatter(*points.T, c=labels, cmap="tab10", s=5)
        axis.set(title=f"{name}: test data", xticks=[], yticks=[])
    for axis in axes[count:]:
        axis.axis("off")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def embed(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """t-SNE of at most POINTS of the features, [n, 2], and their labels."""
    from sklearn.manifold import TSNE

    assert evaluation.embedding is not None and evaluation.labels is not None
    x, labels = evaluation.embedding[:POINTS].numpy(), evaluation.labels[:POINTS].numpy()
    perplexity = min(30, (len(x) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, max_iter=500, random_state=0).fit_transform(x), labels
