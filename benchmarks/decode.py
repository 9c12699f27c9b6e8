"""Milliseconds that one decode step takes on a GPU, beside the least that its memory allows.

    python benchmarks/decode.py

A model of SmolLM2-1.7B's shape with random bfloat16 weights, prompts of 128 tokens. A step draws one token for each
row. It is repeated as a CUDA graph, as magrpo.sample does, and once more with the model compiled. The bound is the time
to read the weights and the cached keys and values once, at the speed at which the GPU copies memory. A profile of one
more step counts the kernels, and adds up the time of the matrix products.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from magrpo import Group, GroupCache, Policy, Prompts, Settings, inverse_cdf, log_policy

PROMPT = 128  # tokens
NEW = 256  # columns of a completion


def build_policy():
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "vocab_size": 49152}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).float()
    tokenizer = SimpleNamespace(chat_template=None, eos_token_id=None)
    return Policy(model, tokenizer, [0], Settings(), torch.bfloat16, train=False)


def seconds(action, times):
    """The mean time of one of several calls, one after the other."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        action()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def copy_speed():
    """Bytes that the GPU reads and writes in a second."""
    source = torch.empty(1 << 30, device="cuda")
    target = torch.empty_like(source)
    seconds(lambda: target.copy_(source), 3)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), 10)


@torch.no_grad()
def measure(policy, prompts, group, compiled, speed):
    """Print the time of a decode step of prompts * group rows."""
    torch._dynamo.reset()
    model = policy.model
    groups = []
    for b in range(prompts):
        tokens = np.random.default_rng(b).integers(0, model.config.vocab_size, PROMPT)
        groups.append(Group(0, b, 0, tokens.tolist(), (b,)))
    batch = Prompts(groups, group, model.device)
    cache = GroupCache(batch, NEW)
    call = {"position_ids": batch.places[batch.real][None], "use_cache": False, "logits_to_keep": 1}
    model(batch.ids[batch.real][None], **call, group_attend=cache.read_prompts)
    for layer, (keys, values) in cache.prompt.items():  # before the first step, which the compiler reads
        size = (prompts * group, keys.shape[1], NEW, keys.shape[3])
        cache.own[layer] = [keys.new_zeros(size), values.new_zeros(size)]
    uniform = torch.rand(prompts * group, NEW, device=model.device)
    logps = torch.zeros_like(uniform)
    token, place = batch.opener.clone(), batch.opener_place.clone()

    def distribution(token, place):
        logits = model(token, position_ids=place, use_cache=False, group_attend=cache.attend_next).logits[:, -1]
        return log_policy(logits, 1.0)

    if compiled:
        distribution = torch.compile(distribution, dynamic=False)

    def step():
        cache.next_column()
        logp = distribution(token, place)
        token.copy_(inverse_cdf(logp.exp(), uniform.index_select(1, cache.column)))
        logps.index_copy_(1, cache.column, logp.gather(1, token))
        place.add_(1)

    warm_up = 3 * seconds(step, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    seconds(graph.replay, 3)
    taken = statistics.median(seconds(graph.replay, 20) for _ in range(5))
    read = sum(p.nbytes for p in model.parameters())
    for layer in cache.own:
        read += sum(part.nbytes for part in cache.prompt[layer])
        read += sum(part[:, :, : cache.width].nbytes for part in cache.own[layer])
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        graph.replay()
        torch.cuda.synchronize()
    kernels, products = 0, 0.0
    for kernel in profiler.key_averages():
        kernels += kernel.count
        if "nvjet" in kernel.key or "gemm" in kernel.key or "splitK" in kernel.key:  # names of cuBLAS
            products += kernel.self_device_time_total / 1e3
    line = {"compiled": compiled, "rows": prompts * group, "prompts": prompts, "ms": 1e3 * taken}
    line |= {"bound_ms": 1e3 * read / speed, "kernels": kernels, "products_ms": products, "warm_up_s": warm_up}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("error: decode.py needs a GPU")
    policy = build_policy()
    speed = copy_speed()
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps(machine | {"copy_tb_per_s": speed / 1e12}), flush=True)
    for prompts in (2, 8):
        for compiled in (False, True):
            measure(policy, prompts, 8, compiled, speed)
