"""Regular expressions from outside, matched in time proportional to pattern times name.

PEFT runs the patterns of `rank_pattern`, `alpha_pattern` and `target_modules` with a backtracking engine, where a pattern such as
`(a+)+$` takes exponential time. A node takes those patterns from strangers, so it walks all branches at once instead (Thompson,
"Regular expression search algorithm", CACM 11(6), 1968). Only whether a name matches is asked, so greediness plays no part.

Understood: literals, `.`, classes, `\\d \\w \\s` and their opposites, groups, `|`, `* + ? {m,n}`, `^ $ \\b \\A \\Z`.
Not understood, and said so: look-around, back references, flags, named and atomic groups, possessive repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from node.errors import AdapterInvalidError

MAX_PATTERN_CHARACTERS = 4096
MAX_INSTRUCTIONS = 20_000
MAX_GROUP_DEPTH = 32
MAX_REPEAT = 1000
MAX_STEPS = 20_000_000

CharTest = Callable[[str], bool]
Node = tuple[Any, ...]  # ("char", test) ("seq", nodes) ("alt", nodes) ("repeat", node, least, most or None) ("at", kind)


class PatternSyntaxError(ValueError):
    """The pattern is malformed or uses syntax that is not understood here. The text says which."""


class StepBudget:
    """The work one adapter's patterns may cost, in branches visited."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self._left = steps

    def spend(self, steps: int) -> None:
        """Take `steps` away.

        Raises:
            AdapterInvalidError: adapter_config_invalid, when nothing is left.
        """
        self._left -= steps
        if self._left < 0:
            raise AdapterInvalidError(
                "adapter_config.json: the patterns take too long to match; write plain module names",
                code="adapter_config_invalid",
            )


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A compiled pattern. `program` is a list of (operation, argument, argument)."""

    program: tuple[tuple[str, Any, int], ...]

    @classmethod
    def compile(cls, source: str) -> NamePattern:
        """Compile `source`.

        Raises:
            PatternSyntaxError: Malformed, too long, or outside the syntax above.
        """
        if len(source) > MAX_PATTERN_CHARACTERS:
            raise PatternSyntaxError(f"it has {len(source)} characters; the limit is {MAX_PATTERN_CHARACTERS}")
        program: list[tuple[str, Any, int]] = []
        _emit(_Parser(source).parse(), program)
        program.append(("match", None, 0))
        return cls(tuple(program))

    def matches_all(self, name: str, budget: StepBudget) -> bool:
        """Whether the whole of `name` matches (`re.fullmatch`)."""
        return self._run(name, budget, whole=True)

    def matches_start(self, name: str, budget: StepBudget) -> bool:
        """Whether `name` or a beginning of it matches (`re.match`)."""
        return self._run(name, budget, whole=False)

    def _run(self, name: str, budget: StepBudget, *, whole: bool) -> bool:
        branches = [0]
        for position in range(len(name) + 1):
            tests, is_match = self._settle(branches, name, position)
            budget.spend(len(branches) + len(tests) + 1)
            if is_match and (not whole or position == len(name)):
                return True
            if not tests or position == len(name):
                return False
            branches = [index + 1 for index in tests if self.program[index][1](name[position])]
        return False

    def _settle(self, branches: Iterable[int], name: str, position: int) -> tuple[list[int], bool]:
        """Follow every instruction that reads no character; return those that wait for one, and whether the end was reached."""
        tests, seen, is_match = [], set[int](), False
        waiting = list(branches)
        while waiting:
            index = waiting.pop()
            if index in seen:
                continue
            seen.add(index)
            operation, argument, other = self.program[index]
            if operation == "char":
                tests.append(index)
            elif operation == "match":
                is_match = True
            elif operation == "split":
                waiting += (argument, other)
            elif operation == "jump":
                waiting.append(argument)
            elif _is_at(argument, name, position):
                waiting.append(index + 1)
        return tests, is_match


def _is_at(kind: str, name: str, position: int) -> bool:
    if kind == "start":
        return position == 0
    if kind == "end":
        return position == len(name)
    before = position > 0 and _is_word(name[position - 1])
    after = position < len(name) and _is_word(name[position])
    return before != after


def _emit(node: Node, program: list[tuple[str, Any, int]]) -> None:
    """Append the instructions of one node; a repeat is unrolled, so the limit on instructions bounds every {m,n}."""
    if len(program) > MAX_INSTRUCTIONS:
        raise PatternSyntaxError(f"its repeats unroll to more than {MAX_INSTRUCTIONS} steps")
    kind = node[0]
    if kind in ("char", "at"):
        program.append((kind, node[1], 0))
    elif kind == "seq":
        for child in node[1]:
            _emit(child, program)
    elif kind == "alt":
        _emit_choice(node[1], program)
    else:
        _emit_repeat(node, program)


def _emit_choice(children: list[Node], program: list[tuple[str, Any, int]]) -> None:
    ends = []
    for child in children[:-1]:
        split = len(program)
        program.append(("split", split + 1, 0))
        _emit(child, program)
        ends.append(len(program))
        program.append(("jump", 0, 0))
        program[split] = ("split", split + 1, len(program))
    _emit(children[-1], program)
    for end in ends:
        program[end] = ("jump", len(program), 0)


def _emit_repeat(node: Node, program: list[tuple[str, Any, int]]) -> None:
    _, child, least, most = node
    before = len(program)
    for _ in range(least):
        _emit(child, program)
        if len(program) == before:
            return  # repeating nothing is nothing, and would let the loop run without reaching the limit
    splits = []
    for _ in range(1 if most is None else most - least):
        splits.append(len(program))
        program.append(("split", len(program) + 1, 0))
        _emit(child, program)
    if most is None:
        program.append(("jump", splits[0], 0))
    for split in splits:
        program[split] = ("split", split + 1, len(program))


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CLASSES: dict[str, CharTest] = {
    "d": str.isdecimal,
    "w": _is_word,
    "s": str.isspace,
    "D": lambda char: not char.isdecimal(),
    "W": lambda char: not _is_word(char),
    "S": lambda char: not char.isspace(),
}
_ANCHORS = {"b": "word", "A": "start", "Z": "end"}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0
        self._depth = 0

    def parse(self) -> Node:
        node = self._choice()
        if self._at < len(self._source):
            raise PatternSyntaxError(f"unbalanced ) at character {self._at}")
        return node

    def _peek(self) -> str:
        return self._source[self._at] if self._at < len(self._source) else ""

    def _take(self) -> str:
        char = self._peek()
        if not char:
            raise PatternSyntaxError("it ends too early")
        self._at += 1
        return char

    def _accept(self, text: str) -> bool:
        if not self._source.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _choice(self) -> Node:
        branches = [self._sequence()]
        while self._accept("|"):
            branches.append(self._sequence())
        return ("alt", branches) if len(branches) > 1 else branches[0]

    def _sequence(self) -> Node:
        nodes = []
        while self._peek() not in ("", "|", ")"):
            nodes.append(self._repeated(self._atom()))
        return ("seq", nodes)

    def _repeated(self, atom: Node) -> Node:
        bounds = self._bounds()
        if bounds is None:
            return atom
        if atom[0] == "at":
            raise PatternSyntaxError("an anchor cannot be repeated")
        self._accept("?")  # a lazy repeat matches the same names
        if self._peek() in ("*", "+") or (self._peek() == "{" and self._bounds() is not None):
            raise PatternSyntaxError("a repeat of a repeat, or a possessive one, is not understood")
        return ("repeat", atom, *bounds)

    def _bounds(self) -> tuple[int, int | None] | None:
        """The repeat that begins here, or None. A `{` that begins none is a literal, as in `re`."""
        for char, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._accept(char):
                return bounds
        close = self._source.find("}", self._at, self._at + 12)
        if self._peek() != "{" or close < 0:
            return None
        least, comma, most = self._source[self._at + 1 : close].partition(",")
        if not (least + most).isdecimal() or not (least + most).isascii():
            return None
        self._at = close + 1
        low = int(least or 0)
        high = low if not comma else int(most) if most else None
        if max(low, high or 0) > MAX_REPEAT:
            raise PatternSyntaxError(f"the repeat {{{least}{comma}{most}}} is above {MAX_REPEAT}")
        if high is not None and high < low:
            raise PatternSyntaxError(f"the repeat {{{least},{most}}} ends before it begins")
        return low, high

    def _atom(self) -> Node:
        char = self._take()
        if char == "(":
            return self._group()
        if char == "[":
            return ("char", self._char_class())
        if char == ".":
            return ("char", lambda found: found != "\n")
        if char in "^$":
            return ("at", "start" if char == "^" else "end")
        if char == "\\":
            return self._escape()
        if char in "*+?":
            raise PatternSyntaxError(f"nothing to repeat at character {self._at - 1}")
        return ("char", char.__eq__)

    def _group(self) -> Node:
        if self._peek() == "?" and not self._accept("?:"):
            raise PatternSyntaxError("groups that begin with (? are not understood, but for (?:")
        self._depth += 1
        if self._depth > MAX_GROUP_DEPTH:
            raise PatternSyntaxError(f"groups nest deeper than {MAX_GROUP_DEPTH}")
        node = self._choice()
        if not self._accept(")"):
            raise PatternSyntaxError("a group is not closed")
        self._depth -= 1
        return node

    def _escape(self) -> Node:
        if self._peek() in _ANCHORS and self._peek():
            return ("at", _ANCHORS[self._take()])
        return ("char", self._escaped_test())

    def _escaped_test(self) -> CharTest:
        char = self._take()
        if char in _CLASSES:
            return _CLASSES[char]
        if char in _CONTROLS:
            return _CONTROLS[char].__eq__
        if char.isalnum():
            raise PatternSyntaxError(f"the escape \\{char} is not understood")
        return char.__eq__

    def _char_class(self) -> CharTest:
        is_negated = self._accept("^")
        tests: list[CharTest] = []
        while not tests or self._peek() != "]":
            tests.append(self._class_item())
        self._take()
        return lambda char: any(test(char) for test in tests) != is_negated

    def _class_item(self) -> CharTest:
        first = self._take()
        if first == "\\":
            if self._peek() and self._peek() in _CLASSES:
                return _CLASSES[self._take()]
            first = self._class_escape()
        if self._peek() != "-" or self._source[self._at + 1 : self._at + 2] in ("]", ""):
            return first.__eq__
        self._take()
        last = self._take()
        if last == "\\":
            last = self._class_escape()
        if last < first:
            raise PatternSyntaxError(f"the range {first}-{last} is empty")
        return lambda char: first <= char <= last

    def _class_escape(self) -> str:
        char = self._take()
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char.isalnum():
            raise PatternSyntaxError(f"the escape \\{char} is not understood in a class")
        return char
