"""The switcher's fit in one process, on tiny random models: what it leaves, what it computes, what it refuses."""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fits import NAMES, label_records, make_run, write_labels

from switchgen.assembly import make_run_policy
from switchgen.candidates import Pool
from switchgen.config import CONFIGS_DIR, SwitcherConfig
from switchgen.errors import ConfigError, DataError
from switchgen.policies import SwitcherPolicy
from switchgen.records import query_of
from switchgen.rows import Row
from switchgen.rundir import Run, open_run
from train.label_data import label_examples, read_labels
from train.sft import fit_folder
from train.switcher import main, prepare

FAST: dict[str, Any] = {
    "args": {"learning_rate": 1e-3, "max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
    "held_out": 0.3,
}


def fast_run(folder: Path, count: int = 24, ties: int = 0, **changes: Any) -> Run:
    run = make_run(folder, {**FAST, **changes})
    write_labels(run.dir, label_records(count, ties=ties))
    return run


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose switcher was fitted for three steps."""
    run = fast_run(tmp_path_factory.mktemp("fitted"), ties=4, args={**FAST["args"], "logging_steps": 1})
    main(run)
    return run


def test_what_it_leaves(fitted: Run) -> None:
    folder = fitted.switcher_adapter
    there = {path.name for path in folder.iterdir()}
    assert there >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
                     "README.md", "switchgen.json", "stage.json"}  # fmt: skip
    assert not [name for name in there if name.endswith((".bin", ".pt", ".pth"))], "no pickles"
    assert not (fitted.dir / "switcher-checkpoints").exists()
    adapter = json.loads((folder / "adapter_config.json").read_text())
    base = fitted.recipe.pool[-1].model
    assert adapter["base_model_name_or_path"] == base
    facts = json.loads((folder / "switchgen.json").read_text())
    assert (facts["schema"], facts["candidates"], facts["format"], facts["base"]) == (1, list(NAMES), "released", base)
    labels = facts["labels"]
    assert labels["left_out"]["tie"] == 4
    assert labels["train"] + labels["held_out"] + sum(labels["left_out"].values()) == labels["records"] == 24
    assert facts["n_held_out"] == labels["held_out"] > 0
    for key in ("accuracy", "majority", "random"):
        assert 0 <= facts[key] <= 1
    assert facts["random"] == pytest.approx(1 / 3, abs=1e-6)
    assert [entry["step"] for entry in facts["learning_curve"]] == [0, 3]
    assert [entry["step"] for entry in facts["training_losses"]] == [1, 2, 3]
    assert facts["versions"]["trl"] and facts["settings"]["lora"]["r"] == 4


def test_the_card_is_a_card(fitted: Run) -> None:
    text = (fitted.switcher_adapter / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == fitted.recipe.pool[-1].model and head["library_name"] == "peft"
    assert "0. base\n1. tuned\n2. aligned" in text
    assert "held-out states" in text and "4 tie" in text
    assert f"`{{base: {head['base_model']}, adapter: <this folder or repository>, format: released}}`" in text
    assert "`switchgen train fruit`" in text and "learning_rate" in text


def test_plain_peft_and_the_pool_read_the_same_logits(fitted: Run) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    adapter = str(fitted.switcher_adapter)
    pool = Pool.from_recipe(fitted.recipe)
    switcher = pool.load_switcher(fitted.recipe.switcher.model_copy(update={"adapter": adapter}))
    policy = SwitcherPolicy(switcher)
    auto = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    base = AutoModelForCausalLM.from_pretrained(fitted.recipe.pool[-1].model)
    put_over = PeftModel.from_pretrained(base, adapter).eval()
    untuned = AutoModelForCausalLM.from_pretrained(fitted.recipe.pool[-1].model).eval()
    moved = 0.0
    for record in label_records(6):
        ids = switcher.prompt.query_ids(query_of(record))
        row = Row(pool, query_of(record), seed=0)
        context = row.switcher_context(switcher.prompt.query_ids, switcher.prompt.segment_ids)
        ours = policy.engine.label_logits([context], switcher.prompt.question_ids, switcher.prompt.label_ids)[0]
        prompt = torch.tensor([[*ids, *switcher.prompt.question_ids]])
        with torch.inference_mode():
            for model in (auto, put_over):
                theirs = model(input_ids=prompt).logits[0, -1, switcher.prompt.label_ids].double()
                assert (theirs - ours).abs().max() < 1e-5
            plain = untuned(input_ids=prompt).logits[0, -1, switcher.prompt.label_ids].double()
        moved = max(moved, (plain - ours).abs().max().item())
    assert moved > 1e-3, "the adapter does something"


def test_a_compact_switcher_is_read_as_it_was_trained(tmp_path: Path) -> None:
    run = fast_run(tmp_path)
    compact = open_run(str(run.source), ["switcher.format=compact"], run.dir)
    plan = prepare(compact)
    record = plan.data.train[0]
    released = prepare(run).data.train[0]
    assert len(record.input_ids) < len(released.input_ids)
    main(compact)
    facts = json.loads((compact.switcher_adapter / "switchgen.json").read_text())
    assert (
        facts["format"] == "compact" and "`[i] …` per segment" in (compact.switcher_adapter / "README.md").read_text()
    )
    pool = Pool.from_recipe(compact.recipe)
    policy = make_run_policy(compact, "switcher", pool)
    assert isinstance(policy, SwitcherPolicy) and policy.switcher.prompt.format.name == "compact"
    # Who was not trained is asked in words.
    untuned = make_run_policy(compact, "untuned", pool)
    assert isinstance(untuned, SwitcherPolicy) and untuned.switcher.prompt.format.name == "released"
    with pytest.raises(ConfigError, match=r"switcher\.format: released: .* was trained with switcher\.format: compact"):
        make_run_policy(open_run(str(run.source), [], run.dir), "switcher", pool)
    # The library's own door, without a run.
    adapter = str(compact.switcher_adapter)
    with pytest.raises(ConfigError, match=r"was trained with switcher\.format: compact"):
        pool.load_switcher(SwitcherConfig(adapter=adapter))
    with pytest.raises(ConfigError, match="chooses between 3 candidates"):
        Pool.load(compact.recipe.pool[1:]).load_switcher(SwitcherConfig(adapter=adapter, format="compact"))
    assert pool.load_switcher(SwitcherConfig(adapter=adapter, format="compact")).prompt.format.name == "compact"


def test_a_second_start_finds_it_finished(fitted: Run, caplog: pytest.LogCaptureFixture) -> None:
    # As a kill leaves it that comes after the adapter is there and before its checkpoints are gone.
    leftovers = fitted.dir / "switcher-checkpoints"
    (leftovers / "checkpoint-3").mkdir(parents=True)
    weights = fitted.switcher_adapter / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    with caplog.at_level(logging.INFO, "switchgen"):
        summary = main(fitted)
    assert "is finished" in caplog.text
    assert weights.stat().st_mtime_ns == before
    assert not leftovers.exists()
    facts = json.loads((fitted.switcher_adapter / "switchgen.json").read_text())
    assert summary["accuracy"] == facts["accuracy"] and summary["labels"]["records"] == 24


def test_another_recipes_switcher_is_not_overwritten(fitted: Run) -> None:
    other = open_run(str(fitted.source), ["train.args.learning_rate=0.5"], fitted.dir)
    with pytest.raises(ConfigError, match=r"train\.args\.learning_rate: was 0\.001, is 0\.5"):
        main(other)


def test_more_labels_and_a_finished_switcher(tmp_path: Path) -> None:
    """The message is a command: after it the same command trains on the new labels."""
    run = fast_run(tmp_path, count=20)
    main(run)
    for name in ("claims/switcher--fruit", "claims/aligned--fruit", "responses"):
        (run.dir / "evaluation" / name).mkdir(parents=True)
    (run.dir / "distill-data").mkdir()
    write_labels(run.dir, label_records(30))
    with pytest.raises(ConfigError, match="was trained on other labels than those that are in") as caught:
        main(run)
    command = str(caught.value).splitlines()[-1].strip()
    assert command.startswith("rm -r ")
    subprocess.run(["bash", "-c", command], check=True)
    left = {path.name for path in (*run.dir.iterdir(), *(run.dir / "evaluation" / "claims").iterdir())}
    assert left == {"rollout", "evaluation", "aligned--fruit"}
    assert main(run)["labels"]["records"] == 30
    changed = open_run(str(run.source), ["train.args.learning_rate=0.5"], run.dir)
    write_labels(run.dir, label_records(24))
    with pytest.raises(ConfigError, match=r"labels: was .*\n.*train\.args\.learning_rate: was 0\.001, is 0\.5"):
        main(changed)


def test_deepspeed_settings_are_the_same_by_any_name(tmp_path: Path) -> None:
    """A fit that was killed under one name of its settings goes on under another; with other settings it does not."""
    path = CONFIGS_DIR / "deepspeed" / "zero3.json"
    copy = tmp_path / "mine.json"
    copy.write_text(path.read_text())
    for given in ("zero3", "configs/deepspeed/zero3.json", str(path), str(copy), json.loads(path.read_text())):
        with pytest.raises(KeyboardInterrupt), fit_folder(tmp_path / "checkpoints", "train", {"seed": 1}, given):
            raise KeyboardInterrupt
    with pytest.raises(ConfigError, match=r"deepspeed\.zero_optimization\.stage: was 3, is 2"):
        fit_folder(tmp_path / "checkpoints", "train", {"seed": 1}, "zero2").__enter__()
    copy.write_text("[]")
    with pytest.raises(ConfigError, match="mine.json holds no JSON object"):
        fit_folder(tmp_path / "checkpoints", "train", {"seed": 1}, str(copy)).__enter__()


def test_the_same_seed_gives_the_same_adapter(fitted: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    again = open_run(str(fitted.source), [], tmp_path / "again")
    write_labels(again.dir, label_records(24, ties=4))
    main(again)
    one = load_file(fitted.switcher_adapter / "adapter_model.safetensors")
    two = load_file(again.switcher_adapter / "adapter_model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def make_trainer(run: Run, *, soft: bool) -> Any:
    """A trainer as `main` makes it, not started."""
    from datasets import Dataset

    from train.arguments import sft_config
    from train.sft import load_base, lora_config
    from train.switcher_trainer import LabelCollator, SwitcherTrainer

    plan = prepare(run)
    config = sft_config("train", {}, output_dir=run.dir / "scratch", seed=0, base=plan.base, evaluates=False,
                        tracked=False)  # fmt: skip
    model = load_base(plan.base, full=False)
    assert run.recipe.train.lora is not None
    return SwitcherTrainer(
        model=model, args=config, train_dataset=Dataset.from_list([example.row(0.1) for example in plan.data.train]),
        data_collator=LabelCollator(0), processing_class=plan.prompt.vocabulary.tokenizer,
        peft_config=lora_config(run.recipe.train.lora, model), label_ids=plan.prompt.label_ids, soft=soft,
    )  # fmt: skip


def test_losses_are_what_they_are_called(fitted: Run) -> None:
    from trl import SFTTrainer

    hard = make_trainer(fitted, soft=False)
    rows = [hard.train_dataset[index] for index in range(5)]
    batch = hard.data_collator(rows)
    assert len({len(row["input_ids"]) for row in rows}) > 1, "padding is at work"
    model = hard.model.eval()
    with torch.no_grad():
        ours = hard.compute_loss(model, dict(batch)).item()
        tokens = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        sft = SFTTrainer.compute_loss(hard, model, tokens)
        alone = [hard.compute_loss(model, hard.data_collator([row])).item() for row in rows]
        assert ours == pytest.approx(sft.item(), abs=1e-5), "hard labels: SFT's own loss"
        assert ours == pytest.approx(sum(alone) / len(alone), abs=1e-5), "padding changes nothing"
        # The trainer's count of labels over accumulation steps stands in for the batch size.
        assert hard.compute_loss(model, dict(batch), num_items_in_batch=10).item() == pytest.approx(ours / 2, abs=1e-5)
        hard.soft = True
        soft = hard.compute_loss(model, dict(batch)).item()
        wanted = 0.0
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"][:-1]])).logits[0, -1, hard.label_ids]
            wanted -= (torch.tensor(row["targets"]) * torch.log_softmax(logits, -1)).sum().item() / len(rows)
        assert soft == pytest.approx(wanted, abs=1e-5), "soft labels: cross-entropy over the label tokens"
    loss = hard.compute_loss(model, dict(batch))
    loss.backward()
    trained = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert trained and all("lora_" in name for name in trained)


def test_soft_labels_fit(tmp_path: Path) -> None:
    summary = main(fast_run(tmp_path, labels="soft", keep_ties=True, ties=3))
    assert summary["labels"]["left_out"]["tie"] == 0


def test_few_examples_warn_and_without_held_out_queries_nothing_is_claimed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "switchgen"):
        summary = main(fast_run(tmp_path, held_out=0.0))
    assert "only 24 labelled states are kept; fits on fewer than 330 can collapse" in caplog.text
    assert summary["accuracy"] is None and summary["n_held_out"] == 0


def test_long_traces_are_counted_and_fit(tmp_path: Path) -> None:
    summary = main(fast_run(tmp_path, max_length=120))
    labels = summary["labels"]
    assert labels["cut_traces"] > 0 and labels["left_out"]["too_long"] == 0


def test_the_models_own_context_bounds_the_examples(tmp_path: Path) -> None:
    run = fast_run(tmp_path)
    config = Path(run.recipe.pool[-1].model) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 130}))
    plan = prepare(run)
    assert max(len(example.input_ids) for example in plan.data.train) <= 130
    assert plan.data.counts(3)["cut_traces"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lora=null"], "a switcher is a LoRA adapter"),
        (["train.args.learning_rte=1"], r"learning_rte: .*no such argument \(did you mean 'learning_rate'"),
        (["train.lora.target_modules=[q_prj]"], r"LlamaForCausalLM has no q_prj; its layers: .*q_proj"),
        (["train.lora.target_modules=[lm_head]"], "lm_head"),
        (["switcher.base=/no/such/folder"], r"/no/such/folder"),
        (["train.min_margin=2"], r"none of 24 label records can be trained on .*'margin': 24"),
        (["pool.2.adapter=/some/adapter"], r"'aligned' is itself an adapter"),
    ],
)
def test_what_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    run = fast_run(tmp_path)
    with pytest.raises(ValueError, match=message):
        main(open_run(str(run.source), overrides, run.dir))
    assert not run.switcher_adapter.exists()


def test_a_pool_of_one_has_no_switcher(tmp_path: Path) -> None:
    run = fast_run(tmp_path)
    recipe = yaml.safe_load(run.source.read_text())
    run.source.write_text(yaml.safe_dump(recipe | {"pool": recipe["pool"][:1]}))
    with pytest.raises(ConfigError, match="between 2 and 10 candidates; got 1"):
        main(open_run(str(run.source), [], run.dir))


def test_without_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run `switchgen rollout` first"):
        main(make_run(tmp_path, FAST))


def test_the_base_may_be_any_member_or_a_model_beside_the_pool(tmp_path: Path) -> None:
    run = fast_run(tmp_path)
    assert prepare(run).base.name == "aligned"
    plain = prepare(open_run(str(run.source), ["switcher.base=base"], run.dir))
    assert plain.base.name == "base"
    # The first member has no chat template: the prompt is plain text.
    chat = label_examples(read_labels(run), prepare(run).prompt, run.recipe.train, 1000).train[0].input_ids
    assert len(plain.data.train[0].input_ids) < len(chat)
    beside = prepare(open_run(str(run.source), [f"switcher.base={run.recipe.pool[1].model}"], run.dir))
    assert beside.base.name == "tuned"


@pytest.mark.parametrize("active", [False, True])
def test_wandb_on_request_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, active: bool) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = make_run(tmp_path, FAST, tracking={"wandb": active, "project": "fruit", "name": "first"})
    write_labels(run.dir, label_records(24))
    main(run)
    files = list((run.dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == int(active)
    if active:
        # An offline run is a binary log; names and keys are readable in it.
        content = files[0].read_bytes()
        for word in (b"fruit", b"first", b"eval/accuracy", b"max_new_tokens", b"train_by_label", b"majority"):
            assert word in content, word
