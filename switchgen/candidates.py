"""Candidates and the pool: loading, ladder order, devices, adapters over shared weights, vocabulary agreement."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from switchgen.config import CandidateConfig, Recipe, SwitcherConfig, nearest
from switchgen.engines.base import Context, Engine
from switchgen.engines.remote import RemoteEngine
from switchgen.engines.replicas import Replicas
from switchgen.engines.snapshot import SnapshotEngine
from switchgen.engines.transformers import TOLERANCE, SlotEngine
from switchgen.errors import ConfigError, ModelError
from switchgen.prompts import FORMATS, PLAIN_TEMPLATE, SwitcherPrompt, chat_prompt_ids, plain_prompt_ids
from switchgen.trace import Query
from switchgen.vocabulary import Vocabulary

logger = logging.getLogger("switchgen")

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


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
    """

    def __init__(self, candidates: Sequence[Candidate], models: ModelStore | None = None) -> None:
        if not candidates:
            raise ModelError("a pool needs at least one candidate")
        self.candidates = list(candidates)
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
        models.note_adapters(configs)
        candidates = []
        for config in configs:
            engine = models.engine(config, max_slots=max_slots)
            candidates.append(Candidate(config.name, engine, prompt_style(config, engine.vocabulary)))
        return cls(candidates, models)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Pool:
        """The pool of a recipe whose paths are resolved (`rundir.resolve`)."""
        return cls.load(recipe.pool, max_slots=recipe.engine.kv_budget or 2 * recipe.engine.max_rows)

    def load_switcher(self, config: SwitcherConfig, *, max_slots: int = 128) -> Switcher:
        """The switcher of a recipe: its base with its adapter (none: the untuned switcher).

        A base that is a candidate's name, or the same model as a candidate, shares that candidate's weights.
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


class ModelStore:
    """Loaded weights, each once: candidates and switcher that name the same model share it, adapters and all."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, ...], _SharedModel] = {}
        self._vocabularies: dict[tuple[str, str | None], Vocabulary] = {}
        self._configs: list[CandidateConfig] = []

    def note_adapters(self, configs: Sequence[CandidateConfig]) -> None:
        """Remember the pool's candidates, so that a switcher can name one of them as its base."""
        self._configs.extend(configs)

    def candidate_config(self, name_or_model: str) -> CandidateConfig | None:
        """The candidate of that name, or the first whose plain model it is."""
        for config in self._configs:
            if config.name == name_or_model:
                return config
        return next((c for c in self._configs if c.model == name_or_model and c.adapter is None), None)

    def engine(self, config: CandidateConfig, *, max_slots: int, name: str | None = None) -> Engine:
        """An engine for a model with or without adapter; caches are its own, weights are shared.

        Raises:
            ModelError: missing or unreadable files, a tokenizer that does not fit.
        """
        if config.engine == "openai":
            return self._remote(config, name or config.name)
        key = (config.model, config.dtype, config.device, str(config.device_map), str(config.quantization),
               str(config.revision))  # fmt: skip
        if key not in self._models:
            self._models[key] = _SharedModel(load_model(config))
        shared = self._models[key]
        adapter = shared.add_adapter(config.adapter) if config.adapter else None
        vocabulary = self._vocabulary(config)
        model = shared.model
        rows = model.get_output_embeddings().weight.shape[0]
        if len(vocabulary) > rows:
            raise ModelError(
                f"{config.name}: the tokenizer of {vocabulary.source} has {len(vocabulary)} tokens, the model "
                f"{config.model} only {rows}"
            )
        arguments: dict[str, Any] = {
            "stop_ids": stop_ids(model, vocabulary),
            "max_positions": _max_positions(model),
            "max_slots": max_slots,
            "activate": lambda: shared.activate(adapter),
        }
        # Which kind of engine a model needs is its architecture's affair: found once, and warned of once.
        build = build_engine if shared.engine_kind is None else shared.engine_kind
        engine = build(name or config.name, model, vocabulary, **arguments)
        shared.engine_kind = type(engine)
        if isinstance(engine, SlotEngine):
            engine.family, engine.adapter = shared, adapter
        return engine

    def _remote(self, config: CandidateConfig, name: str) -> RemoteEngine:
        """A candidate behind servers; only its tokenizer and its config are loaded."""
        settings = config.server
        assert settings is not None
        try:
            model_config = AutoConfig.from_pretrained(
                config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{config.name}: the config of {config.model!r} cannot be loaded: {_short(error)}"
            ) from None
        vocabulary = self._vocabulary(config)
        try:
            replicas = Replicas(
                config.name, settings.base_urls, timeout=settings.timeout, retries=settings.retries,
                api_key=os.environ.get(settings.api_key_env) or None,
            )  # fmt: skip
        except ImportError:
            raise ModelError(f"{config.name}: engine openai needs httpx: pip install 'switchgen[remote]'") from None
        limit = getattr(model_config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        eos = vocabulary.tokenizer.eos_token_id
        return RemoteEngine(
            name, vocabulary, replicas, model=settings.model or config.model,
            stop_ids=frozenset() if eos is None else frozenset({eos}), max_positions=settings.max_positions or limit,
            hidden_size=getattr(model_config.get_text_config(), "hidden_size", 0),
            in_flight=settings.in_flight, takes_tokens={"auto": None, "tokens": True, "text": False}[settings.prompts],
        )  # fmt: skip

    def _vocabulary(self, config: CandidateConfig) -> Vocabulary:
        source = config.model
        # An adapter's folder may bring a tokenizer of its own (a chat template, say).
        if config.adapter and (Path(config.adapter) / "tokenizer.json").is_file():
            source = config.adapter
        key = (source, config.revision)
        if key not in self._vocabularies:
            self._vocabularies[key] = load_vocabulary(
                source, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        return self._vocabularies[key]


class _SharedModel:
    """One model's weights and the adapters that were put over them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.adapters: dict[str, str] = {}
        self.engine_kind: type[SlotEngine] | type[SnapshotEngine] | None = None
        self.together = True
        self._active: str | None = None
        self._peft: Any = None

    def add_adapter(self, path: str) -> str:
        """Put a PEFT adapter over the weights; returns its name there."""
        if path in self.adapters:
            return self.adapters[path]
        from peft import PeftConfig, PeftModel  # noqa: PLC0415

        check_adapter(path)
        name = f"adapter{len(self.adapters)}"
        try:
            config = PeftConfig.from_pretrained(path)
            if config.is_prompt_learning:
                raise ModelError(f"adapter {path!r} learns prompts; allowed: adapters over weights, such as LoRA")
            self.together &= _mixes(config)
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self.model, path, adapter_name=name, use_safetensors=True)
            else:
                self._peft.load_adapter(path, adapter_name=name, use_safetensors=True)
            self._check_weights(path, name)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"adapter {path!r} does not fit {self.model.name_or_path!r}: {_short(error)}") from None
        self._peft.eval()
        self.adapters[path] = name
        # PEFT leaves the adapter active that was there before.
        self._switch(name)
        return name

    def _check_weights(self, path: str, name: str) -> None:
        """See that every weight of the adapter found its place, and every place its weight."""
        from peft import get_peft_model_state_dict  # noqa: PLC0415
        from peft.utils import load_peft_weights  # noqa: PLC0415

        wanted = set(get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False))
        given = set(load_peft_weights(path, device="cpu"))
        wrong = sorted(given - wanted) or sorted(wanted - given)
        if wrong:
            kind = "has no place for its weight" if given - wanted else "expects a weight that it lacks:"
            raise ModelError(f"adapter {path!r} does not fit: {self.model.name_or_path!r} {kind} {wrong[0]!r}")

    def activate(self, adapter: str | None) -> None:
        """Switch to an adapter, or to the bare weights."""
        if self._peft is not None and self._active != adapter:
            self._switch(adapter)

    def forward_each(self, adapters: Sequence[str | None], **kwargs: Any) -> Any:
        """The model's forward with an adapter (None: the bare weights) for each row of the batch."""
        if self._peft is None:
            return self.model(**kwargs)
        if self._active is None:
            self._switch(next(iter(self.adapters.values())))
        return self._peft(adapter_names=["__base__" if name is None else name for name in adapters], **kwargs)

    def _switch(self, adapter: str | None) -> None:
        tuner = self._peft.base_model
        if adapter is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            tuner.set_adapter(adapter)
        self.model.requires_grad_(False)
        self._active = adapter


# What makes an adapter more than low-rank products beside the base's own layers.
_BEYOND_LORA = (
    "use_dora", "alora_invocation_tokens", "modules_to_save", "trainable_token_indices", "target_parameters",
    "layer_replication", "arrow_config", "kasa_config", "monteclora_config", "velora_config", "use_bdlora",
    "use_qalora",
)  # fmt: skip


def _mixes(config: Any) -> bool:
    """Whether PEFT can compute rows with this adapter and rows with others in one forward."""
    plain = config.peft_type == "LORA" and config.bias == "none"
    return plain and not any(getattr(config, name, None) for name in _BEYOND_LORA)


def build_engine(
    name: str, model: PreTrainedModel, vocabulary: Vocabulary, **arguments: Any
) -> SlotEngine | SnapshotEngine:
    """A slot engine where the model's attention allows it and the numbers agree, else the slow one, with a warning."""
    reason = _unsupported(model)
    if reason is None:
        reference_attention = model.config._attn_implementation
        reference = _plain_logits(model, arguments.get("activate"))
        engine = SlotEngine(name, model, vocabulary, **arguments)
        reason = _disagreement(engine, reference)
        if reason is None:
            return engine
        model.set_attn_implementation(reference_attention)
    logger.warning(
        "%s: caches of %s cannot be kept in slots (%s); its rows are decoded one by one, which is slow",
        name, type(model).__name__, reason,
    )  # fmt: skip
    return SnapshotEngine(name, model, vocabulary, **arguments)


def _unsupported(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if kinds:
        return f"layers of kind {', '.join(sorted(kinds))}"
    if any(hasattr(module, "sinks") for module in model.modules()):
        return "attention sinks"
    return None


_CHECK_LENGTH = 12


def _check_ids(model: PreTrainedModel) -> list[int]:
    size = model.get_input_embeddings().weight.shape[0]
    return [(7 + 37 * index) % size for index in range(_CHECK_LENGTH)]


@torch.inference_mode()
def _plain_logits(model: PreTrainedModel, activate: Callable[[], None] | None) -> torch.Tensor:
    if activate is not None:
        activate()
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([_check_ids(model)], device=device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, -1].double()
    return logits


@torch.inference_mode()
def _disagreement(engine: SlotEngine, reference: torch.Tensor) -> str | None:
    """Compare the slot engine with the plain forward on a few tokens, read in two parts and one decode step."""
    ids = _check_ids(engine.model)
    context = Context(ids[: _CHECK_LENGTH // 2])
    try:
        engine.begin([context])
        context.ids.extend(ids[_CHECK_LENGTH // 2 :])
        logits = engine.begin([context]).logits()[0].double()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return f"its forward failed: {_short(error)}"
    finally:
        engine.release(context)
        engine.stats = type(engine.stats)()
    spread = (reference.max() - reference.min()).item() or 1.0
    difference = (logits - reference).abs().max().item() / spread
    if difference > TOLERANCE.get(engine.model.dtype, 0.15):
        return f"logits differ from a plain forward's by {difference:.2g} of their range"
    # The check's few tokens lie within any window: see that the attention function was told of it at all.
    plan = engine.cache.plan
    assert plan is not None
    if _slides(engine.model) and all(window is None for window, _ in plan.masks):
        return "its attention does not say how far its window reaches"
    return None


def _slides(model: PreTrainedModel) -> bool:
    """Whether some layer sees a sliding window only."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return "sliding_attention" in kinds
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True) is not False


def _max_positions(model: PreTrainedModel) -> int:
    """Longest context in tokens.

    LongRoPE turns every position by another factor once a context is longer than the original one: a row would depend
    on the longest of its batch, and what its cache holds would be wrong. Such contexts are not written.
    """
    config = model.config.get_text_config()
    limit: int = getattr(config, "max_position_embeddings", None) or 1 << 30
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original and original < limit:
        logger.warning("%s: contexts are limited to %d tokens, beyond which its positions change", model.name_or_path,
                       original)  # fmt: skip
        return int(original)
    return limit


def stop_ids(model: PreTrainedModel, vocabulary: Vocabulary) -> frozenset[int]:
    """A candidate's end-of-text tokens: its generation config's and its tokenizer's."""
    found: set[int] = set()
    for value in (model.generation_config.eos_token_id if model.generation_config else None,
                  model.config.get_text_config().eos_token_id, vocabulary.tokenizer.eos_token_id):  # fmt: skip
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return frozenset(found)


def load_model(config: CandidateConfig) -> PreTrainedModel:
    """Load a causal LM in eval mode: safetensors only, no code from its repository unless the recipe asks for it.

    Raises:
        ModelError: it is not there, is no causal LM, or its device or quantization cannot be had.
    """
    check_model(config)
    dtype: Any = _DTYPES.get(config.dtype, "auto")
    arguments: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "revision": config.revision,
                                 "trust_remote_code": config.trust_remote_code}  # fmt: skip
    if config.quantization is not None:
        from transformers import BitsAndBytesConfig  # noqa: PLC0415

        if not torch.cuda.is_available():
            raise ModelError(f"{config.name}: quantization {config.quantization} needs a CUDA device")
        four = config.quantization == "4bit"
        arguments["quantization_config"] = BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four)
    device = pick_device(config.name, config.device)
    if config.device_map is not None:
        arguments["device_map"] = config.device_map
    try:
        model = AutoModelForCausalLM.from_pretrained(config.model, **arguments)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{config.name}: model {config.model!r} cannot be loaded: {_short(error)}") from None
    if config.device_map is None and config.quantization is None:
        model = model.to(device)
    # On CPU half precision is slow and the small models people run there lose by it; a set dtype is kept.
    if config.dtype == "auto" and device.type == "cpu" and model.dtype in (torch.float16, torch.bfloat16):
        model = model.float()
    return model.eval().requires_grad_(False)


def check_model(config: CandidateConfig) -> None:
    """See that a model given as a path is there, before anything is loaded.

    Raises:
        ModelError: the path looks like a folder and is none, or holds no config.json.
    """
    path = Path(config.model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{config.name}: {config.model} is a folder without config.json; allowed: a saved model")
        if config.engine == "transformers" and not list(path.glob("*.safetensors")):
            raise ModelError(f"{config.name}: {config.model} holds no *.safetensors; other weight files are not read")
    elif config.model.startswith((".", "/", "~")) or config.model.count("/") > 1 or path.is_file():
        raise ModelError(f"{config.name}: no model folder at {config.model!r}")
    if config.adapter is not None:
        check_adapter(config.adapter)
    if config.device.startswith("cuda"):
        pick_device(config.name, config.device)


def check_adapter(path: str) -> None:
    """See that an adapter given as a path is a PEFT adapter in safetensors.

    Raises:
        ModelError: it is not.
    """
    folder = Path(path)
    if folder.is_dir():
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / name).is_file():
                raise ModelError(f"adapter {path!r}: the folder holds no {name}; allowed: a saved PEFT adapter")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"adapter {path!r}: no such folder")


def pick_device(name: str, device: str) -> torch.device:
    """The torch device of a setting such as `auto` or `cuda:1`.

    Raises:
        ModelError: the device is not on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ModelError(f"{name}: unknown device {device!r}; allowed: auto, cpu, cuda, cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"{name}: device {device!r} is not here; this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return chosen


def load_vocabulary(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Vocabulary:
    """The tokenizer of a model.

    Raises:
        ModelError: it is missing or unusable.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the tokenizer of {source!r} cannot be loaded: {_short(error)}") from None
    return Vocabulary(tokenizer, source)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " …"
