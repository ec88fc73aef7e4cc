"""Questions put to a GGUF file through llama.cpp: the file's own tokenizer and weights answer, as where
people run it.

`llama-cpp-python` is built from source where it is installed, so it is no requirement.
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader

from lowmem_rmu.data.questions import QuestionSet
from lowmem_rmu.evaluation.multiple_choice import (
    Interrupted,
    Progress,
    answer,
    ask,
    by_prompt,
    encode,
)
from lowmem_rmu.evaluation.scorer import Request
from lowmem_rmu.runs.records import Answer


def llama_is_there() -> bool:
    return find_spec("llama_cpp") is not None


def is_adapter(file: Path) -> bool:
    """Return whether a GGUF file holds a LoRA adapter and no model."""
    kind = GGUFReader(file).get_field("general.type")
    return kind is not None and kind.contents() == "adapter"


def ask_llama(file: Path, sets: list[QuestionSet], progress: Progress) -> list[Answer]:
    """Ask llama.cpp every question, and score the answers as `evaluate` does. Raises Interrupted where
    `progress` asks to stop.
    """
    everything = ask(sets)
    places = by_prompt(everything)
    logprobs: dict[str, list[float]] = {}
    done = correct = 0
    asked = encode(LlamaTokenizer(file), [same[0] for same in places.values()])
    for (digest, same), values in zip(places.items(), score(file, list(asked)), strict=True):
        logprobs[digest] = values
        done, correct = done + len(same), correct + sum(answer(each, values).correct for each in same)
        if progress(done, correct / done):
            raise Interrupted
    return [answer(each, logprobs[each.prompt.digest]) for each in everything]


class LlamaTokenizer:
    """A file's tokenizer, called as those of transformers are."""

    def __init__(self, file: Path) -> None:
        self._llama = import_module("llama_cpp").Llama(str(file), vocab_only=True, verbose=False)

    def __call__(
        self, text: str | list[str], verbose: bool = False, add_special_tokens: bool = True
    ) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(each)["input_ids"] for each in text]}
        return {"input_ids": self._llama.tokenize(text.encode(), add_bos=add_special_tokens, special=True)}


def score(file: Path, asked: list[list[Request]]) -> Iterator[list[float]]:
    """Yield the log-probabilities of each question's choices. A prefix that a request shares with the one
    before it is evaluated once.
    """
    library: Any = import_module("llama_cpp")
    longest = max(len(request.ids) for requests in asked for request in requests)
    # More than there are cores free for take ten times as long: they wait for each other.
    threads = torch.get_num_threads()
    llama = library.Llama(str(file), n_ctx=longest, n_threads=threads, n_threads_batch=threads, verbose=False)
    room = library.llama_model_n_ctx_train(llama.model)
    for requests in asked:
        yield [
            value
            for request in requests
            for value in _score(library, llama, replace(request, ids=request.ids[-room:]))
        ]


def _score(library: Any, llama: Any, request: Request) -> list[float]:
    """Return the log-probability of each alternative; `llama` still has the tokens of the request before."""
    first, sums = len(request.ids) - len(request.wanted), [0.0] * len(request.wanted[0])
    llama.n_tokens = min(
        first, len(commonprefix([llama.input_ids[: llama.n_tokens].tolist(), list(request.ids)]))
    )
    for place, wanted in enumerate(request.wanted, start=first):
        llama.eval(request.ids[llama.n_tokens : place + 1])
        logits = library.llama_get_logits_ith(llama.ctx, -1)[: llama.n_vocab()]
        logprobs = torch.tensor(logits).log_softmax(-1)
        sums = [total + float(logprobs[token]) for total, token in zip(sums, wanted, strict=True)]
    return sums
