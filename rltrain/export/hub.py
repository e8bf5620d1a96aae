"""A folder as a model repository of the hub."""

from __future__ import annotations

from pathlib import Path

from rltrain.errors import RunError


def push(folder: Path, name: str, *, private: bool, step: int) -> str:
    """Make the repository if it is not there, upload the folder as one commit, and return its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    refusals = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError)
    try:
        api = HfApi()
        repository = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message=f"rltrain: checkpoint of step {step}"
        )
    except refusals as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"--hub {name}: not pushed ({reason}); log in with `hf auth login`, or export --to a folder"
        ) from error
    return str(repository)
