"""Strict reading of JSON that came from outside: every field is checked, and none is overlooked."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

from edge_runtime.daemon.http_errors import ParameterError
from edge_runtime.errors import RequestError


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        RequestError: no UTF-8, no JSON, or no object.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} of {len(body)} is wrong") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RequestError(f"the body is not JSON: {error.msg.lower()} at {where}") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except ValueError:  # Python refuses whole numbers of more than some thousand digits
        raise RequestError("the body holds a number that is none of JSON's, or far too long") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body is {kind_of(value)}; needed is an object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def kind_of(value: object) -> str:
    """What a value is, for a message: its kind, never its content."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return "a number"
    names: dict[type, str] = {str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "something else")


class Fields:
    """The fields of one JSON object; each is taken once, and what is left over is unknown.

    A field that is null counts as absent, as it does for OpenAI's API.

    Args:
        values: the object; it is copied.
        path: its place in the request, before the fields' names in messages.
    """

    def __init__(self, values: object, path: str = "") -> None:
        if not isinstance(values, dict):
            raise ParameterError(f"{path} is {kind_of(values)}; needed is an object", path)
        self._values = dict(values)
        self._prefix = f"{path}." if path else ""
        self._known: list[str] = []

    def take(self, name: str) -> Any:
        """A field's value, None where it is absent."""
        self._known.append(name)
        return self._values.pop(name, None)

    def named(self, name: str) -> str:
        """The field's full name."""
        return self._prefix + name

    def text(self, name: str) -> str | None:
        """A string that can be written as UTF-8."""
        value = self.take(name)
        return None if value is None else checked_text(value, self.named(name))

    def boolean(self, name: str) -> bool:
        """True or false; false where it is absent."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return bool(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number from ``low`` to ``high``."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():  # some clients write 5.0
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str) -> float | None:
        """A finite number."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value, "a number")
        if (isinstance(value, int) and abs(value) > 2**1000) or not math.isfinite(value):
            raise self._wrong(name, value, "a finite number")
        return float(value)

    def refuse(self, name: str, acceptable: Callable[[Any], bool], advice: str) -> None:
        """Refuse a field that would change the answer, unless its value asks for nothing."""
        value = self.take(name)
        if value is not None and not acceptable(value):
            raise ParameterError(f"{self.named(name)} is not supported; {advice}", self.named(name))

    def ignore(self, *names: str) -> None:
        """Accept fields that change nothing about the answer."""
        for name in names:
            self.take(name)

    def end(self) -> None:
        """Refuse what was not taken."""
        for name, value in self._values.items():
            if value is None:
                continue  # some clients write null for everything they know
            shown = self.named(name[:60].encode("ascii", "replace").decode())
            close = difflib.get_close_matches(name[:60], self._known, n=1)
            hint = f"did you mean {self.named(close[0])}?" if close else "leave it out"
            raise ParameterError(f"{shown} is no parameter of this request; {hint}", shown)

    def _wrong(self, name: str, value: object, needed: str) -> ParameterError:
        shown = kind_of(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
        return ParameterError(f"{self.named(name)} is {shown}; needed is {needed}", self.named(name))


def checked_text(value: object, name: str) -> str:
    """A string that can be written as UTF-8; JSON's escapes allow others.

    Raises:
        ParameterError: anything else.
    """
    if not isinstance(value, str):
        raise ParameterError(f"{name} is {kind_of(value)}; needed is a string", name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ParameterError(
            f"{name} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character", name
        ) from None
    return value
