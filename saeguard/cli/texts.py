"""Files that commands are given as text: their documents, token rows of them, and questions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

CONTEXT = 256


def documents_of(patterns: Sequence[str], tokenizer: Any) -> dict[str, list[str]]:
    """The documents of every file behind paths and patterns, by path. Raises `TrainError`."""
    from saeguard.cli.training import expand
    from saeguard.training.corpus import documents

    return {str(path): [text for text in documents(path, tokenizer) if text.strip()] for path in expand([*patterns])}


def named_files(given: Sequence[str]) -> dict[str, list[str]]:
    """``NAME=FILE``, repeatable per name; a file without a name is the text called ``text``."""
    found: dict[str, list[str]] = {}
    for entry in given:
        name, equals, file = entry.partition("=")
        name, file = (name, file) if equals and name.isidentifier() else ("text", entry)
        if not file:
            raise typer.BadParameter(f"--text {entry}: write NAME=FILE, such as forget=biology.jsonl")
        found.setdefault(name, []).append(file)
    return found


def merged(*given: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The files of each name, in the order in which they were given."""
    names = dict.fromkeys(name for files in given for name in files)
    return {name: [file for files in given for file in files.get(name, ())] for name in names}


def token_rows(
    files: Mapping[str, Sequence[str]], tokenizer: Any, sae: Any, *, n_tokens: int, seed: int
) -> dict[str, Any]:
    """Per name the `Texts` of its files, one document per document, as `within` chooses them."""
    from saeguard.scoring.texts import Texts

    found = {}
    for name, patterns in files.items():
        kept = within(documents_of(patterns, tokenizer), tokenizer, n_tokens=n_tokens, seed=seed)
        found[name] = Texts.from_text(kept, tokenizer, sae, context=CONTEXT, name=name)
    return found


def within(files: Mapping[str, Sequence[str]], tokenizer: Any, *, n_tokens: int, seed: int) -> list[str]:
    """Documents of several files that have at most ``n_tokens`` tokens in all, in the order in which they stand there.

    All of them where that is little enough; else an even share of each file, drawn by ``seed``, the last document of a
    share cut. Files of equally many documents keep the same ones, so that what belongs together stays together.
    """
    import numpy as np

    sizes = {name: [len(ids) for ids in _ids(texts, tokenizer)] for name, texts in files.items()}
    if sum(map(sum, sizes.values())) <= n_tokens:
        return [text for texts in files.values() for text in texts]
    rng, kept = np.random.default_rng(seed), []
    for name, texts in files.items():
        left, chosen = n_tokens // len(files), {}
        for number in rng.permutation(len(texts)).tolist():
            text, size = texts[number], sizes[name][number]
            chosen[number] = text if size <= left else text[: len(text) * left // size]
            left -= size
            if left <= 0:
                break
        kept += [chosen[number] for number in sorted(chosen)]
    return kept


def _ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def read_questions(patterns: Sequence[str], tokenizer: Any, sae: Any, *, most: int, seed: int) -> Any:
    """Questions with ``question``, ``choices`` and ``gold`` (0-based) per JSON line, as ``Question: ... Answer:``.

    At most ``most`` are drawn by ``seed``. Those whose wrong choices begin with the token of the right one are left
    out, because the next token cannot tell them apart; their number is part of the name. Raises `ScoreMismatch`.
    """
    import numpy as np

    from saeguard.errors import ScoreMismatch
    from saeguard.scoring.losses import Questions

    rows = [row for pattern in patterns for row in _rows(pattern)]
    order = np.random.default_rng(seed).permutation(len(rows))
    prompts, choices, gold, passed = [], [], [], 0
    for number in order:
        row = rows[number]
        several = [f" {choice}" for choice in row["choices"]]
        firsts = [tuple(tokenizer(choice, add_special_tokens=False)["input_ids"][:1]) for choice in several]
        if firsts.count(firsts[row["gold"]]) > 1:
            passed += 1
            continue
        prompts.append(f"Question: {row['question']}\nAnswer:")
        choices.append(several)
        gold.append(row["gold"])
        if len(prompts) == most:
            break
    if not prompts:
        raise ScoreMismatch(
            f"questions in {', '.join(patterns)}", f"none of {len(rows)} has choices that begin differently",
            "Give rows with question, choices and gold.",
        )  # fmt: skip
    name = f"questions, {passed} left out whose choices begin alike" if passed else "questions"
    return Questions.from_text(prompts, choices, gold, tokenizer, sae, name=name)


def _rows(pattern: str) -> list[dict[str, Any]]:
    import gzip

    from saeguard.cli.training import expand
    from saeguard.errors import TrainError

    found: list[dict[str, Any]] = []
    for path in expand([pattern]):
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines if line.strip()]
            for row in rows:
                _check_row(row)
            found += rows
        except (ValueError, TypeError, OSError, EOFError) as error:
            raise TrainError(
                f"questions from {path}", f"a row could not be read ({error})",
                "Give JSON lines with question, choices and gold.",
            ) from error  # fmt: skip
    return found


def _check_row(row: Any) -> None:
    if not isinstance(row, dict):
        raise TypeError("a row is no JSON object")
    missing = [key for key in ("question", "choices", "gold") if key not in row]
    if missing:
        raise ValueError(f"a row has no {' and no '.join(missing)}")
    question, choices, gold = row["question"], row["choices"], row["gold"]
    if not isinstance(question, str) or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise TypeError("question is a text, and choices a list of texts")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"gold is {gold!r}, and choices are counted from 0 to {len(choices) - 1}")


def names_of(files: Sequence[str | Path]) -> list[str]:
    """File names without their folders."""
    return [Path(file).name for file in files]
