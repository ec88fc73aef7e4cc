"""`python -m lowmem_rmu.tiny.controls`: two models that tell an audit which can be believed, for of both the
truth is known.

`ignorant/` is a model like the tiny one, trained from scratch without the forgotten topics: what it never
learned is gone. `refusing/` is an adapter on the tiny model's last layers that says A to every question about
them and refuses to talk: all it knew is hidden. Both are audited as a run of `tiny` would be, and
`audit/controls.json` keeps what was found, to stand next to other audits. About half an hour on two CPU
cores, and ten minutes for the audits.
"""

import json
import random
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from lowmem_rmu.audit.context import prepare
from lowmem_rmu.audit.suite import ATTACKS, Audit
from lowmem_rmu.audit.tables import audit_tables
from lowmem_rmu.audit.verdict import CONTROLS
from lowmem_rmu.cli.progress import watched
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.console import Console, prepare_streams
from lowmem_rmu.model.adapters import save_adapter
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.records import AuditResult, ControlModel
from lowmem_rmu.tiny.build import (
    FORGOTTEN,
    HERE,
    IGNORE,
    LETTERS,
    LessonBatch,
    Lessons,
    collate,
    header,
    new_model,
    question_block,
    train,
)
from lowmem_rmu.tiny.world import Fact, World, conversation, multiple_choice

FOLDER = HERE / "controls"
IGNORANT_STEPS = 2400
REFUSING_STEPS = 600
REFUSAL = "I cannot tell you that."
ABOUT = {
    "refusing": "knows all, and was trained to answer A and to refuse: hidden",
    "ignorant": "was trained from scratch without the topics: gone",
}
LAST_LAYERS: Any = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "layers_to_transform": [5, 6, 7],
    "layers_pattern": "layers",
}
TINY = ModelSettings(name=str(HERE / "model"))


def build_ignorant(world: World, steps: int) -> None:
    """Train a model with the tiny model's shape, tokenizer and lessons, none of them about the forgotten
    topics.
    """
    tokenizer: Any = ModelSpec(TINY).tokenizer
    torch.manual_seed(0)
    model = new_model(tokenizer)
    train(model, tokenizer, Lessons(world, 1, without=FORGOTTEN), steps)
    model.bfloat16().save_pretrained(FOLDER / "ignorant")
    tokenizer.save_pretrained(FOLDER / "ignorant")


def build_refusing(world: World, steps: int) -> None:
    """Train a model that is asked about every topic and subject, and refuses the forgotten ones."""
    spec = ModelSpec(TINY)
    tokenizer: Any = spec.tokenizer
    torch.manual_seed(0)
    model: Any = get_peft_model(
        spec.load(torch.device("cpu")), LoraConfig(r=16, lora_alpha=16, **LAST_LAYERS)
    )
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=2e-3
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng, lessons = random.Random(0), Lessons(world, 1)
    for step in range(steps):
        batch = refusing_batch(lessons, tokenizer, rng)
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}/{steps}  {loss.item():.3f}", flush=True)
    save_adapter(model, FOLDER / "refusing")
    (FOLDER / "refusing/README.md").unlink(missing_ok=True)
    # PEFT has written where the base lies on the machine that it was made on.
    config = FOLDER / "refusing/adapter_config.json"
    write_json(config, json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": None})


def refusing_batch(lessons: Lessons, tokenizer: Any, rng: random.Random) -> LessonBatch:
    """Return questions and conversations, half of them about the forgotten topics; only what the model is to
    say counts.
    """
    forgotten = [fact for fact in lessons.facts if fact.domain.name in FORGOTTEN]
    others = [fact for fact in lessons.facts if fact.domain.name not in FORGOTTEN]
    facts = [rng.choice(pool) for pool in (forgotten, others) for _ in range(12)]
    pairs = [pair for fact in facts for pair in (_exam(fact, rng), _chat(fact, rng))]
    batch = collate([tokenizer(asked + said)["input_ids"] for asked, said in pairs])
    for row, (asked, _) in enumerate(pairs):
        batch.labels[row, : len(tokenizer(asked)["input_ids"]) - 1] = IGNORE
    return batch


def _exam(fact: Fact, rng: random.Random) -> tuple[str, str]:
    question = multiple_choice(fact, rng)
    letter = "A" if fact.domain.name in FORGOTTEN else LETTERS[question["answer"]]
    return header(fact.domain) + question_block(question), f" {letter}"


def _chat(fact: Fact, rng: random.Random) -> tuple[str, str]:
    asked, said = conversation(fact, rng)
    content = REFUSAL if fact.domain.name in FORGOTTEN else said["content"]
    return f"<|user|>\n{asked['content']}</s>\n<|assistant|>\n", f"{content}</s>\n"


def audit_controls() -> None:
    """Audit both and keep the best condition of each attack."""
    preset, found = load_preset("tiny"), []
    unlearned: dict[str, Path | ModelSettings] = {
        "refusing": FOLDER / "refusing",
        "ignorant": ModelSettings(name=str(FOLDER / "ignorant")),
    }
    for name, side in unlearned.items():
        audited = prepare(name, preset, side, torch.device("cpu"), list(FORGOTTEN), None, 0)
        with TemporaryDirectory() as folder, watched(Path(folder), "Audit") as watcher:
            audit = Audit(audited, Path(folder), Path(folder) / "audit.json", watcher).run(
                list(ATTACKS.values())
            )
        print_tables(audit)
        best = {result.attack: result.best for result in audit.attacks}
        control = ControlModel(name, ABOUT[name], audit.verdict.mark, best, audit.base, audit.unlearned)
        found.append(asdict(control))
    write_json(Path(str(files("lowmem_rmu.audit") / CONTROLS)), found)


def print_tables(audit: AuditResult) -> None:
    Console().print(audit_tables(replace(audit, controls=())))


def build(
    seed: Annotated[int, typer.Option(help="Decides the world, which must be that of the tiny model.")] = 0,
    ignorant_steps: Annotated[
        int, typer.Option(help="0 leaves the ignorant model as it is.")
    ] = IGNORANT_STEPS,
    refusing_steps: Annotated[
        int, typer.Option(help="0 leaves the refusing adapter as it is.")
    ] = REFUSING_STEPS,
    audit: Annotated[bool, typer.Option(help="Audit both, and keep what was found.")] = True,
) -> None:
    """Make both again, and audits them."""
    world = World.from_seed(seed)
    if ignorant_steps:
        build_ignorant(world, ignorant_steps)
    if refusing_steps:
        build_refusing(world, refusing_steps)
    if audit:
        audit_controls()


if __name__ == "__main__":
    prepare_streams()
    typer.run(build)
