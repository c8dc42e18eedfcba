"""Candidates that are adapters over one model write what the same adapters write merged into weights of their own."""

from __future__ import annotations

import pytest
import torch
from ladders import make_tokenizer, save_member
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from switchgen.api import generate, make_policy
from switchgen.candidates import Pool
from switchgen.config import CandidateConfig, DecodingConfig, RouterConfig
from switchgen.engines.snapshot import SnapshotEngine
from switchgen.engines.transformers import SlotEngine
from switchgen.policies.judge import load_judge
from switchgen.trace import Trace

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bloom": ["query_key_value", "dense_h_to_4h"]}
"""Layers under adapters, by model kind; the second kind's caches do not live in slots."""
QUESTIONS = [f"How old is number {index}?" for index in range(3)]
DECODING = DecodingConfig(max_new_tokens=16, temperature=2.0, top_p=1.0)
ROUTERS = [
    "baco-rand@0.5", "baco-p@0.2", "baco-h@2", "baco-punc", "baco-fc", "baco-h-punc@2", "baco-judge", "nudging@0.2",
    "average@0.5", "contrast@0.5",
]  # fmt: skip


@pytest.fixture(scope="module", params=TARGETS)
def pools(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pool, Pool]:
    """A base and an adapter over it; the base and that adapter's weights merged into a copy."""
    folder = tmp_path_factory.mktemp("adapters")
    tokenizer = make_tokenizer()
    save_member(folder / "base", tokenizer, request.param)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    settings = LoraConfig(
        r=4, target_modules=TARGETS[request.param], init_lora_weights=False, lora_alpha=16, task_type="CAUSAL_LM"
    )
    tuned = get_peft_model(model, settings)
    tuned.save_pretrained(folder / "adapter")
    tuned.merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")

    def load(aligned: str, adapter: str | None) -> Pool:
        base = CandidateConfig(name="base", model=str(folder / "base"), dtype="float64")
        other = {"name": "aligned", "model": str(folder / aligned), "adapter": adapter}
        return Pool.load([base, base.model_copy(update=other)])

    shared, apart = load("base", str(folder / "adapter")), load("merged", None)
    kind = SlotEngine if request.param == "llama" else SnapshotEngine
    assert all(type(candidate.engine) is kind for pool in (shared, apart) for candidate in pool)
    assert shared.candidates[0].engine.model is shared.candidates[1].engine.model
    return shared, apart


def write(pool: Pool, policy: str) -> list[Trace]:
    judge = load_judge(pool, RouterConfig(judge="aligned")) if policy == "baco-judge" else None
    return generate(pool, QUESTIONS, make_policy(policy, pool, judge=judge), decoding=DECODING, max_rows=2)


@pytest.mark.parametrize("policy", ["random", *ROUTERS])
def test_an_adapter_is_its_merged_weights(pools: tuple[Pool, Pool], policy: str) -> None:
    """Token routers step both engines by turns: every step once ran with the adapter that had been begun last."""
    shared, apart = (write(pool, policy) for pool in pools)
    assert [(trace.segments, trace.finish) for trace in shared] == [(trace.segments, trace.finish) for trace in apart]


def test_a_router_at_its_extremes_is_one_candidate(pools: tuple[Pool, Pool]) -> None:
    shared, _ = pools
    texts = {policy: [trace.text for trace in write(shared, policy)] for policy in ("base", "aligned")}
    assert texts["base"] != texts["aligned"]
    assert [trace.text for trace in write(shared, "baco-rand@1")] == texts["base"]
    assert [trace.text for trace in write(shared, "baco-rand@0")] == texts["aligned"]
