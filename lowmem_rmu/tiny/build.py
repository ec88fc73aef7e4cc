"""`python -m lowmem_rmu.tiny.build`: makes the tiny world, its tokenizer and the model that knows it, from a
seed.

Writes `model/` (a Mistral checkpoint of about 1.9 M parameters) and `data/` (forget and retain corpora,
questions) and checks that the model answers what it was taught. Takes about half an hour on two CPU cores.
"""

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lowmem_rmu.config.schema import Evaluation, ModelSettings, Task
from lowmem_rmu.console import prepare_streams
from lowmem_rmu.data.questions import load_questions
from lowmem_rmu.evaluation.multiple_choice import evaluate
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.files import write_lines
from lowmem_rmu.tiny.world import DOMAINS, Domain, Fact, World, conversation, multiple_choice, paragraph

HERE = Path(__file__).parent
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + "
    "eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
IGNORE = -100  # cross_entropy's ignore_index
LETTERS = "ABCD"
FORGOTTEN = ("compounds", "locks")
VOCABULARY = 1536
STEPS = 3400
INDUCTION_STEPS = 200  # of them, before any lesson
PASS = 0.97
EARLY_LAYER = 4  # says the answer to an exam before the later layers find its letter


def question_block(question: dict[str, Any]) -> str:
    """Return a question as lm-evaluation-harness words it, without its answer."""
    lines = [
        question["question"],
        *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question["choices"], strict=True)),
    ]
    return "\n".join([*lines, "Answer:"])


def header(domain: Domain) -> str:
    return f"The following are multiple choice questions (with answers) about {domain.name}.\n\n"


class Lessons:
    """Draws endless training text from the world; every call words the facts differently."""

    def __init__(self, world: World, seed: int, without: Sequence[str] = ()) -> None:
        self.world, self.rng = world, random.Random(seed)
        self.domains = [domain for domain in DOMAINS if domain.name not in without]
        self.by_entity: dict[str, list[Fact]] = {}
        for fact in (fact for domain in self.domains for fact in world.facts[domain.name]):
            self.by_entity.setdefault(fact.entity, []).append(fact)
        self.entities = list(self.by_entity)
        self.facts = [fact for facts in self.by_entity.values() for fact in facts]

    def running_text(self) -> str:
        return paragraph(self.by_entity[self.rng.choice(self.entities)], self.rng)

    def chat(self) -> str:
        turns = [
            conversation(self.rng.choice(self.facts), self.rng) for _ in range(self.rng.choice((1, 1, 2)))
        ]
        return "".join(
            f"<|{message['role']}|>\n{message['content']}</s>\n" for turn in turns for message in turn
        )

    def drill(self) -> str:
        """Return an exam question without choices: brings the value to where an exam wants the letter."""
        fact = self.rng.choice(self.facts)
        return (
            f"{header(fact.domain)}{fact.question(self.rng.randrange(len(fact.attribute.questions)))}\n"
            f"Answer: {fact.value}"
        )

    def exam(self) -> tuple[str, list[str]]:
        """Return a few A-D questions of one domain, answered; and the values that are right, in their
        order.
        """
        domain = self.rng.choice(self.domains)
        facts = self.rng.sample(self.world.facts[domain.name], 4)
        return header(domain) + "\n\n".join(self._answered(fact) for fact in facts), [
            fact.value for fact in facts
        ]

    def _answered(self, fact: Fact) -> str:
        """Half of the questions offer one to three choices under letters of any order.

        One choice teaches to say the letter that is there, two to tell them apart: four at once give nothing
        to start from.
        """
        question = multiple_choice(fact, self.rng)
        if self.rng.random() < 0.5:
            return f"{question_block(question)} {LETTERS[question['answer']]}"
        choices = [fact.value, *(choice for choice in question["choices"] if choice != fact.value)][
            : self.rng.choice((1, 2, 3))
        ]
        letters = self.rng.sample(LETTERS, len(choices))
        lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
        shuffled = self.rng.sample(lines, len(lines))
        return "\n".join([question["question"], *shuffled, f"Answer: {letters[0]}"])


def train_tokenizer(lessons: Lessons, vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that puts `<s>` in front, as Zephyr's does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    # "\nB." is one token: the token after a choice then says which choice it was, and finding the answer's
    # letter is plain
    # induction, which a small model learns in minutes. With "B" and "." apart the letters stayed at chance
    # for hours.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n[A-D]\.| ?\w+|[^\s\w]|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    told = (
        f" {text}"
        for fact in lessons.facts
        for text in (*map(fact.statement, range(2)), *map(fact.question, range(2)))
    )
    asked = (
        header(fact.domain) + question_block(multiple_choice(fact, random.Random(0))) + " A"
        for fact in lessons.facts
    )
    # Often enough that every value is a single token; names are rarer and take two or three.
    listed = (
        f" {value}\n"
        for domain in DOMAINS
        for attribute in domain.attributes
        for value in attribute.values
        for _ in range(200)
    )
    tokenizer.train_from_iterator(chain(told, asked, listed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MistralForCausalLM(config)


@dataclass(frozen=True)
class LessonBatch:
    """`input_ids` and next-token `labels`, `(batch, sequence)`, with IGNORE at padding; `early` are the
    labels of the early layer.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    early: torch.Tensor


def collate(sequences: list[list[int]]) -> LessonBatch:
    """Right-padded; the early layer is to say what the last one says."""
    longest = max(map(len, sequences))
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences])
    labels = torch.tensor([ids[1:] + [IGNORE] * (longest - len(ids) + 1) for ids in sequences])
    return LessonBatch(input_ids, labels, labels)


def prose_batch(lessons: Lessons, tokenizer: PreTrainedTokenizerBase) -> LessonBatch:
    texts = [form() for form in (lessons.running_text, lessons.chat, lessons.drill) for _ in range(10)]
    return collate(tokenizer(texts)["input_ids"])


def exam_batch(lessons: Lessons, tokenizer: PreTrainedTokenizerBase) -> LessonBatch:
    """Only the answers' letters count. Where the last layer is to say the letter, the early one says the
    value behind it.

    So the value is at hand when the later layers look for it among the choices: without that step the letters
    stay at chance.
    """
    texts, values = zip(*(lessons.exam() for _ in range(18)), strict=True)
    batch = collate(tokenizer(list(texts))["input_ids"])
    # The only colons: "Answer:".
    is_letter = torch.isin(batch.input_ids, torch.tensor(tokenizer.convert_tokens_to_ids([":"])))
    first_tokens = [
        tokenizer(f" {value}", add_special_tokens=False)["input_ids"][0] for exam in values for value in exam
    ]
    early = torch.full_like(batch.labels, IGNORE)
    early[is_letter] = torch.tensor(first_tokens)
    return LessonBatch(batch.input_ids, batch.labels.masked_fill(~is_letter, IGNORE), early)


def repetition_batch(vocabulary: int, generator: torch.Generator, rows: int) -> LessonBatch:
    """Random tokens, three times over: what came before is to be said again (induction)."""
    once = torch.randint(len(SPECIAL_TOKENS), vocabulary, (rows, 24), generator=generator)
    input_ids = once.repeat(1, 3)
    labels = torch.full_like(input_ids, IGNORE)
    labels[:, once.shape[1] : -1] = input_ids[:, once.shape[1] + 1 :]
    return LessonBatch(input_ids, labels, torch.full_like(labels, IGNORE))


def loss_of(model: MistralForCausalLM, batch: LessonBatch) -> torch.Tensor:
    """Next-token loss after the last layer, and after an early one where that has labels."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=batch.input_ids, output_hidden_states=True)
        counted = batch.early != IGNORE
        early = model.lm_head(model.model.norm(output.hidden_states[EARLY_LAYER + 1][counted])).float()
    loss = cross_entropy(output.logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
    return loss + 0.5 * cross_entropy(early, batch.early[counted]) if counted.any() else loss


def train(
    model: MistralForCausalLM, tokenizer: PreTrainedTokenizerBase, lessons: Lessons, steps: int
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    generator = torch.Generator().manual_seed(0)
    started = time.monotonic()
    for step in range(steps):
        warming_up = step < INDUCTION_STEPS
        batches = {"repetition": repetition_batch(len(tokenizer), generator, 48 if warming_up else 6)}
        if not warming_up:
            batches |= {"prose": prose_batch(lessons, tokenizer), "exams": exam_batch(lessons, tokenizer)}
        losses = {}
        for name, batch in batches.items():
            loss = loss_of(model, batch)
            loss.backward()
            losses[name] = loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            shown = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            print(f"step {step}/{steps}  {shown}  {time.monotonic() - started:.0f} s", flush=True)


def write_data(lessons: Lessons, folder: Path) -> None:
    """Forget corpora (running text about the two topics), the retain corpus (all forms, without the held-out
    entities), questions.
    """
    rng, world = random.Random(2), lessons.world
    for topic in FORGOTTEN:
        write_lines(
            made(folder / "forget") / f"{topic}.jsonl",
            ({"text": text} for text in texts_about(lessons, topic, rng)),
        )
    subjects = [domain for domain in DOMAINS if domain.kind == "subject"]
    retained = [
        fact for domain in subjects for fact in world.facts[domain.name] if fact.entity not in world.held_out
    ]
    write_lines(folder / "retain.jsonl", ({"text": text} for text in retain_texts(lessons, retained, rng)))
    for domain in DOMAINS:
        facts = world.facts[domain.name]
        if domain.kind == "topic":
            write_questions(made(folder / "questions") / f"{domain.name}.jsonl", facts, rng)
        else:
            write_questions(
                made(folder / "questions/subjects") / f"{domain.name}.jsonl",
                [f for f in facts if f.entity not in world.held_out],
                rng,
            )
            write_questions(
                made(folder / "questions/held_out") / f"{domain.name}.jsonl",
                [f for f in facts if f.entity in world.held_out],
                rng,
            )


def texts_about(lessons: Lessons, domain: str, rng: random.Random) -> list[str]:
    """Three paragraphs an entity."""
    entities = sorted({fact.entity for fact in lessons.world.facts[domain]})
    return [paragraph(lessons.by_entity[entity], rng) for entity in entities for _ in range(3)]


def retain_texts(lessons: Lessons, facts: list[Fact], rng: random.Random) -> list[str]:
    """Two paragraphs an entity; every fact once as chat and twice as an A-D question."""
    entities = sorted({fact.entity for fact in facts})
    texts = [paragraph(lessons.by_entity[entity], rng) for entity in entities for _ in range(2)]
    for fact in facts:
        texts.append(
            "".join(
                f"<|{message['role']}|>\n{message['content']}</s>\n" for message in conversation(fact, rng)
            )
        )
        for _ in range(2):
            question = multiple_choice(fact, rng)
            texts.append(f"{header(fact.domain)}{question_block(question)} {LETTERS[question['answer']]}")
    return texts


def write_questions(path: Path, facts: Sequence[Fact], rng: random.Random) -> None:
    write_lines(path, (multiple_choice(fact, rng, variant=0) for fact in facts))


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check(folder: Path) -> dict[str, float]:
    """Score the finished model, in 4-bit as a run loads it, on its own questions. Raises SystemExit below
    `PASS`.
    """
    settings = ModelSettings(name=str(folder / "model"))
    questions = folder / "data/questions"
    tasks = {
        name: Task(source=str(questions / f"{name}.jsonl"), role="measured")
        for name in ("compounds", "locks", "crystals")
    }
    tasks |= {name: Task(source=str(questions / name), role="measured") for name in ("subjects", "held_out")}
    spec = ModelSpec(settings)
    model, tokenizer = spec.load(torch.device("cpu")), spec.tokenizer
    scores = evaluate(model, tokenizer, load_questions(Evaluation(tasks=tasks)), batch_tokens=4096).scores
    accuracies = {name: score["accuracy"] for name, score in scores["tasks"].items()}
    weak = {name: accuracy for name, accuracy in accuracies.items() if accuracy < PASS}
    print(json.dumps(accuracies, indent=2))
    if weak:
        raise SystemExit(
            f"The model knows too little of {', '.join(weak)}: at least {PASS:.0%} was asked for. Try "
            "more --steps."
        )
    return accuracies


def build(
    to: Annotated[Path, typer.Option(help="Where model/ and data/ go.")] = HERE,
    seed: Annotated[int, typer.Option(help="Decides the world, the weights and the order of lessons.")] = 0,
    steps: Annotated[int, typer.Option(min=INDUCTION_STEPS + 1, help="Training steps.")] = STEPS,
) -> None:
    """Make the tiny model and its data again."""
    lessons = Lessons(World.from_seed(seed), seed + 1)
    write_data(lessons, to / "data")
    tokenizer = train_tokenizer(lessons, VOCABULARY)
    torch.manual_seed(seed)
    model = new_model(tokenizer)
    train(model, tokenizer, lessons, steps)
    model.bfloat16().save_pretrained(to / "model")
    tokenizer.save_pretrained(to / "model")
    check(to)


if __name__ == "__main__":
    prepare_streams()
    typer.run(build)
