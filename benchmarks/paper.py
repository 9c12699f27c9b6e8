"""The paper's comparison in one table: one model alone and several together, untrained and trained.

    python benchmarks/paper.py --task writing                      the default model, three seeds
    python benchmarks/paper.py --task coding --model Qwen/Qwen2.5-Coder-0.5B-Instruct --weights adapters

Every row reads the same problems and is evaluated on the same held-out items. The trained rows generate the same number
of tokens in training, if all answers have their full length: a single agent may write as much as all agents together,
and where an item has two turns, there are fewer steps. Options that this script does not know go to every run of
train.py. Runs lie in --out, and the same command goes on where it was stopped. It writes paper.csv and paper.png there.
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

# Row of the table -> the run that it comes from, and which evaluation of it: before the training or after it.
ROWS = {
    "single model": ("grpo", 0),
    "naive parallel": ("magrpo", 0),
    "sequential": ("sequential", 0),
    "discussion": ("discussion", 0),
    "GRPO, one agent": ("grpo", -1),
    "GRPO, two turns": ("grpo2", -1),
    "MAGRPO": ("magrpo", -1),
    "MAGRPO, two turns": ("magrpo2", -1),
}


def options_of_runs(common):
    """The options of train.py for each run, by its name. common: those of all runs."""
    config = train.parse_args(common)
    single = ["--num-agents", "1", "--max-new-tokens", str(config.num_agents * config.max_new_tokens)]
    # With G answers at every node, an item of two turns has G + G * G joint actions, where one turn has G.
    group = min(config.group, 4)
    one_turn = config.prompts * config.group
    items = max(1, round(one_turn / (group + group**2)))
    steps = max(1, round(config.steps * one_turn / (items * (group + group**2))))
    # As many optimizer steps for each rollout as with one turn, where each of config.prompts items has its own.
    epochs = max(1, round(config.prompts / items))
    two_turns = ["--turns", "2", "--feedback", "level", "--prompts", str(items), "--group", str(group)]
    two_turns += ["--steps", str(steps), "--epochs", str(epochs)]
    return {
        "magrpo": [],
        "grpo": single,
        "sequential": ["--eval-only", "--protocol", "sequential"],
        "discussion": ["--eval-only", "--protocol", "discussion"],
        "magrpo2": two_turns,
        "grpo2": [*single, *two_turns],
    }


def read_run(folder):
    """(metrics of all evaluations, tokens generated in training) of a run; None if it has not ended."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = train.read_lines(folder / "metrics.jsonl")
    except FileNotFoundError:
        return None
    evaluations = [line for line in lines if "eval/reward" in line]
    last = 0 if config["eval_only"] else config["steps"]
    if not evaluations or evaluations[-1]["step"] < last:
        return None
    tokens = sum(line["sample_tokens_per_s"] * line["rollout_s"] for line in lines if "rollout_s" in line)
    return evaluations, tokens


def finish_run(folder, options):
    """Run train.py in a folder, or let it go on there, unless it has ended. Returns what `read_run` does."""
    if read_run(folder):
        return read_run(folder)
    if "--eval-only" in options:
        evaluate_into(folder, options)
    else:
        code = train.main([*options, "--resume", "auto", "--out", str(folder)])
        if code:
            sys.exit(code)
    return read_run(folder) or sys.exit(f"stopped in {folder}; the same command goes on")


def evaluate_into(folder, options):
    """Evaluate, and leave the metrics in a folder, in the form of a run that trains."""
    config = train.parse_args(options)
    metrics = train.run(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(vars(config)), encoding="utf-8")
    line = {"step": 0} | {f"eval/{name}": value for name, value in metrics.items()}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")


def columns_of(metrics, tokens, maxima):
    """The columns of the table, by name, of one evaluation."""
    columns = {}
    for part, most in maxima.items():
        key = "eval/reward" if part == "total" else f"eval/reward/{part}"
        columns["return %" if part == "total" else f"{part} %"] = 100 * metrics.get(key, 0) / most
    lengths = [value for key, value in metrics.items() if key.startswith("eval/length/")]
    columns["tokens/s"] = metrics["eval/sample_tokens_per_s"]
    columns["seconds an answer"] = np.mean(lengths) / metrics["eval/sample_tokens_per_s"]
    columns["training tokens, thousands"] = tokens / 1000
    return columns


def show(values):
    """Mean and spread, the standard deviation, over seeds, with three significant digits."""
    mean, spread = np.mean(values), np.std(values)
    digits = max(0, 2 - int(np.floor(np.log10(mean)))) if mean > 0 else 0
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def write(folder, table):
    """paper.csv, paper.png and the printed table. table: row -> {column: values, one of each seed}."""
    columns = list(next(iter(table.values())))
    lines = [["", *columns]]
    for row, values in table.items():
        lines.append([row, *[show(values[name]) for name in columns]])
    with open(folder / "paper.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    print()
    for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]]:
        print(f"| {' | '.join(line)} |")
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    for place, (row, values) in enumerate(table.items()):
        returns = values["return %"]
        axes.barh(row, np.mean(returns), xerr=np.std(returns), color="C1" if ROWS[row][1] else "C0", alpha=0.7)
        axes.plot(returns, [place] * len(returns), "k.", markersize=4)
    axes.invert_yaxis()
    axes.set_xlabel("held-out return in % of its maximum; blue: untrained; points: seeds")
    figure.savefig(folder / "paper.png", dpi=120, bbox_inches="tight")


def remember(folder, options):
    """Keep the options of a comparison beside its runs. Raises UserError if others are there."""
    note = folder / "options.json"
    folder.mkdir(parents=True, exist_ok=True)
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != options:
        raise UserError(f"{folder} holds runs with other options: choose another --out")
    note.write_text(json.dumps(options), encoding="utf-8")


def compare():
    """Make all runs, then the table. Raises UserError for what cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--task", default="writing", help="of train.py (writing)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--out", type=Path, help="folder of all runs (runs/paper-TASK)")
    parser.add_argument("--rows", default="; ".join(ROWS), help="only some rows, separated by semicolons")
    args, others = parser.parse_known_args()
    common = ["--task", args.task, *others]
    # All rows have the paper's pairing and a constant learning rate, whatever the task's defaults are, and the same
    # weights: tuned options apply to one turn only.
    weights = train.parse_args(common).weights
    common = ["--joint", "aligned", "--no-anneal", "--weights", weights, *common]
    runs = options_of_runs(common)
    maxima = find_task(args.task).maxima
    chosen = [row.strip() for row in args.rows.split(";")]
    if args.seeds < 1 or not set(chosen) <= set(ROWS):
        raise UserError(f"--seeds must be 1 or more, and --rows some of: {'; '.join(ROWS)}")
    rows = {row: source for row, source in ROWS.items() if row in chosen}
    folder = args.out or Path("runs") / f"paper-{args.task.rpartition(':')[2].lower()}"
    needed = [name for name in runs if name in {run for run, _ in rows.values()}]
    if {option.split("=")[0] for option in others} & {"--joint", "--seed"}:
        raise UserError("--joint and --seed are set by this script: leave them out")
    for name in needed:  # now, and not after the hours of the runs before it
        agents = train.parse_args([*common, *runs[name]]).num_agents
        if agents not in find_task(args.task).agents_allowed:
            raise UserError(f"--task {args.task} is not for {agents} agent(s): leave out the rows of {name}")
    remember(folder, [args.task, *others])
    table = {row: {} for row in rows}
    for seed in range(args.seeds):
        found = {}
        for n, name in enumerate(needed, 1):
            print(f"\n=== seed {seed} of 0 to {args.seeds - 1}, run {n} of {len(needed)}: {name}", flush=True)
            options = [*common, *runs[name], "--seed", str(seed)]
            found[name] = finish_run(folder / f"{name}-seed{seed}", options)
        for row, (name, which) in rows.items():
            evaluations, tokens = found[name]
            columns = columns_of(evaluations[which], tokens if which else 0, maxima)
            for column, value in columns.items():
                table[row].setdefault(column, []).append(float(value))
        write(folder, table)


def main():
    try:
        compare()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
