"""Rewrites a chat template's syntax tree so that running it charges for every step it takes.

Jinja compiles ``~``, comparisons, slices and dict literals to bare Python. They become calls of filters here,
under names that no template can write, and each body of statements begins with a charge for its length.
:mod:`edge_runtime.engine.template_sandbox` has those filters.
"""

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

MAX_NODES = 20_000  # of the syntax tree: 0.6 s to compile
ENTRY_UNITS = 100  # entering a body of statements, calling, filtering: about 0.5 µs
NODE_UNITS = 20  # one node of an expression

# No template can write these names, because they hold a space.
CHARGE = "charge units"
CONCATENATE = "concatenate texts"
SLICE = "take slice"
COMPARED = "charge comparison"

# What a template may consist of: no blocks, imports or switches of escaping.
_NODE_NAMES = """
Add And Assign AssignBlock Break Call CallBlock Compare Concat CondExpr Const Continue Dict Div ExprStmt
Filter FilterBlock FloorDiv For Getattr Getitem If Keyword List Macro Mod Mul Name NSRef Neg Not Operand Or
Output Pair Pos Pow Slice Sub Template TemplateData Test Tuple With
"""
_NODES = frozenset(_NODE_NAMES.split())


def metered(tree: nodes.Template) -> nodes.Template:
    """The tree with its charges; the one given is changed too.

    Raises:
        jinja2.TemplateSyntaxError: too many nodes, or one of a kind that chat templates have no use for.
    """
    _check_nodes(tree)
    _MeteredExpressions().visit(tree)
    _meter_statements(tree)
    return tree


class _MeteredExpressions(NodeTransformer):
    """Puts metered filters in place of the operators that Jinja compiles to bare Python."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes), CONCATENATE, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)]
        return _filtered(node.node, SLICE, node, bounds)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _filtered(node.expr, COMPARED, node)
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, COMPARED, node)
        return node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        for pair in node.items:
            if not isinstance(pair.key, nodes.Const):  # is hashed with all it holds
                pair.key = _filtered(pair.key, COMPARED, node)
        return node


def _filtered(
    value: nodes.Expr, name: str, where: nodes.Node, arguments: list[nodes.Expr] | None = None
) -> nodes.Expr:
    return nodes.Filter(value, name, arguments or [], [], None, None, lineno=where.lineno)


def _check_nodes(tree: nodes.Node) -> None:
    count = 0
    pending = [tree]
    while pending:
        node = pending.pop()
        count += 1
        if type(node).__name__ not in _NODES:
            raise jinja2.TemplateSyntaxError(
                f"{type(node).__name__} is nothing that a chat template may use", node.lineno
            )
        if count > MAX_NODES:
            raise jinja2.TemplateSyntaxError(f"the template has more than {MAX_NODES} parts", node.lineno)
        pending.extend(node.iter_child_nodes())


def _meter_statements(node: nodes.Node) -> int:
    """Put a charge before each body of statements below a node; the units of what lies outside of them."""
    units = len(node.data) if isinstance(node, nodes.TemplateData) else NODE_UNITS
    if isinstance(node, nodes.For) and node.test is not None:
        cost = _meter_statements(node.test)
        node.test = nodes.And(_charge(cost, node, result=True), node.test, lineno=node.lineno)
    for name, value in node.iter_fields():
        children = value if isinstance(value, list) else [value]
        if name in ("body", "else_") and isinstance(value, list):
            cost = ENTRY_UNITS + sum(_meter_statements(child) for child in value)
            value.insert(0, nodes.ExprStmt(_charge(cost, node), lineno=node.lineno))
        elif not (isinstance(node, nodes.For) and name == "test"):
            units += sum(_meter_statements(child) for child in children if isinstance(child, nodes.Node))
    return units


def _charge(units: int, where: nodes.Node, *, result: bool = False) -> nodes.Expr:
    charged = _filtered(nodes.Const(units), CHARGE, where)
    return nodes.Not(charged, lineno=where.lineno) if result else charged  # charge() returns None
