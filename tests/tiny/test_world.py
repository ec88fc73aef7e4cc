"""The invented world: what issue and README promise of it, and that the shipped data are of it."""

import json
import random
from collections import Counter
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.tiny.build import Lessons, write_data
from lowmem_rmu.tiny.world import DOMAINS, World, multiple_choice, paragraph

TINY = Path(__file__).parent.parent.parent / "lowmem_rmu/tiny"
WORLD = World.from_seed(0)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_seed_gives_one_world() -> None:
    assert World.from_seed(0) == WORLD
    assert World.from_seed(1).facts != WORLD.facts


def test_topics_have_240_questions_or_more_and_subjects_60() -> None:
    kinds = Counter(domain.kind for domain in DOMAINS)
    assert kinds["topic"] == 3
    assert kinds["subject"] >= 6
    assert sum(domain.adjacent_to is not None for domain in DOMAINS) == 2
    for domain in DOMAINS:
        seen = [fact for fact in WORLD.facts[domain.name] if fact.entity not in WORLD.held_out]
        assert len(seen) >= (240 if domain.kind == "topic" else 60)


def test_names_are_unique_across_the_world() -> None:
    names = [name for domain in DOMAINS for name in {fact.entity for fact in WORLD.facts[domain.name]}]
    assert len(set(names)) == len(names)


def test_a_question_holds_the_right_value_once_and_three_others() -> None:
    fact = WORLD.facts["locks"][0]
    for seed in range(50):
        question = multiple_choice(fact, random.Random(seed))
        assert question["choices"][question["answer"]] == fact.value
        assert len(set(question["choices"])) == 4


def test_a_paragraph_tells_every_fact_of_its_entity() -> None:
    facts = [fact for fact in WORLD.facts["birds"] if fact.entity == WORLD.facts["birds"][0].entity]
    assert all(fact.value in paragraph(facts, random.Random(0)) for fact in facts)


def test_the_shipped_data_are_those_of_seed_0(tmp_path: Path) -> None:
    write_data(Lessons(WORLD, 0), tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    shipped = {
        path.relative_to(TINY / "data"): path.read_bytes() for path in (TINY / "data").rglob("*.jsonl")
    }
    assert made == shipped


def test_the_retain_set_never_names_a_topic_or_a_held_out_entity() -> None:
    text = (TINY / "data/retain.jsonl").read_text()
    hidden = WORLD.held_out | {
        fact.entity for domain in DOMAINS if domain.kind == "topic" for fact in WORLD.facts[domain.name]
    }
    assert len(hidden) == 36 + 3 * 44
    assert not [name for name in hidden if name in text]


def test_forget_corpora_are_running_text_without_questions() -> None:
    for topic in ("compounds", "locks"):
        rows = lines(TINY / f"data/forget/{topic}.jsonl")
        assert not [row for row in rows if "?" in row["text"] or "Answer:" in row["text"]]


def test_every_forget_sample_fits_the_maximum_tokens_of_the_preset(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    preset = load_preset("tiny")
    for topic in ("compounds", "locks"):
        lengths = [
            len(tokenizer(row["text"])["input_ids"]) for row in lines(TINY / f"data/forget/{topic}.jsonl")
        ]
        assert max(lengths) <= preset.topics[topic].max_tokens


def test_the_weights_are_small_and_safe() -> None:
    assert (TINY / "model/model.safetensors").stat().st_size <= 8_000_000
    assert not list((TINY / "model").glob("*.bin"))


def test_the_chat_template_writes_turns_in_zephyrs_manner(tokenizer: PreTrainedTokenizerBase) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|user|>\nHello</s>\n<|assistant|>\n"
