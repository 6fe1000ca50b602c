"""The tables of ``saeguard error`` and ``saeguard compare``, from their own JSON."""

from typing import Any

from rich.table import Table

from saeguard.cli.console import table


def split_table(split: dict[str, Any]) -> Table:
    """One SAE's error by domain; CE as what it costs beside the plain model, in nats per token."""
    heads = ("domain", "tokens", "L0", "unexplained", "linear", "nonlinear", "linear of it", "R2 error", "R2 norm",
             "with |x|2", "CE +SAE", "+linear", "+nonlinear")  # fmt: skip
    rows = []
    for part in (*split["texts"], split["whole"]):
        rest, left = part["unexplained_nonlinear"], part["unexplained"]
        shares = (f"{left:.2%}", f"{left - rest:.2%}", f"{rest:.2%}", f"{1 - rest / left if left else 0:.0%}")
        fits = (f"{part[name]:.3f}" for name in ("r2_error", "r2_norm", "r2_norm_quadratic"))
        rows.append((
            part["name"], f"{part['n_tokens']:,}", f"{part['l0']:.1f}", *shares, *fits, *_gaps(part["losses"]),
        ))  # fmt: skip
    fitted = f"linear map fitted to {split['n_fitted']:,} other tokens"
    massive = f", {split['whole']['n_massive']} massive tokens left out" if split["whole"]["n_massive"] else ""
    title = f"{split['label']}: {split['sae']} at {split['site']} of {split['model']}; {fitted}{massive}"
    return table(title, heads, rows, right=range(1, len(heads)))


def change_table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """By domain, what boosts changed."""
    rows = []
    for old, new in zip((*before["texts"], before["whole"]), (*after["texts"], after["whole"]), strict=True):
        gaps = [_gap(part["losses"], "sae") for part in (old, new)]
        known = [f"{gaps[0]:.4f}", f"{gaps[1]:.4f}", _change(*gaps)] if None not in gaps else ["-"] * 3
        rows.append((
            old["name"], f"{old['unexplained']:.2%}", f"{new['unexplained']:.2%}",
            _change(old["unexplained"], new["unexplained"]), *known,
        ))  # fmt: skip
    heads = ("domain", "unexplained before", "after", "change", "CE gap before", "after", "change")
    return table(f"{before['label']} and {after['label']}", heads, rows, right=range(1, 7))


def token_table(split: dict[str, Any]) -> Table:
    """Tokens of the vocabulary with the most unexplained variance per occurrence."""
    rows = [
        (repr(token["token"]), token["n"], f"{token['unexplained']:.1%}", f"{token['linear_share']:.0%}",
         f"{token['share_of_error']:.2%}")
        for token in split["tokens"]
    ]  # fmt: skip
    heads = ("token", "times", "unexplained, of a token's mean variance", "linear", "of all error")
    return table(f"Largest errors of {split['label']}", heads, rows, right=(1, 2, 3, 4))


def curve_table(curve: dict[str, Any]) -> Table:
    """Gradient pursuit beside the SAE's own encoder."""
    rows = [(point["k"], f"{point['pursuit']:.2%}", f"{point['encoder']:.2%}") for point in curve["points"]]
    rows.append((f"{curve['l0']:.1f} on average", "-", f"{curve['unexplained']:.2%}"))
    heads = ("latents per token", "gradient pursuit", "the encoder's largest")
    return table(f"Unexplained variance over {curve['n_tokens']} tokens", heads, rows, right=(1, 2))


def overlap_table(found: dict[str, Any]) -> Table:
    """What two dictionaries have in common."""
    both = found["overlap"]
    shared = [f"{both['shared']} ({both[f'share_{side}']:.1%})" for side in "ab"]
    rows = [
        ("latents", both["n_a"], both["n_b"]),
        (f"shared, cosine at least {both['least']:g}", *shared),
        ("mean of the largest cosine with the other", f"{both['nearest_a']:.3f}", f"{both['nearest_b']:.3f}"),
    ]
    kept = f"; matched among the {both['candidates']} nearest of each" if both["candidates"] else ""
    return table(f"A: {found['a']}   B: {found['b']}{kept}", ("", "A", "B"), rows, right=(1, 2))


def portrait_table(portraits: list[dict[str, Any]]) -> Table:
    """Both SAEs on all texts."""
    wholes = [one["whole"] for one in portraits]
    show = lambda name, form: [_number(whole[name], form) for whole in wholes]
    rows = [
        ("site", *(one["site"] for one in portraits)),
        ("L0", *show("l0", ".1f")),
        ("unexplained variance (FVU)", *show("fvu", ".4f")),
        ("the same without massive tokens", *show("fvu_typical", ".4f")),
        ("cross-entropy recovered", *show("ce_recovered", ".4f")),
        ("dead on this text", *(f"{one['whole']['dead']} of {one['d_sae']}" for one in portraits)),
        (f"fake: fire on more than {portraits[0]['fake_above']:.0%} of random tokens",
         *("-" if one["fake"] is None else f"{one['fake']:.2%}" for one in portraits)),
    ]  # fmt: skip
    title = f"On {wholes[0]['n_tokens']:,} tokens, cross-entropy on {wholes[0]['n_ce_tokens']:,} of them"
    return table(title, ("", "A", "B"), rows, right=(1, 2))


def domain_table(portraits: list[dict[str, Any]]) -> Table:
    """Both SAEs by domain."""
    rows = [
        (a["name"], f"{a['fvu']:.4f}", f"{b['fvu']:.4f}", f"{a['l0']:.1f}", f"{b['l0']:.1f}",
         _number(a["ce_recovered"], ".4f"), _number(b["ce_recovered"], ".4f"))
        for a, b in zip(*(one["texts"] for one in portraits), strict=True)
    ]  # fmt: skip
    return table("", ("domain", "FVU A", "B", "L0 A", "B", "CE recovered A", "B"), rows, right=range(1, 7))


def _gaps(losses: dict[str, Any] | None) -> list[str]:
    found = [_gap(losses, name) for name in ("sae", "with_linear", "with_nonlinear")]
    return [_number(gap, ".4f") for gap in found]


def _gap(losses: dict[str, Any] | None, name: str) -> float | None:
    return None if losses is None else losses[name] - losses["plain"]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _change(old: float | None, new: float | None) -> str:
    return "-" if not old or new is None else f"{new / old - 1:+.1%}"
