"""Modelfiles: the chat template is recognised by what it renders, and Go renders the same from what is written."""

import json
import shutil
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from inline_snapshot import snapshot
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowmem_rmu.export.gguf.modelfile import Wording, learn_wording, modelfile

TINY = Path(__file__).parents[3] / "lowmem_rmu/tiny/model"
EACH = "{% for message in messages %}"
ASKED = "{% endfor %}{% if add_generation_prompt %}"
CHATML = (
    EACH
    + "<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n"
    + ASKED
    + "<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    EACH
    + "<|{{ message['role'] }}|>\n{{ message['content'] + eos_token + '\n' }}"
    + ASKED
    + "<|assistant|>\n{% endif %}"
)
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
HEADED = HEADER.format("{{ message['role'] }}") + "{{ message['content'] | trim }}<|eot_id|>"
LLAMA3 = EACH + HEADED + ASKED + HEADER.format("assistant") + "{% endif %}"
INST = "{% if message['role'] == 'user' %}{{ '[INST] ' + content + ' [/INST]' }}{% else %}{{ ' ' + content + eos_token }}{% endif %}{% endfor %}"
SYSTEM_FIRST = "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}{% endif %}"
LLAMA2 = (
    SYSTEM_FIRST + EACH + "{% if loop.first and system is defined %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token }}{% endif %}" + INST
)
MISTRAL = (
    EACH
    + "{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% set content = message['content'] %}"
    + INST
)
TEMPLATES = {
    "zephyr": ZEPHYR,
    "chatml": CHATML,
    "chatml with a system prompt of its own": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    + CHATML,
    "llama 3": "{{ bos_token }}" + LLAMA3,
    "llama 2": LLAMA2,
    "mistral": "{{ bos_token }}" + MISTRAL,
}
SYSTEM_WITH_THE_LAST_PROMPT = (
    SYSTEM_FIRST + EACH + "{% set content = message['content'] %}{% if loop.last and system is defined %}"
    "{% set content = system + '\\n\\n' + content %}{% endif %}" + INST
)
NUMBERED = EACH + "{{ loop.index }}. {{ message['content'] }}\n{% endfor %}"
CONVERSATIONS = [
    [("user", "Hi")],
    [("user", "Say \"{{ x }}\" & '<b>'"), ("assistant", "No.\n\nWhy?"), ("user", "Because\tso")],
    [
        ("user", "1"),
        ("assistant", "2"),
        ("user", "3"),
        ("assistant", "4"),
        ("user", "5"),
        ("assistant", "6"),
        ("user", "7"),
    ],
]
KIND = 'Be "kind".\nAlways.'
GO = """
package main

import ("encoding/json"; "os"; "text/template")

type Message struct { Role, Content string }

func main() {
    var given struct { Template, System string; Messages []*Message }
    if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil { panic(err) }
    values := map[string]any{"System": given.System, "Messages": given.Messages}
    if err := template.Must(template.New("").Parse(given.Template)).Execute(os.Stdout, values); err != nil { panic(err) }
}
"""
"""What Ollama does with a template: the system prompts are joined in .System, and among .Messages too."""
Render = Callable[[str, list[dict[str, str]]], str]


@pytest.fixture(scope="module")
def go_render(tmp_path_factory: pytest.TempPathFactory) -> Render:
    """Renders a Go template as Ollama does, by Go itself."""
    if (go := shutil.which("go")) is None:
        pytest.skip("Go is not installed: what Ollama would render cannot be seen")
    folder = tmp_path_factory.mktemp("go")
    (folder / "render.go").write_text(GO, encoding="utf-8")
    subprocess.run([go, "build", "-o", "render", "render.go"], cwd=folder, check=True)

    def render(template: str, messages: list[dict[str, str]]) -> str:
        system = "".join(message["content"] for message in messages if message["role"] == "system")
        given = {
            "Template": template,
            "System": system,
            "Messages": [{name.title(): text for name, text in each.items()} for each in messages],
        }
        return subprocess.run(
            [str(folder / "render")], input=json.dumps(given), capture_output=True, text=True, check=True
        ).stdout

    return render


def with_template(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    return tokenizer


def as_messages(turns: list[tuple[str, str]], system: str | None = None) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text} for role, text in ([("system", system)] if system else []) + turns
    ]


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """Without the start token: the tiny model's tokenizer, and llama.cpp with it, puts it there itself."""
    return str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ).removeprefix("<s>")


def learnt(name: str) -> tuple[PreTrainedTokenizerBase, Wording]:
    tokenizer = with_template(TEMPLATES[name])
    wording = learn_wording(tokenizer)
    assert wording is not None
    return tokenizer, wording


@pytest.mark.parametrize(
    ("name", "system"),
    [*product(TEMPLATES, [None]), *product(sorted(TEMPLATES.keys() - {"mistral"}), [KIND])],
)
def test_known_templates_are_rendered_by_go_as_by_transformers(
    name: str, system: str | None, go_render: Render
) -> None:
    tokenizer, wording = learnt(name)
    for turns in CONVERSATIONS:
        messages = as_messages(turns, system)
        assert (
            go_render(wording.as_go(), messages) == rendered(tokenizer, messages) == wording.render(messages)
        )


def test_what_is_written_around_what_is_said() -> None:
    _, wording = learnt("llama 2")
    assert wording == Wording(
        "[INST] ", ("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"), " [/INST] ", "</s><s>[INST] ", " [/INST]"
    )
    assert learnt("mistral")[1].system is None
    assert (
        learnt("chatml with a system prompt of its own")[1].start
        == "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n"
    )


@pytest.mark.parametrize(
    "template",
    [None, SYSTEM_WITH_THE_LAST_PROMPT, NUMBERED, CHATML.replace("im_end|>", "im_end{{ '{{' }}|>")],
)
def test_a_template_that_does_more_is_not_taken_for_a_known_one(template: str | None) -> None:
    assert learn_wording(with_template(template)) is None


def test_the_modelfile_of_the_tiny_model() -> None:
    assert modelfile(TINY, "tiny.gguf") == snapshot(
        "# Makes the model: ollama create NAME -f Modelfile\n"
        "FROM ./tiny.gguf\n"
        'TEMPLATE """{{ if .System }}<|system|>\n{{ .System }}</s>\n<|user|>\n{{ else }}<|user|>\n{{ end }}'
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "user" }}{{ .Content }}{{ if $last }}</s>\n<|assistant|>\n{{ else }}</s>\n<|assistant|>\n{{ end }}{{ end }}'
        '{{ if eq .Role "assistant" }}{{ .Content }}{{ if not $last }}</s>\n<|user|>\n{{ end }}{{ end }}{{ end }}"""\n'
        'PARAMETER stop "</s>"\n'
    )


def checkpoint(folder: Path, template: str | None) -> Path:
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").unlink()
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("#")]


def test_an_adapter_goes_on_top_and_turns_end_where_the_template_ends_them(tmp_path: Path) -> None:
    text = modelfile(checkpoint(tmp_path / "chatml", CHATML), "base.gguf", "adapter.gguf")
    assert "\nFROM ./base.gguf\nADAPTER ./adapter.gguf\nTEMPLATE " in text
    assert text.endswith('"""\nPARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\n')


def test_that_a_system_prompt_would_be_left_out_is_said(tmp_path: Path) -> None:
    text = modelfile(checkpoint(tmp_path / "mistral", MISTRAL), "mistral.gguf")
    assert comments(text) == snapshot(
        [
            "# Makes the model: ollama create NAME -f Modelfile",
            "# The model's chat template takes no system prompt: one would be left out.",
        ]
    )


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            NUMBERED,
            snapshot(
                [
                    "# Makes the model: ollama create NAME -f Modelfile",
                    (
                        "# TEMPLATE is left out: this model's chat template does more than to put words around what "
                        "is said."
                    ),
                    (
                        "# Ollama then guesses one from the GGUF file: look at what `ollama show --template` prints "
                        "before you trust its answers."
                    ),
                ]
            ),
        ),
        (
            None,
            snapshot(
                [
                    "# Makes the model: ollama create NAME -f Modelfile",
                    "# TEMPLATE is left out: the model has none.",
                    (
                        "# Ollama then guesses one from the GGUF file: look at what `ollama show --template` prints "
                        "before you trust its answers."
                    ),
                ]
            ),
        ),
    ],
)
def test_a_template_that_is_left_out_is_told(template: str | None, told: list[str], tmp_path: Path) -> None:
    text = modelfile(checkpoint(tmp_path / "model", template), "model.gguf")
    assert '"""' not in text
    assert comments(text) == told
    assert text.endswith('PARAMETER stop "</s>"\n')
