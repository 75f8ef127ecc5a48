"""Source: what a running function is calling at this moment, and what its text names behind that call."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

_GOES_OVER = {"enumerate", "zip", "list", "tuple"}
_GOES_OVER_ITS = {"values", "items"}
_LOOPS = (ast.For, ast.While, ast.AsyncFor, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_Where = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """A call in the text of a function.

    Args:
        function: the expression that is called.
        over: what the loop around it goes over, one expression for each part of a `zip`; empty outside of loops.
        attributes_after: the names of all attributes that may be looked up once it has returned.
        names_after: likewise the variables, unless an attribute of theirs is looked up.
        bases_after: the variables of which an attribute is looked up.
        changes: whether something behind the call, or an exception that leaves it, is written where it outlasts the
            function.
    """

    function: ast.expr
    over: tuple[ast.expr, ...]
    attributes_after: frozenset[str]
    names_after: frozenset[str]
    bases_after: frozenset[str]
    changes: bool

    def callee(self, frame: FrameType) -> Any:
        """What is called; LookupError, AttributeError or TypeError if that cannot be told."""
        return _value(self.function, frame)

    def looped(self, frame: FrameType) -> list[Any]:
        """What the loop around it goes over."""
        return [_value(expression, frame) for expression in self.over]


@lru_cache(maxsize=4096)
def call_at(code: CodeType, instruction: int) -> Call | None:
    """The call that this instruction makes; None where the text does not tell, or a loop makes it over and over."""
    line, end_line, column, end_column = list(code.co_positions())[instruction // 2]
    tree = _tree(code.co_filename) if _is_text_of(code) else None
    if tree is None or line is None or end_line is None or column is None or end_column is None:
        return None
    path = _path_to(tree, (line, column), (end_line, end_column))
    function = next((n for n in reversed(path) if isinstance(n, ast.FunctionDef | ast.Lambda)), None)
    if not path or not isinstance(path[-1], ast.Call) or not isinstance(function, ast.FunctionDef):
        return None
    if function.name != code.co_name:
        return None
    call, inside = path[-1], path[path.index(function) + 1 :]
    loops = [node for node in inside if isinstance(node, _LOOPS)]
    over: tuple[ast.expr, ...] = ()
    start: _Where = (end_line, end_column)
    if loops:
        loop = loops[0]
        if len(loops) > 1 or not isinstance(loop, ast.For) or _base(call.func) not in _names(loop.target):
            return None
        gone_over = _gone_over(loop.iter)
        if gone_over is None:
            return None
        if {_base(expression) for expression in gone_over} & _bound_in(loop.body):
            return None
        over, start = gone_over, (loop.body[0].lineno, loop.body[0].col_offset)
    own, pending = _nodes(call.func), _nodes(*_around(inside)) - _nodes(call)
    mentioned = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Name | ast.Attribute)
        and node not in own
        and ((node.lineno, node.col_offset) >= start or _ends(node) > start or node in pending)
    ]
    attributes = {node.attr for node in mentioned if isinstance(node, ast.Attribute)}
    based_on = {node.value for node in mentioned if isinstance(node, ast.Attribute)}
    names = [node for node in mentioned if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    bases = {node.id for node in names if node in based_on}
    after = [n for n in ast.walk(function) if hasattr(n, "lineno") and (_ends(n) > start or n in pending)]
    changes = any(isinstance(n, ast.Attribute | ast.Subscript) and not isinstance(n.ctx, ast.Load) for n in after)
    changes |= any(isinstance(n, ast.Global | ast.Nonlocal) for n in ast.walk(function))
    changes |= any(isinstance(node, ast.Try | ast.TryStar) for node in inside)
    values = {node.id for node in names if node not in based_on}
    return Call(call.func, over, frozenset(attributes), frozenset(values), frozenset(bases), changes)


@lru_cache(maxsize=4096)
def mentioned_in(code: CodeType) -> frozenset[str]:
    """Every name that a function looks up, and those that its text gives to `getattr`; a computed one is "getattr"."""
    tree = _tree(code.co_filename) if _is_text_of(code) else None
    lines = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)] if tree is not None else []
    found = [n for n in lines if n.name == code.co_name and min(_first_lines(n)) == code.co_firstlineno]
    if len(found) != 1:
        return frozenset({*code.co_names, *_variables_used(code)}).union(
            *(mentioned_in(c) for c in code.co_consts if isinstance(c, CodeType))
        )
    names_used: set[str] = set()
    plain: set[int] = set()
    for node in ast.walk(found[0]):
        match node:
            case ast.Attribute(attr=name):
                names_used.add(name)
            case ast.Call(func=ast.Name(id="getattr") as own, args=[_, ast.Constant(value=str() as name), *_]):
                names_used.add(name)
                plain.add(id(own))
            case ast.Name(id=name) if id(node) not in plain:
                names_used.add(name)
    return frozenset(names_used)


@lru_cache(maxsize=4096)
def stored_in(code: CodeType) -> frozenset[str]:
    """The attributes to which a function gives a value."""
    own = {str(i.argval) for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"}
    return frozenset(own).union(*(stored_in(c) for c in code.co_consts if isinstance(c, CodeType)))


def _variables_used(code: CodeType) -> set[str]:
    """The variables that a function reads."""
    return {
        str(i.argval) for i in dis.get_instructions(code) if i.opname.startswith("LOAD_") and isinstance(i.argval, str)
    }


def _first_lines(function: ast.FunctionDef) -> list[int]:
    return [function.lineno, *(decorator.lineno for decorator in function.decorator_list)]


def _nodes(*trees: ast.AST) -> set[ast.AST]:
    return {node for tree in trees for node in ast.walk(tree)}


def _around(path: list[ast.AST]) -> list[ast.AST]:
    """What has been looked up before the call and is used when it has returned: the rest of its expression or simple
    statement, and the contexts that are open."""
    last = max(index for index, node in enumerate(path) if isinstance(node, ast.stmt))
    simple = not hasattr(path[last], "body") and not isinstance(path[last], ast.Match)
    contexts = [item for node in path if isinstance(node, ast.With | ast.AsyncWith) for item in node.items]
    return [path[last] if simple else path[last + 1], *contexts]


def _path_to(tree: ast.AST, start: _Where, end: _Where) -> list[ast.AST]:
    """The nodes from the module down to the call that spans exactly this text."""
    path: list[ast.AST] = []
    node: ast.AST | None = tree
    while node is not None:
        path.append(node)
        if isinstance(node, ast.Call) and ((node.lineno, node.col_offset), _ends(node)) == (start, end):
            return path
        node = next((c for c in _children(node) if (c.lineno, c.col_offset) <= start and _ends(c) >= end), None)
    return []


def _children(node: ast.AST) -> Iterator[Any]:
    for child in ast.iter_child_nodes(node):
        if hasattr(child, "lineno"):
            yield child
        else:  # such as the arguments of a function, or one loop of a comprehension
            yield from _children(child)


def _ends(node: Any) -> _Where:
    return node.end_lineno, node.end_col_offset


def _gone_over(expression: ast.expr) -> tuple[ast.expr, ...] | None:
    """What a loop over this goes over, once; None if that cannot be told."""
    match expression:
        case ast.Name() | ast.Attribute():
            return (expression,)
        case ast.Subscript(value=value, slice=ast.Slice(step=None)):
            return _gone_over(value)
        case ast.Call(func=ast.Name(id=name), args=arguments) if name in _GOES_OVER:
            parts = [_gone_over(argument) for argument in arguments]
            known = [part for part in parts if part is not None]
            return tuple(e for part in known for e in part) if len(known) == len(parts) else None
        case ast.Call(func=ast.Attribute(value=value, attr=name), args=[]) if name in _GOES_OVER_ITS:
            return _gone_over(value)
    return None


def _value(expression: ast.expr, frame: FrameType) -> Any:
    """What an expression stands for, without running code of the user's own; LookupError if that cannot be told."""
    match expression:
        case ast.Name(id=name):
            return frame.f_locals[name] if name in frame.f_locals else frame.f_globals[name]
        case ast.Attribute(value=base, attr=name):
            return attribute(_value(base, frame), name)
        case ast.Subscript(value=base, slice=ast.Constant(value=key)):
            return _item(_value(base, frame), key)
        case ast.Subscript(value=base, slice=ast.Name() as key):
            return _item(_value(base, frame), _value(key, frame))
    raise LookupError(ast.unparse(expression))


def _item(values: Any, key: Any) -> Any:
    if type(values) in (list, tuple, dict) or type(values).__module__ == "torch.nn.modules.container":
        return values[key]
    raise LookupError(key)


def attribute(owner: Any, name: str) -> Any:
    """An attribute of a module as Python finds it, without running anything.

    Raises:
        LookupError: only running code would tell.
    """
    if not isinstance(owner, nn.Module):
        if isinstance(owner, ModuleType) and name in vars(owner):
            return vars(owner)[name]
        raise LookupError(name)
    own = inspect.getattr_static(type(owner), name, None)
    if isinstance(own, property | functools.cached_property):
        raise LookupError(name)
    if name in vars(owner):
        return vars(owner)[name]
    if isinstance(own, FunctionType):
        return MethodType(own, owner)
    if own is None and type(owner).__getattr__ is nn.Module.__getattr__:
        return owner._modules[name]
    raise LookupError(name)


def _bound_in(body: list[ast.stmt]) -> set[str]:
    """The variables that some statements give a value."""
    names = {n for statement in body for n in ast.walk(statement) if isinstance(n, ast.Name)}
    return {name.id for name in names if not isinstance(name.ctx, ast.Load)}


def _base(expression: ast.expr) -> str | None:
    """The variable that an expression begins with."""
    while isinstance(expression, ast.Attribute | ast.Subscript):
        expression = expression.value
    return expression.id if isinstance(expression, ast.Name) else None


def _names(target: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}


@lru_cache(maxsize=4096)
def _is_text_of(code: CodeType) -> bool:
    """Whether the text that is read is the one that was compiled: it may have been edited since."""
    return any(
        other.co_name == code.co_name and other.co_firstlineno == code.co_firstlineno and _alike(other, code)
        for other in _codes(code.co_filename)
    )


def _alike(one: CodeType, other: CodeType) -> bool:
    plain = [[c for c in code.co_consts if not isinstance(c, CodeType)] for code in (one, other)]
    names = [(code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars) for code in (one, other)]
    return one.co_code == other.co_code and names[0] == names[1] and repr(plain[0]) == repr(plain[1])


@lru_cache(maxsize=16)
def _codes(filename: str) -> tuple[CodeType, ...]:
    """All functions of a file, compiled from its text."""
    tree = _tree(filename)
    found: list[CodeType] = [] if tree is None else [compile(tree, filename, "exec", dont_inherit=True)]
    for code in found:
        found += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return tuple(found)


@lru_cache(maxsize=4)  # trees are large, and what is found in them is kept
def _tree(filename: str) -> ast.Module | None:
    try:
        return ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return None
