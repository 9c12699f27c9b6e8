"""Rewards of the writing and coding tasks (arXiv 2508.04652).

A reward is a dict: "total", the parts that sum to it and, for code, "passed" and "detail" beside them. The parts are
levels: one counts only if the level before it was reached, else it is 0. Model-written code runs in a sandbox
(sandbox/judge.py).
"""

import keyword
import os
import re
import textwrap
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile

from sandbox.judge import run_sandbox

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
    """Reward of a brief summary (`first`) and a detailed one (`second`), of 3 (the paper's TLDR).

    All twelve kinds of connectives earn 95 % of the last part, so the most that can be reached is 2.98.

    Parts: structure (both have 8–256 words), length (ratio of characters), vocabulary (ratio of distinct words, which
    has no upper end here), consistency (overlap of the two word sets), coherence (kinds of connectives in `second`).
    """
    levels = {"num_words": (8, 256), "length": (1.1, 1.6, 3.2, 5.0), "vocabulary": (1.3, 2.0, 1e9, 2e9)}
    return _writing_reward(first, second, linked=second, overlap=0.03, **levels)


def arxiv_reward(first: str, second: str) -> dict:
    """Reward of two halves of an introduction, of 3 (the paper's arXiv); at most 2.98, as for `tldr_reward`.

    Parts as there; both have 128–256 words, and connectives count in both.
    """
    levels = {"num_words": (128, 256), "length": (0.8, 1.3, 1.6, 2.0), "vocabulary": (0.5, 0.7, 1.3, 1.7)}
    return _writing_reward(first, second, linked=f"{first}\n{second}", overlap=0.23, **levels)


def _writing_reward(first, second, linked, num_words, length, vocabulary, overlap) -> dict:
    """The levels that both tasks share.

    linked: the text whose connectives count. num_words: least and most of each text. length, vocabulary: the ratios,
    second to first, at which the level is 0, 1, 1 and 0. overlap: the Jaccard index that earns all of consistency.
    """
    least, most = num_words
    parts = dict.fromkeys(TLDR_MAX, 0.0)
    first_words = set(re.findall(r"\w+", first.lower()))
    second_words = set(re.findall(r"\w+", second.lower()))
    # A line of punctuation has words for split(), and none for the pattern.
    if first_words and least <= len(first.split()) <= most and least <= len(second.split()) <= most:
        parts["structure"] = 0.5
        longer = _trapezoid(len(second) / len(first), *length)
        richer = _trapezoid(len(second_words) / len(first_words), *vocabulary)
        parts["length"] = longer or 0.0
        if longer is not None and richer is not None:
            shared = (first_words & second_words) - STOP_WORDS
            jaccard = len(shared) / max(1, len((first_words | second_words) - STOP_WORDS))
            parts["vocabulary"] = 0.5 * richer
            parts["consistency"] = 0.6 * min(jaccard, overlap) / overlap
            parts["coherence"] = 0.4 * _transitions(linked)
    parts["total"] = sum(parts.values())  # "total" itself is still 0 here
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
    return 0.4 + 0.05 * (categories - 1) if categories else 0.0


# ---- Code ------------------------------------------------------------------------------------------------------------
CODE_MAX = {"total": 4.0, "structure": 1.0, "syntax": 0.5, "tests": 1.0, "cooperation": 1.5}

MAX_ANSWER = 50_000  # characters of an answer that are read

# An unindented line that starts code.
START = re.compile(
    r"(async +)?def +\w|class +\w+ *[:(]|@\w|import +[\w.]+( +as +\w+)? *([,;#]|$)|from +[\w.]+ +import "
)
# An assignment with a type. Prose, such as "Note: x = 1", has none of these after the colon.
TYPED = r"[^\W\d]\w*\ *:\ *(int|float|str|bool|bytes|list|dict|set|tuple|List|Dict|Set|Tuple)\b[^=]*\ =\ "
# A line that starts code, but only before the first definition.
SETUP = re.compile(r"[^\W\d]\w*( *, *[^\W\d]\w*)* *=|try:|" + TYPED)
# One that continues code.
MORE = re.compile(
    rf"""({"|".join(keyword.kwlist)}|match|case|print)\b  # a statement
    | [\#@"')\]}}]  # a comment, a decorator, a string, the end of a bracket
    | [^\W\d][\w.]*(\[.*\])?(\ *,\ *[\w.]+)*\ *([-+*/%&|^]|//|\*\*|<<|>>)?=  # an assignment
    | {TYPED}
    | [a-z_]\w*\ *:.*=  # one with any type
    | [^\W\d][\w.]*\((.*[\])}}(,])?\s*(\#.*)?$  # a call
    """,
    re.VERBOSE,
)
INDENTED_FENCE = re.compile(r"^([ \t]+)(```|~~~)(?s:.*?)^\1\2", re.MULTILINE)
# Possessive, and the closing quote is optional: backtracking on hostile text would take minutes.
LITERAL = re.compile(r"""("{3}|'{3})(?s:.*?)(\1|\Z)|"(\\.|[^"\\\n])*+"?|'(\\.|[^'\\\n])*+'?|#.*""")


def code_reward(aux: str | list[str], main: str, item: dict) -> dict:
    """Reward of helper(s) and an entry point that together should pass the tests of `item`, at most 4 (the paper's).

    `aux` is the answer that should define `aux`, or a list of answers for aux, aux2, aux3, …: structure and cooperation
    are then in proportion to the helpers defined and used. [] if one agent writes both functions, in `main`.
    `item`: `prompt`, `entry_point`, and `test` as in HumanEval, `check(candidate)` with asserts, or bare asserts that
    call the entry point. A test is an assert, a loop of them, or a call of the test's own function that holds them. It
    passes if it raises nothing and at least one assert ran; `assert True` does not count, and a test whose only assert
    is `assert False` passes if that is not reached. Arguments and results are copied plain data:
    None, numbers, text, bytes; lists, tuples, sets and dicts of them. So a test cannot see what a function did to an
    argument, and one that wants an iterator, an object or a function does not pass.

    Returns "total" and its parts structure, syntax, tests, cooperation (a helper's result thrown away costs 0.5 of it,
    even below 0); "passed", the fraction of the tests; "detail": helpers and entry (defined with a return?), error (of
    syntax, or None; "errors" has one for each answer), uses (fraction of the helpers), wrapper, discards, and outcomes:
    [{"test", "outcome"}], an outcome being passed, failed, time-out, died, not run, or the text of an exception. No
    answer makes it raise; RuntimeError says that the sandbox itself does not start.
    """
    answers = [aux] if isinstance(aux, str) else aux
    names = helper_names(len(answers))
    parameters = parameters_of(item)
    heads = [f"def {name}({parameters}):" for name in names]
    if not answers and body_of(main):  # a single agent, whose prompt ends in the first line of aux, goes on there
        main = f"{heads[0]}\n{main}"
    helpers = list(map(extract_code, answers, heads))
    entry = extract_code(main, f"def {item['entry_point']}({parameters}):")
    # A single agent's helper is in its one answer.
    defined = [_defines(name, text) for name, text in zip(names, helpers or [entry], strict=True)]
    detail = {"helpers": defined, "entry": _defines(item["entry_point"], entry)}
    detail |= {"error": None, "uses": 0.0, "wrapper": False, "discards": False, "outcomes": []}
    reward = dict.fromkeys([*CODE_MAX, "passed"], 0.0)
    reward["structure"] = 0.4 * sum(defined) / len(defined) + 0.6 * detail["entry"]
    if detail["entry"]:
        job = {key: item[key] for key in ("prompt", "entry_point", "test")}
        detail |= run_sandbox({**job, "names": names, "program": [*helpers, entry]})
        del detail["isolation"]  # about the sandbox, not about the answer
        if detail["error"] is None:
            passed = [row["outcome"] == "passed" for row in detail["outcomes"]]
            reward["syntax"] = 0.5
            reward["tests"] = reward["passed"] = sum(passed) / max(1, len(passed))
    if reward["passed"] > 0:
        reward["cooperation"] = detail["uses"] * (0.5 if detail["wrapper"] else 1.5) - 0.5 * detail["discards"]
    reward["total"] = sum(reward[part] for part in CODE_MAX)
    return {**reward, "detail": detail}


def judge_many(jobs: list[tuple]) -> list[dict]:
    """`code_reward` of each (aux, main, item), in order, on this process's share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # the other processes of this machine judge at the same time
    with ThreadPoolExecutor(max(cores, 1)) as pool:
        return list(pool.map(lambda job: code_reward(*job), jobs))


def helper_names(count: int) -> list[str]:
    """aux, aux2, aux3, ...: what `count` agents define. A single agent that writes all, count 0, defines aux."""
    return ["aux", *(f"aux{i}" for i in range(2, count + 1))]


def parameters_of(item: dict) -> str:
    """The parameters of a problem's function, as its prompt has them."""
    # Up to the bracket that an arrow or the colon follows: there may be others, and several lines.
    pattern = rf"def {re.escape(item['entry_point'])}\((.*?)\)\s*(?:->[^:\n]*)?:"
    found = re.search(pattern, item["prompt"], re.DOTALL)
    return found[1] if found else "*args"


def extract_code(text: str, head: str = "def f():") -> str:
    """The code of an answer, without Markdown's fences and the prose around it.

    A base model goes on where the prompt ends, so an answer that begins with indented code is the body of `head`.

    An unindented line tells whether what follows is code. In a fence, everything from the first such line on is code.
    After the first definition only imports and definitions start code again; an example call does not.
    """
    text = re.sub(r"\r\n?", "\n", text[:MAX_ANSWER].lstrip("\ufeff"))
    if body := body_of(text):
        return f"{head}\n{body}"
    text = INDENTED_FENCE.sub(lambda block: textwrap.dedent(block[0]), textwrap.dedent(text)).strip()
    kept = []
    code = False  # whether the lines here are code
    fenced = False  # in a fence
    quoted = ""  # the quotes that opened a string of several lines; its lines do not tell what follows
    defined = False  # after a definition
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
            for quotes in re.findall(r"\"{3}|'{3}", line):
                if not quoted:
                    quoted = quotes
                elif quoted == quotes:  # the other kind is text here
                    quoted = ""
    return "\n".join(kept)


def body_of(text: str) -> str:
    """The indented code that an answer begins with, up to the first line that is not indented; "" if it does not."""
    text = re.sub(r"\A\s*\n", "", text)  # empty lines
    first = text.partition("\n")[0].lstrip()
    whole = re.match(r"(async|def|class)\b|@", first)  # not a body, but a function that is indented as a whole
    if not text.startswith((" ", "\t")) or not MORE.match(first) or whole or "```" in text or "~~~" in text:
        return ""
    return "\n".join(takewhile(lambda line: not line.strip() or line[0] in " \t", text.split("\n")))


def _defines(name: str, code: str) -> bool:
    """`def name(`, and a `return` before the next definition that is indented no deeper.

    This is read off the text, so a syntax error costs only the next level.
    """
    depth = None  # of the definition that a line is in, if it is one of that name
    for line in LITERAL.sub("''", code).split("\n"):  # a docstring may speak of what the function returns
        start = re.match(r"([ \t]*)(?:def[ \t]+(\w+)[ \t]*\(|(?:async|def|class)\b)", line)
        if start and (depth is None or len(start[1]) <= depth):
            depth = len(start[1]) if start[2] == name else None
        if depth is not None and re.search(r"\breturn\b", line):
            return True
    return False
