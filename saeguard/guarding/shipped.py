"""Policies that come with the package, by name."""

from pathlib import Path

from saeguard.errors import BadPolicyFile
from saeguard.guarding.policy import Policy

FOLDER = Path(__file__).parent.parent / "assets" / "policies"
SUFFIX = ".policy.json"


def shipped_policies() -> dict[str, Path]:
    """Their names, each with its file."""
    return {path.name.removesuffix(SUFFIX): path for path in sorted(FOLDER.glob(f"*{SUFFIX}"))}


def load_policy(name: str) -> Policy:
    """One of them; a policy of your own is read by `Policy.load`. Raises `BadPolicyFile`."""
    found = shipped_policies()
    if name not in found:
        raise BadPolicyFile(
            f"policy {name!r:.80}",
            f"shipped are {', '.join(found) or 'none'}",
            "Give one of these, or Policy.load a file.",
        )
    return Policy.load(found[name])
