"""Reads a map out of Python source, which is parsed with `ast` and never executed.

What is read is each assignment `layout_map[...] = (...)`, also through
`keras.distribution.TensorLayout(...)`, where the pattern and the axes are strings, or names that
the source gives one string (`model_dim = "model"`) and nothing else.
"""

import ast
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TypeGuard

from autoshard.errors import LayoutError
from autoshard.layout.rules import Rule, WrittenMap
from autoshard.mesh import Spec, format_spec

__all__ = ["SPEC", "parse_map"]

SPEC = 'a layout is a tuple of axis names and None, like ("model", None)'
"""What is expected of a layout."""

# Methods of a LayoutMap that change its rules.
_CHANGING = ("__delitem__", "__setitem__", "clear", "pop", "popitem", "setdefault", "update")

_ELSEWHERE = "the rules that it holds are not in this source"

# What runs only on a condition, or so often as one says.
_CONDITIONAL = (ast.If, ast.Match, ast.While, ast.For, ast.AsyncFor, ast.ExceptHandler)


def parse_map(text: str, name: str = "the layout") -> WrittenMap:
    """Read Python source.

    Args:
        text: what a file holds.
        name: what an error calls it.

    Raises:
        LayoutError: the source holds no map, or several. A LayoutMap without rules is one:
            everything is replicated.

    >>> parse_map('layout_map["ffw_linear/kernel"] = ("model", None)').rules
    (Rule(pattern='ffw_linear/kernel', spec=('model', None)),)
    """
    try:
        with warnings.catch_warnings():  # "\\d" outside a raw string warns, and is what we want
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise LayoutError(f"{name}{line} is not Python source: {reason}") from None
    source = _Source(tree, name)
    found = source.read()
    if found == WrittenMap(rules=()) and not source.makes_map:
        raise LayoutError(f"{name} holds no map; expected lines like layout_map[...] = (...)")
    return found


class _Source:
    """The assignments of one parsed source; `makes_map`: whether a LayoutMap is made there."""

    def __init__(self, tree: ast.Module, name: str) -> None:
        self._name = name
        self._tree = tree
        self._statements = [one for node in ast.walk(tree) for one in _assignments(node)]
        self._statements.sort(key=lambda one: (one[0].lineno, one[0].col_offset))
        self._maps = {"layout_map": "layout_map"}
        self._conditional = {id(inner) for node in ast.walk(tree) for inner in _perhaps_run(node)}
        self._bound = Counter(name for node in ast.walk(tree) for name in _bound_names(node))
        self._strings: dict[str, list[str]] = {}
        for target, value in self._statements:
            self._note(target, value)
        self.makes_map = any(_makes_map(value) for _, value in self._statements)

    def _note(self, target: ast.expr, value: ast.expr) -> None:
        """Remember names that hold a string or a LayoutMap; another name of a map is that map."""
        name = _last_name(target)
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            if isinstance(target, ast.Name):
                self._strings.setdefault(name, []).append(value.value)
        elif name and _makes_map(value):
            self._maps[name] = name
        elif name and _last_name(value) in self._maps:
            self._maps[name] = self._maps[_last_name(value)]

    def read(self) -> WrittenMap:
        rules: list[Rule] = []
        unreadable = [*self._made_elsewhere()]
        first: ast.Subscript | None = None
        is_another = False
        for target, value in self._statements:
            is_another = is_another or (first is not None and _makes_map(value))
            if not self._is_rule(target):
                continue
            first = first or target
            if is_another or self._map_of(target) != self._map_of(first):
                raise LayoutError(
                    f"{self._name} holds two maps, the first from line {first.lineno} on and "
                    f"another from line {target.lineno} on; give each a file of its own"
                )
            try:
                rules.append(self._rule(target, value))
            except LayoutError as error:
                unreadable.append(str(error))
        unreadable += self._otherwise_changed()
        return WrittenMap(rules=tuple(rules), unreadable=tuple(unreadable))

    def _is_rule(self, node: ast.expr) -> TypeGuard[ast.Subscript]:
        """Whether it is `layout_map[...]`."""
        return isinstance(node, ast.Subscript) and _last_name(node.value) in self._maps

    def _map_of(self, rule: ast.Subscript) -> str:
        """Which map a rule is set in."""
        written = ast.unparse(rule.value)
        return self._maps.get(written, written)

    def _made_elsewhere(self) -> Iterator[str]:
        """Where a map comes from what is no LayoutMap of this source, and may hold rules.

        Or is kept where what is set in it is not seen, as in a list of maps.
        """
        for node in ast.walk(self._tree):
            if isinstance(node, ast.ImportFrom):
                names = {alias.asname or alias.name for alias in node.names}
                if not names.isdisjoint(self._maps):
                    yield str(self._error(node, _ELSEWHERE))
        for target, value in self._statements:
            if _makes_map(value) and not _last_name(target):
                yield str(self._error(target, "a LayoutMap is read under a name of its own"))
            if (
                _last_name(target) in self._maps
                and not _makes_map(value)
                and _last_name(value) not in self._maps
                and not (isinstance(value, ast.Constant) and value.value is None)
            ):
                is_here = isinstance(value, ast.Dict)
                where = "write each as layout_map[...] = (...)" if is_here else _ELSEWHERE
                yield str(self._error(value, where))

    def _otherwise_changed(self) -> Iterator[str]:
        """Where a map is changed by anything but an assignment to one pattern."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Delete):
                changes = any(map(self._is_rule, node.targets))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                method = node.func
                changes = method.attr in _CHANGING and _last_name(method.value) in self._maps
            else:
                continue
            if changes:
                yield str(self._error(node, "rules are read from layout_map[...] = (...) lines"))

    def _rule(self, target: ast.Subscript, value: ast.expr) -> Rule:
        pattern, spec = self._string(target.slice, "a pattern"), self._spec(value)
        if id(target) in self._conditional:
            raise self._error(target, "whether it is set depends on a condition; give one map")
        try:
            return Rule(pattern=pattern, spec=spec)
        except LayoutError as error:
            raise LayoutError(f"{self._name}, line {target.lineno}: {error}") from None

    def _string(self, node: ast.expr, what: str) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.Name):
            strings = self._strings.get(node.id, [])
            if len(strings) == self._bound[node.id] and len(set(strings)) == 1:
                return strings[0]
        advice = r"; one regex, as block_\d+, takes all blocks" if what == "a pattern" else ""
        raise self._error(
            node, f"{what} has to be a string, or a name that is one string here{advice}"
        )

    def _spec(self, node: ast.expr) -> Spec:
        if isinstance(node, ast.Tuple):
            return self._axes(node)
        if isinstance(node, ast.List):
            meant = format_spec(self._axes(node))
            raise self._error(node, f"Keras takes a tuple and refuses a list; write {meant}")
        if isinstance(node, ast.Call) and _last_name(node.func) == "TensorLayout":
            given = [*node.args[:1], *(word.value for word in node.keywords if word.arg == "axes")]
            if len(given) == 1 and isinstance(given[0], ast.Tuple | ast.List):
                return self._axes(given[0])
        raise self._error(node, SPEC)

    def _axes(self, node: ast.Tuple | ast.List) -> Spec:
        return tuple(
            None
            if isinstance(entry, ast.Constant) and entry.value is None
            else self._string(entry, "an axis")
            for entry in node.elts
        )

    def _error(self, node: ast.expr | ast.stmt, expected: str) -> LayoutError:
        written = ast.unparse(node)
        return LayoutError(f"{self._name}, line {node.lineno}: cannot read {written}: {expected}")


def _bound_names(node: ast.AST) -> Iterator[str]:
    """The names that a node of the source gives a value, in whatever way."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        yield node.id
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.alias):
        yield node.asname or node.name
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name


def _perhaps_run(node: ast.AST) -> Iterator[ast.AST]:
    """What a node of the source runs only on a condition, that of a script's main part apart."""
    is_main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
    if isinstance(node, _CONDITIONAL) and not is_main:
        yield from ast.walk(node)


def _assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Each target of an assignment with its own value; `a, b = 1, 2` is two."""
    if isinstance(node, ast.Assign):
        pairs = [(target, node.value) for target in node.targets]
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        pairs = [(node.target, node.value)]
    else:
        return
    for target, value in pairs:
        if (
            isinstance(target, ast.Tuple)
            and isinstance(value, ast.Tuple)
            and len(target.elts) == len(value.elts)
        ):
            yield from zip(target.elts, value.elts, strict=True)
        else:
            yield target, value


def _makes_map(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and _last_name(node.func) == "LayoutMap"


def _last_name(node: ast.expr) -> str:
    """`layout_map` of `layout_map` and of `self.layout_map`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
