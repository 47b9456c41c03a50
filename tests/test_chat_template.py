"""Chat templates: the prompts of published shapes, and which messages and variables are taken."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from chat_template_sources import (
    AGAIN,
    ANSWER,
    CHATML,
    FILTERS,
    GEMMA,
    LLAMA_2,
    LLAMA_3,
    QWEN_3,
    SYSTEM,
    USER,
    ZEPHYR,
    render,
)

from edge_runtime.engine.chat_template import ChatTemplate
from edge_runtime.errors import ChatTemplateError


def test_chatml() -> None:
    assert render(CHATML, [SYSTEM, USER]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(CHATML, [USER], add_generation_prompt=False) == "<|im_start|>user\n Hi <|im_end|>\n"


def test_llama_2() -> None:
    assert render(LLAMA_2, [SYSTEM, USER, ANSWER, AGAIN]) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi [/INST] Hello. </s><s>[INST] And? [/INST]"
    )
    with pytest.raises(ChatTemplateError, match="refuses these messages: Conversation roles must alternate"):
        render(LLAMA_2, [USER, USER])


def test_llama_3_and_the_variables_it_asks_for() -> None:
    head = "<s><|start_header_id|>system<|end_header_id|>\n\n"
    tail = (
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert render(LLAMA_3, [SYSTEM, USER]) == f"{head}Today Date: 26 Jul 2024\n\nBe brief.{tail}"
    with_tool = render(LLAMA_3, [USER], date_string="1 May 2025", tools=[{"name": "ö"}])
    assert with_tool == f'{head}Environment: ipython\n{{\n  "name": "ö"\n}}Today Date: 1 May 2025\n\n{tail}'


def test_qwen_3_with_namespace_macro_slices_and_thinking() -> None:
    thoughtful = {"role": "assistant", "content": "<think>hm</think>\n\nHello."}
    turns = (
        "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n"
    )
    assert render(QWEN_3, [USER, thoughtful, AGAIN]) == turns + "<|im_start|>assistant\n"
    assert render(QWEN_3, [USER, thoughtful, AGAIN], enable_thinking=False) == (
        turns + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_zephyr_with_generation_tags() -> None:
    assert render(ZEPHYR, [SYSTEM, USER, ANSWER, AGAIN]) == (
        "<|system|>\nBe brief.</s>\n<|user|>\n Hi </s>\n<|assistant|>\nHello.</s>\n"
        "<|user|>\nAnd?</s>\n<|assistant|>\n"
    )


def test_gemma_refuses_the_system_role() -> None:
    assert render(GEMMA, [USER, ANSWER]) == (
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(ChatTemplateError, match="refuses these messages: System role not supported"):
        render(GEMMA, [SYSTEM, USER])


@pytest.mark.parametrize("source", [CHATML, LLAMA_3, QWEN_3, GEMMA, FILTERS])
def test_metering_changes_no_text(source: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    plain.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    messages = [USER, ANSWER, AGAIN]
    expected = plain.from_string(source).render(
        messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True, tools=None
    )
    assert render(source, messages) == expected


def test_a_block_leaves_no_line_behind() -> None:
    assert render("a\n    {% if true %}\nb\n    {% endif %}\nc", [USER]) == "a\nb\nc"


def test_the_date_is_todays() -> None:
    assert render("{{ strftime_now('%Y') }}", [USER]) in {
        time.strftime("%Y"),
        str(int(time.strftime("%Y")) - 1),
    }


def test_a_long_conversation_stays_within_the_budget() -> None:
    turns = [USER, {"role": "assistant", "content": "word " * 20_000}] * 50
    started = time.perf_counter()
    assert len(render(QWEN_3, [*turns, AGAIN])) > 5_000_000
    assert time.perf_counter() - started < 20


def test_jinja_is_loaded_by_the_first_render_only() -> None:
    program = (
        "import sys; from edge_runtime.engine.chat_template import ChatTemplate; "
        "ChatTemplate('{% if %}', '', ''); print('jinja2' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "holds 0 messages"),
        ("Hi", "messages is a str"),
        (None, "messages is a NoneType"),
        (["Hi"], "message 0 is a str"),
        ([{"role": "user"}], "message 0 has no content"),
        ([USER, {"content": "a"}], "message 1 has no role"),
        ([{"role": "user", "content": None}], "message 0 holds a NoneType"),
        ([{"role": "user", "content": "a", 1: "b"}], "message 0 holds a int"),
        ([{"role": " ", "content": "a"}], "message 0 has an empty role"),
        ([{"role": "user", "content": "a" * (16 * 2**20)}], "at most 16777216"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(CHATML, "", "").render(messages)


def test_variables_are_plain_values() -> None:
    looped: list[Any] = []
    looped.append(looped)
    for value in (object(), {1: 2}, looped, {"a": print}, 2**2000, "a" * (16 * 2**20 + 1)):
        with pytest.raises(ChatTemplateError, match="the variable tools"):
            render(CHATML, [USER], tools=value)
    with pytest.raises(ChatTemplateError, match="the variable bos_token"):
        render(CHATML, [USER], bos_token="x")


def test_any_mapping_is_a_message() -> None:
    class Message(Mapping[str, str]):
        def __getitem__(self, key: str) -> str:
            return dict(USER)[key]

        def __iter__(self) -> Any:
            return iter(USER)

        def __len__(self) -> int:
            return 2

    assert ChatTemplate(CHATML, "", "").render([Message()]) == render(CHATML, [USER])
