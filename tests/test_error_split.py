"""The error is split where it was planted: linear parts are found exactly, even ones not, and x for x costs nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from saeguard import SAE, Plan, Rule, Scale, Site, steer
from saeguard.cli import app
from saeguard.drawing.error_picture import write_error_picture
from saeguard.errors import (
    MissingExtra,
    ModelBusy,
    NotSliceable,
    ScoreMismatch,
    SiteNotFound,
    UnstableEdit,
    UnsupportedFormat,
    UnsupportedMode,
    WidthMismatch,
    WrongModel,
)
from saeguard.evaluating import passes as passes_module
from saeguard.evaluating.error_split import split_error
from saeguard.evaluating.moments import Normal, Spread
from saeguard.evaluating.passes import Passes, Text, code, cross_entropies, n_predicted
from saeguard.evaluating.pursuit import gradient_pursuit, pursuit_curve, rounds_of_pursuit
from saeguard.loaders.native import save_sae
from saeguard.training.corpus import Chunks
from saeguard.training.evaluate import evaluate_sae
from tests import words
from tests.tiny import BOS, LAYERS, PAD, VOCAB, D, fresh_model, prompt, tiny_model, tiny_sae

ENTERS = Site("resid_pre", 0)
PLAIN = range(3, VOCAB)
EYE = torch.eye(D)


def text_of(ids: torch.Tensor, name: str = "text") -> Text:
    real = ids != PAD
    return Text(name, ids, real, real & (ids != BOS))


def padded(text: Text, *, front: int, behind: int) -> Text:
    """The same rows between columns of padding."""
    grow = lambda part, fill: torch.nn.functional.pad(part, (front, behind), value=fill)
    return Text(text.name, grow(text.ids, 7), grow(text.real, False), grow(text.counted, False))


@pytest.fixture(scope="module")
def mirrored():
    """A model whose words lie in pairs x and -x, so that an even function of x has no linear part."""
    model = fresh_model(seed=2)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        half = torch.randn(len(PLAIN) // 2, D, generator=torch.Generator().manual_seed(0))
        rows[3 : 3 + 2 * len(half)] = torch.cat([half, -half])
    return model


@pytest.fixture(scope="module")
def every_word() -> Text:
    """Eight rows, each of which has every word once, in another order."""
    generator = torch.Generator().manual_seed(1)
    orders = [torch.randperm(len(PLAIN), generator=generator) + 3 for _ in range(8)]
    return text_of(torch.stack([torch.cat([torch.tensor([BOS]), order]) for order in orders]), "words")


def linear_sae(A: torch.Tensor, *, even: torch.Tensor | None = None, c: torch.Tensor | None = None) -> SAE:
    """x_hat = x A - |x U| + c, exactly: relu(y) - relu(-y) = y, and relu(y) + relu(-y) = |y|."""
    up, down = [A, -A], [EYE, -EYE]
    if even is not None:
        up, down = [*up, even, -even], [*down, -EYE, -EYE]
    W_enc = torch.cat(up, dim=1)
    b_dec = torch.zeros(D) if c is None else c
    return SAE("planted", W_enc, torch.zeros(W_enc.shape[1]), torch.cat(down), b_dec, site=ENTERS)


def words_of(model) -> torch.Tensor:
    return model.get_input_embeddings().weight.detach()[3:]


def test_linear_error_is_found_exactly_and_restoring_it_is_the_plain_model(mirrored, every_word):
    A = 0.7 * EYE + 0.05 * torch.randn(D, D, generator=torch.Generator().manual_seed(3))

    found = split_error(mirrored, linear_sae(A), [every_word])

    assert found.whole.unexplained > 0.05
    assert found.whole.unexplained_nonlinear < 1e-9
    assert found.whole.r2_error == pytest.approx(1.0, abs=1e-8)
    assert found.whole.losses.with_linear == pytest.approx(found.whole.losses.plain, abs=1e-5)
    assert found.whole.losses.with_nonlinear == pytest.approx(found.whole.losses.sae, abs=1e-5)
    assert abs(found.whole.losses.sae - found.whole.losses.plain) > 1e-3


def test_even_error_has_no_linear_part(mirrored, every_word):
    U = 0.3 * torch.randn(D, D, generator=torch.Generator().manual_seed(4))
    mean = (words_of(mirrored) @ U).abs().mean(0)

    found = split_error(mirrored, linear_sae(EYE, even=U, c=mean), [every_word])

    assert found.whole.unexplained > 0.05
    assert abs(found.whole.linear_share) < 1e-6
    assert found.whole.losses.with_linear == pytest.approx(found.whole.losses.sae, abs=1e-5)
    assert found.whole.losses.with_nonlinear == pytest.approx(found.whole.losses.plain, abs=1e-5)


def test_sum_of_both_is_taken_apart_into_what_was_planted(mirrored, every_word):
    x = words_of(mirrored)
    U = 0.3 * torch.randn(D, D, generator=torch.Generator().manual_seed(4))
    even = (x @ U).abs() - (x @ U).abs().mean(0)

    found = split_error(mirrored, linear_sae(0.6 * EYE, even=U, c=(x @ U).abs().mean(0)), [every_word]).whole

    variance = (x - x.mean(0)).square().sum()
    assert found.unexplained_nonlinear == pytest.approx(float(even.square().sum() / variance), rel=1e-4)
    assert found.unexplained - found.unexplained_nonlinear == pytest.approx(0.4**2, rel=1e-3)


def test_squared_norm_that_goes_with_that_of_x_is_predicted_from_it_alone(mirrored, every_word):
    found = split_error(mirrored, linear_sae(0.5 * EYE), [every_word]).whole

    assert abs(found.r2_norm) < 1e-5
    assert found.r2_norm_quadratic == pytest.approx(1.0, abs=1e-6)


def test_map_is_measured_on_rows_that_it_was_not_fitted_to(mirrored):
    ids = prompt(6, 61, seed=5)

    found = split_error(mirrored, tiny_sae(site=ENTERS), [text_of(ids)], fit_share=0.5, n_ce_rows=0)

    assert found.n_fitted == found.whole.n_tokens == 3 * 60
    assert found.whole.losses is None


def test_normal_equations_in_parts_are_least_squares_at_once():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(300, 7, generator=generator) * torch.tensor([1e4, 1.0, 1e-3, 5.0, 1.0, 1.0, 1.0])
    y = torch.randn(300, 3, generator=generator)
    normal, spread = Normal(7, 3), Spread(7)
    for part in zip(z.split(41), y.split(41), strict=True):
        normal.add(*part)
        spread.add(part[0])

    best = torch.linalg.lstsq(z.double(), y.double()).solution

    assert torch.allclose(z.double() @ normal.solve(), z.double() @ best, atol=1e-7)
    assert spread.variance == pytest.approx(float((z - z.mean(0)).double().square().sum()), rel=1e-5)


def test_columns_that_are_zero_or_repeat_do_not_break_the_fit():
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    normal = Normal(4, 1)
    normal.add(torch.cat([z, z[:, :1], torch.zeros(50, 1)], dim=1), z.sum(-1, keepdim=True))

    weights = normal.solve()

    assert torch.isfinite(weights).all()
    assert float(weights[0] + weights[2]) == pytest.approx(1.0, abs=1e-5)


TWO = [text_of(prompt(5, 31, seed=1), "a"), text_of(prompt(4, 21, seed=2), "b")]


@pytest.mark.parametrize(
    ("batch_rows", "front", "behind"), [(1, 0, 0), (3, 0, 0), (8, 4, 0), (8, 0, 5), (2, 3, 2)]
)  # fmt: skip
def test_batches_and_padding_change_nothing(batch_rows, front, behind):
    model, sae = tiny_model("gpt2"), tiny_sae()
    whole = split_error(model, sae, TWO, n_top=5)

    texts = [padded(text, front=front, behind=behind) for text in TWO]
    found = split_error(model, sae, texts, n_top=5, batch_rows=batch_rows)

    for ours, theirs in zip((found.whole, *found.texts), (whole.whole, *whole.texts), strict=True):
        assert (ours.n_tokens, ours.n_massive) == (theirs.n_tokens, theirs.n_massive)
        for name in ("l0", "unexplained", "unexplained_nonlinear", "r2_error", "r2_norm", "r2_norm_quadratic"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-3), name
        assert ours.losses.sae == pytest.approx(theirs.losses.sae, rel=1e-4)
    assert [token.token_id for token in found.tokens] == [token.token_id for token in whole.tokens]


def test_mutant_that_takes_columns_for_positions_fails_on_padding(monkeypatch):
    """Rows that are not pushed to the left: absolute positions then count padding, and padding is attended to."""
    model, sae = tiny_model("gpt2"), tiny_sae()
    whole = split_error(model, sae, TWO, n_ce_rows=0).whole

    monkeypatch.setattr(
        Text, "rows", lambda self, part: Text(self.name, self.ids[part], self.real[part], self.counted[part])
    )
    found = split_error(model, sae, [padded(text, front=4, behind=0) for text in TWO], n_ce_rows=0).whole

    assert found.unexplained != pytest.approx(whole.unexplained, rel=1e-3)


def test_wide_dictionaries_are_coded_some_tokens_at_a_time(monkeypatch):
    sae, x = tiny_sae(), torch.randn(37, D, generator=torch.Generator().manual_seed(0))
    whole = code(sae, x)

    monkeypatch.setattr(passes_module, "MOST_ACTIVATIONS", 48 * 5)
    parts = code(sae, x)

    assert torch.allclose(parts.x_hat, whole.x_hat, atol=1e-5)
    assert torch.equal(parts.active, whole.active)
    assert torch.equal(parts.fired, whole.fired)
    assert torch.equal(whole.fired, (sae.encode(x) != 0).sum(0))


@pytest.mark.parametrize("stream", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_x_put_in_its_own_place_costs_nothing_and_zero_does(name, stream):
    model, rows = tiny_model(name), TWO[0]
    passes = Passes(model, tiny_sae(site=Site(stream, 1)))

    plain = passes.loss(rows)

    assert passes.loss(rows, lambda x: x) == plain
    assert passes.loss(rows, torch.zeros_like) != plain


def test_losses_are_those_of_rows_alone_and_of_another_implementation():
    model, sae, rows = tiny_model(), tiny_sae(), TWO[0]
    logits = model(rows.ids).logits[:, :-1].detach()
    slow = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.ids[:, 1:].flatten(), reduction="sum")
    chunks = Chunks(rows.ids, rows.counted, (), 0)

    passes = Passes(model, sae)
    means = cross_entropies(
        passes, [rows], {"plain": None, "sae": lambda x: code(sae, x).x_hat, "zero": torch.zeros_like}, batch_rows=2
    )[0]
    other = evaluate_sae(sae, model, chunks)

    assert n_predicted(rows) == 5 * 30
    assert passes.loss(rows) == pytest.approx(float(slow), rel=1e-6)
    assert means["plain"] == pytest.approx(other.ce, rel=1e-5)
    assert means["sae"] == pytest.approx(other.ce_spliced, rel=1e-5)
    assert means["zero"] == pytest.approx(other.ce_zeroed, rel=1e-5)


def test_reading_ends_at_the_site_and_leaves_no_hook():
    model = fresh_model()
    expected = model(TWO[0].ids, output_hidden_states=True).hidden_states[2]
    passes, ran = Passes(model, tiny_sae()), []
    model.model.layers[LAYERS - 1].register_forward_hook(lambda *_: ran.append(1))
    hooks = lambda: [len(module._forward_hooks) for module in model.modules()]
    before = hooks()

    x = passes.read(TWO[0].ids)

    assert torch.equal(x, expected)
    assert not ran
    assert hooks() == before


def test_massive_tokens_are_counted_and_own_no_sum(every_word):
    model = fresh_model(seed=2)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] *= 200
    sae = linear_sae(0.5 * EYE, even=0.1 * EYE)
    without = replace(every_word, counted=every_word.counted & (every_word.ids != 5))

    found, expected = (split_error(model, sae, [text]) for text in (every_word, without))

    assert found.whole.n_massive == 4
    assert expected.whole.n_massive == 0
    assert found.whole.n_tokens == expected.whole.n_tokens
    assert found.whole.unexplained == pytest.approx(expected.whole.unexplained, rel=1e-6)
    assert found.whole.losses.with_linear == pytest.approx(found.whole.losses.plain, abs=0.5)


def test_massive_tokens_can_be_left_out_of_a_sample(every_word):
    model = fresh_model(seed=2)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] *= 200
    passes = Passes(model, linear_sae(EYE))

    every = passes.sample([every_word], 10_000)
    some = passes.sample([every_word], 10_000, longest=passes.massive_from([every_word]))

    assert (len(every), len(some)) == (every_word.n_tokens, every_word.n_tokens - 8)
    assert some.norm(dim=-1).max() < 0.1 * every.norm(dim=-1).max()


def test_token_on_which_alone_the_sae_is_wrong_is_listed_first(mirrored, every_word):
    word = words_of(mirrored)[9]
    exact = linear_sae(EYE)
    extra = replace(
        exact, W_enc=torch.cat([exact.W_enc, word[:, None]], 1), W_dec=torch.cat([exact.W_dec, -0.1 * word[None]]),
        b_enc=torch.cat([exact.b_enc, -0.9 * word.square().sum()[None]]),
    )  # fmt: skip
    wordy = words.word_tokenizer()

    found = split_error(mirrored, extra, [every_word] * 2, tokenizer=wordy, n_ce_rows=0)

    assert found.tokens[0].token_id == 12
    assert found.tokens[0].token.strip() == "w12"
    assert found.tokens[0].n == 8
    assert found.tokens[0].share_of_error == pytest.approx(1.0, abs=1e-6)


def test_texts_are_domains_and_all_of_them_is_their_sum():
    found = split_error(tiny_model(), tiny_sae(), TWO)

    assert [part.name for part in found.texts] == ["a", "b"]
    assert found.whole.n_tokens == sum(part.n_tokens for part in found.texts)
    mean = sum(part.losses.sae * part.losses.n_tokens for part in found.texts) / found.whole.losses.n_tokens
    assert found.whole.losses.sae == pytest.approx(mean)


def test_progress_goes_through_every_stage_to_its_end():
    told: dict[str, tuple[int, int]] = {}

    split_error(tiny_model(), tiny_sae(), TWO, progress=lambda stage, done, total: told.update({stage: (done, total)}))

    assert set(told) == {"fitting", "measuring the error", "cross-entropy"}
    assert all(done == total > 0 for done, total in told.values())


def other_site() -> SAE:
    return replace(tiny_sae(), site=None)


REFUSED = {
    "transcoder": (lambda: replace(tiny_sae(), site_out=Site("resid_post", 2)), UnsupportedFormat, "transcoder"),
    "read in part": (lambda: tiny_sae().narrow([1, 2]), NotSliceable, "only 2 of its 48 latents were read"),
    "no site": (other_site, SiteNotFound, "does not say at which site"),
    "width": (lambda: tiny_sae(d_in=16), WidthMismatch, "carries width 32"),
    "model": (lambda: replace(tiny_sae(), manifest={"model_shape": {"hidden_size": 99}}), WrongModel, "hidden_size 99"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sae_that_leaves_no_error_here_is_refused(case):
    make, kind, message = REFUSED[case]

    with pytest.raises(kind, match=message):
        split_error(tiny_model(), make(), TWO)


def test_text_that_is_too_short_is_refused_with_the_number_needed():
    with pytest.raises(ScoreMismatch, match="the fitted share of the text has 40 tokens, and 66 are needed"):
        split_error(tiny_model(), tiny_sae(), [text_of(prompt(4, 21))])
    with pytest.raises(ScoreMismatch, match="in one share there is no token to count"):
        split_error(tiny_model(), tiny_sae(), [text_of(prompt(1, 90))])
    with pytest.raises(ScoreMismatch, match="no token to count in it"):
        split_error(tiny_model(), tiny_sae(), [])


def test_model_that_trains_or_is_being_steered_is_refused():
    with pytest.raises(UnsupportedMode, match="training mode"):
        Passes(fresh_model().train(), tiny_sae())
    model = fresh_model()
    passes = Passes(model, tiny_sae())
    plan = Plan((Rule("tiny", (1,), Scale(2.0)),))
    with steer(model, plan, saes=tiny_sae()):
        model(TWO[0].ids)
        with pytest.raises(ModelBusy, match="without edits"):
            passes.read(TWO[0].ids)


def test_reconstruction_that_is_not_a_number_is_named():
    passes = Passes(tiny_model(), tiny_sae())

    with pytest.raises(UnstableEdit, match="NaN or infinite"):
        passes.loss(TWO[0], lambda x: x * float("nan"))


TOY = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0], [0, -0.6, 0.8]])


def toy(b_dec: torch.Tensor | None = None) -> SAE:
    return SAE("toy", TOY.T, torch.zeros(5), TOY, torch.zeros(3) if b_dec is None else b_dec)


def one_token(x: torch.Tensor, atoms: torch.Tensor, rounds: int) -> torch.Tensor:
    """The algorithm of the paper for one token, as it is written down."""
    w, chosen, rest = torch.zeros(len(atoms)), set(), x
    for _ in range(rounds):
        inner = [float(atom @ rest) for atom in atoms]
        chosen.add(max(range(len(atoms)), key=inner.__getitem__))
        g = torch.tensor([inner[j] if j in chosen else 0.0 for j in range(len(atoms))])
        c = g @ atoms
        step = float(c @ rest) / float(c @ c) if float(c @ c) > 0 else 0.0
        w = (w + step * g).clamp(min=0.0)
        rest = x - w @ atoms
    return w


def test_pursuit_gives_the_published_example():
    x = torch.tensor([[1.0, 1.0, 0.0]])

    w = gradient_pursuit(toy(), x, 2)

    assert torch.allclose(w, torch.tensor([[0.16, 0, 0, 1.4, 0]]), atol=1e-6)
    assert torch.allclose(x - toy().decode(w), torch.tensor([[0, -0.12, 0]]), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_pursuit_of_a_batch_is_that_of_each_token(seed):
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(20, 8, generator=generator), dim=-1)
    x = torch.randn(12, 8, generator=generator)

    rounds = rounds_of_pursuit(x, atoms)
    found = [next(rounds) for _ in range(5)]

    for k, w in enumerate(found, 1):
        assert torch.allclose(w, torch.stack([one_token(row, atoms, k) for row in x]), atol=1e-5)
        assert int((w != 0).sum(-1).max()) <= k


def test_pursuit_is_in_the_units_of_the_sae_and_takes_b_dec_off():
    x = torch.tensor([[1.1, 0.5, -0.1], [2.0, 1.0, 3.0]])
    b_dec, lengths = torch.tensor([0.1, -0.5, -0.1]), torch.tensor([2.0, 1.0, 0.5, 4.0, 1.0])
    scaled = replace(toy(b_dec), W_dec=TOY * lengths[:, None])

    ours = gradient_pursuit(scaled, x, 2)

    assert torch.allclose(ours * lengths, gradient_pursuit(toy(), x - b_dec, 2), atol=1e-6)
    assert torch.allclose(scaled.decode(ours), toy(b_dec).decode(ours * lengths), atol=1e-6)


def test_pursuit_of_orthogonal_latents_finds_what_was_put_in():
    f = torch.relu(torch.randn(30, D, generator=torch.Generator().manual_seed(0)) - 1.0)
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1))).Q
    sae = SAE("basis", basis.T, torch.zeros(D), basis, torch.zeros(D))

    found = gradient_pursuit(sae, f @ basis, D)

    assert torch.allclose(found, f, atol=1e-4)
    assert torch.equal(gradient_pursuit(sae, f @ basis, 0), torch.zeros(30, D))


def test_curve_ends_where_the_encoder_has_no_more_to_give():
    sae, x = tiny_sae(), torch.randn(300, D, generator=torch.Generator().manual_seed(0))

    curve = pursuit_curve(sae, x, (48, 1, 4))

    error = (x - sae.decode(sae.encode(x))).double().square().sum() / (x - x.mean(0)).double().square().sum()
    assert [point.k for point in curve.points] == [1, 4, 48]
    assert curve.points[-1].encoder == pytest.approx(curve.unexplained, rel=1e-6)
    assert curve.unexplained == pytest.approx(float(error), rel=1e-5)
    assert curve.points[0].pursuit > curve.points[1].pursuit > curve.points[2].pursuit
    for point in curve.points:
        left = (x - sae.decode(gradient_pursuit(sae, x, point.k))).double().square().sum()
        assert point.pursuit == pytest.approx(float(left / (x - x.mean(0)).double().square().sum()), rel=1e-5)


def test_pursuit_refuses_what_has_no_whole_dictionary():
    x = torch.zeros(2, D)

    with pytest.raises(NotSliceable, match="only 1 of its 48"):
        gradient_pursuit(tiny_sae().narrow([3]), x, 2)
    with pytest.raises(UnsupportedFormat, match="transcoder"):
        gradient_pursuit(replace(tiny_sae(), site_out=Site("mlp_out", 1)), x, 2)
    with pytest.raises(UnsupportedFormat, match="-1 is no number of latents"):
        pursuit_curve(tiny_sae(), x, [3, -1])


def test_no_latents_leave_everything_but_b_dec_unexplained():
    sae, x = tiny_sae(), torch.randn(9, D, generator=torch.Generator().manual_seed(1))

    (none,) = pursuit_curve(sae, x, [0]).points

    expected = float((x - sae.b_dec).square().sum() / (x - x.mean(0)).square().sum())
    assert none.pursuit == pytest.approx(expected, rel=1e-5)
    assert none.encoder == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("error")
    words.save_model(folder / "model")
    base = tiny_sae(name="base")
    save_sae(base, folder / "base")
    boost = replace(
        tiny_sae(d_sae=4, seed=9, name="boost"), b_dec=torch.zeros(D),
        manifest={"boost": {"base": base.fingerprint(), "domain": "law"}},
    )  # fmt: skip
    save_sae(boost, folder / "boost")
    (folder / "law.txt").write_text(" ".join(f"w{3 + i * i % 50}" for i in range(1500)))
    (folder / "prose.txt").write_text(" ".join(f"w{3 + (i * 7 + i // 5) % 50}" for i in range(1500)))
    return folder


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "220"})
    assert result.exit_code == status, result.output + result.stderr
    return result


def command(place: Path, *more):
    return ("error", "--sae", place / "base", "--model", place / "model", "--text", place / "*.txt", *more)


def test_command_writes_the_split_as_json_and_nothing_else(place):
    found = json.loads(run(*command(place, "--json", "--pursuit", "--pursuit-tokens", 40, "--ce-rows", 1)).stdout)

    (split,) = found["splits"]
    assert [part["name"] for part in split["texts"]] == ["law", "prose"]
    assert 0 < split["whole"]["unexplained_nonlinear"] <= split["whole"]["unexplained"] * 1.01
    assert split["whole"]["losses"]["n_tokens"] > 0
    assert found["pursuit"]["n_tokens"] == 40
    assert split["tokens"][0]["token"].strip().startswith("w")


def test_command_shows_before_and_after_a_boost_and_draws_it(place):
    text = run(
        *command(place, "--boost", place / "boost", "--domain", f"both={place / 'law.txt'}"), "--picture",
        place / "out" / "error.png",
    ).output  # fmt: skip

    assert "base and boosted" in text
    assert "CE gap before" in text
    assert "Largest errors of boosted" in text
    assert "both" in text
    assert (place / "out" / "error.png").read_bytes().startswith(b"\x89PNG")


def test_command_refuses_in_words(place):
    nothing = run("error", "--sae", place / "base", "--model", place / "model", status=2)
    wrong = run(*command(place, "--domain", "law"), status=2)

    assert "give text to measure on" in " ".join(nothing.stderr.split())
    assert "write NAME=FILE" in " ".join(wrong.stderr.split())


def test_command_pursues_typical_tokens_only(place, tmp_path):
    model = fresh_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[4] *= 500
    model.save_pretrained(tmp_path / "model")
    words.word_tokenizer().save_pretrained(tmp_path / "model")
    given = ("error", "--sae", place / "base", "--model", tmp_path / "model", "--text", place / "law.txt")

    found = json.loads(run(*given, "--ce-rows", 0, "--pursuit", "--pursuit-tokens", 10_000, "--json").stdout)

    whole = found["splits"][0]["whole"]
    assert whole["n_massive"] > 0
    assert found["pursuit"]["n_tokens"] == whole["n_tokens"]
    assert found["pursuit"]["unexplained"] == pytest.approx(whole["unexplained"], rel=1e-4)


@pytest.mark.parametrize("name", ["split.txt", "split", "folder.png"])
def test_picture_that_cannot_be_written_is_refused_before_anything_is_measured(place, tmp_path, name):
    (tmp_path / "folder.png").mkdir()

    refused = run(*command(place, "--picture", tmp_path / name), status=2)

    assert "no name of a PNG file" in " ".join(refused.stderr.split())
    assert "measuring" not in refused.stderr


def test_picture_of_saved_json_has_nothing_where_a_number_was_not_one(place, tmp_path):
    document = json.loads(run(*command(place, "--json", "--ce-rows", 0, "--top", 3)).stdout)
    for part in (document["splits"][0]["whole"], document["splits"][0]["texts"][0]):
        part |= {"unexplained": None, "r2_error": None, "r2_norm": None}

    assert write_error_picture(document, tmp_path / "nulls.png").stat().st_size > 1000


def test_picture_without_matplotlib_says_what_to_install(place, tmp_path, monkeypatch):
    document = json.loads(run(*command(place, "--json", "--ce-rows", 0, "--top", 3)).stdout)
    write_error_picture(document, tmp_path / "no_losses.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)

    with pytest.raises(MissingExtra, match="matplotlib"):
        write_error_picture(document, tmp_path / "never.png")
