"""``saeguard eval unlearn``: the same questions asked plainly and under a policy, file by file and topic by topic.

What is done of a file is kept beside the JSON file, under a hash of all that it depends on, until all files are done; a
command that was interrupted goes on with the next file when it is given again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.console import check_target, out, progress
from saeguard.cli.judging import bars
from saeguard.cli.policy_files import HELP, named_policy

SCHEMA = 2
PolicyFile = Annotated[Path, typer.Option("--policy", parser=named_policy, metavar="POLICY", help=HELP)]
Questions = Annotated[
    list[str],
    typer.Option("--questions", help="JSON lines with question, choices, gold, topic (.jsonl, .jsonl.gz); repeatable."),
]
Topics = Annotated[list[str] | None, typer.Option("--topic", help="Only questions of this topic; repeatable.")]
Model = Annotated[str, typer.Option(help="The folder or name of the model, if not the one that the policy names.")]
Most = Annotated[int | None, typer.Option("--most", min=1, help="Questions of each topic of a file at most.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of what is drawn from the files.")]
JsonFile = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write all numbers there.")]


@dataclass(frozen=True)
class Settings:
    """What is asked, beside the policy and the files."""

    topics: tuple[str, ...]
    most: int | None
    seed: int
    generate: bool
    new_tokens: int

    def document(self) -> dict[str, Any]:
        """For the JSON file; the tokens of answers that are not written do not count."""
        return {
            "topics": list(self.topics), "most": self.most, "seed": self.seed, "generate": self.generate,
            "new_tokens": self.new_tokens if self.generate else None,
        }  # fmt: skip


def unlearn(
    policy: PolicyFile,
    questions: Questions,
    topic: Topics = None,
    model: Model = "",
    most: Most = None,
    generate: Annotated[bool, typer.Option("--generate/--no-generate", help="Also let answers be written.")] = True,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens of a written answer.")] = 64,
    seed: Seed = 0,
    target: JsonFile = None,
    page: Annotated[Path | None, typer.Option(dir_okay=False, help="Also draw an HTML page there.")] = None,
) -> None:
    """Ask questions plainly and under a policy: accuracy by log-likelihood and in writing, and what triggered.

    It needs the policy, the model and the SAEs that it names, and the question files. With --json an interrupted
    command goes on where it was when it is given again. Exit status 1 when a row in which nothing triggered is not the
    plain model's to the last bit.
    """
    from saeguard.cli.evaluated import unlearning_table
    from saeguard.cli.guarded import deploy
    from saeguard.cli.training import expand

    check_target(target, "--json")
    check_target(page, "--page")
    settings = Settings(tuple(topic or ()), most, seed, generate, new_tokens)
    read = {path: _read(path, settings) for path in expand(questions)}
    with progress("loading") as tick:
        deployment = deploy(policy, model, tick)
    about = {"saeguard": "eval unlearn", "schema": SCHEMA, "version": _version(), **deployment.about(),
             "settings": settings.document()}  # fmt: skip
    files = []
    with bars(shown=True) as tell:
        for path, asked in read.items():
            kept = _Kept.of(target, about, path)
            found = kept.read()
            if found is None:
                found = kept.write(_measure(deployment, path, asked, settings, tell))
            files.append(found)
    document = about | {"files": files}
    if target is not None:
        write_document(target, document)
        shutil.rmtree(_folder(target), ignore_errors=True)
    if page is not None:
        from saeguard.drawing.unlearning_page import write_unlearning_page

        write_unlearning_page(document, page)
    out().print(unlearning_table(document))
    if differs := list(not_identical(document)):
        out().print("NOT the plain model's bits where nothing triggered: " + "; ".join(differs), markup=False)
        raise typer.Exit(1)


def write_document(path: Path, document: dict[str, Any]) -> None:
    """JSON in place of what was there, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def not_identical(document: dict[str, Any]) -> Iterator[str]:
    """Where something that nothing stepped into is not the plain model's."""
    for file in document["files"]:
        for part in file["topics"]:
            for what, (same, of) in part["identical"].items():
                if same != of:
                    yield f"{file['file']} {part['topic']}: {what} {same} of {of}"


def _read(path: Path, settings: Settings) -> list[Any]:
    from saeguard.evaluating.multiple_choice import read_questions

    return read_questions(path, topics=settings.topics, most=settings.most, seed=settings.seed)


def _measure(deployment: Any, path: Path, asked: Sequence[Any], settings: Settings, tell: Any) -> dict[str, Any]:
    """One file: first the plain model, without any hook on it, then the guarded one."""
    from saeguard.evaluating.answers_by_writing import FORMS
    from saeguard.evaluating.subject import Plain
    from saeguard.evaluating.unlearning import ask, figures

    options: dict[str, Any] = {"forms": FORMS if settings.generate else (), "new_tokens": settings.new_tokens}
    told = lambda side: lambda stage, done, total: tell(f"{path.name}: {side}, {stage}", done, total)
    plain = ask(Plain(deployment.model, deployment.tokenizer), asked, progress=told("plain"), **options)
    with deployment.guarded() as (_, subject):
        guarded = ask(subject, asked, progress=told("guarded"), **options)
    return {"file": path.name, "sha256": _sha256(path), "topics": figures(plain, guarded)}


@dataclass(frozen=True)
class _Kept:
    """The result of one file, kept until all are done; nowhere without a JSON file to keep it beside."""

    path: Path | None

    @classmethod
    def of(cls, target: Path | None, about: dict[str, Any], file: Path) -> "_Kept":
        text = json.dumps([about, file.name, _sha256(file)], sort_keys=True)
        name = f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        return cls(None if target is None else _folder(target) / name)

    def read(self) -> dict[str, Any] | None:
        """What was measured before. Raises `BrokenFile` for what is no JSON."""
        if self.path is None or not self.path.is_file():
            return None
        from saeguard.errors import BrokenFile

        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BrokenFile(
                f"the unfinished evaluation in {self.path}", f"it is not JSON ({error})", "Delete it, and begin anew."
            ) from error

    def write(self, found: dict[str, Any]) -> dict[str, Any]:
        if self.path is not None:
            self.path.parent.mkdir(exist_ok=True)
            write_document(self.path, found)
        return found


def _folder(target: Path) -> Path:
    return target.with_name(f"{target.name}.unfinished")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _version() -> str:
    try:
        return version("saeguard")
    except PackageNotFoundError:
        return "not installed as a package"
