"""Rewards of the writing and coding tasks (arXiv 2508.04652), and the sandbox in which model-written code is judged.

A reward is a dict: "total", the parts that sum to it and, for code, "passed" and "detail" beside them. Levels open each
other: what is not reached is 0.0.

Model-written code is hostile code: a policy under optimisation finds every hole that pays. So three processes:

    trainer ── starts ──> judge ── forks, before it reads the tests ──> guests
    reads text only       runs the data set's tests, never an answer    run the answer: calls in, plain data out

A guest never holds an expected value, and the judge rebuilds what it is sent from exact built-in types. Whatever an
answer does in its own process (objects equal to everything, patched built-ins, forged replies, an early exit), it can
only ever *return a value*.

Covered where `isolation()` is all True (Linux as root, or where user namespaces are allowed): an answer sees no process
but its judge, no network, and no file but an empty folder in memory (it imports from MODULES only). It is an ordinary
user without capabilities, cannot fork, and CPU, time, memory and files are bounded. All that it leaves goes with it.
Not covered: holes in the kernel, its keyrings, a virtual machine's sockets to its host, time as a side channel, tests
that are themselves malicious. Where isolation is False (macOS, many containers) two processes, limits and kills remain,
but an answer may open sockets, fill System V memory and signal other answers, and where the trainer is not root also
read its user's files, the tests among them, and signal its processes: the trainer should say so.
"""

import ast
import builtins
import contextlib
import functools
import json
import keyword
import os
import re
import signal
import sys
import textwrap

# ---- Writing ---------------------------------------------------------------------------------------------------------

TLDR_MAX = {"total": 3.0, "structure": 0.5, "length": 1.0, "vocabulary": 0.5, "consistency": 0.6, "coherence": 0.4}

CONNECTIVES = {
    "elaboration": "moreover, furthermore, in addition, additionally, what is more, besides, in other words",
    "examples": "for example, for instance, such as, to illustrate, namely, in particular, e.g",
    "explanation": "because, since, that is, i.e, the reason, this means, due to, owing to",
    "cause and effect": "so, therefore, thus, hence, consequently, as a result, accordingly, for this reason",
    "contrast": "but, however, yet, in contrast, on the other hand, whereas, instead, conversely, on the contrary",
    "sequence": "first, firstly, second, secondly, third, next, then, finally, lastly, to begin with, step by step",
    "emphasis": "indeed, in fact, above all, notably, especially, certainly, of course, importantly, clearly",
    "summary": "in short, in summary, to sum up, overall, in conclusion, in brief, all in all, to conclude",
    "comparison": "similarly, likewise, in the same way, just as, compared to, compared with, equally, by comparison",
    "concession": "although, though, even though, nevertheless, nonetheless, despite, in spite of, even so, still",
    "condition": "if, unless, provided that, as long as, otherwise, in case, assuming, whether, only if",
    "time": "when, while, after, before, until, meanwhile, later, earlier, afterwards, eventually, now, once, soon",
}

STOP_WORDS = frozenset(
    """a about above after again against all also am an and any are as at be because been before being below between
    both but by can could did do does doing down during each few for from further had has have having he her here hers
    him his how i if in into is it its itself just may me might more most must my no nor not now of off on once only
    or other our ours out over own same shall she should so some such than that the their theirs them then there these
    they this those through to too under until up upon us very was we were what when where which while who whom whose
    why will with would you your yours""".split()
)


def tldr_reward(first: str, second: str) -> dict:
    """Reward of a brief summary (`first`) and a detailed one (`second`), at most 3 (the paper's TLDR).

    All twelve kinds of connectives earn 95 % of the last part, so 2.98 is the most that can be reached.

    Parts: structure (both have 8–256 words), length (ratio of characters), vocabulary (ratio of distinct words, which
    has no upper end here), consistency (overlap of the two word sets), coherence (kinds of connectives in `second`).
    """
    return _writing_reward(first, second, second, (8, 256), (1.1, 1.6, 3.2, 5.0), (1.3, 2.0, 1e9, 2e9), 0.03)


def arxiv_reward(first: str, second: str) -> dict:
    """Reward of two halves of an introduction, at most 3 (the paper's arXiv).

    Parts as in `tldr_reward`; both have 128–256 words, and connectives count in both.
    """
    both = first + "\n" + second
    return _writing_reward(first, second, both, (128, 256), (0.8, 1.3, 1.6, 2.0), (0.5, 0.7, 1.3, 1.7), 0.23)


def _writing_reward(first, second, linked, words_allowed, length, vocabulary, overlap) -> dict:
    """The levels that both tasks share. `linked`: the text whose connectives count; `overlap`: the Jaccard to reach."""
    parts = dict.fromkeys(TLDR_MAX, 0.0)
    words = [set(re.findall(r"\w+", text.lower())) for text in (first, second)]
    if words[0] and all(words_allowed[0] <= len(text.split()) <= words_allowed[1] for text in (first, second)):
        parts["structure"] = 0.5
        longer = _trapezoid(len(second) / len(first), *length)
        richer = _trapezoid(len(words[1]) / len(words[0]), *vocabulary)
        parts["length"] = longer or 0.0
        if longer is not None and richer is not None:
            content = [some - STOP_WORDS for some in words]
            jaccard = len(content[0] & content[1]) / max(1, len(content[0] | content[1]))
            parts["vocabulary"] = 0.5 * richer
            parts["consistency"] = 0.6 * min(jaccard, overlap) / overlap
            parts["coherence"] = 0.4 * _transitions(linked)
    parts["total"] = sum(parts.values())
    return parts


def _trapezoid(x: float, zero_low: float, one_low: float, one_high: float, zero_high: float):
    """1 on the plateau, linear on the slopes, None outside (which ends the hierarchy; 0 on the edge does not)."""
    if zero_low <= x <= zero_high:
        return min(1.0, (x - zero_low) / (one_low - zero_low), (zero_high - x) / (zero_high - one_high))
    return None


def _transitions(text: str) -> float:
    """Share of the transition score that the categories of connectives in `text` earn (0.95 with all twelve).

    Whole words and phrases only: the reference finds "so" in "some", and so pays for nearly any text.
    """
    categories = 0
    for phrases in CONNECTIVES.values():
        pattern = phrases.replace(", ", "|").replace(".", r"\.").replace(" ", r"\s+")
        categories += re.search(rf"\b(?:{pattern})\b", text.lower()) is not None
    return min(1.0, 0.4 + 0.05 * (categories - 1)) if categories else 0.0


# ---- Code ------------------------------------------------------------------------------------------------------------

CODE_MAX = {"total": 4.0, "structure": 1.0, "syntax": 0.5, "tests": 1.0, "cooperation": 1.5}

MAX_ANSWER, MAX_VALUE = 50_000, 256_000  # characters of an answer that are read, of a returned value on its way
TEST_SECONDS = 2.0  # wall time of one test; also of parsing, and of loading, the answer
JOB_SECONDS = 15  # wall time of the judge, and CPU time of each process; tests after that do not pass
GUESTS = 3  # a time-out or a crash costs a guest; with the last one the tests end
MEMORY = 768 << 20  # bytes of address space of each process
MODULES = """__future__ _strptime abc array base64 binascii bisect calendar cmath collections contextlib copy csv
    dataclasses datetime decimal difflib enum fractions functools graphlib hashlib heapq html itertools json math
    numbers operator pprint queue random re secrets statistics string struct textwrap time types typing unicodedata
    warnings weakref zlib""".split()  # what an answer may import

# What a line at the left edge can be: the start of code, its start before the first definition, or more of it.
START = re.compile(
    r"(async +)?def +\w|class +\w+ *[:(]|@\w|import +[\w.]+( +as +\w+)? *([,;#]|$)|from +[\w.]+ +import "
)
SETUP = re.compile(r"[^\W\d]\w*( *, *[^\W\d]\w*)* *=|try:")
MORE = re.compile(
    rf"""({"|".join(keyword.kwlist)}|match|case|print)\b  # a statement
    | [\#@"')\]}}]  # a comment, a decorator, a string, the end of a bracket
    | [^\W\d][\w.]*(\[.*\])?(\ *,\ *[\w.]+)*\ *([-+*/%&|^]|//|\*\*|<<|>>)?=  # an assignment
    | [a-z_]\w*\ *:.*=  # one with a type
    | [^\W\d][\w.]*\((.*[\])}}(,])?\s*(\#.*)?$  # a call
    """,
    re.VERBOSE,
)
INDENTED_FENCE = re.compile(r"^([ \t]+)(```|~~~)(?s:.*?)^\1\2", re.MULTILINE)
# Possessive, and with an end that may be missing: on hostile text, anything that goes back takes minutes.
LITERAL = re.compile(r"""("{3}|'{3})(?s:.*?)(\1|\Z)|"(\\.|[^"\\\n])*+"?|'(\\.|[^'\\\n])*+'?|#.*""")


def code_reward(aux: str | list[str], main: str, item: dict) -> dict:
    """Reward of helper(s) and an entry point that together should pass the tests of `item`, at most 4 (the paper's).

    `aux` is the answer that should define `aux`, or a list of answers for aux, aux2, aux3, …: structure and cooperation
    are then in proportion to the helpers defined and used. [] if one agent writes both functions, in `main`.
    `item`: `prompt`, `entry_point`, and `test` as in HumanEval, `check(candidate)` with asserts, or bare asserts that
    call the entry point. A test is an assert, a loop of them, or a call of the test's own function that holds them; it
    passes if at least one of its asserts ran, and `assert True` is none. Arguments and results are copied plain data:
    None, numbers, text, bytes; lists, tuples, sets and dicts of them. So a test cannot see what a function did to an
    argument, and one that wants an iterator, an object or a function does not pass.

    Returns "total" and its parts structure, syntax, tests, cooperation (a helper's result thrown away costs 0.5 of it,
    even below 0); "passed", the fraction of the tests; "detail": helpers and entry (defined with a return?), error (of
    syntax, or None; "errors" has one for each answer), uses (fraction of the helpers), wrapper, discards, and outcomes:
    [{"test", "outcome"}], an outcome being passed, failed, time-out, died, not run, or the text of an exception. No
    answer makes it raise; RuntimeError says that the sandbox itself does not start.
    """
    helpers, entry = [extract_code(text) for text in ([aux] if isinstance(aux, str) else aux)], extract_code(main)
    names = ["aux"] + [f"aux{i}" for i in range(2, len(helpers) + 1)]
    defined = [_defines(name, text) for name, text in zip(names, helpers or [entry], strict=True)]
    detail = {"helpers": defined, "entry": _defines(item["entry_point"], entry), "error": None}
    detail.update(uses=0.0, wrapper=False, discards=False, outcomes=[])
    reward = dict.fromkeys([*CODE_MAX, "passed"], 0.0)
    reward["structure"] = 0.4 * sum(defined) / len(defined) + 0.6 * detail["entry"]
    if detail["entry"]:
        job = {key: item[key] for key in ("prompt", "entry_point", "test")}
        detail.update(_sandbox({**job, "names": names, "program": [*helpers, entry]}))
        if detail["error"] is None:
            passed = [row["outcome"] == "passed" for row in detail["outcomes"]]
            reward["syntax"] = 0.5
            reward["tests"] = reward["passed"] = sum(passed) / max(1, len(passed))
    if reward["passed"] > 0:
        reward["cooperation"] = detail["uses"] * (0.5 if detail["wrapper"] else 1.5) - 0.5 * detail["discards"]
    reward["total"] = sum(reward[part] for part in CODE_MAX)
    return {**reward, "detail": detail}


def judge_many(jobs: list[tuple]) -> list[dict]:
    """`code_reward` of each (aux, main, item), in order, on all the cores that this process may use."""
    from concurrent.futures import ThreadPoolExecutor

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        return list(pool.map(lambda job: code_reward(*job), jobs))


def isolation() -> dict[str, bool]:
    """Of which of "processes", "network" and "files" an answer sees a view of its own only; found by starting one."""
    return _sandbox({"prompt": "", "entry_point": "", "test": "", "names": [], "program": [""]})["isolation"]


def extract_code(text: str) -> str:
    """The code of an answer, without Markdown's fences and the prose around it.

    A line at the left edge tells whether what follows is code. In a fence all of it is, from the first such line on;
    after the first definition only imports and further definitions start again, as an example of use does not.
    """
    text = re.sub(r"\r\n?", "\n", text[:MAX_ANSWER].lstrip("\ufeff"))
    text = INDENTED_FENCE.sub(lambda block: textwrap.dedent(block[0]), textwrap.dedent(text)).strip()
    kept, code, fenced, quoted, defined = [], False, False, False, False
    for line in text.split("\n"):
        if line and line[0] not in " \t" and not quoted:
            if line.startswith(("```", "~~~")):
                code, fenced = False, not fenced
            elif not code:
                code = bool(START.match(line) or not defined and SETUP.match(line))
            elif not fenced:
                code = bool(MORE.match(line))
        if code:
            kept.append(line)
            defined |= "def " in line
            quoted ^= (line.count('"""') + line.count("'''")) % 2 == 1
    return "\n".join(kept)


def _defines(name: str, code: str) -> bool:
    """Level 1 reads text, so that a syntax error costs only level 2: `def name(`, and `return` before the next def."""
    depth = None  # of the definition that a line is in, if it is one of that name
    for line in LITERAL.sub("''", code).split("\n"):  # a docstring may speak of what the function returns
        start = re.match(r"([ \t]*)(?:def[ \t]+(\w+)[ \t]*\(|(?:async|def|class)\b)", line)
        if start and (depth is None or len(start[1]) <= depth):
            depth = len(start[1]) if start[2] == name else None
        if depth is not None and re.search(r"\breturn\b", line):
            return True
    return False


# ---- The trainer's end of the sandbox --------------------------------------------------------------------------------


@functools.cache
def _unshare() -> list[str]:
    """The command that gives a program process, mount, network and IPC spaces of its own; [] where refused."""
    import subprocess

    command = "unshare --pid --fork --kill-child --mount --net --ipc --uts".split()
    command += ["--user", "--map-root-user"] if os.geteuid() else []  # an ordinary user may only within a user space
    try:
        return command if subprocess.run([*command, "true"], env={}, stderr=subprocess.DEVNULL).returncode == 0 else []
    except OSError:
        return []


def _sandbox(job: dict) -> dict:
    """Start a judge, give it one job, wait, clean up: its report, as "detail" of `code_reward` has it."""
    import subprocess  # not above: the judge imports this file too, and these would double the time of its start
    import tempfile

    here, file = os.path.split(os.path.abspath(__file__))
    spaces = _unshare()
    words = set(re.findall(r"\w+", " ".join([job["prompt"], *job["program"]])))
    modules = [name for name in MODULES if words & {name, name.lstrip("_")}]
    judge = f"r._judge({bool(spaces)}, {os.geteuid() == 0}, {modules})"
    start = f"import sys; sys.path[0] = {here!r}; import {file[:-3]} as r; del sys.path[0]; {judge}"
    # -S: no site-packages. The environment is one line, which makes the order of a set the same in every run.
    command = [*spaces, sys.executable, "-S", "-s", "-c", start]
    folder, pipe = tempfile.mkdtemp(prefix="guest-"), subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=folder, env={"PYTHONHASHSEED": "0"}, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    )
    try:
        out, err = process.communicate(json.dumps(job).encode(), timeout=JOB_SECONDS)
    except subprocess.TimeoutExpired:  # slow in many tests, or in one that hears no alarm, deep in C
        process.kill()
        out, err = process.communicate()  # until the judge, which is a child of `unshare`, is dead, too
    finally:
        process.kill()
        # Not rmtree, which a deep enough tree makes raise. Where no mount hides the folder, an answer may lock it.
        wipe = 'rm -rf "$0" || { chmod -R u+rwX "$0"; rm -rf "$0"; }'
        subprocess.run(["sh", "-c", wipe, folder], stderr=subprocess.DEVNULL)
    rows = [json.loads(line) for line in out.splitlines(keepends=True) if line.endswith(b"\n")]
    if not rows:
        raise RuntimeError("the sandbox did not start: " + err.decode(errors="replace")[-2000:])
    guests = rows[0].pop("guests")
    for pid in guests if process.returncode else ():  # the judge did not live to do it
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    told = [row.pop("outcome") for row in rows if "outcome" in row]
    detail = {"error": "the parser gave up", "outcomes": []} | {key: row[key] for row in rows for key in row}
    for row, outcome in zip(detail["outcomes"], told, strict=False):
        row["outcome"] = outcome
    return detail


# ---- The judge: runs the data set's tests, never the answer ----------------------------------------------------------


class _Candidate:
    """What the tests call as the entry point: hands the call to the first of the guests that are left."""

    def __init__(self, guests: list):
        self.guests, self.lost = guests, ""

    def __call__(self, *args, **kwargs):
        return self.ask(_encode((args, kwargs)))

    def ask(self, what):
        """One line there, one line back, under the alarm of `timed`. What comes back is only a value, or raised."""
        if self.lost or not self.guests:
            raise ConnectionError
        line, reply = self.guests[0][1], b""
        try:
            line.sendall(json.dumps(what).encode() + b"\n")
            while not reply.endswith(b"\n"):
                part = line.recv(1 << 16)
                reply += part
                if not part or len(reply) > MAX_VALUE:
                    raise ConnectionError
            name, value = json.loads(reply)
            value = _decode(value) if name == "value" else _exception(name, str(value))
        except (OSError, KeyboardInterrupt) as error:  # the second: the alarm rang
            self.lose("died" if isinstance(error, OSError) else "time-out")
            raise
        if name != "value":
            raise value
        return value

    def lose(self, how: str) -> None:
        """End the guest. This decides the outcome: a test may catch what it raises, but not make it pass."""
        self.lost = how
        os.kill(self.guests.pop(0)[0], signal.SIGKILL)

    def timed(self, action, *args) -> str:
        """The outcome of an action within the time of a test; a time-out or a death costs the guest."""
        self.lost, outcome = "", "passed"
        if not self.guests:
            return "not run"
        signal.setitimer(signal.ITIMER_REAL, TEST_SECONDS)
        try:
            action(*args)
        except AssertionError:
            outcome = "failed"
        except KeyboardInterrupt:
            outcome = "time-out"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"[:200]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return self.lost or outcome


def _exception(names: list, text: str) -> Exception:
    """What a test may expect: the first built-in among the classes of the guest's exception, from the most special."""
    for name in names:
        error = getattr(builtins, str(name), None)
        if error is StopIteration:  # it would end a loop of asserts before its first
            break
        if isinstance(error, type) and issubclass(error, Exception):
            with contextlib.suppress(TypeError):  # some, of Unicode, want more than a text
                return error(text)
    return RuntimeError(text)


def _judge(isolated: bool, root: bool, modules: list[str]) -> None:
    """What the bare Python runs: fork the guests, then read the job; report in lines of JSON."""
    os.environ.clear()
    sys.set_int_max_str_digits(50_000)  # numbers cross in decimal; more digits would be slow, deep in C
    _linux("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    # a guest will find no file to import from, nor does the parser of names, nor Python 3.12 for a number's many digits
    always = ["unicodedata"] if sys.version_info < (3, 12) else ["unicodedata", "_pylong"]
    for name in [*always, *modules]:
        __import__(name)
    if isolated:
        folder = os.getcwd()
        _linux("mount", b"none", folder.encode(), b"tmpfs", MS_NOSUID_NODEV_NOEXEC, b"size=4m,nr_inodes=1k")
        os.chdir(folder)  # into the mount; until now "." is what lies below it
        for kind in ("shmmni", "msgmni"):  # System V's memory belongs to no process, so MEMORY would not bound it
            with contextlib.suppress(OSError), open("/proc/sys/kernel/" + kind, "w") as file:
                file.write("0")
    _limit(AS=MEMORY, CPU=JOB_SECONDS, FSIZE=0, CORE=0)  # files of 0 bytes only
    guests = [_start_guest(root) for _ in range(GUESTS)]
    _linux("prctl", PR_SET_DUMPABLE, 0)  # from here on no process of the same user may look into our memory
    # A lone surrogate in the text of an exception would break tokenizers and logs.
    report = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # tests may print
    pids = [pid for pid, _, _ in guests]

    def tell(**row):
        print(json.dumps(row, ensure_ascii=False), file=report, flush=True)

    view = {"processes": isolated, "network": isolated, "files": guests[0][2]}
    tell(isolation=view, guests=[] if isolated else pids)
    try:
        _run_tests(json.load(sys.stdin), guests, tell)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _run_tests(job: dict, guests: list, tell) -> None:
    """Tell the facts of the syntax tree, then the tests, then one outcome for each."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # KeyboardInterrupt, for `except Exception` to miss
    test = job.pop("test")
    for _, line, _ in guests:
        line.sendall(json.dumps(job).encode() + b"\n")
    candidate, ran = _Candidate(guests), []
    if candidate.timed(lambda: tell(**candidate.ask("look"))) != "passed":
        return
    space = {job["entry_point"]: candidate, "candidate": candidate, "_ran": ran}
    steps = _steps(test, space)
    tell(outcomes=[{"test": source, "outcome": "not run"} for _, source in steps if source])

    def run(tree):
        ran.clear()
        exec(compile(tree, "test", "exec"), space)

    candidate.timed(exec, _preamble(job), space)
    loading = candidate.timed(candidate.ask, "load")
    lost = ""
    for tree, source in steps:
        outcome = candidate.timed(run, tree) if loading == "passed" else loading
        lost = lost or candidate.lost  # also in what a test prepares
        if source:
            tell(outcome=lost or outcome)
            lost = ""


def _preamble(job: dict):
    """The imports and helper functions of the prompt, compiled; nothing if the prompt is not code."""
    for text in (job["prompt"], job["prompt"] + "\n    pass\n", ""):
        with contextlib.suppress(SyntaxError):
            tree = ast.parse(text)
            tree.body = [node for node in tree.body if getattr(node, "name", None) != job["entry_point"]]
            return compile(tree, "prompt", "exec")


def _steps(test: str, space: dict) -> list[tuple]:
    """The statements of a test, each with its source if it counts as a test, else "".

    `space` learns what `check` calls the candidate; `_ran` in it, which asserts fill, must not be empty after a test.
    """
    statements, steps = [], []
    for node in ast.parse(test).body:
        if isinstance(node, ast.FunctionDef) and node.name == "check":
            space[(node.args.posonlyargs + node.args.args)[0].arg] = space["candidate"]
            statements += node.body
        elif not ast.unparse(node).startswith("check("):
            statements.append(node)
    functions = {node.name: node for node in statements if isinstance(node, ast.FunctionDef)}
    sources = [ast.unparse(node)[:200] for node in statements]
    for each in (part for node in statements for part in ast.walk(node)):
        if isinstance(each, ast.Assert) and not isinstance(each.test, ast.Constant):
            each.test = ast.BoolOp(ast.Or(), [ast.parse("_ran.append(1)", mode="eval").body, each.test])
    for node, source in zip(statements, sources, strict=True):
        inside = [] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else list(ast.walk(node))
        reached = set()
        for each in inside:  # which grows by the functions that are called, and those that they call
            if isinstance(each, ast.Name) and each.id in set(functions) - reached:
                reached.add(each.id)
                inside += ast.walk(functions[each.id])
        asserts = [each for each in inside if isinstance(each, ast.Assert)]
        # Any answer passes `assert True`, and a loop over nothing; either would open the level that comes after.
        real = [each for each in asserts if not (isinstance(each.test, ast.Constant) and each.test.value)]
        must_run = not all(isinstance(each.test, ast.Constant) for each in real)
        nodes = [node, *ast.parse("assert _ran").body] if must_run else [node]
        if real or not asserts:
            steps.append((ast.fix_missing_locations(ast.Module(nodes, [])), source if real else ""))
    return steps


def list_tests(test: str) -> list[str]:
    """The sources of the statements that `code_reward` counts as tests. Raises SyntaxError for what is not Python."""
    return [source for _, source in _steps(test, {"candidate": None}) if source]


# ---- The guest: the only process that parses and runs an answer ------------------------------------------------------

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, MS_NOSUID_NODEV_NOEXEC, NOBODY = 1, 4, 38, 2 | 4 | 8, 65534


def _linux(name: str, *args) -> None:
    """Call the C library for what Python does not offer; OSError if it refuses. Elsewhere than on Linux do nothing."""
    if sys.platform == "linux":
        import ctypes

        if getattr(ctypes.CDLL(None, use_errno=True), name)(*args, *[0] * (5 - len(args))) != 0:
            raise OSError(ctypes.get_errno(), name)


def _limit(**limits: int) -> None:
    """Set resource limits of this process and its children; a system that does not know one goes without."""
    import resource

    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


def _start_guest(root: bool) -> tuple:
    """Fork a guest: (process number, socket to it, is its folder all that it sees?), once it has locked itself in."""
    import socket

    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            _lock_in(theirs.fileno(), root)
            _guest(theirs)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(0)
    theirs.close()
    ready = ours.recv(1)
    if not ready:
        raise RuntimeError("a guest could not lock itself in")
    return pid, ours, ready == b"1"


def _lock_in(keep: int, root: bool) -> None:
    """Give up files, rights, processes, and every descriptor but `keep`."""
    null = os.open(os.devnull, os.O_RDWR)
    sys.path.clear()  # the same modules for every answer, on every system
    if root:
        os.chown(".", NOBODY, NOBODY)
    with contextlib.suppress(PermissionError):
        os.chroot(".")
    if root:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    _linux("prctl", PR_SET_NO_NEW_PRIVS, 1)
    _linux("capset", b"\x22\x05\x08\x20" + bytes(4), bytes(24))  # version 3 of the call; no capability is left
    _limit(NPROC=1, NOFILE=32)  # this is the one process: no fork, no thread
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(3, keep)
    os.closerange(keep + 1, 256)


def _guest(line) -> None:
    """Read the job, then serve: "look" (parse the answer, say what is seen), "load", or the arguments of a call."""
    line.sendall(b"1" if os.path.samefile("/", ".") else b"0")
    requests, loaded = line.makefile("rb"), False
    job = json.loads(requests.readline())
    for request in map(json.loads, requests):
        try:
            if request == "look":
                value = _facts(job)
            elif not loaded:
                module = sys.modules["answer"] = type(sys)("answer")  # dataclasses look there
                space = module.__dict__
                for code in (_preamble(job), *job["program"]):
                    exec(code, space)
                value = loaded = True
            if request not in ("look", "load"):
                args, kwargs = _decode(request)
                value = space[job["entry_point"]](*args, **kwargs)
            reply = json.dumps(["value", _encode(value)])
            if len(reply) >= MAX_VALUE:
                raise ValueError("the value is too large")
        except BaseException as error:
            reply = json.dumps([[kind.__name__ for kind in type(error).__mro__], str(error)[:200]])
        line.sendall(reply.encode() + b"\n")


def _facts(job: dict) -> dict:
    """What the syntax trees say of an answer: error, errors, uses, wrapper, discards (see `code_reward`)."""
    helpers = job["program"][:-1]
    errors = [_syntax_error(text) for text in job["program"]]
    if any(errors):
        return {"error": next(filter(None, errors)), "errors": errors}
    *_, tree = trees = [ast.parse(text) for text in job["program"]]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    entry = [node for node in functions if node.name == job["entry_point"]][-1:]
    nodes = [node for function in entry for node in ast.walk(function)]
    # A helper that the main answer writes again, or whose name means something else in it, is not the helper.
    own = [node for node in ast.walk(tree) if not isinstance(node, ast.keyword) and (helpers or node not in functions)]
    taken = {node.id for node in own if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    taken |= {getattr(node, field, None) for node in own for field in ("name", "asname", "arg", "rest")}
    everything = [node for each in trees for node in ast.walk(each)]
    given = [node for node in everything if not isinstance(getattr(node, "ctx", None), ast.Load)]
    known = {getattr(node, "name", getattr(node, "id", None)) for node in given} & set(job["names"]) - taken
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    direct = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in known]
    handed = [place for call in calls for place in (call.func, *call.args, *(word.value for word in call.keywords))]
    used = known & {place.id for place in handed if isinstance(place, ast.Name)}  # called, or as in map(aux, values)
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    targets = {  # of each statement that is no more than a call of a helper, with or without an assignment
        node: [part for part in ast.iter_child_nodes(node) if isinstance(getattr(part, "ctx", None), ast.Store)]
        for node in nodes
        if isinstance(node, (ast.Expr, ast.Assign, ast.AnnAssign)) and node.value in direct
    }
    kept = [any(not isinstance(part, ast.Name) or part.id in read for part in parts) for parts in targets.values()]
    body = [node for function in entry for node in function.body]
    body = [node for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    result = body[-1].value if body and isinstance(body[-1], ast.Return) else None
    same = len(body) == 2 and result and ast.unparse(result) in map(ast.unparse, targets.get(body[0], []))
    wrapper = len(used) == 1 and bool(same or len(body) == 1 and result in direct)
    return {"error": None, "uses": len(used) / len(job["names"]), "wrapper": wrapper, "discards": not all(kept)}


def _syntax_error(code: str):
    """Where and why it does not parse, or None."""
    try:
        ast.parse(code)
    except SyntaxError as error:
        return f"line {error.lineno}, column {error.offset}: {error.msg}"
    except (ValueError, MemoryError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"[:200]


# ---- Plain data between judge and guest ------------------------------------------------------------------------------

CONTAINERS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict, bytes)}


def _encode(value):
    """Plain data as JSON, containers as [kind, parts]; a subclass is written as its base; else TypeError."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return [name, [_encode(part) for part in (value.items() if kind is dict else value)]]
    raise TypeError(f"{type(value).__name__} is not plain data")


def _decode(data):
    """What `_encode` was given, of exact built-in types whoever sent it; an Exception for what is no encoding."""
    if not isinstance(data, list):
        return data
    name, parts = data
    parts = map(_decode, parts)  # one by one, for the alarm to be heard between two that collide in a set
    return complex(*parts) if name == "complex" else CONTAINERS[name](parts)
