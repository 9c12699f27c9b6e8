"""Memory by option, measured against predicted; bytes that ranks exchange; one process against two.

    python benchmarks/scaling.py --memory      bytes per parameter, on small models with random weights, over gloo
    python benchmarks/scaling.py --speed       seconds a step on 1 and 2 processes of one thread each
    python benchmarks/scaling.py --paper       the arithmetic for 1, 8 and 64 GPUs
    python benchmarks/scaling.py --cards       memory of two agents with adapters, for a card to be chosen

Prints one JSON line per row. The assumptions of --paper are the constants below.
"""

import argparse
import gc
import json
import os
import socket
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402 - the path above has to be set first
from safetensors.torch import load_file  # noqa: E402
from stress import make_model  # noqa: E402

import magrpo  # noqa: E402
import train  # noqa: E402

PARAMETERS, AGENTS = 1.7e9, 2  # of each agent
ITEMS, GROUP, PROMPT, COMPLETION, STEPS = 64, 8, 512, 256, 4  # of a step; optimizer steps per rollout
FLOPS, READ = 0.4 * 990e12, 0.6 * 3.35e12  # of a GPU: bfloat16 FLOP/s and bytes/s of its memory that are reached
NEAR, FAR = 300e9, 40e9  # bytes/s that a rank's collectives reach: within 8 GPUs of a machine, and between machines
ROWS = 128  # up to so many rows, a decode step takes the time that reading the weights takes


def bytes_per_parameter(dtype, agents=1):
    """Bytes on a device that holds so many agents, for each parameter of one.

    Weights, masters and Adam's two moments are kept: 4 + 8 in float32, 2 + 4 + 8 in bfloat16. Gradients, 4, exist for
    one agent at a time: agents are updated one after the other.
    """
    return agents * (12 if dtype == "float32" else 14) + 4


def bytes_with_adapters(parameters, adapter, dtype, agents):
    """Bytes on a device for one frozen model and an adapter of so many parameters for each agent.

    Of the model, only the weights are kept. Of an adapter, the weights, masters, gradients, and Adam's two moments.
    """
    weight = 4 if dtype == "float32" else 2
    return parameters * weight + agents * adapter * (weight + 4 + 4 + 8)


def adapter_parameters(layers, hidden, inner, keys, rank=16):
    """Parameters of an adapter of a Llama-like model; keys: width of all keys, and of all values."""
    shapes = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    return layers * rank * sum(inputs + outputs for inputs, outputs in shapes)


CARDS = {  # parameters, then the shape: Qwen3-1.7B, Qwen2.5-7B
    "1.7 B": (1.72e9, adapter_parameters(28, 2048, 6144, 1024)),
    "7 B": (7.62e9, adapter_parameters(28, 3584, 18944, 512)),
}


def paper(gpus, layout):
    """Seconds and bytes of a step on `gpus` GPUs. Rewards cost nothing, nothing overlaps."""
    ranks, agents = (gpus // AGENTS, 1) if layout == "apart" else (gpus, AGENTS)  # of an agent; on a rank
    rows = ITEMS * GROUP / ranks * agents
    tokens = rows * COMPLETION + rows / GROUP * PROMPT  # a prompt is computed once for its group
    share = (ranks - 1) / ranks
    per_agent = STEPS * 2 * share * 4 * PARAMETERS  # all-reduce of float32 gradients
    decode = agents * COMPLETION * 2 * PARAMETERS / READ * max(1, rows / agents / ROWS)
    compute = decode + tokens * 2 * PARAMETERS * 4 / FLOPS  # prompt and forward 2 FLOP, backward 4, per parameter
    exchange = agents * per_agent / (NEAR if ranks <= 8 else FAR)
    memory = PARAMETERS * bytes_per_parameter("bfloat16", agents)
    return {
        "gpus": gpus,
        "layout": layout,
        "rows_per_agent_and_gpu": round(rows / agents),
        "compute_s": round(compute, 1),
        "exchange_s": round(exchange, 2),
        "exchanged_gb_per_rank": round(agents * per_agent / 1e9, 1),
        "gb_per_gpu_without_activations": round(memory / 1e9, 1),
        "items_per_s": round(ITEMS / (compute + exchange), 2),
    }


def launch(count, arguments, prepare=None):
    """Run train.py on `count` forked ranks of one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(count):
        children.append(os.fork())
        if not children[-1]:
            if count > 1:
                where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in where.items()} | {"MASTER_ADDR": "127.0.0.1"}
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if prepare:
                prepare(rank)
            os._exit(train.main(arguments))
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(f"failed: {' '.join(arguments)}")


def measure(path):
    """Have the process write to a file, before each optimizer step, the bytes of its tensors that are like weights."""
    step = magrpo.Policy.step

    def measured(policy, *arguments):
        storages = {}
        for tensor in [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]:
            for x in (tensor, tensor.grad):
                if x is not None and x.is_floating_point() and x.dim() > 0:
                    storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        path.write_text(str(sum(storages.values())))
        return step(policy, *arguments)

    magrpo.Policy.step = measured


def options(root, out, **more):
    fixed = {"model": root / "model", "out": out, "prompts": 4, "minibatches": 2, "group": 4, "lr": 1e-3}
    return [f"--{name}={value}" for name, value in (fixed | {"max-new-tokens": 12, "steps": 3} | more).items()]


def memory(root):
    make_model(root / "model")
    tensors = load_file(root / "model" / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    del tensors
    cases = {
        "separate, float32": (1, "float32", [], 2),
        "separate, bfloat16": (1, "bfloat16", [], 2),
        "shared, float32": (1, "float32", ["--weights=shared"], 1),
        "apart, float32": (2, "float32", ["--layout=apart"], 1),
        "apart, bfloat16": (2, "bfloat16", ["--layout=apart"], 1),
        "adapters, float32": (1, "float32", ["--weights=adapters"], 2),
        "adapters, bfloat16": (1, "bfloat16", ["--weights=adapters"], 2),
    }
    for n, (name, (count, dtype, flags, agents)) in enumerate(cases.items()):
        seen = root / f"bytes_{n}"
        arguments = [*options(root, root / str(n), dtype=dtype, kl=1e-6), *flags]  # with kl, no group is left out
        launch(count, arguments, lambda rank, seen=seen: measure(seen) if rank == 0 else None)
        copy = 4 if dtype == "float32" else 2  # frozen, for kl
        predicted, copies = bytes_per_parameter(dtype, agents), agents * copy
        if "adapters" in name:
            adapter = adapter_parameters(2, 128, 512, 128)  # of the model that make_model makes
            predicted, copies = round(bytes_with_adapters(parameters, adapter, dtype, 2) / parameters, 1), 0
        row = {"option": name, "predicted": predicted, "kl_copy": copies}
        print(json.dumps(row | {"measured_with_copy": round(int(seen.read_text()) / parameters, 1)}), flush=True)


def speed(root):
    make_model(root / "model")
    for count, flags in ((1, []), (2, []), (2, ["--layout=apart"])):
        out = root / f"{count}{len(flags)}"
        more = {"dtype": "float32", "prompts": 8, "group": 8, "max-new-tokens": 48, "steps": 6}
        launch(count, [*options(root, out, **more), *flags])
        lines = [line for line in train.read_lines(out / "metrics.jsonl") if "update_s" in line][1:]
        seconds = sorted(line["rollout_s"] + line["update_s"] for line in lines)[len(lines) // 2]
        print(json.dumps({"processes": count, "flags": flags, "seconds_a_step": round(seconds, 2)}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("memory", "speed", "paper", "cards"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            memory(Path(folder))
        if args.speed:
            speed(Path(folder))
    for size, (parameters, adapter) in CARDS.items() if args.cards else ():
        gb = bytes_with_adapters(parameters, adapter, "bfloat16", 2) / 1e9
        separate = parameters * bytes_per_parameter("bfloat16", 2) / 1e9
        row = {"two_agents_of": size, "gb_adapters": round(gb, 1), "gb_separate": round(separate, 1)}
        print(json.dumps(row | {"adapter_parameters": adapter, "without": "activations and logits"}))
    for world in (1, 8, 64) if args.paper else ():
        for layout in ("together", "apart"):
            if world > 1 or layout == "together":
                print(json.dumps(paper(world, layout)))


if __name__ == "__main__":
    main()
