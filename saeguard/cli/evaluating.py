"""``saeguard eval``: what a guardrail's policy takes away, what it costs, and what gets past it, in numbers."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli import attacking, sequences, unlearning
from saeguard.cli.console import check_target, out, progress
from saeguard.cli.judging import bars
from saeguard.cli.measured import begin, finish, tokens_of
from saeguard.cli.unlearning import JsonFile, Model, Most, PolicyFile, Questions, Seed, Topics

app = typer.Typer(
    no_args_is_help=True, help="Measure a guardrail's policy on questions and texts.", pretty_exceptions_enable=False
)
app.command("unlearn")(unlearning.unlearn)
app.command("sequence")(sequences.sequence)
app.command("recover")(attacking.recover)
app.command("relearn")(attacking.relearn)
app.command("page")(sequences.page)
BENIGN_TOKENS = 400


@app.command("dilution")
def dilution(
    policy: PolicyFile,
    questions: Questions,
    benign: Annotated[list[str], typer.Option("--benign", help="Text that surrounds them; repeatable.")],
    topic: Topics = None,
    length: Annotated[list[int] | None, typer.Option(min=1, help="Benign tokens; repeatable. 50 to 1,600.")] = None,
    model: Model = "",
    most: Most = 8,
    seed: Seed = 0,
    target: JsonFile = None,
) -> None:
    """Count decisions that flip when benign text stands before, after or around a question.

    Every row goes through alone, padded on the left and on the right, cut into passes, and with other rows beside it.
    Exit status 1 where a decision flips or two of these forms disagree.
    """
    from saeguard.cli.evaluated import dilution_table
    from saeguard.evaluating import dilution as diluting
    from saeguard.evaluating.prompts import Frame, token_ids

    deployment, asked = begin(policy, model, questions, topic, most, seed, target)
    tokenizer = deployment.tokenizer
    lengths = sorted(set(length or diluting.LENGTHS))
    text = tokens_of(benign, tokenizer, max(lengths), seed)
    rows = [token_ids(tokenizer, one.question) for one in asked]
    with bars(shown=True) as tell, deployment.guarded() as (_, guarded):
        found = diluting.dilution(
            diluting.decider(guarded), rows, text, Frame.of(tokenizer), lengths=lengths,
            progress=lambda done, total: tell("dilution", done, total),
        )  # fmt: skip
    odd = found.disagreeing_alone + sum(point.disagreeing for point in found.points)
    settings = {"topics": topic or [], "most": most, "seed": seed}
    finish(target, "dilution", deployment, settings, asdict(found) | {"flips": found.flips, "disagreeing": odd})
    out().print(dilution_table(found))
    if found.flips or odd:
        raise typer.Exit(1)


@app.command("transforms")
def transforms(
    policy: PolicyFile,
    questions: Questions,
    topic: Topics = None,
    transform: Annotated[list[str] | None, typer.Option(help="One of them by name; repeatable. All of them.")] = None,
    model: Model = "",
    most: Most = 50,
    seed: Seed = 0,
    target: JsonFile = None,
) -> None:
    """Ask the same questions in another dress: capitals, leet, base64, role play, turns, typos and more.

    Shows how many still trigger, and how many are still answered, by log-likelihood, plainly and under the policy.
    """
    from saeguard.cli.evaluated import transform_table
    from saeguard.evaluating.transformed import transformed
    from saeguard.evaluating.transforms import TRANSFORMS

    names = tuple(transform or TRANSFORMS)
    if unknown := sorted(set(names) - set(TRANSFORMS)):
        raise typer.BadParameter(f"--transform {unknown[0]}: there are {', '.join(TRANSFORMS)}")
    deployment, asked = begin(policy, model, questions, topic, most, seed, target)
    with bars(shown=True) as tell, deployment.guarded() as (plain, guarded):
        found = transformed(
            plain, guarded, asked, names, seed=seed, progress=lambda done, total: tell("transforms", done, total)
        )
    rows = [_with_shares(one) for one in found]
    settings = {"topics": topic or [], "most": most, "seed": seed}
    finish(target, "transforms", deployment, settings, {"n": len(asked), "transforms": rows})
    out().print(transform_table(found))


@app.command("benign")
def benign(
    policy: PolicyFile,
    text: Annotated[list[str], typer.Option("--text", help="A text file or a quoted pattern; repeatable.")],
    model: Model = "",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each file at most.")] = 20_000,
    row_tokens: Annotated[int, typer.Option("--row-tokens", min=2, help="Tokens per row.")] = BENIGN_TOKENS,
    seed: Seed = 0,
    target: JsonFile = None,
) -> None:
    """Measure what the policy does to text that it has nothing to do with: rows that trigger, KL and perplexity.

    Exit status 1 where a row in which no gate opened differs from the plain model's in any bit.
    """
    from saeguard.cli.evaluated import benign_table
    from saeguard.cli.guarded import deploy
    from saeguard.cli.texts import documents_of, within
    from saeguard.evaluating.benign import benign as measure
    from saeguard.evaluating.prompts import bare_ids

    check_target(target, "--json")
    with progress("loading") as tick:
        deployment = deploy(policy, model, tick)
    files, found = documents_of(text, deployment.tokenizer), []
    with bars(shown=True) as tell, deployment.guarded() as (plain, guarded):
        for path, documents in files.items():
            kept = within({path: documents}, deployment.tokenizer, n_tokens=tokens, seed=seed)
            cut = [_cut(bare_ids(deployment.tokenizer, one), row_tokens) for one in kept]
            found.append(measure(
                plain, guarded, Path(path).name, [row for rows in cut for row in rows],
                progress=lambda done, total, name=Path(path).name: tell(name, done, total),
            ))  # fmt: skip
    settings = {"tokens": tokens, "row_tokens": row_tokens, "seed": seed}
    rows = [_with_shares(one) | {"per_1600_tokens": one.per_tokens} for one in found]
    finish(target, "benign", deployment, settings, {"texts": rows})
    out().print(benign_table(found))
    if any(one.changed_untriggered for one in found):
        raise typer.Exit(1)


def _cut(ids: Sequence[int], width: int) -> list[list[int]]:
    return [list(ids[low : low + width]) for low in range(0, len(ids), width)]


def _with_shares(found: Any) -> dict[str, Any]:
    """A record with its counts as shares and their intervals."""
    from saeguard.evaluating.multiple_choice import Accuracy
    from saeguard.evaluating.unlearning import share

    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    return {
        name: share(value.right, value.n) if isinstance(value, Accuracy) else value for name, value in values.items()
    }
