"""What 40 latents of a million cost: wall time and resident memory of a partial load against a full one.

The file is sparse: shaped as Gemma Scope's widest (2304 x 1,048,576 float32, 19 GB), with real numbers only where the
40 latents are, so that what is read can be compared with what was written. The kernel gives zeros for the rest without
a disk. Each measurement is a fresh process, so that its peak of resident memory is its own. The full load is measured
at 1/64 of the width, which fits, and multiplied.

    python benchmarks/partial_load.py [--latents 40]        the last line is JSON: seconds, added_mb and the rest
"""

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

D_IN, D_SAE, SHRUNK = 2304, 1 << 20, 64
SEED = 7


def write(folder: Path, d_sae: int, latents: list[int]) -> Path:
    """A folder as Gemma Scope 2 publishes them, sparse but for ``latents``."""
    shapes = {
        "w_enc": (D_IN, d_sae),
        "b_enc": (d_sae,),
        "threshold": (d_sae,),
        "w_dec": (d_sae, D_IN),
        "b_dec": (D_IN,),
    }
    header, places, end = {}, {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        places[name], end = end, end + size
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    path = folder / "params.safetensors"
    generator = np.random.default_rng(SEED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)
        for latent in latents:
            column, row = (generator.standard_normal(D_IN).astype("<f4") for _ in range(2))
            for i, value in enumerate(column):
                file.seek(start + places["w_enc"] + 4 * (i * d_sae + latent))
                file.write(value.tobytes())
            file.seek(start + places["w_dec"] + 4 * latent * D_IN)
            file.write(row.tobytes())
    config = {
        "architecture": "jump_relu", "model_name": "google/gemma-3-4b-pt", "width": d_sae, "type": "sae",
        "hf_hook_point_in": "model.layers.17.output", "hf_hook_point_out": "model.layers.17.output",
        "affine_connection": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measure(folder: Path, latents: list[int] | None) -> dict[str, float]:
    """Seconds and megabytes of resident memory that one load adds, in a process of its own."""
    command = [sys.executable, __file__, "--worker", str(folder), "--json-latents", json.dumps(latents)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(folder: str, latents: list[int] | None) -> None:
    """The measured process: what is counted begins after all imports and a load of something else."""
    import resource

    from saeguard import load_sae

    load_sae("smollm2-135m-instruct/resid_post.9", latents=[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    sae = load_sae(folder, latents=latents)
    seconds = time.perf_counter() - start
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if latents is not None:
        check(sae, latents)
    print(json.dumps({"seconds": seconds, "added_mb": added}))


def check(sae, latents: list[int]) -> None:
    """The numbers that were read are those that were written."""
    generator = np.random.default_rng(SEED)
    for place in range(len(latents)):
        column, row = (generator.standard_normal(D_IN).astype("<f4") for _ in range(2))
        assert np.array_equal(sae.W_enc[:, place].numpy(), column)
        assert np.array_equal(sae.W_dec[place].numpy(), row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=40)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--json-latents", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker, json.loads(given.json_latents))
        return
    rng = np.random.default_rng(0)
    latents = sorted(int(i) for i in rng.choice(D_SAE, given.latents, replace=False))
    fewer = sorted({i % (D_SAE // SHRUNK) for i in latents})
    with tempfile.TemporaryDirectory() as root:
        wide = write(Path(root) / "gemma-scope-2-4b-pt/resid_post/layer_17_width_1m_l0_medium", D_SAE, latents)
        narrow = write(
            Path(root) / "gemma-scope-2-4b-pt/resid_post/layer_17_width_16k_l0_medium", D_SAE // SHRUNK, fewer
        )
        partial = [measure(wide, latents) for _ in range(3)]
        whole = measure(narrow, None)
    partial.sort(key=lambda run: run["seconds"])
    full = {key: value * SHRUNK for key, value in whole.items()}
    rows = {
        "partial, median of 3": partial[1],
        "partial, best": partial[0],
        f"full, {SHRUNK} x that of {D_SAE // SHRUNK:,} latents": full,
    }
    table = Table("", "seconds", "added MB", title=f"{given.latents} of {D_SAE:,} latents of width {D_IN}")
    for name, run in rows.items():
        table.add_row(name, f"{run['seconds']:.2f}", f"{run['added_mb']:.0f}")
    Console().print(table)
    found = {
        "seconds": round(partial[1]["seconds"], 3), "added_mb": round(max(run["added_mb"] for run in partial), 1),
        "latents": given.latents, "full_seconds_estimated": round(full["seconds"], 1),
        "full_mb_estimated": round(full["added_mb"]),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
