"""Model cards: what a trained folder is, where it came from, what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from switchgen.prompts import FORMATS


def card(front: Mapping[str, Any], title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A README.md with the hub's YAML head."""
    head = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    body = "\n\n".join(f"## {heading}\n\n{text}" if heading else text for heading, text in sections)
    return f"---\n{head}---\n\n# {title}\n\n{body}\n"


def _training(verb: str, facts: Mapping[str, Any]) -> str:
    settings = yaml.safe_dump(facts["settings"], sort_keys=False, allow_unicode=True)
    return f"`switchgen {verb} {facts['recipe']}`:\n\n```yaml\n{settings}```"


def switcher_card(facts: Mapping[str, Any]) -> str:
    """Card of a switcher adapter.

    Args:
        facts: its `switchgen.json`.
    """
    names = facts["candidates"]
    labels = facts["labels"]
    ladder = "\n".join(f"{index}. {name}" for index, name in enumerate(names))
    left_out = ", ".join(f"{count} {reason}" for reason, count in labels["left_out"].items() if count) or "none"
    chosen = ", ".join(f"{name} {count}" for name, count in zip(names, labels["train_by_label"], strict=True))
    lines = [
        f"{labels['train']} labelled states ({labels['records']} records; left out: {left_out}). Best in so many of "
        f"them: {chosen}."
    ]
    if facts["n_held_out"]:
        lines.append(
            f"Label accuracy on {facts['n_held_out']} held-out states (queries that were not trained on): "
            f"{facts['accuracy']:.3f}; best constant choice {facts['majority']:.3f}, random {facts['random']:.3f}."
        )
    else:
        lines.append("No states were held out; its accuracy is unknown.")
    front = {"base_model": facts["base"], "library_name": "peft", "tags": ["switchgen", "switcher", "lora"]}
    use = (
        f"`{{base: {facts['base']}, adapter: <this folder or repository>, format: {facts['format']}}}` as the "
        "`switcher` of a recipe with the same pool (`switchgen infer`, `serve`, `evaluate`); or in Python:\n\n"
        "```python\nfrom switchgen import Pool, decide\n"
        "from switchgen.config import SwitcherConfig\n\n"
        "pool = Pool.load([...])  # the candidates above, in this order\n"
        "settings = SwitcherConfig(\n"
        f'    base="{facts["base"]}", adapter=".", format="{facts["format"]}"\n)\n'
        "switcher = pool.load_switcher(settings)\n"
        'decide(pool, switcher, "a question")\n```'
    )
    prompt = (
        "One user message in the base's chat template (plain text where it has none): the query, then "
        f"`{FORMATS[facts['format']].signed.format(writer='i', text='…').strip()}` per segment, then "
        f"`{FORMATS[facts['format']].question(len(names)).strip()}`. The softmax over the logits of the tokens "
        f"`0` … `{len(names) - 1}` where the answer starts is the probability of each candidate."
    )
    return card(front, "A switcher: which model writes the next segment", [
        ("", "A LoRA adapter that reads a query and what has been written for it so far, each part signed by its "
             "writer, and says which of these models should write the next segment:\n\n" + ladder),
        ("Measured", "\n".join(lines)),
        ("Use", use),
        ("Prompt", prompt),
        ("Training", _training("train", facts)),
    ])  # fmt: skip


def probe_card(facts: Mapping[str, Any]) -> str:
    """Card of a probe; `facts` is its `switchgen.json`."""
    ladder = "\n".join(f"{index}. {name}" for index, name in enumerate(facts["candidates"]))
    measured = "No states were held out; its accuracy is unknown."
    if facts["n_held_out"]:
        measured = (
            f"Label accuracy on {facts['n_held_out']} held-out states: {facts['accuracy']:.3f}; best constant choice "
            f"{facts['majority']:.3f}, random {facts['random']:.3f}."
        )
    return card({"base_model": facts["base"], "tags": ["switchgen", "switcher", "probe"]}, "A probe for a switcher", [
        ("", f"A linear head ({facts['parameters']} numbers) on the last hidden state of `{facts['host']}`, which says "
             f"which of these models should write the next segment:\n\n{ladder}"),
        ("Measured", f"{facts['labels']['train']} labelled states. {measured}"),
        ("Use", "`switcher: {kind: probe, adapter: <this folder>}` in a recipe with the same pool."),
    ])  # fmt: skip


def student_card(facts: Mapping[str, Any]) -> str:
    """Card of a distilled student; `facts` is its `switchgen.json`."""
    counts = facts["responses"]
    front: dict[str, Any] = {"base_model": facts["base"], "tags": ["switchgen", "distilled"]}
    if facts["adapter"]:
        front["library_name"] = "peft"
    curve = facts["learning_curve"]
    losses = f", the loss from {curve[0]['loss']:.3f} to {curve[-1]['loss']:.3f}" if curve else ""
    here = "<this folder or repository>"
    model = f"{facts['base']}, adapter: {here}" if facts["adapter"] else here
    filtered = ", ".join(f"{count} {reason}" for reason, count in counts["left_out"].items() if count) or "none"
    return card(front, "A student of collaborating models", [
        ("", f"`{facts['base']}`, trained on what the models {', '.join(facts['candidates'])} wrote together (policy "
             f"`{facts['policy']}`)."),
        ("Data", f"{counts['kept']} of {counts['written']} responses (left out: {filtered}); {facts['tokens']} tokens "
                 "were written to get them. No evaluation question is among their queries."),
        ("Measured", f"{facts['steps']} steps{losses}. `switchgen evaluate` measures it as the policy `distilled`."),
        ("Use", f"`{{name: student, model: {model}}}` as a candidate of a recipe's `pool`, or by itself with "
                "transformers."),
        ("Training", _training("distill", facts)),
    ])  # fmt: skip
