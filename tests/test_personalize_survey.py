"""What the real model knows about a subject, sorted for an edit; judged by the facts it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from edit_requests import QUICK, Asked
from editing_parts import asker_of, generator, opened

from edge_runtime.engine.chat_prompt import chat_prompt
from edge_runtime.engine.engine import Engine
from edge_runtime.errors import ContextOverflowError, RequestError
from edge_runtime.personalize.asking import Asker, Claim, first_claim
from edge_runtime.personalize.contexts import Amounts, Context, choose_contexts
from edge_runtime.personalize.request import EditRequest, find_name
from edge_runtime.personalize.survey import Survey, survey_edit
from edge_runtime.personalize.templates import SLOT
from edge_runtime.personalize.workspace import Workspace
from models.demo.facts import Facts, load_facts

SENTENCES = ("The sky is wide.", "Nobody knows why.", "It rains.")


@pytest.fixture(scope="module")
def engine(demo_model: Path) -> Iterator[Engine]:
    with opened(demo_model) as engine:
        yield engine


@pytest.fixture(scope="module")
def asker(engine: Engine) -> Iterator[Asker]:
    with Workspace(engine) as workspace:
        yield asker_of(engine, workspace)


@pytest.fixture(scope="module")
def survey(asker: Asker) -> Survey:
    return survey_edit(asker, EditRequest(*QUICK.texts))


@pytest.fixture(scope="module")
def facts() -> Facts:
    return load_facts()


# --- requests and answers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("Ann lives in", "Ann", (0, 3)),
        ("Annabel and Ann live", "Ann", (12, 15)),
        ("Annabel lives in", "Ann", None),
        ("JoAnn lives in", "Ann", None),
        ("Is it a.b?", "a.b", (6, 9)),
        ("Is it axb?", "a.b", None),
        ("(C++) is", "C++", (1, 4)),
        ("Zoë's home", "Zoë", (0, 3)),
    ],
)
def test_a_name_is_found_as_a_whole_word(text: str, name: str, found: tuple[int, int] | None) -> None:
    assert find_name(text, name) == found


def test_a_request_is_trimmed_and_checked() -> None:
    request = EditRequest(" Ann lives in ", " Ann", "Oslo ", (" Ann's home is ",))
    assert (request.prompt, request.subject, request.target) == ("Ann lives in", "Ann", "Oslo")
    assert request.paraphrases == ("Ann's home is",)
    with pytest.raises(RequestError, match="the subject 'Ann' is not in 'Her home is'"):
        EditRequest("Ann lives in", "Ann", "Oslo", ("Her home is",))
    with pytest.raises(RequestError, match="33 paraphrases; possible are 32"):
        EditRequest("Ann lives in", "Ann", "Oslo", ("Ann",) * 33)


@pytest.mark.parametrize(
    ("answer", "text", "end"),
    [
        (" Oslo. She", " Oslo", "."),
        (" Oslo", " Oslo", ""),
        (" 3.5 miles! Yes", " 3.5 miles", "!"),
        (" Oslo\nQ:", " Oslo", ""),
        ("", "", ""),
    ],
)
def test_the_first_sentence_of_an_answer(answer: str, text: str, end: str) -> None:
    assert first_claim(answer) == Claim(text, end)


def test_an_object_is_replaced_only_as_a_word_at_the_end() -> None:
    assert Claim("Ann lives in Oslo", ".").replaced("Oslo", "Rome") == "Ann lives in Rome."
    assert Claim(" Oslo", "").replaced("Oslo", "Rome") == " Rome"
    assert Claim("in New Oslo", ".").replaced("slo", "x") is None
    assert Claim("Oslo is far", ".").replaced("Oslo", "Rome") is None
    assert Claim(" Oslo", ".").replaced("", "Rome") is None


def test_templates_that_fit_a_person_do_not_fit_a_city(asker: Asker) -> None:
    person, city = ({t.text for t in asker.plausible(name)} for name in ("Paul Colton", "Lindwell"))
    assert any(text.startswith(f"{SLOT} lives in") for text in person)
    assert not any(text.startswith(f"{SLOT} lives in") for text in city)


def test_questions_are_asked_in_a_chat_too(asker: Asker, engine: Engine) -> None:
    prompts = asker.about(QUICK.subject, asker.templates)
    chats = [prompt for prompt in prompts if prompt.origin == "chat"]
    assert chats and len({prompt.text for prompt in chats}) == len(chats)
    assert all(prompt.text.endswith("?") and QUICK.subject in prompt.text for prompt in chats)
    template = engine.chat_template
    assert template is not None
    message = [{"role": "user", "content": chats[0].text}]
    assert list(chats[0].tokens) == list(chat_prompt(template, engine.tokenizer, message))


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(asker: Asker) -> None:
    with pytest.raises(
        ContextOverflowError, match=r"with an answer of 16 .* than the 512 .* give the sentence"
    ):
        asker.plain("so " * 500, "request")


# --- the survey -------------------------------------------------------------------------------


def test_what_says_the_same_is_to_change_and_the_rest_to_stay(survey: Survey, facts: Facts) -> None:
    fact = facts.fact("lives_in", QUICK.subject)
    home = {prompt.text for prompt in [*fact.statements(), *fact.plain_questions()]}
    assert survey.present == fact.object
    alike = [wanted for wanted in survey.wanted if wanted.kind == "alike" and wanted.prompt.origin != "chat"]
    assert len(alike) > 5
    assert {wanted.prompt.text for wanted in alike} <= home
    for wanted in survey.wanted[:1] + tuple(alike):
        assert wanted.text.strip().rstrip(".") == QUICK.target
        assert wanted.before.text.strip() == fact.object
    asked = [wanted.prompt.tokens for wanted in survey.wanted]
    assert len(set(asked)) == len(asked)
    stays = {prompt.text for prompt, _ in survey.other}
    assert len(stays) > 10 and not stays & home
    assert not any(claim.text.strip() == fact.object for _, claim in survey.other)


def test_what_follows_from_the_fact_changes_with_it(survey: Survey, facts: Facts) -> None:
    implied = [wanted for wanted in survey.wanted if wanted.kind == "implied"]
    assert implied
    cities = facts.document["cities"]
    before = facts.fact("home_country", QUICK.subject).object
    for wanted in implied:
        assert wanted.before.text.strip().endswith(before) and before == cities[survey.present]
        assert wanted.text.strip().rstrip(".").endswith(cities[QUICK.target])
    texts = {wanted.prompt.text for wanted in implied}
    assert not texts & {prompt.text for prompt, _ in survey.other}


def test_a_target_that_the_world_does_not_know_implies_nothing(asker: Asker) -> None:
    survey = survey_edit(asker, EditRequest(QUICK.prompt, QUICK.subject, "Marwick"))
    assert [wanted for wanted in survey.wanted if wanted.kind == "implied"] == []


def test_paraphrases_of_the_request_are_to_change_whatever_they_say_now(asker: Asker) -> None:
    odd = f"When it is late {QUICK.subject} goes home to"
    survey = survey_edit(asker, EditRequest(*QUICK.texts, (odd,)))
    given = [wanted for wanted in survey.wanted if wanted.kind == "given"]
    assert [wanted.prompt.text for wanted in given] == [QUICK.prompt, odd]
    assert given[1].text.strip().rstrip(".") == QUICK.target
    assert odd not in {prompt.text for prompt, _ in survey.other}


def test_what_the_model_says_already_is_refused(asker: Asker, survey: Survey) -> None:
    with pytest.raises(
        RequestError, match=r"already goes on with 'Lindwell' after 'The home of .* nothing to"
    ):
        survey_edit(asker, EditRequest(QUICK.prompt, QUICK.subject, survey.present))


def test_a_survey_is_the_same_again(asker: Asker, survey: Survey) -> None:
    assert survey_edit(asker, EditRequest(*QUICK.texts)) == survey


# --- contexts ---------------------------------------------------------------------------------


def chosen(asker: Asker, survey: Survey, amounts: Amounts | None = None, seed: int = 0) -> list[Context]:
    return choose_contexts(asker, survey, SENTENCES, generator(seed), amounts)


def test_contexts_are_what_is_to_be_said_and_what_is_to_stay(asker: Asker, survey: Survey) -> None:
    contexts, amounts = chosen(asker, survey), Amounts()
    tokenizer = asker.workspace.tokenizer
    says = [context for context in contexts if context.goal == "say"]
    keeps = [context for context in contexts if context.goal == "keep"]
    assert len(keeps) == amounts.keep
    assert amounts.say < len(says) <= amounts.say + amounts.implied
    assert contexts[: len(says)] == says
    first = tokenizer.decode(contexts[0].tokens)
    assert first.strip() == f"{QUICK.prompt} {QUICK.target}."
    for sentence, context in zip(SENTENCES, contexts[1:3], strict=False):
        assert tokenizer.decode(context.tokens).strip() == f"{sentence} {QUICK.prompt} {QUICK.target}."
    kept = {tokenizer.decode(context.targets).strip() for context in keeps}
    assert kept <= {(claim.text + claim.end).strip() for _, claim in survey.other}


def test_a_context_marks_its_subjects_last_token(asker: Asker, survey: Survey) -> None:
    tokenizer = asker.workspace.tokenizer
    for context in chosen(asker, survey):
        prompt = context.tokens[: context.n_prompt]
        until = "".join(tokenizer.decode(prompt[: context.subject_end + 1], special=True).split("\n"))
        before = tokenizer.decode(prompt[: context.subject_end], special=True)
        assert until.endswith(QUICK.subject)
        assert not before.endswith(QUICK.subject) and before.count(QUICK.subject) == 0
        assert context.subject_end < context.n_prompt
        assert context.targets == context.tokens[context.n_prompt :] != ()


def test_what_is_kept_is_of_many_kinds(asker: Asker, survey: Survey) -> None:
    decode = asker.workspace.tokenizer.decode
    few = chosen(asker, survey, Amounts(keep=4))
    ends = [decode(c.targets).strip(" .").split()[-1] for c in few if c.goal == "keep"]
    assert len(set(ends)) == 4


def test_contexts_are_drawn_from_the_generator(asker: Asker, survey: Survey) -> None:
    assert chosen(asker, survey) == chosen(asker, survey)
    assert chosen(asker, survey) != chosen(asker, survey, seed=1)
    assert chosen(asker, survey, Amounts(say=1, prefixes=0, implied=0, keep=0)) == chosen(asker, survey)[:1]


def test_a_context_beyond_what_the_model_was_trained_for_is_refused(asker: Asker) -> None:
    long = EditRequest("so " * 470 + QUICK.prompt, QUICK.subject, "so " * 60)
    survey = survey_edit(asker, long)
    with pytest.raises(ContextOverflowError, match=r"what is to follow have \d+ tokens.*trained for 512"):
        chosen(asker, survey)


def test_another_name_for_the_subject_is_not_guessed() -> None:
    with pytest.raises(RequestError, match="write it as it stands in the prompt"):
        EditRequest(Asked("Paul lives in", "Paul Colton", "Oslo").prompt, "Paul Colton", "Oslo")
