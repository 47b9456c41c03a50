"""From a conversation to the tokens of a prompt, in which only the template may write control tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from edge_runtime.engine.chat_template import ChatTemplate
from edge_runtime.engine.tokenizer import Tokenizer

_SEAM = "\ufdd0"  # a code point that Unicode keeps out of texts


def chat_prompt(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """Render a conversation and cut it into tokens.

    What a user or a tool wrote cannot end its own turn or begin another one: the text of a control token
    is taken as plain characters there. The assistant's own turns are taken as the model wrote them.

    Raises:
        ChatTemplateError: the template refuses these messages. RequestError: too much text.
    """
    text = template.render([_seamed(message, tokenizer) for message in messages])
    parts = text.split(_SEAM)
    add_bos = not (template.bos_token and text.startswith(template.bos_token))
    tokens = tokenizer.encode(parts[0], add_bos=add_bos, parse_special=True)
    for part in parts[1:]:
        tokens += tokenizer.encode(part, add_bos=False, parse_special=True)
    return tokens


def _seamed(message: Mapping[str, str], tokenizer: Tokenizer) -> Mapping[str, str]:
    """The message with a seam after the first character of each control token's text in its content."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, str) or message.get("role") == "assistant":
        return message  # what is malformed the template's own check refuses
    content = content.replace(_SEAM, "\ufffd")
    controls = tokenizer.control_texts_in(content)
    if controls:
        pattern = "|".join(map(re.escape, controls))
        content = re.sub(pattern, lambda found: found[0][0] + _SEAM + found[0][1:], content)
    return {**message, "content": content}
