"""MAGRPO: several language models, fine-tuned together by reinforcement learning, learn to cooperate.

Multi-Agent Group Relative Policy Optimization (arXiv 2508.04652). One training step:

    rollout           every agent samples G completions of its own prompt, not seeing the others' (`sample`);
                      they are paired into K joint actions, each with one joint reward (`joint_actions`);
                      with several turns, every joint action becomes a node of the next turn
    returns_to_go     return of a joint action = its reward + discount * mean return of its continuations
    group_advantages  how much better a completion did than its group; no critic is needed
    policy_loss       raise or lower the probability of its tokens accordingly, clipped as in PPO
    update            minibatches of items with their trees, one optimizer step each, in pieces that fit the memory

One letter per axis: N agents, H turns, B nodes of a turn (an item and the history that led there), G completions of
an agent at a node (its group), K joint actions of a node, R = B * G rows of a block, P prompt tokens, C completion
tokens, V vocabulary, D head dimension, Hkv key heads; A agents that one policy plays.

A rollout is a list of turn tables, so a single turn is a list of one, evaluation is a rollout, and GRPO is N = 1.
README.md lists the differences from the paper and from the reference code, with reasons.
"""

import contextlib
import functools
import itertools
import os
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface


class UserError(ValueError):
    """Something the user can mend; `train.py` prints it as one line and exits with code 2."""


def first_line(error):
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def out_of_memory(error):
    """Whether an error says that the device, or the machine, has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


# ---------------------------------------------------------------- the policy


def log_policy(logits, temperature):
    """The one definition of the policy: (..., V) logits -> (..., V) float32 log-probabilities.

    Sampler and scorer both call it. There is no top-k or top-p: they would sample from one distribution and train
    another.
    """
    return F.log_softmax(logits.float() / temperature, dim=-1)


class TokenLogProb(torch.autograd.Function):
    """`log_policy(logits, temperature)` at the tokens, (R, C, V) and (R, C) -> (R, C), one row at a time.

    The same as gather after log_policy; but float32 copies of the logits, the largest tensors of training, exist for
    one row only, and the backward pass writes the gradient once, softmax less one-hot, instead of adding up zeros.
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


class Linear(torch.nn.Linear):
    """The same product, in the order that is faster for one token of each row: (W x^T)^T instead of x W^T.

    In float32 on a CPU this takes a third off a decode step of 16 rows.
    """

    def forward(self, x):
        if x.dim() != 3 or x.shape[1] > 1 or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        out = (self.weight @ x[:, 0].T).T[:, None]
        return out if self.bias is None else out + self.bias


class Policy:
    """A language model that plays one role or several, with its tokenizer and, when it trains, its optimizer.

    agents: the roles it plays. One policy per agent is the paper's setting; one policy for all is parameter sharing.
    lr: learning rate of AdamW in float32, reached linearly over `warmup` optimizer steps; None for a policy that only
    answers. dtype: what forward and backward compute in. Other than float32, the optimizer keeps float32 master
    weights: steps at the usual 1e-6 to 1e-5 are smaller than the spacing of bfloat16 numbers and would be lost. mesh:
    the ranks that share one copy of the weights, gradients and moments, in float32; parts are fetched in `dtype` for
    the time that they are needed. graphs: whether decode steps are repeated as CUDA graphs.
    """

    def __init__(self, model, tokenizer, agents=(0,), lr=None, dtype=torch.float32, stop_ids=None, warmup=0, mesh=None):
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = Linear
            # the policy that is scored must be the one that sampled; some families have rates of their own
            for name, value in vars(module).items():
                if isinstance(value, float) and ("drop" in name or isinstance(module, torch.nn.Dropout)):
                    setattr(module, name, 0.0)
        self.model, self.tokenizer, self.agents, self.dtype, self.mesh = model, tokenizer, list(agents), dtype, mesh
        self.reference = None  # another Policy, frozen, for the kl term
        self.stop_ids = known_stop_ids(model, tokenizer) if stop_ids is None else list(stop_ids)
        limits = [getattr(model.config, name, None) for name in ("max_position_embeddings", "sliding_window")]
        rope = getattr(model.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # beyond this length, all positions turn at other frequencies
            limits.append(rope.get("original_max_position_embeddings"))
        self.context = min(filter(None, limits), default=None)  # tokens of a prompt and its completion
        # a graph is captured on the current device
        self.graphs = mesh is None and model.device.type == "cuda" and model.device.index == torch.cuda.current_device()
        use_group_attention(self)
        if mesh is not None:
            shard(model, mesh, dtype)
        self.trained = self.masters = [p for p in model.parameters() if p.requires_grad] if lr else []
        if mesh is None:
            if dtype != torch.float32:
                self.masters = [p.detach().float().clone().requires_grad_() for p in self.trained]
            for p in model.parameters():  # not model.to(dtype), which would round the rotary frequencies, too
                p.data = p.data.to(dtype)
        if lr:
            self.optimizer = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0, fused=True)
            # Adam's first steps have the full size in every weight, whatever the gradient's: the largest of the run
            self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: min(1, (n + 1) / (warmup + 1)))

    def encode(self, prompt):
        """Token ids of a prompt, as one user message where the tokenizer has a chat template. Lists pass through."""
        if not isinstance(prompt, str):
            return list(prompt)
        if not self.tokenizer.chat_template:
            return self.tokenizer(prompt)["input_ids"]
        message = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)

    def decode(self, completions):
        """The R texts of a block, without the stop token and what follows."""
        lengths = completions.mask.sum(1) - completions.ended.long()
        rows = zip(completions.tokens.tolist(), lengths.tolist(), strict=True)
        return [self.tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in rows]

    def whole_weights(self, keep):
        """Sharded weights by name, in full, where `keep` is true; None where nothing is sharded."""
        if self.mesh is None:
            return None
        tensors = self.model.state_dict(keep_vars=True)
        names = {id(tensor): name for name, tensor in reversed(tensors.items())}.values()  # tied weights once
        return {name: whole(tensors[name].detach(), keep) for name in names}

    def state(self, keep=True):
        """What a checkpoint keeps: float32 weights and the optimizer's moments, however many ranks they are split over.

        Of sharded weights, all ranks have to call this, and those with `keep` get them.
        """
        optimizer, schedule = self.optimizer.state_dict(), self.schedule.state_dict()
        moments = {i: {name: whole(x, keep) for name, x in s.items()} for i, s in optimizer["state"].items()}
        masters = [whole(p.detach(), keep) for p in self.masters]
        return {"masters": masters, "optimizer": optimizer | {"state": moments}, "schedule": schedule}

    def load_state(self, state):
        """Continue from a checkpoint: weights and moments to the last bit."""
        masters, moments = self.masters, state["optimizer"]["state"]
        with torch.no_grad():
            for p, saved in zip(masters, state["masters"], strict=True):
                p.copy_(part(saved, p))
        moments = {i: {name: part(x, masters[i]) for name, x in s.items()} for i, s in moments.items()}
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})
        self.schedule.load_state_dict(state["schedule"])
        self.copy_masters()

    @torch.no_grad()
    def copy_masters(self):
        """Round the masters to the precision that the model computes in."""
        if self.masters is not self.trained:
            for p, master in zip(self.trained, self.masters, strict=True):
                p.copy_(master)

    def collect_gradients(self):
        """Add the model's gradients to the masters', in float32."""
        if self.masters is not self.trained:
            for p, master in zip(self.trained, self.masters, strict=True):
                if p.grad is not None:
                    master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                    p.grad = None

    def step(self, max_grad_norm):
        """Clip, step, and copy the masters to the model. Returns the gradient norm before clipping."""
        norm = whole(torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm))
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm.item()}")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.copy_masters()
        return norm.item()


def shard(model, mesh, dtype):
    """Split the weights over the ranks of a mesh, with FSDP2. Gradients are summed, not averaged."""
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def whole(tensor, keep=True):
    """All of a tensor. A sharded one is gathered, a collective of its ranks, to the CPU of those that keep it."""
    if not isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.full_tensor()
    return tensor.cpu() if keep else None


def part(tensor, like):
    """This rank's shard of a whole tensor where `like` is sharded. Scalars are not."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def known_stop_ids(model, tokenizer):
    """All token ids that end an answer: a model can have several."""
    places = (model.generation_config, model.config, tokenizer)
    found = [getattr(place, "eos_token_id", None) for place in places]
    return sorted({i for ids in found if ids is not None for i in (ids if isinstance(ids, (list, tuple)) else [ids])})


# ---------------------------------------------------------------- attention of a group


class GroupCache:
    """Keys and values of B prompts, once each, and of the R = B * G suffixes that grow from them.

    prompt[layer]: two tensors (B, Hkv, P, D) for Hkv key heads. suffix[layer]: two (R, Hkv, C, D), filled up to the
    column `place`, zeros behind it. attn: (B, P), True on the prompts' tokens. prompt_mask: (B, P), True where a suffix
    may look: not on the last token, which opens every suffix. hidden: (B, P + C), True where the token at `place` may
    not look. A decode step can be a CUDA graph: `place` is a tensor, (1,), and no shape depends on it. It reads `width`
    of the C columns, however few are filled; the sampler doubles that when it has to.
    """

    def __init__(self, attn, group, max_suffix):
        self.prompt_lengths, self.group, self.max_suffix = attn.sum(1).tolist(), group, max_suffix
        self.prompt_mask = attn & attn.roll(-1, 1)
        self.prompt_mask[:, -1] = False
        self.prompt, self.suffix = {}, {}
        self.hidden = F.pad(~self.prompt_mask, (0, max_suffix), value=True)
        self.place, self.width = torch.full((1,), -1, device=attn.device), min(256, max_suffix)

    def next_place(self):
        """Move on to the next column of the suffixes, which every row looks at from now on."""
        self.place += 1
        self.hidden.index_fill_(1, self.prompt_mask.shape[1] + self.place, False)

    def append(self, layer, key, value):
        """Store one token's key and value, (R, Hkv, 1, D) each, at `place`; return two (R, Hkv, width, D)."""
        if layer not in self.suffix:
            shape = (*key.shape[:2], self.max_suffix, key.shape[3])
            self.suffix[layer] = key.new_zeros(shape), value.new_zeros(shape)
        for buffer, new in zip(self.suffix[layer], (key, value), strict=True):
            buffer.index_copy_(2, self.place, new)
        return [buffer[:, :, : self.width] for buffer in self.suffix[layer]]

    @functools.cached_property
    def suffix_mask(self):
        """Where each token of a whole suffix looks, (R, 1, C, P + C): at the prompt and at the suffix before it."""
        C, before = self.max_suffix, self.prompt_mask.repeat_interleave(self.group, 0)
        own = torch.ones(C, C, dtype=torch.bool, device=before.device).tril()
        return torch.cat([before[:, None].expand(-1, C, -1), own.expand(len(before), C, C)], 2)[:, None]


def group_attention(module, query, key, value, attention_mask, scaling=None, *, group_cache, group_phase, **kwargs):
    """Attention of G completions that share a prompt, whose keys and values are computed once.

    query (rows, heads, T, D), key and value (rows, Hkv, T, D); returns (rows, T, heads, D), None. group_phase says what
    kind of call this is: "prompt" stores B prompts, which come in one row, one after the other, without padding;
    "decode" appends one token to each of R suffixes; "score" has all at once, one row of P + G * C tokens for each
    prompt, and stores nothing, so that gradient checkpointing may call it again. `transformers` hands both through from
    the call of the model; a name that it uses itself, such as `cache`, would not arrive.
    """
    cache, phase = group_cache, group_phase
    refuse = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    window = kwargs.get("sliding_window")
    if window is not None and window < cache.prompt_mask.shape[1] + cache.max_suffix - 1:  # one token is in both
        refuse.append(f"a sliding window of {window} tokens, shorter than prompt and completion")
    if refuse:
        raise UserError(f"this model's attention uses {', '.join(refuse)}, which magrpo.py does not implement")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if phase == "decode":
        prompt, suffix = cache.prompt[module.layer_idx], cache.append(module.layer_idx, key, value)
        return attend_next(query * scale, prompt, suffix, cache.hidden), None
    if phase == "score":
        return attend_all(query, key, value, cache, scale), None
    parts = [x.split(cache.prompt_lengths, 2) for x in (query, key, value)]
    out = [attend_causally(*prompt, scale) for prompt in zip(*parts, strict=True)]
    padded = (pad_sequence([x[0].transpose(0, 1) for x in rows], batch_first=True) for rows in parts[1:])
    cache.prompt[module.layer_idx] = [x.transpose(1, 2).contiguous() for x in padded]  # (B, Hkv, P, D)
    return torch.cat(out, 1), None


def attend_causally(query, key, value, scale):
    """The library's attention, (rows, heads, T, D) over (rows, Hkv, T, D) twice -> (rows, T, heads, D)."""
    shared = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared)
    return out.transpose(1, 2)


def attend_all(query, key, value, cache, scale):
    """Rows of a prompt and its G completions, P + G * C tokens each: every completion sees the prompt and itself."""
    B, P = cache.prompt_mask.shape
    prompt, suffix = zip(*(x.split([P, x.shape[2] - P], 2) for x in (query, key, value)), strict=True)
    out = attend_causally(*prompt, scale)
    query, *suffix = (x.unflatten(2, (-1, cache.max_suffix)).transpose(1, 2).flatten(0, 1) for x in suffix)
    share = query.shape[1] // key.shape[1]
    # the prompt's keys are repeated here: they are small beside a layer's activations, and no scores are stored
    keys, values = (
        torch.cat([x.repeat_interleave(cache.group, 0), own], 2).repeat_interleave(share, 1)
        for x, own in zip(prompt[1:], suffix, strict=True)
    )
    own = F.scaled_dot_product_attention(query, keys, values, cache.suffix_mask, scale=scale)
    return torch.cat([out, own.transpose(1, 2).reshape(B, -1, *out.shape[2:])], 1)


def attend_next(query, prompt, suffix, hidden):
    """query (R, heads, 1, D) over a shared prompt and S columns of its own suffix -> (R, 1, heads, D).

    hidden: (B, P + S or more), True where no query looks. The queries of a group, and of the heads that share a key
    head, fold into one product with the prompt's keys.
    """
    (B, Hkv, P, D), (R, heads, *_), S = prompt[0].shape, query.shape, suffix[0].shape[2]
    group, share = R // B, heads // Hkv
    folded = query.reshape(B, group, Hkv, share, D).transpose(1, 2)  # (B, Hkv, G, share, D)
    to_prompt = (folded.reshape(B, Hkv, -1, D) @ prompt[0].mT).view(B, Hkv, group, share, P)
    to_suffix = query.reshape(R, Hkv, share, D) @ suffix[0].mT
    to_suffix = to_suffix.view(B, group, Hkv, share, S).transpose(1, 2)
    scores = torch.cat([to_prompt, to_suffix], dim=-1).float()  # (B, Hkv, G, share, P + S), not rounded to bfloat16
    scores.masked_fill_(hidden[:, None, None, None, : P + S], float("-inf"))
    on_prompt, on_suffix = scores.softmax(-1).to(query.dtype).split([P, S], dim=-1)
    out = (on_prompt.reshape(B, Hkv, -1, P) @ prompt[1]).view(B, Hkv, group, share, D).transpose(1, 2)
    own = on_suffix.transpose(1, 2).reshape(R, Hkv, share, S) @ suffix[1]
    return out.reshape(R, 1, heads, D) + own.view(R, 1, heads, D)


@torch.no_grad()
def use_group_attention(policy):
    """Switch the policy's model to `group_attention`, if it samples and scores with it as with its own attention.

    Raises UserError for a model whose layers are not all of a kind that the group cache serves.
    """
    AttentionInterface.register("group", group_attention)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it prepares a kernel anew for every length that it meets
    model, training, own = policy.model, policy.model.training, policy.model.config._attn_implementation
    ids = torch.randint(model.config.vocab_size, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [ids[:3], ids[3:]]
    try:
        model.set_attn_implementation("group")
        block = sample(policy, prompts, 2, 3, 1.0, [(0,), (1,)])
        found = torch.stack([block.logp, token_logprobs(policy, block, 1.0)])
        model.eval().set_attn_implementation(own)
        expected = []
        for prompt, tokens in zip(prompts, block.tokens.split(2), strict=True):
            rows = torch.cat([tokens.new_tensor([prompt, prompt]), tokens], 1)
            logits = model(rows, use_cache=False).logits[:, len(prompt) - 1 : -1]
            expected.append(log_policy(logits, 1.0).gather(2, tokens[..., None])[..., 0])
        model.train(training).set_attn_implementation("group")
    except Exception as error:  # what is refused, and what other families' own kinds of calls end in
        if out_of_memory(error):
            raise
        raise UserError(f"group attention does not work with {type(model).__name__}: {first_line(error)}") from error
    expected = torch.cat(expected) * block.mask
    error = ((found - expected).norm(dim=(1, 2)) / expected.norm()).max()
    if not error < (1e-3 if model.dtype == torch.float32 else 5e-2):  # `not <` also refuses NaN
        raise UserError(f"group attention does not reproduce {type(model).__name__} (relative error {error:.1g})")


# ---------------------------------------------------------------- sampling and scoring


@dataclass
class Completions:
    """R = B * G completions of B prompts; the completions of a prompt are neighbours."""

    prompt: torch.Tensor  # (B, P) ids, padded on the right
    attn: torch.Tensor  # (B, P) True on the prompt's tokens
    tokens: torch.Tensor  # (R, C) sampled ids; after the stop token, anything
    mask: torch.Tensor  # (R, C) True on what the policy chose, the stop token included
    logp: torch.Tensor  # (R, C) float32, the sampler's log-probabilities, 0 where mask is False
    ended: torch.Tensor  # (R,) True if it stopped by itself, False if it was cut at max_new_tokens

    def __post_init__(self):
        (B, P), (R, C) = self.prompt.shape, self.tokens.shape
        assert self.attn.shape == (B, P) and self.attn[:, 0].all(), "every prompt has a token"
        assert self.mask.shape == self.logp.shape == (R, C) and self.ended.shape == (R,)
        assert R % B == 0, "every prompt has the same number of completions"

    @property
    def group(self):
        return self.tokens.shape[0] // self.prompt.shape[0]

    def select(self, nodes, members):
        """The completions `members` (a slice of G) of the prompts `nodes` (indices), trimmed to what they need."""
        rows = (self.tokens, self.mask, self.logp, self.ended)
        *rows, ended = (x.unflatten(0, (-1, self.group))[nodes][:, members].flatten(0, 1) for x in rows)
        P, C = int(self.attn[nodes].sum(1).max()), int(rows[1].sum(1).max())
        return Completions(self.prompt[nodes, :P], self.attn[nodes, :P], *(x[:, :C] for x in rows), ended)


def pad_prompts(prompts, device):
    """Lists of ids -> ids and mask, (B, P) each, padded on the right, where a causal prompt cannot see it."""
    width = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def first_column(prompt, attn, group):
    """What opens the suffixes: each prompt's last token, and its position, (R, 1) each.

    So each suffix token's logits predict the next one, and the first sampled token is no special case.
    """
    last = attn.sum(1, keepdim=True) - 1  # (B, 1)
    return prompt.gather(1, last).repeat_interleave(group, 0), last.repeat_interleave(group, 0)


def forward(model, tokens, positions, cache, phase, **kwargs):
    """Logits of one call of the model through `group_attention`."""
    return model(tokens, position_ids=positions, use_cache=False, group_cache=cache, group_phase=phase, **kwargs).logits


@torch.no_grad()
def sample(policy, prompts, group, max_new_tokens, temperature, streams=None):
    """Draw `group` completions of each of B prompts (texts, or lists of ids) -> Completions with R = B * group rows.

    streams: a tuple of non-negative integers for each prompt, from which all its random numbers follow: a completion
    depends neither on its batch mates nor on what was drawn before. By default they come from torch's generator.
    """
    if streams is None:
        streams = [(seed,) for seed in torch.randint(2**62, (len(prompts),)).tolist()]
    model, device, training = policy.model, policy.model.device, policy.model.training
    model.eval()  # in training mode, gradient checkpointing and dropout would be on
    draws = [np.random.default_rng(s).random((group, max_new_tokens), np.float32) for s in streams]
    uniform = torch.from_numpy(np.concatenate(draws)).to(device)  # (R, C)
    prompt, attn = pad_prompts([policy.encode(p) for p in prompts], device)
    cache, (token, position) = GroupCache(attn, group, max_new_tokens), first_column(prompt, attn, group)
    places = torch.arange(prompt.shape[1], device=device).expand_as(prompt)
    forward(model, prompt[attn][None], places[attn][None], cache, "prompt", logits_to_keep=1)
    stop_ids = torch.tensor(policy.stop_ids, device=device, dtype=torch.long)
    ended = torch.zeros(len(uniform), 1, dtype=torch.bool, device=device)
    kinds = torch.long, torch.bool, torch.float32
    tokens, mask, logps = (torch.zeros(uniform.shape, dtype=kind, device=device) for kind in kinds)

    def step():
        """Draw the next token of every row. All of it happens in place, so that it can be repeated as a graph."""
        cache.next_place()
        logp = log_policy(forward(model, token, position, cache, "decode")[:, -1], temperature)  # (R, V)
        token.copy_(inverse_cdf(logp.exp(), uniform.index_select(1, cache.place)))
        tokens.index_copy_(1, cache.place, token)
        mask.index_copy_(1, cache.place, ~ended)
        logps.index_copy_(1, cache.place, logp.gather(1, token).masked_fill(ended, 0.0))
        ended.logical_or_((token == stop_ids).any(1, keepdim=True))
        position.add_(1)

    repeat = step
    for length in range(1, max_new_tokens + 1):
        if length > cache.width:
            cache.width, repeat = min(2 * cache.width, max_new_tokens), step
        repeat()
        if ended.all():
            break
        if repeat is step and policy.graphs and length < max_new_tokens:
            repeat = as_graph(step, policy)
    model.train(training)
    if not torch.isfinite(logps[:, :length]).all():
        raise FloatingPointError("the probabilities that the policy samples from are not finite")
    return Completions(prompt, attn, tokens[:, :length], mask[:, :length], logps[:, :length], ended[:, 0])


def as_graph(step, policy):
    """The step as a CUDA graph: a thousand small kernels, which a GPU runs much faster than Python launches them."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # the first of these returns to the stream also where the second fails
        with torch.cuda.stream(stream), torch.cuda.graph(graph, capture_error_mode="thread_local"), refused_waits():
            step()
        return graph.replay
    except RuntimeError as error:  # the model waits for numbers from the GPU, to choose experts or to stretch positions
        if out_of_memory(error):
            raise
        policy.graphs = False
        return step


@contextlib.contextmanager
def refused_waits():
    """What would wait for the GPU raises RuntimeError in here; a wait in a capture leaves its memory in disorder."""
    with warnings.catch_warnings(action="ignore"):  # torch says that it may not notice all of them
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def inverse_cdf(probs, u):
    """Draw from (R, V) probabilities with one uniform number in [0, 1) for each row, (R, 1) -> ids (R, 1)."""
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    # below the total even when u * total rounds up to it: the first entry above the target has probability > 0
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True).clamp_(max=probs.shape[-1] - 1)  # NaN is above all


def completion_logits(model, completions):
    """Logits of all completion tokens, (R, C, V), in one call: each row is a prompt and its G completions."""
    (R, C), group = completions.tokens.shape, completions.group
    prompt, attn = completions.prompt, completions.attn
    cache, (first, last) = GroupCache(attn, group, C), first_column(prompt, attn, group)
    (B, P), device = prompt.shape, prompt.device
    suffix = torch.cat([first, completions.tokens[:, :-1]], 1).view(B, group * C)
    tokens = torch.cat([prompt, suffix], 1)  # (B, P + G * C)
    positions = (last + torch.arange(C, device=device)).view(B, group * C)
    positions = torch.cat([torch.arange(P, device=device).expand(B, P), positions], 1)
    return forward(model, tokens, positions, cache, "score", logits_to_keep=group * C).view(R, C, -1)


def token_logprobs(policy, completions, temperature):
    """Log-probability of every sampled token, (R, C) float32, with gradient; 0 where the mask is False."""
    logits = completion_logits(policy.model, completions)
    return TokenLogProb.apply(logits, completions.tokens, temperature).masked_fill(~completions.mask, 0.0)


# ---------------------------------------------------------------- rollout


@dataclass
class Turn:
    """One turn of every tree: a table of B nodes x K joint actions."""

    items: list  # B items
    slots: list  # B, the item's place in the step, the same however the step is split
    histories: list  # B lists of one {"texts": N texts, "reward": dict} per earlier turn, with "advice" if guided
    branches: list  # B, which path of its tree a node is
    parent: torch.Tensor  # (B,) the cell b * K + k of the turn before that the node continues
    joint: torch.Tensor  # (K, N) which completion of each agent forms a joint action
    texts: list  # N x B x G
    rewards: torch.Tensor  # (B, K) float64
    parts: list  # B x K dicts of the reward's parts
    completions: list  # one block for each policy, nodes of its agents one after the other: (A * B) * G rows
    shortened: int = 0  # prompts of this rank's agents that lost their oldest turns


def joint_actions(num_agents, group, mode):
    """(K, N) table: row k holds which of its G completions each agent contributes to joint action k.

    aligned: the g-th completions together, K = G. crossed: the Cartesian product, K = G ** N; nothing more is
    generated, but more rewards are computed.
    """
    if mode == "aligned":
        return torch.arange(group)[:, None].expand(group, num_agents)
    if mode == "crossed":
        return torch.cartesian_prod(*[torch.arange(group)] * num_agents).view(-1, num_agents)
    raise UserError(f"unknown joint mode {mode!r}: choose aligned or crossed")


def rollout(
    policies,
    task,
    items,
    *,
    group,
    max_new_tokens,
    temperature=1.0,
    turns=1,
    joint="aligned",
    seed=0,
    step=0,
    slots=None,
    stop_above=float("inf"),
    guide=None,
    ranks=None,
):
    """Grow one tree per item, breadth first -> list of at most `turns` Turn tables.

    A joint action that the task calls done, and all joint actions of a node whose mean reward passes stop_above, are
    not continued. Random numbers are a function of (seed, step, turn, agent, slot, branch) alone. guide: called with
    the (item, history) of all nodes that go on, returns what is stored as history[-1]["advice"] of each.
    """
    ranks, table = ranks or Ranks(), []
    pairing = joint_actions(task.num_agents, group, joint)
    slots = range(len(items)) if slots is None else slots
    nodes = [(item, slot, [], 0, -1) for item, slot in zip(items, slots, strict=True)]
    for t in range(turns):
        if not nodes:
            break
        items, slots, histories, branches, parent = map(list, zip(*nodes, strict=True))
        completions, texts, shortened = [], {}, 0
        for policy in policies:
            roles = [(agent, b) for agent in policy.agents for b in range(len(nodes))]
            fitted = [fit_prompt(policy, task, agent, items[b], histories[b], max_new_tokens) for agent, b in roles]
            prompts = [ids for ids, _ in fitted]
            shortened += sum(dropped > 0 for _, dropped in fitted)
            streams = [(seed, step, t, agent, slots[b], branches[b]) for agent, b in roles]
            completions.append(sample(policy, prompts, group, max_new_tokens, temperature, streams))
            answers = policy.decode(completions[-1])
            for i, (agent, _) in enumerate(roles):
                texts.setdefault(agent, []).append(answers[i * group : (i + 1) * group])
        texts = {agent: answers for part in ranks.exchange(texts) for agent, answers in part.items()}
        texts = [texts[agent] for agent in range(task.num_agents)]
        parts = joint_rewards(task, items, histories, texts, pairing, ranks)
        rewards = torch.tensor([[p["total"] for p in row] for row in parts], dtype=torch.float64)
        cells = rewards, parts, completions, shortened
        table.append(Turn(items, slots, histories, branches, torch.tensor(parent), pairing, texts, *cells))
        nodes = next_nodes(task, table[-1], stop_above)
        if guide and t + 1 < turns:
            advise(guide, nodes, ranks)
    return table


def fit_prompt(policy, task, agent, item, history, max_new_tokens):
    """Token ids of an agent's prompt, and how many of its oldest turns it had to lose to fit into the context."""
    known = policy.model.get_input_embeddings().weight.shape[0]
    for start in range(len(history) + 1):
        ids = policy.encode(task.prompts(item, history[start:])[agent])
        if max(ids, default=0) >= known:
            raise UserError(f"token {max(ids)} of the tokenizer is none of the model's {known}: they do not fit")
        if policy.context is None or len(ids) + max_new_tokens <= policy.context:
            return ids, start
    raise UserError(
        f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the model's context of {policy.context}: "
        "shorten the item or lower --max-new-tokens"
    )


def joint_rewards(task, items, histories, texts, pairing, ranks):
    """B x K reward dicts. Agents that live apart judge a share each and exchange the results."""
    jobs = [
        (items[b], histories[b], [texts[agent][b][g] for agent, g in enumerate(row)])
        for b in range(len(items))
        for row in pairing.tolist()
    ]
    results = [None] * len(jobs)
    mine = [plain_numbers(reward) for reward in task.rewards(jobs[ranks.peer :: ranks.num_peers])]
    for i, share in enumerate(ranks.exchange(mine)):
        results[i :: ranks.num_peers] = share
    return [results[i : i + len(pairing)] for i in range(0, len(jobs), len(pairing))]


def plain_numbers(reward):
    """A reward dict with Python's numbers in place of numpy's and torch's scalars, which a log would not take."""
    reward = {name: value.item() if hasattr(value, "item") else value for name, value in reward.items()}
    if not isinstance(reward.get("total"), (int, float)):
        raise UserError(f'the task\'s reward has to be a dict with a number as "total", not {reward}')
    return reward


def next_nodes(task, turn, stop_above):
    """The nodes of the next turn: one for each joint action that goes on."""
    nodes, K = [], len(turn.joint)
    for b, item in enumerate(turn.items):
        if turn.rewards[b].mean() > stop_above:
            continue
        for k, row in enumerate(turn.joint.tolist()):
            texts = [turn.texts[agent][b][g] for agent, g in enumerate(row)]
            history = [*turn.histories[b], {"texts": texts, "reward": turn.parts[b][k]}]
            if not task.done(item, history):
                nodes.append((item, turn.slots[b], history, turn.branches[b] * K + k, b * K + k))
    return nodes


def advise(guide, nodes, ranks):
    """Store the guide's advice in the nodes' histories. Of agents that live apart, only the first one's rank asks."""
    paths = [(item, history) for item, _, history, _, _ in nodes]
    advice = ranks.exchange(guide(paths) if ranks.peer == 0 else None)[0]
    for (_, history), said in zip(paths, advice, strict=True):
        history[-1]["advice"] = said


# ---------------------------------------------------------------- credit


def returns_to_go(turns, discount):
    """For each turn (B, K) float64: reward + discount * mean return of the node that continues the joint action."""
    returns = [turn.rewards.clone() for turn in turns]
    for t in range(len(turns) - 1, 0, -1):
        returns[t - 1].view(-1)[turns[t].parent] += discount * returns[t].mean(1)
    return returns


def group_advantages(returns, joint, group, kind):
    """(B, K) returns -> (N, B, G) float32 advantages of each agent's completions.

    A completion's credit is the mean return of the joint actions that hold it (the reference code sums: another
    scale, which "std" removes). The baseline comes from the same agent's group at the same node: "mean" subtracts the
    mean (the paper), "std" also divides by the standard deviation (its code, and the default), "rloo" subtracts the
    mean of the others, "max" the maximum, "raw" nothing. Equal credits have advantage exactly 0, except "raw".
    """
    member = F.one_hot(joint, group).to(returns.dtype)  # (K, N, G)
    credit = torch.einsum("bk,kng->nbg", returns, member) / member.sum(0)[:, None]
    mean, best = credit.mean(-1, keepdim=True), credit.amax(-1, keepdim=True)
    spread = best - credit.amin(-1, keepdim=True)
    flat = spread <= 1e-9 * credit.abs().amax(-1, keepdim=True)  # rounding, which "std" would blow up
    kinds = {
        "std": (credit - mean) / credit.std(-1, keepdim=True, unbiased=False).masked_fill(flat, 1.0),
        "mean": credit - mean,
        "rloo": (credit - mean) * (group / max(group - 1, 1)),
        "max": credit - best,
        "raw": credit,
    }
    if kind not in kinds:
        raise UserError(f"unknown advantage {kind!r}: choose {', '.join(kinds)}")
    return kinds[kind].masked_fill(flat & (kind != "raw"), 0.0).float()


def policy_loss(logp, logp_old, advantage, weight, clip_eps, clip_eps_high=None, kl=0.0, logp_ref=None):
    """Clipped surrogate of PPO, summed with fixed token weights -> scalar. All arguments (R, C); advantage also (R,).

    The ratio to the policy that sampled counts only up to 1 + clip_eps_high (by default clip_eps) where the advantage
    is positive and only down to 1 - clip_eps where it is negative. kl adds that multiple of an estimate, never
    negative, of the divergence from logp_ref: exp(d) - d - 1 for d = logp_ref - logp.
    """
    if advantage.dim() < logp.dim():
        advantage = advantage[:, None]
    ratio = torch.exp(logp - logp_old)
    clipped = ratio.clamp(1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high))
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    if kl:
        d = logp_ref - logp
        objective = objective - kl * (torch.exp(d) - d - 1)
    return -(weight * objective).sum()


# ---------------------------------------------------------------- update


def row_weights(lengths, rows, tokens, turns, max_new_tokens, normalize):
    """The weight of each token of a row, from the lengths of the rows and the totals of the whole minibatch.

    Fixed before anything is split, so neither micro-batch nor world size can change a gradient. Every turn weighs the
    same. "sequence": every row of a turn the same, every token of a row the same. "token": every token of a turn the
    same. "constant": every token 1 / max_new_tokens of a row, whatever the row's length (Dr. GRPO, arXiv 2503.20783).
    """
    shares = {"sequence": lengths * rows, "token": tokens, "constant": max_new_tokens * rows}
    if normalize not in shares:
        raise UserError(f"unknown normalisation {normalize!r}: choose {', '.join(shares)}")
    return (1 / (shares[normalize] * turns)).expand(lengths.shape)


@dataclass
class Block:
    """What a policy learns from one turn: the groups of its A agents at B nodes, A * B groups of G completions."""

    completions: Completions
    lengths: torch.Tensor  # (A * B, G)
    advantage: torch.Tensor  # (A * B, G)
    weight: torch.Tensor  # (A * B, G) of every token of a completion
    minibatch: torch.Tensor  # (A * B,) the optimizer step that a group belongs to
    live: torch.Tensor  # (A * B,) False where the whole group has advantage 0
    origin: list  # A * B tuples (agent, slot, rewards), for messages


def make_blocks(policy, turns, completions, advantages, num_items, minibatches, normalize, max_new_tokens, ranks):
    """The policy's blocks, one per turn, and how many live groups each minibatch has on all ranks, (minibatches,).

    Minibatch m holds the trees of the items in slots m * num_items / minibatches up to the next one's first.
    """
    A, blocks, places = len(policy.agents), [], []
    totals = torch.zeros(minibatches, ranks.max(len(turns)), A, 3, dtype=torch.float64)  # rows, tokens, live groups
    for t, turn in enumerate(turns):
        minibatch = (torch.tensor(turn.slots) * minibatches // num_items).repeat(A)
        advantage = advantages[t][policy.agents].flatten(0, 1)
        live = (advantage != 0).any(1)
        lengths = completions[t].mask.sum(1).view(advantage.shape).cpu()
        places.append((minibatch, torch.full_like(minibatch, t), torch.arange(A).repeat_interleave(len(turn.slots))))
        counts = torch.stack([torch.full_like(minibatch, lengths.shape[1]), lengths.sum(1), live], 1)
        totals.index_put_(places[-1], counts.double(), accumulate=True)
        nodes = list(zip(turn.slots, turn.rewards.tolist(), strict=True))
        origin = [(agent, *node) for agent in policy.agents for node in nodes]
        blocks.append(Block(completions[t], lengths, advantage, None, minibatch, live, origin))
    totals = ranks.sum(totals)
    num_turns = (totals[:, :, 0, 0] > 0).sum(1)
    for block, place in zip(blocks, places, strict=True):
        shared = totals[place][:, None, 0], totals[place][:, None, 1], num_turns[block.minibatch][:, None]
        block.weight = row_weights(block.lengths, *shared, max_new_tokens, normalize).float()
    return blocks, totals[..., 2].sum((1, 2))


def pieces_of(policy, blocks, minibatch, flat_too, micro_batch, ranks):
    """A minibatch as (block, nodes, slice of G), each of at most micro_batch rows; of shards, as many on all ranks."""
    pieces = []
    for block in blocks:
        group = block.completions.group
        nodes = ((block.minibatch == minibatch) & (block.live | flat_too)).nonzero()[:, 0]
        nodes = nodes[block.lengths[nodes].amax(1).argsort(descending=True, stable=True)]  # so that each trims well
        for some in nodes.split(max(micro_batch // group, 1)) if len(nodes) else ():  # else it yields one, empty
            pieces += [(block, some, slice(start, start + micro_batch)) for start in range(0, group, micro_batch)]
    if policy.mesh is not None:  # each pass fetches weights from the other ranks, so all have to make as many
        missing = ranks.max(len(pieces)) - len(pieces)
        pieces += [(idle_block(policy.model.device), torch.tensor([0]), slice(0, 1))] * missing
    return pieces


def idle_block(device):
    """One token of weight 0: what a rank computes along with the others when it has nothing left to do itself."""
    one = torch.ones(1, 1, device=device)
    completions = Completions(one.long(), one.bool(), one.long(), one.bool(), -one, one[0].bool())
    nothing = torch.zeros(1, 1)
    return Block(completions, nothing, nothing, nothing, nothing[0], nothing[0].bool(), [])


def update(
    policy,
    turns,
    completions,
    advantages,
    num_items,
    tally,
    *,
    temperature,
    max_new_tokens,
    minibatches=1,
    epochs=1,
    micro_batch=16,
    clip_eps=0.2,
    clip_eps_high=None,
    kl=0.0,
    normalize="sequence",
    max_grad_norm=1.0,
    ranks=None,
):
    """Fit a policy to its completions, one block per turn: minibatches * epochs optimizer steps, noted in the tally.

    Without `kl`, a minibatch without any advantage costs no forward pass and no step. Raises FloatingPointError when a
    loss or a gradient is not finite.
    """
    ranks, fresh = ranks or Ranks(), True  # fresh: the policy is still the one that sampled
    split = num_items, minibatches, normalize, max_new_tokens, ranks
    blocks, live_groups = make_blocks(policy, turns, completions, advantages, *split)
    for m in list(range(minibatches)) * epochs:
        if not live_groups[m] and not kl:
            continue
        pieces = pieces_of(policy, blocks, m, bool(kl), micro_batch, ranks)
        for block, nodes, members in pieces:
            piece = block.completions.select(nodes, members)
            advantage, weight = (
                x[nodes, members].view(-1, 1).to(piece.mask.device) for x in (block.advantage, block.weight)
            )
            logp = token_logprobs(policy, piece, temperature)
            # before the first step the ratio is exactly 1; after it, the ratio is to the sampler's own numbers
            logp_old = logp.detach() if fresh else piece.logp
            logp_ref = token_logprobs(policy.reference, piece, temperature) if kl else None
            loss = policy_loss(logp, logp_old, advantage, weight * piece.mask, clip_eps, clip_eps_high, kl, logp_ref)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at {describe(block, nodes)}")
            loss.backward()
            policy.collect_gradients()
            if block.origin:
                tally_ratio(tally, logp.detach(), piece, advantage, clip_eps, clip_eps_high, fresh)
        try:
            if policy.mesh is None:  # else the backward pass has done it
                ranks.sum_gradients(policy.masters)
            norm = policy.step(max_grad_norm)
        except FloatingPointError as error:
            trained = [describe(block, nodes) for block, nodes, _ in pieces[:8]]
            raise FloatingPointError(f"{error} at one of: {'; '.join(trained)}") from error
        tally.add(f"grad_norm/agent_{policy.agents[0]}", norm)
        fresh = False


def describe(block, nodes):
    """Where a piece comes from, for an error message."""
    lines = []
    for node in nodes.tolist()[:8]:
        agent, slot, rewards = block.origin[node]
        seen = f"lengths {block.lengths[node].tolist()}, rewards {[round(r, 3) for r in rewards[:16]]}"
        lines.append(f"agent {agent}, item {slot} of the step, {seen}")
    return "; ".join(lines)


def tally_ratio(tally, logp, piece, advantage, clip_eps, clip_eps_high, fresh):
    """Record how far the policy is from the one that sampled: the noise of two kernels at first, then the steps."""
    ratio = torch.exp(logp - piece.logp)
    high = 1 + (clip_eps if clip_eps_high is None else clip_eps_high)
    bound = torch.where(advantage > 0, ratio > high, ratio < 1 - clip_eps) & (advantage != 0)
    count = piece.mask.sum().item()
    tally.add("clip_fraction", (bound & piece.mask).sum().item(), count)
    tally.add("approx_kl", ((ratio - 1 - (logp - piece.logp)) * piece.mask).sum().item(), count)
    if fresh:
        tally.peak("ratio_max", (ratio[piece.mask] - 1).abs().max().item())


def train_step(policies, task, items, *, seed, step, discount, advantage, sampling, fitting, ranks=None):
    """One step of MAGRPO on a list of items -> this rank's turn tables and the metrics of all ranks.

    sampling and fitting: keyword arguments of `rollout` and `update`.
    """
    ranks, tally, clock = ranks or Ranks(), Tally(), time.perf_counter
    slots = range(ranks.replica, len(items), ranks.num_replicas)
    mine, start = [items[s] for s in slots], clock()
    with fetched(policies):
        turns = rollout(policies, task, mine, slots=slots, seed=seed, step=step, ranks=ranks, **sampling)
    tally_rollout(tally, turns, policies, discount, clock() - start, len(items), ranks)
    start, group = clock(), sampling["group"]
    returns = returns_to_go(turns, discount)
    advantages = [group_advantages(r, t.joint, group, advantage) for r, t in zip(returns, turns, strict=True)]
    shared = {"temperature": sampling["temperature"], "max_new_tokens": sampling["max_new_tokens"], "ranks": ranks}
    for i, policy in enumerate(policies):
        completions = [turn.completions[i] for turn in turns]
        update(policy, turns, completions, advantages, len(items), tally, **shared, **fitting)
    tally.add("update_s", clock() - start)
    for a in advantages:
        tally.add("flat_groups", (a == 0).all(-1).sum().item(), a[..., 0].numel())
    return turns, ranks.reduce(tally)


def evaluate(policies, task, items, *, seed, sampling, group=1, discount=1.0, nodes=32, ranks=None):
    """The same rollout, `group` answers to each item -> this rank's turn tables, one list a chunk, and the metrics."""
    ranks, tally, chunks = ranks or Ranks(), Tally(), []
    sampling = sampling | {"group": group, "joint": "aligned"}
    slots = range(ranks.replica, len(items), ranks.num_replicas)
    with fetched(policies):
        for first in range(0, len(slots), nodes):
            places, start = slots[first : first + nodes], time.perf_counter()
            chunk = [items[s] for s in places]
            chunks.append(
                rollout(policies, task, chunk, slots=places, seed=seed, step=EVALUATION, ranks=ranks, **sampling)
            )
            tally_rollout(tally, chunks[-1], policies, discount, time.perf_counter() - start, len(items), ranks)
    return chunks, ranks.reduce(tally)


@contextlib.contextmanager
def fetched(policies):
    """Sharded weights are on every rank in here, so that each can sample as much as it needs."""
    sharded = [module for policy in policies for module in policy.model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in sharded:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


EVALUATION = 2**32  # stands where random streams have the step: no training step reaches it


# ---------------------------------------------------------------- metrics


class Tally:
    """Metrics as (sum, count), so that they add up over pieces and ranks and are divided once; peaks as maxima.

    A count of 0 throughout makes a plain total.
    """

    def __init__(self):
        self.sums, self.peaks = defaultdict(lambda: [0.0, 0.0]), {}

    def add(self, name, total, count=1):
        self.sums[name][0] += total
        self.sums[name][1] += count

    def peak(self, name, value):
        self.peaks[name] = max(value, self.peaks.get(name, value))

    @staticmethod
    def merge(tallies):
        """The metrics of several (sums, peaks) together."""
        merged = Tally()
        for sums, peaks in tallies:
            for name, (total, count) in sums.items():
                merged.add(name, total, count)
            for name, value in peaks.items():
                merged.peak(name, value)
        return {name: total / (count or 1) for name, (total, count) in merged.sums.items()} | merged.peaks


def tally_rollout(tally, turns, policies, discount, seconds, num_items, ranks):
    """Rewards and their parts on the leaves (joint actions that nothing continues), returns, lengths, speed."""
    tokens = 0
    for t, turn in enumerate(turns):
        tally.add(f"reward/turn_{t}", turn.rewards.sum().item(), turn.rewards.numel())
        tally.add(f"nodes/turn_{t}", len(turn.items) if ranks.peer == 0 else 0, 0)
        tally.add("tree_length", len(set(turn.slots)), len(turn.items) if t == 0 else 0)
        tally.add("shortened_prompts", turn.shortened, 0)
        advice = [history[-1]["advice"] for history in turn.histories if history and "advice" in history[-1]]
        if advice and ranks.peer == 0:
            tally.add("expert/asked", len(advice), 0)
            tally.add("expert/failed", advice.count(None), 0)
        continued = set(turns[t + 1].parent.tolist()) if t + 1 < len(turns) else set()
        for cell, parts in enumerate(itertools.chain.from_iterable(turn.parts)):
            for name, value in parts.items() if cell not in continued else ():
                if isinstance(value, (int, float)):
                    tally.add("reward" if name == "total" else f"reward/{name}", value)
        for policy, block in zip(policies, turn.completions, strict=True):
            lengths = block.mask.sum(1).view(len(policy.agents), -1).tolist()
            for agent, row in zip(policy.agents, lengths, strict=True):
                tally.add(f"length/agent_{agent}", sum(row), len(row))
                tokens += sum(row)
            tally.add("truncated", (~block.ended).sum().item(), block.ended.numel())
    for root in returns_to_go(turns, discount)[:1]:
        tally.add("return", root.sum().item(), root.numel())
    busy = min(num_items, ranks.num_replicas) * ranks.num_peers  # the other ranks have no item
    tally.add("sample_tokens_per_s", tokens, seconds / busy if turns else 0)
    tally.add("rollout_s", seconds)


# ---------------------------------------------------------------- several processes


class Ranks:
    """Who holds what when torchrun starts several processes; by default, one process that holds everything.

    Layout "together": every rank holds every agent. "apart": each agent lives on its own ranks, as in the paper's
    decentralised execution; of what they compute, only texts, rewards and advice cross between agents. Ranks with the
    same agents and other items are replicas: they sum gradients. Ranks with the same items and other agents are peers:
    they exchange texts.
    """

    def __init__(self, layout="together", num_agents=1):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.num_peers = num_agents if layout == "apart" else 1
        if self.world % self.num_peers:
            raise UserError(f"--layout apart needs a multiple of {num_agents} processes, one or more for each agent")
        self.num_replicas = self.world // self.num_peers
        self.peer, self.replica = divmod(self.rank, self.num_replicas)
        self.agents = [self.peer] if layout == "apart" else list(range(num_agents))
        self.replicas = self.peers = None
        grid = torch.arange(self.world).view(self.num_peers, self.num_replicas).tolist()
        if self.world > 1:  # every rank has to create every group, in the same order
            self.replicas = [dist.new_group(row) for row in grid][self.peer]
            self.peers = [dist.new_group(list(column)) for column in zip(*grid, strict=True)][self.replica]

    def sum(self, tensor):
        """Sum of a CPU tensor over the replicas."""
        if self.num_replicas > 1:
            dist.all_reduce(tensor, group=self.replicas)
        return tensor

    def gather(self, value, group=None):
        """The values of all ranks, or of those of a group, in their order."""
        values = [value] * (dist.get_world_size(group) if self.world > 1 else 1)
        if len(values) > 1:
            dist.all_gather_object(values, value, group=group)
        return values

    def max(self, number):
        """The largest of the replicas' numbers: no rank decides alone what all have to do."""
        return max(self.gather(number, self.replicas))

    def any(self, value):
        """Whether the value is true on any of all ranks."""
        return any(self.gather(bool(value)))

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def mesh(self, device):
        """The ranks that can share one copy of an agent; None where an agent has a single one."""
        return DeviceMesh.from_group(self.replicas, device.type) if self.num_replicas > 1 else None

    @contextlib.contextmanager
    def local_first(self):
        """The first process of each machine goes first, the others when it is done."""
        waits = int(os.environ.get("LOCAL_RANK", 0)) > 0
        if waits:
            self.barrier()
        yield
        if not waits:
            self.barrier()

    def close(self):
        """Leave the process group, when all have come this far."""
        self.barrier()
        if self.world > 1:
            dist.destroy_process_group()

    def sum_gradients(self, parameters):
        """Add up the replicas' gradients in flat buckets; a parameter without gradient counts as zeros."""
        if self.num_replicas == 1:
            return
        for start in range(0, len(parameters), 64):
            bucket = parameters[start : start + 64]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            if not torch.isfinite(flat.sum()):  # in the sum, nobody could tell whose it was
                raise FloatingPointError("a gradient is not finite")
            dist.all_reduce(flat, group=self.replicas)
            for p, grad in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = grad.view_as(p)

    def first(self, value):
        """The value of rank 0, on all ranks."""
        return self.gather(value)[0]

    def exchange(self, value):
        """The values of all peers, in the order of their agents: all that agents see of each other passes here."""
        return self.gather(value, self.peers)

    def reduce(self, tally):
        """The metrics of all ranks together."""
        return Tally.merge(self.gather((dict(tally.sums), tally.peaks)))
