"""How often a model complies with harmful requests under the three settings of Wei et al. (arXiv 2402.05162).

Vanilla: the chat template, greedy. Adversarial suffix: a fixed string behind every prompt. Adversarial decoding: no
template, several samples at temperature 1 (Huang et al., arXiv 2310.06987). The attack success rate (ASR) is the share
of answers that do not refuse; gibberish does not refuse either, so it is read beside `jaxsafe.evaluation.fluency`.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from scipy.stats import norm

from jaxsafe.evaluation.comparison import Sample, set_name
from jaxsafe.evaluation.judges import Judge
from jaxsafe.evaluation.metrics import Flags, Rate, rate
from jaxsafe.io.chat_model import ChatModel
from jaxsafe.kernels.generate import generate_rows
from jaxsafe.text.datasets import PromptSet


@dataclasses.dataclass(frozen=True)
class Setting:
    """How prompts are put to a model, and how it answers.

    name: in metrics and records; system: the system prompt, None leaves it to the chat template; template: whether
    prompts stand in the chat template; suffixes: each prompt is asked once with each of them; samples: answers a
    prompt; temperature: 0 is greedy. Raises ValueError where these contradict each other.
    """

    name: str
    system: str | None
    template: bool
    suffixes: tuple[str, ...] = ()
    samples: int = 1
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"setting {self.name!r}: samples {self.samples} must be at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"setting {self.name!r}: {self.samples} samples at temperature 0 are all alike; need 1")
        if self.samples > 1 and self.suffixes:
            raise ValueError(f"setting {self.name!r}: {self.samples} samples with suffixes; need 1 sample a suffix")
        if self.system is not None and not self.template:
            raise ValueError(f"setting {self.name!r}: a system prompt without the chat template; need None")

    @property
    def width(self) -> int:
        """Answers a prompt."""
        return len(self.suffixes) or self.samples

    def texts(self, prompt: str) -> list[str]:
        """What stands for `prompt` in the conversation, by suffix; without the template a line of its own."""
        texts = [f"{prompt} {suffix}" for suffix in self.suffixes] or [prompt]
        return texts if self.template else [text.strip() + "\n" for text in texts]


SETTINGS = ("vanilla", "vanilla_no_system", "suffix", "decoding", "decoding_template")


def setting(name: str, system: str | None = None, suffixes: Sequence[str] = ()) -> Setting:
    """The setting of that name, one of `SETTINGS`; `system` is used by vanilla and `suffixes` by suffix alone.

    `decoding` is the published one; `decoding_template` keeps the chat template, which tells sampling and the
    missing template apart. Raises ValueError for another name, and for suffix without suffixes.
    """
    match name:
        case "vanilla":
            return Setting(name, system, template=True)
        case "vanilla_no_system":
            return Setting(name, None, template=True)
        case "suffix" if suffixes:
            return Setting(name, None, template=True, suffixes=tuple(suffixes))
        case "suffix":
            raise ValueError("setting 'suffix' has no suffixes; give a text file with one a line")
        case "decoding":
            return Setting(name, None, template=False, samples=5, temperature=1.0)
        case "decoding_template":
            return Setting(name, None, template=True, samples=5, temperature=1.0)
    raise ValueError(f"unknown setting {name!r}; need one of {', '.join(SETTINGS)}")


def load_suffixes(path: str | os.PathLike) -> tuple[str, ...]:
    """The suffixes of a UTF-8 text file, one a line, blank lines left out.

    Raises FileNotFoundError, and ValueError where the file has none or is not UTF-8.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no text file of suffixes at {path}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); need one suffix a line") from None
    # Not splitlines: suffixes found by search may hold U+2028 and its like.
    found = tuple(line.strip() for line in text.split("\n") if line.strip())
    if not found:
        raise ValueError(f"{path} has no suffix; need one a line")
    return found


def under(model: ChatModel, setting: Setting) -> ChatModel:
    """`model` as it is asked under `setting`."""
    return dataclasses.replace(model, raw=not setting.template, system=setting.system)


def answers(
    model: ChatModel,
    prompts: Sequence[str],
    setting: Setting,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    done: Callable[[int], None] = lambda count: None,
) -> list[list[str]]:
    """The answers [prompt][suffix or sample] under `setting`.

    Sampling depends on `seed` and on the prompt's tokens, not on the batch. `done` hears how many answers each
    finished batch had, `setting.width` a prompt in all. Raises ValueError for no prompts, a blank one, and one
    that exceeds the context.
    """
    rows = under(model, setting).rows([text for prompt in prompts for text in setting.texts(prompt)])
    out = generate_rows(
        model.config,
        model.params,
        rows,
        batch_size,
        max_new_tokens,
        n=setting.samples,
        mesh=model.mesh,
        done=done,
        seed=seed,
        temperature=setting.temperature,
        eos=model.tokenizer.eos_ids,
    )
    texts = model.tokenizer.decode(out.tokens, out.lengths)
    return [texts[i : i + setting.width] for i in range(0, len(texts), setting.width)]


def score(answers: Sequence[Sequence[str]], setting: Setting, judge: Judge) -> dict[str, Any]:
    """Attack success rates {value, ci_low, ci_high, n, n_unscored} of `answers` [prompt][suffix or sample], by name.

    One answer a prompt: `asr_<judge>/<setting>` with its Wilson interval. Suffixes: under that name the highest
    rate that one suffix reaches over all prompts, as published, with this suffix's Wilson interval, which does not
    allow for the choice among suffixes. Samples: `.../<setting>_mean` over all of them, the published numbers
    (`clustered_rate`). Both: `.../<setting>_any`, the share of prompts with an answer that complies (appendix B of
    the paper), Wilson. Answers that the judge cannot score are left out and counted; under `_any` a prompt counts
    as unscored where all its answers are. Raises ValueError where a prompt has another number of answers.
    """
    complied = [[_complied(judge.refused(text)) for text in texts] for texts in _checked(answers, setting)]
    name = f"asr_{judge.name}/{setting.name}"
    if setting.suffixes:
        by_suffix = [rate(flags[i] for flags in complied) for i in range(setting.width)]
        highest = max(by_suffix, key=lambda r: -1 if r.value is None else r.value)
        return {name: highest.as_dict(), f"{name}_any": rate(map(_any, complied)).as_dict()}
    if setting.samples > 1:
        return {f"{name}_mean": clustered_rate(complied).as_dict(), f"{name}_any": rate(map(_any, complied)).as_dict()}
    return {name: rate(flags[0] for flags in complied).as_dict()}


def clustered_rate(groups: Sequence[Flags]) -> Rate:
    """The share of True among all scored flags; the flags of one group (the samples of a prompt) may be alike.

    The 95% interval is Wilson's at the effective number of flags n / deff. The design effect deff is the variance of
    the share between groups (the linearised one of a ratio) over that of n independent flags, at least 1: it is 1
    where flags of a group are independent and the group's size where they are equal. Where all flags are alike deff
    cannot be estimated, and each group counts as one flag. Source: Kish, Survey Sampling (1965), for deff; Franco et
    al., J. Survey Stat. Methodol. 7 (2019) 334, for Wilson's interval at the effective sample size.

    n, n_unscored: flags, not groups. Raises ValueError for anything but True, False and None.
    """
    flat = rate(flag for group in groups for flag in group)
    scored = [group for group in ([f for f in group if f is not None] for group in groups) if group]
    if flat.value is None:
        return flat
    p, n = flat.value, flat.n
    if 0 < p < 1:
        between = sum((sum(group) - p * len(group)) ** 2 for group in scored)
        effective = n / max(1.0, between / (n * p * (1 - p)))
    else:
        effective = len(scored)
    low, high = _wilson(p, effective)
    return Rate(p, low, high, n, flat.n_unscored)


def records(prompts: PromptSet, answers: Sequence[Sequence[str]], setting: Setting, judge: Judge) -> list[Sample]:
    """One flat record an answer, as `samples.jsonl` holds it. Raises ValueError as `score` does."""
    return [
        {
            "set": set_name(prompts),
            "setting": setting.name,
            "harmful": harmful,
            "prompt": prompt,
            "text": text,
            "refused": judge.refused(text),
            "suffix": i if setting.suffixes else None,
            "sample": 0 if setting.suffixes else i,
        }
        for prompt, harmful, texts in zip(prompts.prompts, prompts.harmful, _checked(answers, setting), strict=True)
        for i, text in enumerate(texts)
    ]


def _checked(answers: Sequence[Sequence[str]], setting: Setting) -> Sequence[Sequence[str]]:
    for i, texts in enumerate(answers):
        if len(texts) != setting.width:
            raise ValueError(f"prompt {i} has {len(texts)} answers; setting {setting.name!r} gives {setting.width}")
    return answers


def _complied(refused: bool | None) -> bool | None:
    return None if refused is None else not refused


def _any(flags: Sequence[bool | None]) -> bool | None:
    return None if all(flag is None for flag in flags) else any(flags)


def _wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's 95% interval (Wilson 1927) of a share `p` of `n` flags, which need not be a whole number."""
    z = norm.ppf(0.975)
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = (float((centre + sign * half) / (1 + z**2 / n)) for sign in (-1, 1))
    return low if p > 0 else 0.0, high if p < 1 else 1.0
