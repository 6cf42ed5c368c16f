"""A checkpoint goes to the hub: its folder, model card included."""

from __future__ import annotations

from pathlib import Path

from vlp.checkpoint.folder import check_whole, find_checkpoint
from vlp.checkpoint.foreign import first_line


def push(checkpoint: str | Path, name: str, *, private: bool = False, message: str = "") -> str:
    """Upload a checkpoint folder of ours as the hub's model ``owner/name`` and return its address there.

    The checkpoint is checked against its manifest first. A token comes from the environment or ``hf auth login``.

    Args:
        checkpoint: a checkpoint folder, or a run (its newest whole checkpoint).
        name: ``owner/name``.
        private: make a repository that does not exist yet a private one.
        message: of the commit.

    Raises:
        ValueError: the checkpoint is torn, the name is none, or the hub refuses; one line.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"cannot push to {name!r}: write owner/name, the model's id on the hub")
    folder = find_checkpoint(Path(checkpoint))
    check_whole(folder, verify=True)
    hub = HfApi()
    try:
        hub.create_repo(name, repo_type="model", private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message or f"Checkpoint {folder.name}"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"cannot push to {name}: {first_line(error)}; check the name, token and network") from error
    return str(commit.repo_url.url)
