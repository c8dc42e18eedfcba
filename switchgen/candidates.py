"""Candidates and the pool: ladder order, the switcher's base, vocabulary agreement."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from switchgen.config import CandidateConfig, Recipe, SwitcherConfig, nearest
from switchgen.engines.base import Engine
from switchgen.errors import ConfigError, ModelError
from switchgen.loading import adapter_folder
from switchgen.models import ModelStore
from switchgen.prompts import FORMATS, PLAIN_TEMPLATE, SwitcherPrompt, chat_prompt_ids, plain_prompt_ids
from switchgen.trace import Query
from switchgen.vocabulary import Vocabulary

logger = logging.getLogger("switchgen")


@dataclass
class Candidate:
    """A pool member: a model that writes, and how it sees a trace."""

    name: str
    engine: Engine
    prompt: str
    """`chat`, or a plain template with {query} and {trace}."""
    vocabulary_index: int = 0
    """Which of the pool's vocabularies it writes in."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Its tokenizer."""
        return self.engine.vocabulary

    def prompt_ids(self, query: Query) -> list[int]:
        """Tokens this candidate reads before the trace."""
        if self.prompt == "chat":
            return chat_prompt_ids(self.vocabulary, query.messages)
        return plain_prompt_ids(self.vocabulary, query, self.prompt)


@dataclass
class Switcher:
    """The LM that decides, with its prompt format."""

    engine: Engine
    prompt: SwitcherPrompt


class Pool:
    """The candidates in ladder order, pretrained first.

    Example:
        >>> pool = Pool.load([CandidateConfig(name="base", model="ladder/pretrained"),
        ...                   CandidateConfig(name="aligned", model="ladder/aligned")])  # doctest: +SKIP

    Raises:
        ModelError: a model cannot be loaded, or its tokenizer cannot be used.
        ConfigError: two candidates have one name.
    """

    def __init__(self, candidates: Sequence[Candidate], models: ModelStore | None = None) -> None:
        if not candidates:
            raise ModelError("a pool needs at least one candidate")
        self.candidates = list(candidates)
        if repeated := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ConfigError(f"two candidates are called {repeated[0]!r}; names tell them apart")
        self.models = models or ModelStore()
        self.vocabularies: list[Vocabulary] = []
        for candidate in self.candidates:
            candidate.vocabulary_index = self._vocabulary_index(candidate.vocabulary)
        difference = self.vocabulary_difference()
        if difference is not None:
            logger.info(
                "pool: %d vocabularies; segments are handed over as text (%s)", len(self.vocabularies), difference
            )
        for candidate in self.candidates:
            if not candidate.engine.stop_ids:
                logger.warning("%s: no end-of-text token is known; its segments end by length only", candidate.name)

    def _vocabulary_index(self, vocabulary: Vocabulary) -> int:
        for index, known in enumerate(self.vocabularies):
            if known is vocabulary or known.first_difference(vocabulary) is None:
                return index
        self.vocabularies.append(vocabulary)
        return len(self.vocabularies) - 1

    @classmethod
    def load(
        cls, configs: Sequence[CandidateConfig], *, max_slots: int = 128, models: ModelStore | None = None
    ) -> Pool:
        """Load every candidate; candidates with the same `model` share its weights."""
        models = models or ModelStore()
        models.note_candidates(configs)
        candidates = []
        for config in configs:
            engine = models.engine(config, max_slots=max_slots)
            candidates.append(Candidate(config.name, engine, prompt_style(config, engine.vocabulary)))
        return cls(candidates, models)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Pool:
        """The pool of a recipe whose paths are resolved (`rundir.open_run`)."""
        models = ModelStore(compiled=recipe.engine.compile)
        return cls.load(recipe.pool, max_slots=recipe.engine.kv_budget or 2 * recipe.engine.max_rows, models=models)

    def load_switcher(self, config: SwitcherConfig, *, max_slots: int = 128) -> Switcher:
        """The switcher of a recipe: its base with its adapter (none: the untuned switcher).

        A base that is a candidate's name, or the same model as a candidate, shares that candidate's weights.

        Raises:
            ConfigError: the adapter was trained for another number of candidates, or in another format.
            ModelError: the pool or the base cannot have a switcher.
        """
        if len(self) < 2:
            raise ModelError(f"a switcher chooses between candidates; the pool has only {self.names[0]!r}")
        if len(self) > 10:
            raise ModelError(f"a switcher chooses between at most 10 candidates; the pool has {len(self)}")
        source = self.models.candidate_config(config.base or self.names[-1])
        if source is None:
            assert config.base is not None
            source = CandidateConfig(name="switcher-base", model=config.base, dtype=config.dtype, device=config.device,
                                     revision=config.revision, trust_remote_code=config.trust_remote_code)  # fmt: skip
        elif config.revision is not None or config.trust_remote_code:
            logger.warning("switcher.revision and switcher.trust_remote_code have no effect: its base is the candidate "
                           "%s, whose own count", source.name)  # fmt: skip
        if source.engine != "transformers":
            raise ModelError(f"switcher.base: {source.name!r} is behind servers; a switcher's logits are read in "
                             "this process: name a model folder")  # fmt: skip
        wanted = {key: value for key in ("dtype", "device") if (value := getattr(config, key)) != "auto"}
        source = source.model_copy(update=wanted)
        if config.adapter is not None:
            if source.adapter is not None:
                raise ModelError(
                    f"switcher.base: {source.name!r} is itself an adapter ({source.adapter}); a switcher adapter "
                    "needs a whole model as its base"
                )
            check_trained_for(config.adapter, self.names, config)
            source = source.model_copy(update={"adapter": config.adapter})
        engine = self.models.engine(source, max_slots=max_slots, name="switcher")
        chat = prompt_style(source, engine.vocabulary) == "chat"
        return Switcher(engine, SwitcherPrompt(engine.vocabulary, len(self), chat=chat, format=FORMATS[config.format]))

    def __len__(self) -> int:
        return len(self.candidates)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.candidates)

    @property
    def names(self) -> list[str]:
        """Candidate names in ladder order."""
        return [candidate.name for candidate in self.candidates]

    def index(self, name: str) -> int:
        """A candidate's place on the ladder.

        Raises:
            ConfigError: no candidate has that name.
        """
        if name not in self.names:
            raise ConfigError(
                f"no candidate is called {name!r}{nearest(name, self.names)}; allowed: {', '.join(self.names)}"
            )
        return self.names.index(name)

    def vocabulary_difference(self) -> str | None:
        """Where the first two different vocabularies differ; None if all candidates write in one."""
        if len(self.vocabularies) == 1:
            return None
        return self.vocabularies[0].first_difference(self.vocabularies[1])


def prompt_style(config: CandidateConfig, vocabulary: Vocabulary) -> str:
    has_template = bool(vocabulary.tokenizer.chat_template)
    if config.prompt == "chat" and not has_template:
        raise ModelError(f"{config.name}: prompt is chat, but {config.model} has no chat template; use plain")
    if config.prompt == "auto":
        return "chat" if has_template else PLAIN_TEMPLATE
    return PLAIN_TEMPLATE if config.prompt == "plain" else config.prompt


def check_trained_for(adapter: str, names: Sequence[str], settings: SwitcherConfig) -> None:
    """See that a switcher of our own was trained for as many candidates as the pool has, in the recipe's format.

    Raises:
        ConfigError: it was not.
    """
    folder = Path(adapter) if Path(adapter).is_dir() else adapter_folder(adapter)
    path = folder / "switchgen.json"
    if not path.is_file():
        return
    facts = json.loads(path.read_text(encoding="utf-8"))
    trained, shown = facts.get("candidates", []), facts.get("format", settings.format)
    if settings.kind == "lm" and shown != settings.format:
        raise ConfigError(
            f"switcher.format: {settings.format}: {adapter} was trained with switcher.format: {shown}; allowed: that "
            "one, or a new switcher"
        )
    if trained and len(trained) != len(names):
        raise ConfigError(
            f"{adapter}: this switcher chooses between {len(trained)} candidates ({', '.join(trained)}); the pool has "
            f"{len(names)} ({', '.join(names)})"
        )
    if trained and list(trained) != list(names):
        # To carry a switcher over to another pool is an experiment of the paper's; to mix up the order is a mistake.
        logger.warning("%s: this switcher was trained for %s, in this order; its labels now mean %s", adapter,
                       ", ".join(trained), ", ".join(names))  # fmt: skip
