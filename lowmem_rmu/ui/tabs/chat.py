"""The Chat tab: one prompt, two panes, base and unlearned, from one model in memory."""

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from secrets import token_hex
from threading import Event, Lock, Thread
from typing import Any

import gradio as gr
import torch
from gradio.processing_utils import save_bytes_to_cache
from markupsafe import Markup, escape

from lowmem_rmu.chat.conversation import (
    SIDES,
    Sampling,
    Turn,
    as_json,
    as_markdown,
    check_prompt,
    check_sampling,
    parting,
)
from lowmem_rmu.chat.session import ChatModel, check_adapter, memory_told
from lowmem_rmu.config.paths import is_local
from lowmem_rmu.config.schema import SMALLEST_BATCH
from lowmem_rmu.data.questions import load_questions
from lowmem_rmu.errors import UserError
from lowmem_rmu.memory.estimate import gib, memory_available, plan
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.files import write_atomically
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.queue import POLL_SECONDS, tickets
from lowmem_rmu.ui import jobs
from lowmem_rmu.ui.choice import offered, run_dropdown
from lowmem_rmu.ui.guard import guarded
from lowmem_rmu.ui.markup import joined
from lowmem_rmu.weights.shards import give_back_freed_memory

LABELS = {"base": "Base (before)", "unlearned": "Unlearned (after)"}
ROOM_FOR_A_RUN = "The chat model was unloaded to make room for a run."
BY_BUTTON = "The chat model was unloaded; its memory is free again."
NOTHING_YET = '<p class="parting-note">The place where the two answers part shows up here.</p>'
REFRESH_SECONDS = 3.0
WAIT_SECONDS = 1.0
"""Between two looks at whether it is one's turn."""
MOST_WAITING = 16
"""Pages that are shown their place in the line; more of them wait in Gradio's own queue."""
CONVERSATION_TOKENS = 2048
"""Tokens of a conversation that the memory estimate has room for."""
SUGGESTED = 2
"""Questions of forgotten topics, and as many of what must be kept."""
CSS = """
.chat-panes > * { min-width: min(100%, 260px) !important; }
.chat-panes button[aria-label="Clear"] { display: none; }
.prose.chat-status { border-left: 4px solid var(--border-color-primary); padding-left: 0.75em; }
.parting { max-height: 26em; overflow-y: auto; overflow-wrap: anywhere;
  white-space: pre-wrap; line-height: 1.5; }
.parting p { margin: 0 0 0.75em 0; }
.parting-note, .parting-common { opacity: 0.7; }
.parting-base, .parting-unlearned { padding-left: 0.75em; border-left: 4px solid #2f6fdb; }
.parting-unlearned { border-left: 4px dashed #c2570c; }
.parting b { display: block; }
"""


class Line:
    """Those who want an answer, in the order in which they asked: one model makes one answer at a time."""

    def __init__(self) -> None:
        self._waiting: list[object] = []

    @contextmanager
    def joined(self) -> Iterator[Callable[[], int]]:
        """Take the last place until the block ends. Gives a function that says how many are in front: 0 means
        that it is one's turn.
        """
        place = object()
        self._waiting.append(place)
        try:
            yield lambda: self._waiting.index(place)
        finally:
            self._waiting.remove(place)


class LoadedModel:
    """The chat model of this process: one at most, loaded when it is needed and released when its memory
    is wanted.
    """

    def __init__(self) -> None:
        self.line = Line()
        self._lock = Lock()
        self._model: ChatModel | None = None
        self._state: tuple[Path, int] | None = None
        self._why = "No chat model is loaded."
        self.bytes = 0
        """Its estimated memory in bytes."""

    @property
    def name(self) -> str | None:
        """The run whose model is loaded."""
        model = self._model
        return model.run if model else None

    @property
    def status(self) -> str:
        """In a sentence."""
        return (
            f"Loaded: the model of {self.name}. It takes about {gib(self.bytes)}." if self.name else self._why
        )

    def is_of(self, run: RunFolder) -> bool:
        return self._state == _adapter_state(run)

    def load(self, run: RunFolder, device: torch.device) -> ChatModel:
        """Return the run's model, in memory from now on; another run's goes. Raises UserError where it has no
        adapter, or too little memory is free.
        """
        with self._lock:
            if self._model and self.is_of(run):
                return self._model
            check_adapter(run)
            needed, free = foretold_bytes(run, device), memory_available(device) + self.bytes
            under_way = next(iter(tickets(run.path.parent)), None)
            # It may not have taken all of it yet.
            taken = jobs.needed_by(under_way, device) or 0 if under_way else 0
            # Then accelerate finds room.
            if needed + taken > free and jobs.preset_of(run).model.device_map != "auto":
                also = (
                    f" in addition to the {gib(taken)} of run {under_way.name}" if under_way and taken else ""
                )
                raise UserError(
                    f"The chat model of {run.path.name} takes about {gib(needed)}{also}, but {gib(free)} "
                    f"are free on {device}.",
                    "Stop a run or close other programs, then load it again.",
                )
            self._free(f"The chat model was unloaded to make room for that of {run.path.name}.")
            with memory_told():
                self._model = ChatModel.of_run(run, device)
            self._state, self.bytes = _adapter_state(run), needed
            return self._model

    def unload(self, why: str = ROOM_FOR_A_RUN) -> None:
        """Stop an answer that is being made, and frees the memory; `why` is what the page says from then
        on.
        """
        with self._lock:
            self._free(why)

    def make_room(self, needed: int | None, device: torch.device) -> None:
        """Unload where so many bytes are not free; None: who knows how many."""
        if self.name and (needed is None or needed > memory_available(device)):
            self.unload()

    def _free(self, why: str) -> None:
        if self._model is None:
            return
        self._model.close()
        self._model, self._state, self.bytes, self._why = None, None, 0, why
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        give_back_freed_memory()


@contextmanager
def room_made(model: LoadedModel, runs_dir: Path, device: torch.device) -> Iterator[None]:
    """While it lasts, the model goes as soon as a run's turn comes that needs its memory, whichever process
    started the run.
    """
    ended = Event()

    def watch() -> None:
        known = None
        while not ended.wait(POLL_SECONDS):
            first = next(iter(tickets(runs_dir)), None)
            if first and first != known:
                model.make_room(jobs.needed_by(first, device), device)
            known = first

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _adapter_state(run: RunFolder) -> tuple[Path, int] | None:
    """Change when the run is made again under its old name."""
    return (run.path.resolve(), run.adapter.stat().st_mtime_ns) if run.adapter.exists() else None


def foretold_bytes(run: RunFolder, device: torch.device) -> int:
    """Estimate the memory of the chat model while it answers."""
    preset = jobs.preset_of(run)
    spec = ModelSpec.of_preset(preset)
    context = getattr(spec.shape, "max_position_embeddings", CONVERSATION_TOKENS)
    tokens = min(context, CONVERSATION_TOKENS)
    chatting: dict[str, Any] = {
        "tasks": {},
        "prompts": ["A prompt"],
        "batch_tokens": SMALLEST_BATCH,
        "max_new_tokens": tokens,
    }
    asked = preset.model_copy(update={"evaluation": preset.evaluation.model_copy(update=chatting)})
    return plan(asked, spec, device, ["evaluate-unlearned"])[0].total


@dataclass(frozen=True)
class Conversation:
    """What was said with one run's model."""

    run: str = ""
    model_name: str = ""
    started: str = ""
    turns: tuple[Turn, ...] = ()

    @classmethod
    def begin(cls, model: ChatModel) -> "Conversation":
        return cls(model.run, model.model_name, f"{datetime.now():%Y%m%d-%H%M%S}-{token_hex(2)}")

    def of(self, side: str) -> list[dict[str, str]]:
        """Return a pane's messages."""
        return [
            message for turn in self.turns for message in _shown(turn.prompt, turn.of(side) or "(nothing)")
        ]

    def save(self, run: RunFolder) -> list[Path]:
        """Write it into the run's folder, as Markdown and as JSON; give the two paths."""
        folder = run.path / "conversations"
        try:
            folder.mkdir(exist_ok=True)
            for ending, form in (("md", as_markdown), ("json", as_json)):
                write_atomically(
                    folder / f"{self.started}.{ending}", form(self.turns, self.run, self.model_name)
                )
        except OSError as error:
            raise UserError(f"The conversation cannot be written to {folder}: {error.strerror}.") from error
        return [folder / f"{self.started}.{ending}" for ending in ("md", "json")]


def _shown(prompt: str, answered: str) -> list[dict[str, str]]:
    """Escaped: a pane shows what was written to the letter; as HTML or Markdown it could load pictures from
    anywhere.
    """
    return [
        {"role": "user", "content": str(escape(prompt))},
        {"role": "assistant", "content": str(escape(answered))},
    ]


def where_they_part(base: str, unlearned: str) -> str:
    """Return the third column, as HTML: the common beginning, then how each side continues."""
    common = parting(base, unlearned)
    if base == unlearned:
        note = "Both answers are the same, word for word." if base else "Neither side has answered anything."
        content = Markup('<p class="parting-note">{}</p><p class="parting-common">{}</p>').format(note, base)
        return Markup('<div class="parting" tabindex="0">{}</div>').format(content)
    begin = base[:common] if common else "They part at the first word."
    sides = joined(
        Markup('<p class="parting-{}"><b>{} continues:</b>{}</p>').format(
            side, LABELS[side], text[common:].strip() or "(nothing more)"
        )
        for side, text in (("base", base), ("unlearned", unlearned))
    )
    return Markup('<div class="parting" tabindex="0"><p class="parting-common">{}</p>{}</div>').format(
        begin, sides
    )


def read_sampling(system_prompt: str | None, temperature: Any, length: Any, seed: Any) -> Sampling:
    """Read the sampling fields. Raises UserError that names the field."""
    sampling = Sampling(
        max_new_tokens=_whole("length", length, "for example 256"),
        temperature=_number("temperature", temperature, "0 or more, for example 0.7"),
        seed=_whole("seed", seed, "for example 0"),
        system_prompt=system_prompt or "",
    )
    check_sampling(sampling)
    return sampling


def _number(field: str, value: Any, example: str) -> float:
    with suppress(TypeError, ValueError):
        if not math.isnan(number := float(value)):
            return number
    raise UserError(f"The {field} is {_quoted(value)}: give a number, {example}.")


def _whole(field: str, value: Any, example: str) -> int:
    number = _number(field, value, example)
    if number in (math.inf, -math.inf) or number != int(number):
        raise UserError(f"The {field} is {_quoted(value)}: give a whole number, {example}.")
    return int(number)


def _quoted(value: Any) -> str:
    return "empty" if value is None or value == "" else f"“{value}”"


def suggested_prompts(run: RunFolder) -> list[tuple[str, str]]:
    """`(label, prompt)`: the preset's own, then questions of forgotten topics and of what must be kept, as
    far as they lie on this machine.
    """
    evaluation = jobs.preset_of(run).evaluation
    local = {name: task for name, task in evaluation.tasks.items() if is_local(task.source)}
    found = [(prompt, prompt) for prompt in evaluation.prompts]
    with suppress(UserError, OSError):  # the files may have gone since the run
        sets = load_questions(evaluation.model_copy(update={"tasks": local}))
        for role, label in (("forgotten", "Forgotten"), ("kept", "Kept")):
            questions = [
                [each.question for each in one.questions if _stands_alone(each.question)]
                for one in sets
                if one.role == role
            ]
            fresh = [question for question in _in_turns(questions) if question not in evaluation.prompts]
            found += [(f"{label}: {question}", question) for question in fresh[:SUGGESTED]]
    return found


def _stands_alone(question: str) -> bool:
    """Return whether it can be answered without seeing choices."""
    return question.rstrip().endswith("?") and "following" not in question and len(question) < 200


def _in_turns(lists: list[list[str]]) -> list[str]:
    """Return the first of each list, then the second of each."""
    return [each[index] for index in range(SUGGESTED + 1) for each in lists if index < len(each)]


def ask(
    model: LoadedModel,
    runs_dir: Path,
    device: torch.device,
    run_name: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> dict[str, str]:
    """Answer one prompt, outside any conversation: `{"base": ..., "unlearned": ...}`. Loads the run's model
    if need be.
    """
    run, sampling = chosen_run(runs_dir, run_name), read_sampling("", temperature, max_new_tokens, seed)
    check_prompt(prompt)
    with model.line.joined() as in_front:
        while in_front():
            time.sleep(WAIT_SECONDS / 10)
        return model.load(run, device).answers(prompt, sampling)


def chosen_run(runs_dir: Path, name: str | None) -> RunFolder:
    """Raise UserError where none is chosen, or it cannot be talked to."""
    if not name:
        raise UserError(
            "No run is chosen.",
            "Choose one above. There is none yet? Start one in the Unlearn tab.",
        )
    run = RunFolder.open(runs_dir, name)
    check_adapter(run)
    return run


Update = dict[Any, Any]
"""New values by widget."""


class ChatTab:
    """The tab's widgets, and what its events do."""

    def __init__(self, runs_dir: Path, device: torch.device, model: LoadedModel) -> None:
        self.runs_dir, self.device, self.model = runs_dir, device, model
        self._add_loading()
        self._add_panes()
        self._add_prompt()
        self._add_settings()
        self.refreshed: list[Any] = [self.run, self.suggestions, self.status]
        """What `refresh` gives new values for; it takes `run`."""

    def _add_loading(self) -> None:
        gr.Markdown(
            "Put the same question to the model **before** and **after** it was made to forget, and compare. "
            "One model is in memory: it answers as it was, then as it is now."
        )
        with gr.Row(equal_height=False):
            self.run = run_dropdown(
                label="Run", info="Runs that have finished unlearning, newest first.", scale=4, min_width=240
            )
            with gr.Column(scale=3, min_width=240), gr.Row():
                self.refresh_button = gr.Button("Refresh", size="sm", min_width=80)
                self.load_button = gr.Button("Load", size="sm", min_width=80)
                self.unload_button = gr.Button("Unload", size="sm", min_width=80)
        self.status = gr.Markdown(self.model.status, elem_classes="chat-status")
        self.seen, self.timer = gr.State(""), gr.Timer(REFRESH_SECONDS)

    def _add_panes(self) -> None:
        self.panes = {}
        with gr.Row(elem_classes="chat-panes"):
            for side in SIDES:
                with gr.Column(scale=3, min_width=260):
                    self.panes[side] = gr.Chatbot(
                        label=LABELS[side], height=380, render_markdown=False, layout="panel", buttons=[]
                    )
            with gr.Column(scale=2, min_width=260):
                gr.Markdown("**Where they part**")
                self.parting = gr.HTML(NOTHING_YET)

    def _add_prompt(self) -> None:
        self.suggestions = gr.Dataset(
            components=[gr.Textbox(visible=False)], samples=[], label="Suggested prompts", visible=False
        )
        self.prompt = gr.Textbox(
            "",
            label="Prompt",
            info="Enter sends, Shift+Enter begins a new line.",
            placeholder="Ask both sides something",
            lines=1,
            max_lines=8,
        )
        with gr.Row():
            self.send_button = gr.Button("Send", variant="primary", min_width=120)
            self.stop_button = gr.Button("Stop", variant="stop", min_width=120)
            self.new_button = gr.Button("New conversation", min_width=120)
        with gr.Row():
            self.downloads = [
                gr.DownloadButton(f"Save as {form}", interactive=False, size="sm", min_width=120)
                for form in ("Markdown", "JSON")
            ]
        self.conversation, self.stop = gr.State(Conversation()), gr.State(None)

    def _add_settings(self) -> None:
        with gr.Accordion("Settings", open=False):
            self.system_prompt = gr.Textbox(
                label="System prompt",
                info="The system prompt of the conversation. May stay empty.",
                lines=2,
            )
            with gr.Row():
                self.temperature = gr.Number(
                    0,
                    label="Temperature",
                    info="0: always the likeliest word. Higher: more varied answers.",
                    step=0.1,
                    min_width=200,
                )
                self.length = gr.Number(
                    256,
                    label="Length",
                    info="Tokens an answer may have; a token is about ¾ of a word.",
                    min_width=200,
                )
                self.seed = gr.Number(
                    0,
                    label="Seed",
                    info="With a temperature above 0: the same seed gives the same answer.",
                    min_width=200,
                )

    def wire(self) -> None:
        """Connect the events."""
        typed = [
            self.run,
            self.prompt,
            self.system_prompt,
            self.temperature,
            self.length,
            self.seed,
            self.conversation,
        ]
        shown = [
            self.status,
            self.prompt,
            *self.panes.values(),
            self.parting,
            *self.downloads,
            self.conversation,
            self.stop,
        ]
        sending = self._on(
            partial(gr.on, [self.send_button.click, self.prompt.submit]),
            self.send,
            typed,
            shown,
            concurrency_limit=MOST_WAITING,
        )
        self._on(self.stop_button.click, self.stop_answer, [self.stop], [])
        self._on(self.new_button.click, self.new_conversation, [], shown, cancels=[sending])
        self._on(self.load_button.click, self.load, [self.run], [self.status])
        self._on(self.unload_button.click, self.unload, [], [self.status])
        self._on(self.refresh_button.click, self.refresh, [self.run], self.refreshed)
        self._on(self.run.input, self.choose_run, [self.run], [self.suggestions, self.status])
        self._on(self.suggestions.click, self.suggest, [self.suggestions], [self.prompt])
        self._on(self.timer.tick, self.tick, [self.seen], [self.status, self.seen], queue=False)

    def _on(
        self, event: Any, function: Callable[..., Any], inputs: list[Any], outputs: list[Any], **more: Any
    ) -> Any:
        """Neither progress nor a mistake covers a widget: the status line and a message tell of them."""
        return event(
            guarded(function),
            inputs,
            outputs,
            api_visibility="private",
            show_progress_on=[self.send_button],
            **more,
        )

    def refresh(self, chosen: str | None) -> Update:
        """Return the runs there are now; what was chosen stays chosen where it is still there."""
        names = self._run_names()
        return {self.run: offered(names, chosen)} | self.choose_run(chosen or next(iter(names), None))

    def tick(self, seen: str) -> tuple[Any, Any]:
        """Another page, or a run, may have loaded or unloaded the model."""
        now = self.model.status
        return (now if seen else gr.skip(), now) if now != seen else (gr.skip(), gr.skip())

    def choose_run(self, name: str | None) -> Update:
        try:
            prompts = suggested_prompts(chosen_run(self.runs_dir, name)) if name else []
        except (
            UserError
        ) as error:  # it was renamed or deleted meanwhile, which is no mistake of who reads this
            return {
                self.suggestions: gr.Dataset(samples=[], visible=False),
                self.status: f"{self.model.status} {error}",
            }
        labels, samples = [label for label, _ in prompts], [[prompt] for _, prompt in prompts]
        return {
            self.suggestions: gr.Dataset(samples=samples, sample_labels=labels, visible=bool(prompts)),
            self.status: self._told(name),
        }

    def suggest(self, sample: list[str]) -> str:
        return sample[0]

    def load(self, name: str | None) -> Iterator[str]:
        run = chosen_run(self.runs_dir, name)
        yield self._loading(run)
        try:
            self.model.load(run, self.device)
        finally:
            yield self.model.status

    def unload(self) -> str:
        self.model.unload(BY_BUTTON)
        return self.model.status

    def stop_answer(self, stop: Event | None) -> None:
        if stop:
            stop.set()

    def new_conversation(self) -> Update:
        cleared: Update = {pane: [] for pane in self.panes.values()} | {
            button: gr.DownloadButton(interactive=False) for button in self.downloads
        }
        return cleared | {
            self.parting: NOTHING_YET,
            self.conversation: Conversation(),
            self.stop: None,
            self.status: self.model.status,
        }

    def send(
        self,
        name: str | None,
        prompt: str,
        system_prompt: str,
        temperature: Any,
        length: Any,
        seed: Any,
        conversation: Conversation,
    ) -> Iterator[Update]:
        """Load the model if need be, then show both answers while they are being made."""
        check_prompt(prompt)
        run, sampling = (
            chosen_run(self.runs_dir, name),
            read_sampling(system_prompt, temperature, length, seed),
        )
        stop = Event()
        try:
            with self.model.line.joined() as in_front:
                yield from self._waiting(in_front, stop)
                if stop.is_set():
                    yield {self.stop: None, self.status: self.model.status}
                    return
                if not self.model.is_of(run):
                    yield {self.status: self._loading(run)}
                model = self.model.load(run, self.device)
                conversation = conversation if conversation.run == model.run else Conversation.begin(model)
                model.check(prompt, sampling, conversation.turns)
                yield from self._answering(run, model, conversation, prompt, sampling, stop)
        except Exception:
            yield {self.prompt: prompt, self.status: self.model.status}
            raise

    def _waiting(self, in_front: Callable[[], int], stop: Event) -> Iterator[Update]:
        """Say how many answers come before this one, until it is its turn or nobody wants it any more."""
        while (others := in_front()) and not stop.is_set():
            answers = "1 other answer comes" if others == 1 else f"{others} other answers come"
            yield {
                self.status: f"Waiting: {answers} before yours. Stop takes you out of the line.",
                self.stop: stop,
            }
            time.sleep(WAIT_SECONDS)

    def _answering(
        self,
        run: RunFolder,
        model: ChatModel,
        conversation: Conversation,
        prompt: str,
        sampling: Sampling,
        stop: Event,
    ) -> Iterator[Update]:
        turn = Turn(prompt, "", "", sampling)
        yield {
            self.status: f"{self.model.status} It is answering.",
            self.prompt: "",
            self.stop: stop,
        } | self._panes(conversation, turn)
        with closing(model.stream(prompt, sampling, stop, conversation.turns)) as pieces:
            for side, text in pieces:
                turn = replace(turn, base=text) if side == "base" else replace(turn, unlearned=text)
                yield self._panes(conversation, turn)
        turn = replace(turn, stopped=stop.is_set() or model.is_closed)
        conversation = replace(conversation, turns=(*conversation.turns, turn))
        yield {
            self.conversation: conversation,
            self.stop: None,
            self.status: self.model.status,
        } | self._finished(conversation)
        # Gradio serves files from its own cache, wherever the runs lie.
        copies = [
            save_bytes_to_cache(path.read_bytes(), f"{conversation.run}-{path.name}", button.GRADIO_CACHE)
            for button, path in zip(self.downloads, conversation.save(run), strict=True)
        ]
        yield {
            button: gr.DownloadButton(value=copy, interactive=True)
            for button, copy in zip(self.downloads, copies, strict=True)
        }

    def _panes(self, conversation: Conversation, turn: Turn) -> Update:
        """While it is being answered."""
        panes = {
            pane: [*conversation.of(side), *_shown(turn.prompt, turn.of(side) or "…")]
            for side, pane in self.panes.items()
        }
        return panes | (
            {self.parting: where_they_part(turn.base, turn.unlearned)}
            if turn.unlearned
            else {self.parting: NOTHING_YET}
        )

    def _finished(self, conversation: Conversation) -> Update:
        last = conversation.turns[-1]
        return {pane: conversation.of(side) for side, pane in self.panes.items()} | {
            self.parting: where_they_part(last.base, last.unlearned)
        }

    def _run_names(self) -> list[str]:
        return [run.path.name for run in RunFolder.all(self.runs_dir) if run.adapter.exists()]

    def _loading(self, run: RunFolder) -> str:
        return f"Loading the model of {run.path.name}, about {gib(foretold_bytes(run, self.device))} …"

    def _told(self, name: str | None) -> str:
        """Return the status, and what the chosen run would take."""
        if name is None:
            return f"{self.model.status} No run has finished unlearning yet: start one in the Unlearn tab."
        run = RunFolder.open(self.runs_dir, name)
        return self.model.status + (
            ""
            if self.model.is_of(run)
            else f" That of {name} would take about {gib(foretold_bytes(run, self.device))}."
        )


def build(runs_dir: Path, device: torch.device, model: LoadedModel) -> ChatTab:
    """Make the tab where it is called: within `gr.Blocks` and `gr.Tab`."""
    tab = ChatTab(runs_dir, device, model)
    tab.wire()
    return tab
