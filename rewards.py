"""Rewards of the writing and coding tasks (PAPER, "Rewards"), and the sandbox in which model-written code is judged.

A reward is a dict: "total", and the parts that sum to it. Levels are hierarchical: a level that is not reached, and
all after it, are 0.0. `tldr_reward` and `arxiv_reward` only read text; `code_reward` also runs it.

Model-written code is hostile code: a policy under optimisation finds every hole that pays. Four processes stand
between an answer and its reward:

    trainer ──starts──> supervisor ──forks──> judge ──forks──> guests
    never parses or     a bare Python;        runs the data    run the answer; get
    runs an answer      isolates, kills       set's tests      calls, give plain data

The guests are forked before the judge reads the tests, so no expected value is ever in their memory, and they answer
with plain data, which the judge rebuilds from exact built-in types. Whatever an answer does inside its own process
(objects equal to everything, patched built-ins, forged replies, an early exit), it can only ever *return a value*.

Covered where `isolation()` is all True (Linux, as root or where user namespaces are allowed): the answer sees no
process but its own judge and siblings, no network, no file but the standard library and an empty folder; it is an
unprivileged user without capabilities; CPU, wall time, memory, files, sockets and processes are bounded; everything
it started is dead, and every file gone, when the verdict is in.
Not covered: holes in the kernel; how long a call takes as a side channel; a data set whose tests are malicious.
Without isolation (macOS, most containers) the two processes, the limits and the kills remain. But the answer then
reads any file that its user can read, the data set included, may open sockets, and where the trainer is not root may
signal or inspect the trainer's processes. `isolation()` tells which; let the trainer print it at start.
"""

import builtins
import functools
import json
import os
import re
import signal
import sys

# ----------------------------------------------------------------------------------------------------------------------
# Writing

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
    [
        "a",
        "about",
        "above",
        "after",
        "again",
        "against",
        "all",
        "also",
        "am",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "because",
        "been",
        "before",
        "being",
        "below",
        "between",
        "both",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "doing",
        "down",
        "during",
        "each",
        "few",
        "for",
        "from",
        "further",
        "had",
        "has",
        "have",
        "having",
        "he",
        "her",
        "here",
        "hers",
        "him",
        "his",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "itself",
        "just",
        "may",
        "me",
        "might",
        "more",
        "most",
        "must",
        "my",
        "no",
        "nor",
        "not",
        "now",
        "of",
        "off",
        "on",
        "once",
        "only",
        "or",
        "other",
        "our",
        "ours",
        "out",
        "over",
        "own",
        "same",
        "shall",
        "she",
        "should",
        "so",
        "some",
        "such",
        "than",
        "that",
        "the",
        "their",
        "theirs",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "through",
        "to",
        "too",
        "under",
        "until",
        "up",
        "upon",
        "us",
        "very",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "whom",
        "whose",
        "why",
        "will",
        "with",
        "would",
        "you",
        "your",
        "yours",
    ]
)


def tldr_reward(first: str, second: str) -> dict:
    """Reward of a brief summary (`first`) and a detailed one (`second`), at most 3 (PAPER, "TLDR").

    Parts: structure (both have 8–256 tokens), length (ratio of characters), vocabulary (ratio of distinct words),
    consistency (overlap of the two word sets), coherence (kinds of connectives in the second answer).
    """
    infinite = float("inf")
    return _writing_reward(
        first, second, tokens=(8, 256), length=(1.1, 1.6, 3.2, 5.0), vocabulary=(1.3, 2.0, infinite, infinite),
        overlap=0.03, linked=second,
    )  # fmt: skip


def arxiv_reward(first: str, second: str) -> dict:
    """Reward of two halves of an introduction, at most 3 (PAPER, "arXiv"); parts as in `tldr_reward`."""
    return _writing_reward(
        first, second, tokens=(128, 256), length=(0.8, 1.3, 1.6, 2.0), vocabulary=(0.5, 0.7, 1.3, 1.7),
        overlap=0.23, linked=first + "\n" + second,
    )  # fmt: skip


def _writing_reward(first, second, tokens, length, vocabulary, overlap, linked) -> dict:
    """The levels that both writing tasks share; `linked` is the text in which connectives are counted."""
    parts = dict.fromkeys(TLDR_MAX, 0.0)
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


@functools.cache
def _connective_patterns() -> list:
    """One pattern per category. Whole words only: the reference finds "so" in "some", and nearly any text scores."""
    patterns = []
    for phrases in CONNECTIVES.values():
        alternatives = [re.escape(phrase).replace(r"\ ", r"\s+") for phrase in phrases.split(", ")]
        patterns.append(re.compile(r"\b(?:" + "|".join(alternatives) + r")\b"))
    return patterns


def _transitions(text: str) -> float:
    """Share of the transition score that the categories of connectives in `text` earn (0.95 with all twelve)."""
    categories = sum(pattern.search(text.lower()) is not None for pattern in _connective_patterns())
    return min(1.0, 0.4 + 0.05 * (categories - 1)) if categories else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Code

CODE_MAX = {"total": 4.0, "structure": 1.0, "syntax": 0.5, "tests": 1.0, "cooperation": 1.5}

MAX_ANSWER = 50_000  # characters of an answer that are looked at
TEST_SECONDS = 2.0  # wall time of one test; also of loading the answer
JOB_SECONDS = 12.0  # wall time of one verdict: tests not reached by then count as not passed
GUESTS = 3  # guests of one verdict: a time-out or a crash costs one, with the last one the tests end
MAX_REPLY = 256_000  # characters of one returned value as it crosses to the judge
MEMORY = 768 << 20  # bytes of address space of each process
USE_NAMESPACES = True  # False forces reduced isolation (for tests)

CODE_LINE = re.compile(r"(async +)?def +\w|class +\w+ *[:(]|import +\w|from +[\w.]+ +import |@\w|[A-Za-z_]\w* *=")
PROSE_LINE = re.compile(r"[A-Z]\w*[,:]? +[A-Za-z]|\*\*|[-*] |\d+[.)] |`")


def code_reward(aux, main: str, item: dict) -> dict:
    """Reward of helper(s) and an entry point that together should pass the tests of `item`, at most 4 (PAPER, "Code").

    `aux`: the answer that should define `aux`, or a list of answers for aux, aux2, aux3, … Structure and cooperation are
    then in proportion to the helpers defined and used. One agent that writes both functions: `code_reward([], text,
    item)`, or the same text twice. `item`: `prompt`, `entry_point` and `test` as in HumanEval: `check(candidate)` with
    asserts, or bare asserts that call the entry point. Each assert that tests something, or loop of asserts, is a test.

    Returns "total", its parts structure, syntax, tests and cooperation (which the penalty for a result thrown away can
    make −0.5 lower), "passed" (fraction of the tests), and "detail": helpers, entry (defined with a return?), error (of
    syntax, or None), uses (fraction of the helpers), wrapper, discards, and outcomes, a list of {"test", "outcome"}
    where outcome is passed, failed, time-out, died, not run, or the text of an exception. Never raises because of what
    an answer says; RuntimeError if the sandbox itself does not start.
    """
    texts = [extract_code(text) for text in ([aux] if isinstance(aux, str) else aux)]
    entry_text = extract_code(main)
    single = all(text == entry_text for text in texts)
    if single:
        texts = texts or [entry_text]
    names = ["aux"] + [f"aux{i}" for i in range(2, len(texts) + 1)]
    helpers = [_defines(name, text) for name, text in zip(names, texts)]
    detail = {"helpers": helpers, "entry": _defines(item["entry_point"], entry_text), "outcomes": [], "uses": 0.0}
    reward = dict.fromkeys([*CODE_MAX, "passed"], 0.0)
    reward["structure"] = 0.4 * sum(helpers) / len(helpers) + 0.6 * detail["entry"]
    if detail["entry"]:
        fields = {name: item[name] for name in ("prompt", "entry_point", "test")}
        job = {**fields, "names": names, "helpers": [] if single else texts, "main": entry_text}
        detail.update(_verdict(job)[1])
        _score_levels(reward, detail)
    reward["total"] = sum(reward[part] for part in CODE_MAX)
    return {**reward, "detail": detail}


def _score_levels(reward: dict, detail: dict) -> None:
    """Levels 2 and 3, from the judge's verdict: syntax opens the tests, one passed test opens cooperation."""
    if detail["error"] is not None:
        return
    reward["syntax"] = 0.5
    outcomes = [row["outcome"] for row in detail["outcomes"]]
    reward["tests"] = reward["passed"] = outcomes.count("passed") / max(1, len(outcomes))
    if reward["passed"] > 0:
        reward["cooperation"] = detail["uses"] * (0.5 if detail["wrapper"] else 1.5) - 0.5 * detail["discards"]


def judge_many(jobs: list) -> list[dict]:
    """`code_reward` of every (aux, main, item) of `jobs`, in order, on all cores that this process may use."""
    from concurrent.futures import ThreadPoolExecutor

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        return list(pool.map(lambda job: code_reward(*job), jobs))


def isolation() -> dict[str, bool]:
    """What this machine gives the sandbox, by starting one: processes, network, files (own view), user (other than ours).

    True everywhere: see "covered" above. Anything False: print it, and do not train on code you would not run yourself.
    """
    return _verdict({"prompt": "", "entry_point": "f", "test": "", "names": [], "helpers": [], "main": ""})[0]


def extract_code(text: str) -> str:
    """The code of an answer: its Markdown fences that define a function, else its lines without the prose around."""
    blocks, block, prose = [], None, []
    for line in text[:MAX_ANSWER].splitlines():
        if line.lstrip().startswith("```"):
            block = [] if block is None else None
            if block is not None:
                blocks.append(block)
        else:
            (prose if block is None else block).append(line)
    fenced = ["\n".join(block) for block in blocks if any(line.lstrip().startswith("def ") for line in block)]
    if fenced:
        return "\n\n".join(fenced)
    start = next((i for i, line in enumerate(prose) if CODE_LINE.match(line)), len(prose))
    end = next((i for i in range(start, len(prose)) if PROSE_LINE.match(prose[i])), len(prose))
    return "\n".join(prose[start:end])


def _defines(name: str, code: str) -> bool:
    """Level 1 reads text, so that a syntax error costs level 2 only: `def name(`, and `return` before the next def."""
    start = re.search(rf"^([ \t]*)def[ \t]+{re.escape(name)}[ \t]*\(", code, re.MULTILINE)
    if start is None:
        return False
    depth, body = len(start[1]), code[start.end() :]
    for line in body.splitlines():
        if re.match(r"[ \t]*(def|class)\b", line) and len(line) - len(line.lstrip()) <= depth:
            return False
        if re.search(r"\breturn\b", line):
            return True
    return False


# ----------------------------------------------------------------------------------------------------------------------
# The trainer's end of the sandbox


def _verdict(job: dict) -> tuple[dict, dict]:
    """Start a sandbox, give it one job, read the report: (isolation, detail). Tests without a report are "not run"."""
    import subprocess  # here and not above: the sandbox imports this file, and these would double its start
    import tempfile

    here = os.path.dirname(os.path.abspath(__file__))
    module = os.path.splitext(os.path.basename(__file__))[0]
    start = f"import sys; sys.path[0] = {here!r}; import {module} as r; del sys.path[0]; r._supervise({USE_NAMESPACES})"
    # -S: no site-packages. The environment holds one line, so that the order of a set is the same in every run.
    command = [sys.executable, "-S", "-s", "-c", start]
    folder = tempfile.TemporaryDirectory(prefix="guest-", ignore_cleanup_errors=True)
    with folder as cwd, subprocess.Popen(
        command, cwd=cwd, env={"PYTHONHASHSEED": "0"}, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(json.dumps(job).encode(), timeout=JOB_SECONDS + 10)
        finally:
            process.kill()
    report = [json.loads(line) for line in out.splitlines(keepends=True) if line.endswith(b"\n")]
    if not report:
        raise RuntimeError("the sandbox did not start: " + err.decode(errors="replace")[-2000:])
    detail = {"error": "the parser gave up", "uses": 0.0, "wrapper": False, "discards": False}
    tests, outcomes = [], []
    for row in report[1:]:
        detail.update(row.get("facts", {}))
        tests += row.get("tests", [])
        outcomes += row.get("outcome", [])
    outcomes += ["not run"] * (len(tests) - len(outcomes))
    detail["outcomes"] = [{"test": test, "outcome": outcome} for test, outcome in zip(tests, outcomes)]
    return report[0], detail


# ----------------------------------------------------------------------------------------------------------------------
# The supervisor: isolates, forks the judge, ends everything at the deadline

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 4, 38, 36
NEW_PROCESSES, NEW_USER, NEW_OTHERS = 0x20000000, 0x10000000, 0x20000 | 0x4000000 | 0x8000000 | 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_PRIVATE_ALL = 1, 2, 4, 8, 32, 4096, 0x44000
NOBODY = 65534


def _libc(name: str, *args) -> None:
    """Call a function of the C library that Python 3.10 lacks; OSError if it refuses or is not there."""
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None or function(*args) != 0:
        raise OSError(ctypes.get_errno(), name)


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere it does nothing."""
    if sys.platform == "linux":
        _libc("prctl", option, value, 0, 0, 0)


def _limit(**limits) -> None:
    """Set resource limits, e.g. CPU=10; a system that does not know one goes without."""
    import resource

    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
        except (AttributeError, ValueError, OSError):
            pass


def _supervise(namespaces: bool) -> None:
    """Main function of the bare Python that `_verdict` starts. Dies with its parent; never reads the job."""
    os.environ.clear()
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # a killed guest stays a zombie of ours: its number cannot go to a stranger
    _limit(AS=MEMORY, CPU=int(JOB_SECONDS), FSIZE=1 << 20, CORE=0)
    isolated = namespaces and _unshare()
    read_end, write_end = os.pipe()
    judge = os.fork()
    if judge == 0:
        os.close(read_end)
        try:
            _judge(write_end, isolated)
        finally:
            os._exit(0)
    os.close(write_end)
    import select

    guests = os.read(read_end, 1000).split()
    select.select([read_end], [], [], JOB_SECONDS)  # readable when the judge has ended and so closed its end
    # With a process namespace the judge is its process 1, and all in it die with the judge, whatever they forked.
    for pid in [judge] if isolated else [*map(int, guests), judge]:
        _kill(pid)
    os.waitpid(judge, 0)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _unshare() -> bool:
    """Give the children a process, mount, network and IPC space of their own. False where the system refuses."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        _libc("unshare", NEW_PROCESSES | NEW_OTHERS | (NEW_USER if uid else 0))
        if uid:  # an ordinary user has the right to do this inside a user namespace only; map just ourselves into it
            for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open("/proc/self/" + name, "w") as file:
                    file.write(line)
        return True
    except OSError:
        return False


def _build_root(folder: str) -> bool:
    """Mount a root for the guests at `folder`: a small memory disk with the standard library and an empty /tmp."""
    sealed = MS_NOSUID | MS_NODEV
    library = [path for path in sys.path if os.path.isdir(path)]
    try:
        _libc("mount", None, b"/", None, MS_PRIVATE_ALL, None)
        _libc("mount", b"none", folder.encode(), b"tmpfs", sealed | MS_NOEXEC, b"size=16m,nr_inodes=2k,mode=755")
        for path in library:
            target = folder + path
            if os.path.isdir(target):
                continue  # lib-dynload lies inside the library
            os.makedirs(target)
            _libc("mount", path.encode(), target.encode(), None, MS_BIND, None)
            held = os.statvfs(path).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)  # a user namespace may not drop these
            _libc("mount", None, target.encode(), None, MS_REMOUNT | MS_BIND | MS_RDONLY | sealed | held, None)
            for hidden in ("site-packages", "dist-packages"):  # data sets come as packages
                if os.path.isdir(f"{target}/{hidden}"):
                    _libc("mount", b"none", f"{target}/{hidden}".encode(), b"tmpfs", MS_RDONLY, None)
        os.mkdir(folder + "/tmp")
        os.chmod(folder + "/tmp", 0o777)
        return True
    except OSError:
        return False


# ----------------------------------------------------------------------------------------------------------------------
# The judge: runs the data set's tests, never the answer


class _TimeUp(BaseException):
    """The time of one test is over. No Exception, so that a test's own `except` does not swallow it."""


class _GuestDied(Exception):
    """The guest ended, or sent more than it may."""


class _Guest:
    """The judge's end of one guest: a process number and a socket that carries one JSON line each way per request."""

    def __init__(self, isolated: bool, root: bool):
        import socket

        self.line, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _guest(theirs, root)
            finally:
                os._exit(0)
        theirs.close()

    def ask(self, request: dict):
        """Send a request, wait for the reply; the judge's alarm bounds the wait."""
        reply = b""
        try:
            self.line.sendall(json.dumps(request).encode() + b"\n")
            while not reply.endswith(b"\n"):
                chunk = self.line.recv(1 << 16)
                if not chunk or len(reply) > MAX_REPLY:
                    raise _GuestDied
                reply += chunk
        except OSError:
            raise _GuestDied from None
        return json.loads(reply)


class _Candidate:
    """What a test calls as the entry point: passes the call to the first living guest."""

    def __init__(self, guests: list, job: dict):
        self.guests, self.program, self.loaded = guests, {**job, "test": None}, None

    def load(self) -> None:
        if self.loaded is not self.guests[0]:
            self.loaded = self.guests[0]
            self._value({"run": self.program})

    def __call__(self, *args, **kwargs):
        self.load()
        return self._value({"call": _encode([args, kwargs])})

    def _value(self, request: dict):
        """The value of the reply, or the exception it names if that is one of Python's own."""
        kind, payload = self.guests[0].ask(request)
        if kind == "value":
            return _decode(payload)
        error = getattr(builtins, kind, None) if isinstance(kind, str) else None
        known = isinstance(error, type) and issubclass(error, Exception) and error is not AssertionError
        raise (error if known else RuntimeError)(str(payload))

    def drop(self) -> bool:
        """Give up the current guest; is another left?"""
        _kill(self.guests.pop(0).pid)
        return bool(self.guests)
