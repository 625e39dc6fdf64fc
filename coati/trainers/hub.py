"""`push_to_hub`: the finished model goes to the Hugging Face Hub."""

import re
import shlex
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from coati.errors import RunError, UserError


def check_hub(repo: str, private: bool):
    """Makes the repository if it isn't there: what would fail after the last step fails before the first.

    Args:
        repo: ORG/NAME.
        private: what a new one is, and what an existing one must be.

    Raises:
        UserError: nobody is logged in; it can't be made or written to; it is public and `private` is set.
    """
    api = HfApi()
    try:
        user = api.whoami()
    except Exception as error:  # of huggingface_hub, of the network below it
        raise UserError(
            f"push_to_hub needs a login at {api.endpoint} ({_reason(error)}): run `hf auth login` or set HF_TOKEN"
        ) from error
    try:
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PermissionError("the token may only read")
        api.create_repo(repo, private=private, exist_ok=True)
        is_private = api.model_info(repo).private
        # the first request of an upload; nothing is committed
        api.preupload_lfs_files(repo, [CommitOperationAdd("README.md", b"# A model")])
    except Exception as error:
        raise UserError(
            f"push_to_hub {repo} can't be made or written to by {user['name']} ({_reason(error)}): name a repository "
            "that the token may write to"
        ) from error
    if private and not is_private:
        raise UserError(f"push_to_hub {repo} is public: say that it may be (hub_private false), or name another")


def push_to_hub(folder: Path, repo: str, step: int):
    """Uploads a finished model.

    Raises:
        RunError: it failed; the message has the command that tries again.
    """
    try:
        commit = HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=f"coati: step {step}")
    except Exception as error:  # of huggingface_hub, of the network below it
        raise RunError(
            f"the model is finished in {folder}, but its upload failed ({_reason(error)}); try again with "
            f"`hf upload {repo} {shlex.quote(str(folder))} .`"
        ) from error
    print(f"uploaded: {commit.commit_url}", flush=True)


def _reason(error: Exception) -> str:
    """What an error says, on one line and without the request's number."""
    words = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\s*\(Request ID:[^)]*\)", "", words)[:300].rstrip(". ")
