"""The same prompt to base and unlearned, from one model."""

import copy
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from inline_snapshot import snapshot
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_rmu.chat.conversation import (
    SIDES,
    Sampling,
    Turn,
    as_json,
    as_markdown,
    check_sampling,
    messages_of,
    parting,
)
from lowmem_rmu.chat.generation import answer, both_sides, encode_prompt
from lowmem_rmu.chat.session import ChatModel
from lowmem_rmu.config.schema import ModelSettings, Rmu
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import add_adapter
from lowmem_rmu.model.loading import load_model
from tests.texts import plain

CPU = torch.device("cpu")
PROMPT = "Which gate is locked?"
ASKED = [{"role": "user", "content": PROMPT}]
IDS = torch.arange(5, 21).reshape(1, 16)


def settings_of(folder: Path) -> ModelSettings:
    return ModelSettings(name=str(folder), quantisation="none", dtype="float32")


@pytest.fixture(scope="module")
def base(small_model_folder: Path) -> PreTrainedModel:
    """The model without any adapter."""
    return load_model(settings_of(small_model_folder), CPU)


@pytest.fixture
def adapted(small_model_folder: Path) -> PeftModel:
    """A model whose adapter does something."""
    settings = settings_of(small_model_folder)
    model = add_adapter(
        load_model(settings, CPU), Rmu(target_layer=3, adapter_layers=[2, 3], rank=4), settings
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_the_chat_template_is_used(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [*ASKED, {"role": "assistant", "content": "None."}, {"role": "user", "content": "Sure?"}]
    shown = tokenizer.decode(encode_prompt(tokenizer, messages)[0])
    eos = tokenizer.eos_token
    assert (
        shown.removeprefix("<s>")
        == f"<|user|>\n{PROMPT}{eos}\n<|assistant|>\nNone.{eos}\n<|user|>\nSure?{eos}\n<|assistant|>\n"
    )


def test_without_a_template_the_last_message_is_plain_text(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [*ASKED, {"role": "user", "content": "Sure?"}]
    assert encode_prompt(with_template(tokenizer, None), messages).tolist() == [
        tokenizer("Sure?")["input_ids"]
    ]


@pytest.mark.parametrize("start", ["", "{{ bos_token }}"], ids=["a template without", "a template with"])
def test_the_start_token_is_there_once(tokenizer: PreTrainedTokenizerBase, start: str) -> None:
    ids = encode_prompt(with_template(tokenizer, start + "{{ messages[0]['content'] }}"), ASKED)
    assert ids.tolist() == [tokenizer(PROMPT)["input_ids"]]
    assert (ids == tokenizer.bos_token_id).sum() == 1
    assert ids[0, 0] == tokenizer.bos_token_id


def test_the_answer_is_greedy(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode_prompt(tokenizer, ASKED)
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, base(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert tokenizer.eos_token_id not in ids[0, start:]
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    torch.manual_seed(1)
    assert answer(base, tokenizer, ASKED, Sampling(max_new_tokens=8)) == expected
    assert expected


def test_streamed_pieces_make_up_the_answer(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    pieces: list[str] = []
    whole = answer(base, tokenizer, ASKED, Sampling(max_new_tokens=24), pieces.append)
    assert "".join(pieces).strip() == whole
    assert len([piece for piece in pieces if piece]) > 1
    assert PROMPT not in "".join(pieces)


def test_base_answers_as_the_model_without_any_adapter_does(
    base: PreTrainedModel, adapted: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    answers = dict(
        both_sides(adapted, tokenizer, PROMPT, Sampling(max_new_tokens=16), lambda side, piece: None)
    )
    assert list(answers) == ["base", "unlearned"]
    assert answers["base"] == answer(base, tokenizer, ASKED, Sampling(max_new_tokens=16))
    assert answers["unlearned"] == answer(adapted, tokenizer, ASKED, Sampling(max_new_tokens=16))
    assert answers["unlearned"] != answers["base"]


def test_every_piece_goes_to_its_side(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    heard: list[tuple[str, str]] = []
    answers = dict(
        both_sides(
            adapted,
            tokenizer,
            PROMPT,
            Sampling(max_new_tokens=16),
            lambda side, piece: heard.append((side, piece)),
        )
    )
    for side in ("base", "unlearned"):
        assert "".join(piece for to, piece in heard if to == side).strip() == answers[side]
    assert [side for side, _ in heard] == sorted(side for side, _ in heard)  # one after the other, base first


@pytest.mark.parametrize("how", ["to the end", "closed early", "failed"])
def test_the_adapter_is_on_again_afterwards(
    adapted: PeftModel, tokenizer: PreTrainedTokenizerBase, how: str
) -> None:
    """Trap 10: on and off is global to the model."""
    before = adapted(IDS).logits

    def write(side: str, piece: str) -> None:
        if how == "failed":
            raise ConnectionError

    sides = both_sides(adapted, tokenizer, PROMPT, Sampling(max_new_tokens=4), write)
    if how == "to the end":
        assert len(list(sides)) == 2
    elif how == "closed early":
        assert next(sides)[0] == "base"
        sides.close()
    else:
        with pytest.raises(ConnectionError):
            next(sides)
    assert torch.equal(adapted(IDS).logits, before)


GREEDY = Sampling(max_new_tokens=8)
LONG = Sampling(max_new_tokens=200)
TURN = Turn("First?", "of base", "of unlearned", GREEDY)


@pytest.fixture
def chat(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase) -> ChatModel:
    return ChatModel("a-run", "a/model", adapted, tokenizer)


def answering_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_answer_into" in thread.name]


def test_each_side_knows_its_own_answers_only() -> None:
    for side in SIDES:
        messages = messages_of(side, [TURN], "Second?", "Be brief.")
        assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
        assert [message["content"] for message in messages] == [
            "Be brief.",
            "First?",
            f"of {side}",
            "Second?",
        ]
    assert messages_of("base", [], PROMPT, "  ") == ASKED


def test_a_conversation_goes_on_from_what_each_side_said(
    chat: ChatModel, adapted: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    first = Turn(PROMPT, **chat.answers(PROMPT, GREEDY), sampling=GREEDY)
    second = chat.answers("Sure?", GREEDY, [first])
    assert second["unlearned"] == answer(
        adapted, tokenizer, messages_of("unlearned", [first], "Sure?"), GREEDY
    )
    with adapted.disable_adapter():
        assert second["base"] == answer(adapted, tokenizer, messages_of("base", [first], "Sure?"), GREEDY)


def test_the_stream_gives_growing_answers_one_side_after_the_other(chat: ChatModel) -> None:
    pieces = list(chat.stream(PROMPT, Sampling(max_new_tokens=24), Event()))
    assert [side for side, _ in pieces] == sorted(side for side, _ in pieces)
    for side in SIDES:
        texts = [text for each, text in pieces if each == side]
        assert len(texts) > 2
        assert all(
            later.startswith(earlier.rstrip()) for earlier, later in zip(texts, texts[1:], strict=False)
        )
    assert dict(pieces) == chat.answers(PROMPT, Sampling(max_new_tokens=24))


def test_a_seed_gives_the_same_answer_again_and_leaves_other_draws_alone(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    drawn = Sampling(max_new_tokens=16, temperature=1.5, seed=3)
    state = torch.random.get_rng_state()
    first = answer(base, tokenizer, ASKED, drawn)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert answer(base, tokenizer, ASKED, drawn) == first
    assert answer(base, tokenizer, ASKED, replace(drawn, seed=4)) != first
    assert answer(base, tokenizer, ASKED, replace(drawn, temperature=0)) != first


@pytest.mark.parametrize("how", ["stopped", "closed", "unloaded"])
def test_an_answer_ends_in_the_middle_and_the_adapter_is_on_again(
    chat: ChatModel, adapted: PeftModel, how: str
) -> None:
    before, stop = adapted(IDS).logits, Event()
    stream = chat.stream(PROMPT, LONG, stop)
    assert next(stream)[0] == "base"
    if how == "closed":
        stream.close()
    else:
        stop.set() if how == "stopped" else chat.close()
        rest = list(stream)
        assert {side for side, _ in rest} <= {"base"}, "unlearned is not asked any more"
    assert not answering_threads()
    assert torch.equal(adapted(IDS).logits, before)
    if how == "unloaded":
        with pytest.raises(UserError) as caught:
            chat.answers(PROMPT, GREEDY)
        assert plain(caught.value) == snapshot(
            "The chat model was unloaded meanwhile.\nSend the prompt again: that loads it again."
        )
    else:
        assert chat.answers(PROMPT, GREEDY)["base"]


def test_an_error_while_answering_reaches_who_asked(chat: ChatModel, adapted: PeftModel) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError

    hook = adapted.register_forward_pre_hook(fail)
    inner = adapted.get_base_model().register_forward_pre_hook(fail)
    with pytest.raises(ConnectionError):
        list(chat.stream(PROMPT, GREEDY, Event()))
    hook.remove()
    inner.remove()
    assert len(set(chat.answers(PROMPT, GREEDY).values())) == 2, (
        "the lock is free and the adapter is on again"
    )


def test_one_answer_at_a_time(chat: ChatModel) -> None:
    alone = chat.answers(PROMPT, LONG)
    results: dict[int, dict[str, str]] = {}

    def ask(number: int) -> None:
        results[number] = dict(chat.stream(PROMPT, LONG, Event()))

    threads = [threading.Thread(target=ask, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {1: alone, 2: alone}, "neither saw the other's side of the adapter"


def test_who_waits_for_the_turn_can_be_stopped(chat: ChatModel) -> None:
    first = chat.stream(PROMPT, LONG, Event())
    next(first)
    stop = Event()
    stop.set()
    begun = time.monotonic()
    assert list(chat.stream(PROMPT, LONG, stop)) == []
    assert time.monotonic() - begun < 2
    first.close()


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        (
            " ",
            GREEDY,
            snapshot("The prompt is empty.\nType a question, or choose one of the suggested prompts."),
        ),
        (
            PROMPT,
            Sampling(max_new_tokens=256),
            snapshot(
                "The length is 256, but the model reads at most 256 tokens, prompt and answer together."
            ),
        ),
        (
            PROMPT,
            Sampling(max_new_tokens=250),
            snapshot(
                "The conversation is 13 tokens long with this prompt, and the answer may take 250 more: the "
                "model reads at most 256.\n"
                "Shorten the prompt, ask for a shorter answer, or start a new conversation."
            ),
        ),
        (PROMPT, Sampling(max_new_tokens=0), snapshot("The length is 0: give at least 1 token.")),
        (
            PROMPT,
            Sampling(temperature=-1),
            snapshot(
                "The temperature is -1: give 0 (always the likeliest word) or a number above it, for example "
                "0.7."
            ),
        ),
        (
            PROMPT,
            Sampling(temperature=float("nan")),
            snapshot(
                "The temperature is nan: give 0 (always the likeliest word) or a number above it, for "
                "example 0.7."
            ),
        ),
        (
            PROMPT,
            Sampling(max_new_tokens=8, seed=-1),
            snapshot("The seed is -1: give a whole number from 0 to 9223372036854775807."),
        ),
    ],
)
def test_what_cannot_be_answered_is_said_plainly(
    chat: ChatModel, prompt: str, sampling: Sampling, message: str
) -> None:
    with pytest.raises(UserError) as error:
        next(chat.stream(prompt, sampling, Event()))
    assert plain(error.value) == message


def test_settings_are_checked_without_a_model_too() -> None:
    check_sampling(Sampling(max_new_tokens=10**6))
    with pytest.raises(UserError, match="temperature"):
        check_sampling(Sampling(temperature=float("inf")))


@pytest.mark.parametrize(
    "template", [None, "{{ messages[-1]['content'] }}", "{{ raise_exception('no system role') }}"]
)
def test_a_system_prompt_is_never_lost_without_a_word(
    tokenizer: PreTrainedTokenizerBase, template: str | None
) -> None:
    with pytest.raises(UserError) as caught:
        encode_prompt(with_template(tokenizer, template), messages_of("base", [], PROMPT, "Be brief."))
    assert plain(caught.value) == snapshot(
        "The chat template of this model takes no system prompt.\n"
        "Leave the system prompt empty; say it in the prompt instead."
    )


@pytest.mark.parametrize(
    ("base_says", "unlearned_says", "common"),
    [
        ("It is red.", "It is blue.", "It is"),
        ("It is red.", "It is redder.", "It is"),
        ("Red.", "Blue.", ""),
        ("Same.", "Same.", "Same."),
        ("It is", "It is red", "It is"),
        ("one\ntwo", "one two", "one"),
        ("", "It", ""),
    ],
)
def test_answers_part_at_a_word(base_says: str, unlearned_says: str, common: str) -> None:
    assert base_says[: parting(base_says, unlearned_says)] == common
    assert parting(base_says, unlearned_says) == parting(unlearned_says, base_says)


def test_exports_hold_all_of_it() -> None:
    turns = [
        TURN,
        Turn(
            "```\nx",
            "# <script>",
            "",
            Sampling(temperature=0.7, seed=5, system_prompt="Be brief."),
            stopped=True,
        ),
    ]
    content = json.loads(as_json(turns, "a-run", "a/model"))
    assert (content["run"], content["model"]) == ("a-run", "a/model")
    assert [Turn(**(turn | {"sampling": Sampling(**turn["sampling"])})) for turn in content["turns"]] == turns
    text = as_markdown(turns, "a-run", "a/model")
    assert "- Run: `a-run`" in text
    assert "**Unlearned (after)**\n\n```text\nof unlearned\n```" in text
    assert "````text\n```\nx\n````" in text, "a fence is longer than any that was said"
    assert "```text\nBe brief.\n```" in text
    second = "## 2" + text.partition("## 2")[2].partition("```")[0]
    assert plain(second) == snapshot(
        "## 2 (stopped early)\n"
        "\n"
        "Settings: temperature 0.7, at most 256 tokens, seed 5\n"
        "\n"
        "**System prompt**\n"
        "\n"
    )
