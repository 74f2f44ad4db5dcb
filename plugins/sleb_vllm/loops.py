"""What a model's loop over its decoder layers carries from one layer to the next.

To skip a layer is the identity on the carried values, so a placeholder must hand back just those of
its inputs, in the order in which the loop takes them. That is read off the loop itself: in
``hidden_states, residual = layer(positions, hidden_states, residual)`` the names on the left that
stand on the right, too, say which arguments they are.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sleb_serve.errors import SlebError

_MOST = 2
"""A hidden state and a residual. Loops that carry more keep state that a gap may break."""


@dataclass(frozen=True)
class Carried:
    """One carried value: the argument it arrives in, by position or by keyword.

    Neither, for a value that the loop takes from a layer and never reads.
    """

    position: int | None = None
    keyword: str | None = None

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value among a layer's arguments."""
        if self.position is not None:
            return args[self.position]
        return None if self.keyword is None else kwargs[self.keyword]


def carried_by(decoder: type, layer: type) -> tuple[Carried, ...]:
    """The values that `decoder`'s loop carries through layers of class `layer`, in order.

    Raises:
        SlebError: no such loop was found, loops disagree, or one is not of a known form.
    """
    found = {carried for method in _methods(decoder) for carried in _loops(decoder, method)}
    if len(found) != 1:
        why = "no loop over its layers was found" if not found else "its loops disagree"
        raise _underivable(decoder, why)
    (carried,) = found
    _check_layer(decoder, layer, carried)
    return carried


def _methods(decoder: type) -> Iterator[Any]:
    # Base classes, too, even where they are overridden: an override may call on to them.
    for owner in decoder.__mro__:
        if owner.__module__.partition(".")[0] not in {"builtins", "torch", "typing"}:
            yield from (value for value in vars(owner).values() if inspect.isfunction(value))


def _loops(decoder: type, method: Any) -> Iterator[tuple[Carried, ...]]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return
    for loop in (node for node in ast.walk(tree) if isinstance(node, ast.For)):
        names = _layer_names(loop)
        for node in ast.walk(loop):
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Call)
                and isinstance(node.value.func, ast.Name)
                and node.value.func.id in names
            ):
                yield _carried(decoder, tree, node, node.value)


def _layer_names(loop: ast.For) -> set[str]:
    """What the loop calls a layer: ``for layer in self.layers`` or ``layer = self.layers[i]``."""
    names: set[str] = set()
    if any(_is_layers(node) for node in ast.walk(loop.iter)):
        names |= {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
    for node in ast.walk(loop):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Subscript)
            and _is_layers(node.value.value)
        ):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _is_layers(node: ast.AST) -> bool:
    # self.layers, self.h, self.blocks: some list that the decoder itself holds.
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _carried(
    decoder: type, tree: ast.AST, assignment: ast.Assign, call: ast.Call
) -> tuple[Carried, ...]:
    target = assignment.targets[0]
    targets = target.elts if isinstance(target, ast.Tuple) else [target]
    names = [node.id for node in targets if isinstance(node, ast.Name)]
    if len(names) != len(targets) or len(assignment.targets) != 1:
        raise _underivable(decoder, f"{ast.unparse(assignment)} assigns to more than names")
    if len(names) > _MOST:
        raise _underivable(decoder, f"its loop carries {', '.join(names)}")
    carried = []
    for name in names:
        value = _argument(call, name)
        if value is None:
            if _is_read(tree, name, call):
                raise _underivable(decoder, f"{name} does not come from the layer before")
            value = Carried()
        carried.append(value)
    if carried == [Carried()] * len(carried):
        raise _underivable(decoder, f"{ast.unparse(assignment)} carries nothing")
    return tuple(carried)


def _argument(call: ast.Call, name: str) -> Carried | None:
    for position, argument in enumerate(call.args):
        if isinstance(argument, ast.Name) and argument.id == name:
            return Carried(position=position)
    for keyword in call.keywords:
        if isinstance(keyword.value, ast.Name) and keyword.value.id == name:
            return Carried(keyword=keyword.arg)
    return None


def _is_read(tree: ast.AST, name: str, call: ast.Call) -> bool:
    inside = set(ast.walk(call))
    return any(
        isinstance(node, ast.Name)
        and node.id == name
        and isinstance(node.ctx, ast.Load)
        and node not in inside
        for node in ast.walk(tree)
    )


def _check_layer(decoder: type, layer: type, carried: tuple[Carried, ...]) -> None:
    """Hold what the loop says against the forward of a layer that is kept."""
    forward = layer.forward  # type: ignore[attr-defined]
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    takes_any = {parameter.kind for parameter in parameters} & {
        inspect.Parameter.VAR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    }
    names = [parameter.name for parameter in parameters]
    for value in carried:
        known = (value.position is None or value.position < len(names)) and (
            value.keyword is None or value.keyword in names
        )
        if not known and not takes_any:
            raise _underivable(decoder, f"{layer.__name__}.forward takes {', '.join(names)}")
    lengths = {
        len(node.value.elts)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(forward))))
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)
    }
    if lengths - {len(carried)}:
        raise _underivable(
            decoder,
            f"its loop takes {len(carried)} values where {layer.__name__} returns {lengths}",
        )


def _underivable(decoder: type, why: str) -> SlebError:
    return SlebError(
        f"{decoder.__name__} cannot be served pruned: what its layers hand on cannot be told, "
        f"since {why}"
    )
