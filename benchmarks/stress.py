"""Kill a run without warning at random moments, resume it each time, and compare it with one that was left alone.

    python benchmarks/stress.py                       20 kills, a few minutes on 2 cores
    python benchmarks/stress.py --kills 100 --seed 7

The model is made here, so nothing is fetched. Two kills in five wait for a checkpoint that is being written, one in
five hits the first second, the rest a random moment of a later step. After each kill, no log may hold half a line or a
step twice, and nothing that a checkpoint holds may be lost. At the end weights, metrics (but for what measures time)
and samples have to be those of the run that was left alone. Prints one JSON line; exit code 1 if anything differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the path above has to be set first
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402

import train  # noqa: E402

WORDS = "<unk> <stop> . because however first then the a my we it is was of to and dog cat house road river".split()


def make_model(folder):
    """A transformer of 0.5 M parameters with random weights: small steps, but checkpoints of 6 MB for each agent."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<stop>")
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": len(WORDS), "initializer_range": 0.3, "eos_token_id": 1, "bos_token_id": 1}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def start(arguments, log):
    """A process that runs train.py; a fork, because each interpreter would import for longer than the run lives."""
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os._exit(train.main(arguments))
    return child


def ended(child):
    return os.waitpid(child, os.WNOHANG)[0] == child


def checkpoints(run):
    """Steps of the checkpoints that are in place, and whether another is being written."""
    names = [path.name for path in (run / "checkpoints").glob("*")]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit()), any(n.endswith(".partial") for n in names)


def wait_for_moment(child, run, kind, rng):
    """Return at the moment of the kill; False if the run ended before."""
    if kind == "early":
        while not (run / "config.json").exists() and not ended(child):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 1))
        return not ended(child)
    seen = checkpoints(run)[0]
    wanted = rng.choice((1, 2, 2))  # new checkpoints; a run keeps no more than two
    while len(set(checkpoints(run)[0]) - set(seen)) < wanted:
        if ended(child):
            return False
        time.sleep(0.001)
    if kind == "saving":
        while not checkpoints(run)[1]:
            if ended(child):
                return False
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 0.3))
    return not ended(child)


def inspect(run):
    """What is wrong with the logs: half lines, and steps that are there twice or missing."""
    found = {"half_lines": 0, "steps_twice_or_missing": 0}
    for name in ("metrics.jsonl", "samples.jsonl"):
        content = (run / name).read_text(encoding="utf-8") if (run / name).exists() else ""
        try:
            lines = [json.loads(line) for line in content.splitlines()]
        except ValueError:
            lines = []
            found["half_lines"] += 1
        found["half_lines"] += content[-1:] not in ("", "\n")
        if name == "metrics.jsonl":
            steps = [line["step"] for line in lines if "reward" in line]
            found["steps_twice_or_missing"] += steps != list(range(1, len(steps) + 1))
    return found


def same(run, calm):
    """Which of the things that a run leaves are equal to those of the other run, bit for bit."""

    def metrics(folder):
        lines = train.read_lines(folder / "metrics.jsonl")
        return [{name: value for name, value in line.items() if not name.endswith("_s")} for line in lines]

    agents = [f"agent_{agent}/model.safetensors" for agent in (0, 1)]
    start = (calm.parent / "model" / "model.safetensors").read_bytes()
    return {
        "weights_moved": all((calm / name).read_bytes() != start for name in agents),
        "weights_equal": all((run / name).read_bytes() == (calm / name).read_bytes() for name in agents),
        "metrics_equal": metrics(run) == metrics(calm),
        "samples_equal": (run / "samples.jsonl").read_bytes() == (calm / "samples.jsonl").read_bytes(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    root, began, rng = Path(tempfile.mkdtemp()), time.time(), random.Random(args.seed)
    make_model(root / "model")
    steps = 10 * args.kills
    options = f"--model {root}/model --dtype float32 --steps {steps} --save-every 1 --eval-every 25 --show-every 1"
    options = f"{options} --prompts 2 --minibatches 2 --group 3 --max-new-tokens 12 --lr 1e-3".split()
    os.waitpid(start([*options, "--out", str(root / "calm")], root / "calm.log"), 0)

    run, log = root / "run", root / "run.log"
    arguments = [*options, "--out", str(run)]
    totals, kinds = {"kills": 0, "while_saving": 0, "before_first_checkpoint": 0, "lost": 0}, []
    while totals["kills"] < args.kills:
        kinds = kinds or rng.sample(["saving", "saving", "any", "any", "early"], 5)
        kind = kinds.pop() if totals["kills"] else "early"
        child = start(arguments, log)
        if not wait_for_moment(child, run, kind, rng):
            sys.exit(f"the run ended before it was killed; see {log}")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved, saving = checkpoints(run)
        totals["kills"] += 1
        totals["while_saving"] += saving
        totals["before_first_checkpoint"] += not saved
        for name, count in inspect(run).items():
            totals[name] = totals.get(name, 0) + count
        logged = len([line for line in train.read_lines(run / "metrics.jsonl") if "reward" in line]) if saved else 0
        totals["lost"] += bool(saved) and logged < saved[-1]
        arguments = ["--resume", str(run)] if (run / "config.json").exists() else arguments
    _, status = os.waitpid(start(arguments, log), 0)
    equal = same(run, root / "calm") if status == 0 else {}
    totals |= {"steps": steps, "exit": status, "resumed": log.read_text().count("resuming"), **equal}
    totals |= {"seconds": round(time.time() - began), "torch": torch.__version__}
    print(json.dumps({"command": " ".join(["python", "benchmarks/stress.py", *sys.argv[1:]])} | totals))
    good = status == 0 and all(equal.values()) and totals["lost"] + totals["half_lines"] == 0
    if good and totals["steps_twice_or_missing"] == 0:
        shutil.rmtree(root)
        return 0
    print(f"see {root}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
