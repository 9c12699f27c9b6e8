"""Rewards of the writing and coding tasks (arXiv 2508.04652), and the sandbox in which model-written code is judged.

A reward is a dict: "total", and the parts that sum to it. Levels open each other: what is not reached is 0.0.

Model-written code is hostile code: a policy under optimisation finds every hole that pays. So three processes:

    trainer ── starts ──> judge ── forks, before it reads the tests ──> guests
    reads text only       runs the data set's tests, never an answer    run the answer: calls in, plain data out

A guest never holds an expected value, and the judge rebuilds what it is sent from exact built-in types. Whatever an
answer does in its own process (objects equal to everything, patched built-ins, forged replies, an early exit), it can
only ever *return a value*.

Covered where `isolation()` is all True (Linux as root, or where user namespaces are allowed): an answer sees no process
but its judge, no network, and no file but an empty folder in memory (it imports from MODULES only). It is an ordinary
user without capabilities, cannot fork, and CPU, time, memory and files are bounded. All that it leaves goes with it.
Not covered: holes in the kernel, time as a side channel, tests that are themselves malicious. Where isolation is False
(macOS, many containers) two processes, limits and kills remain, but an answer may open sockets, and where the trainer
is not root also read its user's files, the tests among them, and signal its processes: the trainer should say so.
"""

import ast
import builtins
import functools
import json
import os
import re
import signal
import sys
import time

# ---- Writing ---------------------------------------------------------------------------------------------------------

TLDR_MAX = ARXIV_MAX = {
    "total": 3.0, "structure": 0.5, "length": 1.0, "vocabulary": 0.5, "consistency": 0.6, "coherence": 0.4,
}  # fmt: skip

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

    Parts: structure (both have 8–256 tokens), length (ratio of characters), vocabulary (ratio of distinct words),
    consistency (overlap of the two word sets), coherence (kinds of connectives in the second answer).
    """
    infinite = float("inf")
    return _writing_reward(
        first, second, tokens=(8, 256), length=(1.1, 1.6, 3.2, 5.0), vocabulary=(1.3, 2.0, infinite, infinite),
        overlap=0.03, linked=second,
    )  # fmt: skip


def arxiv_reward(first: str, second: str) -> dict:
    """Reward of two halves of an introduction, at most 3 (the paper's arXiv); parts as in `tldr_reward`."""
    return _writing_reward(
        first, second, tokens=(128, 256), length=(0.8, 1.3, 1.6, 2.0), vocabulary=(0.5, 0.7, 1.3, 1.7),
        overlap=0.23, linked=first + "\n" + second,
    )  # fmt: skip


def _writing_reward(first, second, tokens, length, vocabulary, overlap, linked) -> dict:
    """The levels that both writing tasks share; `linked` is the text in which connectives are counted."""
    parts = {name: 0.0 for name in TLDR_MAX}
    words = [set(re.findall(r"\w+", text.lower())) for text in (first, second)]
    if all(tokens[0] <= len(text.split()) <= tokens[1] for text in (first, second)) and words[0]:
        parts["structure"] = 0.5
        longer = _trapezoid(len(second) / len(first), *length)
        richer = _trapezoid(len(words[1]) / len(words[0]), *vocabulary)
        if longer is not None:
            parts["length"] = longer
        if longer is not None and richer is not None:
            parts["vocabulary"] = 0.5 * richer
            content = [some - STOP_WORDS for some in words]
            jaccard = len(content[0] & content[1]) / max(1, len(content[0] | content[1]))
            parts["consistency"] = 0.6 * min(jaccard, overlap) / overlap
            parts["coherence"] = 0.4 * _transitions(linked)
    parts["total"] = sum(parts.values())
    return parts


def _trapezoid(x: float, zero_low: float, one_low: float, one_high: float, zero_high: float):
    """1 on the plateau, linear on the slopes, None outside (which ends the hierarchy; 0 on the edge does not)."""
    if not zero_low <= x <= zero_high:
        return None
    if x < one_low:
        return (x - zero_low) / (one_low - zero_low)
    if x > one_high:
        return (zero_high - x) / (zero_high - one_high)
    return 1.0


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
TEST_SECONDS = 2.0  # wall time of one test; also of loading the answer
JOB_SECONDS = 12  # wall time of all tests of one answer, and CPU time of each process; tests after that do not pass
GUESTS = 3  # a time-out or a crash costs a guest; with the last one the tests end
MEMORY = 768 << 20  # bytes of address space of each process
USE_NAMESPACES = True  # False forces reduced isolation, for tests
MODULES = """__future__ _strptime abc array base64 binascii bisect calendar cmath collections contextlib copy
    dataclasses datetime decimal enum fractions functools hashlib heapq itertools json math numbers operator queue
    random re statistics string struct textwrap time types typing unicodedata""".split()  # what an answer may import

CODE_LINE = re.compile(r"def +\w|class +\w+ *[:(]|import +\w|from +[\w.]+ +import |@\w|[A-Za-z_]\w* *=")
PROSE_LINE = re.compile(r"[A-Z]\w*[,:]? +[A-Za-z]|\*\*|[-*] |\d+[.)] |`")


def code_reward(aux: str | list[str], main: str, item: dict) -> dict:
    """Reward of helper(s) and an entry point that together should pass the tests of `item`, at most 4 (the paper's).

    `aux` is the answer that should define `aux`, or a list of answers for aux, aux2, aux3, …: structure and cooperation
    are then in proportion to the helpers defined and used. One agent that writes both functions in one answer:
    `code_reward([], text, item)`, or the same text twice. `item`: `prompt`, `entry_point`, and `test` as in HumanEval,
    `check(candidate)` with asserts, or bare asserts that call the entry point. An assert, or a loop of them, is a test;
    `assert True` is none. Arguments are copies: a test cannot see what a function did to them.

    Returns "total" and its parts structure, syntax, tests, cooperation (a helper's result thrown away costs 0.5 of it,
    even below 0); "passed", the fraction of the tests; "detail": helpers and entry (defined with a return?), error (of
    syntax, or None), errors (of each answer alone), uses (fraction of the helpers), wrapper, discards, and outcomes:
    [{"test", "outcome"}], an outcome being passed, failed, time-out, died, not run, or the text of an exception. No
    answer makes it raise; RuntimeError says that the sandbox itself does not start.
    """
    helpers, entry = [extract_code(text) for text in ([aux] if isinstance(aux, str) else aux)], extract_code(main)
    helpers = [] if all(text == entry for text in helpers) else helpers
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
            outcomes = [row["outcome"] for row in detail["outcomes"]]
            reward["syntax"] = 0.5
            reward["tests"] = reward["passed"] = outcomes.count("passed") / max(1, len(outcomes))
    if reward["passed"] > 0:
        reward["cooperation"] = detail["uses"] * (0.5 if detail["wrapper"] else 1.5) - 0.5 * detail["discards"]
    reward["total"] = sum(reward[part] for part in CODE_MAX)
    return {**reward, "detail": detail}


def judge_many(jobs: list[tuple]) -> list[dict]:
    """`code_reward` of each (aux, main, item), in order, on all the cores that this process may use."""
    from concurrent.futures import ThreadPoolExecutor

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        return list(pool.map(lambda job: code_reward(*job), jobs))


def isolation() -> dict[str, bool]:
    """Of which of "processes", "network" and "files" an answer sees a view of its own only; found by starting one."""
    return _sandbox({"prompt": "", "entry_point": "", "test": "", "names": [], "program": [""]})["isolation"]


def extract_code(text: str) -> str:
    """The code of an answer: its Markdown fences that define a function, else its lines without the prose around."""
    fences, plain, inside = [], [], False
    for line in text[:MAX_ANSWER].split("\n"):
        if line.lstrip().startswith("```"):
            inside = not inside
            fences += [[]] if inside else []
        else:
            (fences[-1] if inside else plain).append(line)
    fenced = ["\n".join(lines) for lines in fences if any(line.lstrip().startswith("def ") for line in lines)]
    if fenced:
        return "\n\n".join(fenced)
    start = next((i for i, line in enumerate(plain) if CODE_LINE.match(line)), len(plain))
    first = next((i for i in range(start, len(plain)) if plain[i].startswith("def ")), start)
    end = next((i for i in range(first, len(plain)) if PROSE_LINE.match(plain[i])), len(plain))
    return "\n".join(plain[start:end])


def _defines(name: str, code: str) -> bool:
    """Level 1 reads text, so that a syntax error costs only level 2: `def name(`, and `return` before the next def."""
    start = re.search(rf"^([ \t]*)def[ \t]+{re.escape(name)}[ \t]*\(", code, re.MULTILINE)
    for line in code[start.end() :].split("\n") if start else []:
        if re.match(r"[ \t]*(def|class)\b", line) and len(line) - len(line.lstrip()) <= len(start[1]):
            return False
        if re.search(r"\breturn\b", line):
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
    spaces = _unshare() if USE_NAMESPACES else []
    words = set(re.findall(r"\w+", " ".join([job["prompt"], *job["program"]])))
    modules = [name for name in MODULES if words & {name, name.lstrip("_")}]
    judge = f"r._judge({bool(spaces)}, {os.geteuid() == 0}, {modules})"
    start = f"import sys; sys.path[0] = {here!r}; import {file[:-3]} as r; del sys.path[0]; {judge}"
    folder = tempfile.mkdtemp(prefix="guest-")
    # -S: no site-packages. The environment is one line, which makes the order of a set the same in every run.
    process = subprocess.Popen(
        [*spaces, sys.executable, "-S", "-s", "-c", start], cwd=folder, env={"PYTHONHASHSEED": "0"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(json.dumps(job).encode(), timeout=JOB_SECONDS + 5)
    except subprocess.TimeoutExpired as late:  # a test that does not listen to its alarm, deep in C
        out, err = late.output or b"", b"the judge is stuck"
        for pid in json.loads(out.split(b"\n")[0] or b"{}").get("guests", []):  # before the judge, who keeps them ours
            os.kill(pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        subprocess.run(["rm", "-rf", folder])  # not rmtree, which a deep enough tree makes raise
    rows = [json.loads(line) for line in out.splitlines(keepends=True) if line.endswith(b"\n")]
    if not rows:
        raise RuntimeError("the sandbox did not start: " + err.decode(errors="replace")[-2000:])
    detail = {"error": "the parser gave up", "tests": []}
    for row in rows:
        detail.update(row)
    outcomes = [row["outcome"] for row in rows if "outcome" in row] + ["not run"] * len(detail["tests"])
    detail["outcomes"] = [
        {"test": test, "outcome": outcome} for test, outcome in zip(detail["tests"], outcomes, strict=False)
    ]
    return {key: value for key, value in detail.items() if key not in ("tests", "outcome", "guests")}


# ---- The judge: runs the data set's tests, never the answer ----------------------------------------------------------


class _Candidate:
    """What the tests call as the entry point: hands the call to the first of the guests that are left."""

    def __init__(self, guests: list, job: dict):
        self.guests, self.loaded = guests, False
        self.job = {key: value for key, value in job.items() if key != "test"}  # what a guest may know

    def __call__(self, *args, **kwargs):
        self.load()
        return self.ask("call", _encode([args, kwargs]))

    def load(self) -> None:
        self.loaded = self.loaded or self.ask("run", self.job)

    def ask(self, verb: str, what):
        """One line there, one line back, under the alarm of `timed`. Whatever comes back, it is only a value."""
        line, reply = self.guests[0][1], b""
        line.sendall(json.dumps([verb, what]).encode() + b"\n")
        while not reply.endswith(b"\n"):
            part = line.recv(1 << 16)
            reply += part
            if not part or len(reply) > MAX_VALUE:
                raise ConnectionError
        name, value = json.loads(reply)
        if name == "value":
            return _decode(value)
        error = getattr(builtins, str(name), None)
        # A test may expect an exception. But StopIteration would end a loop of asserts before its first.
        expected = isinstance(error, type) and issubclass(error, Exception) and not issubclass(error, StopIteration)
        raise (error if expected else RuntimeError)(str(value))

    def timed(self, action, *args) -> str:
        """The outcome of an action within the time of a test; a time-out or a death costs the guest."""
        if not self.guests:
            return "not run"
        signal.setitimer(signal.ITIMER_REAL, TEST_SECONDS)
        try:
            action(*args)
            return "passed"
        except AssertionError:
            return "failed"
        except (KeyboardInterrupt, ConnectionError) as error:  # the alarm rang, the guest is gone
            os.kill(self.guests.pop(0)[0], signal.SIGKILL)
            self.loaded = False
            return "time-out" if isinstance(error, KeyboardInterrupt) else "died"
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:200].encode(errors="replace").decode()  # no lone surrogates
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _judge(isolated: bool, root: bool, modules: list[str]) -> None:
    """What the bare Python runs: fork the guests, then read the job; report in lines of JSON."""
    os.environ.clear()
    _linux("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    for name in modules:  # a guest will find no file to import from
        __import__(name)
    _limit(AS=MEMORY, CPU=JOB_SECONDS, FSIZE=0, CORE=0)  # files of 0 bytes only
    if isolated:
        folder = os.getcwd()
        _linux("mount", b"none", folder.encode(), b"tmpfs", MS_NOSUID_NODEV_NOEXEC, b"size=4m,nr_inodes=1k")
        os.chdir(folder)  # into the mount; until now "." is what lies below it
    guests = [_start_guest(root) for _ in range(GUESTS)]
    _linux("prctl", PR_SET_DUMPABLE, 0)  # from here on no process of the same user may look into our memory
    report = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # tests may print
    pids = [pid for pid, _, _ in guests]

    def tell(**row):
        print(json.dumps(row), file=report, flush=True)

    view = {"processes": isolated, "network": isolated, "files": all(own_root for _, _, own_root in guests)}
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
    candidate, end = _Candidate(guests, job), time.monotonic() + JOB_SECONDS
    if candidate.timed(lambda: tell(**candidate.ask("look", candidate.job))) != "passed":
        return
    space = {job["entry_point"]: candidate, "candidate": candidate}
    steps = _steps(job, space)
    tell(tests=[ast.unparse(node)[:200] for node, is_test in steps if is_test])
    loading = candidate.timed(candidate.load)
    if loading == "passed":
        loading = candidate.timed(exec, _preamble(job), space)
    for node, is_test in steps:
        outcome = loading
        if loading == "passed":
            code = compile(ast.Module([node], []), "test", "exec")
            outcome = candidate.timed(exec, code, space) if time.monotonic() < end else "not run"
        if is_test:
            tell(outcome=outcome)


def _preamble(job: dict):
    """The imports and helper functions of the prompt, compiled; nothing if the prompt is not code."""
    for text in (job["prompt"], job["prompt"] + "\n    pass\n", ""):
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        tree.body = [node for node in tree.body if getattr(node, "name", None) != job["entry_point"]]
        return compile(tree, "prompt", "exec")


def _steps(job: dict, space: dict) -> list:
    """The statements of the test, each with whether it is a test; `space` learns what `check` calls the candidate."""
    statements, steps = [], []
    for node in ast.parse(job["test"]).body:
        if isinstance(node, ast.FunctionDef) and node.name == "check":
            space[node.args.args[0].arg] = space["candidate"]
            statements += node.body
        elif not ast.unparse(node).startswith("check("):
            statements.append(node)
    for node in statements:
        inside = [] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ast.walk(node)
        asserts = [each.test for each in inside if isinstance(each, ast.Assert)]
        if not asserts or not all(isinstance(test, ast.Constant) for test in asserts):
            steps.append((node, bool(asserts)))  # `assert True` would pass, and open what comes after, for any answer
    return steps


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
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
        except (AttributeError, ValueError, OSError):
            pass


def _start_guest(root: bool) -> tuple:
    """Fork a guest: (process number, socket to it, has it a root folder of its own), once it has locked itself in."""
    import socket

    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            _guest(theirs, _lock_in(theirs.fileno(), root))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(0)
    theirs.close()
    ready = ours.recv(1)
    if not ready:
        raise RuntimeError("a guest could not lock itself in")
    return pid, ours, ready == b"1"


def _lock_in(keep: int, root: bool) -> bool:
    """Give up files, rights, processes, and every descriptor but `keep`. Is the working folder now all there is?"""
    null = os.open(os.devnull, os.O_RDWR)
    sys.path.clear()  # the same modules for every answer, on every system
    if root:
        os.chown(".", NOBODY, NOBODY)
    try:
        os.chroot(".")
        own_root = True
    except PermissionError:
        own_root = False
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
    return own_root


def _guest(line, own_root: bool) -> None:
    """Serve: look (parse the answer, say what is seen), run (load it), call (its entry point)."""
    line.sendall(b"1" if own_root else b"0")
    space = {"__name__": "answer"}
    for request in line.makefile("rb"):
        verb, what = json.loads(request)
        try:
            value = True
            if verb == "look":
                value = _facts(what)
            elif verb == "run":
                entry_point = what["entry_point"]
                exec(_preamble(what), space)
                exec(compile("\n\n".join(what["program"]), "answer", "exec"), space)
            else:
                args, kwargs = _decode(what)
                value = space[entry_point](*args, **kwargs)
            reply = json.dumps(["value", _encode(value)])
        except BaseException as error:
            reply = json.dumps([type(error).__name__, str(error)[:200]])
        if len(reply) >= MAX_VALUE:
            reply = json.dumps(["ValueError", "the value is too large"])
        line.sendall(reply.encode() + b"\n")


def _facts(job: dict) -> dict:
    """What the syntax tree says of an answer: error, uses, wrapper, discards (see `code_reward`)."""
    whole, facts = "\n\n".join(job["program"]), {"uses": 0.0, "wrapper": False, "discards": False}
    facts["error"], *facts["errors"] = map(_syntax_error, [whole, *job["program"]])
    if facts["error"] is not None:
        return facts
    tree = ast.parse(whole)
    *helpers, _ = job["program"]
    begin = sum(text.count("\n") + 2 for text in helpers)  # lines of the program before the main answer
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.lineno > begin]
    entry = [node for node in functions if node.name == job["entry_point"]][-1:]
    nodes = [node for function in entry for node in ast.walk(function)]
    names = {(node.id, type(node.ctx)) for node in nodes if isinstance(node, ast.Name)}
    # A helper that the main answer writes again, or whose name means something else in it, is not the helper.
    taken = {node.name for node in functions if helpers} | {node.arg for node in nodes if isinstance(node, ast.arg)}
    known = set(job["names"]) - taken - {name for name, use in names if use is ast.Store}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    direct = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in known]
    handed = [place for call in calls for place in (call.func, *call.args, *(word.value for word in call.keywords))]
    used = known & {place.id for place in handed if isinstance(place, ast.Name)}  # called, or as in map(aux, values)
    for node in nodes:
        if isinstance(node, ast.Expr):
            facts["discards"] |= node.value in direct
        elif isinstance(node, ast.Assign) and node.value in direct:
            read = [not isinstance(target, ast.Name) or (target.id, ast.Load) in names for target in node.targets]
            facts["discards"] |= not any(read)
    body = [node for function in entry for node in function.body]
    body = [node for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    last = body[-1].value if body and isinstance(body[-1], ast.Return) else None
    assigned = len(body) == 2 and isinstance(body[0], ast.Assign) and body[0].value in direct
    same = assigned and last is not None and ast.unparse(body[0].targets) == ast.unparse(last)
    facts["wrapper"] = len(used) == 1 and (same or len(body) == 1 and last in direct)
    facts["uses"] = len(used) / len(job["names"])
    return facts


def _syntax_error(code: str):
    """Where and why it does not parse, or None."""
    try:
        ast.parse(code)
    except SyntaxError as error:
        return f"line {error.lineno}, column {error.offset}: {error.msg}"
    except (ValueError, MemoryError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"[:200]


# ---- Plain data between judge and guest ------------------------------------------------------------------------------


def _encode(value):
    """Plain data as JSON lists with a tag; a subclass is written as its base; TypeError for anything else."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return ["int", hex(value)]  # decimal would be slow, and refused, for thousands of digits
    if isinstance(value, (float, complex)):
        return ["complex", repr(complex(value))] if isinstance(value, complex) else ["float", repr(float(value))]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[_encode(key), _encode(each)] for key, each in value.items()]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [_encode(each) for each in value]]
    raise TypeError(f"{type(value).__name__} is not plain data")


def _decode(data):
    """What `_encode` was given, of exact built-in types whoever sent it; an Exception for what is no encoding."""
    if not isinstance(data, list):
        return data
    tag, body = data
    if tag == "dict":
        return {_decode(key): _decode(each) for key, each in body}
    if tag in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, tag)([_decode(each) for each in body])
    return int(body, 16) if tag == "int" else {"float": float, "complex": complex, "bytes": bytes.fromhex}[tag](body)
