"""The guest: the only process that parses and runs an answer (judge.py says why)."""

import ast
import contextlib
import ctypes
import json
import os
import socket
import sys
import types
from collections import namedtuple

NOBODY = 65534  # the user and the group without rights
MAX_VALUE = 256_000  # characters of a returned value on its way
# JSON knows lists only, so each container crosses with the name of its kind.
CONTAINERS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict, bytes)}
Guest = namedtuple("Guest", "pid line alone")  # process number, socket to it, True if it sees nothing but its folder


def linux(name: str, *args) -> None:
    """Call the C library for what Python does not offer; OSError if it refuses. Does nothing on other systems."""
    if sys.platform == "linux":
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
        if function(*args, 0, 0, 0) != 0:  # prctl wants zeros for the arguments that it does not use
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
            os._exit(0)  # whatever an answer raises or registers, it never returns into the judge's code
    theirs.close()
    # The first byte of `serve`. None comes if the guest died before it was locked in.
    ready = ours.recv(1)
    if not ready:
        raise RuntimeError("a guest could not lock itself in")
    return Guest(pid, ours, ready == b"1")


def lock_in(keep: int, root: bool) -> None:
    """Give up files, rights, processes, and every descriptor but `keep`."""
    null = os.open(os.devnull, os.O_RDWR)  # before chroot, which hides the device
    sys.path.clear()  # the same modules for every answer, on every system
    # Without the rights for this, the guest sees the files of its user. `serve` reports that.
    with contextlib.suppress(PermissionError):
        os.chroot(".")
    if root:  # the order counts: without the rights of root, the group could not be given up
        os.chown(".", NOBODY, NOBODY)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    linux("prctl", 38, 1)  # PR_SET_NO_NEW_PRIVS: no program gives the rights back
    linux("capset", b"\x22\x05\x08\x20" + bytes(4), bytes(24))  # version 3 of the call; no capability is left
    limit(NPROC=1, NOFILE=32)  # this is the one process: no fork, no thread
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(3, keep)
    os.closerange(keep + 1, 256)


def serve(line) -> None:
    """Read the job, then serve: "look" (parse the answer, say what is seen), "load", or the arguments of a call."""
    line.sendall(b"1" if os.path.samefile("/", ".") else b"0")  # whether chroot worked
    requests = map(json.loads, line.makefile("rb"))
    job = next(requests)
    loaded = False
    for request in requests:
        try:
            if request != "look" and not loaded:  # before a call, too: the guest that loaded may be lost
                module = types.ModuleType("answer")
                sys.modules["answer"] = module  # dataclasses look there
                space = module.__dict__
                with contextlib.suppress(Exception):  # of a prompt that is prose, for example: "Fibonacci" parses
                    exec(preamble(job), space)
                # All answers share one module, so that the entry point finds the helpers.
                for code in job["program"]:
                    exec(code, space)
                loaded = True
            if request == "look":
                value = look(job)
            elif request == "load":
                value = None
            else:
                args, kwargs = decode(request)
                value = space[job["entry_point"]](*args, **kwargs)
            reply = json.dumps(["value", encode(value)])
            if len(reply) >= MAX_VALUE:
                raise ValueError("the value is too large")
        except BaseException as error:  # also SystemExit, for the next call to find this guest alive
            reply = json.dumps([[kind.__name__ for kind in type(error).__mro__], str(error)[:200]])
        line.sendall(reply.encode() + b"\n")


def preamble(job: dict):
    """The prompt without its function, compiled: imports and helper functions. Nothing if the prompt is not code."""
    # A prompt may be whole code, end in a header without its body, or be prose.
    for text in (job["prompt"], job["prompt"] + "\n    pass\n", ""):
        with contextlib.suppress(SyntaxError):
            tree = ast.parse(text)
            kept = []
            for statement in tree.body:
                is_entry = getattr(statement, "name", None) == job["entry_point"]
                # Imports in the function count as given. A module that the sandbox lacks matters only if it is used.
                for node in ast.walk(statement) if is_entry else [statement]:
                    imports = isinstance(node, (ast.Import, ast.ImportFrom))
                    if imports and getattr(node, "module", "") != "__future__":
                        kept += ast.parse(f"try:\n    {ast.unparse(node)}\nexcept ImportError:\n    pass").body
                    elif not is_entry:
                        kept.append(node)
            tree.body = kept
            return compile(tree, "prompt", "exec")


def look(job: dict) -> dict:
    """What an answer shows without being run: error, errors, uses, wrapper, discards (see `rewards.code_reward`)."""
    trees = []
    errors = []
    for text in job["program"]:  # one by one, so that an error belongs to an answer
        try:
            trees.append(ast.parse(text))
            errors.append(None)
        except SyntaxError as error:
            errors.append(f"line {error.lineno}, column {error.offset}: {error.msg}")
        except (ValueError, MemoryError, RecursionError) as error:
            errors.append(f"{type(error).__name__}: {error}"[:200])
    if any(errors):
        return {"error": next(filter(None, errors)), "errors": errors}
    functions = []  # of the main answer
    entry = ast.Module([], [])
    for node in trees[-1].body:
        if isinstance(node, ast.FunctionDef):
            functions.append(node)
            if node.name == job["entry_point"]:
                entry = node  # the last definition is the one that runs
    # A helper counts only if an answer defines it, and if the main answer does not define its name again. With a
    # single answer, which defines both, that is no second definition.
    own = [node for node in ast.walk(trees[-1]) if len(trees) > 1 or node not in functions]
    defined = names_bound(ast.walk(ast.Module(trees, [])), "name")
    rebound = names_bound(own, "name", "asname", "arg", "rest")
    helpers = (set(job["names"]) & defined) - rebound
    used = helpers_used(entry, helpers)
    wrapper = len(used) == 1 and is_wrapper(entry, helpers)
    uses = len(used) / max(1, len(job["names"]))
    return {"error": None, "uses": uses, "wrapper": wrapper, "discards": throws_away(entry, helpers)}


def names_bound(nodes, *fields: str) -> set:
    """The names that are assigned in `nodes`, and the values of the given fields."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif not isinstance(node, ast.keyword):  # g(aux=1) binds nothing
            names.update(getattr(node, field, None) for field in fields)
    return names


def helpers_used(entry, helpers: set) -> set:
    """The helpers that the entry point calls or, as in map(aux, values), hands to a call."""
    used = set()
    for call in ast.walk(entry):
        if isinstance(call, ast.Call):
            for part in (call.func, *call.args, *call.keywords):
                value = part.value if isinstance(part, ast.keyword) else part
                if isinstance(value, ast.Name):
                    used.add(value.id)
    return used & helpers


def calls_helper(node, helpers: set) -> bool:
    """Whether a node is `aux(...)`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in helpers


def takes_result(node, helpers: set) -> bool:
    """Whether a node is the statement `x = aux(...)`, or `aux(...)` alone."""
    return isinstance(node, (ast.Expr, ast.Assign, ast.AnnAssign)) and calls_helper(node.value, helpers)


def targets(statement) -> list:
    """The places that a statement assigns to."""
    return [part for part in ast.iter_child_nodes(statement) if isinstance(getattr(part, "ctx", None), ast.Store)]


def is_wrapper(entry, helpers: set) -> bool:
    """Whether the entry point only passes on what a helper returns."""
    # A docstring makes it no more than a wrapper.
    body = [node for node in entry.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    match body:
        case [ast.Return(value)]:
            return calls_helper(value, helpers)
        case [statement, ast.Return(value)] if value:
            returned = ast.unparse(value)
            return takes_result(statement, helpers) and returned in map(ast.unparse, targets(statement))
    return False


def throws_away(entry, helpers: set) -> bool:
    """Whether `aux(...)` stands alone as a statement, or is assigned to names that are never read.

    Other ways to ignore a result, such as `str(aux(n))`, are not recognised.
    """
    nodes = list(ast.walk(entry))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for node in nodes:
        if takes_result(node, helpers):
            names = set()  # `a, b = aux(n)` has two names in one place; `x[0] = aux(n)` reads x
            for place in targets(node):
                names |= {part.id for part in ast.walk(place) if isinstance(part, ast.Name)}
            if not names & read:
                return True
    return False


def encode(value):
    """Plain data as JSON, containers as [kind, parts]; a subclass is written as its base; else TypeError."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            parts = value.items() if kind is dict else value
            return [name, list(map(encode, parts))]
    raise TypeError(f"{type(value).__name__} is not plain data")


def decode(data):
    """The inverse of `encode`. Builds exact built-in types only, whoever sent it; raises for anything else."""
    if not isinstance(data, list):
        return data
    name, parts = data
    parts = map(decode, parts)  # one by one, for the alarm to be heard between two that collide in a set
    return complex(*parts) if name == "complex" else CONTAINERS[name](parts)
