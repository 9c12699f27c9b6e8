"""Rewards of several runs at the same number of generated tokens.

    python benchmarks/compare.py runs/a runs/b ...            tables, and a picture in compare.png
    python benchmarks/compare.py runs/* --out picture.svg     tables, and the picture elsewhere
    python benchmarks/compare.py runs/a/metrics.jsonl ...     a table alone; with --out, also the picture

The first table has a row for each run: the mean training reward in each quarter of the budget, and the held-out reward
of every evaluation, with the tokens generated in training until then. The budget is what the run with the fewest tokens
has generated in training.

Runs whose options differ only in seed, out, started and resume are one group; a file, whose options are not known, is a
group of its own. The second table says in which options the groups differ. In the picture, a line is the mean of a
group's runs, in a band from the lowest to the highest, as far as all of them have come; points are held-out rewards.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

FREE = ("seed", "out", "started", "resume")  # options that may differ within a group


def refuse(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load(path):
    """The JSON objects in a file of a run: a single one in config.json, one in each line of the others."""
    objects = []
    try:
        content = path.read_bytes()
        # Half a last line is left out: the run may be writing it.
        lines = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
        parts = [content] if path.name == "config.json" else lines
        for part in parts:
            objects.append(json.loads(part))
    except OSError as error:
        refuse(f"cannot read {path}: {error.strerror}")
    except (ValueError, RecursionError):
        refuse(f"{path} is damaged: object {len(objects) + 1} in it is not JSON")
    if not all(isinstance(each, dict) for each in objects):
        refuse(f"{path} is not of a run: there is something other than objects")
    return objects


def read(path):
    """[(tokens generated so far, metrics)] of each step and evaluation; those before the first step have 0."""
    rows, tokens = [], 0.0
    for metrics in load(path):
        if "reward" in metrics:
            tokens += metrics.get("sample_tokens_per_s", 0) * metrics.get("rollout_s", 0)
        rows.append((tokens, metrics))
    if not tokens:
        refuse(f"{path} has no training step yet")
    return rows


def series(rows, name):
    """[(tokens, value)] of a metric."""
    return [(tokens, metrics[name]) for tokens, metrics in rows if metrics.get(name) is not None]


def summary(rows, budget):
    """The columns of a run, up to the budget in tokens."""
    quarters = [[], [], [], []]
    for tokens, reward in series(rows, "reward"):
        if tokens <= budget:
            quarters[min(int(4 * tokens / budget), 3)].append(reward)
    means = [f"{sum(rewards) / len(rewards):.2f}" if rewards else "" for rewards in quarters]
    held_out = series(rows, "eval/reward")
    return [*means, ", ".join(f"{reward:.2f} at {tokens / 1000:.0f}k" for tokens, reward in held_out)]


def print_table(head, rows):
    for row in [head, ["---"] * len(head), *rows]:
        print(f"| {' | '.join(map(str, row))} |")


def shared_options(path):
    """The options that all runs of a group have, as JSON. A file has no options; it is known by its name."""
    options = {"file": str(path)}
    if path.is_dir():
        options = {name: value for name, value in load(path / "config.json")[0].items() if name not in FREE}
    return json.dumps(options, sort_keys=True)


def differing(groups):
    """The names of the options in which the groups of folders differ."""
    known = [options for options in map(json.loads, groups) if "file" not in options]
    names = sorted({name for options in known for name in options})
    return [name for name in names if any(options.get(name) != known[0].get(name) for options in known)]


def draw(curves, out):
    """Training reward over tokens, and held-out points. curves: {label: the rows of each run of a group}."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    for i, (label, runs) in enumerate(curves.items()):
        training = [series(rows, "reward") for rows in runs]
        first = max(points[0][0] for points in training)
        last = min(points[-1][0] for points in training)
        grid = sorted({tokens for points in training for tokens, _ in points if first <= tokens <= last})
        rewards = [np.interp(grid, *zip(*points, strict=True)) for points in training]
        axes.plot(grid, np.mean(rewards, axis=0), f"C{i}", label=label, linewidth=2)
        axes.fill_between(grid, np.min(rewards, axis=0), np.max(rewards, axis=0), color=f"C{i}", alpha=0.15)
        held_out = [point for rows in runs for point in series(rows, "eval/reward")]
        xs, ys = [tokens for tokens, _ in held_out], [reward for _, reward in held_out]
        axes.scatter(xs, ys, color=f"C{i}", edgecolors="white", s=50, zorder=3)
    axes.set(xlabel="tokens generated in training", ylabel="reward", title="training (lines), held out (points)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.15), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(out, dpi=120, bbox_inches="tight")
    except (OSError, ValueError) as error:  # no such folder; no such format
        refuse(f"cannot write {out}: {error}")
    print(f"\nthe picture is in {out}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folder of each run, or its metrics.jsonl")
    parser.add_argument("--out", help="file of the picture; default: compare.png, or none without a folder")
    args = parser.parse_args(argv)
    runs = {path: read(path / "metrics.jsonl" if path.is_dir() else path) for path in args.runs}
    groups = {}
    for path in runs:
        groups.setdefault(shared_options(path), []).append(path)
    budget = min(rows[-1][0] for rows in runs.values())
    head = ["run", *(f"to {budget * quarter / 4 / 1000:.0f}k" for quarter in (1, 2, 3, 4)), "held out"]
    print_table(head, [[path, *summary(rows, budget)] for path, rows in runs.items()])

    names = differing(groups)
    table, curves = [], {}
    for number, (options, paths) in enumerate(groups.items(), 1):
        values = [json.loads(options).get(name, "") for name in names]
        values = ["none" if value == "" else value for value in values]
        members = ", ".join(map(str, paths))
        table.append([number, members, *values])
        said = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
        label = f"{said}, {len(paths)} run(s)" if names and paths[0].is_dir() else members
        curves[f"{number}: {label}".replace("$", r"\$")] = [runs[path] for path in paths]
    folders = any(path.is_dir() for path in runs)
    if folders:
        print()
        print_table(["group", "runs", *names], table)
    if folders or args.out:
        draw(curves, args.out or "compare.png")


if __name__ == "__main__":
    main()
