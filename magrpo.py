"""MAGRPO, Multi-Agent Group Relative Policy Optimization (arXiv 2508.04652): language models learn to cooperate.

The problem. N agents answer at the same time, each from its own prompt. Within a turn, no agent sees what the others
write (a Dec-POMDP). Their answers together earn one reward. Which answers should become more likely?

The idea. Let every agent answer G times, pair the answers into joint actions, and reward each of these. An answer that
earned more than the average of its group becomes more likely, one that earned less becomes less likely. The average
replaces the learned critic of PPO. All agents share the credit for a joint action; luck with partners averages out.

    sample      y[i,1], ..., y[i,G] ~ pi_i( . | x_i)        G completions by each agent i           sample
    pair        (y[1,g], ..., y[N,g])                       K joint actions (aligned: K = G)        joint_actions
    reward      r_k = reward(joint action k)                one number for all agents               judge
    return      R_k = r_k + gamma * mean return of the next turn, if there is one                   assign_credit
    advantage   A[i,g] = (R_g - mean R) / std R             mean and std of the group               group_advantages
    weight      w_t = 1 / (tokens of y * completions)       so that the loss is a mean              set_weights
    loss        L_i = - sum_t w_t min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A)                     policy_loss
                where rho_t = pi_i(y_t) / pi_i,old(y_t), and old is the policy that sampled
    step        AdamW on the weights of each agent                                                  update

One step in numbers. Two agents summarise one post, G = 4, and the joint actions earn 1, 3, 2 and 2. The mean is 2 and
the standard deviation 0.71, so the advantages are -1.41, +1.41, 0 and 0, for both agents alike. Agent 1's second
completion has 20 tokens. Each token has weight 1 / (20 * 4) = 0.0125 and, before the first update, ratio 1. So the
derivative of the loss with respect to each of their log-probabilities is -0.0125 * 1.41 = -0.018.

With several turns, an item's rollout is a tree: a joint action that is not done opens a node. N = 1 is GRPO.
Shapes: N agents, B prompts, G completions of each, BG = B * G rows, K joint actions, P prompt and C completion tokens.
"""

import contextlib
import copy
import itertools
import re
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D


@dataclass
class Settings:
    """The options of the algorithm. train.py adds those of a run; the comments of both are the texts of --help."""

    # rollout
    prompts: int = 4  # items in one step; every agent has a prompt for each
    group: int = 4  # completions of each agent for one prompt (G)
    joint: Literal["aligned", "crossed"] = "aligned"  # combine the g-th completions of all agents, or all with all
    temperature: float = 0.8  # sampling temperature; it is a part of the policy, in training and in evaluation
    max_new_tokens: int = 80  # longest completion, in tokens
    seed: int = 0  # random seed of everything that is sampled
    eval_group: int = 2  # completions of each agent for one held-out item
    # turns
    num_agents: int = 2  # agents (N); 1 is GRPO
    turns: int = 1  # largest number of turns of an item; default: N if --protocol is sequential, 2 for a discussion
    discount: float = 1.0  # gamma, the discount of the next turn's return
    stop_above: float = float("inf")  # a node whose mean reward is above this is good enough: do not continue it
    guided_from: int = 1  # first training step with the expert's advice; evaluations always have it
    # update
    steps: int = 14  # training steps; each samples prompts * group joint actions (aligned)
    lr: float = 0.0  # learning rate of AdamW; 0: 6e-5, or 8e-4 for adapters, and less for models above 135 M
    anneal: bool = False  # let the learning rate fall towards 0, in equal parts over --steps
    rank: int = 16  # rank of the adapters that --weights adapters trains
    warmup: int = 8  # optimizer steps in which the learning rate rises
    advantage: Literal["std", "mean", "rloo", "max", "raw"] = "std"  # baseline and scale of the advantage
    minibatches: int = 0  # optimizer steps per pass over a rollout; 0: one for each item of the step
    epochs: int = 1  # passes over a rollout
    clip_eps: float = 0.2  # lower clip bound of the ratio to the sampling policy: 1 - this
    clip_eps_high: float = 0.2  # upper clip bound: 1 + this
    kl: float = 0.0  # weight of the KL penalty to the initial policy, a frozen copy; with adapters, the bare model
    frozen: str = ""  # numbers of agents that do not learn, separated by commas
    normalize: Literal["sequence", "token", "constant"] = "sequence"  # what the loss is a mean over
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    micro_batch: int = 16  # completions in one forward and backward pass; does not change the gradient


def train_step(policies, task, items, cfg, step):
    """One step on the items of all processes. Returns the turns of this process, and the metrics of all processes."""
    metrics = Metrics()
    start = time.perf_counter()
    turns = rollout(policies, task, world.share(items), cfg, step)
    sampled = time.perf_counter()
    assign_credit(turns, cfg)
    for policy in policies:
        groups = []
        for node in itertools.chain(*turns):
            groups += [node.groups[agent] for agent in policy.agents if agent in node.groups]
        update(policy, groups, len(items), cfg, metrics, step)
    metrics.add("update_s", time.perf_counter() - sampled)
    record_rollout(metrics, task, turns, sampled - start, len(items))
    return turns, metrics.of_all_processes()


@dataclass
class Group:
    """G completions of one prompt by one agent, which are compared with each other. The tensors are on the CPU."""

    agent: int
    slot: int  # the number of the item in its step
    turn: int
    prompt: list  # P token ids
    stream: tuple  # integers that seed the group's random numbers
    dropped_turns: int = 0  # turns of the history that the prompt left out
    # Filled in later, by sample, assign_credit and set_weights:
    tokens: torch.Tensor = None  # (G, C) ids; what follows a stop token has no meaning
    mask: torch.Tensor = None  # (G, C) True on what the policy chose, its stop token included
    logp: torch.Tensor = None  # (G, C) log-probabilities at the time of sampling, 0 where the mask is False
    ended: torch.Tensor = None  # (G,) True if it stopped by itself, False if it was cut at max_new_tokens
    advantage: torch.Tensor = None  # (G,)
    weight: torch.Tensor = None  # (G, C) loss weight of each token, 0 where the mask is False


@dataclass
class Node:
    """One turn on one path of an item's tree: what was said before, what each agent says now, and what that earns."""

    item: object
    slot: int  # the number of the item in its step
    branch: int = 0  # number of the path from the root, unique among the nodes of an item's turn
    history: list = field(default_factory=list)  # {"texts": N texts, "reward": dict} of each earlier turn
    groups: dict = field(default_factory=dict)  # agent -> Group, of the agents that this process plays
    texts: dict = field(default_factory=dict)  # agent -> G texts, of all agents; None for one that is silent
    pairing: torch.Tensor = None  # (K, N) table of joint_actions
    rewards: list = field(default_factory=list)  # K dicts: "total", and its parts
    children: dict = field(default_factory=dict)  # k -> the node that continues joint action k
    returns: torch.Tensor = None  # (K,) float64

    def joint_texts(self, k):
        """The N texts of joint action k."""
        return [self.texts[agent] and self.texts[agent][g] for agent, g in enumerate(self.pairing[k])]  # None: silent


def rollout(policies, task, items, cfg, step):
    """Grow one tree for each (slot, item), one turn after the other. Returns the turns, lists of nodes."""
    nodes = [Node(item, slot) for slot, item in items]
    turns = []
    while nodes:
        for policy in policies:
            answer(policy, task, nodes, cfg, step)
        world.exchange_texts(nodes)
        judge(task, nodes, cfg)
        turns.append(nodes)
        if len(turns) == cfg.turns:
            break
        nodes = [child for node in nodes for child in continue_node(task, node, cfg)]
        ask_expert(task, nodes, cfg, step)
    return turns


def joint_actions(texts, cfg):
    """(K, N) table: entry (k, i) is the completion that agent i contributes to joint action k.

    aligned: the g-th of each agent, K = G. crossed: all combinations, K = G ** N, of the agents that are not silent.
    """
    if cfg.joint == "aligned":
        return torch.arange(cfg.group)[:, None].expand(cfg.group, len(texts))
    choices = [torch.arange(cfg.group if texts[agent] else 1) for agent in range(len(texts))]
    return torch.cartesian_prod(*choices).view(-1, len(choices))


def answer(policy, task, nodes, cfg, step):
    """The agents of a policy answer G times at each node, in parallel: no agent sees another one's answer."""
    groups = []
    for agent in policy.agents:
        for node in nodes:
            group = new_group(policy, task, agent, node, cfg, step)
            if group:  # else the agent is silent in this turn
                node.groups[agent] = group
                groups.append(group)
    if groups:
        sample(policy, groups, cfg)
    for node in nodes:
        for agent in policy.agents:
            node.texts[agent] = policy.decode(node.groups[agent]) if agent in node.groups else None


def judge(task, nodes, cfg):
    """Pair the answers at every node, and give each joint action its reward."""
    jobs = []
    for node in nodes:
        node.pairing = joint_actions(node.texts, cfg)
        jobs += [(node.item, node.history, node.joint_texts(k)) for k in range(len(node.pairing))]
    rewards = iter(world.divide(lambda share: checked_rewards(task, share), jobs))
    for node in nodes:
        node.rewards = [next(rewards) for _ in node.pairing]


def continue_node(task, node, cfg):
    """The nodes of the next turn: a child for each joint action that is not done, unless the node is good enough."""
    if np.mean([reward["total"] for reward in node.rewards]) > cfg.stop_above:
        return []
    most = cfg.group ** (len(node.texts) if cfg.joint == "crossed" else 1)  # the largest K, so no two numbers collide
    for k, reward in enumerate(node.rewards):
        history = [*node.history, {"texts": node.joint_texts(k), "reward": reward}]
        if not task.done(node.item, history):
            node.children[k] = Node(node.item, node.slot, node.branch * most + k, history)
    return list(node.children.values())


def assign_credit(turns, cfg):
    """Returns of all joint actions, from the last turn back to the first, and the advantages of all completions."""
    for nodes in reversed(turns):
        for node in nodes:
            node.returns = torch.tensor([reward["total"] for reward in node.rewards], dtype=torch.float64)
            for k, child in node.children.items():
                # The mean return of the child's joint actions estimates what this joint action leads to.
                node.returns[k] += cfg.discount * child.returns.mean()
            advantages = group_advantages(node.returns, node.pairing, cfg)
            for agent, group in node.groups.items():
                group.advantage = advantages[agent]


def group_advantages(returns, pairing, cfg):
    """(K,) returns and the (K, N) table of joint actions -> (N, G): how much better each completion did than its group.

    A completion's credit is the mean return of the joint actions that contain it. It is compared only with the same
    agent's group at the same node, never with those of other agents, nodes or items.
    """
    member = F.one_hot(pairing, cfg.group).to(returns.dtype)  # (K, N, G): 1 where joint action k contains completion g
    credit = torch.einsum("k,kng->ng", returns, member) / member.sum(0)  # (N, G); 0 / 0 where an agent is silent
    if cfg.advantage == "raw":  # REINFORCE without a baseline
        return credit.float()
    best = credit.amax(-1, keepdim=True)
    advantage = credit - (best if cfg.advantage == "max" else credit.mean(-1, keepdim=True))
    if cfg.advantage == "std":  # arXiv v1 and the authors' code; "mean" is that of later versions, and Dr. GRPO's
        advantage = advantage / credit.std(-1, keepdim=True, unbiased=False)
    if cfg.advantage == "rloo":  # the same as credit minus the mean of the other G - 1
        advantage = advantage * cfg.group / max(cfg.group - 1, 1)
    # Equal credits teach nothing. But they can differ from their mean by rounding, and a standard deviation of the same
    # size would turn that into advantages near 1. The mask also replaces 0 / 0.
    spread = best - credit.amin(-1, keepdim=True)
    return advantage.masked_fill(spread <= 1e-9 * credit.abs().amax(-1, keepdim=True), 0.0).float()


def update(policy, groups, num_items, cfg, metrics, step):
    """Make an optimizer step for each minibatch of the groups of this process. num_items: items of all processes."""
    count = cfg.minibatches or num_items
    minibatches = [[] for _ in range(count)]
    for group in groups:
        if str(group.agent) not in cfg.frozen.split(","):
            minibatches[group.slot * count // num_items].append(group)  # an item stays whole, with all its turns
            metrics.add("flat_groups", not group.advantage.any())
    learners = [set_weights(minibatch, cfg) for minibatch in minibatches]
    on_policy = True
    for m in list(range(count)) * cfg.epochs:
        if not learners[m]:
            continue  # nothing to learn; a step would move the weights all the same, by Adam's momentum
        for batch in micro_batches(minibatches[m], cfg, policy.model.device):
            with torch.no_grad():
                logp_ref = token_logprobs(policy.reference, batch, cfg) if cfg.kl else None
            logp = token_logprobs(policy, batch, cfg)
            # Until the first step the policy is the one that sampled, so the ratio is exactly 1; the sampler's numbers
            # differ by rounding. After it, the ratio says how far the policy has moved, and the clip limits that.
            logp_old = logp.detach() if on_policy else batch.logp
            loss = policy_loss(logp, logp_old, batch.advantage, batch.weight, cfg, logp_ref)
            loss.backward()  # losses of micro-batches add up, because the weights are those of the whole minibatch
            policy.collect_gradients()
            record_ratio(metrics, logp.detach(), batch, cfg, on_policy)
        for agent, norm in policy.step(learners[m], cfg, step).items():
            metrics.add(f"grad_norm/agent_{agent}", norm)
        on_policy = False


def set_weights(groups, cfg):
    """Set the loss weight of every token of a minibatch. Returns the agents that have something to learn from it.

    Turns weigh the same, however many nodes they have. Within a turn, cfg.normalize says what the loss is a mean over.
    """
    totals = torch.zeros(3, cfg.num_agents, cfg.turns, dtype=torch.float64)
    completions, tokens, teaching = totals  # views: what they count is in totals
    for group in groups:
        place = group.agent, group.turn
        completions[place] += len(group.tokens)  # also those with advantage 0
        tokens[place] += group.mask.sum()
        teaching[place] += group.advantage.any()
    # Over all replicas, and before the minibatch is split: neither processes nor --micro-batch may change the gradient.
    world.sum(totals)
    turns = (completions > 0).sum(1)  # (N,)
    for group in groups:
        place = group.agent, group.turn
        if cfg.normalize == "sequence":  # a mean over completions, each a mean over its tokens
            divisor = group.mask.sum(1, keepdim=True) * completions[place]
        elif cfg.normalize == "token":  # a mean over all tokens
            divisor = tokens[place]
        else:  # constant: over completions, each a sum divided by the same number (Dr. GRPO, arXiv 2503.20783)
            divisor = cfg.max_new_tokens * completions[place]
        group.weight = (group.mask / (divisor * turns[group.agent])).float()
    learns = completions if cfg.kl else teaching  # the KL penalty teaches without an advantage, too
    return learns.sum(1).nonzero()[:, 0].tolist()


def policy_loss(logp, logp_old, advantage, weight, cfg, logp_ref=None):
    """PPO's clipped objective as a loss, summed over tokens -> scalar. Tensors (BG, C), the advantage (BG, 1)."""
    # A good token's ratio counts only up to 1 + clip_eps_high, a bad one's only down to 1 - clip_eps. Beyond that the
    # gradient is 0: the policy has moved far enough.
    ratio = torch.exp(logp - logp_old)
    clipped = ratio.clamp(1 - cfg.clip_eps, 1 + cfg.clip_eps_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    if logp_ref is not None:
        # An estimate of the divergence from the reference policy that is never negative ("k3", J. Schulman 2020). It is
        # unbiased for tokens of the current policy; these come from the one that sampled, a few steps ago.
        d = logp_ref - logp
        objective = objective - cfg.kl * (torch.exp(d) - d - 1)
    return -(weight * objective).sum()


def log_policy(logits, temperature):
    """The one definition of the policy: (..., V) logits, V the vocabulary -> (..., V) float32 log-probabilities.

    The sampler and the scorer, token_logprobs, both call it, so the policy that is trained is the one that sampled.
    There is no top-k or top-p: with them, a token could be drawn from one distribution and scored by another.
    """
    return F.log_softmax(logits.float() / temperature, dim=-1)


# =====================================================================================================================
# MACHINERY. The algorithm ends here. What follows makes it run: the policy, attention that computes a prompt once for
# its whole group, sampling and scoring, several processes, metrics.
# =====================================================================================================================


class UserError(ValueError):
    """An error that the user can fix. train.py prints it as one line and exits with code 2."""


def first_line(error):
    """The first line of an error's message, or its repr if the message is empty."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def out_of_memory(error):
    """Whether an error says that the device, or the machine, has no memory left."""
    refused = ("can't allocate memory", "Cannot allocate memory")  # by PyTorch, by the system
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in refused)


# ---------------------------------------------------------------- the policy
class Policy:
    """A language model that plays one agent or several, with its tokenizer and, if it trains, its optimizer.

    One policy for each agent is the paper's setting. One policy for several agents shares all weights or, with
    adapters, keeps the model frozen and trains a low-rank update of it for each agent. dtype: what the model computes
    in. The optimizer works on float32 copies (masters) of lower-precision weights, because a step at the usual learning
    rates is smaller than the spacing of bfloat16 numbers and would be lost.
    """

    def __init__(self, model, tokenizer, agents, cfg, dtype=torch.float32, train=True, adapters=None):
        """adapters: None, or a list with the tensors of the adapter that each agent starts with, {} for a new one."""
        prepare_layers(model)
        self.lr = cfg.lr or default_lr(model, adapters)  # before the adapters add to the model's parameters
        self.model = model
        self.tokenizer = tokenizer
        self.agents = list(agents)
        self.dtype = dtype
        self.stop_ids = known_stop_ids(model, tokenizer)
        self.context = context_length(model.config.get_text_config())  # tokens of a prompt and its completion together
        # A CUDA graph is captured on the current device.
        self.graphs = model.device.type == "cuda" and model.device.index == torch.cuda.current_device()
        self.adapters = Adapters(model, self.agents, adapters, cfg) if adapters else None
        self.bare = False  # True: compute without the adapters
        self.reference = None  # another Policy, frozen, for the kl term
        self.template = {}  # arguments of the chat template
        use_group_attention(self)  # before the weights are rounded: the check compares precisely
        self.trained = [p for p in model.parameters() if p.requires_grad] if train else []
        # A part of a stacked tensor cannot be a parameter, so adapters are copied in float32, too.
        self.has_copies = bool(adapters) or dtype != torch.float32  # else the weights are their own masters
        self.masters = {}
        for agent in self.agents if adapters else self.agents[:1]:  # all agents that share weights: under the first one
            self.masters[agent] = self.trained
            if self.has_copies:
                self.masters[agent] = [self.piece(p, agent).detach().float().clone() for p in self.trained]
                for master in self.masters[agent]:
                    master.requires_grad_()
        for p in model.parameters():
            p.data = p.data.to(dtype)  # not model.to(dtype), which would also round the rotary frequencies
        if train:
            # "steps" is our own, for the warmup. The optimizer keeps it in its state_dict.
            options = [{"params": masters, "steps": 0} for masters in self.masters.values()]
            self.optimizer = torch.optim.AdamW(options, lr=self.lr, weight_decay=0.0, fused=True)
        if adapters:
            self.reference = copy.copy(self)
            self.reference.bare = True

    def checkpoint_layers(self, on):
        """Say whether the next call computes layers again in the backward pass, if --checkpointing has enabled that.

        transformers does so in training mode. The modules inside a layer stay in evaluation mode: in training mode,
        some compute something else, such as routers that add noise.
        """
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = on

    def choose_adapters(self, groups, tokens):
        """Say whose tokens the next call of the model computes. tokens: how many of each group, a number or (B,)."""
        if self.adapters:
            agents = torch.tensor([self.agents.index(group.agent) for group in groups]).repeat_interleave(tokens)
            self.adapters.choose(None if self.bare else agents.to(self.model.device))

    def piece(self, tensor, agent):
        """An agent's part of a stacked adapter, or of its gradient. Without adapters, the whole tensor."""
        return tensor[self.agents.index(agent)] if self.adapters else tensor

    def encode(self, prompt):
        """Token ids of a text, as one user message where the tokenizer has a chat template. Lists pass through."""
        if not isinstance(prompt, str):
            return [token.__index__() for token in prompt]  # integers, also those of numpy
        if not self.tokenizer.chat_template:
            return self.tokenizer(prompt)["input_ids"]
        message = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "return_dict": False}
        return self.tokenizer.apply_chat_template(message, **options, **self.template)

    def decode(self, group):
        """The G texts of a group, without the stop token and what follows it, and without thoughts."""
        end = self.tokenizer.decode(group.prompt[-8:])  # some templates begin the thoughts
        thinks = "<think>" in end and "</think>" not in end.rpartition("<think>")[2]
        lengths = group.mask.sum(1) - group.ended.long()
        texts = []
        for row, length in zip(group.tokens.tolist(), lengths.tolist(), strict=True):
            text = self.tokenizer.decode(row[:length], skip_special_tokens=True)
            texts.append(without_thoughts("<think>" + text if thinks else text))
        return texts

    def collect_gradients(self):
        """Add the model's gradients to those of the masters, in float32."""
        if not self.has_copies:
            return  # the backward pass has added them already
        for agent, masters in self.masters.items():
            for p, master in zip(self.trained, masters, strict=True):
                if p.grad is not None:
                    grad = self.piece(p.grad, agent).float()
                    master.grad = grad if master.grad is None else master.grad.add_(grad)
        self.model.zero_grad(set_to_none=True)

    def step(self, learners, cfg, training_step):
        """One optimizer step, with the gradient clipped to a norm -> {agent: the norm that it had}.

        With adapters, each agent has a norm and a step of its own, and only those in `learners` make a step: Adam's
        momentum would move the others without a gradient. training_step: the number of the step of the run, from 1.
        """
        norms = {}
        for options, (agent, masters) in zip(self.optimizer.param_groups, self.masters.items(), strict=True):
            if self.adapters and agent not in learners:
                for master in masters:
                    master.grad = None
                continue
            world.sum_gradients(masters)
            norms[agent] = torch.nn.utils.clip_grad_norm_(masters, cfg.max_grad_norm).item()
            if not np.isfinite(norms[agent]):
                raise FloatingPointError(f"the gradient norm of agent {agent} is {norms[agent]}")
            # --warmup: Adam's first steps move every weight by the whole learning rate, however small its gradient.
            # --anneal: the noise of the last steps stays in the weights, so make these steps smaller.
            warm = min(1, (options["steps"] + 1) / (cfg.warmup + 1))
            options["lr"] = self.lr * warm * (1 - (training_step - 1) / cfg.steps if cfg.anneal else 1)
            options["steps"] += 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.copy_masters()
        return norms

    @torch.no_grad()
    def copy_masters(self):
        """Round the masters to the precision that the model computes in."""
        if not self.has_copies:
            return
        for agent, masters in self.masters.items():
            for p, master in zip(self.trained, masters, strict=True):
                self.piece(p, agent).copy_(master)

    def state(self):
        """What a checkpoint keeps: float32 weights, the optimizer's moments and steps."""
        weights = {}
        for agent, masters in self.masters.items():
            weights[agent] = [master.detach() for master in masters]
        return {"masters": weights, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state(self, state):
        """Continue from a checkpoint, equal to the last bit."""
        for agent, masters in self.masters.items():
            for p, tensor in zip(masters, state["masters"][agent], strict=True):
                p.copy_(tensor)
        self.copy_masters()
        self.optimizer.load_state_dict(state["optimizer"])

    def merged(self, agent):
        """The weights of an agent by name, its adapter added; None without adapters: they are the model's own."""
        return self.adapters.merged(self.model, self.agents.index(agent)) if self.adapters else None


class Adapters:
    """A low-rank update of every linear layer but the output for each of N agents (LoRA, arXiv 2106.09685).

        y = W x + (alpha / r) B_i A_i x       for agent i, with W frozen and alpha = 32

    The A of all agents are stacked into one matrix, and so are the B. One product computes the columns of all
    agents, and a mask keeps those of the agent that a token belongs to. So one batch holds rows of different agents.
    Experts that a mixture keeps in one tensor are no linear layers, and get no update.
    """

    alpha = 32

    def __init__(self, model, agents, starts, cfg):
        self.rank = cfg.rank
        self.agents = agents
        self.layers = {}
        self.columns = None  # (tokens, N * r): 1 on the columns of each token's agent, else 0; None: the bare model
        model.requires_grad_(False)
        for name, layer in model.named_modules():
            # Not their subclasses: a router that is one returns more than a product.
            if type(layer) in (torch.nn.Linear, Linear, Conv1D) and layer is not model.get_output_embeddings():
                is_linear = isinstance(layer, torch.nn.Linear)  # GPT-2's Conv1D is the same with W^T
                inputs, outputs = layer.weight.shape[::-1] if is_linear else layer.weight.shape
                # A starts at random and B at zero, so the first update is that of B. Every agent's random numbers are
                # its own, however many agents there are.
                draws = []
                for agent in agents:
                    rng = np.random.default_rng((cfg.seed, agent, len(self.layers)))
                    draws.append(rng.standard_normal((cfg.rank, inputs), np.float32))
                down = torch.from_numpy(np.stack(draws)) / inputs**0.5
                layer.down = torch.nn.Parameter(down.to(model.device))  # (N, r, in): A
                layer.up = torch.nn.Parameter(torch.zeros(len(agents), cfg.rank, outputs, device=model.device))  # B^T
                layer.register_forward_hook(self.add_update)
                self.layers[name] = layer
        for i, start in enumerate(starts):
            if start:
                self.load(i, start)

    def choose(self, agents):
        """From now on, the t-th token of the model's input belongs to the agent in place agents[t]; None: to nobody."""
        self.columns = None
        if agents is not None:
            columns = F.one_hot(agents, len(self.agents)).repeat_interleave(self.rank, 1)
            self.columns = columns.to(next(iter(self.layers.values())).down.dtype)

    def add_update(self, layer, inputs, out):
        """The forward hook of a linear layer."""
        if self.columns is None:
            return out
        hidden = F.linear(inputs[0].flatten(0, -2), layer.down.flatten(0, 1)) * self.columns  # (tokens, N * r)
        # In place while sampling: in a decode step, out may be a transposed matrix (see Linear), slow to copy.
        add = torch.addmm if torch.is_grad_enabled() else torch.Tensor.addmm_
        return add(out.flatten(0, -2), hidden, layer.up.flatten(0, 1), alpha=self.alpha / self.rank).view_as(out)

    @torch.no_grad()
    def merged(self, model, i):
        """The model's weights by name, with the update of the i-th agent added."""
        weights = {name: p for name, p in model.state_dict().items() if not name.endswith((".down", ".up"))}
        for name, layer in self.layers.items():
            update = (self.alpha / self.rank) * layer.up[i].float().T @ layer.down[i].float()  # (out, in)
            update = update if isinstance(layer, torch.nn.Linear) else update.T
            # Off the device, which may have no room for a second model.
            weights[f"{name}.weight"] = (layer.weight.float() + update).to(layer.weight.dtype).cpu()
        return weights

    def tensors(self, i):
        """The adapter of the i-th agent, by PEFT's names."""
        named = {}
        for name, layer in self.layers.items():
            named[f"base_model.model.{name}.lora_A.weight"] = layer.down[i].detach().float().contiguous()
            named[f"base_model.model.{name}.lora_B.weight"] = layer.up[i].detach().float().T.contiguous()
        return named

    def peft_config(self):
        """What PEFT has to know to load the tensors, but for the name of the model."""
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.rank, "lora_alpha": self.alpha}
        config["target_modules"] = sorted(self.layers)
        config["fan_in_fan_out"] = any(isinstance(layer, Conv1D) for layer in self.layers.values())
        return config

    @torch.no_grad()
    def load(self, i, tensors):
        """Set the adapter of the i-th agent, by PEFT's names."""
        missing = []
        for name, own in self.tensors(i).items():
            if name not in tensors or tensors[name].shape != own.shape:
                missing.append(name)
        if missing:
            lacking = f"lacks {len(missing)} tensors of this model, such as {missing[0]}"
            raise UserError(f"the adapter of agent {self.agents[i]} {lacking}")
        for name, layer in self.layers.items():
            layer.down[i].copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
            layer.up[i].copy_(tensors[f"base_model.model.{name}.lora_B.weight"].T)


def default_lr(model, adapters):
    """The learning rate for a model. Both rates were found with 135 M parameters.

    A model of 0.5 B needs less: with adapters it learns at 1e-4 and 2e-4, and 4e-4 destroys it. The inverse proportion
    also agrees with the paper, which trains 1.7 B at 5e-6.
    """
    return (8e-4 if adapters else 6e-5) * min(1, 135e6 / model.num_parameters())


def without_thoughts(text):
    """The answer of a model that thinks first: what follows its thoughts, or nothing if they do not end."""
    text = re.sub(r"<think>.*?</think>\s*", "", text, flags=re.DOTALL)
    return "" if "<think>" in text else text


def prepare_layers(model):
    """Switch off dropout, and use the faster product for single tokens (see Linear)."""
    model.eval()
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Linear
        # With dropout, the policy that is scored would not be the one that sampled. Layers that are checkpointed are in
        # training mode, and some call F.dropout with a rate that they store in an attribute of their own.
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or isinstance(module, torch.nn.Dropout)):
                setattr(module, name, 0.0)


class Linear(torch.nn.Linear):
    """The same product as (W x^T)^T instead of x W^T, which is faster when each row has one token.

    In float32 on a CPU this takes a third off a decode step of 16 rows.
    """

    def forward(self, x):
        if x.dim() != 3 or x.shape[1] > 1 or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        out = (self.weight @ x[:, 0].T).T[:, None]
        return out if self.bias is None else out + self.bias


def known_stop_ids(model, tokenizer):
    """All token ids that end an answer: a model can have several."""
    found = []
    for place in (model.generation_config, model.config, tokenizer):
        ids = getattr(place, "eos_token_id", None)
        found += ids if isinstance(ids, (list, tuple)) else [ids]
    return sorted(set(found) - {None})


def context_length(config):
    """How many tokens a prompt and its completion may have together; infinite if there is no limit."""
    # Beyond a sliding window, or the length at which longrope changes its frequencies, the sampler and the scorer would
    # compute a token in different ways.
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        limits.append(rope.get("original_max_position_embeddings"))
    return min(filter(None, limits), default=float("inf"))


def new_group(policy, task, agent, node, cfg, step):
    """The group of an agent at a node, with its prompt and its random numbers; None if the task lets it be silent."""
    prompt, dropped = fit_prompt(policy, task, agent, node, cfg)
    if prompt is None:
        return None
    turn = len(node.history)
    # These six integers seed the group's random numbers. None of them says which process or batch draws the numbers, so
    # a run stays the same however its work is divided. The slot gives an item that comes twice in a step other answers.
    stream = (cfg.seed, step, turn, agent, node.slot, node.branch)
    return Group(agent, node.slot, turn, prompt, stream, dropped)


def fit_prompt(policy, task, agent, node, cfg):
    """Token ids of an agent's prompt at a node, and how many of its oldest turns it had to leave out to fit.

    The ids are None if the task gives the agent no prompt: it is silent in this turn.
    """
    vocabulary = policy.model.get_input_embeddings().weight.shape[0]
    # Where agents take turns, a history without its first round leaves everyone's turn where it is.
    turns_at_once = task.num_agents if getattr(task, "protocol", "") == "sequential" else 1
    for dropped in range(0, len(node.history) + 1, turns_at_once):
        prompt = checked_prompts(task, node.item, node.history[dropped:])[agent]
        if prompt is None and dropped == 0:
            return None, 0
        if prompt is None:  # with a shorter history, another agent would speak
            break
        ids = policy.encode(prompt)
        if not ids:
            raise UserError(f"the prompt of agent {agent} has no tokens; a task lets an agent be silent with None")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise UserError(f"the tokens {min(ids)} to {max(ids)} are outside the model's vocabulary of {vocabulary}")
        if len(ids) + cfg.max_new_tokens <= policy.context:
            return ids, dropped
    raise UserError(
        f"a prompt of {len(ids)} tokens and {cfg.max_new_tokens} new ones exceed the model's context of "
        f"{policy.context}: shorten the item or lower --max-new-tokens"
    )


def checked_prompts(task, item, history):
    """The task's prompts: for each agent a text, token ids, or None where it is silent."""
    prompts = task.prompts(item, history)
    kinds = set(map(type, prompts)) if isinstance(prompts, list) else set()
    if not kinds or len(prompts) != task.num_agents or kinds - {str, list, type(None)}:
        made = f"the task {type(task).__name__} makes {prompts!r} for {task.num_agents} agents"
        raise UserError(f"{made}, not a list of as many texts")
    return prompts


# ---------------------------------------------------------------- one prompt for a group
class Prompts:
    """The prompts of B groups as a tensor, padded on the right: causal attention never reaches the padding.

    The input of a completion is shifted by one: its column 0 is a copy of the prompt's last token, and its column c is
    completion token c - 1. So the logits of column c predict token c, and the first token is no special case. The
    original of the copy is hidden from completions, or they would see it twice.
    """

    def __init__(self, groups, copies, device):
        """copies: completions of each prompt."""
        prompts = [torch.tensor(group.prompt) for group in groups]
        self.lengths = list(map(len, prompts))
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        self.ids = pad_sequence(prompts, batch_first=True).to(device)  # (B, P)
        self.places = torch.arange(self.ids.shape[1], device=device).expand_as(self.ids)  # (B, P) positions
        self.real = self.places < lengths  # (B, P) False on padding
        self.visible = self.places < lengths - 1  # (B, P) where completions look
        self.opener = self.ids.gather(1, lengths - 1).repeat_interleave(copies, 0)  # (BG, 1) ids
        self.opener_place = (lengths - 1).repeat_interleave(copies, 0)  # (BG, 1)


def group_attention(module, query, key, value, attention_mask, scaling=None, *, group_attend, **kwargs):
    """Replaces a model's attention: hands queries, keys and values to the function group_attend.

    transformers forwards unknown keyword arguments, such as group_attend, from the call of the model to this function.
    There are three functions: GroupCache.read_prompts, GroupCache.attend_next and MicroBatch.attend_all. Each takes the
    layer's number, query (rows, heads, T, D), key and value (rows, Hkv, T, D), and a scale, and returns
    (rows, T, heads, D). transformers makes no attention_mask for an attention that it does not know.
    """
    unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if attention_mask is not None:
        unknown.append("a mask of its own")
    if unknown:
        raise UserError(f"this model's attention uses {', '.join(unknown)}, which magrpo.py does not implement")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return group_attend(module.layer_idx, query, key, value, scale), None


def attend_causally(query, key, value, scale):
    """PyTorch's own attention of whole sequences -> (rows, T, heads, D)."""
    shared = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared)
    return out.transpose(1, 2)


class GroupCache:
    """Keys and values while sampling: of B prompts, once each, and of the BG completions that grow from them.

    D is the dimension of a head, Hkv the number of key heads.

    prompt[layer]: two tensors (B, Hkv, P, D). own[layer]: two (BG, Hkv, C, D), filled up to `column`, zeros behind it.
    hidden: (B, P + C), True where the current token may not look. A decode step can be a CUDA graph, because `column`
    is a tensor and no shape depends on it: each step reads `width` of the C columns, filled or not.
    """

    def __init__(self, prompts, max_new_tokens):
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.prompt = {}
        self.own = {}
        self.hidden = F.pad(~prompts.visible, (0, max_new_tokens), value=True)
        self.column = torch.full((1,), -1, device=prompts.ids.device)
        self.width = min(256, max_new_tokens)  # it doubles when it is full (see sample): most answers are short

    def next_column(self):
        """Move on to the next column of the completions, and make it visible to attention."""
        self.column += 1
        self.hidden.index_fill_(1, self.prompts.ids.shape[1] + self.column, False)

    def read_prompts(self, layer, query, key, value, scale):
        """Attention of all prompts, packed in one row without padding. Stores their keys and values."""
        keys = key.split(self.prompts.lengths, 2)
        values = value.split(self.prompts.lengths, 2)
        out = []
        for b, q in enumerate(query.split(self.prompts.lengths, 2)):
            out.append(attend_causally(q, keys[b], values[b], scale))
        self.prompt[layer] = [pad_columns(keys), pad_columns(values)]
        return torch.cat(out, 1)

    def attend_next(self, layer, query, key, value, scale):
        """Attention of one token of each row, over its prompt and S = width columns of its own.

        The rows of a group, and the heads that share a key head, fold into one product with the prompt's keys.
        """
        if layer not in self.own:
            size = (*key.shape[:2], self.max_new_tokens)
            self.own[layer] = [key.new_zeros(*size, key.shape[3]), value.new_zeros(*size, value.shape[3])]
        for buffer, new in zip(self.own[layer], (key, value), strict=True):
            buffer.index_copy_(2, self.column, new)
        prompt_keys, prompt_values = self.prompt[layer]  # (B, Hkv, P, D)
        own_keys = self.own[layer][0][:, :, : self.width]  # (BG, Hkv, S, D)
        own_values = self.own[layer][1][:, :, : self.width]
        (B, Hkv, P, D), (BG, heads, *_), S = prompt_keys.shape, query.shape, self.width
        G, share = BG // B, heads // Hkv
        query = query * scale
        folded = query.reshape(B, G, Hkv, share, D).transpose(1, 2).reshape(B, Hkv, G * share, D)
        to_prompt = (folded @ prompt_keys.mT).view(B, Hkv, G, share, P)
        to_own = query.reshape(BG, Hkv, share, D) @ own_keys.mT
        to_own = to_own.view(B, G, Hkv, share, S).transpose(1, 2)  # (B, Hkv, G, share, S)
        scores = torch.cat([to_prompt, to_own], dim=-1)
        scores.masked_fill_(self.hidden[:, None, None, None, : P + S], float("-inf"))
        # Also for bfloat16, softmax adds up in float32.
        on_prompt, on_own = scores.softmax(-1).split([P, S], dim=-1)
        # -1: some models have values of another width than D.
        out = (on_prompt.reshape(B, Hkv, G * share, P) @ prompt_values).view(B, Hkv, G, share, -1).transpose(1, 2)
        own = on_own.transpose(1, 2).reshape(BG, Hkv, share, S) @ own_values
        return out.reshape(BG, 1, heads, -1) + own.view(BG, 1, heads, -1)


def pad_columns(parts):
    """B tensors (1, Hkv, P_i, D) -> (B, Hkv, P, D), zeros behind the shorter ones."""
    rows = pad_sequence([part[0].transpose(0, 1) for part in parts], batch_first=True)
    return rows.transpose(1, 2).contiguous()


def micro_batches(groups, cfg, device):
    """Split a minibatch into batches of at most cfg.micro_batch completions, similar lengths together."""
    groups = [group for group in groups if group.advantage.any() or cfg.kl]  # the others have no gradient
    groups.sort(key=lambda group: group.tokens.shape[1], reverse=True)
    together = max(cfg.micro_batch // cfg.group, 1)
    for i in range(0, len(groups), together):
        for start in range(0, cfg.group, cfg.micro_batch):  # more than once only if a group is larger than a batch
            yield MicroBatch(groups[i : i + together], slice(start, start + cfg.micro_batch), device)


class MicroBatch:
    """The completions `members` (a slice) of B groups, on the device, for one pass of the scorer: BG rows of C tokens.

    The model sees one row for each group, `prompt | completion 0 | completion 1 | ...`. Nothing is kept between layers,
    so gradient checkpointing may compute a layer twice.
    """

    def __init__(self, groups, members, device):
        self.groups = groups
        C = max(int(group.mask[members].sum(1).max()) for group in groups)  # trimmed to the longest
        for name in ("tokens", "mask", "logp", "weight"):  # (BG, C) each
            rows = []
            for group in groups:
                part = getattr(group, name)[members, :C]
                rows.append(F.pad(part, (0, C - part.shape[1])))
            setattr(self, name, torch.cat(rows).to(device))
        self.advantage = torch.cat([group.advantage[members] for group in groups]).to(device)[:, None]  # (BG, 1)
        BG = len(self.tokens)
        self.prompts = Prompts(groups, BG // len(groups), device)
        # Where each token of a completion looks, (BG, 1, C, P + C): at its prompt, and at itself up to its own column.
        prompt = self.prompts.visible.repeat_interleave(BG // len(groups), 0)[:, None].expand(BG, C, -1)
        own = torch.ones(C, C, dtype=torch.bool, device=device).tril().expand(BG, C, C)
        self.looks = torch.cat([prompt, own], 2)[:, None]

    def attend_all(self, layer, query, key, value, scale):
        """Attention of whole rows: the prompt to itself, and every completion to the prompt and itself."""
        (B, P), (BG, C) = self.prompts.ids.shape, self.tokens.shape
        out = attend_causally(query[:, :, :P], key[:, :, :P], value[:, :, :P], scale)  # (B, P, heads, D)

        def completions(x):  # (B, heads, P + G * C, D) -> (BG, heads, C, D)
            return x[:, :, P:].unflatten(2, (BG // B, C)).transpose(1, 2).flatten(0, 1)

        def with_prompt(x):  # (B, Hkv, P + G * C, D) -> (BG, Hkv, P + C, D), a copy that is small beside the scores
            return torch.cat([x[:, :, :P].repeat_interleave(BG // B, 0), completions(x)], 2)

        query, key, value = completions(query), with_prompt(key), with_prompt(value)
        on_cpu = query.device.type == "cpu"  # where the kernel shares key heads itself, also under a mask
        share = 1 if on_cpu else query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        own = F.scaled_dot_product_attention(query, key, value, self.looks, scale=scale, enable_gqa=on_cpu)
        return torch.cat([out, own.transpose(1, 2).reshape(B, -1, *out.shape[2:])], 1)


@torch.no_grad()
def use_group_attention(policy):
    """Switch the policy's model to group_attention, after checking that it reproduces the model's own attention.

    The check samples and scores two short prompts. Raises UserError for a model whose attention is another one.
    """
    AttentionInterface.register("group", group_attention)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a kernel for each new length
    model = policy.model
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UserError(f"magrpo.py does not implement layers of {', '.join(sorted(unknown))}")
    usual = model.config._attn_implementation
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    cfg = Settings(group=2, max_new_tokens=3, temperature=1.0)
    groups = [Group(policy.agents[0], 0, 0, ids[:3], (0,)), Group(policy.agents[0], 1, 0, ids[3:], (1,))]
    try:
        model.set_attn_implementation("group")
        sample(policy, groups, cfg)
        batch = MicroBatch(groups, slice(None), model.device)
        found = torch.stack([batch.logp, token_logprobs(policy, batch, cfg)])
        model.set_attn_implementation(usual)
        expected = torch.zeros_like(batch.logp)
        for b, prompt in enumerate([ids[:3], ids[3:]]):
            tokens = batch.tokens[2 * b : 2 * b + 2]
            rows = torch.cat([tokens.new_tensor([prompt, prompt]), tokens], 1)
            policy.choose_adapters(groups[:1], rows.numel())
            logits = model(rows, use_cache=False).logits[:, len(prompt) - 1 : -1]
            expected[2 * b : 2 * b + 2] = log_policy(logits, 1.0).gather(2, tokens[..., None])[..., 0]
        model.set_attn_implementation("group")
    except Exception as error:  # ours, and whatever unsupported models raise
        if out_of_memory(error):
            raise
        raise UserError(f"group attention does not work with {type(model).__name__}: {first_line(error)}") from error
    expected *= batch.mask
    off = ((found - expected).norm(dim=(1, 2)) / expected.norm()).max()
    if not off < (1e-3 if model.dtype == torch.float32 else 5e-2):  # `not <` also refuses NaN
        raise UserError(f"group attention does not reproduce {type(model).__name__} (relative error {off:.1g})")


# ---------------------------------------------------------------- sampling and scoring
@torch.no_grad()
def sample(policy, groups, cfg):
    """Draw cfg.group completions of each group's prompt, all side by side, and fill the groups in.

    A completion depends on the prompt and the stream of its group, not on its batch mates, up to rounding.
    """
    model = policy.model
    device = model.device
    policy.checkpoint_layers(False)  # it looks at the state of random numbers, which no CUDA graph allows
    shape = cfg.group, cfg.max_new_tokens
    draws = [np.random.default_rng(group.stream).random(shape, np.float32) for group in groups]
    uniform = torch.from_numpy(np.concatenate(draws)).to(device)  # (BG, C): one number decides each token
    prompts = Prompts(groups, cfg.group, device)
    cache = GroupCache(prompts, cfg.max_new_tokens)
    world.may_stop = True
    policy.choose_adapters(groups, torch.tensor(prompts.lengths))
    # logits_to_keep is an index: for a number, some models leave out tokens whose keys and values we need.
    call = {"position_ids": prompts.places[prompts.real][None], "use_cache": False}
    call["logits_to_keep"] = torch.tensor([0], device=device)
    model(prompts.ids[prompts.real][None], **call, group_attend=cache.read_prompts)  # in one row, without padding

    policy.choose_adapters(groups, cfg.group)
    stop_ids = torch.tensor(policy.stop_ids, dtype=torch.long, device=device)
    token, place = prompts.opener, prompts.opener_place
    ended = torch.zeros_like(token, dtype=torch.bool)
    tokens = torch.zeros_like(uniform, dtype=torch.long)
    mask = torch.zeros_like(uniform, dtype=torch.bool)
    logps = torch.zeros_like(uniform)

    def step():
        """Draw the next token of every row. All of it happens in place, so that it can be repeated as a CUDA graph."""
        cache.next_column()
        logits = model(token, position_ids=place, use_cache=False, group_attend=cache.attend_next).logits[:, -1]
        logp = log_policy(logits, cfg.temperature)  # (BG, V)
        token.copy_(inverse_cdf(logp.exp(), uniform.index_select(1, cache.column)))
        tokens.index_copy_(1, cache.column, token)
        mask.index_copy_(1, cache.column, ~ended)
        logps.index_copy_(1, cache.column, logp.gather(1, token).masked_fill(ended, 0.0))
        ended.logical_or_((token == stop_ids).any(1, keepdim=True))
        place.add_(1)

    repeat = step
    for length in range(1, cfg.max_new_tokens + 1):
        if length > cache.width:
            cache.width = min(2 * cache.width, cfg.max_new_tokens)
            repeat = step  # a graph has captured the old width
        repeat()
        if ended.all():
            break
        if repeat is step and policy.graphs and length < cfg.max_new_tokens:
            repeat = as_graph(step, policy)
    world.may_stop = False
    if not torch.isfinite(logps[:, :length]).all():
        raise FloatingPointError("the probabilities that the policy samples from are not finite")
    fill_in(groups, tokens.cpu(), mask.cpu(), logps.cpu(), ended.cpu())


def fill_in(groups, tokens, mask, logp, ended):
    """Divide the sampled rows among their groups, each trimmed to its longest completion."""
    size = len(tokens) // len(groups)
    for b, group in enumerate(groups):
        rows = slice(b * size, (b + 1) * size)
        columns = slice(int(mask[rows].sum(1).max()))
        group.tokens = tokens[rows, columns]
        group.mask = mask[rows, columns]
        group.logp = logp[rows, columns]
        group.ended = ended[rows, 0]
        group.advantage = torch.zeros(size)  # no credit yet; the scorer asks for it, also in use_group_attention
        group.weight = torch.zeros_like(group.logp)


def as_graph(step, policy):
    """A decode step as a CUDA graph: Python takes longer to launch its thousand kernels than a GPU to run them."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # The outer context restores the stream even if the capture fails.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, capture_error_mode="thread_local"), refused_waits():
            step()
        return graph.replay
    except RuntimeError as error:  # the model waits for the GPU, for example to route tokens to experts
        if out_of_memory(error):
            raise
        policy.graphs = False
        return step


@contextlib.contextmanager
def refused_waits():
    """Raise RuntimeError where Python would wait for the GPU: during a capture, that corrupts the graph's memory."""
    with warnings.catch_warnings(action="ignore"):  # torch warns that it may miss some
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def inverse_cdf(probs, u):
    """Draw from (BG, V) probabilities with one uniform number in [0, 1) for each row, (BG, 1) -> ids (BG, 1)."""
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    # u * total may round up to the total. Strictly below it, the first cdf entry above the target belongs to a token
    # with a probability above 0.
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    last = probs.shape[-1] - 1  # for NaN, searchsorted returns one more
    return torch.searchsorted(cdf, target, right=True).clamp_(max=last)


def token_logprobs(policy, batch, cfg):
    """Log-probability of every sampled token of a batch, (BG, C) float32, with gradient; 0 where the mask is False."""
    prompts, (BG, C) = batch.prompts, batch.tokens.shape
    before = torch.cat([prompts.opener, batch.tokens[:, :-1]], 1)  # (BG, C) input token of each column
    places = prompts.opener_place + torch.arange(C, device=before.device)  # (BG, C)
    tokens = torch.cat([prompts.ids, before.view(len(prompts.ids), -1)], 1)  # (B, P + G * C): one row for each group
    places = torch.cat([prompts.places, places.view(len(prompts.ids), -1)], 1)
    answers = torch.arange(prompts.ids.shape[1], tokens.shape[1], device=tokens.device)  # an index, as in sample
    call = {"position_ids": places, "use_cache": False, "logits_to_keep": answers}
    policy.choose_adapters(batch.groups, tokens.shape[1])
    policy.checkpoint_layers(torch.is_grad_enabled())
    logits = policy.model(tokens, **call, group_attend=batch.attend_all).logits.view(BG, C, -1)
    return TokenLogProb.apply(logits, batch.tokens, cfg.temperature).masked_fill(~batch.mask, 0.0)


class TokenLogProb(torch.autograd.Function):
    """log_policy(logits, temperature) at the tokens: (BG, C, V) and (BG, C) -> (BG, C), one row at a time.

    The same as gather after log_policy, with less memory: logits are the largest tensors of training. Float32 copies
    of them exist for one row only, and the backward pass writes the gradient, one-hot minus softmax, only once.
    """

    @staticmethod
    def forward(ctx, logits, tokens, temperature):
        ctx.save_for_backward(logits, tokens)
        ctx.temperature = temperature
        rows = zip(logits, tokens, strict=True)
        return torch.stack([log_policy(x, temperature).gather(-1, t[:, None])[:, 0] for x, t in rows])

    @staticmethod
    def backward(ctx, grad):
        logits, tokens = ctx.saved_tensors
        out = torch.empty_like(logits)
        for x, t, g, o in zip(logits, tokens, grad, out, strict=True):
            dlogits = log_policy(x, ctx.temperature).exp_().mul_(-g[:, None])  # (C, V)
            dlogits.scatter_add_(-1, t[:, None], g[:, None])
            o.copy_(dlogits.div_(ctx.temperature))
        return out, None, None


# ---------------------------------------------------------------- several processes
class World:
    """How work is divided among the processes that torchrun started. By default there is one, which does everything.

    Layout "together": every process holds all agents. "apart": each agent lives on processes of its own, as in the
    paper's decentralised execution. Processes with the same agents and different items are replicas: they sum
    gradients. Processes with the same items and different agents are peers: they exchange texts, rewards and advice.
    Beyond that, only metrics and the checks of a run cross.
    """

    rank = 0  # the number of this process
    peer = 0  # with layout apart, the number of its agent
    replica = 0  # which share of the items it has
    size = num_peers = num_replicas = 1
    replicas = peers = None  # process groups
    may_stop = False  # True while sampling: an interrupt may drop the rollout

    def start(self, layout, num_agents):
        """Divide the processes of torch.distributed, if it is on."""
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.num_peers = num_agents if layout == "apart" else 1
        if self.size % self.num_peers:
            raise UserError(f"--layout apart needs a multiple of {num_agents} processes, one or more for each agent")
        self.num_replicas = self.size // self.num_peers
        self.peer, self.replica = divmod(self.rank, self.num_replicas)
        grid = torch.arange(self.size).view(self.num_peers, self.num_replicas)
        if self.size > 1:  # every process creates all process groups, in the same order, and gets its own
            self.replicas, _ = dist.new_subgroups_by_enumeration(grid.tolist())
            self.peers, _ = dist.new_subgroups_by_enumeration(grid.T.tolist())

    def share(self, items):
        """This process's items, each with its slot: its place among all items, however they are divided."""
        return list(enumerate(items))[self.replica :: self.num_replicas]

    def divide(self, function, jobs):
        """function(jobs), where each peer computes a share and all get the results, in order."""
        shares = self.exchange(function(jobs[self.peer :: self.num_peers]))
        return [shares[i % self.num_peers][i // self.num_peers] for i in range(len(jobs))]

    def exchange_texts(self, nodes):
        """Complete the texts of each node with those of the agents that live elsewhere."""
        for texts in self.exchange([node.texts for node in nodes]):
            for node, theirs in zip(nodes, texts, strict=True):
                node.texts.update(theirs)

    def exchange(self, value):
        """The values of all peers, in the order of their agents."""
        return self.gather(value, self.peers)

    def sum(self, tensor):
        """Sum of a tensor over the replicas, in place."""
        if self.num_replicas > 1:
            dist.all_reduce(tensor, group=self.replicas)
        return tensor

    def sum_gradients(self, parameters):
        """Add up the replicas' gradients. A parameter that has none on this process counts as zeros."""
        for p in parameters if self.num_replicas > 1 else ():
            p.grad = self.sum(torch.zeros_like(p) if p.grad is None else p.grad)

    def gather(self, value, group=None):
        """The values of all processes, or of those of a process group, in their order."""
        values = [value]
        if self.size > 1:
            values = [None] * dist.get_world_size(group)
            dist.all_gather_object(values, value, group=group)
        return values

    def barrier(self):
        """Wait until all processes have come this far."""
        self.gather(None)


world = World()


# ---------------------------------------------------------------- metrics and evaluation
class Metrics:
    """Named means, kept as (sum, count), so that they add up over batches and processes and are divided once.

    A metric whose count is always 0 is a plain sum. Peaks are merged by their maximum.
    """

    def __init__(self):
        self.sums = defaultdict(lambda: [0.0, 0.0])
        self.peaks = {}

    def add(self, name, total, count=1):
        self.sums[name][0] += float(total)
        self.sums[name][1] += float(count)

    def peak(self, name, value):
        self.peaks[name] = max(value, self.peaks.get(name, value))

    def of_all_processes(self):
        """The metrics of all processes together, as numbers by name."""
        merged = Metrics()
        for sums, peaks in world.gather((dict(self.sums), self.peaks)):
            for name, (total, count) in sums.items():
                merged.add(name, total, count)
            for name, value in peaks.items():
                merged.peak(name, value)
        return {name: total / (count or 1) for name, (total, count) in merged.sums.items()} | merged.peaks


def record_rollout(metrics, task, turns, seconds, num_items):
    """Rewards, returns, lengths and speed of a rollout. num_items: the items of all processes."""
    tokens = 0
    for t, nodes in enumerate(turns):
        metrics.add(f"nodes/turn_{t}", len(nodes) if world.peer == 0 else 0, 0)
        metrics.add("tree_length", len({node.slot for node in nodes}), len(nodes) if t == 0 else 0)
        for node in nodes:
            record_rewards(metrics, task, node, t)
            for agent, group in node.groups.items():
                lengths = group.mask.sum(1)
                metrics.add(f"length/agent_{agent}", lengths.sum(), len(lengths))
                metrics.add("truncated", (~group.ended).sum(), len(lengths))
                metrics.add("shortened_prompts", group.dropped_turns > 0, 0)
                tokens += int(lengths.sum())
    # Processes without an item wait for the others; they do not make sampling faster.
    busy = min(num_items, world.num_replicas) * world.num_peers
    metrics.add("sample_tokens_per_s", tokens, seconds / busy if turns else 0)
    metrics.add("rollout_s", seconds)


def record_rewards(metrics, task, node, t):
    """reward/turn_t is a mean over all joint actions; "reward" and its parts only over those that nothing continues."""
    metrics.add(f"reward/turn_{t}", sum(reward["total"] for reward in node.rewards), len(node.rewards))
    if t == 0:
        metrics.add("return", node.returns.sum(), len(node.returns))
    unearned = dict.fromkeys(task.maxima, 0.0)  # of a part that a reward does not mention
    for k, reward in enumerate(node.rewards):
        for name, value in (unearned | reward).items():
            if k not in node.children and isinstance(value, (int, float)):
                metrics.add("reward" if name == "total" else f"reward/{name}", value)
    if node.history and "advice" in node.history[-1] and world.peer == 0:
        metrics.add("expert/asked", 1, 0)
        metrics.add("expert/failed", node.history[-1]["advice"] is None, 0)


def record_ratio(metrics, logp, batch, cfg, on_policy):
    """How far the policy is from the one that sampled. Before the first step, that is rounding alone."""
    ratio = torch.exp(logp - batch.logp)
    too_high = (batch.advantage > 0) & (ratio > 1 + cfg.clip_eps_high)
    too_low = (batch.advantage < 0) & (ratio < 1 - cfg.clip_eps)
    count = batch.mask.sum()
    metrics.add("clip_fraction", ((too_high | too_low) & batch.mask).sum(), count)
    metrics.add("approx_kl", ((ratio - 1 - (logp - batch.logp)) * batch.mask).sum(), count)
    if on_policy:
        metrics.peak("ratio_max", (ratio[batch.mask] - 1).abs().max().item())


EVALUATION = 2**32  # takes the place of the step in random streams: no training step reaches it
AT_ONCE = 32  # held-out items in one rollout of an evaluation


def evaluate(policies, task, items, cfg):
    """A rollout on held-out items, eval_group answers each. Returns (turns of the first items, metrics)."""
    metrics = Metrics()
    first = []
    cfg = replace(cfg, group=cfg.eval_group, joint="aligned")
    mine = world.share(items)
    for i in range(0, len(mine), AT_ONCE):
        start = time.perf_counter()
        turns = rollout(policies, task, mine[i : i + AT_ONCE], cfg, EVALUATION)
        assign_credit(turns, cfg)
        record_rollout(metrics, task, turns, time.perf_counter() - start, len(items))
        first = first or turns
    return first, metrics.of_all_processes()


def checked_rewards(task, jobs):
    """The task's rewards of (item, history, texts) jobs, as dicts with numbers that a log can hold."""
    rewards = list(task.rewards(jobs))
    kind = type(task).__name__
    if len(rewards) != len(jobs):
        raise UserError(f"the task {kind} has {len(rewards)} rewards for {len(jobs)} joint actions")
    checked = []
    for reward in rewards:
        parts = {}
        for name, value in reward.items() if isinstance(reward, dict) else []:
            parts[name] = value.item() if hasattr(value, "item") else value  # scalars of numpy and torch
        total = parts.get("total")
        if not isinstance(total, (int, float)) or not np.isfinite(total):
            raise UserError(f'a reward of the task {kind} is {reward!r}, not a dict with a finite number as "total"')
        if not all(isinstance(name, str) for name in parts):
            raise UserError(f"a reward of the task {kind} is {reward!r}, and not all names of its parts are texts")
        checked.append(parts)
    return checked


def ask_expert(task, nodes, cfg, step):
    """Guided learning: if there is an expert, its advice on the last answers goes into the history of each node."""
    if not task.expert or step < cfg.guided_from:
        return
    # When agents live apart, only the first one's process asks, so all go on with the same advice.
    advice = None
    if world.peer == 0:
        advice = task.advise([(node.item, node.history) for node in nodes])
    for node, texts in zip(nodes, world.exchange(advice)[0], strict=True):
        node.history[-1]["advice"] = texts
