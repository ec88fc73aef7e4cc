"""The audit of a run: its attacks in order, each told beforehand, within memory and the time that is left,
and kept piece by piece.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lowmem_rmu import __version__
from lowmem_rmu.audit.attacks import ablation, collateral, prompting, relearning, representation, suffix
from lowmem_rmu.audit.attacks import requantization as requantisation
from lowmem_rmu.audit.attacks.attack import Attack, Cost, Pieces, Tried
from lowmem_rmu.audit.context import QUESTIONS, RANK, SIDES, Audited, linear_names, prepare
from lowmem_rmu.audit.power import Power, questions_for_gone
from lowmem_rmu.audit.recovery import Values, attack_recovery, recovery
from lowmem_rmu.audit.verdict import audit_result, finding_of
from lowmem_rmu.config.schema import Preset
from lowmem_rmu.errors import AuditAgain, Fix, ResumeRun, UserError, nearest
from lowmem_rmu.evaluation.compare import Pairs, compare_tasks
from lowmem_rmu.evaluation.statistics import LUCK, MANY, POWER
from lowmem_rmu.evaluation.summary import read_audit_file
from lowmem_rmu.export.verification import read_run
from lowmem_rmu.memory.advice import is_out_of_memory
from lowmem_rmu.memory.estimate import FLOAT32, Needs, gib, memory_available, memory_in_use, plan, reset_peak
from lowmem_rmu.model.saved import read_adapter_settings
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import differences, read_preset
from lowmem_rmu.runs.records import AttackResult, AuditResult, Condition, Object, checked_json
from lowmem_rmu.runs.status import Stopped, Watcher

ATTACKS: dict[str, Attack] = {
    module.ATTACK.name: module.ATTACK
    for module in (relearning, ablation, requantisation, representation, prompting, suffix, collateral)
}
BACKWARD = 6.0
"""Forward passes that a training step on the same tokens costs, the forward one among them: a LoRA in every
module, matrices dequantised twice.
"""
MEASURED = "measured"
"""The pieces that are measured before any attack."""
MOST_QUESTIONS = 300
"""Questions per forgotten task at most, if no power is given: a power that takes more takes too long to be
anybody's default."""
FAMILY = sum(attack.recovers for attack in ATTACKS.values())
"""Attacks each of which may find something by chance: *hidden* is corrected for all of them, however many are
run."""
NOT_YET = "not yet"
"""The reason given for an attack while those before it run, or where the audit was stopped."""


@dataclass(frozen=True)
class Estimate:
    """What an attack will take, told before it runs; bytes beyond the libraries themselves."""

    attack: str
    asks: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Settings:
    """What an audit's kept pieces belong to."""

    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Forgotten:
    """What a run forgot: tasks, none where it asked none, and the accuracy on their questions, as shares."""

    preset: Preset
    tasks: list[str]
    base: float = 0.0
    unlearned: float = 0.0


def open_audit(
    folder: RunFolder,
    device: torch.device,
    settings: Settings,
    watcher: Watcher,
    again: bool = False,
    power: float | None = None,
    scratch: Path | None = None,
) -> "Audit":
    """Return the audit of a run, measured but not yet attacked. Without a limit it asks as many questions as
    `power` takes (`planned`).

    With a `scratch` folder everything is written there and the run's folder stays as it is: enough for a cost
    estimate. Raises UserError where the run has forgotten nothing, or was audited with other settings
    (`again` discards those results).
    """
    forgotten = read_forgotten(folder)
    settings = planned(settings, forgotten, folder.audit / "settings.json", again, power)
    preset, limit = forgotten.preset, settings.limit
    audited = prepare(folder.path.name, preset, folder.adapter, device, forgotten.tasks, limit, settings.seed)
    if scratch is not None:
        return Audit(audited, scratch, scratch / folder.audit_result.name, watcher)
    claim(folder.audit, folder.audit_result, settings, again)
    return Audit(audited, folder.audit, folder.audit_result, watcher)


def planned(
    settings: Settings, forgotten: Forgotten, earlier: Path, again: bool, power: float | None
) -> Settings:
    """Return the settings with a limit: the one given, that of the audit that this one continues, or what the
    power takes.

    If no power is given, POWER with QUESTIONS to MOST_QUESTIONS of each task.
    """
    if settings.limit is not None or not forgotten.tasks:
        return settings
    if power is None and not again and earlier.exists():
        recorded = checked_json(earlier, Object, Fix("Discard that audit: {action}", AuditAgain()))
        return replace(settings, limit=recorded.get("limit"))
    needed = questions_for_gone(forgotten.base, forgotten.unlearned, power or POWER) or MANY
    limit = -(-needed // len(forgotten.tasks))
    return replace(settings, limit=limit if power else min(MOST_QUESTIONS, max(QUESTIONS, limit)))


def read_forgotten(folder: RunFolder) -> Forgotten:
    """Raise UserError where the run has unlearned nothing, or forgot nothing."""
    name = folder.path.name
    preset = read_preset(folder)
    if not folder.adapter.exists():
        raise UserError(
            f"Run {folder.path} has unlearned nothing, so there is nothing to audit.",
            Fix("Go on with it: {action}", ResumeRun(name)),
        )
    read_adapter_settings(folder.adapter)
    if not any(task.role == "forgotten" for task in preset.evaluation.tasks.values()):
        return Forgotten(preset, [])
    run = read_run(folder)
    rows = [
        row
        for row in compare_tasks(run.sets, run.base, run.unlearned)
        if row.role == "forgotten" and not row.is_average
    ]
    fell = [row for row in rows if (pairs := Pairs.of(row)) and pairs.change < 0 and pairs.p_value < LUCK]
    if not fell:
        raise UserError(
            f"Run {folder.path} forgot nothing: on no task that was to be forgotten did right answers fall "
            "by more than luck.",
            "There is nothing to bring back. Unlearn harder first (more rmu.steps, a larger adaptive_scale).",
        )
    # Subjects of a task are in their task's row too, on both sides alike.
    whole = Pairs.together(pairs for row in fell if (pairs := Pairs.of(row)))
    base, unlearned = whole.known / whole.questions, whole.right / whole.questions
    return Forgotten(preset, sorted({row.group or row.task for row in fell}), base, unlearned)


def claim(place: Path, result: Path, settings: Settings, again: bool) -> None:
    """Make the folder of an audit's pieces, or take it up again. Raises UserError for one of other
    settings.
    """
    path, mine = place / "settings.json", asdict(settings) | {"version": __version__}
    if again:
        shutil.rmtree(place, ignore_errors=True)
        result.unlink(missing_ok=True)
    what_next = Fix("Discard what that audit found: {action}", AuditAgain(str(place.parent)))
    if path.exists() and (different := sorted(differences(checked_json(path, Object, what_next), mine))):
        # Settings without a result of an attack bind nothing: that audit was stopped before it came to one.
        if not result.exists() and all(file.stem == MEASURED for file in place.glob("*.jsonl")):
            claim(place, result, settings, again=True)
            return
        raise UserError(
            f"{place.parent} was audited with another {' and '.join(different)}.",
            Fix("Give the same; or, to discard those results: {action}", AuditAgain()),
        )
    place.mkdir(exist_ok=True)
    write_json(path, mine)


class Audit:
    """Attacks on one model: their pieces go to the folder `place`, what they found to the file `result`."""

    def __init__(self, audited: Audited, place: Path, result: Path, watcher: Watcher) -> None:
        self.audited, self.place, self.result, self.watcher = audited, place, result, watcher
        self.done = 0
        watcher.started("measuring", 3)
        pieces = self._pieces(MEASURED)
        self.plain: dict[str, Values] = {
            side: pieces.get(side, partial(self.audited.measure, side)) for side in SIDES
        }
        self.pace = pieces.get("seconds", self._time)

    @staticmethod
    def choose(names: Sequence[str]) -> list[Attack]:
        """Return attacks by their names. Raises UserError for an unknown one."""
        for name in names:
            if name not in ATTACKS:
                raise UserError(f'There is no attack "{name}". {nearest(name, ATTACKS)}')
        return [attack for name, attack in ATTACKS.items() if name in names]

    def run(self, attacks: list[Attack], budget: float | None = None) -> AuditResult:
        """Run the attacks one after the other, and name those that do not fit into memory or the `budget`
        (seconds). Writes `audit.json`.

        What an earlier audit found by other attacks stays there. Raises Stopped where the watcher asks to
        stop.
        """
        ends = None if budget is None else time.monotonic() + budget
        results = {
            name: self._not_run(each, "not asked for") for name, each in ATTACKS.items()
        } | self._earlier()
        results |= {
            each.name: self._not_run(each, NOT_YET) for each in attacks if results[each.name].state != "done"
        }
        for attack in attacks:
            estimate = self.estimate(attack)
            reason = attack.lacks(self.audited) or self._too_large(estimate)
            if (
                reason is None
                and ends is not None
                and (left := max(0.0, ends - time.monotonic())) < estimate.seconds
            ):
                reason = (
                    f"it would take about {duration(estimate.seconds)}, and {duration(left)} of the "
                    "budget are left"
                )
            results[attack.name] = self._not_run(attack, reason) if reason else self._run(attack, estimate)
            write_json(self.result, asdict(self._found(results)))
        return self._found(results)

    def _earlier(self) -> dict[str, AttackResult]:
        if not self.result.exists():
            return {}
        earlier = read_audit_file(self.result).attacks
        return {result.attack: result for result in earlier if result.attack in ATTACKS}

    def _found(self, results: dict[str, AttackResult]) -> AuditResult:
        """Sum up what the attacks found."""
        knowledge = self.audited.knowledge
        base, unlearned = (knowledge.figure(self.plain[side]) for side in SIDES)
        return audit_result(
            self.audited.name,
            len(knowledge),
            knowledge.are_questions,
            base,
            unlearned,
            list(results.values()),
        )

    @property
    def power(self) -> Power | None:
        """What its questions can tell, by what base and unlearned answered to them; None where knowledge is
        text.
        """
        if not self.audited.knowledge.are_questions:
            return None
        base, unlearned = (self.audited.knowledge.figure(self.plain[side]) for side in SIDES)
        return Power(len(self.audited.knowledge), base, unlearned)

    def estimate(self, attack: Attack) -> Estimate:
        """By the pace of the first measurements, and by the memory plan."""
        if attack.lacks(self.audited):
            return Estimate(attack.name, attack.asks, 0.0, 0)
        cost = attack.cost(self.audited)
        training = BACKWARD * cost.training_tokens * self.pace / max(1, self.audited.knowledge.tokens)
        return Estimate(
            attack.name,
            attack.asks,
            cost.measurements * self.pace + training,
            bytes_needed(self.audited, cost),
        )

    def _run(self, attack: Attack, estimate: Estimate) -> AttackResult:
        self.done = 0
        self.watcher.started(attack.name, 0)
        reset_peak(self.audited.device)
        pieces = self._pieces(attack.name)
        before, began = pieces.known.get("seconds so far", 0.0), time.monotonic()
        try:
            tried = attack.run(self.audited, pieces)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.audited.free()
            return self._not_run(
                attack, f"out of memory on {self.audited.device}; the estimate was {gib(estimate.bytes)}"
            )
        finally:
            pieces.keep("seconds so far", before + time.monotonic() - began)
        return self._result(attack, tried, estimate, pieces.known["seconds so far"])

    def _result(self, attack: Attack, tried: Tried, estimate: Estimate, seconds: float) -> AttackResult:
        best, knowledge = None, self.audited.knowledge
        known = {
            name: knowledge.beyond_base(values, tried.base.get(name), self.plain["base"])
            for name, values in tried.conditions.items()
        }
        if known:
            sides = self.plain["base"], self.plain["unlearned"]
            how = knowledge.are_questions, knowledge.chance
            values, chosen, found = attack_recovery(known, *sides, *how, FAMILY)
            figure = knowledge.figure(values)
            best = Condition(" or ".join(chosen), figure, found.recovered, found.low, found.high)
        return AttackResult(
            attack=attack.name,
            asks=attack.asks,
            state="done",
            foretold_seconds=estimate.seconds,
            seconds=seconds,
            peak_memory_bytes=memory_in_use(self.audited.device),
            best=best,
            finding=finding_of(best) if best else None,
            conditions=tuple(self._condition(name, values) for name, values in known.items()),
            sentences=tuple(tried.sentences),
            details=tried.details,
        )

    def _condition(self, name: str, values: Values) -> Condition:
        knowledge = self.audited.knowledge
        base, unlearned = (self.plain[side] for side in SIDES)
        found = recovery(base, unlearned, values, knowledge.are_questions, knowledge.chance)
        return Condition(name, knowledge.figure(values), found.recovered, found.low, found.high)

    def _not_run(self, attack: Attack, reason: str) -> AttackResult:
        return AttackResult(attack.name, attack.asks, "not run", reason)

    def _too_large(self, estimate: Estimate) -> str | None:
        needs = Needs(self.audited.preset, self.audited.sides.base, self.audited.device)
        weights = needs.weights_held(None) if self.audited.is_loaded else 0
        free = memory_available(self.audited.device) + weights  # which are among what is needed
        if estimate.bytes <= free or self.audited.preset.model.device_map == "auto":
            return None
        return f"it needs {gib(estimate.bytes)}, but {gib(free)} are free on {self.audited.device}"

    def _pieces(self, name: str) -> Pieces:
        return Pieces(self.place / f"{name}.jsonl", self._before)

    def _before(self, key: str) -> None:
        if self.watcher.asks_to_stop():
            raise Stopped(self.place.parent, "the same command")
        self.watcher.advanced(self.done, {"": key})
        self.done += 1

    def _time(self) -> float:
        """Return seconds of one measurement of all knowledge, once everything is warm."""
        began = time.monotonic()
        self.audited.measure("unlearned")
        return time.monotonic() - began


def bytes_needed(audited: Audited, cost: Cost) -> int:
    """By the memory plan: the model with its adapter while it answers and, where the attack trains, a LoRA on
    every layer with its gradients.
    """
    preset, spec, device = audited.preset, audited.sides.base, audited.device
    needed = plan(preset, spec, device, ["evaluate-base", "evaluate-unlearned"])[-1].total
    if cost.training_batch:
        layers, modules = list(range(spec.layer_count)), linear_names(spec.skeleton)
        rmu = {"target_layer": layers[-1], "adapter_layers": layers, "modules": modules}
        needs = Needs(
            preset.model_copy(
                update={"rmu": preset.rmu.model_copy(update=rmu | {"rank": RANK, "trainable": "lora"})}
            ),
            spec,
            device,
        )
        # As they are, in float32, and their gradient.
        logits = 3 * cost.training_batch * needs.vocabulary * FLOAT32
        learning = needs.weights.learning(needs.rmu) * 4 * FLOAT32  # weights, gradients, two moments
        needed = max(
            needed, needs.weights_held(None) + learning + needs.training(cost.training_batch) + logits
        )
    return needed + cost.extra_bytes


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
