"""Seconds per item of a fixed amount of MAGRPO work, ours and a peer's in one run.

    python benchmarks/throughput.py                        ours alone
    python benchmarks/throughput.py --peer comlrl          beside the reference library (pip install comlrl==1.4.3)
    python benchmarks/throughput.py --peer trl             beside TRL's GRPOTrainer (pip install trl==1.16)
    python benchmarks/throughput.py --weights adapters     ours with adapters, also beside a peer

Every completion has exactly --new-tokens tokens. Each agent makes one optimizer step for each item, as CoMLRL does.
Beside TRL, which makes one for all items together, ours does the same. Each runs in a process of its own, for its own
peak memory, and prints one JSON line: prompt_s, rollout_s and update_s (seconds per item, all agents), and peak_rss_gb
(2**30 bytes). TRL trains one agent: its seconds are multiplied by the number of agents. With a peer, a last line has
the ratio. Times are medians over the steps. Lengths are fixed, so the weights do not matter.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch  # noqa: E402 - the variables above have to be set first

CUDA = torch.cuda.is_available()


def posts(args, steps):
    lines = (ROOT / "data" / "posts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[i % len(lines)])["prompt"] for i in range(args.prompts * steps)]


def prompt_of(agent, post):
    return f"Agent {agent}. Summarize.\n{post}"


def clock():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def run_ours(args):
    from magrpo import Policy, Settings, train_step
    from train import keep_freed_memory, load_model

    if not CUDA:
        keep_freed_memory()  # as train.py does

    class Fixed:
        """A task whose reward is cheap and never flat."""

        num_agents, expert, maxima = args.agents, None, {}

        def prompts(self, item, history):
            return [prompt_of(agent, item) for agent in range(args.agents)]

        def rewards(self, jobs):
            return [{"total": float(sum(map(len, texts)) % 97)} for _, _, texts in jobs]

    cfg = Settings(
        num_agents=args.agents,
        group=args.group,
        max_new_tokens=args.new_tokens,
        temperature=1.0,
        lr=1e-6,
        minibatches=1 if args.peer == "trl" else args.prompts,
        micro_batch=args.micro_batch,
    )
    policies, everyone = [], list(range(args.agents))
    for agents in [everyone] if args.weights == "adapters" else [[agent] for agent in everyone]:
        model, tokenizer = load_model(args.model, "cuda" if CUDA else "cpu")
        adapters = [{} for _ in agents] if args.weights == "adapters" else None
        policies.append(Policy(model, tokenizer, agents, cfg, getattr(torch, args.dtype), adapters=adapters))
        policies[-1].stop_ids = []
    items, rollout_s, update_s = posts(args, args.steps + 1), [], []
    for step in range(args.steps + 1):
        part = items[step * args.prompts : (step + 1) * args.prompts]
        _, metrics = train_step(policies, Fixed(), part, cfg, step)
        rollout_s.append(metrics["rollout_s"] / args.prompts)
        update_s.append(metrics["update_s"] / args.prompts)
    return report(rollout_s[1:], update_s[1:])


def report(rollout_s, update_s):
    both = [r + u for r, u in zip(rollout_s, update_s, strict=True)]
    median = {"prompt_s": both, "rollout_s": rollout_s, "update_s": update_s}
    return {name: round(statistics.median(values), 3) for name, values in median.items()}


def run_comlrl(args):
    from comlrl.trainers.reinforce import MAGRPOConfig, MAGRPOTrainer
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)  # its defaults
    agents = [AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device) for _ in range(args.agents)]

    def reward(*answers, batch_items=None):
        return [float(sum(len(answer[0]) for answer in answers) % 97)] * len(answers[0])

    trainer = MAGRPOTrainer(
        agents=agents,
        num_agents=args.agents,
        tokenizer=tokenizer,
        reward_func=reward,
        formatters=[
            lambda item, external_prompts=None, agent=agent: prompt_of(agent, item["prompt"])
            for agent in range(args.agents)
        ],
        train_dataset=Dataset.from_list([{"prompt": post} for post in posts(args, args.steps + 1)]),
        args=MAGRPOConfig(
            num_turns=1,
            num_train_epochs=1,
            num_generations=args.group,
            max_new_tokens=args.new_tokens,
            eval_interval=0,
            rollout_buffer_size=1,
            train_batch_size=1,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            agent_learning_rate=1e-6,
            early_termination_threshold=None,
            agent_devices=device,
        ),
    )
    total, rollout = timed(trainer, "_train_step_returns"), timed(trainer, "_generate_completions")
    trainer.train(min_new_tokens=args.new_tokens)
    generated = [sum(rollout[i : i + args.agents]) for i in range(0, len(rollout), args.agents)]
    warm = args.prompts
    return report(generated[warm:], [t - g for t, g in zip(total[warm:], generated[warm:], strict=True)])


def timed(owner, name):
    """Replace a method by one that notes its seconds in the returned list."""
    seconds, method = [], getattr(owner, name)

    def wrapper(*positional, **named):
        start = clock()
        result = method(*positional, **named)
        seconds.append(clock() - start)
        return result

    setattr(owner, name, wrapper)
    return seconds


def run_trl(args):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Steps(TrainerCallback):
        """Seconds of whole steps, the optimizer's included."""

        seconds = []

        def on_step_begin(self, *_, **__):
            self.start = clock()

        def on_step_end(self, *_, **__):
            self.seconds.append(clock() - self.start)

    dtype = torch.bfloat16 if CUDA else torch.float32
    rows = [{"prompt": prompt_of(0, post)} for post in posts(args, args.steps + 1)]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.prompts * args.group,
        num_generations=args.group,
        max_completion_length=args.new_tokens,
        temperature=1.0,
        learning_rate=1e-6,
        max_steps=args.steps + 1,
        logging_steps=1000,
        save_strategy="no",
        report_to=[],
        use_cpu=not CUDA,
        bf16=CUDA,
        gradient_checkpointing=False,
        beta=0.0,
        generation_kwargs={"min_new_tokens": args.new_tokens},
        dataloader_pin_memory=False,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype),
        reward_funcs=lambda completions, **_: [float(len(completion) % 97) for completion in completions],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
        callbacks=[Steps()],
    )
    rollout = timed(trainer, "_generate_single_turn")
    trainer.train()
    scale = args.agents / args.prompts
    rollout_s = [s * scale for s in rollout[1:]]  # of each step: after the first, which is not counted
    return report(rollout_s, [s * scale - r for s, r in zip(Steps.seconds[1:], rollout_s, strict=True)])


def measure(args, which):
    """Run one implementation in a process of its own and read its line."""
    command = [sys.executable, __file__, "--run", which]
    for name in ("model", "weights", "prompts", "group", "new_tokens", "agents", "dtype", "steps", "micro_batch"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--peer", args.peer] if args.peer else []
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{which} failed:\n{result.stderr[-2000:]}")
    print(result.stdout.splitlines()[-1], flush=True)
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="folder of a model; default: SmolLM2-135M, as train.py")
    parser.add_argument("--weights", choices=["separate", "adapters"], default="separate", help="of ours")
    parser.add_argument("--prompts", type=int, default=4, help="items per step")
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--agents", type=int, default=2)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of ours; peers: bfloat16 on a GPU"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--peer", choices=["comlrl", "trl"])
    parser.add_argument("--run", choices=["ours", "comlrl", "trl"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.model:
        from train import default_model

        args.model = str(default_model())
    if args.run:
        result = {"ours": run_ours, "comlrl": run_comlrl, "trl": run_trl}[args.run](args)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        work = {name: getattr(args, name) for name in ("prompts", "group", "new_tokens", "agents")}
        ours = {"weights": args.weights, "dtype": args.dtype} if args.run == "ours" else {"dtype": "default"}
        print(json.dumps({"implementation": args.run} | ours | work | result | {"peak_rss_gb": round(peak, 2)}))
        return
    ours = measure(args, "ours")
    if args.peer:
        peer = measure(args, args.peer)
        print(json.dumps({f"{args.peer} / ours": round(peer["prompt_s"] / ours["prompt_s"], 2)}))


if __name__ == "__main__":
    main()
