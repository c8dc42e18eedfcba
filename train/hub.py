"""`--push-to-hub ORG/NAME`: what a fit has left goes to the Hugging Face hub, if that is known to work beforehand.

Uploaded are weights in safetensors, settings, tokenizer and card. Checkpoints lie elsewhere, and a pickle, or whatever
else somebody puts into the folder, stays. The repository is private where this makes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from switchgen.errors import ConfigError, ServerError, one_line

logger = logging.getLogger("switchgen")

UPLOADED = ("*.safetensors", "*.json", "*.jinja", "*.md")
"""`*.jinja` is the tokenizer's chat template."""
_OWN = ("stage.json", ".*")
"""What a run folder needs and nobody else does."""


def fit_and_push(fit: Callable[[], dict[str, Any]], folder: Path, repository: str | None) -> dict[str, Any]:
    """Fit, and upload the folder that is left; a fit that is there already is uploaded as it is.

    Args:
        repository: `ORG/NAME`; None uploads nothing.

    Returns:
        The fit's summary, with the address of what was uploaded.

    Raises:
        ConfigError: the repository cannot be written to; known before the fit begins.
        ServerError: the hub refused the files; the folder is there, and the same command tries again.
    """
    if repository is None:
        return fit()
    check_repository(repository)
    return {**fit(), "pushed": push(folder, repository)}


def check_repository(repository: str) -> None:
    """See that this user may write to a repository, there or not.

    Raises:
        ConfigError: no such name, no network, no token, or one that may not write there.
    """
    from huggingface_hub import HfApi, is_offline_mode  # noqa: PLC0415
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError  # noqa: PLC0415
    from huggingface_hub.utils import validate_repo_id  # noqa: PLC0415

    where = f"--push-to-hub {repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{where}: {one_line(error)}") from None
    owner, _, name = repository.partition("/")
    if not name:
        raise ConfigError(f"{where}: allowed: ORG/NAME, an organisation or user and the repository's name")
    if is_offline_mode():
        raise ConfigError(f"{where}: HF_HUB_OFFLINE is set; nothing was trained. Unset it, or leave the option out")
    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise ConfigError(f"{where}: no token; nothing was trained. `hf auth login` or HF_TOKEN gives one") from None
    except Exception as error:  # which network library it uses, and what that raises, changes with the hub's client
        raise ConfigError(
            f"{where}: the hub does not say who you are; nothing was trained. {one_line(error)}"
        ) from None
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if owner not in owners:
        raise ConfigError(f"{where}: the token is of {user['name']}; nothing was trained. Allowed owners: "
                          f"{', '.join(owners)}")  # fmt: skip
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError(f"{where}: the token may only read; nothing was trained. Allowed: one that may write")


def push(folder: Path, repository: str) -> str:
    """Upload a finished folder, in one commit; returns the commit's address.

    Raises:
        ServerError: the hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415

    hub = HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(UPLOADED), ignore_patterns=list(_OWN),
            commit_message="Trained with switchgen",
        )  # fmt: skip
    except Exception as error:  # see `check_repository`
        raise ServerError(
            f"--push-to-hub {repository}: {folder} is finished, but could not be uploaded: {one_line(error)}. The same "
            "command tries again"
        ) from None
    logger.info("%s is in %s", folder, commit.commit_url)
    return str(commit.commit_url)
