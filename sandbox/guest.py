"""The guest: the only process that parses and runs an answer."""

import ast
import contextlib
import ctypes
import json
import os
import socket
import sys
from collections import namedtuple

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, NOBODY = 1, 4, 38, 65534
MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
MAX_VALUE = 256_000  # characters of a returned value on its way
CONTAINERS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict, bytes)}
Guest = namedtuple("Guest", "pid line alone")  # process number, socket to it, True if it sees nothing but its folder


def linux(name: str, *args) -> None:
    """Call the C library for what Python does not offer; OSError if it refuses. Does nothing on other systems."""
    if sys.platform == "linux":
        if getattr(ctypes.CDLL(None, use_errno=True), name)(*args, *[0] * (5 - len(args))) != 0:
            raise OSError(ctypes.get_errno(), name)


def limit(**limits: int) -> None:
    """Set resource limits of this process and its children; a system that does not know one goes without."""
    import resource

    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


def start(root: bool) -> Guest:
    """Fork a guest and wait until it has locked itself in."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            lock_in(theirs.fileno(), root)
            serve(theirs)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(0)
    theirs.close()
    ready = ours.recv(1)
    if not ready:
        raise RuntimeError("a guest could not lock itself in")
    return Guest(pid, ours, ready == b"1")


def lock_in(keep: int, root: bool) -> None:
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
    linux("prctl", PR_SET_NO_NEW_PRIVS, 1)
    linux("capset", b"\x22\x05\x08\x20" + bytes(4), bytes(24))  # version 3 of the call; no capability is left
    limit(NPROC=1, NOFILE=32)  # this is the one process: no fork, no thread
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(3, keep)
    os.closerange(keep + 1, 256)


def serve(line) -> None:
    """Read the job, then serve: "look" (parse the answer, say what is seen), "load", or the arguments of a call."""
    line.sendall(b"1" if os.path.samefile("/", ".") else b"0")
    requests = line.makefile("rb")
    loaded = False
    job = json.loads(requests.readline())
    for request in map(json.loads, requests):
        try:
            if request == "look":
                value = look(job)
            elif not loaded:
                module = sys.modules["answer"] = type(sys)("answer")  # dataclasses look there
                space = module.__dict__
                for code in (preamble(job), *job["program"]):
                    exec(code, space)
                value = loaded = True
            if request not in ("look", "load"):
                args, kwargs = decode(request)
                value = space[job["entry_point"]](*args, **kwargs)
            reply = json.dumps(["value", encode(value)])
            if len(reply) >= MAX_VALUE:
                raise ValueError("the value is too large")
        except BaseException as error:
            reply = json.dumps([[kind.__name__ for kind in type(error).__mro__], str(error)[:200]])
        line.sendall(reply.encode() + b"\n")


def preamble(job: dict):
    """The imports and helper functions of the prompt, compiled; nothing if the prompt is not code."""
    for text in (job["prompt"], job["prompt"] + "\n    pass\n", ""):
        with contextlib.suppress(SyntaxError):
            tree = ast.parse(text)
            entry = [node for node in tree.body if getattr(node, "name", None) == job["entry_point"]]
            inside = [node for each in entry for node in ast.walk(each)]  # imports in the function count as given
            imports = [ast.unparse(node) for node in inside if isinstance(node, (ast.Import, ast.ImportFrom))]
            tries = "".join(f"try:\n    {line}\nexcept ImportError:\n    pass\n" for line in imports)
            tree.body = [node for node in tree.body if node not in entry] + ast.parse(tries).body
            return compile(tree, "prompt", "exec")


def look(job: dict) -> dict:
    """error, errors, uses, wrapper, discards (see `rewards.code_reward`)."""
    errors = [syntax_error(text) for text in job["program"]]
    if any(errors):
        return {"error": next(filter(None, errors)), "errors": errors}
    trees = [ast.parse(text) for text in job["program"]]
    everything = [node for tree in trees for node in ast.walk(tree)]
    functions = [node for node in trees[-1].body if isinstance(node, ast.FunctionDef)]
    entry = next((node for node in reversed(functions) if node.name == job["entry_point"]), ast.parse("pass"))
    # A helper counts only if an answer defines it, and if the main answer does not define its name again. With a
    # single answer, which defines both, that is no second definition.
    own = [node for node in ast.walk(trees[-1]) if not isinstance(node, ast.keyword)]
    own = [node for node in own if len(trees) > 1 or node not in functions]
    helpers = set(job["names"]) & names_bound(everything, "name") - names_bound(own, "name", "asname", "arg", "rest")
    used = helpers_used(entry, helpers)
    wrapper = len(used) == 1 and bool(is_wrapper(entry, helpers))
    uses = len(used) / max(1, len(job["names"]))
    return {"error": None, "uses": uses, "wrapper": wrapper, "discards": throws_away(entry, helpers)}


def syntax_error(code: str):
    """Where and why it does not parse, or None."""
    try:
        ast.parse(code)
    except SyntaxError as error:
        return f"line {error.lineno}, column {error.offset}: {error.msg}"
    except (ValueError, MemoryError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"[:200]


def names_bound(nodes: list, *fields: str) -> set:
    """The names that are assigned in `nodes`, and the values of the given fields."""
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return assigned | {getattr(node, field, None) for node in nodes for field in fields}


def helpers_used(entry, helpers: set) -> set:
    """The helpers that the entry point calls or, as in map(aux, values), hands to a call."""
    calls = [node for node in ast.walk(entry) if isinstance(node, ast.Call)]
    places = [place for call in calls for place in (call.func, *call.args, *(word.value for word in call.keywords))]
    return helpers & {place.id for place in places if isinstance(place, ast.Name)}


def calls_helper(node, helpers: set) -> bool:
    """Whether a node is `aux(...)`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in helpers


def targets(statement, helpers: set):
    """The places to which `x = aux(...)` or a bare `aux(...)` assigns its result; None for other statements."""
    if isinstance(statement, (ast.Expr, ast.Assign, ast.AnnAssign)) and calls_helper(statement.value, helpers):
        parts = ast.iter_child_nodes(statement)
        return [part for part in parts if isinstance(getattr(part, "ctx", None), ast.Store)]


def is_wrapper(entry, helpers: set) -> bool:
    """Whether the entry point only passes on what a helper returns: `return aux(...)`, or assign and return."""
    body = [node for node in entry.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    result = body[-1].value if body and isinstance(body[-1], ast.Return) else None
    if len(body) == 1:
        return calls_helper(result, helpers)
    return len(body) == 2 and result and ast.unparse(result) in map(ast.unparse, targets(body[0], helpers) or [])


def throws_away(entry, helpers: set) -> bool:
    """Whether the result of a call of a helper goes nowhere, or into names that are never read."""
    nodes = list(ast.walk(entry))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    results = [parts for node in nodes if (parts := targets(node, helpers)) is not None]
    return any(all(isinstance(part, ast.Name) and part.id not in read for part in parts) for parts in results)


def encode(value):
    """Plain data as JSON, containers as [kind, parts]; a subclass is written as its base; else TypeError."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return [name, [encode(part) for part in (value.items() if kind is dict else value)]]
    raise TypeError(f"{type(value).__name__} is not plain data")


def decode(data):
    """The inverse of `encode`. Builds exact built-in types only, whoever sent it; raises for anything else."""
    if not isinstance(data, list):
        return data
    name, parts = data
    parts = map(decode, parts)  # one by one, for the alarm to be heard between two that collide in a set
    return complex(*parts) if name == "complex" else CONTAINERS[name](parts)
