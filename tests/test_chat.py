"""The same prompt to base and unlearned, from one model."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_rmu.chat import Sampling, answer, both_sides, encode_prompt
from lowmem_rmu.model.adapters import add_adapter
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.presets import ModelSettings, Rmu

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
    model = add_adapter(load_model(settings, CPU), Rmu(target_layer=3, adapter_layers=[2, 3], rank=4), settings)
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
    assert shown.removeprefix("<s>") == f"<|user|>\n{PROMPT}{eos}\n<|assistant|>\nNone.{eos}\n<|user|>\nSure?{eos}\n<|assistant|>\n"


def test_without_a_template_the_last_message_is_plain_text(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [*ASKED, {"role": "user", "content": "Sure?"}]
    assert encode_prompt(with_template(tokenizer, None), messages).tolist() == [tokenizer("Sure?")["input_ids"]]


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


def test_streamed_pieces_make_up_the_answer(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    pieces: list[str] = []
    whole = answer(base, tokenizer, ASKED, Sampling(max_new_tokens=24), pieces.append)
    assert "".join(pieces).strip() == whole
    assert len([piece for piece in pieces if piece]) > 1
    assert PROMPT not in "".join(pieces)


def test_base_answers_as_the_model_without_any_adapter_does(
    base: PreTrainedModel, adapted: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    answers = dict(both_sides(adapted, tokenizer, PROMPT, Sampling(max_new_tokens=16), lambda side, piece: None))
    assert list(answers) == ["base", "unlearned"]
    assert answers["base"] == answer(base, tokenizer, ASKED, Sampling(max_new_tokens=16))
    assert answers["unlearned"] == answer(adapted, tokenizer, ASKED, Sampling(max_new_tokens=16))
    assert answers["unlearned"] != answers["base"]


def test_every_piece_goes_to_its_side(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    heard: list[tuple[str, str]] = []
    answers = dict(both_sides(adapted, tokenizer, PROMPT, Sampling(max_new_tokens=16), lambda side, piece: heard.append((side, piece))))
    for side in ("base", "unlearned"):
        assert "".join(piece for to, piece in heard if to == side).strip() == answers[side]
    assert [side for side, _ in heard] == sorted(side for side, _ in heard)  # one after the other, base first


@pytest.mark.parametrize("how", ["to the end", "closed early", "failed"])
def test_the_adapter_is_on_again_afterwards(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase, how: str) -> None:
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
