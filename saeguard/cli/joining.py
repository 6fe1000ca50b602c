"""``saeguard policy join``: several policies for one model as one."""

from pathlib import Path
from typing import Annotated

import typer

from saeguard.cli.console import Json, check_target, out, write_json
from saeguard.cli.policy_files import HELP, named_policy


def join(
    files: Annotated[list[Path], typer.Argument(parser=named_policy, metavar="POLICY...", help=HELP)],
    target: Annotated[Path, typer.Option("--out", dir_okay=False, help="Where the joined policy goes.")],
    name: Annotated[str, typer.Option(help="Its name; theirs, with + between, by default.")] = "",
    serial: Annotated[int | None, typer.Option(min=0, help="Its release; the largest of theirs by default.")] = None,
    as_json: Json = False,
) -> None:
    """Join policies that were made for the same model, tokenizer and SAEs: the edits and refusals of all, gate by gate.

    The result is unsigned, whatever its parts were: verify them before, and sign it after. Exit status 2 where they are
    for different models, or set one latent to different things.
    """
    from saeguard.guarding.joining import joined
    from saeguard.guarding.policy import Policy

    check_target(target)
    policy = joined([Policy.load(file) for file in files], name=name or None, serial=serial)
    policy.save(target)
    about = {"file": str(target), "name": policy.name, "serial": policy.serial, "fingerprint": policy.fingerprint(),
             "rules": 0 if policy.plan is None else len(policy.plan.rules), "refusals": len(policy.refusals),
             "bytes": target.stat().st_size}  # fmt: skip
    if as_json:
        write_json(about)
        return
    made = f"{policy.name}, {about['rules']} rules, {about['refusals']} refusals"
    out().print(f"Wrote {target} ({about['bytes']:,} bytes): {made}", markup=False, soft_wrap=True)
    out().print(f"fingerprint {about['fingerprint']}, not signed", soft_wrap=True)
