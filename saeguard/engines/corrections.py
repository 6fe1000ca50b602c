"""An SAE that was trained on weights as TransformerLens processes them, for the model's plain weights.

    center_writing_weights   the stream had no mean over its width      norm "center": the mean is taken off each token
                             (LayerNorm models only)                    before encoding and is left in the stream
    fold_value_biases        attn_z lacked the values' bias             b_enc - bias @ W_enc, b_dec + bias
    fold_ln                  that bias held what the values make of     it is taken off with the rest
                             the bias of ln1
                             hooks behind ln2 were before its gain      the stream mlp_normed
                             the MLP ignored the mean of what it        W_dec and b_dec without their mean, where they
                             reads (LayerNorm models only)              write to mlp_normed

Loaders set ``norm`` and ``manifest["processing"]`` from what a config says; what needs the model's weights is done
here, when a plan is bound to it. A ``processing`` that says nothing of fold_ln has it, as TransformerLens does unless
asked; for mlp_normed it has to say so.

A HookedTransformer may have processed weights itself. An SAE that was trained on them fits as it is, and one that was
trained on plain ones is refused where its stream is another now: what was taken out of the weights is not in the model.
"""

from collections.abc import Set
from dataclasses import replace
from typing import Protocol, runtime_checkable

from saeguard.engines.base import Engine
from saeguard.errors import WrongModel
from saeguard.loaders.transformer_lens import WRITTEN
from saeguard.sae import SAE
from saeguard.sites import Site


@runtime_checkable
class Processing(Protocol):
    """An engine whose model may have processed weights."""

    def processed(self) -> frozenset[str]:
        """How TransformerLens processed the weights, of what changes streams, in the words of its arguments."""
        ...


def on_plain_weights(sae: SAE, engine: Engine, reads: Site | None = None, writes: Site | None = None) -> SAE:
    """``sae`` with the corrections that ``engine``'s model asks for; the same object where it asks for none.

    ``reads`` and ``writes`` are the sites at which it is used, by default its own. Raises `WrongModel` where the
    model's weights were processed, the SAE was trained on others, and that cannot be put right.
    """
    if isinstance(engine, Processing):
        # the norms of other models are folded without a change of any stream that both ways have
        done = engine.processed() if engine.centers() else engine.processed() - {"fold_ln"}
        _check_processed(sae, done, reads, writes)
    if sae.norm == "center" and not engine.centers():  # TransformerLens leaves models without LayerNorm as they are
        sae = replace(sae, norm="none")
    site, processing = reads or sae.site, sae.manifest.get("processing", {})
    if site is None:
        return sae
    if processing.get("center_writing_weights") and sae.norm == "none" and site.stream in WRITTEN and engine.centers():
        sae = replace(sae, norm="center")
    if (writes or sae.site_out or site).stream == "mlp_normed" and processing.get("fold_ln") and engine.centers():
        W_dec, b_dec = sae.W_dec.float(), sae.b_dec.float()
        sae = replace(sae, W_dec=W_dec - W_dec.mean(-1, keepdim=True), b_dec=b_dec - b_dec.mean())
    if site.stream != "attn_z" or not processing.get("fold_value_biases"):
        return sae
    bias = engine.value_bias(site.layer, with_norm=processing.get("fold_ln", True))
    if bias is None:
        return sae
    done = {key: value for key, value in processing.items() if key != "fold_value_biases"}
    return replace(sae.shifted(bias.to(sae.W_enc.device)), manifest={**sae.manifest, "processing": done})


def _check_processed(sae: SAE, processed: Set[str], reads: Site | None, writes: Site | None) -> None:
    """Refuse an SAE of plain weights whose stream has been changed by what was ``processed``."""
    site, said = reads or sae.site, sae.manifest.get("processing", {})
    written = writes or sae.site_out or site
    if site is None or written is None:
        return
    is_centered = sae.norm in ("center", "layer_norm") or bool(said.get("center_writing_weights"))
    missing = {
        "center_writing_weights": site.stream in WRITTEN and not is_centered and not sae.is_vectors,
        "fold_value_biases": site.stream == "attn_z" and not said.get("fold_value_biases") and not sae.is_vectors,
        "fold_ln": written.stream == "mlp_normed" and not said.get("fold_ln"),
        "refactor_factored_attn_matrices": "attn_z" in (site.stream, written.stream),
    }
    for name in sorted(processed):
        if missing[name]:
            raise WrongModel(
                f"SAE {sae.name} at {site}",
                f"it was trained on a model without {name}, which was done to this one and cannot be undone",
                "Load the model with HookedTransformer.from_pretrained_no_processing.",
            )
