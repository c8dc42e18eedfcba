"""Models that are spread out: their layers lie on different devices, and hooks move what goes between them."""

from __future__ import annotations

from pathlib import Path

from ladders import save_ladder

from switchgen import CandidateConfig, DecodingConfig, Pool, SwitcherConfig, generate
from switchgen.trace import Trace

QUERIES = ["What is 11 + 14?", "Größe? 東京 🙂", "Write a list"]


def traces(folder: Path, device_map: dict[str, int | str] | None) -> list[Trace]:
    """Responses of a pool of two with a switcher over the second, which is mapped."""
    pool = Pool.load(
        [
            CandidateConfig(name="base", model=str(folder / "base"), dtype="float64"),
            CandidateConfig(name="aligned", model=str(folder / "aligned"), dtype="float64", device_map=device_map),
        ]
    )
    model = pool.candidates[1].engine.model  # type: ignore[attr-defined]
    assert hasattr(model.model.layers[-1], "_hf_hook") == (device_map is not None)
    switcher = pool.load_switcher(SwitcherConfig())
    return generate(pool, QUERIES, "switcher", switcher=switcher, decoding=DecodingConfig(max_new_tokens=24, segment=6))


def test_a_mapped_model_writes_the_same(tmp_path: Path) -> None:
    """Its last layer's weights stay on disk until they are used; everything else is on the CPU."""
    save_ladder(tmp_path, ("base", "aligned"))
    parts = ("embed_tokens", "rotary_emb", "layers.0", "norm")
    mapped: dict[str, int | str] = {f"model.{part}": "cpu" for part in parts}
    mapped |= {"model.layers.1": "disk", "lm_head": "cpu"}
    assert traces(tmp_path, mapped) == traces(tmp_path, None)
