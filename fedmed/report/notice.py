"""One page for patients, in short words and short sentences (reading age about twelve)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedmed.evaluation.evidence import Subgroups, Verdict
from fedmed.report import page, wording
from fedmed.report.context import Study
from fedmed.report.sections.privacy import most_right

Part = tuple[str, tuple[str, ...]]

_SMALL: Final = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)


_COUNTS: Final = (
    "At the end it sends out some counts, too: how often the computer was right. No count is about "
    "a few people only.",
)


@dataclass(frozen=True)
class Notice:
    """The page.

    Attributes:
        banner: what must be known first; empty otherwise.
        parts: headings, each with its paragraphs.
    """

    title: str
    banner: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All paragraphs, without headings."""
        return "\n".join(text for _, texts in self.parts for text in texts)


def notice(study: Study) -> Notice:
    """The page with the numbers of the study."""
    run = study.evidence.run
    banner = (
        "No real images were used. The images in this study were made by a computer to test it."
        if run.synthetic
        else ""
    )
    parts = (_use(study), _leaves(study), _privacy(study), _good(study), _out())
    return Notice("Your images and this study", banner, parts)


def markdown(content: Notice) -> str:
    """The page as Markdown."""
    blocks = [f"# {content.title}"]
    blocks += [f"> {content.banner}"] if content.banner else []
    for heading, texts in content.parts:
        blocks += [f"## {heading}", *texts]
    return "\n\n".join(blocks) + "\n"


def html(content: Notice) -> str:
    """The page as HTML that loads nothing and runs nothing."""
    template = page.environment().get_template("notice.html.j2")
    return template.render(notice=content, style=page.style(), policy=page.policy(script=None))


def _use(study: Study) -> Part:
    sites = len(study.evidence.training_patients)
    count = _SMALL[sites] if sites < len(_SMALL) else f"{sites:,}"
    where = "One hospital takes" if sites == 1 else f"{count.capitalize()} hospitals take"
    return "How are my images used?", (
        f"{where} part in this study. We want to teach a computer to read medical images. It may "
        "help doctors one day.",
        "The computer looks at many images, and learns from them. It is like a student who "
        "looks at many old cases.",
        "This is research. The computer makes no choice about your care. Your doctor does.",
    )


def _leaves(study: Study) -> Part:
    title = "What leaves the hospital?"
    if study.evidence.run.mode == "centralized":
        return title, (
            "In this study the images of all hospitals were brought to one place. The computer "
            "learned from them there.",
        )
    if study.evidence.run.mode == "local":
        return title, (
            "Your images do not leave the hospital. Your name does not leave it. Each hospital "
            "taught its own computer. Only the results were set side by side.",
        )
    return title, (
        "Your images do not leave the hospital. Your name does not leave it.",
        "The computer learns inside the hospital. Then the hospital sends out what it learned: "
        "a long list of numbers. The numbers of all hospitals are mixed into one. "
        f"This was done {study.evidence.run.rounds:,} times.",
        *(_COUNTS if study.told else ()),
        "Each hospital keeps a diary of all that it sends. If someone changes an old page, it "
        "shows.",
    )


def _privacy(study: Study) -> Part:
    run = study.evidence.run
    title = "Can anyone find out that I took part?"
    bounded = [g for g in run.guarantees if g.epsilon is not None and g.delta is not None]
    if any(g.unbounded for g in run.guarantees) or not bounded:
        return title, (
            "We set no limit on this. The list of numbers may hold traces of your images. Someone "
            "very skilled might use it to find out if you took part.",
            "There is a way to add noise that hides each person. This study did not use it"
            + (" at all times." if any(g.unbounded for g in run.guarantees) else "."),
        )
    worst = max(bounded, key=lambda g: (g.epsilon or 0.0, g.delta or 0.0))
    epsilon, delta = worst.epsilon or 0.0, worst.delta or 0.0
    right = min(most_right(epsilon, delta), 1.0)
    hidden = "each person" if run.unit == "patient" else "each image"
    unit = (
        ()
        if run.unit == "patient"
        else ("It hides one image at a time. If we used many of your images, it hides you less.",)
    )
    return title, (
        f"We add noise while the computer learns. The noise hides {hidden} in the crowd.",
        *unit,
        "How well it hides you has a measure. It is called epsilon. At zero, no one can learn "
        "a thing about you. The higher it is, the less you are hidden.",
        f"In this study epsilon is at most {wording.epsilon(epsilon)}. Think of someone who "
        "guesses if you took part. A coin is right 50 times in 100. With what the computer "
        f"learned, and the best trick there could be, they are right at most {_times_in(right)}. "
        + _honest(right),
    )


def _honest(right: float) -> str:
    if right > 0.9:
        return (
            "So the proof alone does not promise much. That does not mean that such a trick is "
            "known."
        )
    return "So they can learn only a little about you."


def _times_in(share: float) -> str:
    """A share as a count of guesses, rounded up."""
    for total in (100, 10_000, 1_000_000):
        right = -int(-share * total // 1)
        if right < total:
            return f"{right:,} times in {total:,}"
    return "every time"


def _good(study: Study) -> Part:
    evidence = study.evidence
    figure = evidence.pooled.figures.get("sensitivity")
    texts = ["We test the computer on images that it has never seen. It can be wrong."]
    if figure is not None and figure.value is not None and evidence.run.task == "binary":
        texts.append(
            f"Of 100 people who had what we looked for, it found about {round(100 * figure.value)}."
        )
    return "Does it work well?", (*texts, *_alike(evidence.subgroups))


def _alike(subgroups: Sequence[Subgroups]) -> tuple[str, ...]:
    """Whether it works as well for all: what was looked at, and no more than was found."""
    people = {"sex": "men and women", "age_band": "old and young"}
    looked = [s for s in subgroups if s.column in people]
    not_yet = [
        words for column, words in people.items() if column not in {s.column for s in looked}
    ]
    verdicts = {gap.verdict for s in looked for gap in s.gaps}
    texts = []
    if looked:
        groups = ", for ".join(people[s.column] for s in looked)
        texts.append(f"We also check if it works as well for {groups}.")
    if Verdict.GAP in verdicts:
        texts.append("It does not work as well for some of them as for the others.")
    if verdicts & {Verdict.UNDECIDED, Verdict.INSUFFICIENT} or (looked and not verdicts):
        texts.append("For some of them we do not know yet.")
    if not_yet:
        texts.append(f"We did not check yet if it works as well for {', for '.join(not_yet)}.")
    return tuple(texts)


def _out() -> Part:
    return "Can I say no?", (
        "Yes. You do not have to give a reason. Your care stays the same.",
        "Tell your doctor, or the privacy office of your hospital. They put you on a list. From "
        "the next step on, the computer does not learn from your images.",
        "What it has learned by then can not be taken out of the mix. That is what the noise is "
        "for, where it is used.",
    )
