"""The table of releases holds what SAELens' registry holds, in a small file, and answers typing errors with names."""

import gzip
import json
from collections import Counter

import pytest

from saeguard.errors import UnsupportedFormat
from saeguard.loaders import releases
from saeguard.loaders.releases import Release, find, ids

MAX_BYTES = 64_000
SAES = {
    "gemma_scope_2": 8784,
    "gemma_scope": 2833 + 26,
    "dictionary_learning": 838,
    "qwen_scope": 544,
    "saelens": 292,
    "circuit_tracer": 208,
    "llama_scope": 192,
    "llama_scope_r1": 96,
    "circuit_tracer_clt": 26,
    "nanda": 12,
    "temporal": 3,
    "goodfire": 2,
    "linear_relu": 1,
}
BOS = {"prepend_bos": True}
KNOWN = [
    (
        "gpt2-small-res-jb",
        "blocks.8.hook_resid_pre",
        Release("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre", "saelens", "gpt2",
                {"center_writing_weights": True}),
    ),
    (
        "gpt2-small-mlp-tm",
        "blocks.0.hook_mlp_out",
        Release("tommmcgrath/gpt2-small-mlp-out-saes", "sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1", "saelens",
                "gpt2", {"center_writing_weights": True, "norm_scaling_factor": 1.049317316132615}),
    ),
    (
        "gemma-2b-res-jb",
        "blocks.12.hook_resid_post",
        Release("jbloom/Gemma-2b-Residual-Stream-SAEs", "gemma_2b_blocks.12.hook_resid_post_16384", "saelens",
                "google/gemma-2b", {"norm_scaling_factor": 0.21381938399317255}),
    ),
    (
        "mistral-7b-res-wg",
        "blocks.16.hook_resid_pre",
        Release("JoshEngels/Mistral-7B-Residual-Stream-SAEs", "mistral_7b_layer_16", "saelens",
                "mistralai/Mistral-7B-v0.1", {"normalize_activations": "constant_norm_rescale"}),
    ),
    (
        "gemma-scope-2b-pt-res-canonical",
        "layer_12/width_16k/canonical",
        Release("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82", "gemma_scope",
                "google/gemma-2-2b", BOS),
    ),
    (
        "gemma-scope-9b-it-res",
        "layer_20/width_131k/average_l0_13",
        Release("google/gemma-scope-9b-it-res", "layer_20/width_131k/average_l0_13", "gemma_scope",
                "google/gemma-2-9b-it", BOS),
    ),
    (
        "gemma-scope-2-270m-pt-res-all",
        "layer_0_width_16k_l0_big",
        Release("google/gemma-scope-2-270m-pt", "resid_post_all/layer_0_width_16k_l0_big", "gemma_scope_2",
                "google/gemma-3-270m", BOS),
    ),
    (
        "llama_scope_lxr_8x",
        "l15r_8x",
        Release("fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x", "llama_scope",
                "meta-llama/Llama-3.1-8B", BOS),
    ),
    (
        "llama_scope_r1_distill",
        "l0r_800m_slimpajama",
        Release("fnlp/Llama-Scope-R1-Distill", "800M-Slimpajama-0-OpenR1-Math-220k/L0R", "llama_scope_r1",
                "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", BOS | {"norm_scaling_factor": 53.52995401997436}),
    ),
    (
        "qwen-scope-3-1.7b-base-w32k-l50",
        "layer27",
        Release("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "layer27.sae.pt", "qwen_scope",
                "Qwen/Qwen3-1.7B-Base", {}),
    ),
    (
        "mntss-gemma-2-2b-2.5m-clt-as-per-layer",
        "layer_25",
        Release("mntss/clt-gemma-2-2b-2.5M", "25", "circuit_tracer_clt", "google/gemma-2-2b", BOS),
    ),
]  # fmt: skip


def test_table_has_every_release_and_sae_of_the_registry():
    every = [(release, sae_id) for release in releases.releases() for sae_id in ids(release)]
    families = Counter(find(release, sae_id).family for release, sae_id in every)

    assert len(releases.releases()) == 170
    assert len(set(every)) == len(every) == 13_857
    assert families == SAES


def test_every_entry_names_a_repository_a_path_and_a_model():
    for release in releases.releases():
        for sae_id in ids(release):
            found = find(release, sae_id)
            assert found.repo.count("/") == 1
            assert found.path
            assert "{" not in found.path
            assert found.model


@pytest.mark.parametrize(("release", "sae_id", "found"), KNOWN, ids=[release for release, _, _ in KNOWN])
def test_known_sae_resolves(release, sae_id, found):
    assert find(release, sae_id) == found


def test_overrides_are_only_the_documented_ones():
    counts = Counter(key for release in releases.releases() for i in ids(release) for key in find(release, i).overrides)

    # 13 + 8 + 12 of GPT-2; 3 of Mistral; 12 of GPT-2, 1 of Gemma and 96 of R1-Distill
    assert counts == {
        "center_writing_weights": 33,
        "normalize_activations": 3,
        "norm_scaling_factor": 109,
        "prepend_bos": 13_857 - 292 - 3 - 544 - 208 - 7,  # SAELens's own, temporal, and three families on Qwen
    }


def test_overrides_cannot_be_changed_for_the_next_reader():
    overrides = find("gpt2-small-res-jb", "blocks.8.hook_resid_pre").overrides

    with pytest.raises(TypeError, match="does not support item assignment"):
        overrides["center_writing_weights"] = False


def test_ids_are_in_the_order_of_the_layers():
    assert ids("gpt2-small-hook-z-kk") == tuple(f"blocks.{layer}.hook_z" for layer in range(12))


@pytest.mark.parametrize(
    ("release", "sae_id", "message"),
    [
        (
            "gpt2-small-res-bj",
            "blocks.8.hook_resid_pre",
            r"SAE 'blocks.8.hook_resid_pre' of release 'gpt2-small-res-bj'.* none of the 170 known releases has that "
            r"name.* Close to it: gpt2-small-res-jb,",
        ),
        ("google/gemma-scope-27b-pt-res", "x", r"Close to it: gemma-scope-27b-pt-res, gemma-scope-27b-pt-res-canon"),
        ("~", "x", r"All are in saeguard\.loaders\.releases\.releases\(\)"),
        (
            "gpt2-small-res-jb",
            "blocks.8.hook_resid_post",
            r"gpt2-small-res-jb has 13 SAEs and none with that id.* Close to it: .*blocks\.8\.hook_resid_pre",
        ),
        ("goodfire-llama-3.1-8b-instruct", "layer_18", r"has 1 SAE and none with that id.* Close to it: layer_19\."),
        ("qwen-scope-3.5-27b-w80k-l50", "~", r"All are in saeguard\.loaders\.releases\.ids\('qwen-scope-3\.5-27b-w80k"),
    ],
)
def test_unknown_name_is_answered_with_close_ones(release, sae_id, message):
    with pytest.raises(UnsupportedFormat, match=message):
        find(release, sae_id)


def test_ids_of_an_unknown_release_are_refused():
    with pytest.raises(UnsupportedFormat, match="the ids of release 'gemma-scope'"):
        ids("gemma-scope")


def test_file_is_small_and_canonical():
    packed = releases.TABLE.read_bytes()
    text = gzip.decompress(packed).decode("utf-8")

    assert len(packed) < MAX_BYTES
    assert packed[4:8] == bytes(4)  # no time of writing: the same facts are the same file
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
