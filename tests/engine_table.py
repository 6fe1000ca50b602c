"""The table of engines and features that README.md shows, made by trying every feature on every engine.

    python tests/engine_table.py            print it
    python tests/engine_table.py --write    put it between the two markers of README.md

All engines hold the weights of one tiny Llama. A feature is tried on each engine and on the transformers engine; "yes"
means that the same positions were edited and that the logits, or the tokens written, are the same to 1e-5. What an
engine refuses is there by the name of its error, "-" is what its framework does not have. Columns of frameworks that
are not installed beside the others are taken from README.md as they stand: HookedTransformer has an environment of its
own, whose tests look at its column.
"""

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from saeguard import At, AtLeast, Clamp, Plan, Rule, SiteMap, Splice, capture, steer  # noqa: E402
from saeguard.errors import SaeguardError  # noqa: E402
from saeguard.gates import Hits, Latched, Rate, Watch  # noqa: E402
from saeguard.guarding.guardrail import Guardrail  # noqa: E402
from saeguard.guarding.policy import Policy  # noqa: E402
from saeguard.sites import STREAMS, Site  # noqa: E402
from saeguard.vectors import vectors  # noqa: E402
from tests import laws, tiny  # noqa: E402
from tests.more_models import HIDDEN, shared  # noqa: E402

README = ROOT / "README.md"
BEGIN = "<!-- engines: written by tests/engine_table.py -->"
END = "<!-- end of engines -->"
YES, ABSENT = "yes", "-"
NEW = 5
SAES = [tiny.tiny_sae(activation=kind, name=kind, seed=i) for i, kind in enumerate(("relu", "jumprelu", "topk"))]
SAES.append(tiny.tiny_sae(name="attention", seed=7, site=Site("attn_out", 0)))
PUSH = Plan((Rule("relu", (1, 2, 3), AtLeast(4.0)),))
OTHER = Plan((Rule("topk", (5, 6), Clamp(3.0, when="always")),))
IDS = tiny.prompt(3, 7)
DRAFTED = IDS[:1, [0, 1, 2, 3, 1, 2]]  # a prompt that repeats itself


class NotThere(Exception):
    """The framework has no such thing."""


@dataclass(frozen=True)
class Way:
    """One engine: its model, and how its users call and generate with it. ``options`` go to `steer` and `capture`."""

    name: str
    model: Callable[[], Any]
    call: Callable[..., Tensor]
    generate: Callable[..., Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    inside: Callable[[Any], Tensor] | None = None
    """The logits of `IDS` under `PUSH`, edited by the framework's own code instead of by `steer`."""


def plain_call(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    told = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    found = model(input_ids=ids, attention_mask=mask, use_cache=False, **told)
    return getattr(found, "logits", found)


def plain_generate(model: Any, ids: Tensor, **how: Any) -> Tensor:
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **how)


def transformers_way() -> Way:
    return Way("transformers", lambda: shared("llama"), plain_call, plain_generate)


def bridge_way() -> Way:
    from saeguard.hooks import plan_as_hooks
    from tests.test_engine_lens import bridge

    def generate(model: Any, ids: Tensor, **how: Any) -> Tensor:
        if "use_cache" in how:
            return model.generate(ids, max_new_tokens=NEW, do_sample=False, verbose=False,
                                  use_past_kv_cache=how["use_cache"])  # fmt: skip
        return model.hf_generate(ids, max_new_tokens=NEW, do_sample=False, **how)

    def hooked(model: Any) -> Tensor:
        return model.run_with_hooks(IDS, fwd_hooks=plan_as_hooks(PUSH, model, SAES), use_cache=False)

    return Way("TransformerLens 4.3 bridge", lambda: bridge("llama"), bridge_call, generate, inside=hooked)


def bridge_call(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=mask, use_cache=False)


def nnsight_way() -> Way:
    from saeguard.traces import plan_in_trace
    from tests import test_engine_nnsight as tests

    def call(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        with model.trace(ids, **tests.options(mask)):
            out = model.output.logits.save()
        return out  # noqa: RET504  there is no return in the code of a trace

    def generate(model: Any, ids: Tensor, **how: Any) -> Tensor:
        with model.generate(ids, max_new_tokens=NEW, do_sample=False, **how) as tracer:
            out = tracer.result.save()
        return out  # noqa: RET504

    def traced(model: Any) -> Tensor:
        edits = plan_in_trace(PUSH, model, SAES)
        with model.trace(IDS, use_cache=False):
            edits()
            out = model.output.logits.save()
        return out  # noqa: RET504

    return Way("nnsight 0.8", lambda: tests.model("llama"), call, generate, inside=traced)


class Text(torch.nn.Module):
    """A module around a Llama that says nothing of caches: tokens in, logits out, and a loop of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = shared("llama")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **how: Any) -> Tensor:
        return plain_call(self.llama, input_ids, attention_mask)

    def generate(self, ids: Tensor) -> Tensor:
        for _ in range(NEW):
            ids = torch.cat([ids, self(ids)[:, -1].argmax(-1, keepdim=True)], 1)
        return ids


def module_way() -> Way:
    blocks = "llama.model.layers.{}"
    sites = SiteMap(
        {
            "resid_pre": At(blocks, "input"), "resid_post": blocks, "attn_out": f"{blocks}.self_attn",
            "mlp_out": f"{blocks}.mlp", "mlp_in": At(f"{blocks}.mlp", "input"),
            "mlp_post": At(f"{blocks}.mlp.down_proj", "input", width=HIDDEN),
            "attn_z": At(f"{blocks}.self_attn.o_proj", "input"),
        },
        tokens="input_ids", mask="attention_mask", width=tiny.D,
    )  # fmt: skip

    def generate(model: Any, ids: Tensor, **how: Any) -> Tensor:
        if how != {"use_cache": False}:
            raise NotThere
        return model.generate(ids)

    special = (tiny.BOS, tiny.EOS, tiny.PAD)
    return Way("any nn.Module", Text, plain_call, generate, {"layout": sites, "special_ids": special})


def hooked_way() -> Way:
    from tests.saelens.hooked_models import hooked

    def generate(model: Any, ids: Tensor, **how: Any) -> Tensor:
        if set(how) - {"use_cache"}:
            raise NotThere
        return model.generate(ids, max_new_tokens=NEW, do_sample=False, verbose=False, prepend_bos=False,
                              use_past_kv_cache=how.get("use_cache", True))  # fmt: skip

    return Way("TransformerLens 3.9 HookedTransformer", lambda: hooked("llama"), hooked_call, generate)


def hooked_call(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=mask)


WAYS: dict[str, Callable[[], Way]] = {
    "transformers": transformers_way, "TransformerLens 4.3 bridge": bridge_way, "nnsight 0.8": nnsight_way,
    "any nn.Module": module_way, "TransformerLens 3.9 HookedTransformer": hooked_way,
}  # fmt: skip


@dataclass(frozen=True)
class Done:
    """What came out of a feature: numbers to be close, and sets to be equal."""

    numbers: Tensor
    sets: Any = None

    def is_like(self, other: "Done") -> bool:
        """Whether two engines did the same."""
        a, b = self.numbers, other.numbers
        if a.shape != b.shape or self.sets != other.sets:
            return False
        return laws.distance(a, b) <= laws.TOLERANCE if a.is_floating_point() else torch.equal(a, b)


def edits(run: Any) -> list[list[set[int]]]:
    """Per rule and row, the positions that were edited in any of its calls."""
    return [[set().union(*rows) for rows in zip(*calls, strict=True)] for calls in laws.edited(run).values()]


def passes(way: Way, plans: Any, mask: Tensor | None = None) -> Done:
    model = way.model()
    with torch.no_grad():
        plain = way.call(model, IDS, mask)
        with steer(model, plans, saes=SAES, **way.options) as run:
            found = way.call(model, IDS, mask)
    if isinstance(plans, list) and not all(
        laws.same_bits(found[row], plain[row]) for row, plan in enumerate(plans) if plan is None
    ):
        raise AssertionError(f"{way.name} changed a row without a plan")
    return Done(found if mask is None else found * mask[..., None], edits(run))


def writes(way: Way, plan: Any, ids: Tensor = IDS, **how: Any) -> Done:
    model, width = way.model(), ids.shape[1]
    told = {"prompt_tokens": width} if way.name == "any nn.Module" else {}
    with torch.no_grad(), steer(model, plan, saes=SAES, **way.options, **told) as run:
        found = way.generate(model, ids, **how)
    return Done(found, edits(run))


def padded(way: Way, *, left: bool) -> Done:
    mask = (torch.arange(IDS.shape[1]) < torch.tensor([[7], [3], [5]])).long()
    return passes(way, [PUSH, OTHER, None], mask.flip(1) if left else mask)


def streams(way: Way) -> Done:
    """The streams at which an edit does what it does on transformers; those that are refused are left out."""
    done, width = [], {"attn_z": tiny.D, "mlp_post": HIDDEN}
    for stream in STREAMS:
        sae = tiny.tiny_sae(activation="relu", name="one", site=Site(stream, 1), d_in=width.get(stream, tiny.D))
        plan, model = Plan((Rule("one", (1, 7, 20), Clamp(3.0, when="always")),)), way.model()
        try:
            with torch.no_grad(), steer(model, plan, saes=sae, **way.options):
                done.append(way.call(model, IDS))
        except SaeguardError:
            done.append(torch.zeros(*IDS.shape, tiny.VOCAB))
    return Done(torch.stack(done))


def captured(way: Way) -> Done:
    model, where = way.model(), {key: way.options[key] for key in way.options if key == "layout"}
    recording = capture(model, Site("resid_post", 1), **where)
    with torch.no_grad(), steer(model, PUSH, saes=SAES, **way.options), recording as tape:
        way.call(model, IDS)
    return Done(tape["resid_post.1"])


def framework_code(way: Way) -> Done:
    if way.inside is None:
        if way.name == "transformers":
            with torch.no_grad(), steer(way.model(), PUSH, saes=SAES):
                return Done(way.call(way.model(), IDS))
        raise NotThere
    with torch.no_grad():
        return Done(way.inside(way.model()))


def gradients(way: Way) -> Done:
    """The gradient of what the last logits come to with respect to the embedding, which lies before the edits."""
    model = way.model()
    weight = next(p for p in model.parameters() if p.shape == (tiny.VOCAB, tiny.D))
    needed = weight.requires_grad
    weight.requires_grad_(True)
    try:
        with torch.enable_grad(), steer(model, PUSH, saes=SAES, **way.options):
            logits = way.call(model, IDS)
            (found,) = torch.autograd.grad(logits[:, -1].logsumexp(-1).sum(), weight)
    finally:
        weight.requires_grad_(needed)
    return Done(found)


def nested(way: Way) -> Done:
    model = way.model()
    with torch.no_grad(), steer(model, PUSH, saes=SAES, **way.options), steer(model, OTHER, saes=SAES, **way.options):
        return Done(way.call(model, IDS))


def threaded(way: Way) -> Done:
    model, out = way.model(), []
    with torch.no_grad(), steer(model, PUSH, saes=SAES, **way.options) as run:
        bound = run.bind(lambda: out.append(way.call(model, IDS)))
        thread = threading.Thread(target=bound)
        thread.start()
        thread.join()
    return Done(out[0].detach())


def guarded(way: Way) -> Done:
    """A policy that edits, on a model of its own."""
    from tests.modes import word_tokenizer

    tokenizer, model = word_tokenizer(), way.model()
    policy = Policy.of(model, tokenizer, SAES[0], PUSH, name="edits")
    guard = Guardrail.attach(model, policy, tokenizer=tokenizer, saes=SAES)
    try:
        return Done(guard.generate(IDS, max_new_tokens=NEW, do_sample=False).sequences)
    finally:
        guard.detach()


def vector(way: Way) -> Done:
    made = vectors({Site("resid_post", 1): torch.linspace(-1, 1, tiny.D)}, name="line")
    model = way.model()
    with torch.no_grad(), steer(model, made.plan(2.0), saes=made.saes, **way.options):
        return Done(way.call(model, IDS))


def compiled(way: Way) -> Done:
    model = way.model()
    if not isinstance(model, torch.nn.Module):
        raise NotThere
    torch._dynamo.reset()
    try:
        with torch.no_grad(), steer(model, PUSH, saes=SAES, **way.options):
            fast = torch.compile(model, backend="eager")
            return Done(way.call(fast, IDS))
    finally:
        torch._dynamo.reset()


GATED = Plan((Rule("relu", (1, 2, 3), AtLeast(4.0), gate=Latched(Watch(Hits((4, 9)), Rate(), 0.2))),))
LATE = Plan((Rule("relu", (1, 2), AtLeast(4.0), phase="generated"), Rule("topk", (5,), Clamp(2.0, when="always"),
             phase="prompt")))  # fmt: skip
DENSE = Plan((Rule("jumprelu", (), Splice(error="dropped")),))
SEVERAL = Plan((Rule("relu", (1, 2), AtLeast(4.0)), Rule("attention", (3, 4), Clamp(2.0, when="always"))))

FEATURES: dict[str, Callable[[Way], Done]] = {
    "one pass, a plan per row": lambda way: passes(way, [PUSH, None, OTHER]),
    "rows padded on the left": lambda way: padded(way, left=True),
    "rows padded on the right": lambda way: padded(way, left=False),
    "generate, with a cache": lambda way: writes(way, PUSH),
    "generate, without a cache": lambda way: writes(way, PUSH, use_cache=False),
    "generate, beams": lambda way: writes(way, PUSH, num_beams=3),
    "generate, drafts": lambda way: writes(way, PUSH, DRAFTED, prompt_lookup_num_tokens=2),
    "phases: prompt, generated": lambda way: writes(way, LATE, use_cache=False),
    "gates with a memory": lambda way: passes(way, GATED),
    "several sites and SAEs": lambda way: passes(way, SEVERAL),
    "dense ops": lambda way: passes(way, DENSE),
    "vectors without an SAE": vector,
    "all nine streams": streams,
    "capture": captured,
    "nested blocks": nested,
    "another thread, bound": threaded,
    "gradients": gradients,
    "`torch.compile` inside the block": compiled,
    "a plan in the framework's own code": framework_code,
    "`Guardrail`": guarded,
}


def cell(name: str, feature: str) -> str:
    """What one engine makes of one feature."""
    try:
        found = FEATURES[feature](WAYS[name]())
    except SaeguardError as refusal:
        return f"refused: `{type(refusal).__name__}`"
    except NotThere:
        return ABSENT
    expected = FEATURES[feature](transformers_way())
    if feature == "all nine streams":
        same = [Done(a).is_like(Done(b)) for a, b in zip(found.numbers, expected.numbers, strict=True)]
        refused = [not a.any() for a in found.numbers]
        if not all(one or other for one, other in zip(same, refused, strict=True)):
            raise AssertionError(f"{name} has streams that are not those of transformers")
        return YES if all(same) else f"{sum(same)} of {len(same)}"
    if not found.is_like(expected):
        raise AssertionError(f"{feature} on {name} is not what it is on transformers")
    return YES


def column(name: str) -> list[str]:
    """What one engine makes of all features."""
    return [cell(name, feature) for feature in FEATURES]


def shown(readme: str) -> dict[str, list[str]]:
    """The columns of the table in ``readme``."""
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in block(readme).splitlines()]
    return {name: [row[i] for row in rows[2:]] for i, name in enumerate(rows[0] if rows else []) if i}


def render(columns: Mapping[str, list[str]]) -> str:
    """The table."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [
        f"| {feature} | " + " | ".join(columns[name][i] for name in columns) + " |"
        for i, feature in enumerate(FEATURES)
    ]
    return "\n".join(lines)


def block(readme: str) -> str:
    """What stands between the markers of ``readme``."""
    _, begin, rest = readme.partition(BEGIN)
    inside, end, _ = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs a line {BEGIN!r} and, below it, a line {END!r}")
    return inside.strip()


def main(arguments: list[str]) -> None:
    readme = README.read_text(encoding="utf-8")
    before, columns = shown(readme), {}
    for name in WAYS:
        try:
            columns[name] = column(name)
        except ImportError:
            known = before.get(name, [])
            columns[name] = known if len(known) == len(FEATURES) else ["?"] * len(FEATURES)
    new = render(columns)
    if arguments == ["--write"]:
        head, _, rest = readme.partition(BEGIN)
        README.write_text(f"{head}{BEGIN}\n{new}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    else:
        sys.stdout.write(new + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
