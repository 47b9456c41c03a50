"""Runs a chat template, a Jinja program out of a model file, with bounded work.

Jinja's sandbox keeps a template away from Python's internals, but not from ``'a' * 10**12``, nested loops or
a list that holds itself twice, forty times over. Here everything a template does is paid for beforehand from
one budget, so a render ends, with a text or an error, after a bounded amount of time and memory:

- Each body of statements charges its own length whenever it is entered, so loops, macros and recursion pay
  (:mod:`edge_runtime.engine.template_metering`).
- Operators, filters, tests, comparisons, slices, calls and output charge the size of what they work on, and
  those whose result can be larger than their operands charge the result's size before it is made.
- Only filters, methods and node types listed here exist; nothing else can hide work.

The budget counts units of about one character copied (1 to 10 ns); the result depends on no clock.
"""

import functools
import json
import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from datetime import datetime
from itertools import chain
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from edge_runtime.engine.template_metering import CHARGE, COMPARED, CONCATENATE, ENTRY_UNITS, SLICE, metered

MAX_VALUE_DEPTH = 64
MAX_INTEGER_BITS = 1024

_ELEMENT_UNITS = 10  # one element of a list visited
_LISTS: tuple[type, ...] = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SHALLOW_FILTERS = _words(
    "count d default first items last length list map reject rejectattr reverse select selectattr"
)
_DEEP_FILTERS = _words(
    "abs capitalize dictsort float int lower max min sort title trim truncate unique upper wordcount"
)
_METHODS: tuple[tuple[Any, frozenset[str]], ...] = (
    (
        str,
        _words(
            "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower "
            "isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace "
            "rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
        ),
    ),
    (dict, _words("copy get items keys values")),
    (list, _words("copy count index")),
    (tuple, _words("count index")),
    (int | float | complex | bytes | set | frozenset, _words("")),
)

_PRINTF = re.compile(r"%(?:\([^()]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?(.)", re.DOTALL)
_DATE_FORMAT = re.compile(r"(?:[^%]|%-?[A-Za-z%])*", re.DOTALL)


class WorkLimitError(Exception):
    """The budget is spent. No ValueError, which Jinja's filters take for a failed conversion."""


class TemplateRefusalError(Exception):
    """The template called ``raise_exception``: it does not accept these messages."""


class Sandbox:
    """One compiled template. Not thread-safe.

    Raises:
        Exception: whatever a broken template makes Jinja or Python raise while it is compiled.
    """

    def __init__(self, source: str) -> None:
        self._environment = _BoundedEnvironment()
        tree = metered(self._environment.parse(source))
        tree.set_environment(self._environment)
        code = self._environment.compile(tree)
        self._template = jinja2.Template.from_code(self._environment, code, self._environment.globals)

    def render(self, variables: Mapping[str, Any], units: int) -> str:
        """The template's text, made with at most ``units`` of work.

        Raises:
            Exception: whatever the template makes Jinja or Python raise, WorkLimitError among it.
        """
        self._environment.units_left = units
        context = self._template.new_context(dict(variables))
        # Not render(): on an error that compiles a new stack of frames, one for each level of recursion.
        return "".join(self._template.root_render_func(context))


class _GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}`` marks what a model is trained on; here just its content."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    def __repr__(self) -> str:  # Jinja's shows the content, which may hold itself, or others many times
        return "<namespace>"


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers' chat templates, plus the budget."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        self.units_left = 0
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constant folding would work before the budget counts
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
            finalize=_output,
        )
        self.filters = self._bounded_filters()
        tests: Any = self.tests
        self.tests = {name: self._metered(test, deep=True) for name, test in tests.items()}
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": _Namespace,
            "joiner": self.globals["joiner"],
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def charge(self, units: int) -> None:
        """Pay for work that is about to be done."""
        self.units_left -= units
        if self.units_left < 0:
            raise WorkLimitError

    def text(self, value: Any) -> str:
        """A value as text, paid for."""
        self.charge_deep(value)
        return value if isinstance(value, str) else str(value)

    def charge_deep(self, value: Any) -> int:
        """Pay for visiting a value with all it holds; returns what that cost, about its length as text."""
        if isinstance(value, str | bytes):
            self.charge(len(value))
            return len(value)
        pending: list[Iterator[Any]] = [iter((value,))]
        before = self.units_left
        while pending:
            for inner in pending[-1]:
                if isinstance(inner, str | bytes):
                    self.charge(_ELEMENT_UNITS + len(inner))
                elif isinstance(inner, int):
                    self.charge(_ELEMENT_UNITS + inner.bit_length())
                elif isinstance(inner, range):
                    self.charge(_ELEMENT_UNITS * (1 + len(inner)))
                elif isinstance(inner, dict):
                    pending.append(chain.from_iterable(inner.items()))
                    break
                elif isinstance(inner, _LISTS):
                    pending.append(iter(inner))  # type: ignore[call-overload]
                    break
                else:
                    self.charge(_ELEMENT_UNITS)
            else:
                pending.pop()
                self.charge(_ELEMENT_UNITS)
            if len(pending) > MAX_VALUE_DEPTH:
                raise ValueError(f"values are nested more than {MAX_VALUE_DEPTH} deep")
        return before - self.units_left

    def charge_shallow(self, value: Any) -> None:
        """Pay for visiting a value's own elements."""
        if isinstance(value, str | bytes):
            self.charge(len(value))
        elif isinstance(value, int):
            _check_integer(value)
        elif isinstance(value, (dict, range, *_LISTS)):
            self.charge(_ELEMENT_UNITS * len(value))  # type: ignore[arg-type]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.charge_shallow(left)
        self.charge_shallow(right)
        if operator == "%" and isinstance(left, str):
            return self._printf(left, right)
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                    units = 1 if isinstance(value, str | bytes) else _ELEMENT_UNITS
                    self.charge(max(0, times) * units * len(value))
        if operator == "**" and not (
            isinstance(left, int | float) and isinstance(right, int | float) and abs(right) <= 64
        ):
            raise ValueError("** takes numbers, and exponents up to 64")
        result = super().call_binop(context, operator, left, right)
        self.charge_shallow(result)
        return result

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.charge(ENTRY_UNITS)
        for value in (*args, *kwargs.values()):
            self.charge_deep(value)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            self.charge(len(owner))
            if function.__name__ == "join":
                return self._join(*args, separator=owner)
            if function.__name__ == "replace":
                return self._replace(owner, *args, **kwargs)
        elif isinstance(owner, list | tuple):
            self.charge_deep(owner)
        elif isinstance(owner, dict):
            self.charge_shallow(owner)
        result = super().call(context, function, *args, **kwargs)
        self.charge_shallow(result)
        return result

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):  # is hashed with all it holds
            self.charge_deep(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> None:
        """str.format is none of the methods that templates have: it would need a parser for its widths."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _METHODS:
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    # Filters and what the compiled template calls in place of operators.

    def _bounded_filters(self) -> dict[str, Callable[..., Any]]:
        bounded = {name: self._metered(self.filters[name], deep=False) for name in _SHALLOW_FILTERS}
        bounded |= {name: self._metered(self.filters[name], deep=True) for name in _DEEP_FILTERS}
        own: dict[str, Callable[..., Any]] = {
            "e": _escape,
            "escape": _escape,
            "indent": self._indent,
            "join": self._join_filter,
            "replace": self._replace,
            "round": _round,
            "safe": _unchanged,
            "string": str,
            "sum": self._sum,
            "tojson": self._to_json,
            "format": self._format,
        }
        bounded |= {name: self._metered(function, deep=True) for name, function in own.items()}
        bounded[CHARGE] = self.charge
        bounded[CONCATENATE] = self._concatenate
        bounded[SLICE] = self._slice
        bounded[COMPARED] = self._compared
        return bounded

    def _metered(self, function: Callable[..., Any], *, deep: bool) -> Callable[..., Any]:
        """The filter or test with its operands charged before, its result after, and no lazy result."""
        # wraps() copies Jinja's mark for functions whose first argument is the context or the environment.
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.charge(ENTRY_UNITS)
            for position, value in enumerate(args[first:]):
                if deep or position:
                    self.charge_deep(value)
                else:
                    self.charge_shallow(value)
            for value in kwargs.values():
                self.charge_deep(value)
            result = function(*args, **kwargs)
            if isinstance(result, Iterator):
                result = list(result)
            self.charge_shallow(result)
            return result

        return metered

    def _concatenate(self, values: list[Any]) -> str:
        return "".join([self.text(value) for value in values])

    def _compared(self, value: Any) -> Any:
        self.charge_deep(value)
        return value

    def _slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        result = value[start:stop:step]
        self.charge_shallow(result)
        return result

    def _printf(self, template: str, values: Any) -> str:
        largest = 400 + self.charge_deep(values)  # %f of the largest float has 309 digits before the point
        units = len(template)
        for width, precision, kind in _PRINTF.findall(template):
            if kind not in "diouxXeEfFgGcrsa%" or "*" in (width, precision):
                raise ValueError("% takes plain conversions such as %s, %d and %5.2f")
            units += largest + int(width or 0) + int(precision or 0)
        self.charge(units)
        result: str = template % values
        return result

    def _format(self, template: Any, *args: Any, **kwargs: Any) -> str:
        return self._printf(str(template), kwargs or args)

    def _join(self, values: Any, *, separator: str = "") -> str:
        if any(not isinstance(value, str) for value in values):
            raise TypeError("join takes a list of strings")
        self.charge(len(separator) * len(values))
        return separator.join(values)

    def _attributes(self, values: Any, attribute: Any) -> list[Any]:
        """Each value, or what it has under a name, an index, or several of them joined by dots."""
        if attribute is None:
            return list(values)
        parts = attribute.split(".") if isinstance(attribute, str) else [attribute]
        keys = [int(part) if isinstance(part, str) and part.isdecimal() else part for part in parts]
        return [functools.reduce(self.getitem, keys, value) for value in values]

    def _join_filter(self, values: Any, d: Any = "", attribute: Any = None) -> str:
        texts = [self.text(value) for value in self._attributes(values, attribute)]
        return self._join(texts, separator=str(d))

    def _sum(self, values: Any, attribute: Any = None, start: Any = 0) -> Any:
        numbers = self._attributes(values, attribute)
        if any(not isinstance(number, int | float) for number in (start, *numbers)):
            raise TypeError("sum takes a list of numbers")
        return sum(numbers, start)

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        whole, replacement = str(text), str(new)
        found = whole.count(str(old))
        times = found if count is None or count < 0 else min(found, count)
        self.charge(len(whole) + len(replacement) * times)
        return whole.replace(str(old), replacement, times)

    def _indent(self, text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
        indention = width if isinstance(width, str) else " " * _limited(width, 0, 256)
        lines = str(text).splitlines() if not str(text).endswith("\n") else [*str(text).splitlines(), ""]
        self.charge((len(indention) + 1) * len(lines))
        indented = [
            indention + line if (line or blank) and (first or number) else line
            for number, line in enumerate(lines)
        ]
        return "\n".join(indented)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers writes it for chat templates: not escaped for HTML."""
        if indent is not None:
            indent = _limited(indent, 0, 16)
            self.charge(self.charge_deep(value) * indent)
        if separators is not None:
            item, key = separators
            self.charge(self.charge_deep(value) * (len(item) + len(key)))
            separators = (item, key)
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )


@jinja2.pass_context  # keeps Jinja from calling it while it compiles, when there is no budget
def _output(context: Context, value: Any) -> str:
    environment = context.environment
    return environment.text(value) if isinstance(environment, _BoundedEnvironment) else str(value)


def _limited(number: Any, low: int, high: int) -> int:
    if not isinstance(number, int) or not low <= number <= high:
        raise ValueError(f"a filter's number must be from {low} to {high}")
    return number


def _check_integer(number: int) -> None:
    if number.bit_length() > MAX_INTEGER_BITS:
        raise OverflowError(f"an integer has more than {MAX_INTEGER_BITS} bits")


def _escape(value: Any) -> str:
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&#34;"), ("'", "&#39;")):
        value = str(value).replace(character, entity)
    return str(value)


def _unchanged(value: Any) -> Any:
    return value


def _round(value: Any, precision: int = 0, method: str = "common") -> float:
    factor: float = 10.0 ** _limited(precision, -20, 20)
    if method == "common":
        return round(float(value), precision)
    rounded = -(-value * factor // 1) if method == "ceil" else value * factor // 1
    if method not in ("ceil", "floor"):
        raise ValueError("round takes common, ceil or floor")
    return float(rounded) / factor


def _raise_exception(message: Any) -> None:
    raise TemplateRefusalError(str(message))


def _strftime_now(date_format: Any) -> str:
    if not isinstance(date_format, str) or len(date_format) > 100 or not _DATE_FORMAT.fullmatch(date_format):
        raise ValueError("strftime_now takes a date format of at most 100 characters")
    return datetime.now().strftime(date_format)
