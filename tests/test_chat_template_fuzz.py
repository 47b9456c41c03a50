"""Any chat template gives a text or the error, whatever is put together from the language's parts."""

from __future__ import annotations

import contextlib

from chat_template_sources import ANSWER, SYSTEM, USER, render
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.engine.chat_template import ChatTemplate
from edge_runtime.errors import ChatTemplateError

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
