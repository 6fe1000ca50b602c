"""``saeguard policy``: what a guardrail's policy says, who signed it, and whether it is for this model."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli import joining
from saeguard.cli.console import Json, check_target, out, progress, table, write_json
from saeguard.cli.policy_files import HELP, named_policy

app = typer.Typer(
    no_args_is_help=True, help="Read, sign and verify the policy of a guardrail.", pretty_exceptions_enable=False
)
PolicyFile = Annotated[Path, typer.Argument(parser=named_policy, metavar="POLICY", help=HELP)]
OwnFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A policy file, as Policy.save writes.")]
app.command("join")(joining.join)


@app.command("show")
def show(file: PolicyFile, as_json: Json = False) -> None:
    """Show what a policy does, what it was made for, and its fingerprint. Signatures are not verified.

    Exit status 2 when the file is not a policy.
    """
    from saeguard.guarding import policy_file
    from saeguard.guarding.policy import Policy

    signature = policy_file.read(file).signature
    found = Policy.load(file)
    if as_json:
        signer = None if signature is None else signature.signer
        document = {"fingerprint": found.fingerprint(), "signer": signer, "verified": False}
        write_json(document | {"policy": json.loads(found.to_json())})
    else:
        _tell(found)
        by = "no signature" if signature is None else f"signature by {signature.signer}, not verified"
        out().print(by, style="dim", soft_wrap=True)


@app.command("verify")
def verify(
    file: PolicyFile,
    signed_by: Annotated[
        list[Path],
        typer.Option("--signed-by", exists=True, dir_okay=False, help="The public key of who may sign; repeatable."),
    ],
    at_least: Annotated[int | None, typer.Option(min=0, help="The lowest serial to accept.")] = None,
    model: Annotated[
        str, typer.Option(help="Also check that this model, its tokenizer and the SAEs are what it was made for.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Check that one of these keys signed a policy, to the last bit.

    Exit status 0: it may be used. 1: it may not, because it is unsigned, changed, signed by somebody else, older than
    --at-least, or made for another model. 2: the check could not be made.
    """
    from saeguard.errors import BadSigningKey, PolicyError
    from saeguard.guarding.policy import Policy
    from saeguard.guarding.signing import PublicKey

    trusted = [PublicKey.from_file(path) for path in signed_by]
    found = why = None
    try:
        found = Policy.load(file, signed_by=trusted, at_least=at_least)
        if model:
            _check(found, model)
    except BadSigningKey:
        raise
    except PolicyError as error:
        why = error
    if as_json:
        said = None if why is None else {"error": type(why).__name__, "found": why.found}
        about = (
            {} if found is None else {"name": found.name, "serial": found.serial, "fingerprint": found.fingerprint()}
        )
        write_json({"ok": why is None, "why": said, "model_checked": bool(model), **about})
    elif why is not None:
        out().print(f"{file}: {type(why).__name__}: {why}", markup=False, soft_wrap=True)
    elif found is not None:
        fits = f", and made for {model}" if model else ""
        text = f"{file}: policy {found.name} of serial {found.serial} is what was signed{fits}"
        out().print(text, markup=False, soft_wrap=True)
        out().print(f"fingerprint {found.fingerprint()}", soft_wrap=True)
        if not model:
            out().print("no model was given: whether it was made for yours was not checked", style="dim")
    if why is not None:
        raise typer.Exit(1)


@app.command("sign")
def sign(
    file: OwnFile,
    key: Annotated[Path, typer.Option("--key", dir_okay=False, help="The private key, in a file of mode 600.")],
    target: Annotated[
        Path | None, typer.Option("--out", help="Write the signed policy there instead of in place.")
    ] = None,
    serial: Annotated[int | None, typer.Option(min=0, help="The number of this release, put into the policy.")] = None,
    as_json: Json = False,
) -> None:
    """Sign a policy, in canonical form; a signature that it had is replaced.

    Give every release a higher --serial, so that those who verify with --at-least notice an old one.
    """
    from dataclasses import replace

    from saeguard.guarding.policy import Policy
    from saeguard.guarding.signing import SigningKey

    check_target(target)
    signing = SigningKey.from_file(key)
    found = Policy.load(file)
    found = found if serial is None else replace(found, serial=serial)
    found.save(target or file, key=signing)
    written = str(target or file)
    about = {"file": written, "serial": found.serial, "fingerprint": found.fingerprint(), "signer": signing.public.hex}
    if as_json:
        write_json(about)
        return
    out().print(f"Signed {written}, serial {found.serial}", markup=False, soft_wrap=True)
    out().print(f"fingerprint {about['fingerprint']}", soft_wrap=True)
    out().print(f"signer {about['signer']}", soft_wrap=True)


@app.command("keygen")
def keygen(
    key: Annotated[Path, typer.Argument(dir_okay=False, help="The file of the private key; KEY.pub is put beside it.")],
    as_json: Json = False,
) -> None:
    """Make a pair of keys: KEY, which its owner alone may read, and KEY.pub, for those who verify.

    Nothing is replaced: exit status 2 when one of the files is there.
    """
    from saeguard.guarding.signing import make_keys

    check_target(key, "KEY")
    public, place = make_keys(key)
    if as_json:
        write_json({"private": str(key), "public": str(place), "signer": public.hex})
        return
    out().print(f"Wrote {key} (keep it to yourself) and {place}", markup=False, soft_wrap=True)
    out().print(f"signer {public.hex}", soft_wrap=True)


def _check(found: Any, model: str) -> None:
    """Load the model and the SAEs and compare. Raises `PolicyMismatch`, and what loading raises."""
    from saeguard.loaders import load_sae
    from saeguard.models import load_model

    with progress(f"loading {model}") as tick:
        live, tokenizer = load_model(model)
        tick("loading SAEs")
        saes = {pin.name: load_sae(pin.source) for pin in found.saes}
        tick("comparing")
        found.check(live, tokenizer, saes)


def _tell(found: Any) -> None:
    rules = () if found.plan is None else found.plan.rules
    rows = [("edit", rule, _short(rule.gate), "-") for rule in rules]
    for stop in found.refusals:
        says = f"{stop.text:.60}" if hasattr(stop, "text") else "-"
        rows.append((f"{type(stop).__name__.lower()} ({stop.reason})", stop.sae, _short(stop.gate), says))
    console = out()
    console.print(table(f"{found.name}, serial {found.serial}", ("does", "with", "gate", "text"), rows))
    pins = [("model", found.model.name, "-", found.model.weights[:16]), ("tokenizer", "-", "-", found.tokenizer[:16])]
    pins += [("SAE", pin.source, pin.site, pin.fingerprint[:16]) for pin in found.saes]
    console.print(table("Made for", ("what", "name", "site", "SHA-256"), pins))
    figures = [(name, value) for name, value in json.loads(found.to_json())["calibration"].items()]
    if figures:
        console.print(table("Calibration", ("figure", "value"), figures))
    console.print(f"When the guard fails: {found.on_error}. Made with saeguard {found.version}.", markup=False)
    console.print(f"fingerprint {found.fingerprint()}", soft_wrap=True)


FEW = 6
"""Numbers of a gate that are shown; of more their count is."""


def _short(part: Any) -> str:
    """A gate or a part of one as it is written in Python, long lists by their length, defaults left out."""
    from dataclasses import MISSING, fields, is_dataclass

    if part is None:
        return "-"
    if isinstance(part, tuple) and len(part) > FEW:
        return f"({len(part):,} of them)"
    if isinstance(part, tuple):
        return f"({', '.join(map(_short, part))})"
    if not is_dataclass(part):
        return repr(part)
    shown = [one for one in fields(part) if one.default is MISSING or getattr(part, one.name) != one.default]
    return f"{type(part).__name__}({', '.join(f'{one.name}={_short(getattr(part, one.name))}' for one in shown)})"
