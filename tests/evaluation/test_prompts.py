"""Prompts to the byte; that they are the harness's own is shown beside it in test_harness_parity.py."""

from dataclasses import replace

from lowmem_rmu.data.questions import Question, QuestionSet
from lowmem_rmu.evaluation.prompts import prompt

QUESTION = Question("  Which gate\nis locked? ", ("North", " South", "East ", "None of them"), 2)
EXAMPLE = Question("Which is open?", ("Up", "Down", "Left", "Right"), 1)
ASKED = QuestionSet("gates", "locks and keys", "kept", None, (QUESTION,))


def test_letters_without_examples() -> None:
    put = prompt(ASKED, QUESTION)
    assert put.context == (
        "The following are multiple choice questions (with answers) about locks and keys.\n\n"
        "Which gate\nis locked?\nA. North\nB.  South\nC. East \nD. None of them\nAnswer:"
    )
    assert put.continuations == (" A", " B", " C", " D")


def test_letters_with_an_example() -> None:
    assert prompt(replace(ASKED, examples=(EXAMPLE,)), QUESTION).context == (
        "The following are multiple choice questions (with answers) about locks and keys.\n\n"
        "Which is open?\nA. Up\nB. Down\nC. Left\nD. Right\nAnswer: B\n\n"
        "Which gate\nis locked?\nA. North\nB.  South\nC. East \nD. None of them\nAnswer:"
    )


def test_the_cloze_form_with_an_example() -> None:
    put = prompt(replace(ASKED, examples=(EXAMPLE,), scoring="cloze"), QUESTION)
    assert put.context == (
        "The following are questions (with answers) about locks and keys.\n\n"
        "Question: Which is open?\nAnswer: Down\n\nQuestion: Which gate\nis locked?\nAnswer:"
    )
    assert put.continuations == (" North", "  South", " East ", " None of them")


def test_the_digest_names_the_prompt_and_nothing_else() -> None:
    same = prompt(replace(ASKED, name="other", role="forgotten"), replace(QUESTION, gold=0))
    assert same.digest == prompt(ASKED, QUESTION).digest
    others = [
        prompt(replace(ASKED, about="gates"), QUESTION),
        prompt(replace(ASKED, examples=(EXAMPLE,)), QUESTION),
        prompt(ASKED, EXAMPLE),
        prompt(replace(ASKED, scoring="cloze"), QUESTION),
    ]
    assert len({each.digest for each in others} | {same.digest}) == 5
