"""Turns a conversation into a prompt, as the model's own chat template says.

The template is a Jinja program that came with the model file. It sees what transformers' chat templates see
(``messages``, ``add_generation_prompt``, ``bos_token``, ``eos_token``, ``tools``, ``documents``,
``raise_exception``, ``strftime_now``), under the same whitespace rules, and is not trusted: see
:mod:`edge_runtime.engine.template_sandbox`. That module, and Jinja with it, is loaded by the first render.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ChatTemplateError

if TYPE_CHECKING:
    from edge_runtime.engine.template_sandbox import Sandbox

MAX_SOURCE_CHARACTERS = 128 * 1024  # long ones in use have tens of thousands
MAX_MESSAGES = 100_000
MAX_MESSAGE_CHARACTERS = 16 * 2**20
_BASE_UNITS = 10_000_000
_UNITS_PER_CHARACTER = 64  # a template may copy or search each message this often
_OWN_VARIABLES = frozenset(("messages", "add_generation_prompt", "bos_token", "eos_token"))


class ChatTemplate:
    """A model's chat template. May be used from several threads.

    Nothing is checked before the first render, so that a model with a broken template still loads.

    Args:
        source: the Jinja source.
        bos_token: text of the token that begins a sequence, or "".
        eos_token: text of the token that ends one, or "".
    """

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self._sandbox: Sandbox | None = None
        self._lock = threading.Lock()

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: each with a ``role`` and a ``content``; other keys hold strings too.
            add_generation_prompt: end with the beginning of the assistant's answer.
            variables: what else the template may ask for (``tools``, ``enable_thinking``, ...): numbers,
                strings, booleans, None, and lists and dicts of them.

        Raises:
            ChatTemplateError: the messages or variables are malformed, or the template is broken, refuses
                these messages, or needs more work than a template may take.
        """
        characters = _checked_characters(messages)
        for name, value in variables.items():
            if name in _OWN_VARIABLES:
                raise ChatTemplateError(f"the variable {name} is set by render itself; leave it out")
            characters += _json_characters(name, value)
        context = {
            "tools": None,
            "documents": None,
            **variables,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        }
        with self._lock:
            return self._run(context, _BASE_UNITS + _UNITS_PER_CHARACTER * characters)

    def _run(self, context: Mapping[str, Any], units: int) -> str:
        from edge_runtime.engine import template_sandbox

        stage = "cannot be compiled"
        try:
            if self._sandbox is None:
                self._sandbox = template_sandbox.Sandbox(self._checked_source())
            stage = "failed"
            return self._sandbox.render(context, units)
        except template_sandbox.TemplateRefusalError as refusal:
            message = f"the model's chat template refuses these messages: {_line(refusal)}"
            raise ChatTemplateError(message) from None
        except template_sandbox.WorkLimitError:
            raise ChatTemplateError(
                f"the model's chat template needs more than {units} units of work for this conversation, far "
                "more than templates need; it is broken or hostile: use another, or `edgert run --raw`"
            ) from None
        except ChatTemplateError:
            raise
        except Exception as fault:  # a template is a program: it can raise anything
            line = getattr(fault, "lineno", None)
            where = f" at its line {line}" if line is not None else ""
            raise ChatTemplateError(
                f"the model's chat template {stage}{where} ({type(fault).__name__}: {_line(fault)}); "
                "use another, or `edgert run --raw`"
            ) from None

    def _checked_source(self) -> str:
        if not isinstance(self.source, str):
            found = type(self.source).__name__
            raise ChatTemplateError(f"the model's chat template is a {found}; it must be a text")
        if len(self.source) > MAX_SOURCE_CHARACTERS:
            raise ChatTemplateError(
                f"the model's chat template has {len(self.source)} characters; "
                f"at most {MAX_SOURCE_CHARACTERS} are taken: use another, or `edgert run --raw`"
            )
        return self.source


def _checked_characters(messages: Sequence[Mapping[str, str]]) -> int:
    """Check a conversation's form; the number of characters in it."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise ChatTemplateError(f"messages is a {type(messages).__name__}; it must be a list of messages")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise ChatTemplateError(f"messages holds {len(messages)} messages; it must hold 1 to {MAX_MESSAGES}")
    characters = 0
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatTemplateError(
                f"message {index} is a {type(message).__name__}; it must be a mapping with role and content"
            )
        for key in ("role", "content"):
            if key not in message:
                raise ChatTemplateError(f"message {index} has no {key}; each needs a role and a content")
        for key, value in message.items():
            if not isinstance(key, str) or not isinstance(value, str):
                wrong = key if not isinstance(key, str) else value
                raise ChatTemplateError(
                    f"message {index} holds a {type(wrong).__name__}; its keys and values must be strings"
                )
            characters += len(key) + len(value)
        if not message["role"].strip():
            raise ChatTemplateError(f"message {index} has an empty role; it must be user, system or such")
    if characters > MAX_MESSAGE_CHARACTERS:
        raise ChatTemplateError(
            f"the messages have {characters} characters; at most {MAX_MESSAGE_CHARACTERS} are taken"
        )
    return characters


def _json_characters(name: str, value: object, depth: int = 0) -> int:
    """Check that a variable is plain; roughly the number of characters in it."""
    if depth > 32:
        raise ChatTemplateError(f"the variable {name} is nested more than 32 deep")
    if value is None or isinstance(value, bool | float):
        return 8
    if isinstance(value, int) and value.bit_length() <= 1024:
        return 8
    if isinstance(value, str):
        characters = len(value)
    elif isinstance(value, list | tuple):
        characters = 8 + sum(_json_characters(name, inner, depth + 1) for inner in value)
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        characters = 8 + sum(map(len, value))
        characters += sum(_json_characters(name, inner, depth + 1) for inner in value.values())
    else:
        raise ChatTemplateError(
            f"the variable {name} holds a {type(value).__name__}; it may hold strings, numbers, booleans, "
            "None, and lists and dicts of them"
        )
    if characters > MAX_MESSAGE_CHARACTERS:
        raise ChatTemplateError(f"the variable {name} has more than {MAX_MESSAGE_CHARACTERS} characters")
    return characters


def _line(fault: Exception) -> str:
    """An exception's message, in one line that is short enough to show."""
    text = " ".join(str(fault).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
