"""What an address or a release's name brings to this machine, from a hub that runs inside the test.

The hub's own client talks to it over HTTP; only where it thinks the hub and its cache are is changed.
"""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch
from huggingface_hub import close_session, constants

from saeguard import load_sae
from saeguard.errors import LoadError, ModelUnavailable, UnsupportedFormat
from saeguard.loaders import open_sae, places, releases
from saeguard.loaders.places import Address, parse, resolve
from tests.lookalikes import LOOKALIKES
from tests.lookalikes.base import inputs

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
REPO = "google/gemma-scope-2b-pt-res"
FOLDER = "layer_12/width_16k/average_l0_82"
RELEASE = ("goodfire-llama-3.1-8b-instruct", "layer_19")
GOODFIRE = "Goodfire/Llama-3.1-8B-Instruct-SAE-l19"
FILE = "Llama-3.1-8B-Instruct-SAE-l19.pth"
CHOSEN_BY_SITE = {"circuit_tracer many", "openai_v5_mid", "qwen_scope many layers"}
"""Look-alikes of folders with several SAEs, which is for folders on this machine only."""
SAME_FILES = {name for name, like in LOOKALIKES.items() if like.family == "saelens" and "rescaled average" not in name}

Fault = Callable[["Asks"], None]


@dataclass
class Hub:
    """Repositories by name; of each the files at two commits, of which ``main`` is the newer."""

    url: str
    cache: Path
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=lambda: {"main": NEW, "v1": OLD, OLD: OLD, NEW: NEW})
    asked: list[str] = field(default_factory=list)
    fault: Fault | None = None

    def put(self, repo: str, files: Mapping[str, bytes], commit: str = NEW) -> None:
        self.repos.setdefault(repo, {OLD: {}, NEW: {}})[commit] |= files

    def got(self) -> list[str]:
        """Files whose bytes were sent, in order."""
        return [line.split("/", 5)[5] for line in self.asked if line.startswith("GET") and "/resolve/" in line]


class Asks(BaseHTTPRequestHandler):
    """The requests that the hub's client makes for one file, a folder, some paths, and a commit."""

    hub: Hub

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.hub.asked.append(f"{self.command} {unquote(urlsplit(self.path).path)}")
        (self.hub.fault or Asks.serve)(self)

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(
            r"/(?:api/models/)?([^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/(\w+)(?:/(.*))?)?", path
        )
        if not found or found[1] not in self.hub.repos:
            self.refuse(401, "RepoNotFound")
            return
        repo, what, revision, rest = found[1], found[2], found[3] or "main", found[4] or ""
        commit = self.hub.branches.get(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound")
            return
        files = self.hub.repos[repo][commit]
        if what == "resolve":
            self.file(commit, files.get(rest))
        elif what == "paths-info":
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.json([entry for path in form["paths"] for entry in entries(files, path)])
        elif what == "tree":
            below = sorted({name[: len(rest) + 1 + len(name[len(rest) + 1 :].split("/")[0])] for name in files
                            if name.startswith(f"{rest}/")})  # fmt: skip
            self.json([entry for path in below for entry in entries(files, path)])
        else:
            self.json({"_id": "1", "id": repo, "sha": commit})

    def json(self, found: object) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(found).encode())

    def file(self, commit: str, content: bytes | None, *, claims: int | None = None) -> None:
        if content is None:
            self.refuse(404, "EntryNotFound")
            return
        etag = hashlib.sha256(content).hexdigest()
        self.send(200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, content, claims=claims)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, {"X-Error-Code": code, "X-Error-Message": code}, b"")

    def send(self, status: int, headers: Mapping[str, str], body: bytes, *, claims: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if claims is None else claims))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def entries(files: Mapping[str, bytes], path: str) -> Iterator[dict[str, object]]:
    """How the hub's listings describe a file or a folder; nothing where there is neither."""
    if path in files:
        yield {"type": "file", "path": path, "size": len(files[path]), "oid": "f" * 40}
    elif any(name.startswith(f"{path}/") for name in files):
        yield {"type": "directory", "path": path, "size": 0, "oid": "d" * 40}


@pytest.fixture(scope="module")
def client() -> Iterator[None]:
    """The connections of this module's tests, which no proxy sees; made once, for certificates are read each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield
        close_session()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: None) -> Iterator[Hub]:
    """A hub without repositories, and an empty cache; both are what the client uses."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Asks)
    found = Hub(f"http://127.0.0.1:{server.server_port}", tmp_path / "cache" / "hub")
    monkeypatch.setattr(server, "RequestHandlerClass", type("Asks", (Asks,), {"hub": found}))
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(found.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    no_wait = SimpleNamespace(sleep=lambda _: None, time=lambda: 0.0)  # the client tries five times, seconds apart
    monkeypatch.setattr("huggingface_hub.file_download.time", no_wait)
    monkeypatch.setattr("huggingface_hub.utils._http.time", no_wait)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "disabled", True)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def snapshot(hub: Hub, repo: str, commit: str = NEW) -> Path:
    return hub.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / commit


def goodfire(tmp_path: Path) -> bytes:
    (tmp_path / "written").mkdir()
    return LOOKALIKES["goodfire"].write(tmp_path / "written").read_bytes()


# What is fetched


def test_folder_brings_its_weights_and_the_configs_that_belong_to_it(hub):
    hub.put(REPO, {
        f"{FOLDER}/params.npz": b"w" * 50, f"{FOLDER}/config.json": b"{}", f"{FOLDER}/README.md": b"text",
        f"{FOLDER}/deeper/params.npz": b"w" * 60, f"{FOLDER}/some_cfg.json": b"{ }", "config.json": b"[]",
        "README.md": b"text", "layer_12/width_16k/config.yaml": b"a: 1", "layer_12/config.yaml": b"b: 1",
        "layer_12/width_16k/average_l0_9/params.npz": b"w", "layer_13/width_16k/average_l0_82/params.npz": b"w",
    })  # fmt: skip

    place = resolve(f"hf://{REPO}/{FOLDER}")

    assert place.path == snapshot(hub, REPO) / FOLDER
    assert below(snapshot(hub, REPO)) == {
        f"{FOLDER}/params.npz", f"{FOLDER}/config.json", f"{FOLDER}/some_cfg.json", "config.json",
        "layer_12/width_16k/config.yaml", "layer_12/config.yaml",
    }  # fmt: skip
    assert place.origin == {"hub": REPO, "path": FOLDER, "revision": NEW}


def test_few_questions_are_asked_of_the_hub(hub):
    hub.put(REPO, {f"{FOLDER}/params.npz": b"weights", "config.json": b"{}"})

    resolve(f"hf://{REPO}/{FOLDER}")

    assert hub.asked == [
        f"GET /api/models/{REPO}/revision/main",
        f"POST /api/models/{REPO}/paths-info/{NEW}",
        f"GET /api/models/{REPO}/tree/{NEW}/{FOLDER}",
        f"HEAD /{REPO}/resolve/{NEW}/config.json",
        f"GET /{REPO}/resolve/{NEW}/config.json",
        f"HEAD /{REPO}/resolve/{NEW}/{FOLDER}/params.npz",
        f"GET /{REPO}/resolve/{NEW}/{FOLDER}/params.npz",
    ]


def test_file_brings_the_configs_next_to_it_and_no_other_layer(hub):
    hub.put("Qwen/SAE", {"layer0.sae.pt": b"0" * 9, "layer1.sae.pt": b"1" * 9, "config.json": b"{}"})
    hub.put(
        "someone/z", {"all/a.pt": b"a" * 30, "all/b.pt": b"b" * 30, "all/a_cfg.json": b"{}", "all/b_cfg.json": b"[]"}
    )

    qwen, nanda = resolve("hf://Qwen/SAE/layer1.sae.pt"), resolve("hf://someone/z/all/a.pt")

    assert qwen.path.read_bytes() == b"1" * 9
    assert below(snapshot(hub, "Qwen/SAE")) == {"layer1.sae.pt", "config.json"}
    assert nanda.path.read_bytes() == b"a" * 30
    assert below(snapshot(hub, "someone/z")) == {"all/a.pt", "all/a_cfg.json"}


def test_folder_may_be_called_like_a_file(hub):
    hub.put("jbloom/v5", {"v5_32k_layer_0.pt/cfg.json": b"{}", "v5_32k_layer_0.pt/sae_weights.safetensors": b"weights"})

    assert resolve("hf://jbloom/v5/v5_32k_layer_0.pt").path.is_dir()
    assert hub.got() == ["v5_32k_layer_0.pt/cfg.json", "v5_32k_layer_0.pt/sae_weights.safetensors"]


def test_only_the_checkpoints_that_llama_scope_reads_are_taken_from_below(hub):
    files = {
        "L0/hyperparams.json": b"{}",
        "L0/checkpoints/final.safetensors": b"final",
        "L0/checkpoints/9.safetensors": b"9",
    }
    hub.put("fnlp/a", files)
    hub.put("fnlp/b", files | {"L0/checkpoints/pruned.safetensors": b"pruned"})
    hub.put("fnlp/c", files | {"L0/sae_weights.safetensors": b"weights"})

    for repo in "abc":
        resolve(f"hf://fnlp/{repo}/L0")

    read = ["checkpoints/final.safetensors", "checkpoints/pruned.safetensors", "sae_weights.safetensors"]
    assert hub.got() == [f"L0/{name}" for weights in read for name in ("hyperparams.json", weights)]


def test_what_training_leaves_behind_is_not_fetched(hub):
    hub.put("me/mine", {"a/cfg.json": b"{}", "a/sae_weights.safetensors": b"weights", "a/trainer_state.pt": b"large",
                        "a/optimizer_0.pt": b"large", "a/activations_store_state.safetensors": b"large"})  # fmt: skip

    resolve("hf://me/mine/a")

    assert hub.got() == ["a/cfg.json", "a/sae_weights.safetensors"]


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_revision_is_that_of_the_files(hub, revision):
    hub.put("me/mine", {"a.pt": b"old"}, commit=OLD)
    hub.put("me/mine", {"a.pt": b"new"})

    place = resolve(f"hf://me/mine/a.pt@{revision}")

    assert place.path.read_bytes() == b"old"
    assert place.origin["revision"] == OLD
    assert resolve("hf://me/mine/a.pt").path.read_bytes() == b"new"


def test_folder_of_several_saes_is_refused_before_anything_is_fetched(hub):
    hub.put("me/mine", {f"a/layer_{layer}.safetensors": b"weights" for layer in range(3)})

    with pytest.raises(UnsupportedFormat, match=r"3 files of weights, .* layer_0\.safetensors, .*") as raised:
        resolve("hf://me/mine/a")

    assert "hf://me/mine/a/layer_0.safetensors" in raised.value.proceed
    assert hub.got() == []


def test_folder_of_folders_is_refused_with_what_is_in_it(hub):
    hub.put(REPO, {f"{FOLDER}/params.npz": b"weights", "config.json": b"{}"})

    with pytest.raises(UnsupportedFormat, match=r"no weights .*in it are average_l0_82"):
        resolve(f"hf://{REPO}/layer_12/width_16k")

    assert hub.got() == []


@pytest.mark.parametrize("name", sorted(set(LOOKALIKES) - CHOSEN_BY_SITE - SAME_FILES))
def test_what_is_fetched_is_all_that_the_family_needs(hub, tmp_path, name):
    like = LOOKALIKES[name]
    path = like.write(tmp_path)
    repo, top, inside = published(tmp_path, path)
    hub.put(repo, {inside + file: (top / file).read_bytes() for file in below(top)})
    place = inside + path.relative_to(top).as_posix()
    address = f"hf://{repo}/{place}" if path != top or inside else f"hf://{repo}/{next(top.glob('layer*')).name}"

    fetched = load_sae(address.removesuffix("/."), **like.options)

    local = load_sae(path, **like.options)
    assert (fetched.site, fetched.site_out, fetched.model) == (local.site, local.site_out, local.model)
    assert torch.equal(fetched.W_dec, local.W_dec)
    assert {key: found for key, found in fetched.manifest.items() if key != "origin"} == dict(local.manifest)


def published(root: Path, path: Path) -> tuple[str, Path, str]:
    """A repository for a look-alike, which of its folders is at the top, and below what: by name where that is read."""
    first = path.relative_to(root).parts[:1]
    named = re.fullmatch(r"(?:models--google--)?((?:gemma-scope|qwen3|SAE-Res)-[\w.-]+)", first[0]) if first else None
    if not named:
        return "me/mine", root, "sae/"
    top = root / first[0]
    return f"google/{named[1]}", top / "snapshots" / "f00" if (top / "snapshots").is_dir() else top, ""


# The second time


def test_what_is_there_is_not_fetched_again(hub):
    hub.put(REPO, {f"{FOLDER}/params.npz": b"weights", "config.json": b"{}"})
    first = resolve(f"hf://{REPO}/{FOLDER}")
    hub.asked.clear()

    assert resolve(f"hf://{REPO}/{FOLDER}") == first
    assert hub.got() == []
    assert len(hub.asked) == 3


@pytest.mark.parametrize(
    "address", [f"hf://{REPO}/{FOLDER}", f"hf://{REPO}/{FOLDER}/params.npz", f"hf://{REPO}/{FOLDER}@v1"]
)
def test_offline_the_cache_is_enough(hub, offline, address):
    hub.put(REPO, {f"{FOLDER}/params.npz": b"old"}, commit=OLD)
    hub.put(REPO, {f"{FOLDER}/params.npz": b"new"})
    first = resolve(address)
    hub.asked.clear()
    offline()

    assert resolve(address) == first
    assert hub.asked == []


def test_offline_says_what_the_cache_has(hub, offline):
    hub.put("me/mine", {"a/x.pt": b"old"}, commit=OLD)
    resolve("hf://me/mine/a@v1")
    offline()

    with pytest.raises(
        ModelUnavailable, match=rf"HF_HUB_OFFLINE is set .* does not have it at main, but at {OLD}\. Add @{OLD}"
    ):
        resolve("hf://me/mine/a")
    with pytest.raises(ModelUnavailable, match=r"does not have it\. Unset HF_HUB_OFFLINE once"):
        resolve("hf://me/mine/b")


def test_weights_come_last_so_that_an_interrupted_fetch_is_not_taken_for_a_whole_one(hub, offline):
    """SDXL's mean.pt and std.pt belong to its weights; without them the SAE would be another one."""
    hub.put(
        "me/mine", {"a/state_dict.pth": b"w" * 90, "a/mean.pt": b"m" * 9, "a/std.pt": b"s" * 8, "a/config.json": b"{}"}
    )

    resolve("hf://me/mine/a")

    assert hub.got() == ["a/config.json", "a/std.pt", "a/mean.pt", "a/state_dict.pth"]


# When the hub does not give it


def test_unknown_repository(hub):
    with pytest.raises(ModelUnavailable, match=r"SAE 'hf://no/one/a': the hub knows no repository no/one") as raised:
        resolve("hf://no/one/a")

    assert "HF_TOKEN" in raised.value.proceed
    assert "local folder" in raised.value.proceed


def test_unknown_revision(hub):
    hub.put("me/mine", {"a.pt": b"a"})

    with pytest.raises(ModelUnavailable, match="me/mine has no revision v9"):
        resolve("hf://me/mine/a.pt@v9")


def test_unknown_path(hub):
    hub.put("me/mine", {"a.pt": b"a"})

    with pytest.raises(
        ModelUnavailable, match=rf"me/mine has no file or folder b\.pt at commit {NEW}\. .*/me/mine/tree/"
    ):
        resolve("hf://me/mine/b.pt")


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("what", ["/api/", "/resolve/"])
def test_gated_repository(hub, status, what):
    """A gated repository lists its files to everyone and gives them to few; a closed one not even the list."""
    hub.put("me/mine", {"a.pt": b"a"})
    passing(hub, what, lambda asks: asks.refuse(status, "GatedRepo"))

    with pytest.raises(ModelUnavailable, match="only to accounts that accepted its terms") as raised:
        resolve("hf://me/mine/a.pt")

    assert f"{hub.url}/me/mine" in raised.value.proceed
    assert "HF_TOKEN" in raised.value.proceed


def passing(hub: Hub, what: str, fault: Fault) -> None:
    """Apply a fault to addresses that contain ``what``, and nothing to others."""
    hub.fault = lambda asks: (fault if what in asks.path else Asks.serve)(asks)


@pytest.mark.parametrize("what", ["/api/models/me/mine/revision", "paths-info", "/resolve/"])
def test_broken_hub(hub, what):
    hub.put("me/mine", {"a.pt": b"a"})
    passing(hub, what, lambda asks: asks.send(503, {}, b"<html>"))

    with pytest.raises(ModelUnavailable, match=r"the hub did not give it: HfHubHTTPError: .*503"):
        resolve("hf://me/mine/a.pt")


def test_something_else_answers_in_place_of_the_hub(hub):
    hub.fault = lambda asks: asks.send(200, {"Content-Type": "text/html"}, b"<html>log in first</html>")

    with pytest.raises(ModelUnavailable, match="the hub did not give it: JSONDecodeError"):
        resolve("hf://me/mine/a.pt")


def test_no_hub(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(ModelUnavailable, match="the hub did not give it: ConnectError") as raised:
        resolve("hf://me/mine/a.pt")

    assert "HF_HUB_OFFLINE=1" in raised.value.proceed


def test_hub_that_dies_in_the_middle_leaves_nothing_that_looks_whole(hub, offline):
    weights = b"w" * 1000
    hub.put("me/mine", {"a/x.pt": weights, "a/cfg.json": b"{}"})
    left = [3]

    def half(asks: Asks) -> None:
        left[0] -= asks.command == "GET"
        asks.file(NEW, weights[:500] if left[0] > 0 else b"", claims=len(weights))

    passing(hub, "/resolve/" + NEW + "/a/x.pt", half)

    with pytest.raises(ModelUnavailable, match="the hub did not give it: .*Error"):
        resolve("hf://me/mine/a")

    assert below(snapshot(hub, "me/mine")) == {"a/cfg.json"}
    offline()
    with pytest.raises(ModelUnavailable, match="does not have it"):
        resolve("hf://me/mine/a")


def test_fewer_bytes_than_announced_are_not_accepted(hub):
    hub.put("me/mine", {"a.pt": b"w" * 1000})

    def less(asks: Asks) -> None:
        whole = asks.command == "HEAD"
        asks.file(NEW, b"w" * (1000 if whole else 600))

    passing(hub, "/resolve/", less)

    with pytest.raises(ModelUnavailable, match="should be of size 1000 but has size 600"):
        resolve("hf://me/mine/a.pt")

    assert below(snapshot(hub, "me/mine")) == set()


def test_names_that_lead_out_of_the_folder_are_not_followed(hub):
    hub.put("me/mine", {"a/x.pt": b"weights", "config.json": b"{}"})
    bad = ["a/../../../../out.pt", "/out.pt", "a\\..\\out.pt", "a/deep/y.pt", "b/y.pt", "a/..\\y.pt"]
    evil = [{"type": "file", "path": name, "size": 1, "oid": "f" * 40} for name in bad]
    good = [{"type": "file", "path": "a/x.pt", "size": 7, "oid": "f" * 40}]
    passing(hub, "/tree/", lambda asks: asks.json(evil + good))

    resolve("hf://me/mine/a")

    assert hub.got() == ["config.json", "a/x.pt"]


def test_commit_that_is_none_is_not_used_as_a_folder(hub):
    hub.put("me/mine", {"a.pt": b"a"})
    passing(hub, "/revision/", lambda asks: asks.json({"_id": "1", "id": "me/mine", "sha": "../../out"}))

    with pytest.raises(ModelUnavailable, match="is no commit"):
        resolve("hf://me/mine/a.pt")


# Addresses


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("hf://", "/ is no owner/repo"),
        ("hf://owner", "owner/ is no owner/repo"),
        ("hf://owner/repo", "names a repository and nothing in it"),
        ("hf://owner/repo/", "names a repository and nothing in it"),
        ("hf://owner/repo@main", "repo"),
        ("hf:///repo/a", "/repo is no owner/repo"),
        ("hf://own er/repo/a", "own er/repo is no owner/repo"),
        ("hf://../repo/a", "../repo is no owner/repo"),
        ("hf://owner/../a", "owner/.. is no owner/repo"),
        ("hf://datasets/owner/repo/a", "only model repositories"),
        ("hf://owner/repo/../a", "no '.' or '..'"),
        ("hf://owner/repo/a/./b", "no '.' or '..'"),
        ("hf://owner/repo/a//b", "no empty part"),
        ("hf://owner/repo//a", "no empty part"),
        ("hf://owner/repo/a b", "no white space"),
        ("hf://owner/repo/a\n", "no white space"),
        ("hf://owner/repo/ ", "no white space"),
        ("hf://owner/repo/a\\..\\b", "no backslash"),
        ("hf://owner/repo/a@", "is no branch, tag or commit"),
        ("hf://owner/repo/a@../x", "is no branch, tag or commit"),
        ("hf://owner/repo/a@b//c", "is no branch, tag or commit"),
        ("hf://owner/repo@main/a", "names a repository and nothing in it"),
        ("hf:owner/repo/a", "not with hf://"),
    ],
)
def test_bad_address_is_refused_before_the_hub_is_asked(hub, address, found):
    with pytest.raises(UnsupportedFormat, match=re.escape(found)) as raised:
        resolve(address)

    assert "hf://owner/repo/path" in raised.value.proceed
    assert hub.asked == []


def test_path_object_cannot_be_an_address(hub):
    with pytest.raises(UnsupportedFormat, match="a Path merges the two slashes"):
        resolve(Path("hf://owner/repo/a"))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://o/r/a", Address("o/r", "a")),
        ("hf://o/r/a/b.c:v1/", Address("o/r", "a/b.c:v1")),
        ("hf://o/r.x-1/a@v1", Address("o/r.x-1", "a", "v1")),
        ("hf://o/r/a@b@refs/pr/3", Address("o/r", "a@b", "refs/pr/3")),
    ],
)
def test_address_is_read(text, address):
    assert parse(text) == address


def test_every_release_has_an_address_that_can_be_read():
    for release in releases.releases():
        for sae_id in releases.ids(release):
            found = releases.find(release, sae_id)
            if found.family not in places.REFUSED:
                assert parse(f"hf://{found.repo}/{found.path}") == Address(found.repo, found.path)


def test_nothing_there_names_every_way_to_say_it():
    with pytest.raises(
        UnsupportedFormat, match=r"no such file or folder\. .*smollm2.*hf://owner/repo/path, or \(release, id\)"
    ):
        resolve("no/such/thing")


# Releases


def test_release_loads_end_to_end(hub, tmp_path):
    hub.put(GOODFIRE, {FILE: goodfire(tmp_path), "README.md": b"text", "other.pth": b"large"})
    like, x = LOOKALIKES["goodfire"], inputs()

    sae = load_sae(RELEASE)

    assert torch.allclose(sae.encode(x), like.acts(x), atol=1e-4)
    assert sae.model == "meta-llama/Llama-3.1-8B-Instruct"
    assert str(sae.site) == "resid_post.19"
    assert sae.manifest["origin"] == {"hub": GOODFIRE, "path": FILE, "revision": NEW}
    assert hub.got() == [FILE]


def test_some_latents_of_a_fetched_file_are_those_of_the_whole(hub, tmp_path):
    hub.put(GOODFIRE, {FILE: goodfire(tmp_path)})
    whole, some = load_sae(f"hf://{GOODFIRE}/{FILE}"), (40, 3)

    part = load_sae(RELEASE, latents=some)

    assert torch.equal(part.W_dec, whole.W_dec[list(some)])
    assert open_sae(RELEASE).bytes_for(2) < open_sae(RELEASE).bytes_for(None) / 4


def test_release_gives_what_its_files_do_not_say(hub):
    hub.put("tommmcgrath/gpt2-small-mlp-out-saes", {
        "sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1/cfg.json": b"{}",
        "sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1/sae_weights.safetensors": b"weights",
    })  # fmt: skip

    place = resolve(("gpt2-small-mlp-tm", "blocks.0.hook_mlp_out"))

    assert place.model == "gpt2"
    assert place.input_scale == pytest.approx(1.0493173)
    assert place.overrides == {"center_writing_weights": True}


@pytest.mark.parametrize(
    ("release", "sae_id", "reason"),
    [
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_3", "cross-layer transcoder"),
        ("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", "depend on the tokens before"),
    ],
)
def test_release_that_no_loader_reads_is_refused_before_the_hub_is_asked(hub, release, sae_id, reason):
    with pytest.raises(UnsupportedFormat, match=reason):
        resolve((release, sae_id))

    assert hub.asked == []


def test_unknown_release_is_answered_without_the_hub(hub):
    with pytest.raises(UnsupportedFormat, match="Close to it: gpt2-small-res-jb"):
        load_sae(("gpt2-small-res-bj", "blocks.8.hook_resid_pre"))

    assert hub.asked == []


def test_fetched_file_that_is_no_sae_is_refused_as_any_file(hub):
    hub.put("me/mine", {"a/x.safetensors": b"\0" * 40})

    with pytest.raises(LoadError):
        load_sae("hf://me/mine/a")


def test_variables_of_the_client_are_obeyed(hub, tmp_path):
    """A fresh process, in which nothing is replaced: HF_ENDPOINT, HF_HOME, and then HF_HUB_OFFLINE."""
    hub.put(GOODFIRE, {FILE: goodfire(tmp_path)})
    code = (
        "import os, sys; from saeguard.loaders.places import resolve; fetched = resolve(tuple(sys.argv[1:]));"
        "os.environ['HF_HUB_OFFLINE'] = '1'; assert resolve(tuple(sys.argv[1:])) == fetched; print(fetched.path)"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    env = kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }

    run = subprocess.run([sys.executable, "-c", code, *RELEASE], env=env, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(tmp_path / "home" / "hub")
    assert hub.got() == [FILE]
