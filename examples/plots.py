"""The demo's picture: both loss curves, and time and memory against the batch size."""

from __future__ import annotations

from pathlib import Path

from cl_kernels.bench.fresh import MEMORY, Measurement

GIB, MIB = 2**30, 2**20
VIEWS = 2
COLOURS = {"eager": "#c4472f", "cl_kernels": "#1f5fa8"}


def predict(last: Measurement, rows: int) -> tuple[float, float]:
    """Milliseconds and bytes at `rows`, if both grow with the square."""
    growth = (rows / last.task.work.rows) ** 2
    return last.ms * growth, last.peak * growth


def draw(
    path: Path,
    curves: dict[str, list[float]],
    results: dict[str, list[Measurement]],
    limit: int,
    subtitle: str,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")

    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        left.plot(range(1, len(losses) + 1), losses, style, color=COLOURS[name], lw=2.2, label=name)
    left.set(title="Training loss, same seed", xlabel="step", ylabel="SupCon loss")
    left.legend(frameon=False)

    batches = sorted({_batch(m) for ms in results.values() for m in ms})
    for axis, title, label in (
        (middle, "Time, forward and backward", "milliseconds"),
        (right, "Peak memory, forward and backward", "MiB"),
    ):
        for name, measurements in results.items():
            done = [m for m in measurements if m.status == "ok"]
            ys = [m.ms if axis is middle else max(m.peak / MIB, 0.1) for m in done]
            axis.plot([_batch(m) for m in done], ys, "o-", color=COLOURS[name], lw=2.2, label=name)
            missing = [m for m in measurements if m.status == MEMORY]
            if done and missing:
                expected = [predict(done[-1], m.task.work.rows) for m in missing]
                beyond = [ms if axis is middle else peak / MIB for ms, peak in expected]
                xs = [_batch(m) for m in missing]
                axis.plot([_batch(done[-1]), *xs], [ys[-1], *beyond], ":", color=COLOURS[name], lw=1.6)
                axis.plot(
                    xs,
                    beyond,
                    "x",
                    color=COLOURS[name],
                    ms=9,
                    mew=2,
                    label=f"{name}: does not fit (extrapolated)",
                )
        axis.set(title=title, xlabel="batch size (two views each)", ylabel=label, xscale="log", yscale="log")
        axis.set_xticks(batches, [f"{b:,}" for b in batches], rotation=30)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}" if y < 1 else f"{y:,.0f}")
        axis.grid(True, which="major", alpha=0.3)
    right.set_ylim(top=max(right.get_ylim()[1], 4 * limit / MIB))
    right.axhline(limit / MIB, color="0.35", ls="--", lw=1.2)
    right.text(batches[0], limit / MIB * 1.15, f"{limit / GIB:.0f} GiB", color="0.25", va="bottom")
    middle.legend(frameon=False, loc="upper left")
    figure.suptitle(subtitle, fontsize=11, color="0.3")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _batch(measurement: Measurement) -> int:
    return measurement.task.work.rows // VIEWS
