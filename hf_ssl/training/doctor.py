"""The training doctor: says in plain words what the log of a run shows to be wrong, and what to change.

A rule looks at one log entry beside what the method expects. Its alarm is raised once the rule has held at
every entry over `PATIENCE` steps, as a single batch, or a plateau that a healthy run leaves, is no fault.
Live runs and finished ones are read by the same rules.
Sources of the bounds: collapse of self-distillation, arXiv 2104.14294, section 5.3 and Fig. 7; measured on
broken runs (tests/training/test_doctor.py).
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

PATIENCE = 100  # optimizer steps; a missing centre shows within 50
SAME_WEIGHTS = 1e-6  # relative distance; float32 rounds at 1e-7
FEW = 0.25  # share of the largest entropy below which the mean target is all but one prototype
SILENT = 0.05  # share of the largest information below which targets say nothing of the image
LEARNED = 0.01  # share of ln K below which the student has no more to learn from the targets
FLAT = 0.95  # share of ln K above which targets are uniform
LATE = 0.5  # share of the run after which a loss must be below the best constant guess
SPREAD_TARGETS = (
    0.1  # standard deviation of normalised target tokens over images and places; 1 when unrelated
)
TOKENS = 0.25  # share of the largest entropy of tokens below which they say little
MATCHED = 0.02  # difference of cosines with own and other texts; 0.05 after a tenth of a run that learns
FAR_CENTER = 0.5  # mean logit of a typical prototype, a cosine; 0.1 to 0.15 in healthy runs of 64 to 256

Entry = Mapping[str, float]
KINDS = {"": "images", "patch_": "patches"}  # what targets are of, by the prefix of their figures


@dataclass(frozen=True)
class Case:
    """What an entry is compared with.

    Attributes:
        config: of the pre-training model.
        args: of the training.
        expectations: of the model, for the images of a micro-batch.
    """

    config: Any
    args: Any
    expectations: Mapping[str, float]


@dataclass(frozen=True)
class Alarm:
    """Something that is wrong.

    Attributes:
        name: in two words.
        since: step of the first entry that shows it.
        step: at which it was certain.
        text: evidence, and what to change.
    """

    name: str
    since: int
    step: int
    text: str

    def __str__(self) -> str:
        return f"{self.name} since step {self.since}: {self.text}"


@dataclass(frozen=True)
class Rule:
    """A sign of something wrong.

    Attributes:
        check: evidence and advice where an entry shows the sign, else None.
        needs: what an entry must have; methods log different things.
    """

    check: Callable[[Entry, Case], str | None]
    needs: frozenset[str]


def one_prototype(entry: Entry, case: Case, prefix: str = "") -> str | None:
    """All images, or with the prefix "patch_" all patches, are given the same target."""
    most, entropy = case.expectations[f"{prefix}most_information"], entry[f"{prefix}mean_target_entropy"]
    if entropy >= FEW * most:
        return None
    config = case.config
    if config.center_momentum > 0.99:
        advice = f"lower center_momentum (now {config.center_momentum:g}) to 0.9"
    elif not config.normalize_head:
        advice = "set normalize_head to true"
    else:
        advice = f"raise {_temperature_of(config, prefix)}"
    return (
        f"the mean target has an entropy of {entropy:.2f} of up to {most:.2f} nats, "
        f"{entry[f'{prefix}prototypes_in_use']:.0f} prototypes are in use: all {KINDS[prefix]} get the same "
        f"target; {advice}"
    )


def _temperature_of(config: Any, prefix: str) -> str:
    own = f"{prefix}teacher_temperature"  # iBOT's patches have one of their own
    name = own if hasattr(config, own) else "teacher_temperature"
    return f"{name} (now {getattr(config, name):g})"


def uniform_targets(entry: Entry, case: Case, prefix: str = "") -> str | None:
    """The targets are alike for all images, or patches, because they prefer nothing."""
    log_k, entropy = case.expectations[f"{prefix}uniform_entropy"], entry[f"{prefix}target_entropy"]
    information = entry[f"{prefix}mean_target_entropy"] - entropy
    divergence = entry[f"{prefix}divergence"]
    most = case.expectations[f"{prefix}most_information"]
    is_silent = information < SILENT * most and entropy > log_k / 2
    is_flat = entropy > FLAT * log_k and divergence < LEARNED * log_k
    if not (is_silent or is_flat):
        return None
    if not case.config.normalize_head:
        advice = "set normalize_head to true"
    else:
        advice = f"lower {_temperature_of(case.config, prefix)}"
    return (
        f"targets have an entropy of {entropy:.2f} of {log_k:.2f} nats (ln K) and say {information:.2f} nats "
        f"about {KINDS[prefix]}; the student is {divergence:.3f} nats away from them and has nothing to "
        f"learn; {advice}"
    )


def teacher_is_student(entry: Entry, case: Case) -> str | None:
    """The teacher is no average but the student itself."""
    if entry["teacher_distance"] >= SAME_WEIGHTS or not entry["learning_rate"]:
        return None
    momentum = getattr(case.config, "teacher_momentum", None)
    if momentum is not None and momentum < 0.9:
        advice = f"raise teacher_momentum (now {momentum:g}) to 0.99"
    else:
        advice = f"the student does not move: raise learning_rate (now {case.args.learning_rate:g})"
    return f"their weights differ by {entry['teacher_distance']:.1e} of their length; {advice}"


def runaway_center(entry: Entry, case: Case) -> str | None:
    """The teacher's mean logits grow without bound."""
    mean_logit = entry["center_norm"] / math.sqrt(case.config.num_prototypes)
    if mean_logit <= FAR_CENTER:
        return None
    if case.config.train_prototype_scale:
        advice = "set train_prototype_scale to false"
    elif mean_logit > 1:
        advice = "no cosine is above 1, so the centre is no mean of logits: look at what moves it"
    else:
        advice = f"lower learning_rate (now {case.args.learning_rate:g})"
    return (
        f"the teacher's mean logit is {mean_logit:.2f} for a typical prototype, {FAR_CENTER} is far and "
        f"hides what tells images apart; {advice}"
    )


def constant_guess(entry: Entry, case: Case) -> str | None:
    """What is hidden is predicted no better than by one guess for all of it."""
    error, guess = entry.get("reconstruction_loss", entry["loss"]), entry["loss_of_mean"]
    if entry["step"] < LATE * case.args.max_steps or error < guess:
        return None
    return (
        f"the loss of {error:.3f} is not below {guess:.3f}, that of the best constant guess, after half of "
        f"the run; raise learning_rate (now {case.args.learning_rate:g}), or max_steps if it still falls"
    )


def frequent_tokens(entry: Entry, case: Case) -> str | None:
    """Tokens are guessed by how frequent they are."""
    loss, guess = entry["loss"], entry["token_entropy"]
    if entry["step"] < LATE * case.args.max_steps or loss < guess:
        return None
    return (
        f"the loss of {loss:.2f} nats is not below {guess:.2f}, that of guessing by frequency, after half of "
        f"the run; raise learning_rate (now {case.args.learning_rate:g}), or max_steps if it still falls"
    )


def few_tokens(entry: Entry, case: Case) -> str | None:
    """Nearly all patches get the same few tokens."""
    config = case.config
    num_codes = config.vocab_size if hasattr(config, "vocab_size") else config.num_codes
    if entry["token_entropy"] >= TOKENS * math.log(num_codes):
        return None
    advice = "train the tokenizer again"
    if hasattr(config, "codebook_momentum"):
        advice = f"lower codebook_momentum (now {config.codebook_momentum:g})"
    return (
        f"{entry['perplexity']:.1f} of {num_codes} tokens are used, as if evenly: they say next to nothing "
        f"of the patches; {advice}, and give it restart_every"
    )


def collapsed_targets(entry: Entry, case: Case) -> str | None:
    """The teacher gives all patches of all images the same tokens."""
    if entry["target_std"] >= SPREAD_TARGETS:
        return None
    return (
        f"target tokens differ by {entry['target_std']:.3f} over images and places, {SPREAD_TARGETS} is "
        f"little: the teacher has collapsed; raise teacher_momentum (now {case.config.teacher_momentum:g}) "
        f"or lower learning_rate (now {case.args.learning_rate:g})"
    )


ONE_PROTOTYPE = ("mean_target_entropy", "prototypes_in_use")
UNIFORM_TARGETS = ("target_entropy", "mean_target_entropy", "divergence")


def unmatched_pairs(entry: Entry, case: Case) -> str | None:
    """An image is no nearer to its own text than to the others'."""
    own, others = entry["positive_cosine"], entry["negative_cosine"]
    if entry["step"] < LATE * case.args.max_steps or own - others > MATCHED:
        return None
    return (
        f"an image's cosine with its own text is {own:.3f}, with others {others:.3f}, after half of the run; "
        f"raise learning_rate (now {case.args.learning_rate:g}), or see whether captions belong to their "
        "images"
    )


RULES = {
    "one prototype": Rule(one_prototype, frozenset(ONE_PROTOTYPE)),
    "uniform targets": Rule(uniform_targets, frozenset(UNIFORM_TARGETS)),
    "one prototype for patches": Rule(
        partial(one_prototype, prefix="patch_"), frozenset(f"patch_{name}" for name in ONE_PROTOTYPE)
    ),
    "uniform targets of patches": Rule(
        partial(uniform_targets, prefix="patch_"), frozenset(f"patch_{name}" for name in UNIFORM_TARGETS)
    ),
    "teacher = student": Rule(teacher_is_student, frozenset({"teacher_distance", "learning_rate"})),
    "runaway centre": Rule(runaway_center, frozenset({"center_norm"})),
    "constant guess": Rule(constant_guess, frozenset({"loss_of_mean"})),
    "frequent tokens": Rule(frequent_tokens, frozenset({"token_entropy", "accuracy"})),
    "few tokens": Rule(few_tokens, frozenset({"token_entropy", "perplexity"})),
    "collapsed targets": Rule(collapsed_targets, frozenset({"target_std"})),
    "unmatched pairs": Rule(unmatched_pairs, frozenset({"positive_cosine", "negative_cosine"})),
}


class Doctor:
    """Reads the entries of one run in their order.

    Args:
        case: what they are compared with.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self._first: dict[str, int] = {}  # step at which a rule was first looked at
        self._since: dict[str, int] = {}
        self.judged: set[str] = set()  # rules that could have raised their alarm by now
        self._raised: set[str] = set()

    def read(self, entry: Entry) -> list[Alarm]:
        """Alarms that this entry makes certain; each is raised once."""
        if "loss" not in entry:
            return []
        step, alarms = int(entry["step"]), []
        for name, rule in RULES.items():
            if not entry.keys() >= rule.needs:
                continue
            if step - self._first.setdefault(name, step) >= PATIENCE:
                self.judged.add(name)
            text = rule.check(entry, self.case)
            if text is None:
                self._since.pop(name, None)
                continue
            since = self._since.setdefault(name, step)
            if step - since >= PATIENCE and name not in self._raised:
                self._raised.add(name)
                alarms.append(Alarm(name, since, step, text))
        return alarms

    def read_all(self, history: Iterable[Entry]) -> list[Alarm]:
        """Alarms of many entries."""
        return [alarm for entry in history for alarm in self.read(entry)]


class LiveDoctor(TrainerCallback):
    """Reads along while a run goes on, and warns.

    Args:
        case: of the run.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self._doctor = Doctor(case)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What a resumed run has been told is not said again."""
        self._doctor = Doctor(self.case)
        self._doctor.read_all(state.log_history)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One line for every new alarm."""
        if state.is_world_process_zero:
            for alarm in self._doctor.read(state.log_history[-1]):
                logger.warning("alarm     %s", alarm)


@dataclass(frozen=True)
class Diagnosis:
    """What a log tells.

    Attributes:
        alarms: in the order of their steps.
        judged: names of the rules that the log was long enough for and has the figures of.
    """

    alarms: list[Alarm]
    judged: list[str]


def diagnose(run: str) -> Diagnosis:
    """Read a run that has ended, or goes on elsewhere.

    Args:
        run: its folder.

    Raises:
        RecipeError: the folder is no run, or has no log yet.
    """
    import torch
    from transformers import AutoConfig, AutoModelForPreTraining

    from hf_ssl.hub.cards import RECIPE_FILE
    from hf_ssl.training.checkpoints import STATE_FILE, checkpoints
    from hf_ssl.training.recipes import RecipeError, load_recipe, training_arguments

    folder = Path(run)
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(f"'{run}' is no run: it has no {RECIPE_FILE}")
    files = [part / STATE_FILE for part in (folder, *checkpoints(folder))]
    states = {file: TrainerState.load_from_json(str(file)) for file in files if file.is_file()}
    # A finished run that is gone on with has a newer log in its checkpoints.
    newest = max(states, key=lambda file: states[file].global_step, default=None)
    if newest is None:
        raise RecipeError(f"'{run}' has no log yet: it has no finished checkpoint; wait for the first")
    recipe = load_recipe(str(folder / RECIPE_FILE))
    args = training_arguments(recipe, run)
    config = AutoConfig.from_pretrained(newest.parent)
    with torch.device("meta"):
        model = AutoModelForPreTraining.from_config(config)
    case = Case(config, args, model.expectations(args.per_device_train_batch_size))
    doctor = Doctor(case)
    alarms = doctor.read_all(states[newest].log_history)
    return Diagnosis(alarms, [name for name in RULES if name in doctor.judged])
