"""A run as one page: its curves, its evaluations, and what the agents said.

    python benchmarks/report.py runs/NAME                writes runs/NAME/report.html
    python benchmarks/report.py runs/NAME --out FILE

The page is a single file that loads nothing and runs no script. A run that goes on is shown as far as it has come.
"""

import argparse
import html
import json
import math
import sys
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from compare import load, refuse  # noqa: E402 - the path above has to be set first

from tasks import TASKS  # noqa: E402
from train import Config  # noqa: E402

STYLE = """
:root { color-scheme: light dark; --page: #f4f5f7; --card: #fff; --ink: #1d2229; --soft: #646f7d; --line: #dde1e6;
        --train: #2f6fde; --held-out: #d9730d; }
@media (prefers-color-scheme: dark) {
  :root { --page: #13161b; --card: #1c2128; --ink: #e3e6ea; --soft: #99a3b0; --line: #343b45;
          --train: #6ea0ff; --held-out: #ffa657; }
}
* { box-sizing: border-box; }
body { max-width: 76rem; margin: auto; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; --mark: var(--train); }
.held-out { --mark: var(--held-out); }
h1, h2, h3, h4, p, pre, figure { margin: 0; font-size: 1rem; }
h1 { font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.25rem; }
h4, summary, .soft { color: var(--soft); font-size: .85rem; font-weight: normal; }
article, figure, table { padding: 1rem; border: 1px solid var(--line); border-radius: .75rem; background: var(--card); }
article { display: flex; flex-direction: column; gap: .75rem; }
.options { display: flex; flex-wrap: wrap; gap: .4rem; margin-top: .75rem; font-size: .85rem; }
.options > span { padding: .1rem .6rem; border: 1px solid var(--line); border-radius: 1rem; }
.cards, .small, .pair, .agents, .parts { display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); }
.small, .parts { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
.small { margin-top: 1rem; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); }
.agents { grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.pair .agents { flex: 1; align-content: start; }
.parts { gap: .25rem 1rem; font-size: .85rem; }
.parts span { display: block; }
figure > svg { width: calc(100% - 2.5rem); height: 15rem; margin: 1rem .5rem 1rem 2rem; }
.small svg { height: 6rem; }
.small .value { display: none; }
svg { overflow: visible; }
line { stroke: var(--line); }
text { fill: var(--soft); font-size: 12px; }
.value { fill: var(--held-out); font-weight: bold; paint-order: stroke; stroke: var(--card); stroke-width: 4; }
polyline { fill: none; stroke: var(--train); stroke-width: 2; vector-effect: non-scaling-stroke; }
circle { fill: var(--held-out); }
.line { color: var(--train); }
.points { color: var(--held-out); }
table { width: 100%; border-spacing: 0; font-size: .9rem; }
th, td { padding: .35rem .25rem; text-align: left; font-weight: normal; vertical-align: top; overflow-wrap: normal; }
summary { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; cursor: pointer; }
pre { padding: .5rem .75rem; color: var(--soft); font: .85rem/1.5 system-ui, sans-serif; white-space: pre-wrap; }
.coding pre, .coding .answer, .detail pre { font: .85rem/1.5 ui-monospace, monospace; }
.answer { margin-top: .25rem; padding: .25rem .75rem; border-left: 3px solid var(--mark); white-space: pre-wrap; }
.silent { border-color: var(--line); color: var(--soft); font-style: italic; }
.bar { height: .5rem; margin: .1rem 0 .25rem; border-radius: .25rem; background: var(--line); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--mark); }
"""


def escape(value):
    return html.escape(str(value))


def is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def amount(value, best):
    """A number in the only form that the page has, 1.28 of 3.0 (43 %)."""
    return f"{value:.2f} of {round(float(best), 2)} ({100 * value / best:.0f}\u00a0%)" if best else f"{value:.2f}"


def bar(value, best):
    width = min(max(100 * value / best, 0), 100) if best else 0
    return f'<div class="bar"><i style="width: {width:.1f}%"></i></div>'


def key_of(part):
    """The name of a part of the reward in metrics.jsonl."""
    return "reward" if part == "total" else f"reward/{part}"


def turns_of(record):
    return [*(record.get("earlier") or []), record]


def find_maxima(config, samples):
    """{part: the most it can be}: what the task says or, where the task is not known, the largest that was seen."""
    if config["task"] in TASKS:
        return TASKS[config["task"]].maxima
    maxima = {"total": 0.0}
    for record in samples:
        for turn in turns_of(record):
            numbers = {part: value for part, value in turn["reward"].items() if is_number(value)}
            maxima |= {part: max(value, maxima.get(part, 0.0)) for part, value in numbers.items()}
    return maxima


def chart(part, best, metrics):
    """A part of the reward over steps: training as a line, held-out items as points; empty if it was not measured.

    Only the line, in an SVG of its own, is stretched to the window. The rest is placed in percent and keeps its shape.
    """
    key = key_of(part)
    train = [(row["step"], row[key]) for row in metrics if is_number(row.get(key))]
    held_out = [(row["step"], row[f"eval/{key}"]) for row in metrics if is_number(row.get(f"eval/{key}"))]
    if not train and not held_out:
        return ""
    values = [value for _, value in train + held_out]
    low, high = min(0, *values), max(best, *values, 1e-9)
    end = max(row["step"] for row in metrics) or 1

    def place(step, value):
        return f"{100 * step / end:.2f}", f"{100 * (high - value) / (high - low):.2f}"

    line = " ".join(",".join(place(step, value)) for step, value in train)
    marks = ""
    for level in (low, (low + high) / 2, high):
        _, y = place(0, level)
        marks += f'<line x2="100%" y1="{y}%" y2="{y}%"/>'
        marks += f'<text x="-6" y="{y}%" dy="4" text-anchor="end">{level:.3g}</text>'
    points = ""
    for step, value in held_out:
        x, y = place(step, value)
        points += f'<circle cx="{x}%" cy="{y}%" r="5"><title>step {step}: {amount(value, best)}</title></circle>'
    ends = held_out if len(held_out) < 2 else [held_out[0], held_out[-1]]
    for anchor, (step, value) in zip(("start", "end"), ends, strict=False):
        x, y = place(step, value)
        points += f'<text class="value" x="{x}%" y="{y}%" dy="-10" text-anchor="{anchor}">{value:.2f}</text>'
    return f"""<figure><figcaption>{escape(part)}</figcaption><svg>{marks}
<text y="100%" dy="18">0</text><text x="100%" y="100%" dy="18" text-anchor="end">step {end}</text>
<svg viewBox="0 0 100 100" preserveAspectRatio="none"><polyline points="{line}"/></svg>{points}</svg></figure>"""


def evaluations(config, metrics, maxima):
    """The first and the last evaluation as a table."""
    found = [row for row in metrics if "eval/reward" in row]
    if not found:
        return '<p class="soft">No evaluation has ended yet.</p>'
    shown = [found[0]] if len(found) == 1 else [found[0], found[-1]]
    lines = [(part, f"eval/{key_of(part)}", best) for part, best in maxima.items()]
    for agent in range(config["num_agents"]):
        lines.append((f"tokens of agent {agent}", f"eval/length/agent_{agent}", config["max_new_tokens"]))
    lines.append(("answers cut off", "eval/truncated", 1.0))
    text = "<tr><th></th>" + "".join(f"<th>step {escape(row['step'])}</th>" for row in shown) + "</tr>"
    for name, key, best in lines:
        cells = [amount(row[key], best) + bar(row[key], best) if is_number(row.get(key)) else "" for row in shown]
        text += f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return f'<table class="held-out">{text}</table>'


def answer(agent, text, prompt):
    """What an agent read and said in a turn. The line to open the prompt shows its end, which is the agent's role."""
    read = ""
    if prompt:
        prompt = str(prompt)  # a task may give token ids
        last = prompt.strip().rpartition("\n")[2]
        read = f"<details><summary>prompt: {escape(last)}</summary><pre>{escape(prompt)}</pre></details>"
    said = f'<p class="answer">{escape(text)}</p>'
    if not text:
        said = f'<p class="answer silent">{"silent" if text is None else "an empty answer"}</p>'
    return f"<section><h4>agent {agent}</h4>{read}{said}</section>"


def episode(title, record, maxima):
    """An episode as a card, its turns below each other."""
    turns = turns_of(record)
    text = ""
    for number, turn in enumerate(turns):
        if len(turns) > 1:
            text += f"<h4>turn {number}</h4>"
        pairs = zip_longest(turn["texts"], turn.get("prompts") or [])
        answers = [answer(agent, *pair) for agent, pair in enumerate(pairs)]
        parts = ""
        for part, best in maxima.items():
            value = turn["reward"].get(part)
            if is_number(value):
                parts += f'<div><span class="soft">{escape(part)}</span> {amount(value, best)}{bar(value, best)}</div>'
        text += f'<div class="agents">{"".join(answers)}</div><div class="parts">{parts}</div>'
        if "detail" in turn["reward"]:
            detail = json.dumps(turn["reward"]["detail"], indent=2, ensure_ascii=False)
            text += f'<details class="detail"><summary>detail</summary><pre>{escape(detail)}</pre></details>'
    return f"<article><h3>{escape(title)}</h3>{text}</article>"


def page(name, config, metrics, samples):
    maxima = find_maxima(config, samples)
    defaults = vars(Config())
    options = ""
    for option, value in config.items():
        if value != defaults.get(option) and option not in ("task", "out", "started"):
            options += f'<span><span class="soft">{escape(option)}</span> {escape(value)}</span>'
    step = max((row["step"] for row in metrics), default=0)
    agents = "1 agent" if config["num_agents"] == 1 else f"{config['num_agents']} agents"
    charts = {part: chart(part, best, metrics) for part, best in maxima.items()}
    pair, cards = "", ""
    for record in samples:
        if "when" in record:
            pair += episode(f"{record['when']} training", record, maxima)
        else:
            cards += episode(f"step {record['step']}", record, maxima)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(name)}</title>
<style>{STYLE}</style>
</head>
<body class="{escape(config["task"])}">
<h1>{escape(name)}</h1>
<p class="soft">{escape(config["task"])}, {escape(agents)}, step {escape(step)} of {escape(config["steps"])}</p>
<div class="options">{options}</div>
<h2>Reward over steps: <span class="line">training</span>, <span class="points">held-out items</span></h2>
{charts["total"]}
<div class="small">{"".join(svg for part, svg in charts.items() if part != "total")}</div>
<h2>Held-out items</h2>
{evaluations(config, metrics, maxima)}
{f'<h2>One held-out item, before and after</h2><div class="pair held-out">{pair}</div>' if pair else ""}
<h2>Episodes of training</h2>
<div class="cards">{cards or '<p class="soft">None has been recorded yet.</p>'}</div>
</body>
</html>
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--out", type=Path, help="file to write; default: report.html in that folder")
    args = parser.parse_args(argv)
    config = load(args.run / "config.json")[0]
    files = [args.run / "metrics.jsonl", args.run / "samples.jsonl"]
    metrics, samples = (load(file) if file.exists() else [] for file in files)
    if not metrics:
        refuse(f"{args.run} has nothing to show yet: its first evaluation has not ended")
    try:
        text = page(args.run.resolve().name, config, metrics, samples)
    except (AttributeError, KeyError, TypeError) as error:  # it is JSON, but of another form
        refuse(f"{args.run} does not hold what a run writes: {error!r}")
    out = args.out or args.run / "report.html"
    try:
        out.write_text(text, encoding="utf-8", errors="replace")  # an answer may hold half a surrogate pair
    except OSError as error:
        refuse(f"cannot write {out}: {error.strerror}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
