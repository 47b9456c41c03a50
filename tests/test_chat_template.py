"""Chat templates: the prompts of published shapes, and that no template hangs or leaves its sandbox."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.engine.chat_template import MAX_SOURCE_CHARACTERS, ChatTemplate
from edge_runtime.errors import ChatTemplateError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " Hi "}
ANSWER = {"role": "assistant", "content": "Hello."}
AGAIN = {"role": "user", "content": "And?"}

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA_2 = """{% if messages[0]['role'] == 'system' %}
{% set conversation = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}
{% set conversation = messages %}{% set system = false %}
{% endif %}
{% for message in conversation %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.first and system is not false %}
{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}
{% set content = message['content'] %}
{% endif %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{{ ' ' + content.strip() + ' ' + eos_token }}
{%- endif %}
{% endfor %}"""

LLAMA_3 = """{{- bos_token }}
{%- set date = date_string if date_string is defined else '26 Jul 2024' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{{- "Today Date: " + date + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN_3 = """{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- macro turn(role, content) -%}
    {{- '<|im_start|>' ~ role ~ '\\n' ~ content ~ '<|im_end|>\\n' -}}
{%- endmacro -%}
{%- for message in messages %}
    {%- if message.role in ("user", "system") %}
        {{- turn(message.role, message.content) }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- turn('assistant', content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ '<|assistant|>
'  + message['content'] + eos_token }}{% endgeneration %}

{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}\
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}\
{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""

FILTERS = """{% for role, group in [('user', messages|selectattr('role', 'equalto', 'user')|list),
                  ('assistant', messages|rejectattr('role', 'equalto', 'user')|list)] %}
{{ role }}={{ group|map(attribute='content')|map('trim')|join(', ') }}|{{ group|length }}|\
{{ (group|first).content|default('none', true)|upper|replace('H', 'J')|tojson }}
{% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}{{ messages[0]|tojson(indent=1) }}\
{{ '%s-%05.2f' % ('é', 2.5) }}{{ {'a': [1, 'b']}|items|list }}"""


def render(source: str, messages: list[dict[str, str]], **arguments: Any) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, **arguments)


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


BIG = "{% set x = 'a' * 1000000 %}"  # a tenth of what the budget allows
DOUBLED = (
    "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ END }}"
)


def doubled(start: str, step: str, end: str) -> str:
    return DOUBLED.replace("START", start).replace("STEP", step).replace("END", end)


HOSTILE = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}a{% endfor %}"
    "{% endfor %}",
    "loop condition": "{% for i in range(99999) if range(99999)|list|length == 3 %}{% endfor %}",
    "loop condition that never holds": "{% set r = range(99999) %}{% for j in r %}{% for i in r if false %}"
    "{% endfor %}{% endfor %}",
    "recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "repeated string": "{{ 'a' * 10**9 }}",
    "repeated list": "{{ 10**9 * [1] }}",
    "power": "{{ (9**64)**64 }}",
    "power of a float": "{{ 10.0**400 }}",
    "squares": doubled("3", "ns.x * ns.x", "ns.x"),
    "doubled by ~": doubled("'a'", "ns.x ~ ns.x", "ns.x"),
    "doubled by +": doubled("'a'", "ns.x + ns.x", "ns.x"),
    "doubled by join": doubled("'a'", "[ns.x, ns.x]|join", "ns.x"),
    "doubled by %": doubled("'a'", "'%s%s' % (ns.x, ns.x)", "ns.x"),
    "tower shown": doubled("[1]", "[ns.x, ns.x]", "ns.x"),
    "tower compared": doubled("[1]", "[ns.x, ns.x]", "ns.x == ns.x[:]"),
    "tower tested": doubled("[1]", "[ns.x, ns.x]", "ns.x is eq ns.x[:]"),
    "tower as a key": doubled("(1,)", "(ns.x, ns.x)", "{ns.x: 1}"),
    "tower looked up": doubled("(1,)", "(ns.x, ns.x)", "messages[0][ns.x]"),
    "tower got": doubled("(1,)", "(ns.x, ns.x)", "{}.get(ns.x)"),
    "tower as json": doubled("[1]", "[ns.x, ns.x]", "ns.x|tojson"),
    "tower sorted": doubled("[1]", "[ns.x, ns.x]", "[ns.x, ns.x[:]]|sort|length"),
    "deep tuple hashed": "{% set ns = namespace(x=(1,)) %}{% for i in range(50000) %}{% set ns.x = (ns.x,) %}"
    "{% endfor %}{{ {ns.x: 1} }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "center": "{{ 'a'|center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "printf": "{{ '%999999999d' % 1 }}",
    "printf *": "{{ '%*d' % (999999999, 1) }}",
    "printf precision": "{{ '%.999999999f' % 1 }}",
    "printf by filter": "{{ '%999999999d'|format(1) }}",
    "printf nested key": "{{ '%((a))999999999d' % {'(a)': 1} }}",
    "printf many": BIG + "{{ ('%(a)s' * 10000) % {'a': x} }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "format_map": "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "replace": BIG + "{{ x.replace('a', x) }}",
    "replace filter": BIG + "{{ x|replace('', x) }}",
    "join": BIG + "{{ x|join(x) }}",
    "join method": BIG + "{{ x.join(x) }}",
    "indent": "{{ ('\n' * 100000)|indent('a' * 100000) }}",
    "json indent": "{{ ([1] * 100000)|tojson(indent=10**9) }}",
    "json separators": "{{ ([1] * 10000)|tojson(separators=('a' * 10000, ':')) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "round": "{{ 1.5|round(10**9, 'ceil') }}",
    "sum of lists": "{{ ([[1]] * 10000)|sum(start=[]) }}",
    "many slices": BIG + "{{ [" + "x[:-1]," * 3000 + "]|length }}",
    "many searches": BIG + "{{ [" + "'b' in x," * 4000 + "]|length }}",
    "much text in a macro": BIG + "{% macro f() %}" + "{{ x }}" * 5000 + "{% endmacro %}{{ f()|length }}",
    "much plain text in a macro": "{% macro f() %}{% for i in range(99999) %}"
    + "x" * 100_000
    + "{% endfor %}{% endmacro %}{{ f()|length }}",
    "lazy filters": "{% for i in range(99999) %}{{ range(99999)|map('string')|first }}{% endfor %}",
    "bytes": "{{ (1).to_bytes(10**9) }}",
    "date": "{{ strftime_now('%999999999d') }}",
}

BROKEN = {
    "syntax": "{% if %}",
    "undefined": "{{ nope() }}",
    "attribute of undefined": "{{ nope.a.b }}",
    "filter": "{{ 1|nope }}",
    "division": "{{ 1 / 0 }}",
    "break outside a loop": "{% break %}",
    "deep parentheses": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "deep lists": "{{ " + "[" * 5_000 + "]" * 5_000 + " }}",
    "deep loops": "{% for a in b %}" * 30 + "{% endfor %}" * 30,
    "deep conditions": "{% if a %}" * 6000 + "{% endif %}" * 6000,
    "long chain": "{% if a %}" + "{% elif b %}" * 10_000 + "{% endif %}",
    "long expression": "{{ " + "+".join(["1"] * 40_000) + " }}",
    "long not": "{{ " + "not " * 30_000 + "1 }}",
    "long number": "{{ " + "9" * 100_000 + " }}",
    "unfinished": "{{ '" * 40_000,
    "comment": "{#" * 60_000,
    "many parts": "{{a.b}}" * 15_000,
    "too long": "a" * (MAX_SOURCE_CHARACTERS + 1),
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__.os }}",
    "globals by attribute name": "{{ messages|map(attribute='__class__')|list|string }}{{ ''.__class__() }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "escaping": "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "change of a list": "{{ messages.append(1) }}",
    "change of a message": "{{ messages[0].update({'role': 'x'}) }}",
    "refusal": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("source", [*HOSTILE.values(), *BROKEN.values()], ids=[*HOSTILE, *BROKEN])
def test_a_hostile_or_broken_template_fails_soon(source: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ChatTemplateError) as raised:
        render(source, [USER])
    assert time.perf_counter() - started < 10  # measured: 0.6 s at most, on one core
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_hostile_templates_take_little_memory() -> None:
    program = """
import resource, sys
from test_chat_template import HOSTILE, USER, render
from edge_runtime.errors import ChatTemplateError
resource.setrlimit(resource.RLIMIT_AS, (512 * 2**20, 512 * 2**20))
for source in HOSTILE.values():
    try:
        render(source, [USER])
    except ChatTemplateError as error:
        assert "MemoryError" not in str(error), source
        assert "parts" not in str(error), source
"""
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)


def test_a_large_value_by_itself_is_within_the_budget() -> None:
    assert render(BIG + "{{ x|length }}", [USER]) == "1000000"


def test_namespaces_that_hold_each_other_are_shown_without_their_content() -> None:
    assert render(doubled("0", "namespace(a=ns.x, b=ns.x)", "ns.x"), [USER]) == "<namespace>"


def test_values_nested_too_deep_for_the_stack_are_refused() -> None:
    with pytest.raises(ChatTemplateError, match="nested more than 64 deep"):
        render(HOSTILE["deep tuple hashed"].replace("50000", "5000"), [USER])


def test_a_failing_line_is_named() -> None:
    with pytest.raises(ChatTemplateError, match=r"cannot be compiled at its line 3 \(TemplateSyntaxError"):
        render("a\nb\n{% nope %}", [USER])


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


ATOMS = """messages messages[0] message.role message['content'] 'a' 'é\\n' 7 0 2.5 true none [] [1,'b']
{'k':messages} loop.index range(9) range(99999) ns ns.x x f bos_token undefined tools strftime_now('%d')
(1,2)"""
FILTER_CALLS = """length list first last join upper trim tojson string int float sort unique reverse items sum
max min default('q') replace('a','bb') map('upper') map(attribute='role') select selectattr('role') indent(2)
round escape safe title truncate(3) dictsort abs wordcount capitalize"""

_atoms = st.sampled_from(ATOMS.split())
_filters = st.sampled_from(FILTER_CALLS.split())
_operators = st.sampled_from(
    ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "is", "|"]
)


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("({} {} {})".format, inner, _operators, inner),
        st.builds("({}|{})".format, inner, _filters),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("{}[{}:]".format, inner, inner),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("f({})".format, inner),
        st.builds("({}).split({})".format, inner, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("({} is defined)".format, inner),
    )


_expressions = st.recursive(_atoms, _larger, max_leaves=6)


def _bodies(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("{{% for message in {} %}}{}{{% endfor %}}".format, _expressions, inner),
        st.builds(
            "{{% for x in {} if {} %}}{}{{% else %}}-{{% endfor %}}".format, _expressions, _expressions, inner
        ),
        st.builds("{{% if {} %}}{}{{% elif {} %}}e{{% endif %}}".format, _expressions, inner, _expressions),
        st.builds("{{% macro f(x) %}}{}{{% endmacro %}}".format, inner),
        st.builds("{{% set x %}}{}{{% endset %}}".format, inner),
        st.builds("{{% set ns = namespace(x={}) %}}{}".format, _expressions, inner),
        st.builds("{{% generation %}}{}{{% endgeneration %}}".format, inner),
    )


_pieces = st.one_of(
    st.builds("{{{{ {} }}}}".format, _expressions),
    st.builds("{{% set x = {} %}}".format, _expressions),
    st.builds("{{% set ns.x = {} %}}".format, _expressions),
    st.sampled_from(
        ["text\n", "{% break %}", "{% continue %}", "{{", "%}", "{# c #}", "{%- raw %}{{{% endraw %}"]
    ),
)
_templates = st.recursive(_pieces, _bodies, max_leaves=8)


@settings(max_examples=400, deadline=10_000, suppress_health_check=[HealthCheck.too_slow])
@given(_templates)
def test_any_template_gives_a_text_or_the_error_in_bounded_time(source: str) -> None:
    template = ChatTemplate(source, "<s>", "</s>")
    try:
        text = template.render([SYSTEM, USER, ANSWER])
    except ChatTemplateError as error:
        # Python's own mistakes in the sandbox's code would look like this.
        assert "types.UnionType" not in str(error)
        assert "_BoundedEnvironment" not in str(error)
    else:
        assert isinstance(text, str)


@settings(max_examples=200, deadline=10_000)
@given(st.text(alphabet="{}%#-| \n'\"()[].,ax1~*+=", max_size=60))
def test_any_text_is_a_template_or_the_error(source: str) -> None:
    with contextlib.suppress(ChatTemplateError):
        assert isinstance(render(source, [USER]), str)
