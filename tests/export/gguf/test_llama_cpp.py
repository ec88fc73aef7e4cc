"""GGUF files in llama.cpp itself: the same tokens of a text, the same answers as transformers gives, adapters and all kinds of weights.

`pip install --no-binary llama-cpp-python llama-cpp-python` builds llama.cpp (about ten minutes on one core), then `pytest -m slow tests/export`.
"""

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_base import generate_merges

from lowmem_rmu.chat.generation import encode_prompt
from lowmem_rmu.config.schema import ModelSettings, Rmu
from lowmem_rmu.export.gguf.tokenizer import DIGIT, GPT2, LLAMA3, TEKKEN
from lowmem_rmu.export.gguf.writer import Kind, write_gguf, write_gguf_adapter
from lowmem_rmu.model.adapters import add_adapter, save_adapter
from lowmem_rmu.model.loading import load_model, load_tokenizer

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: llama.cpp cannot be asked"
)
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
TINY = ROOT / "lowmem_rmu/tiny/model"
SMOLLM2 = os.environ.get("LOWMEM_RMU_SMOLLM2", "")
WIKITEXT = ROOT.resolve().parent / "shared/data/wikitext-2/test.txt"
MODELS = [
    pytest.param("tiny", id="tiny"),
    pytest.param(
        "smollm2",
        marks=pytest.mark.skipif(
            not SMOLLM2, reason="needs SmolLM2-135M-Instruct: give its folder in LOWMEM_RMU_SMOLLM2"
        ),
    ),
]
ANSWER = 24  # tokens
WINDOW, WINDOWS = 256, 16  # tokens, and how many times that
TRICKY = [
    "",
    " ",
    "  two  spaces ",
    "\n",
    "\n\n\t\r\n",
    "\nA. one\nB. two\nC.\nD.x",
    "\nAnswer:",
    "x\nA",
    "don't WE'LL 'tis",
    "3.14 10:45 2024 007 ²Ⅷ１２",
    "naïve café — “quotes” …",
    "日本語のテキスト 한국어 עברית العربية",
    "🙂 👩‍👩‍👧 ✅",
    "e\u0301 \u00a0 \u2003 \u3000 \x00",
    "a_b-c d.e (f) [g] | h، i।",
    "</s>",
    "<s>a</s> b",
    "<|user|>\nHi</s>\n<|assistant|>\n",
    "<|im_start|>user\nHi<|im_end|>\n",
    "def f(x):\n    return x ** 2  # why\n",
]
PIECES = [
    *"abcABCD .,!?()\n\t019'-_|é—日🙂²।",
    "\nA.",
    "\nB",
    "D.",
    " the",
    " compound",
    "'ll",
    " \n",
    "  ",
    "\r\n",
]
QUESTIONS = {
    "tiny": [
        "What colour is the herb Belobane?",
        "What does the herb Belobane smell of?",
        "In which month is the festival Belamas held?",
    ],
    "smollm2": [
        "What is the capital of France?",
        "Write a short poem about rain.",
        "Explain what a typhoon is.",
        "What is 12 + 30?",
    ],
}
SPECIAL = ["<unk>", "<s>", "</s>"]
LEARNT_FROM = [(ROOT / "README.md").read_text(encoding="utf-8"), *(text.replace("\0", "") for text in TRICKY)]
Made = Callable[[str, Kind], Path]
Asked = Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
Save = Callable[[PretrainedConfig, Path], Path]


def folder_of(model: str) -> Path:
    return TINY if model == "tiny" else Path(SMOLLM2)


def settings_of(folder: Path) -> ModelSettings:
    return ModelSettings(name=str(folder), quantisation="none", dtype="float32")


def text_of(model: str) -> str:
    if model == "tiny":
        return "\n".join(
            json.loads(line)["text"]
            for line in (ROOT / "lowmem_rmu/tiny/data/retain.jsonl").read_text("utf-8").splitlines()[:300]
        )
    return (WIKITEXT if WIKITEXT.exists() else ROOT / "README.md").read_text(encoding="utf-8")


def opened(file: Path, **more: Any) -> Any:
    """llama.cpp's model, to be closed."""
    return closing(
        llama_cpp.Llama(
            str(file), n_ctx=512, n_batch=512, n_threads=1, logits_all=True, verbose=False, **more
        )
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The GGUF file of a model in a kind, written once."""
    folder = tmp_path_factory.mktemp("gguf")

    def make(model: str, kind: Kind) -> Path:
        to = folder / f"{model}-{kind}.gguf"
        if not to.exists():
            write_gguf(folder_of(model), to, kind)
        return to

    return make


@pytest.fixture(scope="module")
def asked() -> Asked:
    """transformers' model in float32 and its tokenizer, loaded once."""

    @cache
    def load(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        settings = settings_of(folder_of(model))
        return load_model(settings, torch.device("cpu")), load_tokenizer(settings)

    return load


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    """The perplexity of each model in transformers, once it has been measured."""
    return {}


def prompts(tokenizer: PreTrainedTokenizerBase, model: str) -> list[list[int]]:
    return [
        encode_prompt(tokenizer, [{"role": "user", "content": question}])[0].tolist()
        for question in QUESTIONS[model]
    ]


def transformers_answer(model: Any, ids: list[int]) -> list[int]:
    """Token by token the likeliest, up to what ends an answer."""
    made = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=ANSWER, do_sample=False
    )
    return [int(token) for token in made[0, len(ids) :]]


def llama_answer(model: Any, ids: list[int]) -> list[int]:
    model.reset()
    answer: list[int] = []
    while len(answer) < ANSWER and (not answer or answer[-1] != model.token_eos()):
        model.eval(answer[-1:] or ids)
        answer.append(int(model.scores[model.n_tokens - 1].argmax()))
    return answer


def llama_logits(model: Any, ids: list[int]) -> Tensor:
    """`(tokens, vocabulary)`."""
    model.reset()
    model.eval(ids)
    return torch.tensor(model.scores[: len(ids)])


def perplexity(logits: Callable[[list[int]], Tensor], ids: list[int]) -> float:
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    losses = [
        cross_entropy(logits(window)[:-1].float(), torch.tensor(window[1:])).item() for window in windows
    ]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("model", MODELS)
def test_texts_have_the_same_tokens(model: str, made: Made) -> None:
    check_tokens(made(model, "f16"), load_tokenizer(settings_of(folder_of(model))), text_of(model)[:20_000])


def byte_level(rule: str, whole: bool, texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    split = (
        pre_tokenizers.Digits(individual_digits=True)
        if rule == DIGIT
        else pre_tokenizers.Split(Regex(rule), "isolated")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule == DIGIT)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sentencepiece(spaces: str) -> Tokenizer:
    """SentencePiece's way, on a vocabulary that was learnt elsehow: all pairs that make a token are merged, by the token's place."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(LEARNT_FROM, trainers.BpeTrainer(vocab_size=1200, show_progress=False))
    learnt = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    vocabulary = {
        token: number
        for number, token in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt])
    }
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, generate_merges(vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    if spaces == "Prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=False)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": partial(byte_level, GPT2, False, LEARNT_FROM),
    "smollm": partial(byte_level, DIGIT, False, LEARNT_FROM),
    "llama-bpe": partial(byte_level, LLAMA3, True, LEARNT_FROM),
    # Llama.cpp parts letters from accents of their own.
    "tekken": partial(byte_level, TEKKEN, True, LEARNT_FROM[:1]),
    "sentencepiece": partial(sentencepiece, "Prepend"),
    "sentencepiece, no space": partial(sentencepiece, "never"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_of_other_models_give_the_same_tokens(
    name: str, tmp_path: Path, save_random: Save
) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS[name](), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    folder = save_random(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        tmp_path / "model",
    )
    tokenizer.save_pretrained(folder)
    write_gguf(folder, to := tmp_path / "model.gguf", "f16")
    check_tokens(to, tokenizer, text_of("smollm2")[:20_000])


def check_tokens(file: Path, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Tricky texts, a real one and two thousand random ones have the same tokens in llama.cpp."""
    rng = random.Random(0)
    texts = [*TRICKY, text, *("".join(rng.choices(PIECES, k=rng.randint(1, 30))) for _ in range(2000))]
    with opened(file, vocab_only=True) as llama:
        for each in texts:
            assert (
                llama.tokenize(each.encode(), add_bos=True, special=True) == tokenizer(each)["input_ids"]
            ), repr(each)


@pytest.mark.parametrize("model", MODELS)
def test_answers_are_those_of_transformers(model: str, made: Made, asked: Asked) -> None:
    transformers_model, tokenizer = asked(model)
    with opened(made(model, "f16")) as llama:
        for ids in prompts(tokenizer, model):
            assert llama_answer(llama, ids) == transformers_answer(transformers_model, ids), tokenizer.decode(
                ids
            )


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_conversation_goes_by_the_template_in_the_file(kind: Kind, made: Made, asked: Asked) -> None:
    transformers_model, tokenizer = asked("tiny")
    with opened(made("tiny", kind)) as llama:
        for question, ids in zip(QUESTIONS["tiny"], prompts(tokenizer, "tiny"), strict=True):
            told = llama.create_chat_completion(
                [{"role": "user", "content": question}], temperature=0.0, max_tokens=ANSWER
            )
            expected = tokenizer.decode(
                transformers_answer(transformers_model, ids), skip_special_tokens=True
            )
            assert told["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize(("kind", "most"), [("f16", 0.001), ("bf16", 0.01), ("q8_0", 0.01), ("q4_0", 0.25)])
@pytest.mark.parametrize("model", MODELS)
def test_perplexity_is_near_that_of_transformers(
    model: str, kind: Kind, most: float, made: Made, asked: Asked, expected: dict[str, float]
) -> None:
    transformers_model, tokenizer = asked(model)
    ids = tokenizer(text_of(model))["input_ids"][: WINDOWS * WINDOW]
    with opened(made(model, kind)) as llama, torch.inference_mode():
        if model not in expected:
            expected[model] = perplexity(
                lambda window: transformers_model(torch.tensor([window])).logits[0], ids
            )
        measured = perplexity(lambda window: llama_logits(llama, window), ids)
    print(
        f"{model} {kind}: perplexity {expected[model]:.4f} in transformers, {measured:.4f} in llama.cpp ({measured / expected[model] - 1:+.3%})"
    )
    assert measured == pytest.approx(expected[model], rel=most)


@pytest.mark.parametrize("model", MODELS)
def test_an_adapter_on_the_base_answers_as_the_merged_model(model: str, tmp_path: Path, made: Made) -> None:
    settings = settings_of(folder := folder_of(model))
    tokenizer, peft = load_tokenizer(settings), with_random_adapter(settings)
    save_adapter(peft, tmp_path / "adapter")
    write_gguf_adapter(tmp_path / "adapter", folder, alone := tmp_path / "adapter.gguf")
    write_gguf(folder, merged := tmp_path / "merged.gguf", "f16", merging(tmp_path / "adapter", peft))
    with (
        opened(made(model, "f16")) as base,
        opened(merged) as whole,
        opened(made(model, "f16"), lora_path=str(alone)) as adapted,
    ):
        answers = [
            [llama_answer(llama, ids) for ids in prompts(tokenizer, model)]
            for llama in (base, whole, adapted)
        ]
    expected = [transformers_answer(peft, ids) for ids in prompts(tokenizer, model)]
    assert answers[1] == answers[2] == expected
    assert answers[0] != expected, "the adapter changes answers"


def with_random_adapter(settings: ModelSettings) -> PeftModel:
    """On matrices that llama.cpp turns for positions, and others."""
    rmu = Rmu(
        target_layer=3,
        adapter_layers=[1, 2, 3],
        modules=["q_proj", "k_proj", "down_proj"],
        rank=4,
        lora_alpha=8,
    )
    model = add_adapter(load_model(settings, torch.device("cpu")), rmu, settings)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def merging(adapter: Path, peft: PeftModel) -> Callable[[str, Tensor], Tensor]:
    """The update added to a weight, worked out from the saved adapter."""
    trained = load_file(adapter / "adapter_model.safetensors")
    scale = peft.peft_config["default"].lora_alpha / peft.peft_config["default"].r

    def change(name: str, weight: Tensor) -> Tensor:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if (a := trained.get(f"{module}.lora_A.weight")) is None:
            return weight
        return weight + scale * trained[f"{module}.lora_B.weight"] @ a

    return change


SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 32},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_and_positions_are_computed_likewise(
    name: str, tmp_path: Path, save_random: Save
) -> None:
    shape = {
        "vocab_size": 1536,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    folder = save_random(
        LlamaConfig(**shape, num_key_value_heads=2, initializer_range=0.1, **SHAPES[name]), tmp_path / "model"
    )
    write_gguf(folder, to := tmp_path / "model.gguf", "f16")
    ids = torch.randint(6, 1536, (200,), generator=torch.Generator().manual_seed(0))
    with opened(to) as llama, torch.inference_mode():
        expected = load_model(settings_of(folder), torch.device("cpu"))(ids[None]).logits[0]
        measured = llama_logits(llama, ids.tolist())
    assert (measured - expected).std() < 0.01 * expected.std()
