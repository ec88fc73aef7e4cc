"""The Modelfile that Ollama makes a model from: the GGUF file, the chat template in Ollama's own language,
and where answers end.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.export.gguf.tokenizer import adds_start, default_template, end_tokens
from lowmem_rmu.model.spec import ModelSpec

Messages = Sequence[dict[str, str]]
SYSTEM = "Be brief."
SAID = ("How tall is it?", "Two metres.\n\nNot more.", "And the 'other' one?", "Nobody knows.", "Why?")
TURN_END = re.compile(r"\s*(<[^<>\s]+>)")
HEADING = "# Makes the model: ollama create NAME -f Modelfile\n"
NO_SYSTEM = "# The model's chat template takes no system prompt: one would be left out.\n"
NO_TEMPLATE = (
    "# TEMPLATE is left out: {reason}.\n"
    "# Ollama then guesses one from the GGUF file: look at what `ollama show --template` prints "
    "before you trust its answers.\n"
)
UNSAYABLE = "this model's chat template does more than to put words around what is said"


@dataclass(frozen=True)
class Wording:
    """What a chat template writes around what is said, where that depends on nothing but who spoke before."""

    start: str
    """Before the first prompt, where there is no system prompt."""
    system: tuple[str, str] | None
    """Before the system prompt, and between it and the first prompt; None where the template takes none."""
    after_prompt: str
    """Between a prompt and its answer."""
    after_answer: str
    """Between an answer and the next prompt."""
    end: str
    """After the last prompt: the answer that is asked for begins there."""

    def render(self, messages: Messages) -> str:
        """Return a conversation that ends with a prompt, as Ollama renders it by `as_go`."""
        said = [message for message in messages if message["role"] != "system"]
        before, after = self.system or ("", "")
        text = (
            before + messages[0]["content"] + after
            if self.system and len(said) < len(messages)
            else self.start
        )
        for message in said[:-1]:
            text += message["content"] + (
                self.after_prompt if message["role"] == "user" else self.after_answer
            )
        return text + said[-1]["content"] + self.end

    def as_go(self) -> str:
        """Return the same in the language of Go's templates."""
        start = _if(".System", "{{ .System }}".join(self.system), self.start) if self.system else self.start
        prompt = _if('eq .Role "user"', "{{ .Content }}" + _if("$last", self.end, self.after_prompt))
        answer = _if('eq .Role "assistant"', "{{ .Content }}" + _if("not $last", self.after_answer))
        return (
            start
            + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + prompt
            + answer
            + "{{ end }}"
        )

    @property
    def can_be_written(self) -> bool:
        """Whether none of it would be read as an instruction to Go or the end of Ollama's quotes."""
        words = "".join([self.start, *(self.system or ()), self.after_prompt, self.after_answer, self.end])
        return "{{" not in words and '"""' not in words


def _if(condition: str, then: str, otherwise: str = "") -> str:
    return "{{ if " + condition + " }}" + then + ("{{ else }}" + otherwise if otherwise else "") + "{{ end }}"


def modelfile(checkpoint: Path, gguf: str, adapter: str | None = None) -> str:
    """Return the Modelfile for a GGUF file of the checkpoint, and for an adapter's on top of it, both as
    paths seen from the Modelfile.

    The chat template is recognised by what it renders, and left out, with a word about it, where Ollama could
    not render the same.
    """
    tokenizer = ModelSpec(ModelSettings(name=str(checkpoint.absolute()))).tokenizer
    ends = [str(tokenizer.convert_ids_to_tokens(end)) for end in end_tokens(checkpoint, tokenizer)]
    wording = learn_wording(tokenizer)
    text = HEADING + f"FROM ./{gguf}\n" + (f"ADAPTER ./{adapter}\n" if adapter else "")
    if wording is None:
        text += NO_TEMPLATE.format(reason=UNSAYABLE if default_template(tokenizer) else "the model has none")
    else:
        ends += TURN_END.findall(wording.after_answer)[:1]
        text += ("" if wording.system else NO_SYSTEM) + f'TEMPLATE """{wording.as_go()}"""\n'
    return text + "".join(f'PARAMETER stop "{end}"\n' for end in dict.fromkeys(ends))


def learn_wording(tokenizer: PreTrainedTokenizerBase) -> Wording | None:
    """Return the text that the tokenizer's chat template writes around messages; None where it has none, or
    does more than that.

    Learnt from one conversation with a system prompt and one without; then held against the template on
    shorter and longer ones. A date that the template takes from the clock stays today's.
    """
    if default_template(tokenizer) is None or (plain := _parts(tokenizer, _conversation(3))) is None:
        return None
    start, after_prompt, after_answer, end = plain
    takes_system = _rendered(tokenizer, _conversation(1, SYSTEM)) is not None
    parts = _parts(tokenizer, _conversation(1, SYSTEM)) if takes_system else None
    wording = Wording(start, (parts[0], parts[1]) if parts else None, after_prompt, after_answer, end)
    tried = [
        _conversation(turns, system)
        for turns in (1, 3, 5)
        for system in ((None, SYSTEM) if takes_system else (None,))
    ]
    is_equal = all(wording.render(messages) == _rendered(tokenizer, messages) for messages in tried)
    return wording if is_equal and wording.can_be_written else None


def _conversation(turns: int, system: str | None = None) -> Messages:
    """Return prompts and answers in turn, as many as that; with an odd number it ends with a prompt."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 3, SAID[:turns], strict=False)
    ]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str | None:
    """Without the start token that llama.cpp puts there itself; None where the template refuses or leaves out
    what is said.
    """
    try:
        text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except Exception:  # a template may refuse in its own way, or fail in any
        return None
    if adds_start(tokenizer):
        text = text.removeprefix(str(tokenizer.bos_token))
    return text if all(message["content"] in text for message in messages) else None


def _parts(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[str] | None:
    """Return the text before, between and after the messages; None where they are not there in their
    order.
    """
    rest, parts = _rendered(tokenizer, messages) or "", []
    for message in messages:
        before, found, rest = rest.partition(message["content"])
        if not found:
            return None
        parts.append(before)
    return [*parts, rest]
