"""The sandbox in which model-written code is judged, behind one call: `run_sandbox`.

Model-written code is hostile: a policy under optimisation finds every hole that pays. So there are three processes:

    trainer  -- starts -->  judge  -- forks, before it reads the tests -->  guests (guest.py)
    reads text only         runs the tests, never an answer                 run the answer: calls in, plain data out

A guest never holds an expected value, and the judge rebuilds what it is sent from exact built-in types. Whatever an
answer does in its own process (objects equal to everything, patched built-ins, forged replies, an early exit), it can
only ever *return a value*.

Covered where `isolation()` is all True (Linux as root, or where user namespaces are allowed): an answer sees no process
but its judge, no network, and no file but an empty folder in memory. It imports from MODULES, and what the judge has
loaded anyway, such as os and socket. It is an ordinary user without capabilities and cannot fork. CPU, time, memory and
files are bounded. Everything it leaves is deleted.
Not covered: holes in the kernel, its keyrings, a virtual machine's sockets to its host, time as a side channel, tests
that are themselves malicious. Elsewhere (macOS, many containers) processes, limits and kills remain, but an answer may
open sockets, fill System V memory and signal other answers; and where the trainer is not root, it may also read its
user's files, the tests among them, and signal its processes. A run says so at its start.
"""

import ast
import builtins
import contextlib
import functools
import json
import os
import re
import signal
import sys
import time

from . import guest

TEST_SECONDS = 2.0  # CPU time of one test; also of parsing, and of loading, the answer
WAIT_SECONDS = 4.0  # wall time of the same: for answers that sleep, and far enough for a machine that is busy
CPU_SECONDS = 15  # of each process
JOB_SECONDS = 30  # wall time of the judge; tests after that do not pass
GUESTS = 3  # a time-out or a crash costs a guest; with the last one the tests end
MEMORY = 768 << 20  # bytes of address space of each process
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MODULES = """__future__ _strptime abc array base64 binascii bisect calendar cmath collections contextlib copy csv
    dataclasses datetime decimal difflib enum fractions functools graphlib hashlib heapq html itertools json math
    numbers operator pprint queue random re secrets statistics string struct textwrap time types typing unicodedata
    warnings weakref zlib""".split()  # what an answer may import


def isolation() -> dict[str, bool]:
    """Which of "processes", "network" and "files" are isolated here. Starts a sandbox; RuntimeError if it fails."""
    return run_sandbox({"prompt": "", "entry_point": "", "test": "", "names": [], "program": [""]})["isolation"]


@functools.cache
def _unshare() -> list[str]:
    """The command that gives a program process, mount, network and IPC spaces of its own; [] if not permitted."""
    import subprocess

    command = "unshare --pid --fork --kill-child --mount --net --ipc --uts".split()
    command += ["--user", "--map-root-user"] if os.geteuid() else []  # without root, this needs a user space, too
    try:
        return command if subprocess.run([*command, "true"], env={}, stderr=subprocess.DEVNULL).returncode == 0 else []
    except OSError:
        return []


def run_sandbox(job: dict) -> dict:
    """Judge one job -> "detail" as in `rewards.code_reward`, and "isolation".

    job: prompt, entry_point and test of a problem; program, the answers in order; names, of the helpers among them.
    Raises RuntimeError if the sandbox itself does not start, whatever the answers are.
    """
    import importlib.util  # here, because the judge imports this file, too, and should start fast
    import subprocess
    import tempfile

    spaces = _unshare()
    words = set(re.findall(r"\w+", " ".join([job["prompt"], *job["program"]])))
    modules = [name for name in MODULES if words & {name, name.lstrip("_")}]
    numpy = importlib.util.find_spec("numpy") if "numpy" in job["test"] else None
    job = {**job, "site": os.path.dirname(os.path.dirname(numpy.origin)) if numpy else ""}  # for the judge
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    call = f"judge.main({bool(spaces)}, {os.geteuid() == 0}, {modules})"
    start = f"import sys; sys.path[0] = {root!r}; from sandbox import judge; del sys.path[0]; {call}"
    # -S: no site-packages. The environment is one line, which makes the order of a set the same in every run.
    command = [*spaces, sys.executable, "-S", "-s", "-c", start]
    folder = tempfile.mkdtemp(prefix="guest-")
    options = {"cwd": folder, "env": {"PYTHONHASHSEED": "0"}, "start_new_session": True}
    options |= dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    judge = subprocess.Popen(command, **options)
    try:
        out, err = judge.communicate(json.dumps(job).encode(), timeout=JOB_SECONDS)
    except subprocess.TimeoutExpired:  # many slow tests, or one that is stuck in C, where no alarm is heard
        judge.kill()
        out, err = judge.communicate()  # until the judge, which is a child of `unshare`, is dead, too
    finally:
        judge.kill()
        # Not rmtree, which a deep enough tree makes raise. Where no mount hides the folder, an answer may lock it.
        wipe = 'rm -rf "$0" || { chmod -R u+rwX "$0"; rm -rf "$0"; }'
        subprocess.run(["sh", "-c", wipe, folder], stderr=subprocess.DEVNULL)
    # A judge that was killed may leave half a line.
    rows = [json.loads(line) for line in out.splitlines(keepends=True) if line.endswith(b"\n")]
    if not rows:
        raise RuntimeError("the sandbox did not start: " + err.decode(errors="replace")[-2000:])
    guests = rows[0].pop("guests")
    if judge.returncode:  # it did not live to end its guests
        for pid in guests:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    detail = {"error": "the parser gave up", "outcomes": []}
    told = []
    for row in rows:
        if "outcome" in row:
            told.append(row["outcome"])
        else:
            detail |= row
    # Tests that the judge did not reach stay "not run".
    for test, outcome in zip(detail["outcomes"], told, strict=False):
        test["outcome"] = outcome
    return detail


class Candidate:
    """What the tests call as the entry point: hands the call to the first of the guests that are left."""

    def __init__(self, guests: list):
        self.guests = guests
        self.called = False  # whether this test has called the answer
        self.lost = ""  # how the guest of this test was lost
        self.armed = False  # whether the alarm may end a test
        self.owing = False  # whether a guest has not replied yet
        self.start_clock(0.0)

    def __call__(self, *args, **kwargs):
        self.called = True
        return self.ask(guest.encode((args, kwargs)))

    def ask(self, what):
        """Send one line, read one line, under the alarm of `timed`. Returns the value or raises the exception in it."""
        if self.lost or not self.guests:
            raise ConnectionError
        line = self.guests[0].line
        reply = b""
        self.owing = True
        try:
            line.sendall(json.dumps(what).encode() + b"\n")
            while not reply.endswith(b"\n"):
                part = line.recv(1 << 16)
                reply += part
                if not part or len(reply) > guest.MAX_VALUE:
                    raise ConnectionError
            self.owing = False
            # An answer may have forged the reply. Whatever it says can only become a value or an exception.
            name, value = json.loads(reply)
            value = guest.decode(value) if name == "value" else expected_exception(name, str(value))
        except (OSError, KeyboardInterrupt) as error:  # the second: the alarm rang
            self.lose("died" if isinstance(error, OSError) else "time-out")
            raise
        if name != "value":
            raise value
        return value

    def lose(self, how: str) -> None:
        """End the guest. This decides the outcome: a test that catches the exception does not pass all the same."""
        self.lost = how
        self.owing = False
        os.kill(self.guests.pop(0).pid, signal.SIGKILL)

    def cpu_seconds(self) -> float:
        """CPU time of the judge and of the guest that is asked. So a busy machine costs an answer little."""
        clock = (~self.guests[0].pid << 3) | 2 if self.guests else None  # Linux's number for the clock of a process
        with contextlib.suppress(OSError, AttributeError):
            return time.process_time() + (time.clock_gettime(clock) if clock else 0.0)
        return time.monotonic()

    def start_clock(self, cpu: float) -> None:
        """A test begins now, at so many seconds of CPU time."""
        self.began_cpu = cpu
        self.began = time.monotonic()
        self.quiet = 0.0  # until when the alarm is silent

    def alarm(self, *_) -> None:
        """Called ten times a second. Ends a test when its time is over, and every second again if it goes on."""
        now = time.monotonic()
        late = now - self.began > WAIT_SECONDS or self.cpu_seconds() - self.began_cpu > TEST_SECONDS
        if self.armed and late and now > self.quiet:
            self.quiet = now + 1
            raise KeyboardInterrupt  # which `except Exception` misses

    def timed(self, action, *args) -> str:
        """The outcome of an action within the time of a test; a time-out or a death costs the guest."""
        self.called = False
        self.lost = ""
        outcome = "passed"
        if not self.guests:
            return "not run"
        self.start_clock(self.cpu_seconds())
        try:
            self.armed = True
            try:
                action(*args)
            finally:
                self.armed = False
        except AssertionError:
            outcome = "failed"
        except KeyboardInterrupt:
            outcome = "time-out"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"[:200]
        if self.owing:  # its late reply would be taken for that of the next test
            self.lose("time-out")
        return self.lost or outcome


def expected_exception(names: list, text: str) -> Exception:
    """What a test may expect: the first built-in among the classes of the guest's exception, most specific first."""
    for name in names:
        error = getattr(builtins, str(name), None)
        if error is StopIteration:  # it would end a loop of asserts before its first
            break
        if isinstance(error, type) and issubclass(error, Exception):
            with contextlib.suppress(TypeError):  # some, of Unicode, want more than a text
                return error(text)
    return RuntimeError(text)


def main(isolated: bool, root: bool, modules: list[str]) -> None:
    """What the bare Python runs: fork the guests, then read the job; report in lines of JSON."""
    os.environ.clear()
    sys.set_int_max_str_digits(50_000)  # numbers cross in decimal; more digits would be slow, deep in C
    guest.linux("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
    # Guests cannot read files. Names that are not ASCII need unicodedata, long numbers need _pylong.
    always = ["unicodedata"] if sys.version_info < (3, 12) else ["unicodedata", "_pylong"]
    for name in always + modules:
        __import__(name)
    if isolated:
        folder = os.getcwd()
        nosuid_nodev_noexec = 2 | 4 | 8
        guest.linux("mount", b"none", folder.encode(), b"tmpfs", nosuid_nodev_noexec, b"size=4m,nr_inodes=1k")
        os.chdir(folder)  # into the mount; until now "." is what lies below it
        for kind in ("shmmni", "msgmni"):  # System V's memory belongs to no process, so MEMORY would not bound it
            with contextlib.suppress(OSError), open("/proc/sys/kernel/" + kind, "w") as file:
                file.write("0")
    guest.limit(AS=MEMORY, CPU=CPU_SECONDS, FSIZE=0, CORE=0)  # files of 0 bytes only
    guests = [guest.start(root) for _ in range(GUESTS)]
    guest.linux("prctl", 4, 0)  # PR_SET_DUMPABLE: from here on no process of the same user may look into our memory
    # A lone surrogate in the text of an exception would break tokenizers and logs.
    report = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # tests may print
    pids = [each.pid for each in guests]

    def tell(**row):
        print(json.dumps(row, ensure_ascii=False), file=report, flush=True)

    seen = {"processes": isolated, "network": isolated, "files": guests[0].alone}
    tell(isolation=seen, guests=[] if isolated else pids)
    try:
        run_tests(json.load(sys.stdin), guests, tell)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def run_tests(job: dict, guests: list, tell) -> None:
    """Report what the syntax trees say, then the tests, then one outcome for each."""
    test = job.pop("test")
    site = job.pop("site")
    for each in guests:
        each.line.sendall(json.dumps(job).encode() + b"\n")
    if site:  # the guests, which are forked by now, will not see it
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        sys.path.append(site)
    candidate = Candidate(guests)
    ran = []  # the asserts of a test that were reached
    signal.signal(signal.SIGALRM, candidate.alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)

    def report_look():
        tell(**candidate.ask("look"))

    if candidate.timed(report_look) != "passed":
        return  # the parser hung or crashed
    space = {job["entry_point"]: candidate, "candidate": candidate, "_ran": ran}
    steps = test_steps(test, space)
    tell(outcomes=[{"test": source, "outcome": "not run"} for _, source in steps if source])

    def run(tree):
        ran.clear()
        exec(compile(tree, "test", "exec"), space)

    # Tests may use imports and helpers of the prompt. Where these fail, so do the tests that need them.
    candidate.timed(exec, guest.preamble(job), space)
    loading = candidate.timed(candidate.ask, "load")
    failed = ""  # the outcome of the first call of the answer that went wrong since the last test
    for tree, source in steps:
        outcome = candidate.timed(run, tree) if loading == "passed" else loading
        if outcome != "passed" and candidate.called:
            # Also between two tests: else `r = candidate(2)` might fail, and the next test would see an older r.
            failed = failed or outcome
        if source:
            tell(outcome=failed or outcome)
            failed = ""


def list_tests(test: str) -> list[str]:
    """The sources of the statements that `code_reward` counts as tests. Raises SyntaxError for what is not Python."""
    return [source for _, source in test_steps(test, {"candidate": None}) if source]


def test_steps(test: str, space: dict) -> list[tuple]:
    """The statements of a test, each with its source if it counts as a test, else "".

    `space` gets the name by which `check` calls the candidate. Each assert that runs appends to the `_ran` in it, which
    must not be empty after a test.
    """
    statements = []
    for node in ast.parse(test).body:
        if isinstance(node, ast.FunctionDef) and node.name == "check":
            space[(node.args.posonlyargs + node.args.args)[0].arg] = space["candidate"]
            statements += node.body
        elif not ast.unparse(node).startswith("check("):
            statements.append(node)
    sources = [ast.unparse(node)[:200] for node in statements]  # before the asserts are changed
    functions = {}  # of the test's own
    for node in ast.walk(ast.Module(statements, [])):
        if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant):
            # `assert x` becomes `assert _ran.append(1) or x`, because append returns None.
            node.test = ast.BoolOp(ast.Or(), [ast.parse("_ran.append(1)", mode="eval").body, node.test])
        if isinstance(node, FUNCTIONS) and node in statements:
            functions[node.name] = node
    steps = []
    for node, source in zip(statements, sources, strict=True):
        # Any answer passes `assert True`, and a loop over nothing. Neither may earn the next level. But `assert False`,
        # where an exception should come first, must not be reached.
        asserts = asserts_run_by(node, functions)
        real = [each for each in asserts if not (isinstance(each.test, ast.Constant) and each.test.value)]
        must_run = any(not isinstance(each.test, ast.Constant) for each in real)
        tree = ast.Module([node, *ast.parse("assert _ran").body] if must_run else [node], [])
        steps.append((ast.fix_missing_locations(tree), source if real else ""))
    return steps


def asserts_run_by(statement, functions: dict) -> list:
    """The asserts in a statement, and in the test's own functions that it calls, directly or through others."""
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        return []  # they run where it is called
    nodes = list(ast.walk(statement))
    reached = set()
    for node in nodes:  # which grows by the functions that are found
        if isinstance(node, ast.Name) and node.id in set(functions) - reached:
            reached.add(node.id)
            nodes += ast.walk(functions[node.id])
    return [node for node in nodes if isinstance(node, ast.Assert)]
