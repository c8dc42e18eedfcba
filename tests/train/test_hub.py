"""`--push-to-hub`: what goes to a hub (a small one on this machine), and what is refused before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fits import label_records, make_run, write_labels
from hub import Hub, hub

from switchgen.__main__ import main
from switchgen.errors import ConfigError, ServerError
from train.hub import fit_and_push


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that the client finds, and a token for it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hub() as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.address)
        yield running


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A finished folder, with things in it that are nobody else's."""
    folder = tmp_path / "switcher"
    files = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "switchgen.json", "README.md",
             "stage.json", "training_args.bin", "optimizer.pt", "checkpoint-3/adapter_model.bin"]  # fmt: skip
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    return folder


def test_the_folder_is_uploaded_without_pickles(here: Hub, adapter: Path) -> None:
    summary = fit_and_push(lambda: {"accuracy": 0.5}, adapter, "lab/switcher")
    assert summary == {"accuracy": 0.5, "pushed": f"{here.address}/lab/switcher/commit/1"}
    assert sorted(here.files) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "switchgen.json",
    ]  # fmt: skip
    assert here.files["README.md"] == b"content of README.md"
    [made] = here.made
    assert (made["organization"], made["name"]) == ("lab", "switcher")
    assert made.get("private") is True or made.get("visibility") == "private"
    assert "Bearer hf_secret" in here.tokens


def test_what_cannot_be_pushed_is_said_before_the_fit(
    here: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(repository: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            fit_and_push(lambda: pytest.fail("trained"), adapter, repository)

    refused("switcher", "allowed: ORG/NAME")
    refused("lab/no spaces", "lab/no spaces: .*alphanumeric")
    refused("others/switcher", "the token is of ada; nothing was trained. Allowed owners: ada, lab")
    here.role = "read"
    refused("lab/switcher", "the token may only read")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused("lab/switcher", "the hub does not say who you are; nothing was trained")
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    refused("lab/switcher", "no token; nothing was trained")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("lab/switcher", "HF_HUB_OFFLINE is set; nothing was trained")
    assert not here.made and not here.files


def test_a_refused_upload_leaves_the_fit(here: Hub, adapter: Path) -> None:
    here.refuses_commits = True
    with pytest.raises(ServerError, match="switcher is finished, but could not be uploaded: .* The same command tries"):
        fit_and_push(dict, adapter, "lab/switcher")
    assert (adapter / "adapter_model.safetensors").is_file()


def test_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, {})
    write_labels(run.dir, label_records(6))
    for verb in ("train", "distill"):
        assert main([verb, str(run.source), "--run-dir", str(run.dir), "--push-to-hub", "lab/switcher"]) == 2
        assert "HF_HUB_OFFLINE is set; nothing was trained" in capsys.readouterr().err
    assert sorted(path.name for path in run.dir.iterdir()) == ["rollout"]
