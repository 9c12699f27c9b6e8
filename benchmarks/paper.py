"""The paper's comparison in one table: one model alone and several together, untrained and trained.

    python benchmarks/paper.py --task writing                      the default model, three seeds
    python benchmarks/paper.py --task coding --model Qwen/Qwen2.5-Coder-0.5B-Instruct --weights adapters

Every row reads the same problems and is evaluated on the same held-out items. The trained rows generate the same number
of tokens in training, if all answers have their full length: a single agent may write as much as all agents together,
and where an item has two turns, there are fewer steps. Options that this script does not know go to every run of
train.py. Runs lie in --out. The same command goes on where it was stopped. It writes paper.csv and paper.png there.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from magrpo import UserError
from tasks import find_task


def rows_of(common):
    """The options of train.py for each row of the table, by its name. common: those of all rows."""
    config = train.parse_args(common)
    single = ["--num-agents", "1", "--max-new-tokens", str(config.num_agents * config.max_new_tokens)]
    # With G answers at every node, an item of two turns has G + G * G joint actions.
    group = min(config.group, 4)
    one_turn = config.prompts * config.group
    items = max(1, round(one_turn / (group + group**2)))
    steps = max(1, round(config.steps * one_turn / (items * (group + group**2))))
    # As many optimizer steps for an item as with one turn, where each of config.prompts items has its own.
    epochs = max(1, round(config.prompts / items))
    turns = ["--turns", "2", "--feedback", "level"]
    train_two = [*turns, "--prompts", str(items), "--group", str(group), "--steps", str(steps), "--epochs", str(epochs)]
    return {
        "single model": ["--eval-only", *single],
        "naive parallel": ["--eval-only"],
        "sequential": ["--eval-only", "--protocol", "sequential"],
        "discussion": ["--eval-only", "--protocol", "discussion"],
        "GRPO, one agent": single,
        "GRPO, two turns": [*single, *train_two],
        "MAGRPO": [],
        "MAGRPO, two turns": train_two,
    }


def finished(folder):
    """The metrics of a run's last evaluation, and its training tokens; None if the run has not ended."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return None
    last = 0 if config["eval_only"] else config["steps"]
    found = [line for line in lines if line["step"] == last and "eval/reward" in line]
    tokens = sum(line["sample_tokens_per_s"] * line["rollout_s"] for line in lines if "rollout_s" in line)
    return found[-1] | {"tokens": tokens} if found else None


def measure(folder, options):
    """Run train.py in a folder, or let it go on there. Returns what `finished` does."""
    if not finished(folder):
        auto = [] if "--eval-only" in options else ["--resume", "auto"]
        if not auto and folder.exists():  # an evaluation that was stopped begins again
            (folder / "config.json").unlink(missing_ok=True)
        code = train.main([*options, *auto, "--out", str(folder)])
        if code or not finished(folder):
            sys.exit(code or f"stopped in {folder}; the same command goes on")
    return finished(folder)


def columns_of(metrics, maxima):
    """The columns of the table, by name, of one run."""
    columns = {}
    for part, most in maxima.items():
        key = "eval/reward" if part == "total" else f"eval/reward/{part}"
        columns["return %" if part == "total" else f"{part} %"] = 100 * metrics.get(key, 0) / most
    lengths = [value for key, value in metrics.items() if key.startswith("eval/length/")]
    columns["tokens/s"] = metrics["eval/sample_tokens_per_s"]
    columns["seconds an answer"] = np.mean(lengths) / metrics["eval/sample_tokens_per_s"]
    columns["training tokens"] = metrics["tokens"]
    return columns


def write(folder, table):
    """paper.csv, paper.png and the printed table. table: row -> {column: values, one of each seed}."""
    columns = list(next(iter(table.values())))
    lines = [["", *columns]]
    for row, values in table.items():
        cells = [f"{np.mean(values[name]):.4g} ± {np.std(values[name]):.2g}" for name in columns]
        lines.append([row, *cells])
    with open(folder / "paper.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]]:
        print(f"| {' | '.join(line)} |")
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    names = list(table)
    returns = [values["return %"] for values in table.values()]
    means = [np.mean(some) for some in returns]
    axes.barh(names, means, xerr=[np.std(some) for some in returns], color="C0", alpha=0.7)
    for place, some in enumerate(returns):
        axes.plot(some, [place] * len(some), "k.", markersize=4)
    axes.invert_yaxis()
    axes.set(xlabel="held-out return, % of its maximum (bar: mean; points: seeds)", xlim=(0, None))
    figure.savefig(folder / "paper.png", dpi=120, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--task", default="writing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder of all runs (default: runs/paper-TASK)")
    parser.add_argument("--rows", help="only these rows, separated by semicolons")
    args, others = parser.parse_known_args()
    common = ["--task", args.task, *others]
    try:
        rows = rows_of(common)
        maxima = find_task(args.task).maxima
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    folder = args.out or Path("runs") / f"paper-{args.task.rpartition(':')[2].lower()}"
    chosen = args.rows.split(";") if args.rows else list(rows)
    table = {row: {} for row in rows if row in chosen}
    for seed in range(args.seeds):
        for n, row in enumerate(table):
            print(f"\n=== seed {seed}, run {n + 1} of {len(table)}: {row}", flush=True)
            place = folder / f"{row.replace(', ', '-').replace(' ', '-').lower()}-seed{seed}"
            metrics = measure(place, [*common, *rows[row], "--seed", str(seed)])
            for name, value in columns_of(metrics, maxima).items():
                table[row].setdefault(name, []).append(float(value))
        write(folder, table)


if __name__ == "__main__":
    main()
