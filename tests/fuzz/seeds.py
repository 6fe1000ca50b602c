"""Write the corpus, from nothing but this code: python -m tests.fuzz.seeds

Crashing inputs that a campaign found and that are named by their hash are left where they are.
"""

import json
import struct
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load, save
from torch import Tensor

from tests.audits import KEY, OTHER_KEY, chain, short_record
from tests.fuzz import targets
from tests.fuzz.targets import CORPUS, FAMILIES, NATIVE, NATIVE_PURSUIT, TARGETS, native_bytes, torch_bytes
from tests.test_archives import DOUBLED, HUGE, NPZ, SAFETENSORS, TORCH, dumped, tensor_pickle, torch_zip

MAX_BYTES = 2200
Files = Iterator[tuple[str, bytes]]


def text(words: bytes) -> bytes:
    """A pickle's step for a text."""
    return b"X" + struct.pack("<I", len(words)) + words


DOUBLING_DEVICE = b"ctorch\ndevice\nq\1" + text(b"cpu") + b"q\2" + b"h\1h\2h\2\x86Rq\2" * 60 + b"\x86."
"""d = device(d, d), sixty times: each is text twice as long as the one before."""
SHARED = b"](" + b"N" * 200 + b"eq\2"
MANY_LONG_NAMES = b"}" + text(b"a" * 2000) + b"](" + SHARED + b"h\2" * 300 + b"es."
"""A list of one list 300 times: 60,000 values, each with its name in full."""
PICKLES = {
    "doubling_device": DOUBLING_DEVICE,
    "many_long_names": MANY_LONG_NAMES,
    "doubling_tuple": DOUBLED[:40] + b".",
    "calls_itself": b"ctorch._tensor\n_rebuild_from_type_v2\nq\1]q\2(h\1Nh\2Nt" + b"h\1h\1Nh\2N\x87N\x86R.",
    "arguments_that_are_a_list": b"ctorch._utils\n_rebuild_parameter\n](NeR.",
    "size_of_a_number": b"ctorch\nSize\nK\1\x85R.",
    "size_of_a_long_list": b"ctorch\nSize\n](" + b"N" * 500 + b"e\x85R.",
    "escape_that_warns": b"S'\\d'\n.",
    "unicode_that_is_cut": b"V\\ud8\n.",
    "long_of_many_bytes": b"\x8a\xff" + b"\x7f" * 255 + b".",
    "lone_surrogate": text(b"\xed\xa0\x80") + b".",
    "storage_of_text": text(b"storagestorage") + b"Q.",
    "code": dumped(np.float32(1)),
    "system": b"cos\nsystem\n" + text(b"touch executed") + b"\x85R.",
    "tensor": tensor_pickle(),
    "tensor_of_tensors": tensor_pickle(shape=tensor_pickle()[2:-1]),
    "memo_of_nothing": b"q\0.",
    "mark_of_nothing": b"t.",
}
EMPTY_AND_ENDLESS = {"shape": [1 << 40, 1 << 40, 0], "dtype": "F32", "data_offsets": [0, 0]}
JSONS: dict[str, bytes] = {
    "duplicate_key.json": b'{"a": 1, "a": 2}',
    "nan.json": b'{"a": NaN}',
    "infinity.json": b'{"a": -Infinity}',
    "overflow.json": b'{"a": 1e999}',
    "5000_digits.json": b'{"a": ' + b"9" * 5000 + b"}",
    "4000_digits.json": b'{"a": ' + b"9" * 4000 + b"}",
    "deep.json": b'{"a":' * 400 + b"1" + b"}" * 400,
    "deeper_than_python.json": b"[" * 1200,
    "cut.json": b'{"a": [1, 2',
    "surrogate.json": b'{"a": "\\ud800", "\\udfff": 1}',
    "not_utf8.json": b'{"a": "\xff"}',
    "utf16.json": '{"a": 1}'.encode("utf-16"),
    "byte_order_mark.json": b'\xef\xbb\xbf{"a": 1}',
    "nul.json": b'{"a": "\0"}',
    "number.json": b"3",
    "list.json": b"[]",
    "text.json": b'"a"',
    "null.json": b"null",
    "empty.json": b"",
    "two.json": b"{}{}",
}
YAMLS: dict[str, bytes] = {
    "aliases.yaml": b"a: &a [1, 1]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
    "alias_of_itself.yaml": b"a: &a [*a]\n",
    "python_object.yaml": b"a: !!python/object/apply:os.system ['touch executed']\n",
    "python_name.yaml": b"a: !!python/name:os.system\n",
    "map_of_a_scalar.yaml": b"!!map [a]\n",
    "set_of_a_scalar.yaml": b"a: !!set [1]\n",
    "integer_of_nothing.yaml": b'a: !!int ""\n',
    "float_of_nothing.yaml": b'a: !!float ""\n',
    "bool_of_a_word.yaml": b"a: !!bool maybe\n",
    "timestamp_of_a_word.yaml": b"a: !!timestamp soon\n",
    "binary.yaml": b"a: !!binary '=='\n",
    "month_13.yaml": b"a: 2024-13-45\n",
    "infinity.yaml": b"a: .inf\nb: -.inf\nc: .nan\n",
    "no_digits.yaml": b"a: 0x_\nb: 0b_\n",
    "sexagesimal.yaml": b"a: 190:20:30\nb: 1:99999999999999999999:60\n",
    "5000_digits.yaml": b"a: " + b"9" * 5000 + b"\n",
    "duplicate_key.yaml": b"a: 1\na: 2\n",
    "list_as_a_key.yaml": b"? [1, 2]\n: 1\n",
    "merge.yaml": b"<<: {a: 1}\nb: 2\n",
    "two_documents.yaml": b"a: 1\n---\nb: 2\n",
    "other_version.yaml": b"%YAML 9.9\n---\na: 1\n",
    "deep_brackets.yaml": b"a: " + b"[" * 400,
    "deep_indents.yaml": b"- " * 400,
    "deep_questions.yaml": b"? " * 400,
    "nul.yaml": b"a: \0\n",
    "surrogate.yaml": b'a: "\\ud800"\n',
    "number.yaml": b"3\n",
    "empty.yaml": b"",
}
RULE: dict[str, Any] = {"sae": "a", "latents": [1], "op": {"kind": "ablate"}}
RULES: dict[str, Any] = {
    "empty_op": {"op": {}},
    "latents_text": {"latents": "12"},
    "latent_infinite": {"latents": [float("inf")]},
    "latent_of_200_bits": {"latents": [1 << 200]},
    "factor_infinite": {"op": {"kind": "scale", "factor": float("inf")}},
    "factor_of_400_digits": {"op": {"kind": "scale", "factor": 10**400}},
    "site_list": {"site": []},
    "kind_list": {"op": {"kind": []}},
    "phase_dict": {"phase": {}},
    "surrogate": {"sae": "\ud800"},
    "underscore_field": {"_": 1},
}
PLANS = {
    "schema_true": b'{"saeguard":"plan","schema":true,"rules":[]}',
    "schema_text": b'{"saeguard":"plan","schema":"1","rules":[]}',
    "no_rules": b'{"saeguard":"plan","schema":1,"rules":[]}',
    "rule_null": b'{"saeguard":"plan","schema":1,"rules":[null]}',
} | {
    name: json.dumps({"saeguard": "plan", "schema": 1, "rules": [RULE | rule]}).replace("Infinity", "1e999").encode()
    for name, rule in RULES.items()
}
HEADERS: dict[str, Any] = {
    "pursuit": NATIVE_PURSUIT,
    "pursuit_rounds_text": NATIVE_PURSUIT | {"pursuit": {"rounds": "many"}},
    "pursuit_rounds_endless": NATIVE_PURSUIT | {"pursuit": {"rounds": 10**9}},
    "pursuit_residual_infinite": NATIVE_PURSUIT | {"pursuit": {"rounds": 1, "residual": 1e400}},
    "pursuit_unknown": NATIVE_PURSUIT | {"pursuit": {"rounds": 1, "__class__": 1}},
    "eps_negative": NATIVE | {"eps": -1.0},
    "eps_integer": NATIVE | {"eps": 1},
    "site_unknown": NATIVE | {"site": "resid_post.x"},
    "layer_of_20_digits": NATIVE | {"site": "resid_post." + "9" * 20},
    "activation_list": NATIVE | {"activation": ["relu"]},
    "top_k_true": NATIVE | {"top_k": True},
    "name_dict": NATIVE | {"name": {"a": 1}},
    "schema_2": NATIVE | {"schema": 2},
    "schema_list": NATIVE | {"schema": [1]},
    "manifest_list": NATIVE | {"manifest": [1]},
    "manifest_deep": NATIVE | {"manifest": {"a": json.loads("[" * 200 + "]" * 200)}},
}


def parsers() -> dict[str, Callable[[], Files]]:
    """Seeds of the targets that are one format each."""
    return {
        "safetensors": lambda: hostile(SAFETENSORS, "safetensors", empty_and_endless=empty_and_endless()),
        "npz": lambda: hostile(NPZ, "npz", empty_and_endless=targets.npz_bytes().replace(b"(2, 3)", b"(9, 0)")),
        "torch_zip": lambda: hostile(
            TORCH, "pt", **{name: torch_zip(data) for name, data in PICKLES.items()},
            empty_and_endless=torch_zip(tensor_pickle(shape=HUGE + HUGE + b"K\0\x87", strides=b"K\1K\1K\1\x87")),
        ),
        "torch_legacy": lambda: legacy(),
        "pickle": lambda: ((f"{name}.pkl", data) for name, data in PICKLES.items()),
        "json": lambda: iter(JSONS.items()),
        "yaml": lambda: iter(YAMLS.items()),
        "plan": lambda: ((f"{name}.json", data) for name, data in (PLANS | small(JSONS)).items()),
        "audit": lambda: audits(),
        "native_header": lambda: headers(),
        "native_file": lambda: natives(),
    }  # fmt: skip


def audits() -> Files:
    """Logs that are not what was written, and lines that are JSON of other kinds."""
    lines, unsealed, others = (chain(2, key, make=short_record) for key in (KEY, None, OTHER_KEY))
    changed = lambda old, new: lines[0].replace(old, new) + lines[1]
    found = {
        "no_line": b"", "unfinished": lines[0] + lines[1][:300], "not_unfinished": lines[0] + b"\0" * 40,
        "swapped": lines[1] + lines[0], "twice": lines[0] * 2, "begins_late": lines[1], "unsealed": b"".join(unsealed),
        "seals_stop": lines[0] + unsealed[1], "other_key": b"".join(others),
        "seal_of_surrogates": changed(b'"mac":"', b'"mac":"\\ud800'),
        "seal_of_a_number": changed(b'"mac":"', b'"mac":1,"x":"'),
        "number_infinite": changed(b"0.25", b"1e999"), "count_of_400_digits": changed(b'"v":1', b'"v":1' + b"0" * 400),
        "version_true": changed(b'"v":1', b'"v":true'), "site_of_a_list": changed(b'{"expected"', b'[{"expected"'),
        "gates_null": changed(b'{"logistic":0.25}', b"null"), "deep": b'{"decision":' + b"[" * 900 + b"\n",
    }  # fmt: skip
    for name, data in (found | {name: data + b"\n" for name, data in small(JSONS).items()}).items():
        yield f"{name}.jsonl", data


def headers() -> Files:
    found = {name: json.dumps(meta).encode() for name, meta in HEADERS.items()} | small(JSONS)
    for name, data in found.items():
        yield f"{name}.json", data


def small(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name.removesuffix(".json"): data for name, data in found.items() if len(data) < 1000}


def hostile(found: dict[str, bytes], ending: str, **more: bytes) -> Files:
    """The small ones of the tests of archives, and more."""
    for name, data in (found | more).items():
        if len(data) <= MAX_BYTES:
            yield f"{name.replace(' ', '_').replace('*', '').replace(',', '').replace('.', '_')}.{ending}", data


def empty_and_endless() -> bytes:
    header = json.dumps({"W": EMPTY_AND_ENDLESS}).encode()
    return struct.pack("<Q", len(header)) + header


def legacy() -> Files:
    whole = torch_bytes(legacy=True)
    magic = whole[:21]
    yield "three_systems.pt", magic + PICKLES["system"] * 3
    yield "other_version.pt", whole.replace(b"M\xe9\x03.", b"M\xe9\x04.")
    yield "no_storages.pt", whole[: whole.index(b"]q\0(X") if b"]q\0(X" in whole else 200] + b"]."
    yield "storage_longer_than_the_file.pt", whole[:-32] + struct.pack("<q", 1 << 40) + whole[-24:]
    for name in ("doubling_device", "doubling_tuple", "calls_itself", "escape_that_warns", "lone_surrogate"):
        yield f"{name}.pt", whole[: whole.index(b".", 21) + 1] + PICKLES[name]


def natives() -> Files:
    yield "relu.safetensors", native_bytes({"schema": 1, "name": "n", "activation": "relu"})
    yield "no_threshold.safetensors", native_bytes(NATIVE)
    yield "header_that_is_no_json.safetensors", native_bytes("{")
    yield "header_that_is_a_list.safetensors", native_bytes("[]")
    yield "nan.safetensors", native_bytes(NATIVE, "threshold").replace(struct.pack("<f", 1), b"\0\0\xc0\x7f")
    shapes = {"W_enc": (2, 0), "b_enc": (0,), "W_dec": (0, 2), "b_dec": (2,)}
    meta = {"saeguard": json.dumps({"schema": 1, "name": "n", "activation": "relu"})}
    yield "no_latents.safetensors", save({name: torch.ones(shape) for name, shape in shapes.items()}, metadata=meta)


# Families


def family(name: str) -> Files:
    """Its config, or its weights, in the ways that each of them can be wrong."""
    whole = FAMILIES[name].good()[0]
    ending = name.rpartition(".")[2]
    if ending in ("json", "yaml"):
        yield from configs(whole, ending)
    elif not name.startswith("refused"):
        yield from weights(whole, ending)


def configs(whole: bytes, ending: str) -> Files:
    said = json.loads(whole) if ending == "json" else yaml.safe_load(whole)
    write = lambda found: (json.dumps(found) if ending == "json" else yaml.dump(found)).encode()
    yield f"good.{ending}", whole
    changes: dict[str, Callable[[Any], Any]] = {
        "nulls": lambda value: None, "lists": lambda value: [value], "texts": str, "empty_texts": lambda value: "",
        "negative": lambda value: -value if type(value) in (int, float) else value,
        "huge": lambda value: 1 << 62 if type(value) is int else value,
        "330_digits": lambda value: 10**330 if type(value) is int else value,
        "mappings": lambda value: {"a": value}, "true": lambda value: True, "half": lambda value: 0.5,
    }  # fmt: skip
    for name, change in changes.items():
        yield f"{name}.{ending}", write(leaves(said, change))
    if ending == "json":
        yield "duplicate_key.json", whole.rstrip()[:-1] + b"," + whole.lstrip()[1:]
        infinite = write(leaves(said, lambda value: float("inf") if type(value) is int else value))
        yield "overflow.json", infinite.replace(b"Infinity", b"1e999")
        yield "deep.json", b'{"a":' * 60 + b"1" + b"}" * 60
    else:
        yield "tagged.yaml", whole.replace(b": ", b": !!int ", 1)
        yield "alias.yaml", b"a: &a [1]\nb: *a\n" + whole


def leaves(found: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(found, dict):
        return {key: leaves(value, change) for key, value in found.items()}
    return change(found)


def weights(whole: bytes, ending: str) -> Files:
    """The same tensors, with two numbers along x and three latents, or none."""
    for name, lengths in {"small": (2, 3), "no_latents": (2, 0), "no_width": (0, 3)}.items():
        if name == "no_width" and ending.startswith("pt"):  # a kilobyte each for what the other formats say too
            continue
        yield f"{name}.{ending}", mapped(whole, ending, lambda tensor, lengths=lengths: shrunk(tensor, *lengths))
    nan = lambda tensor: shrunk(tensor, 2, 3) * float("nan") if tensor.is_floating_point() else shrunk(tensor, 2, 3)
    yield f"nan.{ending}", mapped(whole, ending, nan)


def shrunk(tensor: Tensor, width: int, latents: int) -> Tensor:
    for axis, length in enumerate(tensor.shape):
        if length > 12:
            tensor = tensor.narrow(axis, 0, latents if length == 48 else width)
    return tensor.clone().contiguous()


def mapped(whole: bytes, ending: str, change: Callable[[Tensor], Tensor]) -> bytes:
    if ending == "safetensors":
        return save({name: change(tensor) for name, tensor in load(whole).items()})
    if ending == "npz":
        stream = BytesIO()
        with np.load(BytesIO(whole)) as arrays:
            np.savez(stream, **{name: change(torch.from_numpy(array)).numpy() for name, array in arrays.items()})
        return stream.getvalue()
    found = torch.load(BytesIO(whole), weights_only=True)
    return torch_bytes(leaves(found, lambda value: change(value) if isinstance(value, Tensor) else value))


def main() -> None:
    makers = parsers() | {name: (lambda name=name: family(name)) for name in FAMILIES}
    assert set(makers) == set(TARGETS)
    for name, maker in makers.items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        parsed = name in targets.PARSERS
        goods = [(f"good_{i}", data) for i, data in enumerate(TARGETS[name].good())] if parsed else []
        for file, data in [*goods, *maker()]:
            (folder / file).write_bytes(data)


if __name__ == "__main__":
    main()
