"""What a run of attacks that leave the weights alone has of its own."""

import dataclasses

from jaxsafe.records.run import Rate


@dataclasses.dataclass(frozen=True)
class About:
    """A variant's columns in the table.

    attack: its name, "" for the plain request; control: whether it is a control; tokens: of the opening or the suffix.
    """

    attack: str
    control: bool = False
    tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Tries:
    """What k tries of an attack at each prompt come to, or those of its control.

    Of harmful prompts: complied is the share of all answers that comply, worst that of prompts with one that does;
    broken: the share of all answers that are. Of safe prompts: refused is the share of all answers that refuse,
    ever_refused that of prompts with one that does, ever_broken that of prompts with a broken one. One try is as good
    as another in `complied`, `broken` and `refused`, while the others grow with k by chance alone. Means over `draws`
    of a control.
    """

    attack: str
    control: bool
    k: int
    draws: int
    complied: Rate
    worst: Rate
    broken: Rate
    refused: Rate
    ever_refused: Rate
    ever_broken: Rate


@dataclasses.dataclass(frozen=True)
class Begun:
    """Answers of a variant to harmful prompts that begin with a given opening.

    Shares that comply by the judge's verdict on what the model wrote behind the opening (as everywhere else in the
    run), and on the opening together with it; broken answers comply in neither.
    """

    variant: str
    opening: str
    behind: Rate
    whole: Rate


@dataclasses.dataclass(frozen=True)
class Details:
    """Of a run of such attacks.

    sources: the paper of each attack; tries: of attacks that are tried several times, each before its control; begun:
    of answers with openings; direction: which one was ablated, in words, "" where none was.
    """

    sources: dict[str, str]
    tries: tuple[Tries, ...]
    begun: tuple[Begun, ...]
    direction: str
    perplexity_text: str
