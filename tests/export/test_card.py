import json
import os
import random
import shutil
import string
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from inline_snapshot import snapshot
from markdown_it import MarkdownIt

from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.errors import UserError, not_reachable
from lowmem_rmu.export import card
from lowmem_rmu.export.card import base_terms, escaped, sum_line, write_card
from lowmem_rmu.export.reproduce import sha256, write_reproduce
from lowmem_rmu.export.verification import Checked, Verification, verify
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.records import AttackResult, Condition
from lowmem_rmu.weights.source import Source
from tests.records import audit_json
from tests.texts import plain

ROOT = Path(__file__).parent.parent.parent
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
PAPERS = {f"https://arxiv.org/abs/{number}" for number in ("2403.03218", "2410.16454", "2409.18025")}
NASTY = [
    "<script>alert(1)</script>",
    "a | b | c",
    "# Heading",
    "![x](http://evil/x.png)",
    "[click](javascript:alert(1))",
    "`code` **bold** ~~gone~~",
]


class Page(HTMLParser):
    """What a reader sees: text, tags, links."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.text, self.tags, self.links = "", list[str](), set[str]()
        self.feed(MARKDOWN.render(markdown))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links |= {value or "" for name, value in attrs if name in ("href", "src")}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def own_run(forgetful: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the run that may be changed."""
    return RunFolder(Path(shutil.copytree(forgetful.path, tmp_path / "runs/own_run")))


def change(run: RunFolder, file: str, **values: Any) -> None:
    """`a__b=value` puts a value into the JSON file of a run."""
    content = json.loads((run.path / file).read_text())
    for path, value in values.items():
        *keys, last = path.split("__")
        node = content
        for key in keys:
            node = node[key]
        node[last] = value
    write_json(run.path / file, content)


def body(artefact: Path) -> str:
    return ModelCard.load(artefact / "README.md").text


def sections(artefact: Path) -> list[str]:
    """The introduction, and the text under each heading of the second level."""
    return [section.strip() for section in body(artefact).split("\n## ")]


def facts(artefact: Path) -> list[str]:
    """The first two items of the introduction: the base model and its licence."""
    return [line for line in sections(artefact)[0].splitlines() if line.startswith("- ")][:2]


def test_the_card_has_the_runs_numbers_in_the_layout_of_the_hub(forgetful: RunFolder, adapter: Path) -> None:
    write_card(forgetful, adapter, "adapter", None)
    data, summary = (
        ModelCard.load(adapter / "README.md").data,
        json.loads((forgetful.path / "summary.json").read_text()),
    )
    assert (data.model_name, data.library_name, data.base_model, data.get("license")) == (
        "forgetful",
        "peft",
        None,
        None,
    )
    found = {each.metric_name: each.metric_value for each in data.eval_results}
    for row in summary["rows"]:
        for side in ("base", "unlearned"):
            if row["group"] is None:
                assert found.pop(f"accuracy on {row['task']}, {side}") == row[side]
                assert found.pop(f"accuracy_stderr on {row['task']}, {side}") == row[f"{side}_stderr"]
    assert found.keys() == {
        f"{metric} on locks (held-out text), {side}"
        for metric in ("loss", "loss_stderr")
        for side in ("base", "unlearned")
    }
    assert found["loss on locks (held-out text), unlearned"] == summary["texts"][0]["unlearned"]
    compounds = next(each for each in data.eval_results if each.dataset_type == "compounds")
    assert compounds.metric_args == {
        "role": "forgotten",
        "questions": 60,
        "sampled_from": 264,
        "num_fewshot": 0,
        "scoring": "letters",
    }


def test_the_card_says_what_was_done_and_what_was_found(forgetful: RunFolder, adapter: Path) -> None:
    write_card(forgetful, adapter, "adapter", None)
    summary, text = json.loads((forgetful.path / "summary.json").read_text()), Page(body(adapter)).text
    row = summary["rows"][0]
    assert f"{100 * row['unlearned']:.1f} ± {100 * row['unlearned_stderr']:.1f}" in text
    assert f"−{-100 * row['change']:.1f} ± {100 * row['change_stderr']:.1f} *" in text
    assert f"{summary['texts'][0]['unlearned']:.2f} ± " in text
    assert all(sentence in text for sentence in summary["verdict"]["sentences"])
    assert sections(adapter)[1] == snapshot(
        "What was forgotten, and how\n"
        "\n"
        "| topic | text | steering | alpha | tokens of a sample |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| compounds | compounds\\.jsonl (a local text) | adaptive, scale 3 | 5 | 96 |\n"
        "| locks | locks\\.jsonl (a local text) | adaptive, scale 3 | 5 | 96 |\n"
        "\n"
        "Held in place with: retain\\.jsonl (a local text).\n"
        "\n"
        "| setting | |\n"
        "| --- | --- |\n"
        "| base model while it forgot | 4-bit (NF4, double quantisation) |\n"
        "| trained | LoRA of rank 16, lora_alpha 16 |\n"
        "| modules | q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj of layers 1, 2, 3 |\n"
        "| steered | the output of layer 3 (layers count from 0) |\n"
        "| steps | 60, 8 forget and 16 retain samples each |\n"
        "| optimiser | adamw, learning rate 0.01 |\n"
        "| losses over | real tokens |\n"
        "| seed | 0 |"
    )
    assert facts(adapter)[0] == snapshot("- Base model: tiny/model.")
    loaded, audited, limits = sections(adapter)[3:6]
    assert loaded == snapshot(
        "This export, loaded and asked\n"
        "\n"
        "It was not loaded again after it was written. Merging and quantising can bring knowledge back "
        "([arXiv 2410.16454](https://arxiv.org/abs/2410.16454))."
    )
    assert audited == snapshot(
        "Audit\n"
        "\n"
        "None was run: that questions are no longer answered does not tell whether the knowledge is gone or "
        "only hidden."
    )
    assert limits == snapshot(
        "Limits\n"
        "\n"
        "- **Fine-tuning recovers what was forgotten.** A few steps on related text, and even on text that "
        "has nothing to do with it, bring much of it back\n"
        "  ([arXiv 2409.18025](https://arxiv.org/abs/2409.18025)). Nobody who has these weights is kept from "
        "it.\n"
        "- It was measured on multiple-choice questions and on text, not against people who look for what is "
        "left: other wording, other\n"
        "  languages and other ways of asking may find more.\n"
        "- Other quantisations than those above can undo it ([arXiv "
        "2410.16454](https://arxiv.org/abs/2410.16454)): measure what you run.\n"
        "- An adapter can be taken off again. Whoever has it and the base model has the base model."
    )
    assert Page(body(adapter)).links == PAPERS


def test_the_hashes_are_what_sha256sum_takes_and_the_cards_own(forgetful: RunFolder, adapter: Path) -> None:
    odd = adapter / "deep/odd\\ name\nof two lines"
    odd.parent.mkdir()
    odd.write_text("odd")
    write_card(forgetful, adapter, "adapter", None)
    write_card(forgetful, adapter, "adapter", None)  # once more: neither file counts itself
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=adapter,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    assert [line.partition(":")[0] for line in checked.stdout.splitlines()] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        r"\deep/odd\\ name\nof two lines",
    ]
    assert sha256(adapter / "adapter_model.safetensors") in body(adapter)
    odd.write_text("changed")
    assert (
        subprocess.run(
            ["sha256sum", "--check", "SHA256SUMS"], cwd=adapter, capture_output=True, check=False
        ).returncode
        == 1
    )


def test_a_line_of_hashes() -> None:
    assert sum_line("ab", "model.gguf") == "ab  model.gguf\n"
    assert sum_line("ab", "a\\b\nc") == "\\ab  a\\\\b\\nc\n"


def test_a_card_that_came_along_as_a_link_is_replaced_and_not_written_through(
    forgetful: RunFolder, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("The base model's own card")
    (adapter / "README.md").unlink()
    os.link(tmp_path / "README.md", adapter / "README.md")
    write_card(forgetful, adapter, "adapter", None)
    assert (tmp_path / "README.md").read_text() == "The base model's own card"


def test_no_place_of_this_machine_is_in_the_card(forgetful: RunFolder, merged: Path) -> None:
    write_reproduce(forgetful, merged / "reproduce")
    write_card(forgetful, merged, "merged", verify(forgetful, merged, torch.device("cpu")))
    text = (merged / "README.md").read_text()
    assert not any(str(place) in text for place in (ROOT, Path.home(), forgetful.path.parent, merged.parent))
    assert next(line for line in Page(text).text.splitlines() if "compounds.jsonl" in line) == snapshot(
        "compounds.jsonl (a local text)"
    )


def test_the_way_to_make_it_again(forgetful: RunFolder, adapter: Path) -> None:
    write_card(forgetful, adapter, "adapter", None)
    python = forgetful.config["versions"]["python"]
    assert f"cpu, python {python}" in Page(body(adapter)).text
    write_reproduce(forgetful, adapter / "reproduce")
    write_card(forgetful, adapter, "adapter", None)
    assert "python -m lowmem_rmu.run reproduce/preset.yaml --device cpu\n" in Page(body(adapter)).text


def test_what_the_export_answered_is_in_the_card(forgetful: RunFolder, merged: Path) -> None:
    verified = verify(forgetful, merged, torch.device("cpu"))
    skipped = Checked("merged, <int8>", None, "out of memory on *cuda*", 0.0, ())
    write_card(forgetful, merged, "merged", Verification("damaged", (verified.checked[0], skipped)))
    text = Page(body(merged)).text
    loaded = Page(sections(merged)[3]).text.splitlines()
    assert [line for line in loaded if "damaged" in line or line.startswith("merged, ")] == snapshot(
        [
            "On the whole: damaged.",
            "merged, bfloat16: verified",
            "merged, <int8>: not asked: out of memory on *cuda*",
        ]
    )
    row = verified.checked[0].tasks[0]
    assert f"{100 * row.exported:.1f} ± {100 * row.exported_stderr:.1f}" in text


def test_a_run_that_measured_nothing_says_so(own_run: RunFolder, adapter: Path) -> None:
    (own_run.path / "summary.json").unlink()
    write_card(own_run, adapter, "adapter", None)
    assert sections(adapter)[2] == snapshot(
        "Before and after\n"
        "\n"
        "Nothing was measured. Do not take it for granted that anything was forgotten, or kept."
    )
    assert ModelCard.load(adapter / "README.md").data.eval_results is None


def test_a_summary_of_another_version_is_refused(own_run: RunFolder, adapter: Path) -> None:
    change(own_run, "summary.json", rows=[{"task": "quiz"}])
    with pytest.raises(UserError) as caught:
        write_card(own_run, adapter, "adapter", None)
    assert str(own_run.path / "summary.json") in str(caught.value)
    assert str(caught.value).endswith(" --resume --name own_run")


def test_names_of_other_people_show_to_the_letter_and_do_nothing(own_run: RunFolder, adapter: Path) -> None:
    topics = own_run.config["settings"]["topics"]
    rows = json.loads((own_run.path / "summary.json").read_text())["rows"]
    change(
        own_run,
        "config.json",
        settings__title=NASTY[0],
        settings__topics=dict.fromkeys(NASTY, topics["locks"]),
    )
    change(
        own_run,
        "summary.json",
        rows=[rows[0] | {"task": name} for name in NASTY],
        verdict__sentences=[f"{name}: forgotten." for name in NASTY],
    )
    write_card(own_run, adapter, "adapter", None)
    page = Page(body(adapter))
    assert page.links == PAPERS
    assert not {"script", "img", "s"} & set(page.tags)
    assert page.tags.count("h1") == 1
    assert all(page.text.count(name) >= 3 for name in NASTY), "as a topic, as a task, and in the verdict"
    results = ModelCard.load(adapter / "README.md").data.eval_results
    assert {each.dataset_name for each in results} >= set(NASTY)


@pytest.mark.parametrize("seed", range(20))
def test_any_text_shows_to_the_letter(seed: int) -> None:
    drawn = random.Random(seed)
    for _ in range(200):
        text = "".join(drawn.choices(string.punctuation + "ab1 é", k=drawn.randint(1, 12)))
        shown = " ".join(text.split())
        for place in ("# {}", "- {}", "{} x", "x **{}** x"):
            page = Page(place.format(escaped(text)))
            assert shown in page.text
            assert not {"a", "img", "code", "em", "hr", "blockquote", "ol", "pre"} & set(page.tags), (
                text,
                page.tags,
            )
        table = Page(f"| a | b |\n| --- | --- |\n| {escaped(text)} | end |")
        assert table.tags.count("td") == 2
        assert shown in table.text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("tiny-20261121", "tiny-20261121"),
        ("held_out", "held_out"),
        ("24.6% right, at last.", "24.6% right, at last."),
        ("locks: forgotten", "locks: forgotten"),
        ("www.evil.com", r"www\.evil\.com"),
        ("http://evil", r"http\://evil"),
        ("two\n\nlines\u2028and \x1b[31mmore\u202e", r"two lines and \[31mmore"),
        ("1. First", r"1\. First"),
        ("_x_", r"\_x\_"),
    ],
)
def test_text_stays_readable_where_markdown_leaves_it_alone(text: str, written: str) -> None:
    assert escaped(text) == written


def base_with_card(folder: Path, text: str) -> ModelSettings:
    folder.mkdir()
    (folder / "README.md").write_text(text)
    return ModelSettings(name=str(folder))


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("---\nlicense: apache-2.0\n---\n# Base", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        ("---\nlanguage: en\n---\nlicense: mit", {}),
        ("No metadata; license: mit", {}),
        ("---\nlicense: [mit, gpl]\n---\n", {}),
        ("---\n{ not: [yaml\n---\n", {}),
        ("---\n- a list\n---\n", {}),
    ],
)
def test_the_licence_is_the_base_models_own_or_unknown(
    tmp_path: Path, text: str, terms: dict[str, str]
) -> None:
    assert base_terms(base_with_card(tmp_path / "base", text), None) == terms


def test_a_base_without_a_card_has_no_known_licence(tmp_path: Path) -> None:
    assert base_terms(ModelSettings(name=str(tmp_path)), None) == {}


def test_a_model_of_the_hub_is_linked_with_its_revision_and_licence(
    own_run: RunFolder, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_with_card(tmp_path / "base", "---\nlicense: mit\n---\n")
    asked = []

    def located(name: str, revision: str | None) -> Source:
        asked.append((name, revision))
        return Source(name, Path(base.name))

    monkeypatch.setattr(card, "locate", located)
    change(own_run, "config.json", settings__model__name="owner/model", model_revision="abc123")
    for kind, relation in {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}.items():
        write_card(own_run, adapter, kind, None)  # type: ignore[arg-type]
        data = ModelCard.load(adapter / "README.md").data
        assert (data.base_model, data.base_model_relation, data.license) == ("owner/model", relation, "mit")
    assert asked == [("owner/model", "abc123")] * 3
    assert facts(adapter) == snapshot(
        ["- Base model: owner/model, revision abc123.", "- Licence of the base model: mit."]
    )


def test_without_the_hub_the_licence_is_unknown(
    own_run: RunFolder, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise not_reachable("model", "owner/model")

    monkeypatch.setattr(card, "locate", refuse)
    change(own_run, "config.json", settings__model__name="owner/model")
    write_card(own_run, adapter, "adapter", None)
    assert ModelCard.load(adapter / "README.md").data.license is None
    assert facts(adapter)[1] == snapshot(
        "- Licence of the base model: not known here; ask whoever published it."
    )


def test_an_audit_is_told_where_there_is_one(own_run: RunFolder, adapter: Path) -> None:
    best = Condition("unseen text, *25* steps", 0.9, 0.886, 0.8, 0.97)
    results = [
        AttackResult(
            "relearning",
            "does it come back?",
            "done",
            best=best,
            finding="brought back",
            sentences=(NASTY[0],),
        ),
        AttackResult(
            "wording",
            "is it the words?",
            "done",
            best=Condition("x", 0.5, -0.04, None, None),
            finding="inconclusive",
        ),
        AttackResult("harm", "what else changed?", "done", sentences=("Next to nothing.",)),
        AttackResult("suffix", "do odd words do it?", "not run", "not asked for"),
    ]
    known = {"name": "refuses", "about": "taught to refuse", "mark": "hidden", "attacks": {}}
    write_json(own_run.audit_result, audit_json("mine", 60, True, 1.0, 0.3, results) | {"controls": [known]})
    write_card(own_run, adapter, "adapter", None)
    page = Page(body(adapter))
    assert sections(adapter)[4] == snapshot(
        "Audit\n"
        "\n"
        "The run's model was attacked: is what it forgot gone, or only hidden? (60 questions about it, "
        "accuracy in %; recovered is the\n"
        "share of what was lost that came back, with its 95% interval: the highest bounds of all ways that "
        "an attack tried, the lower ones corrected\n"
        "for the number of ways and attacks.)\n"
        "\n"
        "- Hidden, not gone: what was forgotten comes back.\n"
        "- relearning: brought back 89% (80 to 97) of what was lost (unseen text, \\*25\\* steps).\n"
        "- Inconclusive from 60 questions, the intervals are too wide: wording.\n"
        "- Not run: suffix.\n"
        "\n"
        "| attack | asks | base | unlearned | attacked | recovered | finding |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| relearning | does it come back? | 100.0 | 30.0 | 90.0 | 89% (80 to 97) | brought back |\n"
        "| wording | is it the words? | 100.0 | 30.0 | 50.0 | −4% (any share) | inconclusive |\n"
        "| harm | what else changed? | | | | | see below |\n"
        "| suffix | do odd words do it? | | | | | not run: not asked for |\n"
        "\n"
        "- relearning: \\<script\\>alert(1)\\</script\\>\n"
        "- harm: Next to nothing.\n"
        "\n"
        "The same audit of models of which the truth is known:\n"
        "\n"
        "- refuses (taught to refuse): **hidden**"
    )
    assert f"relearning: {NASTY[0]}" in page.text
    assert "harm: Next to nothing." in page.text
    assert "script" not in page.tags


def test_a_damaged_audit_is_no_card(own_run: RunFolder, adapter: Path) -> None:
    own_run.audit_result.write_text("{")
    with pytest.raises(UserError) as caught:
        write_card(own_run, adapter, "adapter", None)
    assert plain(caught.value, run=own_run.path) == snapshot(
        "<run>/audit.json is damaged: it does not hold a JSON object.\n"
        "Audit it again: python -m lowmem_rmu audit <run> --again"
    )
