"""Weights that are loaded once: candidates and switchers that name the same model share it, adapters and all."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from switchgen.config import CandidateConfig
from switchgen.engines.base import Engine
from switchgen.engines.build import build_engine, max_positions, stop_ids
from switchgen.engines.remote import RemoteEngine
from switchgen.engines.replicas import Replicas
from switchgen.engines.snapshot import SnapshotEngine
from switchgen.engines.transformers import SlotEngine
from switchgen.errors import ConfigError, ModelError, one_line
from switchgen.loading import adapter_folder, load_model, load_vocabulary
from switchgen.vocabulary import Vocabulary

logger = logging.getLogger("switchgen")


class ModelStore:
    """Loaded weights, each once: candidates and switcher that name the same model share it, adapters and all.

    Args:
        compiled: whether engines in this process compile their decode steps.
    """

    def __init__(self, *, compiled: bool = False) -> None:
        self._compiled = compiled
        self._models: dict[tuple[str, ...], _SharedModel] = {}
        self._vocabularies: dict[tuple[str, str | None], Vocabulary] = {}
        self._configs: list[CandidateConfig] = []

    def note_candidates(self, configs: Sequence[CandidateConfig]) -> None:
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
            ConfigError: it is to be compiled and cannot be.
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
            "max_positions": max_positions(model),
            "max_slots": max_slots,
            "activate": lambda: shared.activate(adapter),
        }
        # Which kind of engine a model needs is its architecture's affair: found once, and warned of once.
        build = build_engine if shared.engine_kind is None else shared.engine_kind
        engine = build(name or config.name, model, vocabulary, **arguments)
        shared.engine_kind = type(engine)
        if isinstance(engine, SlotEngine):
            engine.family, engine.adapter = shared, adapter
        if self._compiled:
            if not isinstance(engine, SlotEngine):
                raise ConfigError(
                    f"{engine.name}: engine.compile: caches of {type(model).__name__} cannot be kept in slots, and its "
                    "rows are decoded one by one; allowed with it: engine.compile: false"
                )
            engine.compile()
        return engine

    def _remote(self, config: CandidateConfig, name: str) -> RemoteEngine:
        """A candidate behind servers; only its tokenizer and its config are loaded."""
        settings = config.server
        assert settings is not None
        if idle := [key for key in ("dtype", "device") if getattr(config, key) != "auto"]:
            logger.warning("%s: %s: no effect on a candidate behind a server", config.name, ", ".join(idle))
        try:
            model_config = AutoConfig.from_pretrained(
                config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{config.name}: the config of {config.model!r} cannot be loaded: {one_line(error)}"
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
        revision = config.revision
        # An adapter's folder may bring a tokenizer of its own (a chat template, say).
        if config.adapter and ((folder := adapter_folder(config.adapter)) / "tokenizer.json").is_file():
            source, revision = str(folder), None
        key = (source, revision)
        if key not in self._vocabularies:
            self._vocabularies[key] = load_vocabulary(
                source, revision=revision, trust_remote_code=config.trust_remote_code
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

        folder = str(adapter_folder(path))
        name = f"adapter{len(self.adapters)}"
        try:
            config = PeftConfig.from_pretrained(folder)
            if config.is_prompt_learning:
                raise ModelError(f"adapter {path!r} learns prompts; allowed: adapters over weights, such as LoRA")
            self.together &= _mixes(config)
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self.model, folder, adapter_name=name)
            else:
                self._peft.load_adapter(folder, adapter_name=name)
            self._check_weights(path, folder, name)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"adapter {path!r} does not fit {self.model.name_or_path!r}: {one_line(error)}") from None
        self._peft.eval()
        self.adapters[path] = name
        # PEFT leaves the adapter active that was there before.
        self._switch(name)
        return name

    def _check_weights(self, path: str, folder: str, name: str) -> None:
        """See that every weight of the adapter found its place, and every place its weight."""
        from peft import get_peft_model_state_dict  # noqa: PLC0415
        from peft.utils import load_peft_weights  # noqa: PLC0415

        wanted = set(get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False))
        given = set(load_peft_weights(folder, device="cpu"))
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
