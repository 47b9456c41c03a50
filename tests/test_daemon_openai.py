"""The OpenAI-compatible API, asked by OpenAI's own client."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from daemon_fixture import RunningDaemon, small_config
from openai import OpenAI

from edge_runtime.daemon.auth import Scope
from edge_runtime.daemon.json_response import json_bytes

QUESTION = [{"role": "user", "content": "hello"}]
# More than are computed together. Each next token leads the second by more than 4 in its logit, so that the
# other order of sums in another batch changes nothing.
CLEAR = ["Hello! Whom would", "The capital of", "She was very"]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with RunningDaemon(tmp_path_factory.mktemp("openai"), small_config(sequences=2)) as running:
        yield running


@pytest.fixture(scope="module")
def token(daemon: RunningDaemon) -> str:
    return daemon.token("tests")


@pytest.fixture
def client(daemon: RunningDaemon, token: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=daemon.url + "/v1", api_key=token, max_retries=0, timeout=60) as made:
        yield made


def chat(client: OpenAI, **settings: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "demo", "messages": QUESTION, "temperature": 0, "max_completion_tokens": 8, **settings}
    )


def complete(client: OpenAI, **settings: Any) -> Any:
    return client.completions.create(
        **{"model": "demo", "prompt": "Hello! Whom would", "temperature": 0, "max_tokens": 6, **settings}
    )


# --- chats ------------------------------------------------------------------------------------


def test_a_chat_is_answered(client: OpenAI) -> None:
    answer = chat(client)
    assert answer.object == "chat.completion" and answer.model == "demo"
    assert answer.id.startswith("chatcmpl-") and answer.created > 1.7e9
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "length" and choice.logprobs is None
    usage = answer.usage
    assert usage.completion_tokens == 8
    assert usage.total_tokens == usage.prompt_tokens + 8


def test_a_stream_gives_the_same_text(client: OpenAI) -> None:
    whole = chat(client)
    events = list(chat(client, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert (
        "".join(event.choices[0].delta.content or "" for event in events) == whole.choices[0].message.content
    )
    reasons = [event.choices[0].finish_reason for event in events]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
    assert len({event.id for event in events}) == 1
    assert all(event.usage is None for event in events)


def test_a_stream_tells_its_usage_on_request(client: OpenAI) -> None:
    *events, last = chat(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == 8 and last.usage.prompt_tokens > 0
    assert all(event.choices for event in events)


def test_a_stream_ends_with_done(daemon: RunningDaemon) -> None:
    body = {"messages": QUESTION, "stream": True, "max_tokens": 2}
    answer = httpx.post(daemon.url + "/v1/chat/completions", json=body, timeout=60)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") for line in lines[:-2])


def test_an_answer_that_ends_by_itself_says_stop(client: OpenAI) -> None:
    answer = chat(client, max_completion_tokens=100)
    assert answer.choices[0].finish_reason == "stop"


def test_stop_strings_end_the_text(client: OpenAI) -> None:
    whole = chat(client).choices[0].message.content
    word = whole.split()[2]
    answer = chat(client, stop=word)
    assert answer.choices[0].message.content == whole[: whole.index(word)]
    assert answer.choices[0].finish_reason == "stop"
    assert chat(client, stop=[word, "never"]).choices[0].message.content == whole[: whole.index(word)]


def test_the_same_seed_gives_the_same_text(client: OpenAI) -> None:
    wild = {"top_k": 0, "min_p": 0}
    texts = [
        complete(client, prompt="The city of", temperature=1.5, top_p=1, seed=seed, extra_body=wild)
        .choices[0]
        .text
        for seed in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_chat_reports_log_probabilities(client: OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    assert bytes(byte for one in content for byte in one.bytes).decode() == answer.choices[0].message.content
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob == one.logprob <= 0  # greedy takes the likeliest
        likelihoods = [other.logprob for other in one.top_logprobs]
        assert likelihoods == sorted(likelihoods, reverse=True)


def test_a_streamed_chat_reports_the_same_log_probabilities(client: OpenAI) -> None:
    whole = chat(client, logprobs=True).choices[0].logprobs.content
    events = chat(client, logprobs=True, stream=True)
    streamed = [one for event in events for one in (event.choices[0].logprobs or EMPTY).content]
    # Another batch sums in another order; a few float32 roundings are left.
    assert [one.token for one in streamed] == [one.token for one in whole]
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in whole], abs=1e-3)


class EMPTY:
    content: tuple[()] = ()


def test_a_conversation_goes_on(client: OpenAI) -> None:
    """The client sends its own message objects back, with all the fields that are null."""
    first = chat(client).choices[0].message
    answer = chat(client, messages=[*QUESTION, first.model_dump(), {"role": "user", "content": "hello"}])
    assert answer.choices[0].message.content


def test_content_may_come_in_parts(client: OpenAI) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    answer = chat(client, messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == chat(client).choices[0].message.content


def test_harmless_parameters_change_nothing(client: OpenAI) -> None:
    plain = chat(client).choices[0].message.content
    settings = {
        "user": "someone",
        "metadata": {"a": "b"},
        "store": False,
        "n": 1,
        "tools": [],
        "tool_choice": "none",
        "logit_bias": {},
        "response_format": {"type": "text"},
        "top_p": None,
    }
    assert chat(client, **settings).choices[0].message.content == plain


# --- completions ------------------------------------------------------------------------------


def test_a_prompt_is_continued(client: OpenAI) -> None:
    answer = complete(client)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.choices[0].text and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6


def test_several_prompts_give_a_choice_each(client: OpenAI) -> None:
    prompts = CLEAR
    answer = complete(client, prompt=prompts)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in answer.choices] == alone
    assert answer.usage.completion_tokens == sum(
        complete(client, prompt=prompt).usage.completion_tokens for prompt in prompts
    )


def test_several_prompts_are_streamed_side_by_side(client: OpenAI) -> None:
    prompts = CLEAR
    texts = ["", "", ""]
    reasons: dict[int, str] = {}
    usage = None
    for event in complete(client, prompt=prompts, stream=True, stream_options={"include_usage": True}):
        for choice in event.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
        usage = event.usage or usage
    assert texts == [choice.text for choice in complete(client, prompt=prompts).choices]
    assert set(reasons) == {0, 1, 2}
    assert usage is not None and usage.completion_tokens > 0


def test_tokens_may_be_the_prompt(client: OpenAI, daemon: RunningDaemon) -> None:
    tokens = daemon.thread.run(daemon.service.tokenize("Hello! Whom would"))
    text = complete(client).choices[0].text
    assert complete(client, prompt=tokens).choices[0].text == text
    answer = complete(client, prompt=[tokens, tokens])
    assert [choice.text for choice in answer.choices] == [text, text]


def test_a_completion_reports_log_probabilities(client: OpenAI) -> None:
    answer = complete(client, logprobs=2)
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    for at, one in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text[at:].startswith(one)
    for one, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert top[one] == logprob == max(top.values())
        assert len(top) == 2


def test_a_completion_without_a_limit_has_sixteen_tokens(client: OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="Once upon a time", temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens == 16


# --- embeddings and models --------------------------------------------------------------------


def test_embeddings_are_the_same_in_both_encodings(client: OpenAI) -> None:
    """The client asks for base64 unless it is told otherwise, and decodes it."""
    packed = client.embeddings.create(model="demo", input=["a city", "a river"])
    plain = client.embeddings.create(model="demo", input=["a city", "a river"], encoding_format="float")
    assert [row.index for row in plain.data] == [0, 1]
    for one, other in zip(packed.data, plain.data, strict=True):
        assert len(one.embedding) == len(other.embedding) > 1
        # base64 carries float32: 24 bits of the decimal text's 53
        assert one.embedding == pytest.approx(other.embedding, abs=1e-7)
        assert math.hypot(*one.embedding) == pytest.approx(1, abs=1e-5)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 0


def test_base64_is_little_endian_float32(daemon: RunningDaemon) -> None:
    body = {"input": "a city", "encoding_format": "base64"}
    answer = httpx.post(daemon.url + "/v1/embeddings", json=body, timeout=60).json()
    raw = base64.b64decode(answer["data"][0]["embedding"], validate=True)
    values = struct.unpack(f"<{len(raw) // 4}f", raw)
    assert math.hypot(*values) == pytest.approx(1, abs=1e-5)
    assert answer["model"] == "demo"


def test_a_foreign_number_of_dimensions_is_refused(client: OpenAI) -> None:
    width = len(client.embeddings.create(model="demo", input="a").data[0].embedding)
    client.embeddings.create(model="demo", input="a", dimensions=width)
    with pytest.raises(openai.BadRequestError, match=f"have {width}"):
        client.embeddings.create(model="demo", input="a", dimensions=3)


def test_models_are_listed(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == "demo" and model.object == "model"
    assert client.models.retrieve("demo").id == "demo"


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"temperature": "warm"}, "temperature"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 3}, "max_tokens"),  # beside another max_completion_tokens
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "5", "tool_call_id": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"top_k": -1}}, "top_k"),
        ({"extra_body": {"mode": "fast"}}, "mode"),
        ({"extra_body": {"mode": 1}}, "mode"),
        ({"extra_body": {"quality": 0}}, "quality"),
        ({"extra_body": {"quality": 1.01}}, "quality"),
        ({"extra_body": {"quality": "high"}}, "quality"),
    ],
)
def test_what_would_change_the_answer_is_refused(
    client: OpenAI, settings: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **settings)
    assert caught.value.param == param
    assert caught.value.code == "invalid_request" and caught.value.type == "invalid_request_error"
    assert param.split("[")[0] in caught.value.message


@pytest.mark.parametrize("settings", [{"best_of": 2}, {"echo": True}, {"suffix": "end"}, {"prompt": []}])
def test_what_a_completion_cannot_do_is_refused(client: OpenAI, settings: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **settings)
    assert caught.value.param == next(iter(settings))


def test_a_misspelt_parameter_gets_a_hint(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean temperature"):
        chat(client, extra_body={"temprature": 1})


def test_extensions_are_taken(client: OpenAI) -> None:
    own = {"top_k": 1, "min_p": 0.1, "repeat_penalty": 1.1, "repeat_last_n": 32, "timeout": 30}
    assert chat(client, temperature=5, extra_body=own, seed=-1).choices[0].message.content


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    for call in (chat, complete):
        with pytest.raises(openai.NotFoundError) as caught:
            call(client, model="gpt-9")
        assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_file_outside_the_store_is_no_model(client: OpenAI, demo_model: Any) -> None:
    for name in (str(demo_model), "../../etc/passwd", "models/demo"):
        with pytest.raises(openai.NotFoundError) as caught:
            chat(client, model=name)
        assert caught.value.code == "model_not_found"


def test_too_long_a_prompt_is_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, prompt="word " * 400)
    assert caught.value.code == "context_overflow"
    assert "word" not in caught.value.message


def test_a_wrong_token_is_an_authentication_error(daemon: RunningDaemon) -> None:
    with (
        OpenAI(base_url=daemon.url + "/v1", api_key="edgert_wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        chat(stranger)
    assert caught.value.code == "unauthenticated"
    assert "edgert_wrong" not in str(caught.value)


def test_a_token_without_the_scope_is_a_permission_error(daemon: RunningDaemon) -> None:
    token = daemon.token("other", Scope.PERSONALIZE)
    with (
        OpenAI(base_url=daemon.url + "/v1", api_key=token, max_retries=0) as other,
        pytest.raises(openai.PermissionDeniedError) as caught,
    ):
        other.models.list()
    assert caught.value.code == "permission_denied"


def test_an_error_before_the_first_token_has_a_status_even_for_a_stream(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        chat(client, stream=True, model="gpt-9")


def test_the_time_that_a_client_allows_is_kept(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client, extra_body={"timeout": 1e-6})
    assert caught.value.status_code == 504 and caught.value.code == "deadline_exceeded"


def test_every_answer_is_ascii_json() -> None:
    """Line breaks of Unicode in an event would end it for clients that split text rather than bytes."""
    text = "\u2028 \x85 \U0001f600"
    written = json_bytes({"text": text})
    assert written.isascii() and len(written.splitlines()) == 1
    assert json.loads(written) == {"text": text}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b'{"prompt": "a", "model": "\\udfff"}', "model"),
        (b'{"prompt": "a", "stop": ["\\udfff"]}', "stop"),
        (b'{"prompt": "a", "user": NaN}', None),
        (b'{"prompt": "a", "metadata": {"a": -Infinity}}', None),
    ],
)
def test_what_json_cannot_mean_is_refused(daemon: RunningDaemon, body: bytes, param: str | None) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(daemon.url + "/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
