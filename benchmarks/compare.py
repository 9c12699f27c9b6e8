"""Rewards of several runs at the same number of generated tokens.

    python benchmarks/compare.py runs/a/metrics.jsonl runs/b/metrics.jsonl ...

The budget is what the run with the fewest tokens has generated in training. A Markdown table, one row per run: the mean
training reward in each quarter of the budget, and the held-out reward of every evaluation, with the tokens generated in
training until then.
"""

import argparse
import json
from pathlib import Path


def read(path):
    """[(tokens generated so far, metrics)] of each step and evaluation; those before the first step have 0."""
    rows, tokens = [], 0.0
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        metrics = json.loads(line)
        if "reward" in metrics:
            tokens += metrics["sample_tokens_per_s"] * metrics["rollout_s"]
        rows.append((tokens, metrics))
    return rows


def summary(rows, budget):
    """The columns of a run, up to the budget in tokens."""
    quarters = [[], [], [], []]
    for tokens, metrics in rows:
        if "reward" in metrics and tokens <= budget:
            quarters[min(int(4 * tokens / budget), 3)].append(metrics["reward"])
    means = [f"{sum(rewards) / len(rewards):.2f}" if rewards else "" for rewards in quarters]
    held_out = [(tokens, metrics["eval/reward"]) for tokens, metrics in rows if "eval/reward" in metrics]
    return [*means, ", ".join(f"{reward:.2f} at {tokens / 1000:.0f}k" for tokens, reward in held_out)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="metrics.jsonl of each run")
    runs = {path: read(path) for path in parser.parse_args().runs}
    budget = min(rows[-1][0] for rows in runs.values())
    rows = [["run", *(f"to {quarter * budget / 4000:.0f}k" for quarter in (1, 2, 3, 4)), "held out"]]
    rows += [["---"] * len(rows[0])] + [[path, *summary(run, budget)] for path, run in runs.items()]
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
