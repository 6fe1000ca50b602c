"""``saeguard inspect`` and ``saeguard convert``: SAEs that somebody else published."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.console import Json, err, out, progress, table, write_json

Source = Annotated[
    str, typer.Argument(help="A shipped name, a folder, a file, hf://owner/repo/path, or a SAELens release.")
]
Id = Annotated[str, typer.Option("--id", help="The SAE's id in the release that SOURCE names.")]
SiteIn = Annotated[str, typer.Option("--site", help="Where it reads, when its files do not say or say it wrongly.")]
SiteOut = Annotated[str, typer.Option("--site-out", help="Where a transcoder writes.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="k of a TopK SAE whose files do not have it.")]
Scale = Annotated[float | None, typer.Option("--input-scale", help="What x is multiplied with, when files do not say.")]


def inspect(
    source: Source,
    sae_id: Id = "",
    site: SiteIn = "",
    site_out: SiteOut = "",
    top_k: TopK = None,
    input_scale: Scale = None,
    latents: Annotated[str, typer.Option(help="Latents, such as 3,17,40-49: what reading only these would cost.")] = "",
    model: Annotated[str, typer.Option(help="Check it on this model: a name, a folder or a hub id.")] = "",
    text: Annotated[Path | None, typer.Option(help="Text for the check, instead of the one that is built in.")] = None,
    as_json: Json = False,
) -> None:
    """Say what an SAE's files are, without reading their weights; --model also runs it on a few hundred tokens.

    Exit status 1: the check on the model refuses it.
    """
    from saeguard.loaders import open_sae

    stored = open_sae(
        (source, sae_id) if sae_id else source, site or None, site_out=site_out or None, top_k=top_k,
        input_scale=input_scale,
    )  # fmt: skip
    found = describe(stored, parse_latents(latents, stored.d_sae))
    check = _check(stored, model, text) if model else None
    if as_json:
        write_json(found | ({} if check is None else {"self_check": json.loads(check.to_json())}))
    else:
        out().print(table("", ("", ""), [(key.replace("_", " "), _cell(value)) for key, value in found.items()]))
        if check is not None:
            out().print(str(check), markup=False, soft_wrap=True)
    if check is not None and not check.passed:
        raise typer.Exit(1)


def describe(stored: Any, latents: tuple[int, ...] = ()) -> dict[str, Any]:
    """What is known of a `Stored` SAE from its headers; bytes are those on disk, and those that would be looked at."""
    manifest = dict(stored.manifest)
    found = {
        "name": stored.name, "family": stored.family, "activation": stored.activation, "top_k": stored.top_k,
        "d_in": stored.d_in, "d_sae": stored.d_sae, "d_out": stored.d_out,
        "site": str(stored.site) if stored.site else None,
        "site_out": str(stored.site_out) if stored.site_out else None,
        "norm": stored.norm, "units": manifest.pop("units", "as published"), "model": stored.model,
        "files": [path.name for path in stored.files], "bytes_on_disk": stored.size(),
        "bytes_to_load": stored.bytes_for(None),
    }  # fmt: skip
    if latents:
        found |= {"latents": len(latents), "bytes_for_latents": stored.bytes_for(len(latents))}
    return found | {"manifest": manifest}


def parse_latents(text: str, d_sae: int) -> tuple[int, ...]:
    """``3,17,40-49`` as numbers. Raises `LatentOutOfRange`, and typer's error for anything else."""
    from saeguard.sae import SAE

    numbers: list[int] = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or len(part) > 30:
            raise typer.BadParameter(f"{part!r} is not a latent or a range of latents such as 40-49")
        SAE.check_range("it", d_sae, [int(first), int(last or first)])
        numbers += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(numbers))


def _check(stored: Any, model: str, text: Path | None) -> Any:
    from saeguard.evaluating.self_check import self_check
    from saeguard.models import load_model

    lines = None if text is None else [line for line in text.read_text().splitlines() if line.strip()]
    with progress("Loading the model and the SAE"):
        live, tokenizer = load_model(model)
        return self_check(live, stored.sae(), tokenizer, text=lines)


def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="Folder, or .safetensors file, to write.")],
    sae_id: Id = "",
    site: SiteIn = "",
    site_out: SiteOut = "",
    top_k: TopK = None,
    input_scale: Scale = None,
    memory_gb: Annotated[float | None, typer.Option(help="The most memory it may take; 4 times the files + 1.")] = None,
    seconds: Annotated[float, typer.Option(help="The most time it may take.")] = 1800.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a target that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Turn any family's files into saeguard's own format, in a process with limits on memory and time."""
    from saeguard.loaders import open_sae
    from saeguard.loaders.convert import convert as run

    with progress(f"Converting {source}"):
        written = run(
            (source, sae_id) if sae_id else source, target, site or None, site_out=site_out or None, top_k=top_k,
            input_scale=input_scale, memory_bytes=None if memory_gb is None else int(memory_gb * 1e9), seconds=seconds,
            overwrite=overwrite,
        )  # fmt: skip
    found = describe(open_sae(written))
    write_json({"written": str(written)} | found) if as_json else err().print(f"wrote {written}", soft_wrap=True)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_cell(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else f"{value}"
